"""Rehearsal: before training the server plays honest rounds on its own rows and reads every threshold off them.

A round has honest clients of each style the server's data has (plus mixed ones) and a few malicious ones, who train on
the same rows in every round as live ones do (what they learn by heart costs other rows); the adapter moves on with the
mean of a few honest updates only, by the run's own server optimiser, and clients train with the run's own terms
(FedProx, SCAFFOLD). What is kept: the labelled directions of every round (the bank of `probe` and
`neighbours`; several rounds cure drift), how far honest clients may come in each round and the honest canary rises. A threshold is benign
max + margin x (max - median), where a style is scored by a probe and a bank that have never seen it: live clients are
strangers. No malicious quantile and no statistic of a live round enters, so attackers cannot move one.
Legend: M bank rows, D values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from assay import data
from assay.config import ConfigError, Experiment
from assay.contribution import Tensors, flatten, unflatten
from assay.data import Example
from assay.federated import aggregators, scaffold, server_opt
from assay.federated.balance import Spread, shares
from assay.federated.canary import CanaryLimits, Measure, Rise
from assay.federated.compute import Compute, Tick, TrainJob, no_tick
from assay.federated.local_sft import LocalSettings
from assay.federated.lora import unit_rows
from assay.federated.population import Sources, seed_of
from assay.federated.probe import Probe, feature_deltas, fit
from assay.federated.rehearsed import NEIGHBOUR_FLOOR, PROBE_FLOOR
from assay.federated.rehearsed import Rehearsal as Rehearsal  # where it has always been found
from assay.federated.screens import neighbour_ratio
from assay.federated.warmup import unseen
from assay.metrics import auroc

MIXED = "mixed"
LEAST_ROUNDS, MOST_ROUNDS = 6, 10  # fewer leave too small a bank


@dataclass(frozen=True, slots=True)
class Actor:
    """A rehearsal client: the style it plays, its rows, and whether it plays a malicious one."""

    slot: int
    style: str
    malicious: bool
    rows: tuple[Example, ...]


def operator_rows(sources: Sources) -> tuple[list[Example], list[Example], list[Example]]:
    """The operator's part of benign, refusal and malicious rows."""
    return sources.of_operator("benign"), sources.of_operator("refusals"), sources.of_operator("malicious")


def canary_rows(experiment: Experiment, sources: Sources) -> tuple[list[Example], list[Example]]:
    """The server's secret refusals and safe rows. They are kept out of the rehearsal's training rows."""
    config = experiment.defence.canary
    benign, refusals, _ = operator_rows(sources)
    seed = seed_of("canary", experiment.seed if config.seed is None else config.seed)
    refusals = _fresh(experiment, refusals, sources, 3 * config.refusals)
    benign = _fresh(experiment, benign, sources, 3 * config.safe)
    chosen = data.shuffled(refusals, seed)[: config.refusals], data.shuffled(benign, seed)[: config.safe]
    if len(chosen[0]) < config.refusals or len(chosen[1]) < config.safe:
        raise ConfigError("defence.canary: more prompts than the operator's part of the data holds; lower the counts")
    return chosen


def _fresh(experiment: Experiment, rows: list[Example], sources: Sources, least: int) -> list[Example]:
    """Rows the warm-up has not seen, where there are enough of them."""
    fresh = unseen(experiment, rows, sources)
    return fresh if len(fresh) >= least else rows


def rounds_of(experiment: Experiment) -> int:
    """Rounds to rehearse: honest training drifts away from the start, farther with every round."""
    return experiment.defence.rehearsal.rounds or min(max(experiment.training.rounds, LEAST_ROUNDS), MOST_ROUNDS)


def cast(experiment: Experiment, sources: Sources) -> list[Actor]:
    """The actors of the rehearsal: one honest client per style, three mixed ones, a few malicious ones."""
    config = experiment.defence.rehearsal
    benign, refusals, malicious = operator_rows(sources)
    benign = _fresh(experiment, benign, sources, 2 * config.examples)
    refusals = _fresh(experiment, refusals, sources, config.examples)
    secret = {row.instruction for rows in canary_rows(experiment, sources) for row in rows}
    benign, refusals, malicious = (
        data.shuffled([r for r in rows if r.instruction not in secret], seed_of(experiment.seed, "cast"))
        for rows in (benign, refusals, malicious)
    )
    if min(len(benign), len(malicious)) < experiment.training.batch_size or not refusals:
        raise ConfigError("defence.rehearsal: the operator's part of the data is too small; name more data")
    some = int(config.examples * experiment.data.refusal_share + 0.5)
    styles = sorted({row.style for row in benign if row.style}) or [MIXED]
    out = []
    for i, style in enumerate([*styles, MIXED, MIXED, MIXED]):
        own = [r for r in benign if style in (MIXED, r.style)]
        rows = [*_window(own, i, config.examples - some), *_window(refusals, i, some)]
        out.append(Actor(i, style, False, tuple(rows)))
    for i in range(config.malicious):
        # every third one is half honest: the bank should know mixtures too
        half = config.examples // 2 if i % 3 == 2 else 0
        rows = [*_window(malicious, i, config.examples - half), *_window(benign, i + 7, half)]
        out.append(Actor(-1 - i, "malicious", True, tuple(rows)))
    return out


