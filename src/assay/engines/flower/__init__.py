"""Assay on Flower: any strategy, screened; any grid, guarded (extra `assay[flower]`).

    from assay.engines.flower import GuardedGrid, Screened
    strategy = Screened(FedAvg(), screens=[Structure(), Norm(None)], ledger="run/")
    strategy.start(grid=GuardedGrid(grid), initial_arrays=arrays, num_rounds=25, timeout=600)

`arrays` reads what clients send as numbers and nothing else, `replies` makes contributions or refusals of messages,
`acting` says how a weight takes hold of a strategy, `screened` is the strategy, `guard` the grid.
"""

from assay.config import ConfigError

try:
    import flwr.serverapp  # noqa: F401 - asked for once, so that its absence is said in one line
except ImportError as error:
    raise ConfigError(f"Flower is not installed ({error}); pip install 'assay[flower]'") from error

from assay.engines.flower.guard import GuardedGrid
from assay.engines.flower.replies import Limits
from assay.engines.flower.screened import Screened

__all__ = ["GuardedGrid", "Limits", "Screened"]
