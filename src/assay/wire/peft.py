"""A folder in PEFT's format -> a LoRA adapter as it acts, or a `Refusal`: the door for adapters that lie on a disk.

Two files are read: `adapter_config.json`, of which a rank, a scale and a list of things that must be off are taken, and
`adapter_model.safetensors`. Nothing in the folder is loaded by PEFT or by torch, no name in it reaches a regular
expression, and a pickle is refused by its name alone. What the folder says of itself (its base model, its targets) is
a claim: names and shapes are those of the tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Refusal, Tensors, tensors_sha256
from assay.verdict import Reason
from assay.wire.envelope import Header, WireError, json_object, malformed, show
from assay.wire.lora import decode_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_][A-Za-z0-9_.]{0,250})\.lora_([AB])\.weight")
HARMLESS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora",
     "target_modules", "bias", "init_lora_weights", "inference_mode", "peft_version", "auto_mapping", "megatron_core",
     "qalora_group_size"}
)  # fmt: skip
"""Keys of a LoraConfig that are checked below or change nothing in how a loaded adapter acts. Every other key must be
off: DoRA, rank patterns, layer lists and whatever a later version brings add to the pairs of matrices or switch some
of them off, and what is judged must be what acts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLimits:
    """What one folder may cost. Defaults hold a rank-64 adapter on every linear layer of an 8B model in float32."""

    config_bytes: int = 1 << 20
    weights_bytes: int = 1 << 30
    header_bytes: int = 4 << 20
    max_rank: int = 1024
    max_abs_value: float = 1e4
    """As `wire.Limits.max_abs_value`; also of lora_B times its scale."""


