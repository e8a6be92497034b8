"""Published robust rules written down plainly, as their papers' and Safe-FedLLM's code run them: what `speed` compares with.

Torch on whole matrices, no blocks, no weights. Parity of Assay's own rules with independent restatements is tested in
tests/test_aggregators_parity.py; these are for time and memory, and tests hold them to the same results.
Legend: N participants, D values, B of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]


def mean(x_ND: Tensor) -> Tensor:
    """FedAvg: a weighted sum, participant after participant."""
    out_D = torch.zeros_like(x_ND[0])
    for row_D in x_ND:
        out_D += row_D * (1 / len(x_ND))
    return out_D


def median(x_ND: Tensor) -> Tensor:
    """The lower median of every coordinate, torch's."""
    return torch.median(x_ND, dim=0).values


def trimmed_mean(x_ND: Tensor, f: int) -> Tensor:
    """Every coordinate sorted, f values off at either end."""
    return torch.sort(x_ND, dim=0).values[f : len(x_ND) - f].mean(dim=0)


def krum(x_ND: Tensor, f: int) -> Tensor:
    """Blanchard et al. 2017: the row whose n-f-2 nearest are nearest; distances pair by pair."""
    n = len(x_ND)
    distance_NN = torch.zeros(n, n)
    for i in range(n):
        for j in range(i + 1, n):
            distance_NN[i, j] = distance_NN[j, i] = torch.sum((x_ND[i] - x_ND[j]) ** 2)
    near_N = torch.sort(distance_NN, dim=1).values[:, 1 : n - f - 1].sum(dim=1)
    return x_ND[torch.argmin(near_N)]


def foolsgold(x_ND: Tensor) -> Tensor:
    """Fung et al. 2020, algorithm 1, on one round's histories in float64."""
    unit_ND = x_ND.double() / x_ND.double().norm(dim=1, keepdim=True)
    similar_NN = unit_ND @ unit_ND.T - 2 * torch.eye(len(x_ND))
    most_N = similar_NN.max(dim=1).values.clamp(min=0)
    pardon_NN = torch.where(most_N[None] > most_N[:, None], most_N[:, None] / most_N[None], 1.0)
    alpha_N = (1 - (similar_NN * pardon_NN).max(dim=1).values).clamp(0, 1)
    alpha_N = (alpha_N / alpha_N.max()).clamp(max=0.99)
    weight_N = (torch.log(alpha_N / (1 - alpha_N)) + 0.5).clamp(0, 1)
    return (weight_N / weight_N.sum()).float() @ x_ND


