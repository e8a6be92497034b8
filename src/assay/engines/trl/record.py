"""What the trainer's user sees of the screens: metrics, the ledger, the memory that a checkpoint keeps."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from assay import run_dir
from assay.checkpoint import write_json
from assay.config import ConfigError
from assay.contribution import Pool, tensors_sha256
from assay.engines.trl.batch import Batch
from assay.ledger import Ledger
from assay.swarm.exchange import Gathered
from assay.swarm.learner import Memory
from assay.swarm.screening import Judged
from assay.swarm.summary import judged_body, pool_body
from assay.trust import Strikes

log = logging.getLogger("trl")  # TRL's own, so that it shows where the trainer's user looks
STATE = "assay.json"


class Weights(Mapping[str, NDArray[np.float32]]):
    """A model's trainable tensors, copied to the CPU one at a time."""

    def __init__(self, model: Any) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._named[name].detach().float().cpu().numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def weights_sha256(model: Any) -> str:
    """sha256 (hex) of the trainable weights: what a node says it sampled from."""
    return tensors_sha256(Weights(model))


def metrics_of(batch: Batch, pool: Pool, judged: Judged, memory: Memory) -> dict[str, float]:
    """Shares of the completions owed. `assay/admitted` were learnt from, `assay/no_reward` of those as bad examples;
    `assay/refused/REASON`, missing ones too; `assay/admitted/NODE` of what that node owed; `assay/banned` nodes."""
    owed = len(batch.place_B)
    admitted = [row for row, weight in enumerate(judged.weight_N) if weight >= 0.5]
    by_node = Counter(pool.completions[row].participant for row in admitted)
    reasons: Counter[str] = Counter()
    for row, verdict in enumerate(judged.deciding):
        if row not in admitted and verdict is not None:
            reasons[verdict.reason.value] += 1
    gone = {refusal.participant: refusal.reason for refusal in pool.refused}
    sent = Counter(c.participant for c in pool.completions)
    for node, asked in batch.plan.asked.items():
        reasons[gone.get(node, "missing")] += sum(asked.values()) - sent[node]
    out = {
        "assay/admitted": len(admitted) / owed,
        "assay/refused": 1 - len(admitted) / owed,
        "assay/no_reward": sum(judged.reward_N[row] == 0 for row in admitted) / owed,
        "assay/banned": float(sum(strikes.banned for strikes in memory.trust.values())),
    }
    out |= {f"assay/refused/{reason}": count / owed for reason, count in sorted(reasons.items()) if count}
    for node, asked in batch.plan.asked.items():
        out[f"assay/admitted/{node}"] = by_node[node] / sum(asked.values())
    return {name: float(value) for name, value in out.items()}


class Record:
    """The ledger of a run (none without a directory) and the last round's metrics; reasons once seen stay listed."""

    def __init__(self, directory: str | Path | None) -> None:
        self.ledger = None if directory is None else Ledger(Path(directory) / run_dir.LEDGER)
        self.metrics: dict[str, float] = {}

    def start(self, body: Mapping[str, Any], resumed: int) -> None:
        if self.ledger is not None:
            kind = "resumed" if self.ledger.entries else "start"
            self.ledger.append(kind, {**body, "after_round": resumed, "versions": versions()})

    def round(
        self, batch: Batch, gathered: Gathered, pool: Pool, judged: Judged, memory: Memory, model: str
    ) -> dict[str, float]:
        """Write a round down -> its metrics."""
        if self.ledger is not None:
            body = pool_body(gathered) | {"model_before": model, "learners": {"trl": judged_body(judged, memory)}}
            self.ledger.append("round", body)
        self.metrics = dict.fromkeys(self.metrics, 0.0) | metrics_of(batch, pool, judged, memory)
        return self.metrics

    def end(self, rounds: int, model: str) -> None:
        if self.ledger is not None:
            self.ledger.append("end", {"model": model, "rounds": rounds})


def versions() -> dict[str, str]:
    import trl

    return {**run_dir.versions(), "trl": trl.__version__}


class Keep(TrainerCallback):  # type: ignore[misc]
    """Keeps strikes, screens' memory and the round beside the trainer's checkpoints, and closes the ledger."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(state_file(args, state), self.owner.state())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.end(kwargs["model"])


def state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STATE


def dump(round: int, memory: Memory) -> dict[str, Any]:
    trust = {node: strikes.to_json() for node, strikes in sorted(memory.trust.items())}
    return {"round": round, "trust": trust, "screens": dict(memory.screens)}


def restore(trainer: Any) -> tuple[int, Memory]:
    """Round and memory of the checkpoint the trainer resumed from; ConfigError where they are missing."""
    file = state_file(trainer.args, trainer.state)
    try:
        kept = json.loads(file.read_text())
        trust = {node: Strikes.from_json(strikes) for node, strikes in kept["trust"].items()}
        return int(kept["round"]), Memory(trust=trust, screens=kept["screens"])
    except FileNotFoundError:
        raise ConfigError(
            f"resumed at step {trainer.state.global_step}, but {file} is missing: it holds the round and the strikes; "
            "resume from a checkpoint of this run in output_dir, or start anew"
        ) from None
