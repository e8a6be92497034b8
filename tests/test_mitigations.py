"""Safe LoRA, pruning and noise on small arrays, against the plain textbook computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from assay.config import ConfigError
from assay.federated import mitigations
from assay.federated.mitigations import alignment_direction, noise, product, prune, safe_lora

M = "base_model.model.model.layers.{}.self_attn.q_proj"
ONE, TWO = M.format(0), M.format(1)


def adapter(seed: int = 0, rank: int = 3, rows: int = 7, columns: int = 5) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    out = {}
    for module in (ONE, TWO):
        out[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
        out[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return out


def direction(seed: int, rank: int = 2, rows: int = 7, columns: int = 5) -> NDArray[np.float64]:
    """Equal singular values, so that 90 % of the square takes every direction."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (rows, columns))
    return 3.0 * left @ right.T


@pytest.mark.parametrize("form", ["paper", "subspace"])
def test_the_projection_is_the_matrix_of_the_paper(form: str) -> None:
    """C built whole: V V^T / |V|, or the pseudo-inverse form V (V^T V)^+ V^T."""
    made, v = adapter(), {ONE: direction(1), TWO: direction(2)}
    found = safe_lora(made, v, 1.0, form)  # type: ignore[arg-type]
    assert found.projected == (ONE, TWO)
    for module in (ONE, TWO):
        if form == "paper":
            c = v[module] @ v[module].T / np.linalg.norm(v[module])
        else:
            c = v[module] @ np.linalg.pinv(v[module].T @ v[module]) @ v[module].T
        delta = product(made, module)
        assert product(found.adapter, module) == pytest.approx(c @ delta, abs=1e-4)
        wanted = np.vdot(c @ delta, delta) / np.linalg.norm(c @ delta) / np.linalg.norm(delta)
        assert found.cosine[module] == pytest.approx(wanted, abs=1e-6)
        assert np.array_equal(found.adapter[f"{module}.lora_A.weight"], made[f"{module}.lora_A.weight"])


def test_only_modules_under_the_threshold_are_projected() -> None:
    made = adapter()
    inside = product(made, ONE)  # an update inside its own span stays; the other module's V is unrelated
    v = {ONE: inside, TWO: direction(5, rank=1)}
    found = safe_lora(made, v, 0.6, "paper")
    assert found.cosine[ONE] > 0.6 >= found.cosine[TWO]
    assert found.projected == (TWO,)
    assert np.array_equal(found.adapter[f"{ONE}.lora_B.weight"], made[f"{ONE}.lora_B.weight"])
    assert safe_lora(made, v, -1.0).projected == ()


def test_subspace_form_is_a_projection_and_rounding_noise_is_no_direction() -> None:
    made, v = adapter(rows=40, columns=30), direction(1, rank=2, rows=40, columns=30)
    noisy = v + 1e-3 * np.random.default_rng(3).standard_normal(v.shape)
    once = safe_lora(made, {ONE: noisy}, 1.0, "subspace")
    assert once.projected == (ONE,)
    assert np.linalg.matrix_rank(product(once.adapter, ONE), tol=1e-3) <= 2
    twice = safe_lora(once.adapter, {ONE: noisy}, 1.0, "subspace")
    assert product(twice.adapter, ONE) == pytest.approx(product(once.adapter, ONE), abs=1e-4)
    assert np.linalg.norm(product(once.adapter, ONE)) < np.linalg.norm(product(made, ONE))


def test_what_alignment_did_not_touch_is_left_alone() -> None:
    made = adapter()
    made[f"{TWO}.lora_B.weight"][:] = 0
    found = safe_lora(made, {ONE: np.zeros((7, 5)), TWO: direction(1)}, 1.0)
    assert found.projected == ()
    assert found.cosine == {}
    assert all(np.array_equal(found.adapter[n], made[n]) for n in made)


def test_directions_come_from_the_two_models_files(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.q_proj.weight"
    rng = np.random.default_rng(0)
    before = {name.format(i): rng.standard_normal((7, 5)).astype(np.float32) for i in range(2)}
    after = {n: w + 1 for n, w in before.items()}
    for folder, weights in (("plain", before), ("aligned", after)):
        (tmp_path / folder).mkdir()
        for i, (n, w) in enumerate(weights.items()):  # as shards
            save_file({n: w}, tmp_path / folder / f"model-{i}.safetensors")
    found = alignment_direction(tmp_path / "aligned", tmp_path / "plain", (ONE, TWO))
    assert set(found) == {ONE, TWO}
    assert found[ONE] == pytest.approx(np.ones((7, 5)), abs=1e-6)
    save_file({name.format(1): np.zeros((5, 5), np.float32)}, tmp_path / "plain" / "model-1.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.weight is not in both .* before its align"):
        alignment_direction(tmp_path / "aligned", tmp_path / "plain", (ONE, TWO))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["largest", "smallest"]), st.integers(1, 2), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 9)
)
def test_pruning_scales_singular_values_and_nothing_else(which: str, count: int, keep: float, seed: int) -> None:
    """Against the decomposition of the whole product."""
    made = adapter(seed)
    pruned = prune(made, which, count, keep)  # type: ignore[arg-type]
    for module in (ONE, TWO):
        u, size, vt = np.linalg.svd(product(made, module), full_matrices=False)
        size[3:] = 0
        at = range(count) if which == "largest" else range(3 - count, 3)
        size[list(at)] *= keep
        assert product(pruned, module) == pytest.approx(u * size @ vt, abs=1e-4)
        assert pruned[f"{module}.lora_A.weight"].shape == (3, 5)


def test_pruning_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finish\.prune\.directions = 3 would leave nothing of rank 3"):
        prune(adapter(), "largest", 3)


def test_a_module_without_update_stays_without() -> None:
    made = adapter()
    made[f"{ONE}.lora_B.weight"][:] = 0
    assert not product(prune(made, "smallest", 1), ONE).any()


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_noise_has_the_asked_share_of_what_training_moved(share: float) -> None:
    start, made = adapter(0), adapter(1)
    noisy = noise(made, start, share, 5)
    for name in made:
        moved = np.linalg.norm(made[name].astype(np.float64) - start[name])
        assert np.linalg.norm(noisy[name].astype(np.float64) - made[name]) == pytest.approx(share * moved, abs=1e-5)
    again, other = noise(made, start, share, 5), noise(made, start, share, 6)
    assert all(np.array_equal(noisy[n], again[n]) for n in made)
    assert share == 0 or not any(np.array_equal(noisy[n], other[n]) for n in made)
    frozen = noise(start, start, 1.0, 5)
    assert all(np.array_equal(frozen[n], start[n]) for n in start), "what training did not move gets no noise"


def test_adapters_of_other_kinds_are_refused() -> None:
    made = adapter()
    del made[f"{ONE}.lora_B.weight"]
    with pytest.raises(ConfigError, match="not made of lora_A and lora_B"):
        mitigations.modules(made)
