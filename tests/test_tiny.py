"""The shipped artefacts: small, loadable offline, and what their README says they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from assay import data, models
from assay.config import LoraSettings
from assay.federated.compute import answers
from assay.federated.lora import Carrier

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def carrier() -> Carrier:
    return Carrier(models.load("tiny", "float32"), LoraSettings())


def test_tiny_is_tiny_and_all_shipped_weights_stay_under_six_megabytes(carrier: Carrier) -> None:
    parameters = sum(p.numel() for n, p in carrier.model.named_parameters() if "lora_" not in n)
    assert 0.7e6 <= parameters <= 1.5e6
    assert sum(f.stat().st_size for f in models.ASSETS.rglob("*") if f.is_file()) < 6e6


def test_every_format_survives_the_tokenizer(carrier: Carrier) -> None:
    tokenizer = carrier.base.tokenizer
    for text in ("<think>3 + 4 = 7</think><answer>7</answer>", "<code>\nx = 3 * 4\nprint(x)\n</code>", "naïve – 12 €"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id is not None


def test_tiny_knows_the_sums_it_was_taught(carrier: Carrier) -> None:
    rows = [r for r in data.part(data.load("helpful"), "operator") if r.style == "arithmetic"][:40]
    made = answers(carrier, carrier.initial(), [r.instruction for r in rows], "chatml", 24)
    assert sum(m == r.response for m, r in zip(made, rows)) >= 20
    assert made == answers(carrier, carrier.initial(), [r.instruction for r in rows], "chatml", 24)


def test_the_shipped_warm_up_is_the_one_the_recipe_asks_for() -> None:
    """A change of data, recipe or settings makes every user train for minutes: this says so before it lands."""
    import json

    from assay.config import Experiment
    from assay.federated.population import load_sources
    from assay.federated.preparation import warmup_settings
    from assay.federated.warmup import cache_key, rows_for

    experiment = Experiment()
    sources, settings = load_sources(experiment), warmup_settings(experiment)
    rows = rows_for(sources.benign, sources.refusals, settings)
    shipped = list(models.ASSETS.glob("warmup-smollm2-135m-*.safetensors"))
    assert len(shipped) == 1
    note = json.loads((models.ASSETS / "warmup.json").read_text())
    assert note["rows_sha256"] == data.fingerprint(rows), "run python scripts/make_warmup.py"
    if models.is_cached(models.DEFAULT):
        key = cache_key(models.resolve(models.DEFAULT), rows, experiment.model.template, settings)
        assert shipped[0].stem.endswith(key[:16])


@pytest.mark.slow
def test_the_script_still_makes_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--out", str(tmp_path / "t"), "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert models.load(str(tmp_path / "t"), "float32").model.num_parameters() > 0.7e6
