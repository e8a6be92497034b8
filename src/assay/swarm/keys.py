"""Keys of a swarm's nodes: a private key a node, in a file of its own, and one file of public keys that all hold.

    # keys.toml
    [nodes]
    node-0 = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"

A name's key is what all nodes have written down beforehand; the relay has no say in it. The file's content is part of
what every node signs in round 1 (`genesis` in relayed.py), so that two nodes with different files find out.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from assay import checkpoint
from assay.config import ConfigError


def public_hex(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The 32 bytes of the public key in hex, as the key file has it."""
    return (key.public_key() if isinstance(key, Ed25519PrivateKey) else key).public_bytes_raw().hex()


def make_key(path: str | Path) -> str:
    """Write a new private key (PEM, PKCS 8, readable by its owner only); returns the public one in hex.

    The same as `openssl genpkey -algorithm ed25519`. ConfigError if the file is there: a key is never overwritten.
    """
    path, key = Path(path), Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: there is a key already; choose another file") from None
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
    return public_hex(key)


def read_key(path: str | Path) -> Ed25519PrivateKey:
    """A node's private key. ConfigError says what is wrong with the file."""
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: no private key in PEM without a password ({type(error).__name__})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is no ed25519 key; make one with openssl genpkey -algorithm ed25519")
    return key


def write_keys(path: str | Path, public: dict[str, str]) -> None:
    """The file of public keys (hex) by node."""
    lines = [f'"{node}" = "{public[node]}"' for node in sorted(public)]
    checkpoint.write_atomic(path, "\n".join(["[nodes]", *lines]) + "\n")


def read_keys(path: str | Path, nodes: Iterable[str] | None = None) -> dict[str, Ed25519PublicKey]:
    """The public keys of exactly these nodes, or of whomever the file names.

    ConfigError for another set of names, a key that is none or used twice.
    """
    try:
        found = tomllib.loads(Path(path).read_text()).get("nodes")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file of keys ({type(error).__name__})") from None
    named = sorted(found) if isinstance(found, dict) else []
    if nodes is not None and named != (wanted := sorted(nodes)):
        raise ConfigError(f"{path}: [nodes] must name exactly {', '.join(wanted)}")
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}: [nodes] names nobody")
    if len(set(map(str, found.values()))) < len(found):
        raise ConfigError(f"{path}: two nodes have the same key")
    out = {}
    for node, text in found.items():
        try:
            out[node] = Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: the key of {node} is not 64 hex digits") from None
    return out
