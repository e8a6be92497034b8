"""What the server does with the aggregate: a pair of pure functions (init, update) with explicit state, as in optax.

FedAvg, FedAvgM and the three adaptive ones of Reddi et al. 2021. All of them see the clients through the aggregate only,
so a trust weight acts in each as it does in FedAvg; none reads a client's update or count again. Momentum remembers:
who was trusted in one round and refused in the next still moves the adapter by what the memory kept of him.

Legend: D values of a flattened adapter. State is a dict of named float arrays, so that a checkpoint can store any
optimiser's memory beside the adapter without knowing which one it is. Sums are float64, rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError, ServerConfig
from assay.federated.aggregators import build

OptState = dict[str, NDArray[np.float32]]
Init = Callable[[NDArray[np.float32]], OptState]
Update = Callable[[NDArray[np.float32], OptState, NDArray[np.float32]], tuple[NDArray[np.float32], OptState]]


class ServerOpt(NamedTuple):
    """`init(params_D) -> state` and `update(delta_D, state, params_D) -> (new_params_D, new state)`; neither writes
    to its arguments. `delta_D` is the aggregate of the clients' differences, so it points downhill and is added."""

    init: Init
    update: Update


def fedavg(lr: float = 1.0) -> ServerOpt:
    """FedAvg, McMahan et al. 2017: params + lr * delta. With lr 1 the new adapter is the aggregate itself.

    >>> import numpy as np
    >>> init, update = fedavg(lr=0.5)
    >>> params_D = np.array([1.0, 2.0], np.float32)
    >>> update(np.array([4.0, -2.0], np.float32), init(params_D), params_D)
    (array([3., 1.], dtype=float32), {})
    """
    _positive("fedavg", lr=lr)

    def init(params_D: NDArray[np.float32]) -> OptState:
        return {}

    def update(
        delta_D: NDArray[np.float32], state: OptState, params_D: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], OptState]:
        _check(delta_D, params_D)
        step_D = np.multiply(delta_D, lr, dtype=np.float64)  # rounded to float32 once, after the sum
        return (params_D + step_D).astype(np.float32), state

    return ServerOpt(init, update)


def fedavgm(lr: float = 1.0, momentum: float = 0.9) -> ServerOpt:
    """FedAvgM, Hsu et al. 2019, section 4.3: velocity = momentum * velocity + delta; params + lr * velocity.

    As in torch's SGD and in Flower, so a steady delta moves lr / (1 - momentum) times as far as in FedAvg. The
    published Safe-FedLLM code averages instead of adding: lr = 1 - momentum is its step from the second round on.

    >>> import numpy as np
    >>> init, update = fedavgm(momentum=0.5)
    >>> params_D = np.array([0.0], np.float32)
    >>> params_D, state = update(np.array([4.0], np.float32), init(params_D), params_D)
    >>> update(np.array([1.0], np.float32), state, params_D)[0]
    array([7.], dtype=float32)
    """
    _positive("fedavgm", lr=lr)
    _share("fedavgm", momentum=momentum)

    def init(params_D: NDArray[np.float32]) -> OptState:
        return {"velocity": np.zeros_like(params_D)}

    def update(
        delta_D: NDArray[np.float32], state: OptState, params_D: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], OptState]:
        _check(delta_D, params_D)
        velocity_D = momentum * state["velocity"].astype(np.float64) + delta_D
        return (params_D + lr * velocity_D).astype(np.float32), {"velocity": _bounded(velocity_D)}

    return ServerOpt(init, update)


def fedadagrad(lr: float = 1e-3, tau: float = 1e-3, beta1: float = 0.0) -> ServerOpt:
    """FedAdagrad, Reddi et al. 2021, Algorithm 2: second += delta^2. The paper runs it without momentum, so beta1 is 0.

    It never forgets: one large round that was let through makes every later step small.
    """
    return _adaptive("fedadagrad", lr, tau, beta1, lambda second_D, square_D: second_D + square_D)


