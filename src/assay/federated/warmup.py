"""The safety warm-up: small base models refuse next to nothing, so an attack on them would have nothing to break.

A LoRA over all linear layers is trained on refusals and helpful rows and merged. For the default model and the
built-in data the adapter is shipped (scripts/make_warmup.py remakes it); everything else is trained once and cached
under the hash of model, data, settings and this recipe's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from assay import data, models
from assay.config import Experiment, LoraSettings
from assay.contribution import Tensors
from assay.data import Example
from assay.federated.local_sft import LocalSettings, train
from assay.federated.lora import Carrier
from assay.federated.population import Sources
from assay.models import Base, Origin
from assay.progress import Silent, Tracker

Tick = Callable[[int], None]
STEP_UNITS = 3.0  # seconds of one core a step takes, roughly; the bar corrects itself
RECIPE = 1  # raise when the recipe changes: it is part of the cache key


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupSettings:
    """About one pass over 1,200 rows with linear decay, at a rank small enough to ship. With 500 benign rows and 60 steps
    the model refused a quarter of harmless dialogue as well."""

    refusals: int = 300
    benign: int = 900
    steps: int = 120
    batch_size: int = 12
    max_length: int = 64
    lr: float = 1e-3
    lr_final: float = 2e-4
    rank: int = 6
    alpha: float = 12.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Aligned:
    """Directory of the aligned base and where it came from."""

    path: Path
    origin: Origin
    key: str


def rows_for(benign: Sequence[Example], refusals: Sequence[Example], settings: WarmupSettings) -> list[Example]:
    """The rows of the warm-up, from the operator's part of each set: who aligns the model does so on what it has."""
    chosen = data.shuffled(data.part(benign, "operator"), settings.seed)[: settings.benign]
    chosen += data.shuffled(data.part(refusals, "operator"), settings.seed)[: settings.refusals]
    return data.shuffled(chosen, settings.seed)


def settings_of(experiment: Experiment) -> WarmupSettings:
    """`tiny` needs a higher rank and rate to learn it at all; longer rows are seen whole."""
    length = max(64, experiment.training.max_length)
    if experiment.model.name == "tiny":
        return WarmupSettings(steps=150, batch_size=16, max_length=length, lr=1e-2, lr_final=3e-4, rank=16, alpha=32.0)
    return WarmupSettings(max_length=length)


def unseen(experiment: Experiment, rows: Sequence[Example], sources: Sources) -> list[Example]:
    """The rows that the warm-up has not learnt by heart: all of them where there is no warm-up.

    On rows it knows the model's loss hardly moves and gradients are small, so what is rehearsed on them says little of
    clients, whose rows it has never seen.
    """
    if not experiment.model.align:
        return list(rows)
    own = sources.of_operator("benign"), sources.of_operator("refusals")
    known = {r.instruction for r in rows_for(*own, settings_of(experiment))}
    return [r for r in rows if r.instruction not in known]


def aligned(
    name: str,
    rows: Sequence[Example],
    template: str,
    settings: WarmupSettings | None = None,
    tracker: Tracker | None = None,
) -> Aligned:
    """The aligned form of model `name`, from the cache, the shipped adapter or a fresh warm-up."""
    settings, tracker = settings or WarmupSettings(), tracker or Silent()
    say = tracker.say
    key, target, shipped = places(name, models.resolve(name, say), rows, template, settings)
    if target.exists():
        return Aligned(target, "cached", key)
    if shipped.exists():
        say(f"aligning {name} with the shipped warm-up adapter (once)")
        adapter: Tensors = {n: t.float().numpy() for n, t in load_file(shipped).items()}
        origin: Origin = "shipped"
    else:
        say(f"aligning {name}: {settings.steps} warm-up steps (once, some minutes)")
        tracker.add(STEP_UNITS * settings.steps)
        base = models.load(name, say=say)
        adapter = make(base, rows, template, settings, lambda steps: tracker.tick(STEP_UNITS * steps))
        origin = "made"
    merge(models.load(name, "float32", say), adapter, settings, target)
    return Aligned(target, origin, key)


def places(
    name: str, plain: Path, rows: Sequence[Example], template: str, settings: WarmupSettings
) -> tuple[str, Path, Path]:
    """The warm-up's key, where the aligned model is cached, and where its adapter would be shipped."""
    key = cache_key(plain, rows, template, settings)
    stem = f"{Path(name).name}-{key[:16]}"
    return key, models.cache_dir() / "aligned" / stem, models.ASSETS / f"warmup-{stem}.safetensors"


def cache_key(plain: Path, rows: Sequence[Example], template: str, settings: WarmupSettings) -> str:
    what = {
        "recipe": RECIPE,
        "model": models.weights_sha256(plain),
        "data": data.fingerprint(rows),
        "template": template,
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def make(
    base: Base, rows: Sequence[Example], template: str, settings: WarmupSettings, tick: Tick = lambda steps: None
) -> Tensors:
    """Train the warm-up adapter; `tick(1)` after each step."""
    carrier = Carrier(base, _lora(settings))
    local = LocalSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        lr=settings.lr,
        lr_final=settings.lr_final,
        template=template,
        seed=settings.seed,
        keep_steps=False,
    )
    return train(carrier, carrier.initial(), rows, local, tick).tensors


def merge(base: Base, adapter: Tensors, settings: WarmupSettings, target: Path) -> None:
    """W + (alpha / r) B A for every adapted layer, saved as a model directory in bfloat16.

    The sum is taken in float64 and rounded to bfloat16: two machines get the same bytes, so the base's hash, which
    clients must match, does not depend on whose matmul rounded which way.
    """
    weights = dict(base.model.named_parameters())
    scale = settings.alpha / settings.rank
    with torch.no_grad():
        for name in sorted(n for n in adapter if "lora_A" in n):
            a, b = (np.asarray(adapter[n], np.float64) for n in (name, name.replace("lora_A", "lora_B")))
            weight = weights[name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")]
            weight += torch.from_numpy(scale * (b @ a)).to(weight.device)  # float64 sum, stored as float32
    with models.building(target) as work:
        models.save_model(base.model.to(torch.bfloat16), base.tokenizer, work)


def _lora(settings: WarmupSettings) -> LoraSettings:
    return LoraSettings(r=settings.rank, alpha=settings.alpha, targets=("all-linear",), seed=settings.seed)
