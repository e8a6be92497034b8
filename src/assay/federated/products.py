"""Adapters by what they do to the layers, lora_B @ lora_A, whatever factors that is written in.

Clients of a round start from one lora_A, so their lora_B can be compared number by number. Adapters from strangers
cannot: each drew a lora_A of its own, and (B R, R^-1 A) is the same adapter for every invertible R. Inner products of
the changes are the same in all these forms and need no change to be written out; a sketch, two random projections of
each change, is a short vector with nearly the same inner products.
Legend: N adapters, M modules, R rank, K side of a sketch, D = M K K values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Tensors
from assay.federated.balance import modules
from assay.threads import ordered

SIDE = 16


def gram(adapters: Sequence[Tensors]) -> NDArray[np.float64]:
    """gram_NN: Frobenius inner products of the adapters' changes over all modules, in float64.

    <B A, B' A'> = sum((B^T B') * (A A'^T)). ValueError for adapters of different modules.

    >>> x = {"m.lora_A.weight": np.eye(2, 3), "m.lora_B.weight": np.full((2, 2), 2.0)}
    >>> y = {"m.lora_A.weight": 2 * np.eye(2, 3), "m.lora_B.weight": np.full((2, 2), 1.0)}
    >>> gram([x, y]).tolist()
    [[16.0, 16.0], [16.0, 16.0]]
    """
    gram_NN = np.zeros((len(adapters), len(adapters)))
    names = modules(adapters[0]) if adapters else []
    if any(modules(a) != names for a in adapters):
        raise ValueError("adapters of different modules have no inner product")
    for at_a in names:
        at_b = at_a.replace("lora_A", "lora_B")
        for i, one in enumerate(adapters):
            a_RI, b_OR = np.asarray(one[at_a], np.float64), np.asarray(one[at_b], np.float64)
            for j in range(i + 1):
                other = adapters[j]
                inner = float(np.sum((b_OR.T @ other[at_b]) * (a_RI @ other[at_a].T)))
                gram_NN[i, j] += inner
                if i != j:
                    gram_NN[j, i] += inner
    return gram_NN


def lengths(adapters: Sequence[Tensors]) -> NDArray[np.float64]:
    """norm_N: Frobenius norm of each adapter's change over all modules."""
    return np.array([float(np.sqrt(max(0.0, gram([a])[0, 0]))) for a in adapters])


def sketch(adapter: Tensors, seed: int, side: int = SIDE) -> NDArray[np.float32]:
    """sketch_D: L B A P of every module, K x K values each, modules in sorted order.

    L and P are Gaussian, drawn for each module from `seed`, and of such a size that squared lengths are kept on
    average. The seed is the operator's: who knows it can put poison where the sketch does not look.
    """

    def of(at_a: str) -> NDArray[np.float64]:
        a_RI = np.asarray(adapter[at_a], np.float64)
        b_OR = np.asarray(adapter[at_a.replace("lora_A", "lora_B")], np.float64)
        left_KO, right_IK = _projections(at_a, b_OR.shape[0], a_RI.shape[1], seed, side)
        return ((left_KO @ b_OR) @ (a_RI @ right_IK)).ravel()

    names = modules(adapter)
    # drawing takes nearly all of it: a generator a module, which lets other threads run meanwhile
    with ordered(sum(adapter[n].size for n in names)) as each:
        return np.concatenate(list(each(of, names))).astype(np.float32)


def _projections(
    module: str, outputs: int, inputs: int, seed: int, side: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    digest = hashlib.sha256(f"assay.sketch.1|{seed}|{side}|{module}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    left_KO, right_IK = rng.standard_normal((side, outputs)), rng.standard_normal((inputs, side))
    for drawn in (left_KO, right_IK):  # as rng.normal(0, scale, ...), number by number, in two thirds of the time
        drawn *= 1 / np.sqrt(side)
    return left_KO, right_IK
