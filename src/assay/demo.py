"""The experiments of `assay demo`: one small model, attacked and defended, four runs that differ in one thing each."""

from __future__ import annotations

from assay.config import Experiment, parse


def federated(seed: int = 0, model: str = "smollm2-135m") -> list[Experiment]:
    """Honest only, half malicious and undefended, defended by `submitted`, defended by the paper's step level."""
    base = parse({"seed": seed, "model": {"name": model}})
    return [
        base.changed(name="federated.honest_only", clients__malicious=0.0, defence__level="none"),
        base.changed(name="federated.undefended", defence__level="none"),
        base.changed(name="federated.submitted", defence__level="submitted"),
        base.changed(name="federated.step", defence__level="step"),
    ]
