"""LoRA-Probe: a linear classifier on the direction of an update (Safe-FedLLM, "LoRA-Probe").

A sample is the difference of an adapter and the adapter it started from, restricted to `features`, flattened over
sorted names and L2-normalised. The paper reads lora_B of the first layer; Assay's own filter reads lora_B of all
layers. One safetensors file holds the weights and everything needed to know what they are good for. No pickle.
Legend: N samples, D features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from assay.checkpoint import write_atomic
from assay.config import ConfigError
from assay.contribution import Tensors, differences
from assay.federated.lora import Features, feature_names, unit_rows

FORMAT = "assay.probe/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """The paper's recipe."""

    lr: float = 0.01
    weight_decay: float = 2.0
    batch_size: int = 256
    clip: float = 0.5
    epochs: int = 100
    validation: float = 0.1
    patience: int = 15
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """p(malicious) = sigmoid(weight . unit(delta) + bias); judged malicious at p >= threshold (paper: 0.8)."""

    weight_D: NDArray[np.float32]
    bias: float
    features: Features
    threshold: float = 0.8
    base_sha256: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, delta_ND: NDArray[np.floating]) -> NDArray[np.float64]:
        """Logit of each row of features (any scale: rows are normalised here)."""
        if delta_ND.shape[1] != self.weight_D.size:
            raise ConfigError(
                f"probe was fitted on {self.weight_D.size} values, this adapter has {delta_ND.shape[1]}: "
                "fit one for this model and LoRA rank with `assay probe fit`"
            )
        return unit_rows(delta_ND).astype(np.float64) @ self.weight_D.astype(np.float64) + self.bias

    def scores(self, delta_ND: NDArray[np.floating]) -> NDArray[np.float64]:
        """p(malicious) of each row, in [0, 1]."""
        return 1.0 / (1.0 + np.exp(-self.logits(delta_ND)))

    def score_adapters(self, adapters: Sequence[Tensors], start: Tensors) -> NDArray[np.float64]:
        """p(malicious) of adapters that were trained from `start`."""
        return self.scores(feature_deltas(adapters, start, self.features))

    def save(self, path: Path) -> None:
        header = {
            "format": FORMAT,
            "features": self.features,
            "threshold": self.threshold,
            "base_sha256": self.base_sha256,
            "meta": dict(self.meta),
        }
        tensors = {"weight": self.weight_D.astype(np.float32), "bias": np.array([self.bias], np.float32)}
        write_atomic(path, save_safetensors(tensors, {"assay": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a probe file; ConfigError says what is wrong with it."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("assay", "{}"))
                if header.get("format") != FORMAT:
                    raise ConfigError(f"{path}: not a probe file of format {FORMAT}; make one with `assay probe fit`")
                weight, bias = file.get_tensor("weight"), float(file.get_tensor("bias")[0])
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"{path}: no such probe file; make one with `assay probe fit`") from None
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ConfigError(f"{path}: not a safetensors probe file ({error})") from None
        return cls(
            weight_D=weight,
            bias=bias,
            features=header["features"],
            threshold=float(header["threshold"]),
            base_sha256=header["base_sha256"],
            meta=header["meta"],
        )


def feature_deltas(adapters: Sequence[Tensors], start: Tensors, features: Features) -> NDArray[np.float32]:
    """delta_ND of the chosen tensors (not normalised)."""
    return differences(adapters, start, feature_names(list(start), features))


def fit(
    delta_ND: NDArray[np.floating],
    malicious_N: NDArray[np.bool_],
    features: Features,
    settings: FitSettings | None = None,
    **described: Any,
) -> Probe:
    """Logistic regression by the paper's recipe: BCE with pos_weight = neg/pos, AdamW, early stop on a validation split.

    Needs at least two samples of each class (ConfigError). `described` goes into the probe (base_sha256, meta).
    """
    settings = settings or FitSettings()
    y_N = np.asarray(malicious_N, bool)
    if y_N.sum() < 2 or (~y_N).sum() < 2:
        raise ConfigError(f"a probe needs at least 2 samples of each class; got {y_N.sum()} malicious of {y_N.size}")
    train_N = _split(y_N, settings)
    x = torch.from_numpy(unit_rows(np.asarray(delta_ND)))
    y = torch.from_numpy(y_N.astype(np.float32))
    weight = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    pos_weight = torch.tensor(float((~y_N[train_N]).sum() / max(1, y_N[train_N].sum())))
    optimizer = torch.optim.AdamW([weight, bias], lr=settings.lr, weight_decay=settings.weight_decay)
    loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight)
    rng = np.random.default_rng(settings.seed)
    best, best_weight, best_bias, since = np.inf, weight.detach().clone(), bias.detach().clone(), 0
    held = torch.from_numpy(~train_N) if (~train_N).any() else torch.from_numpy(train_N)
    for _ in range(settings.epochs):
        order = rng.permutation(np.flatnonzero(train_N))
        for at in range(0, order.size, settings.batch_size):
            rows = torch.from_numpy(order[at : at + settings.batch_size])
            optimizer.zero_grad()
            loss_of(x[rows] @ weight + bias, y[rows]).backward()
            torch.nn.utils.clip_grad_norm_([weight, bias], settings.clip)
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(x[held] @ weight + bias, y[held]))
        if loss < best - 1e-6:
            best, best_weight, best_bias, since = loss, weight.detach().clone(), bias.detach().clone(), 0
        else:
            since += 1
            if since >= settings.patience:
                break
    return Probe(weight_D=best_weight.numpy(), bias=float(best_bias), features=features, **described)


def _split(y_N: NDArray[np.bool_], settings: FitSettings) -> NDArray[np.bool_]:
    """Training mask: a stratified share of `validation` rows of each class is held out (at least one where it can be)."""
    rng = np.random.default_rng(settings.seed)
    train_N = np.ones(y_N.size, bool)
    for label in (False, True):
        rows = rng.permutation(np.flatnonzero(y_N == label))
        count = max(1, round(settings.validation * rows.size)) if rows.size >= 4 else 0
        train_N[rows[:count]] = False
    return train_N
