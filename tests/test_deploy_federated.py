"""A federated deployment of real processes on loopback: TLS, authenticated nodes, and what happens when things die."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay import builtin, models, run_dir
from assay.ledger import verify
from deployed import Deployed, deployed, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc"),
    pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="keys need both tools"),
]
SITES = ("st-mary", "north", "city")
SMALL = {
    'dtype = "float32"': 'dtype = "float32"\nalign = false',
    "rounds = 6": "rounds = 4",
    "[defence.canary]": "[defence.rehearsal]\nrounds = 2\nexamples = 24\n[defence.canary]",
}
"""The experiment as `init` wrote it, with less of everything that only takes time."""
EVALUATE = "[evaluate]\nevery = 4\nharmful_prompts = 2\nbenign_prompts = 2\nbenign_rows = 4\nnew_tokens = 4\n"
BIG = '[lora]\nr = 1960\ntargets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]\n'  # 80 MB


def written(text: str, more: dict[str, str]) -> str:
    for old, new in {**SMALL, **more}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text + EVALUATE


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Deployed]:
    """README.md's steps up to the run; `cache` is what all of them share on this machine."""
    with deployed(tmp_path_factory.mktemp("federated"), "federated", len(SITES)) as made:
        experiment = made.server / "experiment.toml"
        (made.folder / "as-written.toml").write_text(experiment.read_text())
        experiment.write_text(written(experiment.read_text(), {}))
        rows = [{"instruction": row[0], "response": row[1]} for row in builtin.rows("helpful")]
        random.Random(3).shuffle(rows)
        made.superlink()
        made.proxy()
        for i, name in enumerate(SITES):
            folder = made.site(name)
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[i * 40 : i * 40 + 40])))
            made.run(folder / "key.sh")
            made.run(made.server / "register.sh", name.title(), folder / "node.key.pub")
            start(made, name)
        yield made


def start(made: Deployed, name: str) -> None:
    more = ["threads=1", f'base="{models.resolve("tiny")}"'] if name == SITES[1] else ["threads=1"]
    made.start(name, made.folder / name / "start.sh", f"{name}/rows.jsonl", *more)


def present(entry: dict, names: dict[str, str]) -> set[str]:
    """Who has sent an update that could be judged, by name."""
    return {names[c["participant"]] for c in entry["contributions"] if c["reason"] != "missing"}


def test_who_is_not_registered_stays_outside(federation: Deployed) -> None:
    """An unregistered key is refused; from outside nobody can register one, start a run, or act as the server."""
    stranger = federation.site("stranger")
    federation.run(stranger / "key.sh")
    (stranger / "rows.jsonl").write_text('{"instruction": "?", "response": "!"}\n')
    process = federation.start("stranger", stranger / "start.sh", stranger / "rows.jsonl")
    assert process.wait(300) != 0
    assert "Failed to initialize the connection to the SuperLink" in federation.said("stranger")
    assert "No SuperNode found with the given public key" in federation.said("superlink")
    # what README.md warns of: inside, Flower asks nobody who he is. Should this fail one day, the warning can go
    inside = federation.run(federation.server / "register.sh", "nobody", stranger / "node.key.pub")
    assert "registered successfully" in inside.stdout
    home = federation.server / "flwr" / "config.toml"
    before = home.read_text()
    home.write_text(before.replace(f"127.0.0.1:{federation.port}", federation.outside))
    try:
        for command in (("register.sh", "nobody", stranger / "node.key.pub"), ("run.sh",)):
            refused = federation.run(federation.server / command[0], *command[1:], check=False)
            assert refused.returncode != 0
            assert "403" in refused.stdout + refused.stderr
    finally:
        home.write_text(before)


