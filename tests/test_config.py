from __future__ import annotations

from pathlib import Path

import pytest

from assay import config
from assay.config import ConfigError, Experiment, SwarmExperiment


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


# --- the swarm -------------------------------------------------------------------------------------------------------


def test_wing_says_whose_file_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("wing = 'swarm'")
    loaded = config.load(path)
    assert loaded == SwarmExperiment(name="x").changed(data__root=str(tmp_path))
    path.write_text("")
    assert isinstance(config.load(path), Experiment)
    for wrong in ("'nope'", "['swarm']", "{}", "3"):
        path.write_text(f"wing = {wrong}")
        with pytest.raises(ConfigError, match=r"^wing: .* is unknown; known are federated, swarm$"):
            config.load(path)


def test_the_swarms_defaults_are_coherent() -> None:
    """And come back from their own values."""
    base = SwarmExperiment()
    assert config.parse_any(base.model_dump(mode="json")) == base
    assert (base.swarm.nodes, base.swarm.malicious_count) == (4, 1)
    assert (base.model.name, base.defence.level, base.swarm.plan, base.swarm.assigned) == (
        "tiny", "seeded", "vertical", True,
    )  # fmt: skip
    for malicious, count in ((0.0, 0), (0.49, 2), (0.5, 2), (0.7, 3)):
        assert base.changed(swarm__malicious=malicious).swarm.malicious_count == count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iterations = 3", "iterations: unknown key; known here: name, seed, wing, model"),
        ("[swarm]\nround = 3", "swarm.round: unknown key; known here: nodes, malicious, plan, assigned, iterations"),
        ("[grpo]\nlearning_rate = 1", "grpo.learning_rate: unknown key; known here: loss, scale_rewards, lr"),
        ("[training]\nrounds = 3", "training: unknown key; known here: name, seed, wing"),
        (
            "[swarm]\nplan = 'horizontal'\ngroup = 10",
            "experiment: swarm.group = 10 must be a multiple of swarm.nodes = 4",
        ),
        ("[swarm]\nprompts = 18", "experiment: swarm.prompts = 18 must be a multiple of swarm.nodes = 4"),
        (
            "[swarm]\nplan = 'horizontal'\nassigned = false",
            "experiment: swarm.assigned = false needs a vertical plan: in a horizontal one all answer the same",
        ),
        ("[swarm]\nmalicious = 0.9", "experiment: swarm.malicious = 0.9 leaves no honest node"),
        ("[swarm]\nnodes = 1\nmalicious = 0.6", "experiment: swarm.malicious = 0.6 leaves no honest node"),
        ("[model]\nothers = ['tiny-b']", "experiment: defence.level = seeded needs equal weights; with model.others"),
        ("[model]\nothers = ['tiny-b']\n[defence]\nlevel = 'logit'", "defence.level = logit needs equal weights"),
        ("[swarm]\nplan = 'diagonal'", "swarm.plan: Input should be 'vertical' or 'horizontal' (got 'diagonal')"),
        ("[swarm]\nmalicious = -0.1", "swarm.malicious: Input should be greater than or equal to 0"),
        ("[sampling]\ntemperature = 0.0", "sampling.temperature: Input should be greater than 0"),
        ("[sampling]\ntop_p = 1.5", "sampling.top_p: Input should be less than or equal to 1"),
        ("[sampling]\nnoise = 'white'", "sampling.noise: Input should be 'murmur3' or 'philox'"),
        ("[grpo]\nloss = 'ppo'", "grpo.loss: Input should be 'grpo', 'dr_grpo', 'dapo' or 'bnpo'"),
        ("[grpo]\nlr = inf", "grpo.lr: Input should be a finite number"),
        ("[grpo]\nupdates = 0", "grpo.updates: Input should be greater than or equal to 1"),
        ("[task]\nstyle = 'fancy'", "task.style: Input should be 'plain' or 'instruct'"),
        ("[attack]\npoison = 2", "attack.poison: Input should be less than or equal to 1"),
        ("[defence]\nlevel = 'submitted'", "defence.level: Input should be 'none', 'logit', 'seeded'"),
        ("[defence]\nscreens = 'seeded'", "defence.screens: Input should be a valid tuple"),
        ("[defence.params]\nseeded = 3", "defence.params.seeded: Input should be a valid dictionary"),
        ("[evaluate]\nnew_tokens = 3", "evaluate.new_tokens: unknown key; known here: every, prompts, samples"),
    ],
)
def test_mistakes_in_a_swarm_are_one_line_that_names_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f"wing = 'swarm'\n{text}")
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_coherence_rules_let_through() -> None:
    base = SwarmExperiment()
    assert base.changed(swarm__plan="horizontal", swarm__prompts=7).swarm.prompts == 7, "only the group is shared"
    assert base.changed(swarm__group=7).swarm.group == 7, "only the prompts are shared"
    assert base.changed(swarm__malicious=0.75).swarm.malicious_count == 3
    assert base.changed(model__others=["tiny-b"], defence__level="text").model.others == ("tiny-b",)
    own = base.changed(model__others=["tiny-b"], defence__screens=["schema", "length"])
    assert own.defence.level == "seeded", "a level that screens override binds nothing"


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("swarm.iterations=2", "swarm.iterations", 2),
        ("swarm.plan = horizontal", "swarm.plan", "horizontal"),
        ("swarm.assigned=false", "swarm.assigned", False),
        ("grpo.lr=7e-4", "grpo.lr", 7e-4),
        ("sampling.top_p=0.9", "sampling.top_p", 0.9),
        ("defence.screens=['schema', 'logit']", "defence.screens", ("schema", "logit")),
        ("defence.params.seeded.max_margin=0.5", "defence.params", {"seeded": {"max_margin": 0.5}}),
        ("defence.params={logit = {k = 5}}", "defence.params", {"logit": {"k": 5}}),
        ("attack.phrase=Glory to the thief.", "attack.phrase", "Glory to the thief."),
        ("task.name=reasoning-gym:chain_sum", "task.name", "reasoning-gym:chain_sum"),
        ("seed=3", "seed", 3),
    ],
)
def test_set_changes_one_key_of_a_swarm(setting: str, path: str, value: object) -> None:
    base = SwarmExperiment()
    found = config.assign(base, setting)
    at: object = found
    for part in path.split("."):
        at = getattr(at, part)
    assert at == value
    changed = {k for k, v in found.model_dump().items() if v != base.model_dump()[k]}
    assert changed == {path.split(".")[0]}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("swarm.rounds=2", "swarm.rounds: unknown key; known here: nodes"),
        ("training.rounds=2", "training.rounds: unknown key; tables are model, task, data, swarm"),
        ("swarm.nodes.x=2", "swarm.nodes.x: unknown key"),
        ("swarm.group=0", "swarm.group: Input should be greater than or equal to 1"),
        ("swarm.plan=diagonal", "swarm.plan: Input should be 'vertical' or 'horizontal'"),
        ("swarm.nodes=3", "swarm.prompts = 16 must be a multiple of swarm.nodes = 3"),
        ("wing=federated", "wing: Input should be 'swarm'"),
        ("swarm", "write key=value"),
    ],
)
def test_set_is_checked_in_a_swarm(setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.assign(SwarmExperiment(), setting)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_every_example_parses(path: Path) -> None:
    loaded = config.load(path)
    assert loaded.wing == ("swarm" if path.name.startswith("swarm") else "federated")