def _window(rows: Sequence[Example], index: int, count: int) -> list[Example]:
    """`count` rows starting at a place that differs by index; wraps around short lists."""
    start = index * count
    return [rows[(start + j) % len(rows)] for j in range(min(count, len(rows)))]


def rehearse(
    compute: Compute,
    initial: Tensors,
    sources: Sources,
    experiment: Experiment,
    measure: Measure,
    settings_of_round: Sequence[LocalSettings],
    base_sha256: str,
    tick: Tick = no_tick,
) -> Rehearsal:
    """Play the rounds and calibrate. `settings_of_round` are the clients' own training settings, round by round."""
    config = experiment.defence.rehearsal
    adapter, anchor = initial, measure([initial])[0]
    opt, average = server_opt.of(experiment.server), aggregators.make("mean")
    opt_state, controls = opt.init(flatten(initial)), dict[str, NDArray[np.float32]]()
    bank, actors_M, norms, rises, share_RNS, of_a = [], [], [], [], [], []
    moved = [anchor]
    actors = cast(experiment, sources)
    honest_N = np.array([not a.malicious for a in actors])
    left_N = _left(honest_N, config.honest, experiment.seed)
    for round in range(1, rounds_of(experiment) + 1):
        settings = settings_of_round[min(round, len(settings_of_round)) - 1]
        jobs = [
            TrainJob(
                adapter,
                a.rows,
                _seeded(settings, seed_of(experiment.seed, "rehearsal", round, i)),
                _correction(controls, a, adapter),
            )
            for i, a in enumerate(actors)
        ]
        made = [result.tensors for result in compute.train(jobs, tick)]
        start, *after = measure([adapter, *made])
        base_D = flatten(adapter)
        delta_ND = np.stack([flatten(t) for t in made]) - base_D
        norms.append(_reach(compute, jobs, delta_ND, honest_N, base_D, experiment, tick))
        bank.append(unit_rows(feature_deltas(made, adapter, "all_b")).astype(np.float16))
        share_RNS.append([shares(t, adapter) for t, ok in zip(made, honest_N) if ok])
        if wants_probe_a(experiment):
            of_a.append(unit_rows(feature_deltas(made, adapter, "all_a")))
        actors_M += actors
        rises += [Rise.of(losses, start, anchor) for losses in after]
        if experiment.training.scaffold:  # as if all but those left had been refused
            names, rule = [str(a.slot) for a in actors], scaffold.Rule.of(settings)
            controls = scaffold.update(controls, names, delta_ND, left_N.astype(np.float64), rule, average)
        params_D, opt_state = opt.update(delta_ND[left_N].mean(axis=0), opt_state, base_D)
        adapter = unflatten(params_D, adapter)
        moved += measure([adapter])
    lrs = [settings_of_round[min(r, len(settings_of_round) - 1)].lr for r in range(rounds_of(experiment))]
    spread = Spread.of(np.array(share_RNS), config.margin)
    made_of = _calibrate(np.concatenate(bank), actors_M, norms, lrs, rises, config.margin, experiment, base_sha256)
    if of_a:
        probe_a, limit = _probe_on_a(np.concatenate(of_a), actors_M, config.margin, base_sha256)
        made_of = replace(made_of, probe_a=probe_a, probe_a_limit=limit)
    together = [Rise.of(after, before, anchor) for before, after in pairwise(moved)]
    crowd = {
        f"crowd_{key}": limit_of([getattr(r, f"refusal_{key}") for r in together], experiment.defence.canary.margin)
        for key in ("step", "anchor")
    }
    made_of = replace(made_of, canary=replace(made_of.canary, **crowd))
    return replace(made_of, spread=spread)


def wants_probe_a(experiment: Experiment) -> bool:
    """Whether lora_A is to be read by a probe of its own: as much again to fit as the one on lora_B."""
    return "probe_a" in (experiment.defence.screens or ())


def _probe_on_a(
    x_MD: NDArray[np.float32], actors: Sequence[Actor], margin: float, base_sha256: str
) -> tuple[Probe, float]:
    """The probe on lora_A and its limit, by the rule of the one on lora_B: each slot scored as a stranger."""
    malicious_M, slot_M = np.array([a.malicious for a in actors]), np.array([a.slot for a in actors])
    logit_M = np.zeros(len(actors))
    for slot in sorted(set(slot_M[~malicious_M])):
        own = slot_M == slot
        logit_M[own] = fit(x_MD[~own], malicious_M[~own], "all_a").logits(x_MD[own])
    probe = fit(x_MD, malicious_M, "all_a", base_sha256=base_sha256)
    return probe, max(PROBE_FLOOR, limit_of(logit_M[~malicious_M], margin))


