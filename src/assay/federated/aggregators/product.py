"""Exact averaging of LoRA products: the mean of B_i A_i instead of the mean B times the mean A.

Legend: N participants, r rank, `a_rI` and `b_Or` the factors of one module with I inputs and O outputs, K = N r columns
of all factors side by side. The scale alpha/r is the same for everybody and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.contribution import Tensors

# Smallest singular value of the new A in the row space, relative to the largest: bounds how far B makes up for it.
FLATTEST = 1e-3


@dataclass(frozen=True, slots=True)
class Truncation:
    """What rank r could not hold: the Frobenius norm of what was cut, relative to that of the exact average; over the
    whole adapter, and in the module where it is largest."""

    residual: float
    worst: float
    module: str

    def as_dict(self) -> dict[str, float | str]:
        return {"residual": self.residual, "worst": self.worst, "module": self.module}


def average_products(
    adapters: Sequence[Tensors], weight_N: NDArray[np.float64]
) -> tuple[dict[str, NDArray[np.float32]], Truncation]:
    """Factors of rank r whose product is the weighted mean of the products B_i A_i, per module, or the best of rank r
    that there is (truncated SVD, Eckart and Young); tensors that are no factors are averaged as they are.

    Averaging A and B by themselves adds cross terms B_i A_j (Sun et al. 2024, FFA-LoRA, section 3). The mean of
    products has rank up to N r; it is never built: with QR of the K stacked columns on either side its SVD is that of
    a K x K core. Exact while the rank allows: clients who share A (or B), or all together span no more than r.

    Of all factors with that product A is the one nearest to the weighted mean of the clients' A, so that the next
    round trains, and a probe reads, what looks like the adapters before. Absent participants (weight 0) are not
    read. Memory: a few times one module's factors of all participants in float64. ValueError if nobody is present.

    >>> a = np.eye(1, 2, dtype=np.float32)
    >>> one, two = ({"x.lora_A.weight": a, "x.lora_B.weight": np.full((1, 1), b, np.float32)} for b in (1, 4))
    >>> average_products([one, two], np.array([2.0, 1.0]))[0]["x.lora_B.weight"]
    array([[2.]], dtype=float32)
    """
    present = [(adapter, float(w)) for adapter, w in zip(adapters, weight_N, strict=True) if w > 0]
    if not present:
        raise ValueError("no adapter of weight above 0: there is nothing to average")
    mass = sum(w for _, w in present)
    share_N = np.array([w / mass for _, w in present])
    out: dict[str, NDArray[np.float32]] = {}
    cut, whole, worst, worst_module = 0.0, 0.0, 0.0, ""
    for name in sorted(present[0][0]):
        if "lora_B" in name:
            continue
        a_NrI = [adapter[name].astype(np.float64) for adapter, _ in present]
        if "lora_A" not in name:
            out[name] = sum(s * a for s, a in zip(share_N, a_NrI)).astype(np.float32)
            continue
        partner = name.replace("lora_A", "lora_B")
        if partner not in present[0][0] or a_NrI[0].ndim != 2:
            raise ConfigError(f"aggregation.average = product needs pairs of LoRA matrices; {name} is none of a pair")
        b_NOr = [adapter[partner].astype(np.float64) for adapter, _ in present]
        a_rI, b_Or, value_K = _module(a_NrI, b_NOr, share_N)
        out[name], out[partner] = a_rI.astype(np.float32), b_Or.astype(np.float32)
        lost, total = float((value_K[len(a_rI) :] ** 2).sum()), float((value_K**2).sum())
        cut, whole = cut + lost, whole + total
        if total > 0 and lost / total > worst:
            worst, worst_module = lost / total, name.split(".lora_A")[0]
    return out, Truncation(float(np.sqrt(cut / whole)) if whole else 0.0, float(np.sqrt(worst)), worst_module)


def _module(
    a_NrI: Sequence[NDArray[np.float64]], b_NOr: Sequence[NDArray[np.float64]], share_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """New A, new B, and all singular values of the mean product."""
    r = len(a_NrI[0])
    left_OK, left_KK = np.linalg.qr(np.concatenate([s * b_Or for s, b_Or in zip(share_N, b_NOr)], axis=1))
    right_IK, right_KK = np.linalg.qr(np.concatenate(a_NrI).T)
    u_KK, value_K, v_KK = np.linalg.svd(left_KK @ right_KK.T, full_matrices=False)
    held = min(r, len(value_K))
    product_Or, row_rI = left_OK @ (u_KK[:, :held] * value_K[:held]), v_KK[:held] @ right_IK.T
    # the gauge: A = C V', B = U S C^-1 for the invertible C that brings A nearest to the mean of the clients' A
    mean_rI = np.tensordot(share_N, np.stack(a_NrI), axes=1)
    x_rr, flat_r, y_rr = np.linalg.svd(mean_rI @ row_rI.T, full_matrices=False)
    flat_r = np.maximum(flat_r, FLATTEST * flat_r[0]) if flat_r[0] > 0 else np.ones_like(flat_r)
    return (x_rr * flat_r) @ y_rr @ row_rI, product_Or @ (y_rr.T / flat_r) @ x_rr.T, value_K
