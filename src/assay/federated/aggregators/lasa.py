"""LASA: sparsified updates, filtered layer by layer by their norms and signs. Legend: as in common.py; L layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.federated.aggregators.averages import clip_factors
from assay.federated.aggregators.common import Aggregator, Block, Present, Ruled, check_number
from assay.federated.aggregators.geometry import SCORE_SLACK, scalar_median, weighted_sum


def lasa(
    sparsity: float = 0.3, norm_limit: float = 1.0, sign_limit: float = 1.0, layers: Sequence[int] | None = None
) -> Aggregator:
    """LASA (Xu et al. 2025, WACV, algorithm 1): rows are clipped to the median norm and lose the `sparsity` share of
    their smallest values; each layer is the mean of those rows that pass both filters there.

    A filter is a median-based z-score, |x - median| / std over the rows: of the layer's norm (below `norm_limit`), and
    of its sign purity, the balance of positive among non-zero values (below `sign_limit`). Paper: sparsity 0.3, limits
    1 or 2 by data set; Safe-FedLLM 1 and 1. The sparsified rows are what is averaged, as in both published codes.

    `layers`: number of values of each layer, in the order of the flattened adapter; the engine fills it in from the
    adapter's tensors (None: all of it is one layer). Median and std are weighted: integer weights are repeated rows.
    Where nobody passes both filters (two rows: always) the row nearest to passing does; published code admits all.

    >>> lasa(sparsity=0.5, layers=[2])(np.array([[1, 4], [1, 4], [1, 4], [-9, 1]], np.float32), [1, 1, 1, 1])
    array([0., 4.], dtype=float32)
    """
    check_number("lasa", "sparsity", sparsity, 0.0)
    if sparsity >= 1:
        raise ConfigError(f"lasa: sparsity must be below 1, got {sparsity}")
    check_number("lasa", "norm_limit", norm_limit, 0.0, strict=True)
    check_number("lasa", "sign_limit", sign_limit, 0.0, strict=True)

    def rule(rows: Present) -> NDArray[np.float32]:
        sizes = [rows.width] if layers is None else list(layers)
        if sum(sizes) != rows.width or min(sizes, default=0) < 1:
            raise ValueError(f"lasa: layers of {sum(sizes)} values do not fit deltas of {rows.width}")
        smallest_N = _thresholds(rows, rows.width - int(sparsity * rows.width))
        norm_N = np.zeros(rows.n)
        for _, block_NB in rows.blocks():
            norm_N += (block_NB.astype(np.float64) ** 2).sum(axis=1)
        clip_N = clip_factors(np.sqrt(norm_N), rows.weight_N, None)
        out_D, at = np.empty(rows.width, np.float32), 0
        for size in sizes:
            admitted_N = _admitted(rows, slice(at, at + size), smallest_N, clip_N, norm_limit, sign_limit)
            weight_N = rows.weight_N * admitted_N
            for columns, block_NB in rows.blocks(at, at + size):
                kept_NB = _sparsified(block_NB, smallest_N)
                out_D[columns] = weighted_sum(kept_NB, (weight_N / weight_N.sum() * clip_N)[:, None])
            at += size
        return out_D

    return Ruled(rule)


def _admitted(
    rows: Present,
    layer: slice,
    smallest_N: NDArray[np.uint32],
    clip_N: NDArray[np.float64],
    norm_limit: float,
    sign_limit: float,
) -> NDArray[np.bool_]:
    square_N, balance_N, count_N = np.zeros(rows.n), np.zeros(rows.n), np.zeros(rows.n)
    for _, block_NB in rows.blocks(layer.start, layer.stop):
        kept_NB = _sparsified(block_NB, smallest_N)
        square_N += (kept_NB.astype(np.float64) ** 2).sum(axis=1)
        balance_N += np.sign(kept_NB).sum(axis=1, dtype=np.float64)
        count_N += np.count_nonzero(kept_NB, axis=1)
    purity_N = 0.5 * (1 + np.divide(balance_N, count_N, out=np.zeros(rows.n), where=count_N > 0))
    odd_N = np.maximum(
        _score(clip_N * np.sqrt(square_N), rows.weight_N) / norm_limit, _score(purity_N, rows.weight_N) / sign_limit
    )
    return np.asarray(odd_N < max(1 - SCORE_SLACK, odd_N.min() + SCORE_SLACK))


def _score(value_N: NDArray[np.float64], weight_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median-based z-score; 0 for all where they do not differ."""
    away_N = np.abs(value_N - scalar_median(value_N, weight_N))
    mean = weight_N @ value_N / weight_N.sum()
    std = np.sqrt(weight_N @ (value_N - mean) ** 2 / weight_N.sum())
    return away_N / std if std > SCORE_SLACK * np.abs(value_N).max() else np.zeros(len(value_N))


def _sparsified(block_NB: Block, smallest_N: NDArray[np.uint32]) -> Block:
    return np.where(_magnitudes(block_NB) >= smallest_N[:, None], block_NB, np.float32(0))


def _magnitudes(block_NB: Block) -> NDArray[np.uint32]:
    """Bit patterns of absolute float32 values: they are ordered as the values are."""
    return np.abs(block_NB).view(np.uint32)


def _thresholds(rows: Present, keep: int) -> NDArray[np.uint32]:
    """Bit pattern of each row's `keep`-th largest magnitude, exact, a byte at a time, without a copy of the rows."""
    prefix_N, left_N = np.zeros(rows.n, np.uint32), np.full(rows.n, keep)
    for shift in (24, 16, 8, 0):
        count_NV = np.zeros((rows.n, 256), np.int64)
        for _, block_NB in rows.blocks():
            bits_NB = _magnitudes(block_NB)
            for row, (bits_B, prefix) in enumerate(zip(bits_NB, prefix_N)):
                here_B = bits_B if shift == 24 else bits_B[(bits_B >> np.uint32(shift + 8)) == prefix]
                byte_B = (here_B >> np.uint32(shift)) & np.uint32(255)
                count_NV[row] += np.bincount(byte_B.astype(np.intp), minlength=256)
        above_NV = count_NV[:, ::-1].cumsum(axis=1)[:, ::-1]  # values whose byte is at least v
        byte_N = (above_NV >= left_N[:, None]).sum(axis=1) - 1
        left_N = (
            left_N
            - (np.take_along_axis(above_NV, byte_N[:, None], 1) - np.take_along_axis(count_NV, byte_N[:, None], 1))[
                :, 0
            ]
        )
        prefix_N = (prefix_N << np.uint32(8)) | byte_N.astype(np.uint32)
    return prefix_N
