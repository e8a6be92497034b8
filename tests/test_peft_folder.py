"""Folders of strangers: every one of them becomes an adapter or a refusal, and none of them is loaded to find out."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_folders import CONFIG, LAYERS, blob, names, tensors, write
from assay import adapters
from assay.config import ConfigError
from assay.contribution import Refusal
from assay.wire.peft import Adapter, FolderLimits, read_folder

FIRST = names()[0]
GOOD = blob(tensors(0))


def refusal(folder: Path, **options: Any) -> tuple[str, str]:
    found = read_folder(folder, "x", **options)
    assert isinstance(found, Refusal), found
    return found.reason, found.sentence


def test_an_adapter_is_read_as_it_acts(tmp_path: Path) -> None:
    found = read_folder(write(tmp_path / "a", seed=3), "a")
    assert isinstance(found, Adapter)
    raw = tensors(3)
    assert found.modules == LAYERS
    assert found.claimed_base == "some/base"
    for name, value in found.tensors.items():
        np.testing.assert_array_equal(value, raw[name] * (2 if "lora_B" in name else 1), err_msg="alpha / r is 2")
    rooted = read_folder(write(tmp_path / "r", seed=3, use_rslora=True, lora_alpha=4), "r")
    assert isinstance(rooted, Adapter)
    assert rooted.sha256 == found.sha256, "4 / sqrt(4) is 2 as well: the same adapter"
    assert rooted.file_sha256 == found.file_sha256


@pytest.mark.parametrize(
    ("config", "reason", "says"),
    [
        ({"peft_type": "IA3"}, "structure", "only LORA can be judged"),
        ({"use_dora": True}, "structure", "'use_dora' is set"),
        ({"modules_to_save": ["lm_head"]}, "structure", "'modules_to_save' is set"),
        ({"layers_to_transform": 0}, "structure", "'layers_to_transform' is set"),
        ({"a_key_of_next_year": "on"}, "structure", "'a_key_of_next_year' is set"),
        ({"bias": "all"}, "structure", "biases cannot be judged"),
        ({"init_lora_weights": "pissa"}, "structure", "acts on a base that was changed"),
        ({"init_lora_weights": False}, "structure", "acts on a base that was changed"),
        ({"r": 8}, "wrong_shape", "the config says rank 8"),
        ({"r": True}, "structure", "r is True"),
        ({"r": 10**400}, "structure", "r is 1000"),
        ({"lora_alpha": 1e9}, "structure", "lora_alpha is 1000000000.0"),
        ({"lora_alpha": -1}, "structure", "lora_alpha is -1"),
        ({"lora_alpha": 39999}, "out_of_range", "times its scale"),
        ({"use_rslora": "yes"}, "structure", "use_rslora is 'yes'"),
        ({"target_modules": "(a+)+$"}, "structure", "patterns of strangers are not tried"),
        ({"target_modules": ["q_proj"]}, "structure", "does not name model.layers.0.self_attn.v_proj"),
    ],
)
def test_what_would_act_otherwise_than_judged_is_refused(
    config: dict[str, Any], reason: str, says: str, tmp_path: Path
) -> None:
    weights = blob({n: v * 10 for n, v in tensors(0).items()}) if reason == "out_of_range" else None
    told = refusal(
        write(tmp_path / "a", weights, **{"r": 4, **config}) if "r" not in config else _rank(tmp_path, config)
    )
    assert told[0] == reason
    assert says in told[1]


def _rank(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def _entry(shape: list[Any], dtype: str = "F32", end: int = 192) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed"),
    "header longer than the file": (struct.pack("<Q", 2**63) + b"{}", "malformed"),
    "header too large": (struct.pack("<Q", 5 << 20) + b" " * (5 << 20), "too_large"),
    "header nested": (struct.pack("<Q", 100_000) + b"[" * 100_000, "malformed"),
    "not json": (struct.pack("<Q", 4) + b"nope", "malformed"),
    "twice the same name": (struct.pack("<Q", 17) + b'{"a": 1, "a": 22}', "malformed"),
    "huge shape": (blob(tensors(0), header={FIRST: _entry([4, 2**30])}), "malformed"),
    "shape beyond 31 bits": (blob(tensors(0), header={FIRST: _entry([4, 2**40])}), "wrong_shape"),
    "negative shape": (blob(tensors(0), header={FIRST: _entry([4, -12])}), "wrong_shape"),
    "no side": (blob(tensors(0), header={FIRST: _entry([4, 0], end=0)}), "wrong_shape"),
    "three sides": (blob(tensors(0), header={FIRST: _entry([4, 4, 3])}), "wrong_shape"),
    "shape of text": (blob(tensors(0), header={FIRST: _entry(["4", "12"])}), "wrong_shape"),
    "rank of its own": (blob({**tensors(0), FIRST: np.zeros((5, 12), np.float32)}), "wrong_shape"),
    "int64": (blob(tensors(0), header={FIRST: _entry([4, 12], "I64")}), "wrong_dtype"),
    "float64": (blob({n: v.astype(np.float64) for n, v in tensors(0).items()}, "F64"), "wrong_dtype"),
    "offsets overlap": (blob(tensors(0), header={FIRST: {**_entry([4, 12]), "data_offsets": [64, 256]}}), "malformed"),
    "bytes after the end": (blob(tensors(0), tail=b"more"), "malformed"),
    "half a pair": (blob(tensors(0), header={FIRST: None}), "wrong_keys"),
    "no tensor": (blob({}), "wrong_keys"),
    "an embedding": (blob({**tensors(0), "base_model.model.x.lora_embedding_A": np.zeros((4, 4), np.float32)}), "wrong_keys"),
    "a whole layer": (blob({**tensors(0), "base_model.model.lm_head.weight": np.zeros((4, 4), np.float32)}), "wrong_keys"),
    "a path as a name": (blob({"base_model.model.../../x.lora_A.weight": np.zeros((4, 4), np.float32)}), "wrong_keys"),
    "nan": (blob({**tensors(0), FIRST: np.full((4, 12), np.nan, np.float32)}), "not_finite"),
    "inf": (blob({**tensors(0), FIRST: np.full((4, 12), np.inf, np.float32)}), "not_finite"),
    "1e30": (blob({**tensors(0), FIRST: np.full((4, 12), 1e30, np.float32)}), "out_of_range"),
    "huge metadata": (blob(tensors(0), header={"__metadata__": {"x": "y" * 5000}}), "malformed"),
    "a pickle in its clothes": (b"\x80\x04cos\nsystem\n", "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_weights_are_refused_with_their_reason(kind: str, tmp_path: Path) -> None:
    weights, reason = CORRUPT[kind]
    assert refusal(write(tmp_path / "a", weights))[0] == reason


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"r": 4, "r": 8}', '{"r": NaN}', "[" * 100_000, '{"a": ' * 50_000, "\ud800", " " * (2 << 20)],
    ids=lambda text: text[:12] or "empty",
)
def test_config_bombs_are_refused(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(folder)[0] in ("malformed", "too_large")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_is_refused_unopened(name: str, beside: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    if not beside:
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    os.chmod(folder / name, 0)  # whoever opens it, fails
    reason, told = refusal(folder)
    assert (reason, "was not opened" in told) == ("pickle", True)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_given_as_a_file_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "adapter.pt").write_bytes(b"")
    (tmp_path / "text.txt").write_bytes(b"")
    assert refusal(tmp_path / "adapter.pt")[0] == "pickle"
    assert "is no folder" in refusal(tmp_path / "text.txt")[1]


def test_checkpoints_of_a_trainer_are_no_pickled_adapters(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"")
    assert isinstance(read_folder(folder, "a"), Adapter)


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_out_of_the_folder_are_refused(what: str, tmp_path: Path) -> None:
    outside, folder = write(tmp_path / "other"), write(tmp_path / "a")
    (folder / what).unlink()
    (folder / what).symlink_to(outside / what)
    assert "leads out of the folder" in refusal(folder)[1]
    assert isinstance(read_folder(folder, "a", root=tmp_path), Adapter), "the hub's cache is made of such links"


def test_special_files_are_not_waited_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    assert "no ordinary file" in refusal(folder)[1]
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    assert refusal(folder)[0] == "malformed"


def test_size_is_asked_before_reading(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    assert refusal(folder)[0] == "too_large"
    assert refusal(write(tmp_path / "b"), limits=FolderLimits(weights_bytes=100))[0] == "too_large"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_bytes_raise(tmp_path: Path, data: st.DataObject) -> None:
    """Good files with bytes changed, cut or put in."""
    raw = bytearray(GOOD)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)):
        raw[at] = value
    cut = data.draw(st.integers(0, len(raw)))
    found = read_folder(write(tmp_path / "a", bytes(raw[: cut or None])), "a")
    assert isinstance(found, Adapter | Refusal)
    if isinstance(found, Refusal):
        assert "internal error" not in found.sentence


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_many_passes_over_nothing_visible(tmp_path: Path) -> None:
    many = tmp_path / "many"
    write(many / "b"), write(many / "a", seed=1)
    (many / "empty").mkdir()
    (many / ".git").mkdir()
    (many / "out").symlink_to(write(tmp_path / "outside"))
    found = {
        one.name if isinstance(one, Adapter) else one.participant: one
        for one in adapters.read_all(adapters.places([many]))
    }
    assert list(found) == [f"{many}/{name}" for name in ("a", "b", "empty", "out")]
    assert isinstance(found[f"{many}/a"], Adapter)
    assert found[f"{many}/empty"].reason == "missing"  # type: ignore[union-attr]
    assert isinstance(found[f"{many}/out"], Refusal)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda p: [], "no adapter is named"),
        (lambda p: [p / "absent"], "no such folder"),
        (lambda p: [p / "a", f"{p}/a/"], "named twice"),
        (lambda p: [p / "void"], "neither an adapter"),
        (lambda p: ["hub:nonsense"], "is no repository"),
        (lambda p: ["hub:nobody/nothing"], "not in the local hub cache"),
        (lambda p: ["nobody/nothing"], "not in the local hub cache"),
    ],
)
def test_mistakes_of_the_caller_raise(given: Callable[[Path], list[Any]], says: str, tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "void").mkdir()
    with pytest.raises(ConfigError, match=says):
        adapters.places(given(tmp_path))


def test_the_hubs_cache_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository as the hub's client lays it out: files are links into blobs, found without the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    made = write(tmp_path / "made", seed=5)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (made / name).rename(repository / "blobs" / str(i))
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / str(i))
    for name in ("hub:owner/name", "owner/name", "hub:owner/name@main"):
        (found,) = adapters.read_all(adapters.places([name]))
        assert isinstance(found, Adapter), found
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("/etc/hostname")
    (found,) = adapters.read_all(adapters.places(["hub:owner/name"]))
    assert isinstance(found, Refusal)
    assert "leads out" in found.sentence
