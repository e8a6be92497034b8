"""Server optimisers against torch, Flower and numbers worked out by hand; trust weights in every algorithm.

Legend: N participants, D values of a flattened adapter, R rounds.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from assay.config import ConfigError, Experiment, ServerConfig
from assay.federated import server_opt
from assay.federated.server_opt import SERVER_OPTS, OptState, ServerOpt

ADAPTIVE = ("fedadagrad", "fedyogi", "fedadam")


def play(opt: ServerOpt, delta_RD: np.ndarray, params_D: np.ndarray, state: OptState | None = None) -> np.ndarray:
    """params_RD after each round."""
    state, out = opt.init(params_D) if state is None else state, []
    for delta_D in delta_RD:
        params_D, state = opt.update(delta_D, state, params_D)
        out.append(params_D)
    return np.stack(out)


@pytest.fixture
def delta_RD() -> np.ndarray:
    """Deltas of the size of tau, some coordinates much larger and smaller, so that every term of a rule matters."""
    rng = np.random.default_rng(3)
    return (rng.standard_normal((7, 50)) * np.logspace(-5, 0, 50)).astype(np.float32)


@pytest.fixture
def params_D() -> np.ndarray:
    return np.random.default_rng(4).standard_normal(50).astype(np.float32)


# --- each rule, by hand -------------------------------------------------------------------------------------------


def test_first_two_rounds_by_hand() -> None:
    """One coordinate, deltas 4 then 2, tau 1, lr 1, beta1 1/2, beta2 3/4: Algorithm 2 worked out with a pencil.

    first: 2, then 1 + 1 = 2. second: Adagrad 1 + 16 = 17, + 4 = 21; Adam 3/4 + 4 = 19/4, 57/16 + 1 = 73/16;
    Yogi 1 + 16/4 = 5, then 5 - 4/4 = 4.
    """
    delta_RD, params_D = np.array([[4.0], [2.0]], np.float32), np.zeros(1, np.float32)
    first = {"fedadagrad": 2 / (17**0.5 + 1), "fedadam": 2 / ((19 / 4) ** 0.5 + 1), "fedyogi": 2 / (5**0.5 + 1)}
    second = {"fedadagrad": 2 / (21**0.5 + 1), "fedadam": 2 / ((73 / 16) ** 0.5 + 1), "fedyogi": 2 / 3}
    for name in ADAPTIVE:
        more = {} if name == "fedadagrad" else {"beta2": 0.75}
        seen_RD = play(server_opt.make(name, lr=1.0, tau=1.0, beta1=0.5, **more), delta_RD, params_D)
        np.testing.assert_allclose(seen_RD[:, 0], [first[name], first[name] + second[name]], rtol=1e-6)


def test_defaults_are_the_papers() -> None:
    """Safe-FedLLM: eta 1e-3, tau 1e-3, beta1 0.9, beta2 0.99; Reddi et al. run FedAdagrad without momentum."""
    delta_D, params_D = np.array([1.0], np.float32), np.zeros(1, np.float32)
    expected = {
        "fedavg": 1.0,
        "fedavgm": 1.0,
        "fedadagrad": 1e-3 * 1.0 / ((1e-6 + 1.0) ** 0.5 + 1e-3),
        "fedadam": 1e-3 * 0.1 / ((0.99e-6 + 0.01) ** 0.5 + 1e-3),
        "fedyogi": 1e-3 * 0.1 / ((1e-6 + 0.01) ** 0.5 + 1e-3),
    }
    assert set(expected) == set(SERVER_OPTS)
    for name, value in expected.items():
        np.testing.assert_allclose(play(server_opt.make(name), delta_D[None], params_D)[0], [value], rtol=1e-6)


# --- parity with torch --------------------------------------------------------------------------------------------


def in_torch(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, delta_RD: np.ndarray, each: Any) -> Any:
    out = []
    for round, delta_D in enumerate(delta_RD, start=1):
        each(optimizer.param_groups[0], round)
        weight.grad = torch.from_numpy(-delta_D.astype(np.float64))
        optimizer.step()
        out.append(weight.detach().numpy().copy())
    return np.stack(out)


def test_fedavgm_is_torchs_sgd_with_momentum(delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    weight = torch.nn.Parameter(torch.from_numpy(params_D.astype(np.float64)))
    theirs = in_torch(torch.optim.SGD([weight], lr=0.3, momentum=0.8), weight, delta_RD, lambda group, round: None)
    ours = play(server_opt.make("fedavgm", lr=0.3, momentum=0.8), delta_RD, params_D)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_fedadagrad_is_torchs_adagrad_that_starts_at_tau_squared(delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    lr, tau = 1e-2, 1e-3
    weight = torch.nn.Parameter(torch.from_numpy(params_D.astype(np.float64)))
    optimizer = torch.optim.Adagrad([weight], lr=lr, eps=tau, initial_accumulator_value=tau**2)
    theirs = in_torch(optimizer, weight, delta_RD, lambda group, round: None)
    ours = play(server_opt.make("fedadagrad", lr=lr, tau=tau), delta_RD, params_D)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_fedadam_is_torchs_adam_without_its_bias_correction(delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    """torch: lr / (1 - beta1^t) * first / (sqrt(second / (1 - beta2^t)) + eps); rate and eps are set to undo that."""
    lr, tau, beta1, beta2 = 1e-2, 1e-3, 0.9, 0.99
    weight = torch.nn.Parameter(torch.from_numpy(params_D.astype(np.float64)))
    optimizer = torch.optim.Adam([weight], betas=(beta1, beta2))
    optimizer.state[weight] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(weight.detach()),
        "exp_avg_sq": torch.full_like(weight.detach(), tau**2),
    }

    def undo(group: dict[str, Any], round: int) -> None:
        root = (1 - beta2**round) ** 0.5
        group["lr"], group["eps"] = lr * (1 - beta1**round) / root, tau / root

    theirs = in_torch(optimizer, weight, delta_RD, undo)
    ours = play(server_opt.make("fedadam", lr=lr, tau=tau), delta_RD, params_D)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


# --- parity with Flower -------------------------------------------------------------------------------------------


def in_flower(strategy: Any, delta_RD: np.ndarray, params_D: np.ndarray) -> np.ndarray:
    """Rounds through Flower's own strategy: two clients, whose weighted mean is the delta asked for."""
    from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

    out = []
    params = params_D.astype(np.float64)
    for round, delta_D in enumerate(delta_RD, start=1):
        # what `configure_train` remembers of the arrays it sends out
        adaptive = hasattr(strategy, "m_t")
        strategy.current_arrays = {"x": params} if adaptive else ArrayRecord({"x": Array(params)})
        replies = []
        for sign, count in ((1.0, 1), (-1.0, 3)):  # (delta + 3) * 1/4 + (delta - 1) * 3/4 = delta
            value = params + delta_D + (3.0 if sign > 0 else -1.0)
            content = RecordDict(
                {"arrays": ArrayRecord({"x": Array(value)}), "metrics": MetricRecord({"num-examples": count})}
            )
            metadata = Metadata(
                run_id=1, message_id="", src_node_id=count, dst_node_id=0, reply_to_message_id="", group_id="",
                created_at=time.time(), ttl=3600.0, message_type="train",
            )  # fmt: skip
            replies.append(Message(content=content, metadata=metadata))
        made, _ = strategy.aggregate_train(round, replies)
        params = made["x"].numpy()
        out.append(params)
    return np.stack(out)


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
def test_parity_with_flower(name: str, delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    """Flower starts `second` at 0 (ours at tau^2, as the paper asks) and corrects FedAdam's rate for bias."""
    from flwr.serverapp import strategy as strategies

    lr = 1e-2
    if name == "fedavgm":
        strategy = strategies.FedAvgM(server_learning_rate=lr, server_momentum=0.9)
        ours = play(server_opt.make(name, lr=lr), delta_RD, params_D)
    else:
        cls = {"fedadagrad": "FedAdagrad", "fedyogi": "FedYogi", "fedadam": "FedAdam"}[name]
        strategy = getattr(strategies, cls)(eta=lr, tau=1e-3)
        opt = server_opt.make(name, lr=lr)
        state = {**opt.init(params_D), "second": np.zeros_like(params_D)}
        if name == "fedadam":
            ours, at_D = [], params_D
            for round, delta_D in enumerate(delta_RD, start=1):
                rate = lr * (1 - 0.99 ** (round + 1)) ** 0.5 / (1 - 0.9 ** (round + 1))
                at_D, state = server_opt.make(name, lr=rate).update(delta_D, state, at_D)
                ours.append(at_D)
        else:
            ours = play(opt, delta_RD, params_D, state)
    np.testing.assert_allclose(ours, in_flower(strategy, delta_RD, params_D), rtol=2e-6, atol=1e-6)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SERVER_OPTS))
