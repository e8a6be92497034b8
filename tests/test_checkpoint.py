"""Checkpoints: whole or not there, damage is noticed, and a killed run resumes from a valid state."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from assay import checkpoint as module
from assay.checkpoint import CheckpointError, load_latest, save, write_atomic, write_json


def state(step: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(step)
    tensors = {
        "adapter.A": rng.normal(size=(3, 4)).astype("f4"),
        "counts": rng.integers(0, 9, size=5),
        "scalar": np.array(step, "i8"),
        "none": np.zeros((0, 2), "f4"),
    }
    return tensors, {"round": step, "trust": {"änna": 0.1 + step, "list": [1, None, True]}}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_is(found, step: int) -> None:
    tensors, meta = state(step)
    assert found is not None
    assert (found.step, found.meta) == (step, meta)
    assert found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        got = found.tensors[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_what_is_saved_comes_back(tmp_path):
    folder = tmp_path / "a" / "checkpoints"
    assert load_latest(folder) is None
    path = save(folder, 12, *state(12))
    assert path.name == "000012.safetensors"
    found = load_latest(folder)
    assert_is(found, 12)
    found.tensors["adapter.A"][0, 0] = 1.0  # the caller's own copy
    assert_is(load_latest(folder), 12)


def test_empty_state_and_equal_bytes(tmp_path):
    save(tmp_path, 0, {}, {})
    assert load_latest(tmp_path).tensors == {}
    raw = [save(tmp_path / name, 3, *state(3)).read_bytes() for name in "ab"]
    assert raw[0] == raw[1]


def test_transposed_and_big_endian_arrays_keep_their_values(tmp_path):
    array = np.arange(6, dtype="f4").reshape(2, 3)
    save(tmp_path, 1, {"t": array.T, "f": np.asfortranarray(array), "s": array[:, ::2], "b": array.astype(">f4")}, {})
    found = load_latest(tmp_path).tensors
    for name, expected in {"t": array.T, "f": array, "s": array[:, ::2], "b": array}.items():
        np.testing.assert_array_equal(found[name], expected)


def test_keep(tmp_path):
    for step in range(5):
        save(tmp_path, step, *state(step), keep=2)
    assert files(tmp_path) == ["000003.safetensors", "000004.safetensors"]
    save(tmp_path, 1_000_000, *state(5), keep=1)
    assert files(tmp_path) == ["1000000.safetensors"]
    save(tmp_path, 2, *state(2), keep=1)  # a run that went back has no future
    assert_is(load_latest(tmp_path), 2)


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[:-5]
    elif how == "empty":
        raw = bytearray()
    elif how == "value":
        raw[-1] ^= 1
    elif how == "meta":
        raw = raw.replace(b"round", b"rouna", 1)
    elif how == "noise":
        raw = bytearray(os.urandom(len(raw)))
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "empty", "value", "meta", "noise"])
def test_a_damaged_newest_is_skipped_with_a_warning(tmp_path, how):
    save(tmp_path, 1, *state(1))
    newest = save(tmp_path, 2, *state(2))
    damage(newest, how)
    with pytest.warns(RuntimeWarning, match=r"000002\.safetensors is damaged"):
        assert_is(load_latest(tmp_path), 1)
    save(tmp_path, 2, *state(2))  # the run goes on over the damaged one
    assert_is(load_latest(tmp_path), 2)


def test_files_that_are_not_what_they_say(tmp_path):
    save(tmp_path, 1, *state(1), keep=9)
    save_file({"x": np.zeros(2, "f4")}, tmp_path / "000007.safetensors")  # no metadata
    save_file({"x": np.zeros(2, "f4")}, tmp_path / "000008.safetensors", {"assay.checkpoint": "[]"})
    (tmp_path / "000009.safetensors").write_bytes((tmp_path / "000001.safetensors").read_bytes())  # renamed
    (tmp_path / "notes.txt").write_text("left alone")
    with pytest.warns(RuntimeWarning) as warned:
        assert_is(load_latest(tmp_path), 1)
    assert len(warned) == 3
    assert "notes.txt" in files(tmp_path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_all_damaged_is_an_error(tmp_path):
    damage(save(tmp_path, 1, *state(1)), "cut")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        load_latest(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, bytes]:
    path = save(tmp_path_factory.mktemp("flip"), 1, *state(1))
    return path, path.read_bytes()


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None, derandomize=True, max_examples=150)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_flipped_bit_is_noticed_or_means_nothing(saved, at, bit):
    path, good = saved
    raw = bytearray(good)
    raw[at % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    try:
        found = load_latest(path.parent)
    except CheckpointError:
        return
    assert_is(found, 1)  # for instance a space of the padding that became a tab


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    save(tmp_path, 1, *state(1))
    write_atomic(tmp_path / "x.txt", "old")

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2, *state(2))
        with pytest.raises(OSError, match="no space"):
            write_atomic(tmp_path / "x.txt", "new")
    assert files(tmp_path) == ["000001.safetensors", "x.txt"]
    assert_is(load_latest(tmp_path), 1)
    assert (tmp_path / "x.txt").read_text() == "old"


def test_what_a_kill_left_is_cleaned(tmp_path, monkeypatch):
    save(tmp_path, 1, *state(1))
    with monkeypatch.context() as patch:  # a kill runs no `finally`
        patch.setattr(module.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(module.Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, *state(2))
    assert len(files(tmp_path)) == 2
    (tmp_path / ".mine.tmp").write_text("not ours")
    assert_is(load_latest(tmp_path), 1)
    assert files(tmp_path) == [".mine.tmp", "000001.safetensors"]


def test_the_operators_mistakes_raise(tmp_path):
    with pytest.raises(ValueError, match="step"):
        save(tmp_path, -1, {}, {})
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 1, {}, {}, keep=0)
    with pytest.raises(TypeError, match=r"x is float16"):
        save(tmp_path, 1, {"x": np.zeros(2, "f2")}, {})
    with pytest.raises(TypeError, match="object"):
        save(tmp_path, 1, {"x": np.array([{}])}, {})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, {}, {"x": float("nan")})
    assert files(tmp_path) == []


def test_write_json(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"name": "é", "auroc": None})
    assert json.loads(path.read_text()) == {"name": "é", "auroc": None}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"auroc": float("nan")})
    assert json.loads(path.read_text())["name"] == "é"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


CHILD = """
import sys
import numpy as np
from assay.checkpoint import load_latest, save

found = load_latest(sys.argv[1])
step = found.step if found else 0
while True:
    step += 1
    save(sys.argv[1], step, {"counter": np.full(20_000, step)}, {"counter": step})
    print(step, flush=True)
"""


@pytest.mark.filterwarnings("error")  # load_latest warns of damage: a kill must leave none
def test_a_run_killed_at_any_moment_resumes_from_a_valid_state(tmp_path):
    """SIGKILL. It shows what a dead process leaves behind; a power cut, which fsync is for, it cannot show."""
    rng = random.Random(0)
    told = 0
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE) as child:
            for _ in range(rng.randint(1, 5)):
                told = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.01))  # anywhere in its next saves; nothing here depends on how long it takes
            child.kill()
            rest = child.stdout.read().split(b"\n")[:-1]
        told = int(rest[-1]) if rest else told
        found = load_latest(tmp_path)
        assert found.step in (told, told + 1)  # killed between rename and print: one more than it told
        assert found.meta == {"counter": found.step}
        assert (found.tensors["counter"] == found.step).all()
        assert len(files(tmp_path)) <= 3
    assert load_file(found.path)["counter"].shape == (20_000,)
