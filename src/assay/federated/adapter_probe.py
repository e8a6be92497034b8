"""A probe on finished adapters, fitted on the operator's own labelled ones; one safetensors file, no pickle.

A sample is the sketch of an adapter's change (products.py), of unit length: two trainings on like rows from unlike
lora_A share next to nothing in lora_B, and much in the product. On `tiny` (24 adapters to fit on, 16 to try, of 20 to
60 steps at three rates, every one with its own lora_A) a probe on lora_B had AUROC 0.67, on the sketch 1.0.
Every threshold comes from benign adapters that the scoring probe has not seen. Legend: N adapters, M bank rows, D values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from assay.checkpoint import write_atomic
from assay.config import ConfigError
from assay.contribution import Tensors
from assay.federated.lora import unit_rows
from assay.federated.probe import Probe, fit
from assay.federated.products import SIDE, sketch
from assay.federated.rehearsal import limit_of
from assay.federated.rehearsed import NEIGHBOUR_FLOOR, PROBE_FLOOR
from assay.federated.screens import neighbour_ratio
from assay.metrics import auroc

FORMAT = "assay.adapter_probe/1"
FEWEST = 4
"""Adapters of each class under which folds leave nothing to fit on."""
FOLDS = 10
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterProbe:
    """Probe, bank and limits, and what they are good for: `shapes` is the layout that adapters must have, `base_sha256`
    the base's weights ("": not given when it was fitted), `base` its name."""

    probe: Probe
    limit: float
    bank_MD: NDArray[np.float16]
    malicious_M: NDArray[np.bool_]
    neighbour_limit: float
    k: int
    seed: int
    side: int
    rank: int
    shapes: Shapes
    base: str = ""
    base_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, adapters: Sequence[Tensors]) -> NDArray[np.float64]:
        """Logit of each adapter; above `limit` is malicious."""
        return self.probe.logits(self.sketches(adapters))

    def sketches(self, adapters: Sequence[Tensors]) -> NDArray[np.float32]:
        """x_ND: what probe and neighbours read of each adapter."""
        return np.stack([sketch(a, self.seed, self.side) for a in adapters])

    def summary(self) -> dict[str, Any]:
        """What the file says of itself, without the layout's names."""
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in self.shapes})
        known = {"base": self.base, "base_sha256": self.base_sha256, "rank": self.rank, "targets": targets}
        return {**known, "threshold": self.limit, "neighbour_threshold": self.neighbour_limit, **self.notes}

    def save(self, path: Path) -> None:
        header = {
            "format": FORMAT,
            "bias": self.probe.bias,
            "limit": self.limit,
            "neighbour_limit": self.neighbour_limit,
            "k": self.k,
            "seed": self.seed,
            "side": self.side,
            "rank": self.rank,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "base": self.base,
            "base_sha256": self.base_sha256,
            "notes": dict(self.notes),
        }
        tensors: dict[str, NDArray[Any]] = {
            "weight": self.probe.weight_D.astype(np.float32),
            "bank": self.bank_MD,
            "malicious": self.malicious_M.astype(np.uint8),
        }
        write_atomic(path, save_safetensors(tensors, {"assay": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> AdapterProbe:
        """Read a file; ConfigError says what is wrong with it."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("assay", "{}"))
                if header.get("format") == "assay.probe/1":
                    raise ConfigError(
                        f"{path}: was fitted on updates of a round, not on finished adapters; "
                        "fit one with `assay probe fit --benign-adapters DIR --malicious-adapters DIR`"
                    )
                if header.get("format") != FORMAT:
                    raise ConfigError(f"{path}: not a probe file of format {FORMAT}; make one with `assay probe fit`")
                weight, bank, malicious = (file.get_tensor(n) for n in ("weight", "bank", "malicious"))
            shapes = {str(name): (int(s[0]), int(s[1])) for name, s in header["shapes"].items()}
            made = cls(
                probe=Probe(weight_D=weight, bias=float(header["bias"]), features="all"),
                limit=float(header["limit"]),
                bank_MD=bank,
                malicious_M=malicious.astype(bool),
                neighbour_limit=float(header["neighbour_limit"]),
                k=int(header["k"]),
                seed=int(header["seed"]),
                side=int(header["side"]),
                rank=int(header["rank"]),
                shapes=shapes,
                base=str(header["base"]),
                base_sha256=str(header["base_sha256"]),
                notes=dict(header["notes"]),
            )
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"{path}: no such probe file; make one with `assay probe fit`") from None
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ConfigError(f"{path}: not a safetensors probe file ({error})") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: a damaged probe file ({type(error).__name__}: {error}); fit it again") from None
        wanted = len(shapes) // 2 * made.side**2
        if weight.shape != (wanted,) or bank.shape != (len(malicious), wanted) or not np.isfinite(weight).all():
            raise ConfigError(f"{path}: a damaged probe file (its arrays do not fit its layout); fit it again")
        return made


def fit_adapters(
    benign: Sequence[Tensors],
    malicious: Sequence[Tensors],
    *,
    seed: int,
    margin: float = 0.25,
    k: int = 5,
    side: int = SIDE,
    base: str = "",
    base_sha256: str = "",
) -> AdapterProbe:
    """Fit and calibrate on labelled adapters of one layout.

    Each adapter is scored once by a probe and a bank of the other folds; limit = benign max + margin x (max - median)
    of these scores, and no less than the floors of rehearsal: strangers who train in another way than the operator lie
    farther out than anything he can hold out (`finished.calibrated` reads that off references). `notes` hold what the held-out scores say. ConfigError where a class
    has fewer than four.
    """
    if min(len(benign), len(malicious)) < FEWEST:
        raise ConfigError(
            f"a probe needs at least {FEWEST} adapters of each class; got {len(benign)} benign, {len(malicious)} malicious"
        )
    every = [*benign, *malicious]
    bad_N = np.arange(len(every)) >= len(benign)
    x_ND = unit_rows(np.stack([sketch(a, seed, side) for a in every]))
    fold_N = np.concatenate([np.arange(len(benign)), np.arange(len(malicious))]) % min(
        FOLDS, *map(len, (benign, malicious))
    )
    logit_N, ratio_N = np.zeros(len(every)), np.zeros(len(every))
    for one in sorted(set(fold_N.tolist())):
        out_N = fold_N == one
        logit_N[out_N] = fit(x_ND[~out_N], bad_N[~out_N], "all").logits(x_ND[out_N])
        ratio_N[out_N] = neighbour_ratio(x_ND[out_N], x_ND[~out_N], bad_N[~out_N], k)
    limit = max(PROBE_FLOOR, limit_of(logit_N[~bad_N].tolist(), margin))
    near = max(NEIGHBOUR_FLOOR, limit_of(ratio_N[~bad_N].tolist(), margin))
    caught_N = (logit_N > limit) | (ratio_N > near)
    return AdapterProbe(
        probe=fit(x_ND, bad_N, "all"),
        limit=limit,
        bank_MD=x_ND.astype(np.float16),
        malicious_M=bad_N,
        neighbour_limit=near,
        k=k,
        seed=seed,
        side=side,
        rank=next(shape[0] for name, shape in _shapes(every[0]).items() if "lora_A" in name),
        shapes=_shapes(every[0]),
        base=base,
        base_sha256=base_sha256,
        notes={
            "benign": len(benign),
            "malicious": len(malicious),
            "held_out": {
                "auroc": auroc(logit_N.tolist(), bad_N.tolist()),
                "neighbour_auroc": auroc(ratio_N.tolist(), bad_N.tolist()),
                "tpr": float(caught_N[bad_N].mean()),
                "fpr": float(caught_N[~bad_N].mean()),
            },
        },
    )


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(tensors[name])) for name in sorted(tensors)}
