"""What `assay deploy init` writes: it loads, nothing secret reaches a node, nothing is overwritten."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from assay import config
from assay.config import ConfigError
from assay.engines.flower.deploying import Deployment, write
from assay.engines.flower.federated_settings import Settings
from assay.engines.flower.swarm_relay import DEFAULTS
from assay.engines.relay import read_mail

WINGS = ("federated", "swarm", "trl")


def written(folder: Path, **more: object) -> Path:
    write(folder, Deployment(**{"nodes": 3, "model": "tiny", **more}))  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("wing", WINGS)
def test_flower_takes_the_app(wing: str, tmp_path: Path) -> None:
    """By Flower's own check, which also finds the apps; and every key of the run config is one that Assay reads."""
    app = written(tmp_path / "made", wing=wing) / "app"
    found, warnings = load_and_validate(app / "pyproject.toml")
    assert not warnings
    keys = set(found["tool"]["flwr"]["app"]["config"])
    assert (
        keys == {"folder", *DEFAULTS}
        if wing != "federated"
        else keys == {"experiment", "out", "timeout", "wait", "min-nodes"}
    )


def test_the_experiment_can_be_deployed_as_it_is(tmp_path: Path) -> None:
    made = written(tmp_path / "made", nodes=7)
    given = tomllib.loads((made / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings = Settings.of({**given, "experiment": str(made / "server/experiment.toml")})
    experiment = settings.experiment
    assert (experiment.clients.total, experiment.clients.malicious, experiment.model.name) == (7, 0.0, "tiny")
    assert (settings.timeout, settings.wait, settings.min_nodes) == (600, 600, 2)
    again = config.load(written(tmp_path / "again") / "server/experiment.toml")
    assert isinstance(again, config.Experiment)
    drawn = [(e.seed, e.defence.canary.seed, e.defence.evidence.seed) for e in (experiment, again)]
    assert len({*drawn[0], *drawn[1]}) == 6  # secrets of this deployment alone


def test_the_swarms_nodes_hold_the_relays_experiment(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, wing="swarm") for name in ("one", "other"))
    assert (one / "server/experiment.toml").read_bytes() == (one / "node/experiment.toml").read_bytes()
    names = []
    for made in (one, other):
        experiment = config.load(made / "node/experiment.toml")
        assert isinstance(experiment, config.SwarmExperiment)
        assert (experiment.swarm.nodes, experiment.swarm.malicious) == (3, 0.0)
        names.append(experiment.swarm.run)
    assert len(set(names)) == 2  # seeds come from it


def test_trainers_and_their_relay_hold_one_file(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, wing="trl") for name in ("one", "other"))
    assert (one / "server/mail.toml").read_bytes() == (one / "node/mail.toml").read_bytes()
    mails = [read_mail(made / "node/mail.toml") for made in (one, other)]
    assert len({mail.run for mail in mails}) == 2
    assert not (one / "server/experiment.toml").exists()


def test_no_secret_is_in_what_nodes_receive(tmp_path: Path) -> None:
    made = written(tmp_path / "made")
    experiment = config.load(made / "server/experiment.toml")
    assert isinstance(experiment, config.Experiment)
    secrets = [
        str(n).encode() for n in (experiment.seed, experiment.defence.canary.seed, experiment.defence.evidence.seed)
    ]
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(made / "app"))) as fab:
        assert set(fab.namelist()) == {"pyproject.toml", ".info/CONTENT"}
        told = [fab.read(name) for name in fab.namelist()]
    told += [path.read_bytes() for part in ("app", "node") for path in (made / part).rglob("*") if path.is_file()]
    told.append((made / "README.md").read_bytes())
    assert not [text for text in told for secret in secrets if secret in text]
    holding = {p for p in made.rglob("*") if p.is_file() and any(s in p.read_bytes() for s in secrets)}
    assert holding == {made / "server/experiment.toml"}


@pytest.mark.parametrize("wing", WINGS)
def test_private_keys_and_secrets_are_for_their_owner_alone(wing: str, tmp_path: Path) -> None:
    """The scripts make the keys; run here as written, whatever the user's umask is."""
    made = written(tmp_path / "made", wing=wing, address="fl.example.org:9092")
    node = made / "node"
    before = os.umask(0)
    try:
        run(made / "server/certificates.sh")
        run(node / "key.sh", *([] if wing == "federated" else ["node-1"]))
    finally:
        os.umask(before)
    private = [*made.rglob("server/experiment.toml"), *made.rglob("*.key"), *made.rglob("*.pem")]
    assert len(private) == {"federated": 4, "swarm": 5, "trl": 4}[wing]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE((made / "server").stat().st_mode) == 0o700
    said = run("openssl", "x509", "-in", made / "server/server.crt", "-noout", "-text")
    assert "DNS:fl.example.org" in said
    assert "IP Address:127.0.0.1" in said
    run("openssl", "verify", "-CAfile", node / "ca.crt", made / "server/server.crt")
    if wing != "federated":
        assert re.fullmatch(r'node-1 = "[0-9a-f]{64}"\n', (node / "node.line").read_text())
    for script, *more in ([made / "server/certificates.sh"], [node / "key.sh", "node-1"]):
        with pytest.raises(subprocess.CalledProcessError) as error:
            run(script, *more)
        assert "is there already" in error.value.stderr


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    made = written(tmp_path / "made")
    before = (made / "server/experiment.toml").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        write(made, Deployment())
    assert (made / "server/experiment.toml").read_bytes() == before
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"nodes": 1}, "at least 2"),
        ({"address": "somewhere"}, "give host:port"),
        ({"address": "a b:1"}, "give host:port"),
        ({"address": "a$(x):1"}, "give host:port"),
        ({"address": "host:99999"}, "give host:port"),
        ({"model": 'x"'}, "plain words"),
        ({"name": 'x"\nwing = "swarm"'}, "plain words"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(wrong: dict[str, object], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        written(tmp_path / "made", **wrong)
    assert not (tmp_path / "made").exists()


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from assay.cli import app

    told = CliRunner().invoke(
        app, ["deploy", "init", str(tmp_path / "made"), "--wing", "swarm", "--nodes", "5", "--json"]
    )
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert set(found["files"]) == {str(p) for p in (tmp_path / "made").rglob("*") if p.is_file()}
    assert "5 nodes" in (tmp_path / "made/README.md").read_text()
