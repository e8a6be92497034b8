"""FedProx's term, plain SGD and SCAFFOLD's correction on the real `tiny` model, and what caches know of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay import data, models
from assay.config import Experiment, LoraSettings
from assay.contribution import flatten, unflatten
from assay.data import Example
from assay.federated import aggregators, scaffold
from assay.federated.local_sft import LocalSettings, Terms, answer_nll, collate, take_step, tokenize, train
from assay.federated.lora import Carrier, is_a
from assay.federated.population import load_sources
from assay.federated.preparation import Prepared, client_settings, controls_rule, probe_key, rehearsal_key

ADAMW = LocalSettings(steps=3, batch_size=24, max_length=48, lr=1e-2, seed=1)  # one batch holds all rows
SGD = replace(ADAMW, optimizer="sgd", lr=0.5)


@pytest.fixture(scope="module")
def carrier() -> Iterator[Carrier]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Carrier(models.load("tiny", "float32"), LoraSettings())
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return data.load("helpful", limit=24)


@pytest.fixture(scope="module")
def start(carrier: Carrier) -> dict[str, np.ndarray]:
    """Not the initial adapter: with B = 0 half of the gradients are zero."""
    rng = np.random.default_rng(0)
    return {n: (v + 0.05 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in carrier.initial().items()}


def loss_of(carrier: Carrier, rows: list[Example]) -> torch.Tensor:
    tokens = [tokenize(carrier.base.tokenizer, r, "chatml", 48) for r in rows]
    return answer_nll(carrier.model, collate(tokens, carrier.base.tokenizer.pad_token_id)).mean()


def lora_of(carrier: Carrier) -> list[torch.nn.Parameter]:
    return [p.requires_grad_(True) for n, p in carrier.model.named_parameters() if "lora_" in n]


def test_the_proximal_gradient_is_autograds_of_the_written_out_objective() -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    weights = [torch.nn.Parameter(s + 0.3 * torch.randn_like(s)) for s in start]
    mu, clip, before = 0.7, 2.0, [w.detach().clone() for w in weights]

    def loss() -> torch.Tensor:
        return (weights[0] ** 3).sum() + (weights[1].exp()).sum()

    objective = loss() + mu / 2 * sum(((w - s) ** 2).sum() for w, s in zip(weights, start))
    expected = torch.autograd.grad(objective, weights)
    length = torch.sqrt(sum((g**2).sum() for g in expected))
    assert length > clip, "clipping is part of what is tested"
    take_step(torch.optim.SGD(weights, lr=1.0), weights, loss(), Terms(clip, mu, tuple(start)))
    for weight, old, gradient in zip(weights, before, expected):
        torch.testing.assert_close(old - weight.detach(), gradient * clip / length, rtol=1e-5, atol=1e-6)


def test_fedprox_on_a_model_equals_its_written_out_objective(
    carrier: Carrier, rows: list[Example], start: dict[str, np.ndarray]
) -> None:
    mu = 5.0
    ours = train(carrier, start, rows, replace(ADAMW, prox_mu=mu)).tensors
    carrier.set(start)
    weights = lora_of(carrier)
    anchors = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=ADAMW.lr, weight_decay=0.0)
    for _ in range(ADAMW.steps):
        optimizer.zero_grad()
        pull = sum(((w - a) ** 2).sum() for w, a in zip(weights, anchors))
        (loss_of(carrier, rows) + mu / 2 * pull).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for name, value in carrier.get().items():
        np.testing.assert_allclose(ours[name], value, atol=5e-5)
    plain = train(carrier, start, rows, ADAMW).tensors
    assert np.linalg.norm(flatten(ours) - flatten(start)) < np.linalg.norm(flatten(plain) - flatten(start))


def own_gradients(carrier: Carrier, rows: list[Example], start: Any, corrections: Any) -> list[np.ndarray]:
    """Plain SGD written down, correction added after the clipping; the client's own gradients of each step."""
    carrier.set(corrections)
    added = [w.detach().clone() for w in lora_of(carrier)]
    carrier.set(start)
    weights, seen = lora_of(carrier), []
    for _ in range(SGD.steps):
        gradients = torch.autograd.grad(loss_of(carrier, rows), weights)
        length = torch.sqrt(sum((g**2).sum() for g in gradients))
        gradients = [g * min(1.0, SGD.clip / float(length)) for g in gradients]
        with torch.no_grad():
            for weight, gradient, correction in zip(weights, gradients, added):
                weight -= SGD.lr * (gradient + correction)
        seen.append(gradients)
    mean = [torch.stack(g).mean(dim=0) for g in zip(*seen)]
    with torch.no_grad():  # read through the carrier, so that names are the adapter's
        end = carrier.get()
        for weight, value in zip(weights, mean):
            weight.copy_(value)
    return [flatten(end), flatten(carrier.get())]


