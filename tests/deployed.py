"""A deployment of real Flower processes on loopback, by the files that `assay deploy init` writes.

Every process inherits a mark in its environment, by which the fixture finds and ends those it started and no others.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assay import run_dir
from assay.engines.flower.deploying import Deployment, write

MARK, PART = "ASSAY_TEST_DEPLOYMENT", "ASSAY_TEST_PART"
PATIENCE = 420.0
"""Seconds anything may take here on a busy machine; nothing is measured by it."""


def _end_with_parent() -> None:
    """Also where the tests themselves are killed; what Flower's processes have started watches for its parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(what: str, holds: Callable[[], Any]) -> Any:
    """What `holds` returns, once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {PATIENCE:g} s for: {what}"
        time.sleep(0.2)
    return found


class Deployed:
    """One deployment: its folder, its processes by the part they play, and what each has written."""

    def __init__(self, folder: Path, wing: str, sites: int) -> None:
        self.folder, self.mark, self.port = folder / "a deployment", uuid.uuid4().hex, free_port()
        self.outside = f"127.0.0.1:{free_port()}"  # where the proxy listens: all that nodes can reach
        self.server = self.folder / "server"
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        write(self.folder, Deployment(wing=wing, nodes=sites, model="tiny", address=f"127.0.0.1:{self.port}"))  # type: ignore[arg-type]
        self.run(self.server / "certificates.sh")

    def environment(self, part: str) -> dict[str, str]:
        scripts = str(Path(sys.executable).parent)
        more = {"PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", MARK: self.mark, PART: part}
        more |= {"FLWR_HOME": str(self.server / "flwr"), "SUPERLINK": self.outside}  # scripts set their own
        return {**os.environ, **more, "PORT": str(self.port if part == "superlink" else free_port())}

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        return subprocess.run(
            [str(c) for c in command], env=self.environment("command"), cwd=self.folder, capture_output=True, text=True,
            timeout=PATIENCE, check=check,
        )  # fmt: skip

    def start(self, part: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """A process that stays; what it says is added to PART.log."""
        with (self.folder / f"{part}.log").open("ab") as log:
            self.started[part] = subprocess.Popen(
                [str(c) for c in command], env=self.environment(part), cwd=self.folder, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        return self.started[part]

    def said(self, part: str) -> str:
        path = self.folder / f"{part}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def superlink(self) -> None:
        self.start("superlink", self.server / "superlink.sh")
        until("the SuperLink listens", lambda: _listens(self.port))

    def proxy(self) -> None:
        script = Path(__file__).with_name("fleet_proxy.py")
        self.start("proxy", sys.executable, script, self.outside, f"127.0.0.1:{self.port}", self.server)
        until("the proxy listens", lambda: _listens(int(self.outside.rpartition(":")[2])))

    def site(self, name: str) -> Path:
        """A copy of node/ with a key of its own."""
        folder = self.folder / name
        shutil.copytree(self.folder / "node", folder)
        return folder

    def admit(self, nodes: list[str]) -> dict[str, Path]:
        """Nodes that sign: each with its keys, registered, and everybody's lines with everybody."""
        sites = {node: self.site(node) for node in nodes}
        for node, folder in sites.items():
            self.run(folder / "key.sh", node)
            self.run(self.server / "register.sh", node, folder / "node.key.pub")
        lines = "".join(["[nodes]\n", *((folder / "node.line").read_text() for folder in sites.values())])
        for folder in (self.server, *sites.values()):
            (folder / "keys.toml").write_text(lines)
        return sites

    def processes(self, program: str = "", part: str = "") -> list[int]:
        """Running processes of this deployment, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
                if f"{MARK}={self.mark}".encode() not in environment or f"{PART}={part}".encode() not in environment:
                    continue
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                if state[0] not in "ZX" and program.encode() in (entry / "cmdline").read_bytes():
                    found.append((int(state[19]), int(entry.name)))
            except OSError:  # it has ended meanwhile
                continue
        return [pid for _, pid in sorted(found)]

    def kill(self, program: str = "", part: str = "") -> None:
        """SIGKILL, and wait until they are gone."""
        while found := self.processes(program, part):
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for process in self.started.values():
                process.poll()
            time.sleep(0.1)

    def rows(self) -> list[dict[str, Any]]:
        return run_dir.read_metrics(self.server / "run")

    def entries(self, kind: str = "round") -> list[dict[str, Any]]:
        lines = (self.server / "run" / run_dir.LEDGER).read_text().splitlines()
        return [entry["body"] for entry in map(json.loads, lines) if entry["kind"] == kind]


@contextmanager
def deployed(folder: Path, wing: str, sites: int) -> Iterator[Deployed]:
    made = Deployed(folder, wing, sites)
    try:
        yield made
    finally:
        made.kill()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1.0)
        return tried.connect_ex(("127.0.0.1", port)) == 0