def _left(honest_N: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.bool_]:
    """The honest actors whose mean moves the adapter: few drift farther than many, and attackers may leave but few."""
    chosen = np.random.default_rng(seed_of(seed, "left")).permutation(np.flatnonzero(honest_N))[:count]
    out_N = np.zeros_like(honest_N)
    out_N[chosen] = True
    return out_N


def _reach(
    compute: Compute,
    jobs: Sequence[TrainJob],
    delta_ND: NDArray[np.float32],
    honest_N: NDArray[np.bool_],
    base_D: NDArray[np.float32],
    experiment: Experiment,
    tick: Tick,
) -> float:
    """How far an honest client may come in a round.

    AdamW's steps are as long for small gradients as for large ones, so the longest rehearsed update tells. Where
    gradients' sizes show, it does not: the warm-up has learnt the server's rows by heart, and live clients' gradients
    were five times as large (tiny, sgd: 0.18 rehearsed, 0.75 live). So FedProx, which only shortens, is rehearsed
    once more without its term; of sgd the clip bounds every step, and a correction is about as long as a gradient.
    """
    settings = jobs[0].settings
    if settings.optimizer == "sgd":
        return settings.steps * settings.lr * settings.clip * (2 if experiment.training.scaffold else 1)
    if settings.prox_mu:
        free = [replace(job, settings=replace(job.settings, prox_mu=0.0)) for job, ok in zip(jobs, honest_N) if ok]
        far_ND = np.stack([flatten(result.tensors) for result in compute.train(free, tick)]) - base_D
    else:
        far_ND = delta_ND[honest_N]
    return float(np.linalg.norm(far_ND.astype(np.float64), axis=1).max())


def _correction(controls: scaffold.Controls, actor: Actor, adapter: Tensors) -> Tensors | None:
    correct_D = scaffold.correction(controls, str(actor.slot))
    return None if correct_D is None else unflatten(correct_D, adapter)


def _seeded(settings: LocalSettings, seed: int) -> LocalSettings:
    return LocalSettings(**{**asdict(settings), "seed": seed, "keep_steps": False})


def limit_of(values: Sequence[float], margin: float) -> float:
    """Benign max + margin x (max - median)."""
    top = float(np.max(values))
    return top + margin * (top - float(np.median(values)))


def _calibrate(
    bank_MD: NDArray[np.float16],
    actors: Sequence[Actor],
    norms: Sequence[float],
    lrs: Sequence[float],
    rises: Sequence[Rise],
    margin: float,
    experiment: Experiment,
    base_sha256: str,
) -> Rehearsal:
    malicious_M = np.array([a.malicious for a in actors])
    slot_M = np.array([a.slot for a in actors])
    x_MD = bank_MD.astype(np.float32)
    logit_M, ratio_M = np.zeros(len(actors)), np.zeros(len(actors))
    for slot in sorted(set(slot_M[~malicious_M])):  # scored as strangers: what their own slot played is left out
        own = slot_M == slot
        rest = ~own
        stranger = fit(x_MD[rest], malicious_M[rest], "all_b")
        logit_M[own] = stranger.logits(x_MD[own])
        ratio_M[own] = neighbour_ratio(x_MD[own], x_MD[rest], malicious_M[rest], experiment.defence.neighbours)
    probe = fit(x_MD, malicious_M, "all_b", base_sha256=base_sha256)
    logit_M[malicious_M] = probe.logits(x_MD[malicious_M])
    honest = [r for r, bad in zip(rises, malicious_M) if not bad]
    limits = CanaryLimits(
        **{
            key: limit_of([getattr(r, key) for r in honest], experiment.defence.canary.margin)
            for key in ("refusal_step", "refusal_anchor", "safe_step", "safe_anchor")
        },
        **{
            f"{what}_usual": limit_of(
                [
                    float(
                        np.mean([max(0.0, getattr(r, f"{what}_step")) for r, a in zip(rises, actors) if a.slot == slot])
                    )
                    for slot in sorted(set(slot_M[~malicious_M]))
                ],
                margin,
            )
            for what in ("refusal", "safe")
        },
    )
    harm = [r.refusal_step for r in rises]
    return Rehearsal(
        bank_MD=bank_MD,
        malicious_M=malicious_M,
        norm_by_round=tuple(norms),
        lr_by_round=tuple(lrs),
        probe=probe,
        probe_limit=max(PROBE_FLOOR, limit_of(logit_M[~malicious_M], margin)),
        neighbour_limit=max(NEIGHBOUR_FLOOR, limit_of(ratio_M[~malicious_M], margin)),
        canary=limits,
        notes={
            "rounds": len(norms),
            "honest": int((~malicious_M).sum()),
            "malicious": int(malicious_M.sum()),
            "canary_auroc": auroc(harm, malicious_M.tolist()),
            "malicious_logit_min": float(logit_M[malicious_M].min()) if malicious_M.any() else None,
        },
    )