def test_the_server_reads_a_clients_mean_gradient_off_the_submission_alone(
    carrier: Carrier, rows: list[Example], start: dict[str, np.ndarray]
) -> None:
    rng = np.random.default_rng(1)
    base_D = flatten(start)
    own_D, mean_D = (0.01 * rng.standard_normal((2, base_D.size))).astype(np.float32)
    controls = {"mean": mean_D, "weight": np.ones(1, np.float32), "of/me": own_D}
    sent = unflatten(scaffold.correction(controls, "me"), start)
    end_D, gradient_D = own_gradients(carrier, rows, start, sent)
    submitted_D = flatten(train(carrier, start, rows, SGD, correction=sent).tensors)
    np.testing.assert_allclose(submitted_D, end_D, atol=2e-5)
    assert np.abs(submitted_D - flatten(train(carrier, start, rows, SGD).tensors)).max() > 1e-3, "the correction acts"
    delta_ND = (submitted_D - base_D)[None]
    rule, mean = scaffold.Rule.of(SGD), aggregators.make("mean")
    new = scaffold.update(controls, ["me"], delta_ND, np.ones(1), rule, mean)
    np.testing.assert_allclose(new["of/me"], gradient_D, atol=5e-5)


def test_a_correction_reaches_the_tensor_it_names(carrier: Carrier, rows: list[Example], start: Any) -> None:
    settings = replace(SGD, steps=1)
    plain = train(carrier, start, rows, settings).tensors
    for name in (sorted(start)[0], sorted(start)[-1]):
        one = {n: np.full_like(v, 0.25 if n == name else 0.0) for n, v in start.items()}
        corrected = train(carrier, start, rows, settings, correction=one).tensors
        for other in start:
            moved = corrected[other] - plain[other]
            np.testing.assert_allclose(moved, -settings.lr * one[other], atol=1e-6)


def test_probe_and_rehearsal_know_what_clients_are_trained_with() -> None:
    """A cached threshold from another kind of training would judge this one."""
    base = Experiment().changed(model__name="tiny")
    prepared = Prepared(name="tiny", path=Path(), base_sha256="0" * 64, dtype="float32", alignment="none")
    sources = load_sources(base)
    changes: list[dict[str, Any]] = [
        {"training__optimizer": "sgd"},
        {"training__prox_mu": 0.01},
        {"training__optimizer": "sgd", "training__prox_mu": 0.01},
    ]
    probes = {probe_key(base.changed(**c), prepared, sources) for c in [{}, *changes]}
    assert len(probes) == 4
    sgd = base.changed(training__optimizer="sgd")
    more = [
        sgd.changed(training__scaffold=True),
        base.changed(server__opt="fedadam"),
        base.changed(server__opt="fedadam", server__params={"tau": 0.1}),
        base.changed(server__lr=0.5),
        base.changed(training__rounds=10),  # ten rounds are rehearsed, not six
    ]
    keys = [rehearsal_key(e, prepared, sources) for e in [base, *(base.changed(**c) for c in changes), *more]]
    assert len(set(keys)) == len(keys)
    longer = [base.changed(training__rounds=n) for n in (10, 25)]
    assert len({rehearsal_key(e, prepared, sources) for e in longer}) == 1, "ten are the most"
    assert probe_key(base.changed(server__opt="fedadam"), prepared, sources) in probes, "a probe never meets the server"


def test_clients_rehearsal_and_probe_train_with_the_same_terms() -> None:
    experiment = Experiment().changed(
        training__optimizer="sgd", training__prox_mu=0.3, training__scaffold=True, training__schedule="cosine",
        training__lr=0.4, training__clip=2.0, training__steps=5,
    )  # fmt: skip
    settings = client_settings(experiment, 3)
    assert (settings.optimizer, settings.prox_mu) == ("sgd", 0.3)
    assert controls_rule(experiment, 1) == scaffold.Rule(scale=5 * 0.4, limit=2.0)
    rule = controls_rule(experiment, 3)
    assert rule is not None
    assert 0 < rule.scale < 2
    assert rule.scale == pytest.approx(5 * settings.lr)
    assert controls_rule(Experiment(), 1) is None


def test_a_cosine_schedule_never_ends_at_rate_zero() -> None:
    """At rate 0 nobody trains, everybody sends the global adapter back, and everybody would be refused."""
    base = Experiment().changed(training__schedule="cosine", training__lr=5e-5, training__rounds=25)
    rates = [client_settings(base, r).lr for r in range(1, 26)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 5e-5
    assert rates[-1] == pytest.approx(1e-6), "the paper's"
    assert client_settings(base.changed(training__lr_final=2e-5), 25).lr == pytest.approx(2e-5)


def test_a_frozen_lora_a_is_not_trained_and_b_is(
    carrier: Carrier, rows: list[Example], start: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = train(carrier, start, rows, replace(ADAMW, prox_mu=0.1)).tensors
    monkeypatch.setattr(carrier, "settings", carrier.settings.model_copy(update={"freeze_a": True}))
    frozen = train(carrier, start, rows, replace(ADAMW, prox_mu=0.1)).tensors
    for name, before in start.items():
        assert np.array_equal(frozen[name], before) is is_a(name)
        assert not np.array_equal(free[name], before)