DEFAULT_FOLDER_LIMITS = FolderLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter as it acts: float32 pairs under PEFT's names, its scale (alpha / r) multiplied into lora_B.

    The change of a layer is lora_B @ lora_A, whatever its training called alpha. `sha256` is of these tensors,
    `file_sha256` that of the safetensors file (what `sha256sum` says). `claimed_base` is what the config says.
    """

    name: str
    tensors: Tensors
    rank: int
    sha256: str
    file_sha256: str
    claimed_base: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the layers it changes, sorted."""
        return modules_of(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes: what adapters must have in common to be compared."""
        return {name: tuple(value.shape) for name, value in sorted(self.tensors.items())}


def modules_of(tensors: Tensors) -> tuple[str, ...]:
    """Full names of adapted layers, sorted.

    >>> modules_of({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((1, 2))})
    ('model.layers.0.self_attn.q_proj',)
    """
    return tuple(sorted({found[1] for name in tensors if (found := NAME.fullmatch(name))}))


def read_folder(
    folder: Path, name: str, *, root: Path | None = None, limits: FolderLimits = DEFAULT_FOLDER_LIMITS
) -> Adapter | Refusal:
    """The adapter in `folder`, called `name`, or why not. Never raises for what lies there.

    Files may be links within `root` (default: the folder itself), as in the hub's cache; a link out of it is refused.
    """
    try:
        return _read(folder, name, Path(os.path.realpath(root or folder)), limits)
    except WireError as error:
        reason, sentence = error.reason, str(error)
    except OSError as error:
        reason, sentence = Reason.MALFORMED, f"cannot be read: {error.strerror or type(error).__name__}"
    except Exception as error:  # noqa: BLE001 - one folder must not end the screening of the others; no test gets here
        reason, sentence = Reason.MALFORMED, f"internal error while reading: {type(error).__name__}: {error}"
    return Refusal(name, _sha256_of(folder / WEIGHTS, limits), reason.value, sentence)


def _read(folder: Path, name: str, root: Path, limits: FolderLimits) -> Adapter:
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        raise malformed("is a link that leads out of the folder it lies in")
    if not folder.is_dir():
        if folder.suffix in PICKLES:
            raise _pickle(folder.name)
        raise malformed("is no folder; an adapter is a folder with adapter_config.json and adapter_model.safetensors")
    names = sorted(entry.name for entry in os.scandir(folder))
    # beside safetensors too: other tools take what they find, and this is the adapter's own name
    if found := [n for n in names if n.startswith("adapter_model.") and n.endswith(PICKLES)]:
        raise _pickle(found[0])
    for needed in (WEIGHTS, CONFIG):
        if needed not in names:
            raise WireError(Reason.MISSING, f"holds no {needed}")
    config = json_object(memoryview(_file(folder / CONFIG, root, limits.config_bytes)), CONFIG)
    rank, scale = _checked(config, limits)
    raw = _file(folder / WEIGHTS, root, limits.weights_bytes)
    tensors = dict(decode_tensors(raw, _shapes(raw, rank, limits), max_abs_value=limits.max_abs_value, what=WEIGHTS))
    _check_targets(config, tensors)
    for at in [n for n in tensors if ".lora_B." in n]:
        scaled: NDArray[np.float32] = tensors[at] * np.float32(scale)
        if scaled.size and float(np.abs(scaled).max()) > limits.max_abs_value:
            raise WireError(Reason.OUT_OF_RANGE, f"{at!r} times its scale {scale:g} is above {limits.max_abs_value:g}")
        scaled.flags.writeable = False
        tensors[at] = scaled
    base = config.get("base_model_name_or_path")
    return Adapter(
        name=name,
        tensors=tensors,
        rank=rank,
        sha256=tensors_sha256(tensors),
        file_sha256=hashlib.sha256(raw).hexdigest(),
        claimed_base=show(base, 120).strip("'\"") if isinstance(base, str) else "",
    )


def _pickle(name: str) -> WireError:
    told = f"{show(name)} is a pickle, which runs code when it is loaded; it was not opened. Save the adapter as safetensors"
    return WireError(Reason.PICKLE, told)


def _checked(config: Header, limits: FolderLimits) -> tuple[int, float]:
    """Rank and scale of a config that says plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise WireError(Reason.STRUCTURE, f"peft_type is {show(config.get('peft_type'))}, only LORA can be judged")
    for key, value in config.items():
        # `is`: 0 is a layer number to layers_to_transform
        if key not in HARMLESS and not (value is None or value is False or value == [] or value == {}):
            raise WireError(
                Reason.STRUCTURE, f"{show(key)} is set: only plain pairs of lora_A and lora_B can be judged"
            )
    if config.get("bias", "none") != "none":
        raise WireError(Reason.STRUCTURE, f"bias is {show(config['bias'])}: biases cannot be judged")
    if config.get("init_lora_weights", True) not in (True, "gaussian"):
        # PiSSA, OLoRA, LoftQ and their kin change the base; False makes up what the file lacks
        told = f"init_lora_weights is {show(config['init_lora_weights'])}: the adapter acts on a base that was changed"
        raise WireError(Reason.STRUCTURE, told + "; convert it to a plain one when saving")
    rank, alpha, rooted = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= limits.max_rank:
        raise WireError(Reason.STRUCTURE, f"r is {show(rank)}, expected 1 to {limits.max_rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= limits.max_abs_value * rank:
        raise WireError(Reason.STRUCTURE, f"lora_alpha is {show(alpha)}, expected a positive number of ordinary size")
    if type(rooted) is not bool:
        raise WireError(Reason.STRUCTURE, f"use_rslora is {show(rooted)}, expected true or false")
    return rank, float(alpha) / (math.sqrt(rank) if rooted else rank)


def _check_targets(config: Header, tensors: Tensors) -> None:
    """Every layer of the file must be one that a loader adapts: others would be judged and then not act."""
    targets = config.get("target_modules")
    if not (isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets)):
        told = f"target_modules is {show(targets)}: list the layers' names; patterns of strangers are not tried"
        raise WireError(Reason.STRUCTURE, told)
    known = frozenset(targets)
    for module in modules_of(tensors):
        parts = module.split(".")  # PEFT's rule: the whole name, or its end after a dot
        if not any(".".join(parts[at:]) in known for at in range(len(parts))):
            raise WireError(Reason.STRUCTURE, f"target_modules does not name {module}, for which the file has tensors")


def _shapes(raw: bytes, rank: int, limits: FolderLimits) -> dict[str, tuple[int, ...]]:
    """Names and shapes the file says it holds: whole pairs of the config's rank, no larger than the file."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise malformed(f"{WEIGHTS}: header is said to have {show(length)} bytes, the file has {len(raw)}")
    if length > limits.header_bytes:
        raise WireError(Reason.TOO_LARGE, f"{WEIGHTS}: header has {length} bytes, limit {limits.header_bytes}")
    header = json_object(memoryview(raw)[8 : 8 + length], f"{WEIGHTS}: header")
    out: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        found = NAME.fullmatch(name)
        if found is None:
            raise WireError(Reason.WRONG_KEYS, f"{WEIGHTS}: {show(name)} is no lora_A or lora_B of a linear layer")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)):
            raise WireError(Reason.WRONG_SHAPE, f"{WEIGHTS}: {show(name)} has no shape of two positive sides")
        if shape[0 if found[2] == "A" else 1] != rank:
            told = f"{WEIGHTS}: {show(name)} has shape {shape}, the config says rank {rank}"
            raise WireError(Reason.WRONG_SHAPE, told)
        out[name] = (shape[0], shape[1])
    if not out:
        raise WireError(Reason.WRONG_KEYS, f"{WEIGHTS}: holds no tensor")
    lone = [n for n in out if _other(n) not in out]
    if lone:
        raise WireError(Reason.WRONG_KEYS, f"{WEIGHTS}: {show(lone[0])} stands alone; lora_A and lora_B come in pairs")
    return out


def _other(name: str) -> str:
    """The name of the other half of a pair."""
    kind = ".lora_A.weight"
    return (
        name.removesuffix(kind) + ".lora_B.weight"
        if name.endswith(kind)
        else name.removesuffix(".lora_B.weight") + kind
    )


def _file(path: Path, root: Path, limit: int) -> bytes:
    """Bytes of an ordinary file within `root`, none read beyond the limit."""
    real = Path(os.path.realpath(path, strict=True))  # of a loop of links, Path.resolve raises a RuntimeError
    if not real.is_relative_to(root):
        raise malformed(f"{path.name} is a link that leads out of the folder")
    # non-blocking: a named pipe would else be waited on for ever
    handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as file:
        known = os.fstat(handle)
        if not stat.S_ISREG(known.st_mode):
            raise malformed(f"{path.name} is no ordinary file")
        if known.st_size > limit:
            raise WireError(Reason.TOO_LARGE, f"{path.name} has {known.st_size} bytes, limit {limit}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise WireError(Reason.TOO_LARGE, f"{path.name} grew beyond {limit} bytes while it was read")
    return data


def _sha256_of(path: Path, limits: FolderLimits) -> str:
    """Of a refused folder's weights, where they can be read; else of no bytes."""
    try:
        raw = _file(path, Path(os.path.realpath(path.parent)), limits.weights_bytes)
    except (WireError, OSError):
        raw = b""
    return hashlib.sha256(raw).hexdigest()


def differs(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], whose: str) -> str:
    """How an adapter's layout differs from the expected one, in a sentence; "" if it does not.

    >>> differs({"base_model.model.x.lora_A.weight": (4, 8)}, {"base_model.model.x.lora_A.weight": (8, 8)}, "the base's")
    "x.lora_A has shape (4, 8), the base's is (8, 8)"
    """
    for name in sorted(set(shapes) | set(expected)):
        short = name.removeprefix("base_model.model.").removesuffix(".weight")
        if name not in shapes:
            return f"has no {short}, {whose} has"
        if name not in expected:
            return f"has {short}, {whose} has not"
        if shapes[name] != expected[name]:
            return f"{short} has shape {shapes[name]}, {whose} is {expected[name]}"
    return ""