def dnc(x_ND: Tensor, drop: int, subset: int, seed: int) -> Tensor:
    """Shejwalkar and Houmansadr 2021, algorithm 2: outliers along the first right singular vector of some coordinates."""
    columns = torch.randperm(x_ND.shape[1], generator=torch.Generator().manual_seed(seed))[:subset]
    some = x_ND[:, columns]
    centred = some - some.mean(dim=0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    good = torch.argsort((centred @ direction) ** 2)[: len(x_ND) - drop]
    return x_ND[good].mean(dim=0)


def flame(x_ND: Tensor) -> Tensor:
    """Nguyen et al. 2022 without its noise: HDBSCAN on cosine distances, clipped to the median norm."""
    from sklearn.cluster import HDBSCAN

    norm_N = x_ND.double().norm(dim=1)
    distance_NN = 1 - (x_ND.double() @ x_ND.double().T) / (norm_N[:, None] * norm_N[None])
    distance_NN.fill_diagonal_(0.0)
    made = HDBSCAN(
        min_cluster_size=len(x_ND) // 2 + 1, min_samples=1, allow_single_cluster=True, metric="precomputed", copy=True
    )
    label_N = torch.from_numpy(np.asarray(made.fit(distance_NN.clamp(min=0).numpy()).labels_))
    clipped = x_ND * (norm_N.quantile(0.5) / norm_N).clamp(max=1.0)[:, None].float()
    kept: Tensor = clipped[label_N == 0]
    return kept.mean(dim=0)


def lasa(x_ND: Tensor, sparsity: float, norm_limit: float, sign_limit: float, layers: list[int]) -> Tensor:
    """Xu et al. 2025, algorithm 1: rows clipped to the median norm and sparsified, layers filtered by norm and sign."""
    norm_N = x_ND.norm(dim=1)
    x_ND = x_ND * (norm_N.quantile(0.5) / norm_N).clamp(max=1.0)[:, None]
    drop = int(sparsity * x_ND.shape[1])
    for row_D in x_ND:
        row_D[torch.topk(row_D.abs(), drop, largest=False).indices] = 0
    out, at = [], 0
    for size in layers:
        part = x_ND[:, at : at + size]
        purity = 0.5 * (1 + part.sign().sum(dim=1) / part.sign().abs().sum(dim=1))
        good = torch.ones(len(part), dtype=torch.bool)
        for value, limit in ((part.norm(dim=1), norm_limit), (purity, sign_limit)):
            good &= (value - value.quantile(0.5)).abs() / value.std(correction=0) < limit
        out.append(part[good].mean(dim=0))
        at += size
    return torch.cat(out)


def residual(x_ND: Tensor, width: float, threshold: float, block: int = 20_000) -> Tensor:
    """Fu et al. 2019, section 4: repeated-median lines through every coordinate's sorted values, weights by residual."""
    n, columns = x_ND.shape
    rank_N = torch.arange(n, dtype=torch.float64)
    apart_NN = rank_N[None] - rank_N[:, None]
    others_NN = ~torch.eye(n, dtype=torch.bool)
    design = torch.stack([torch.ones(n, dtype=torch.float64), rank_N], dim=1)
    leverage_N = torch.diagonal(design @ torch.linalg.inv(design.T @ design) @ design.T)
    total_N, kept_ND = torch.zeros(n, dtype=torch.float64), torch.empty_like(x_ND)
    for low in range(0, columns, block):
        y_BN, order_BN = torch.sort(x_ND[:, low : low + block].T.double(), dim=1, stable=True)
        slope_BNN = (y_BN[:, None, :] - y_BN[:, :, None]) / apart_NN
        slope_B = _middle(_middle(slope_BNN[:, others_NN].view(-1, n, n - 1)))
        line_BN = (_middle(y_BN) - slope_B * (n - 1) / 2)[:, None] + slope_B[:, None] * rank_N
        off_BN = y_BN - line_BN
        tau_B = 1.4826 * (1 + 5 / (n - 1)) * _middle(torch.sort(off_BN.abs(), dim=1).values[:, 1:])
        e_BN, k = off_BN / tau_B[:, None] / torch.sqrt(1 - leverage_N), width * (2 / n) ** 0.5
        confidence_BN = torch.where(e_BN == 0, 1.0, e_BN.clamp(-k, k) / e_BN)
        total_N.scatter_add_(
            0, order_BN.reshape(-1), (confidence_BN * confidence_BN.std(dim=1, keepdim=True)).reshape(-1)
        )
        value_BN = torch.where(confidence_BN >= threshold, y_BN, line_BN)
        kept_ND[:, low : low + block] = torch.empty_like(y_BN).scatter_(1, order_BN, value_BN).T.float()
    weight_N = (total_N / total_N.max()) ** 2
    return (weight_N / weight_N.sum()).float() @ kept_ND


def _middle(value: Tensor) -> Tensor:
    """The median over the last dimension: the mean of both middle values where their number is even."""
    ordered, count = torch.sort(value, dim=-1).values, value.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def rules(f: int, layers: list[int]) -> Mapping[str, Rule]:
    """By Assay's names, with Assay's default parameters."""
    return {
        "mean": mean,
        "median": median,
        "trimmed_mean": lambda x: trimmed_mean(x, f),
        "krum": lambda x: krum(x, f),
        "foolsgold": foolsgold,
        "residual": lambda x: residual(x, 2.0, 0.1),
        "dnc": lambda x: dnc(x, f, x.shape[1], 0),
        "flame": flame,
        "lasa": lambda x: lasa(x.clone(), 0.3, 1.0, 1.0, layers),
    }
