"""FLAME: the majority's cluster of directions, clipped to the median norm. Legend: as in common.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.averages import clip_factors
from assay.federated.aggregators.common import Aggregator, Present, Ruled, check_count, check_number
from assay.federated.aggregators.geometry import combine, content_seed, gram, scalar_median


def flame(noise: float = 0.0, seed: int = 0) -> Aggregator:
    """FLAME (Nguyen et al. 2022, algorithm 1): HDBSCAN on cosine distances keeps a cluster of more than half of the
    rows, these are clipped to the median norm of all present, and the mean may get Gaussian noise.

    HDBSCAN as in the paper: min_cluster_size n/2 + 1, min_samples 1, one cluster allowed. Directions are those of the
    deltas: whole models, as in the paper, all point the same way when fine-tuned from one base. With these parameters
    there always is such a cluster: the more than half that come together first, be they of one mind or of two.

    `noise` is the paper's lambda: a standard deviation of noise x median norm in *every* coordinate. Default 0: at the
    paper's 0.001 its length is 0.001 sqrt(D) median norms, which is 1.8 updates for an adapter of 3.4M values, and no
    learning is left. Noise follows from `seed` and the round's updates. Clusters count heads; norm and mean weigh.

    >>> flame()(np.array([[1, 0], [1, 0.1], [1, -0.1], [-9, 5]], np.float32), [1, 1, 1, 1]).round(2)
    array([1., 0.], dtype=float32)
    """
    check_number("flame", "noise", noise, 0.0)
    check_count("flame", "seed", seed, 0)

    def rule(rows: Present) -> NDArray[np.float32]:
        gram_NN = gram(rows)
        norm_N = np.sqrt(np.diagonal(gram_NN))
        weight_N = rows.weight_N * _majority(gram_NN, norm_N)
        out_D = combine(rows, weight_N / weight_N.sum() * clip_factors(norm_N, rows.weight_N, None))
        if noise:
            deviation, rng = noise * scalar_median(norm_N, rows.weight_N), content_seed(rows, seed)
            for columns, _ in rows.blocks():
                out_D[columns] += deviation * rng.standard_normal(len(out_D[columns]))
        return out_D

    return Ruled(rule)


def _majority(gram_NN: NDArray[np.float64], norm_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Members of the cluster of more than half of the rows."""
    from sklearn.cluster import HDBSCAN  # takes a second to import: only runs that ask for flame pay it

    n = len(norm_N)
    if n == 1:
        return np.ones(1, bool)
    unit_N = np.divide(1.0, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)
    # rounded: distances that differ by rounding are ties, and an angle of 1e-4 is no direction of its own
    distance_NN = np.round(1 - gram_NN * unit_N[:, None] * unit_N, 9).clip(0.0, 2.0)
    np.fill_diagonal(distance_NN, 0.0)
    clusters = HDBSCAN(
        min_cluster_size=n // 2 + 1, min_samples=1, allow_single_cluster=True, metric="precomputed", copy=True
    )
    return np.asarray(clusters.fit(distance_NN).labels_ == 0)  # of more than half there can be only one