def test_what_dies_costs_a_round_at_most(federation: Deployed) -> None:
    """Four rounds: one whole; one in which a SuperNode is killed and started again, and another one's ClientApp dies; one
    in which the ServerApp is killed, and then the SuperLink; one more. At the end a run like any other."""
    run = federation.server / "run.sh"
    federation.run(run, "timeout=120", "wait=300")
    until("round 1", lambda: len(federation.rows()) > 1)
    until("round 2", lambda: _working(federation, SITES[2], 2))
    federation.kill(part=SITES[2])
    until("round 2 elsewhere", lambda: _working(federation, SITES[1], 2))
    federation.kill("flwr-clientapp", part=SITES[1])
    until("round 2", lambda: len(federation.rows()) > 2)
    until("round 3", lambda: _working(federation, SITES[0], 3))
    federation.kill("flwr-serverapp", part="superlink")
    assert [row["round"] for row in federation.rows()] == [0, 1, 2]
    federation.kill(part="superlink")
    federation.superlink()
    until("city is back", lambda: _let_in(federation, SITES[2]))
    federation.run(run, "timeout=120", "wait=300")
    until("the end", lambda: run_dir.read_summary(federation.server / "run"))
    assert [row["round"] for row in federation.rows()] == [0, 1, 2, 3, 4]
    assert verify(federation.server / "run" / run_dir.LEDGER).ok
    summary = run_dir.read_summary(federation.server / "run")
    assert summary is not None
    names = summary["names"]
    assert sorted(names.values()) == sorted(name.title() for name in SITES)
    everybody = set(names.values())
    by_round = {entry["round"]: entry for entry in federation.entries()}
    assert sorted(by_round) == [1, 2, 3, 4]
    assert present(by_round[1], names) == present(by_round[4], names) == everybody
    assert present(by_round[2], names) == {SITES[0].title()}
    sentences = {names[c["participant"]]: c["sentence"] for c in by_round[2]["contributions"]}
    assert "ClientApp stopped responding" in sentences[SITES[1].title()]
    assert "Node Unavailable" in sentences[SITES[2].title()]
    told = federation.run(sys.executable, "-m", "assay", "ledger", "verify", federation.server / "run")
    assert told.stdout.startswith("ok")
    until("the report", (federation.server / "run" / run_dir.REPORT).exists)


def _let_in(made: Deployed, name: str) -> bool:
    """Start it until it stays: Flower refuses a node that was killed as long as it takes it to be there, about a minute."""
    if made.started[name].poll() is not None:
        start(made, name)
    return made.said(name).count("SuperNode ID:") == 2


def _working(made: Deployed, name: str, round: int) -> bool:
    """Whether the ClientApp of a node works on a round: a process of its own for each."""
    said = made.said(name)
    begun = said.count("Start `flwr-clientapp` process") >= said.count("Receiving: train message")
    return f"ROUND {round}]" in said and begun and bool(made.processes("flwr-clientapp", name))


def test_80_megabytes_go_through(federation: Deployed) -> None:
    """An adapter of 80 MB to each node and back, in one round."""
    folder = federation.folder / "big"
    folder.mkdir()
    less = {"rounds = 6": "rounds = 1\nlr = 1e-4", "steps = 2": "steps = 1", 'level = "submitted"': 'level = "none"'}
    text = (federation.folder / "as-written.toml").read_text()
    (folder / "experiment.toml").write_text(written(text, less) + BIG)
    settings = f'experiment="{folder}/experiment.toml" out="{folder}/run" wait=300 timeout=300'
    federation.run("flwr", "run", "app", "assay", "--run-config", settings)
    summary = until("the end", lambda: run_dir.read_summary(folder / "run"))
    assert summary["participants"].keys() == summary["names"].keys()
    assert len(summary["names"]) == len(SITES)
    assert summary["outcomes"] == {"applied": 1}
    lines = map(json.loads, (folder / "run" / run_dir.LEDGER).read_text().splitlines())
    [body] = [entry["body"] for entry in lines if entry["kind"] == "round"]
    assert [c["reason"] for c in body["contributions"]] == ["ok"] * len(SITES)
    sizes = [path.stat().st_size for path in (folder / "run" / "updates").iterdir()]
    assert sum(size >= 80e6 for size in sizes) >= len(SITES)
    assert verify(folder / "run" / run_dir.LEDGER).ok
