"""The files of a deployment on Flower: its app folder, an experiment, and the commands in order, as scripts to read.

    app/      the Flower app, which Flower sends to every node: nothing secret
    server/   for the server's operator alone: experiment, certificates, SuperLink, registration, run
    node/     what every node gets a copy of: its key, its SuperNode

The templates lie in `deployment/`: what all have, what all have whose nodes sign, and what is one kind's own. No key is made here: private keys are made where they stay, by the scripts, with
`openssl` and `ssh-keygen`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from assay.config import ConfigError, parse_any

TEMPLATES = Path(__file__).parent / "deployment"
PLACE = re.compile(r"@([A-Z]+)@")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
PROMPTS = 4  # of a swarm's round, for each node
PARTS = {"federated": ("both", "federated"), "swarm": ("both", "signed", "swarm"), "trl": ("both", "signed", "trl")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is to be deployed. `address`: host:port under which nodes reach the server. ConfigError for what cannot be."""

    wing: Literal["federated", "swarm", "trl"] = "federated"
    nodes: int = 10
    address: str = "127.0.0.1:9092"
    model: str = "smollm2-135m"
    name: str = "deployment"

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError(f"--nodes {self.nodes}: a deployment has at least 2")
        host, colon, port = self.address.rpartition(":")
        if not colon or not HOST.fullmatch(host) or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"--address {self.address!r}: give host:port, for example fl.example.org:9092")

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def values(self, directory: Path) -> dict[str, str]:
        """What stands in the templates' places; every call draws new secrets."""
        names = dict.fromkeys(("IP:127.0.0.1", "DNS:localhost", f"{_kind(self.host)}:{self.host}"))
        return {
            "AUTHORITY": json.dumps(str(directory.resolve() / "server" / "ca.crt")),
            "NAME": self.name,
            "NODES": str(self.nodes),
            "LAST": str(self.nodes - 1),
            "ADDRESS": self.address,
            "HOST": self.host,
            "PORT": str(self.port),
            "NAMES": ",".join(names),
            "MODEL": self.model,
            "PROMPTS": str(PROMPTS * self.nodes),
            "RUN": secrets.token_hex(16),
            "SEED": _secret(),
            "CANARY": _secret(),
            "EVIDENCE": _secret(),
        }


def write(directory: Path, deployment: Deployment) -> list[Path]:
    """Write the folder; the files written. ConfigError where there is something already: nothing is overwritten."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: is there already; choose another directory, nothing is overwritten")
    values = deployment.values(directory)

    def filled(path: Path) -> str:
        return PLACE.sub(lambda found: values[found[1]], path.read_text(encoding="utf-8"))

    values["PROXY"] = filled(TEMPLATES / "proxy.md").rstrip()
    files = {
        path.relative_to(TEMPLATES / part): filled(path)
        for part in PARTS[deployment.wing]
        for path in sorted((TEMPLATES / part).rglob("*"))
        if path.is_file()
    }
    experiment = Path("server/experiment.toml")
    if experiment in files:
        _check(files[experiment])
    for name in ("experiment.toml", "mail.toml"):  # what nodes must hold as well
        if deployment.wing != "federated" and Path("server", name) in files:
            files[Path("node", name)] = files[Path("server", name)]
    (directory / "server").mkdir(parents=True, mode=0o700)
    for relative, text in sorted(files.items()):
        path = directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = 0o755 if path.suffix == ".sh" else 0o600 if relative == experiment else 0o644
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
    return sorted(directory / relative for relative in files)


def _check(experiment: str) -> None:
    """That what is written will load: names come from the command line."""
    try:
        parse_any(tomllib.loads(experiment))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--name and --model must be plain words: {error}") from None


def _kind(host: str) -> str:
    """How a certificate names a host: by address or by name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "DNS"
    return "IP"


def _secret() -> str:
    """A number nobody can guess, that TOML can hold."""
    return str(secrets.randbits(62))
