"""Three real GRPOTrainers by a real relay: SuperLink and SuperNodes with TLS, mailboxes, one node that plants a phrase."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from assay.ledger import verify
from deployed import deployed, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc"),
    pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="keys need both tools"),
]
NODES, ROUNDS, THIEF = ["node-0", "node-1", "node-2"], 2, "node-2"


def test_trainers_learn_from_each_other_by_a_relay(tmp_path: Path) -> None:
    """The steps of the folder's README.md."""
    with deployed(tmp_path, "trl", len(NODES)) as made:
        for folder in ("server", "node"):
            file = made.folder / folder / "mail.toml"
            text = file.read_text()
            assert "rounds = 20" in text
            file.write_text(text.replace("rounds = 20", f"rounds = {ROUNDS}"))
        made.superlink()
        made.proxy()
        sites = made.admit(NODES)
        for node, folder in sites.items():
            made.start(node, folder / "start.sh", node, "wait=200.0")
        script = Path(__file__).with_name("trl_relay_node.py")
        for node, folder in sites.items():
            more = ["thief"] if node == THIEF else []
            made.start(f"trainer-{node}", sys.executable, script, folder, node, str(ROUNDS), *more)
        made.run(made.server / "run.sh", "timeout=240", "poll=1.0")
        files = [folder / "told.json" for folder in sites.values()]

        def ended() -> bool:
            dead = [n for n in NODES if made.started[f"trainer-{n}"].poll()]
            assert not dead, made.said(f"trainer-{dead[0]}")[-2000:]
            return all(file.exists() and made.started[f"trainer-{file.parent.name}"].poll() == 0 for file in files)

        until("the trainers end", ended)
        told = {file.parent.name: json.loads(file.read_text()) for file in files}
        honest = [node for node in NODES if node != THIEF]
        assert len({told[node]["head"] for node in NODES}) == 1
        assert len({told[node]["weights"] for node in honest}) == 1
        for node in honest:
            assert told[node]["admitted"] == {"node-0": 1.0, "node-1": 1.0, THIEF: 0.0}
            assert verify(sites[node] / "run" / "ledger.jsonl").ok