def test_state_is_float32_and_arguments_are_left_alone(name: str, delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    """A checkpoint stores float32: state of another type would make a resumed run a different one."""
    opt, kept_D = server_opt.make(name), params_D.copy()
    state = opt.init(params_D)
    assert all(value.dtype == np.float32 for value in state.values())
    before = {key: value.copy() for key, value in state.items()}
    _, after = opt.update(delta_RD[0], state, params_D)
    assert all(value.dtype == np.float32 for value in after.values())
    assert all(np.array_equal(state[key], before[key]) for key in before)
    np.testing.assert_array_equal(params_D, kept_D)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_giant_delta_leaves_no_nan_behind(name: str) -> None:
    """The square of 1e30 is no float32; infinities in the memory would turn into NaN a round later."""
    delta_RD = np.array([[1e30], [-1e30], [1e-3], [1e-3]], np.float32)
    assert np.isfinite(play(server_opt.make(name), delta_RD, np.zeros(1, np.float32))).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opt": "fedmax"}, "unknown server optimiser 'fedmax'; known: fedavg, fedavgm, fedadagrad, fedyogi, fedadam"),
        ({"opt": "fedavg", "params": {"beta1": 0.9}}, "fedavg has no parameter 'beta1'; known: lr"),
        ({"opt": "fedadagrad", "params": {"beta2": 0.9}}, "fedadagrad has no parameter 'beta2'"),
        ({"opt": "fedadam", "params": {"lr": 0.1}}, "the rate is server.lr"),
        ({"opt": "fedadam", "params": {"tau": 0}}, "fedadam: tau must be a positive number"),
        ({"opt": "fedyogi", "params": {"beta2": 1}}, "fedyogi: beta2 must be a number from 0 to below 1"),
        ({"opt": "fedavgm", "params": {"momentum": -0.1}}, "fedavgm: momentum must be"),
    ],
)
def test_mistakes_in_the_server_table(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server_opt.of(ServerConfig(**values))


def test_the_table_reaches_the_optimiser(delta_RD: np.ndarray, params_D: np.ndarray) -> None:
    config = Experiment().changed(server__opt="fedadam", server__lr=0.5, server__params={"tau": 2.0, "beta1": 0.3})
    expected = server_opt.make("fedadam", lr=0.5, tau=2.0, beta1=0.3)
    there, here = (play(opt, delta_RD, params_D) for opt in (server_opt.of(config.server), expected))
    np.testing.assert_array_equal(there, here)
    assert not np.array_equal(here, play(server_opt.make("fedadam"), delta_RD, params_D))
