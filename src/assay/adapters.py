"""Where adapters lie: folders, folders of folders, repositories of the Hugging Face hub.

A path that exists is a path; `hub:owner/name` (or `owner/name` where no such path exists, as in Transformers) is a
repository, of which the two files of an adapter are fetched and nothing else. With HF_HUB_OFFLINE=1 only what lies in
the hub's cache is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.config import ConfigError
from assay.contribution import Refusal
from assay.wire.peft import CONFIG, DEFAULT_FOLDER_LIMITS, PICKLES, WEIGHTS, Adapter, FolderLimits, read_folder

HUB = "hub:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that should hold one adapter, the name it is shown by, and the folder that its links may not leave."""

    name: str
    folder: Path
    root: Path


def places(given: Sequence[str | Path]) -> list[Place]:
    """Every adapter that the paths name, in their order. ConfigError for a path that is not there, or named twice.

    A folder without files of an adapter is a folder of many: each folder in it (hidden ones aside) is one of them,
    whatever it holds, so that none is passed over in silence.
    """
    out: list[Place] = []
    for one in given:
        text = str(one)
        path = Path(text).expanduser()
        if text.startswith(HUB) or (not path.exists() and REPOSITORY.fullmatch(text) and text[0] not in "./~"):
            out.append(_fetched(text.removeprefix(HUB)))
        elif not path.exists():
            raise ConfigError(
                f"{text}: no such folder; give a folder with {WEIGHTS}, a folder of many, or hub:owner/name"
            )
        elif path.is_dir() and not _is_adapter(path):
            found = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
            if not found:
                raise ConfigError(f"{text}: neither an adapter ({CONFIG}, {WEIGHTS}) nor a folder of adapters")
            # a link in a folder of many must stay within it: else one adapter would be judged under another's name
            out += [
                Place(str(Path(text) / p.name), p, p.parent / p.name if not p.is_symlink() else path) for p in found
            ]
        else:
            out.append(Place(text.rstrip("/") or text, path, path))
    names = [place.name for place in out]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]}: named twice; name every adapter once")
    if not out:
        raise ConfigError("no adapter is named; give folders with adapter_config.json and adapter_model.safetensors")
    return out


def read_all(found: Sequence[Place], limits: FolderLimits = DEFAULT_FOLDER_LIMITS) -> list[Adapter | Refusal]:
    """What lies at each place: all of it in memory, so a folder may hold what the machine can."""
    return [read_folder(place.folder, place.name, root=place.root, limits=limits) for place in found]


def _is_adapter(path: Path) -> bool:
    """Whether the folder itself claims to be one adapter; by names alone."""
    names = [entry.name for entry in path.iterdir()]
    return CONFIG in names or any(n.startswith("adapter_model.") or n.endswith(PICKLES) for n in names)


def _fetched(repository: str) -> Place:
    """The hub's two files in its cache, whose files are links into the repository's own blobs."""
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{HUB}{repository}: is no repository; write hub:owner/name or hub:owner/name@revision")
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen types; all become one line
        raise ConfigError(
            f"{HUB}{repository}: not in the local hub cache and cannot be fetched ({type(error).__name__})"
        ) from None
    return Place(HUB + repository, folder, folder.parent.parent)  # .../models--owner--name/snapshots/<commit>
