from __future__ import annotations

from pathlib import Path

import pytest

from assay import config
from assay.config import ConfigError, Experiment


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense = 1", "nonsense: unknown key; known here: name, seed"),
        ("[training]\nround = 3", "training.round: unknown key; known here: rounds"),
        ("[training]\nrounds = 0", "training.rounds: Input should be greater than or equal to 1 (got 0)"),
        ("[training]\nlr = nan", "training.lr: Input should be"),
        ("[training]\nlr = -1", "training.lr: Input should be greater than 0"),
        ("[clients]\nmalicious = 1.5", "clients.malicious: Input should be less than or equal to 1"),
        ("[clients]\ntotal = 3\nsampled = 4", "clients: sampled = 4 is more than total = 3"),
        ("[clients]\nexamples = 3", "experiment: clients.examples = 3 is less than one batch of 8"),
        ("[defence]\nlevel = 'magic'", "defence.level: Input should be 'none', 'submitted', 'step'"),
        ("[defence]\nnorm_refuse = 1.1", "experiment: defence.norm_refuse must not be below"),
        ("[defence.canary]\nprompts = 3", "defence.canary.prompts: unknown key; known here: refusals, safe"),
        ("seed = 'one'", "seed: Input should be a valid integer"),
        ("seed =", "not valid TOML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; give the path"):
        config.load(tmp_path / "absent.toml")


def test_name_and_data_root_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my-run.toml"
    path.write_text("[data]\nroot = 'rows'")
    loaded = config.load(path)
    assert loaded.name == "my-run"
    assert loaded.data.root == str(tmp_path / "rows")
    assert config.load(path, data_root=tmp_path / "else").data.root == str(tmp_path / "else")


def test_changed_is_checked_and_leaves_the_original() -> None:
    base = Experiment()
    assert base.changed(defence__level="step").defence.level == "step"
    assert base.defence.level == "submitted"
    with pytest.raises(ConfigError, match=r"training\.rounds"):
        base.changed(training__rounds=0)
    with pytest.raises(ConfigError, match="unknown key"):
        base.changed(training__ruonds=3)


def test_malicious_count_is_the_rounded_share() -> None:
    assert Experiment().changed(clients__malicious=0.2).clients.malicious_count == 2
    assert Experiment().changed(clients__malicious=0.0).clients.malicious_count == 0
