"""What the server does with the aggregate: a pair of pure functions (init, update) with explicit state, as in optax.

Legend: D values of a flattened adapter. State is a dict of named float arrays, so that a checkpoint can store any
optimiser's memory beside the adapter without knowing which one it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
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
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ConfigError(f"fedavg: lr must be a positive number, got {lr!r}")

    def init(params_D: NDArray[np.float32]) -> OptState:
        return {}

    def update(
        delta_D: NDArray[np.float32], state: OptState, params_D: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], OptState]:
        _check(delta_D, params_D)
        step_D = np.multiply(delta_D, lr, dtype=np.float64)  # rounded to float32 once, after the sum
        return (params_D + step_D).astype(np.float32), state

    return ServerOpt(init, update)


SERVER_OPTS: Mapping[str, Callable[..., ServerOpt]] = {"fedavg": fedavg}


def make(name: str, **params: object) -> ServerOpt:
    """A server optimiser by name. Unknown names and parameters are errors that list the known ones."""
    if name not in SERVER_OPTS:
        raise ConfigError(f"unknown server optimiser {name!r}; known: {', '.join(SERVER_OPTS)}")
    return build(name, SERVER_OPTS[name], params)


def _check(delta_D: NDArray[np.float32], params_D: NDArray[np.float32]) -> None:
    if delta_D.ndim != 1 or delta_D.shape != params_D.shape:
        raise ValueError(f"delta of shape {delta_D.shape} does not fit parameters of shape {params_D.shape}")
