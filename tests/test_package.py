"""The wheel: built, checked, put into an environment of its own, and used in a folder without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def call(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distribution, and the wheel built from it, as `make dist` does."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An environment with the wheel in it. What it depends on is borrowed from this one, so nothing is fetched."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return folder, {**env, "ASSAY_CACHE": str(folder / "cache")}


def test_metadata_passes_twine(dist: Path) -> None:
    call(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)


def test_the_checkout_gives_the_wheel_that_the_source_distribution_gives(dist: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (ours,), (theirs,) = tmp_path.glob("*.whl"), dist.glob("*.whl")
    assert ours.name == theirs.name
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_file_of_the_package_is_in_the_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in (ROOT / "src" / "assay").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = {str(p.relative_to(ROOT / "src")) for p in files} - inside
    assert not missing
    assert any(name.endswith("tiny/model.safetensors") for name in inside)
    assert not {name for name in inside if name.startswith(("tests/", "docs/", "examples/"))}


def test_it_works_without_the_repository(clean: tuple[Path, dict[str, str]]) -> None:
    """What docs/REPORT.md tells of client 7, told by the installed command."""
    folder, env = clean
    here = folder / "somewhere"
    here.mkdir()
    shutil.copy(ROOT / "examples" / "sleeper.toml", here)
    assay, python = folder / "env" / "bin" / "assay", folder / "env" / "bin" / "python"
    where = call(python, "-c", "import assay; print(assay.__file__)", cwd=here, env=env)
    assert Path(where.strip()).is_relative_to(folder), where
    assert call(assay, "--version", cwd=here, env=env).strip()
    models = json.loads(call(assay, "model", "list", "--json", cwd=here, env=env))
    assert {m["name"]: m["cached"] for m in models}["tiny"]
    summary = json.loads(call(assay, "run", "sleeper.toml", "--json", cwd=here, env=env))
    run = here / "runs" / "sleeper"
    assert (run / "report.html").stat().st_size > 1_000_000, "a page with its charts"
    assert summary["participants"]["client-07"] == "malicious"
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    rounds = [entry["body"] for entry in entries if entry["kind"] == "round"]
    weights = [{c["participant"]: c["weight"] for c in body["contributions"]}["client-07"] for body in rounds]
    assert weights == [1, 1, 1, 0, 0, 0]
    refusing = {v["screen"] for v in rounds[3]["verdicts"] if v["participant"] == "client-07" and v["weight"] == 0}
    assert refusing == {"probe", "neighbours", "canary"}
    assert "ok" in call(assay, "ledger", "verify", "runs/sleeper", cwd=here, env=env)