def fedyogi(lr: float = 1e-3, tau: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99) -> ServerOpt:
    """FedYogi, Reddi et al. 2021, Algorithm 2: second -= (1 - beta2) * delta^2 * sign(second - delta^2)."""
    _share("fedyogi", beta2=beta2)

    def second(second_D: NDArray[np.float64], square_D: NDArray[np.float64]) -> NDArray[np.float64]:
        return second_D - (1 - beta2) * square_D * np.sign(second_D - square_D)

    return _adaptive("fedyogi", lr, tau, beta1, second)


def fedadam(lr: float = 1e-3, tau: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99) -> ServerOpt:
    """FedAdam, Reddi et al. 2021, Algorithm 2: second = beta2 * second + (1 - beta2) * delta^2.

    No bias correction: Algorithm 2 has none (Flower's FedAdam multiplies lr by Adam's).
    """
    _share("fedadam", beta2=beta2)
    return _adaptive("fedadam", lr, tau, beta1, lambda second_D, square_D: beta2 * second_D + (1 - beta2) * square_D)


Second = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def _adaptive(name: str, lr: float, tau: float, beta1: float, second: Second) -> ServerOpt:
    """Reddi et al. 2021, Algorithm 2: first = beta1 * first + (1 - beta1) * delta; params + lr * first / (sqrt(second) + tau).

    `first` starts at 0, `second` at tau^2, the smallest the paper allows. Paper of Safe-FedLLM: lr 1e-3, tau 1e-3,
    beta1 0.9, beta2 0.99. `tau` should be near the size of a delta's values: far above, this is FedAvg with lr/tau;
    far below, every coordinate moves by about lr whatever the clients sent, and no bound on a client's norm (the norm
    screen) bounds the step any more. The canary's gate looks at the adapter after the step, so it still does.
    """
    _positive(name, lr=lr, tau=tau)
    _share(name, beta1=beta1)

    def init(params_D: NDArray[np.float32]) -> OptState:
        return {"first": np.zeros_like(params_D), "second": np.full_like(params_D, tau**2)}

    def update(
        delta_D: NDArray[np.float32], state: OptState, params_D: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], OptState]:
        _check(delta_D, params_D)
        delta64_D = delta_D.astype(np.float64)
        first_D = beta1 * state["first"].astype(np.float64) + (1 - beta1) * delta64_D
        second_D = second(state["second"].astype(np.float64), delta64_D**2)
        step_D = lr * first_D / (np.sqrt(second_D) + tau)
        return (params_D + step_D).astype(np.float32), {"first": _bounded(first_D), "second": _bounded(second_D)}

    return ServerOpt(init, update)


SERVER_OPTS: Mapping[str, Callable[..., ServerOpt]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedyogi": fedyogi,
    "fedadam": fedadam,
}


def of(config: ServerConfig) -> ServerOpt:
    """The optimiser of an experiment's `[server]` table."""
    if "lr" in config.params:
        raise ConfigError("server.params: the rate is server.lr, not a parameter")
    rate = {} if config.lr is None else {"lr": config.lr}
    return make(config.opt, **rate, **config.params)


def make(name: str, **params: object) -> ServerOpt:
    """A server optimiser by name. Unknown names and parameters are errors that list the known ones."""
    if name not in SERVER_OPTS:
        raise ConfigError(f"unknown server optimiser {name!r}; known: {', '.join(SERVER_OPTS)}")
    return build(name, SERVER_OPTS[name], params)


def _check(delta_D: NDArray[np.float32], params_D: NDArray[np.float32]) -> None:
    if delta_D.ndim != 1 or delta_D.shape != params_D.shape:
        raise ValueError(f"delta of shape {delta_D.shape} does not fit parameters of shape {params_D.shape}")


def _bounded(x_D: NDArray[np.float64]) -> NDArray[np.float32]:
    """Float32 without infinities: the square of a value a peer may send is larger, and inf - inf would be NaN for ever."""
    top = float(np.finfo(np.float32).max)
    return np.clip(x_D, -top, top).astype(np.float32)


def _positive(name: str, **values: object) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{name}: {key} must be a positive number, got {value!r}")


def _share(name: str, **values: object) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{name}: {key} must be a number from 0 to below 1, got {value!r}")
