"""What a server can do to a finished adapter: Safe LoRA's projection, pruning and shrinking of directions, noise.

Pure functions of adapters (PEFT names to float32 arrays); `finish` runs them in order and measures. All of them act on
the product B A of a module: its factors mean nothing by themselves.
Legend: O rows of a module's weight, I its columns, R the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from assay.config import ConfigError
from assay.contribution import Tensors

Array = NDArray[np.float64]
Form = Literal["paper", "subspace"]
Which = Literal["largest", "smallest"]
Adapter = dict[str, NDArray[np.float32]]
A_PART, B_PART = ".lora_A.weight", ".lora_B.weight"


def modules(adapter: Tensors) -> tuple[str, ...]:
    """Names of the adapted modules: a module has a lora_A and a lora_B."""
    found = tuple(sorted(name.removesuffix(A_PART) for name in adapter if name.endswith(A_PART)))
    if not found or 2 * len(found) != len(adapter) or any(m + B_PART not in adapter for m in found):
        raise ConfigError("finish: the adapter is not made of lora_A and lora_B of linear layers; leave [finish] out")
    return found


def product(adapter: Tensors, module: str) -> Array:
    """Delta W = B A of a module, without the factor alpha / r."""
    return np.asarray(adapter[module + B_PART], np.float64) @ np.asarray(adapter[module + A_PART], np.float64)


# --- Safe LoRA -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projected:
    """The adapter, the cosine of each module that has a direction, and which modules were projected."""

    adapter: Adapter
    cosine: Mapping[str, float]
    projected: tuple[str, ...]


def safe_lora(
    adapter: Tensors, direction: Mapping[str, NDArray[np.floating]], threshold: float, form: Form = "paper"
) -> Projected:
    """Project B of every module whose update leaves the alignment subspace (Hsu et al. 2024, arXiv 2405.16833).

    V_OI = aligned minus unaligned weights spans what safety training changed; C = V V^T / |V|_F (their eq. 2; `paper`)
    or the orthogonal projection U U^T onto V's leading directions (`subspace`, their exact form: V holds 90 % of its
    square there; the rest of it is the rounding of weights stored in bfloat16). A module is projected, B <- C B, when
    cos(C B A, B A) is at most `threshold` (their 0.35). C of the paper scales with |V|_F, so a projected update
    shrinks or grows with how much alignment changed this module; `subspace` only ever removes. A module without
    direction (V absent or zero) or without update is left alone.
    """
    out, cosine, projected = _copy(adapter), {}, []
    for module in modules(adapter):
        v_OI = np.asarray(direction.get(module, np.zeros((0, 0))), np.float64)
        delta_OI = product(adapter, module)
        if not v_OI.any() or not delta_OI.any():
            continue
        b_OR = np.asarray(adapter[module + B_PART], np.float64)
        moved_OR = _projection(v_OI, form, b_OR)
        moved_OI = moved_OR @ np.asarray(adapter[module + A_PART], np.float64)
        cosine[module] = _cosine(moved_OI, delta_OI)
        if cosine[module] <= threshold:
            out[module + B_PART] = moved_OR.astype(np.float32)
            projected.append(module)
    return Projected(out, cosine, tuple(projected))


def _projection(v_OI: Array, form: Form, b_OR: Array) -> Array:
    """C B, without ever holding the O x O matrix C of the paper's form."""
    if form == "paper":
        return np.asarray(v_OI @ (v_OI.T @ b_OR) / np.linalg.norm(v_OI))
    u_OK, size_K, _ = np.linalg.svd(v_OI, full_matrices=False)
    held_K = np.cumsum(size_K**2) / np.sum(size_K**2)
    u_OK = u_OK[:, : int(np.searchsorted(held_K, 0.9)) + 1]
    return np.asarray(u_OK @ (u_OK.T @ b_OR))


def _cosine(x: Array, y: Array) -> float:
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.sum(x * y)) / size if size > 0 else 0.0


def alignment_direction(aligned: Path, unaligned: Path, wanted: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """V_OI of every wanted module: its weight in `aligned` minus its weight in `unaligned` (safetensors directories).

    ConfigError where a weight is missing or of another shape: the two must be one model before and after alignment.
    """
    names = {module: module.removeprefix("base_model.model.") + ".weight" for module in wanted}
    before, after = (_weights(path, set(names.values())) for path in (unaligned, aligned))
    out = {}
    for module, name in names.items():
        if name not in before or name not in after or before[name].shape != after[name].shape:
            raise ConfigError(
                f"finish.safe_lora: {name} is not in both {unaligned} and {aligned} with one shape; "
                "unaligned must be the same model before its alignment"
            )
        out[module] = after[name] - before[name]
    return out


def _weights(folder: Path, names: set[str]) -> dict[str, NDArray[np.float32]]:
    found: dict[str, NDArray[np.float32]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:  # pt: NumPy has no bfloat16
            found |= {n: tensors.get_tensor(n).float().numpy() for n in names & set(tensors.keys())}
    return found


# --- pruning and noise -----------------------------------------------------------------------------------------------


def prune(adapter: Tensors, which: Which, directions: int, keep: float = 0.0) -> Adapter:
    """Scale the `directions` largest or smallest singular values of every B A by `keep` (0 removes them).

    A backdoor is often a few strong directions of its own (spectral signatures, Tran et al. 2018) or hides in weak ones
    that honest data does not use (fine-pruning, Liu et al. 2018); which of the two is tried out. B and A come back
    balanced (each carries the root of the singular values), so their product is what is kept, not the factors.
    """
    out = _copy(adapter)
    for module in modules(adapter):
        a_RI, b_OR = (np.asarray(adapter[module + part], np.float64) for part in (A_PART, B_PART))
        rank = min(a_RI.shape[0], *a_RI.shape[1:], b_OR.shape[0])
        if directions >= rank and keep == 0:
            raise ConfigError(f"finish.prune.directions = {directions} would leave nothing of rank {rank}; lower it")
        # the product's decomposition from its factors: never an O x I matrix
        qb_OR, rb_RR = np.linalg.qr(b_OR)
        qa_IR, ra_RR = np.linalg.qr(a_RI.T)
        u_RR, size_R, vt_RR = np.linalg.svd(rb_RR @ ra_RR.T)
        size_R = size_R.copy()
        chosen = slice(0, directions) if which == "largest" else slice(max(0, rank - directions), None)
        size_R[chosen] *= keep
        root_R = np.sqrt(size_R)
        out[module + B_PART] = (qb_OR @ u_RR * root_R).astype(np.float32)
        out[module + A_PART] = (root_R[:, None] * vt_RR @ qa_IR.T).astype(np.float32)
    return out


def noise(adapter: Tensors, initial: Tensors, share: float, seed: int) -> Adapter:
    """Gaussian noise on every tensor, of `share` times the norm by which training moved it since `initial`."""
    rng = np.random.default_rng(seed)
    out = {}
    for name in sorted(adapter):
        moved = np.asarray(adapter[name], np.float64) - initial[name]
        drawn = rng.standard_normal(moved.shape)
        scale = share * np.linalg.norm(moved) / np.linalg.norm(drawn)
        out[name] = (adapter[name] + scale * drawn).astype(np.float32)
    return out


def _copy(adapter: Tensors) -> Adapter:
    return {name: np.array(value, dtype=np.float32) for name, value in adapter.items()}
