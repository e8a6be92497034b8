"""Weighted averages. Legend: as in common.py."""

from __future__ import annotations

from assay.federated.aggregators.common import Aggregator, aggregator, weighted_mean


def mean() -> Aggregator:
    """FedAvg (McMahan et al. 2017): the weighted mean. Bears no attacker: one row moves it anywhere.

    >>> import numpy as np
    >>> mean()(np.array([[1], [3]], np.float32), [1, 3])
    array([2.5], dtype=float32)
    """
    return aggregator(weighted_mean)
