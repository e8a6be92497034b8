"""The shipped artefacts stay small and still fit the recipe that would remake them."""

from __future__ import annotations

import json

from assay import data, models
from assay.config import Experiment
from assay.federated.population import load_sources
from assay.federated.warmup import cache_key, rows_for, settings_of


def test_all_shipped_weights_stay_under_six_megabytes() -> None:
    assert sum(f.stat().st_size for f in models.ASSETS.rglob("*") if f.is_file()) < 6e6


def test_the_shipped_warm_up_is_the_one_the_recipe_asks_for() -> None:
    """A change of data, recipe or settings makes every user train for minutes: this says so before it lands."""
    experiment = Experiment()
    sources, settings = load_sources(experiment), settings_of(experiment)
    rows = rows_for(sources.benign, sources.refusals, settings)
    shipped = list(models.ASSETS.glob("warmup-smollm2-135m-*.safetensors"))
    assert len(shipped) == 1
    note = json.loads((models.ASSETS / "warmup.json").read_text())
    assert note["rows_sha256"] == data.fingerprint(rows), "run python scripts/make_warmup.py"
    if models.is_cached(models.DEFAULT):
        key = cache_key(models.resolve(models.DEFAULT), rows, experiment.model.template, settings)
        assert shipped[0].stem.endswith(key[:16])
