"""Simulated clients of a soak: adapters of a real size made in milliseconds, some of them malicious.

No model is trained: a client's update is the way its kind goes plus a window of one long seeded stream of noise, so
that honest clients agree as honest clients do and no two updates are alike. Five kinds of malicious clients, one for
each thing that must be noticed without a model. Legend: D values, M rows of a bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from assay import wire
from assay.contribution import Tensors, flatten, tensors_sha256, unflatten
from assay.federated.lora import feature_names
from assay.federated.probe import Probe
from assay.wire.envelope import join

LAYERS, RANK, STEP = 32, 8, 1e-3
"""32 layers of q and v at rank 8, as of Llama-3.1-8B; values of an update are about STEP."""
BASE, RUN = "ba" * 32, "soak"
Kind = Literal["honest", "poison", "scaled", "unchanged", "not_finite", "silent"]
MALICIOUS: tuple[Kind, ...] = ("poison", "scaled", "unchanged", "not_finite", "silent")
NOTICED: Mapping[str, tuple[str, ...]] = {
    "poison": ("probe", "neighbours"), "scaled": ("norm",), "unchanged": ("structure",), "not_finite": ("not_finite",),
    "silent": ("missing",),
}  # fmt: skip
"""The reasons that may stand beside a malicious client of each kind."""


def adapter(values: int) -> dict[str, NDArray[np.float32]]:
    """Round 0: about so many values, A Kaiming-uniform and B zero as in PEFT."""
    width = max(4, round(values / (LAYERS * RANK * 3.25) / 4) * 4)  # q: width x width; v: width x width / 4
    rng, out = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        for module, rows in (("q_proj", width), ("v_proj", width // 4)):
            name = f"model.layers.{layer}.self_attn.{module}.lora"
            bound = width**-0.5
            out[f"{name}_A.weight"] = rng.uniform(-bound, bound, (RANK, width)).astype(np.float32)
            out[f"{name}_B.weight"] = np.zeros((rows, RANK), np.float32)
    return out


def _packed(name: str, round: int, tensors: Tensors) -> bytes:
    """`wire.encode_update` without its check that the hash is right: with a thousand clients on one machine theirs is
    the larger half of the time."""
    blob = wire.encode_tensors(tensors)
    header = {
        "format": wire.FORMAT, "participant": name, "run": RUN, "round": round, "base_sha256": BASE, "num_examples": 1,
        "sha256": tensors_sha256(tensors), "parts": [["adapter", len(blob)]],
    }  # fmt: skip
    return join(wire.MAGIC, header, [blob])


@dataclass(frozen=True, slots=True)
class Clients:
    """Who takes part, and what each of them sends. `stream` is 2 D values of noise."""

    initial: Tensors
    kinds: Mapping[str, Kind]
    good_D: NDArray[np.float32]
    bad_D: NDArray[np.float32]
    stream: NDArray[np.float32]
    seed: int

    @classmethod
    def make(cls, count: int, values: int, malicious: float, seed: int) -> Clients:
        initial = adapter(values)
        rng = np.random.default_rng(seed)
        size = flatten(initial).size
        good_D, bad_D = (rng.standard_normal(size, np.float32) for _ in range(2))
        bad = rng.permutation(count)[: round(malicious * count)]
        kinds: dict[str, Kind] = {f"client-{i:04d}": "honest" for i in range(count)}
        for turn, index in enumerate(bad):
            kinds[f"client-{index:04d}"] = MALICIOUS[turn % len(MALICIOUS)]
        return cls(initial, kinds, good_D, bad_D, rng.standard_normal(2 * size, np.float32), seed)

    def delta(self, kind: Kind, rng: np.random.Generator) -> NDArray[np.float32]:
        """What training is said to have changed: (D,)."""
        at = int(rng.integers(self.good_D.size))
        noise_D = self.stream[at : at + self.good_D.size]
        if kind == "unchanged":
            return np.zeros_like(noise_D)
        delta_D = noise_D + (self.bad_D if kind == "poison" else self.good_D)
        delta_D *= np.float32(STEP * (50 if kind == "scaled" else 1))
        if kind == "not_finite":
            delta_D[int(rng.integers(delta_D.size))] = np.nan
        return delta_D

    def message(self, name: str, round: int, start: Tensors) -> bytes | None:
        """The bytes this client sends in a round; None from who stays away."""
        kind = self.kinds[name]
        if kind == "silent":
            return None
        delta_D = self.delta(kind, np.random.default_rng([self.seed, round, int(name.rpartition("-")[2])]))
        delta_D += flatten(start)
        return _packed(name, round, unflatten(delta_D, start))

    def probe(self) -> Probe:
        """The linear probe that tells the two ways apart (all of lora_B); it is given, not fitted."""
        names = feature_names(list(self.initial), "all_b")
        apart = flatten(unflatten(self.bad_D - self.good_D, self.initial), names)
        return Probe(weight_D=apart / np.float32(np.linalg.norm(apart)), bias=0.0, features="all_b")

    def bank(self, rows: int = 8) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Labelled updates for the neighbours: `rows` of either kind."""
        names = feature_names(list(self.initial), "all_b")
        rng = np.random.default_rng([self.seed, 1])
        kinds: tuple[Kind, Kind] = ("honest", "poison")
        made = [
            flatten(unflatten(self.delta(kind, rng) / STEP, self.initial), names).astype(np.float16)
            for kind in kinds for _ in range(rows)
        ]  # fmt: skip
        return np.stack(made), np.arange(2 * rows) >= rows
