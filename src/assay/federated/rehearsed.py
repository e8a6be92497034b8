"""What a rehearsal leaves: bank, probes, honest ranges and limits as one frozen value and one safetensors file.

Legend: M bank rows, D values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as save_safetensors

from assay.checkpoint import write_atomic
from assay.config import CanaryConfig, ConfigError
from assay.federated.balance import Spread
from assay.federated.canary import CanaryLimits
from assay.federated.probe import Probe

FORMAT = "assay.rehearsal/1"
PROBE_FLOOR, NEIGHBOUR_FLOOR = 1.3, 1.15
"""Smallest limits of the filters (a logit, a ratio of distances): rehearsal on narrow data must not turn strangers
away. Plain attackers lie far above (7 and 2 on the default model), honest strangers stayed below, and the canary looks
at everybody all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Everything `submitted` needs to judge: bank, probe, thresholds, canary limits."""

    bank_MD: NDArray[np.float16]
    malicious_M: NDArray[np.bool_]
    norm_by_round: tuple[float, ...]
    lr_by_round: tuple[float, ...]
    probe: Probe
    probe_limit: float
    neighbour_limit: float
    canary: CanaryLimits
    notes: dict[str, Any]
    spread: Spread | None = None
    """Honest shares of lora_A (screen `balance`); None in files from before there was one."""
    probe_a: Probe | None = None
    """On lora_A, for screen `probe_a`; fitted where the experiment names it."""
    probe_a_limit: float = PROBE_FLOOR

    def norm_limit(self, round: int, lr: float) -> float:
        """Largest honest norm of `round` (1-based; later rounds: the last rehearsed one), scaled to its rate.

        The steps of AdamW and sgd are proportional to the rate, and round 1 is smaller: A cannot move while B is zero.
        """
        at = min(round, len(self.norm_by_round)) - 1
        return self.norm_by_round[at] * lr / self.lr_by_round[at]

    def canary_limits(self, floors: CanaryConfig) -> CanaryLimits:
        """The rehearsed limits, none below its floor (they can be negative: honest training may help refusals)."""
        raw = self.canary
        return CanaryLimits(
            refusal_step=max(floors.floor, raw.refusal_step),
            refusal_anchor=max(floors.anchor_floor, raw.refusal_anchor),
            safe_step=max(floors.safe_floor, raw.safe_step),
            safe_anchor=max(floors.safe_anchor_floor, raw.safe_anchor),
            refusal_usual=None if raw.refusal_usual is None else max(floors.floor / 2, raw.refusal_usual),
            safe_usual=None if raw.safe_usual is None else max(floors.safe_floor / 2, raw.safe_usual),
            crowd_step=None if raw.crowd_step is None else max(floors.floor, raw.crowd_step),
            crowd_anchor=None if raw.crowd_anchor is None else max(floors.anchor_floor, raw.crowd_anchor),
        )

    def save(self, path: Path) -> None:
        header = {
            "format": FORMAT,
            "norm_by_round": self.norm_by_round,
            "lr_by_round": self.lr_by_round,
            "probe_limit": self.probe_limit,
            "neighbour_limit": self.neighbour_limit,
            "canary": asdict(self.canary),
            "notes": self.notes,
            "bias": self.probe.bias,
            "base_sha256": self.probe.base_sha256,
        }
        tensors: dict[str, NDArray[Any]] = {
            "bank": self.bank_MD,
            "malicious": self.malicious_M.astype(np.uint8),
            "weight": self.probe.weight_D,
        }
        if self.spread is not None:
            tensors |= {"share_middle": self.spread.middle_RS, "share_reach": self.spread.reach_S}
        if self.probe_a is not None:
            tensors["weight_a"] = self.probe_a.weight_D
            header |= {"bias_a": self.probe_a.bias, "probe_a_limit": self.probe_a_limit}
        write_atomic(path, save_safetensors(tensors, {"assay": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Rehearsal:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {})["assay"])
            if header["format"] != FORMAT:
                raise ConfigError(f"{path}: not a rehearsal of format {FORMAT}; delete it to rehearse again")
            bank, malicious, weight = (file.get_tensor(n) for n in ("bank", "malicious", "weight"))
            known = "share_middle" in file.keys()  # noqa: SIM118 - no dict
            weight_a = file.get_tensor("weight_a") if "weight_a" in file.keys() else None  # noqa: SIM118
            spread = Spread(file.get_tensor("share_middle"), file.get_tensor("share_reach")) if known else None
        probe = Probe(weight_D=weight, bias=header["bias"], features="all_b", base_sha256=header["base_sha256"])
        return cls(
            bank_MD=bank,
            malicious_M=malicious.astype(bool),
            norm_by_round=tuple(header["norm_by_round"]),
            lr_by_round=tuple(header["lr_by_round"]),
            probe=probe,
            probe_limit=header["probe_limit"],
            neighbour_limit=header["neighbour_limit"],
            canary=CanaryLimits(**header["canary"]),
            notes=header["notes"],
            spread=spread,
            **({} if weight_a is None else _of_a(weight_a, header)),
        )


def _of_a(weight_D: NDArray[np.float32], header: Mapping[str, Any]) -> dict[str, Any]:
    probe = Probe(weight_D=weight_D, bias=header["bias_a"], features="all_a", base_sha256=header["base_sha256"])
    return {"probe_a": probe, "probe_a_limit": header["probe_a_limit"]}
