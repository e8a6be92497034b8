"""The house rules that a machine can check: imports run downwards, no pickle, every config key is read."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

import assay
from assay import config

ROOT = Path(assay.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
# floors, lowest first; a module may import its own floor and those below, the two wings never each other
FLOORS = {"ground": 0, "federated": 1, "swarm": 1, "engines": 2, "bench": 3, "top": 4}
TOP = {"cli", "demo", "__main__"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("assay", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def floor_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in FLOORS:
        return parts[1]
    # the package itself is the front door (`assay.screen`): it may call on everybody, and nobody imports from it
    return "top" if len(parts) == 1 or parts[1] in TOP else "ground"


def imports(path: Path) -> set[str]:
    """Assay modules that a module imports, at any depth of the file."""
    known = {name_of(p) for p in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else str(node.module))
    return {m for m in found if m == "assay" or m.startswith("assay.")} - {"assay"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    here = floor_of(name_of(path))
    for other in imports(path):
        there = floor_of(other)
        assert FLOORS[there] <= FLOORS[here], f"{name_of(path)} ({here}) imports {other} ({there})"
        if FLOORS[there] == FLOORS[here]:
            assert there == here, f"{name_of(path)} imports {other}: one wing from the other"


def test_no_circular_imports() -> None:
    graph = {name_of(p): imports(p) for p in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("flwr", ("assay.engines.flower", "assay.bench.flower_")),
        ("trl", ("assay.engines.trl",)),
        ("vllm", ("assay.engines.vllm",)),
    ],
)
def test_assay_works_without(library: str, homes: tuple[str, ...]) -> None:
    """Only a command that is told to use a library asks for it, when it is told."""
    for path in MODULES:
        at_home = name_of(path).startswith(homes)
        if re.search(rf"^\s*(import|from) {library}\b", path.read_text(), re.MULTILINE):
            assert at_home, name_of(path)
        if not at_home:
            asked = {m for m in imports(path) if m.startswith(homes)}
            assert not asked or floor_of(name_of(path)) == "top", name_of(path)
            assert not any(
                re.search(rf"^(import|from) {re.escape(m)}\b", path.read_text(), re.MULTILINE) for m in homes
            )


def test_only_the_wire_of_a_judge_needs_openai() -> None:
    for path in MODULES:
        text = path.read_text()
        assert not re.search(
            r"^(from assay\.swarm import .*judge_wire|(from|import) assay\.swarm\.judge_wire)", text, re.MULTILINE
        ), path
        if re.search(r"^\s*(import|from) (openai|httpx2)\b", text, re.MULTILINE):
            assert name_of(path) == "assay.swarm.judge_wire"


def test_only_trackers_need_the_trackers_packages() -> None:
    for path in MODULES:
        if re.search(r"^\s*(import|from) (tensorboard|wandb|trackio)\b", path.read_text(), re.MULTILINE):
            assert name_of(path) == "assay.track.kinds"
            assert not re.search(r"^(import|from) (tensorboard|wandb|trackio)\b", path.read_text(), re.MULTILINE)


def test_attacks_never_import_screens() -> None:
    for path in MODULES:
        if "attacks" in path.with_suffix("").parts:
            forbidden = ("screens", "canary", "defence", "levels", "probe", "judge", "screening")
            assert not {m for m in imports(path) if any(part in forbidden for part in m.split("."))}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    text = path.read_text()
    code = ast.unparse(ast.parse(text))
    assert not re.search(
        r"\b(cPickle|cloudpickle|dill|marshal|shelve)\b|import pickle|torch\.load\b|allow_pickle=True", code
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"{path}:{node.lineno}"


def test_modules_can_be_read_in_one_sitting() -> None:
    long = {name_of(p): len(p.read_text().splitlines()) for p in MODULES if len(p.read_text().splitlines()) > 400}
    assert not long


def config_keys(model: type[BaseModel]) -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= config_keys(field.annotation)
    return keys


def test_every_config_key_is_read_somewhere() -> None:
    code = "\n".join(p.read_text() for p in MODULES if "config" not in p.parts)
    keys = config_keys(config.Experiment) | config_keys(config.SwarmExperiment)
    unread = {key for key in keys if not re.search(rf"\.{key}\b", code)}
    # read by properties of the config itself
    unread -= {"sampled", "wing"}
    assert not unread


@pytest.mark.parametrize("path", sorted((ROOT.parents[1] / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_every_example_parses(path: Path) -> None:
    assert config.load(path).name
    assert "name" in tomllib.loads(path.read_text())
