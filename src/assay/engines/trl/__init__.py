"""Assay in TRL's GRPOTrainer: peers' completions, screened before the trainer learns from them (extra `assay[trl]`).

    from assay.engines.trl import FolderExchange, ScreenedRollouts
    rollouts = ScreenedRollouts(FolderExchange("/mnt/swarm", run="r1", node="a", nodes=["a", "b", "c", "d"]))
    GRPOTrainer(model, reward_funcs=rollouts.wrap(rewards), rollout_func=rollouts, args=args, train_dataset=prompts)

`exchanges` carries messages, `batch` says which row of the trainer's batch is whose, `judging` what becomes of each
row, `rewards` wraps reward functions, `rollouts` puts them together, `record` writes down, `contract` holds the
installed trainer to what all this needs.
"""

from assay.config import ConfigError

try:
    import trl  # noqa: F401 - asked for once, so that its absence is said in one line
except ImportError as error:
    raise ConfigError(f"TRL is not installed ({error}); pip install 'assay[trl]'") from error

from assay.engines.trl.exchanges import Exchange, FolderExchange, Hub, MemoryExchange
from assay.engines.trl.rollouts import ScreenedRollouts

__all__ = ["Exchange", "FolderExchange", "Hub", "MemoryExchange", "ScreenedRollouts"]
