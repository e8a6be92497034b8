"""Remake the shipped warm-up adapter of a base model: python scripts/make_warmup.py [--model smollm2-135m].

Trains the safety warm-up of federated/warmup.py on the built-in data and writes it to src/assay/assets in bfloat16,
named after model and cache key, so that an adapter which no longer fits its recipe is simply not found.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from assay import data, models
from assay.checkpoint import write_json
from assay.config import parse
from assay.federated.population import load_sources
from assay.federated.warmup import cache_key, make, rows_for, settings_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--out", type=Path, default=models.ASSETS)
    args = parser.parse_args()
    experiment = parse({"model": {"name": args.model}})
    sources, settings = load_sources(experiment), settings_of(experiment)
    rows = rows_for(sources.benign, sources.refusals, settings)
    key = cache_key(models.resolve(args.model, print), rows, experiment.model.template, settings)
    started = time.perf_counter()
    adapter = make(models.load(args.model, say=print), rows, experiment.model.template, settings)
    tensors = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in adapter.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob(f"warmup-{Path(args.model).name}-*.safetensors"):
        old.unlink()
    path = args.out / f"warmup-{Path(args.model).name}-{key[:16]}.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)
    note = {
        "model": args.model,
        "key": key,
        "rows_sha256": data.fingerprint(rows),
        "command": "python scripts/make_warmup.py",
    }
    write_json(args.out / "warmup.json", note)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
