from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from assay import config
from assay.bench import federated, swarm, table_runs, tables
from assay.bench.federated import ALL_LEVELS, grid, of_preset, suite, variants
from assay.bench.heatmap import heatmap
from assay.bench.presets import PRESETS
from assay.cli.bench import _only
from assay.config import ConfigError, Experiment, SwarmExperiment
from assay.federated.aggregators import AGGREGATORS
from assay.federated.attacks import ATTACKS
from assay.federated.defence import LEVELS
from assay.federated.population import make_attack
from assay.swarm import attacks, defence
from assay.swarm.exchange import make_plan

ROOT = Path(__file__).parents[1]


def test_variants_differ_from_the_base_in_one_thing_each() -> None:
    base = Experiment()
    runs = {e.name: e for e in variants(base, ALL_LEVELS)}
    assert list(runs) == [f"federated.{n}" for n in ("honest_only", "undefended", *ALL_LEVELS)]
    assert {e.defence.level for e in runs.values()} == set(LEVELS), "every level there is"
    for name, run in runs.items():
        changed = {k for k, v in run.model_dump().items() if v != base.model_dump()[k]} - {"name"}
        assert changed <= {"clients", "defence"}, name
    assert [e.seed for e in suite(base, ["step"], [3, 4])] == [3, 3, 3, 4, 4, 4]


def test_a_grid_crosses_attacks_shares_levels_and_seeds() -> None:
    made = grid(Experiment(), ["harmful_data", "strike+blend"], [0.0, 0.5], ["none", "submitted"], [0, 1])
    assert len({e.name for e in made}) == len(made) == 2 * (1 + 1 + 1 + 2 * 2)
    assert sum(e.clients.malicious == 0 for e in made) == 6, "honest only, what the level costs them, and half of them"
    assert [e.clients.total for e in made if "honest_alone" in e.name] == [5, 5]
    assert {(e.attack.name, e.defence.level) for e in made if e.clients.malicious} == {
        (a, d) for a in ("harmful_data", "strike+blend") for d in ("none", "submitted")
    }
    assert all("/" not in e.name and "%" not in e.name for e in made)


def test_a_level_meets_every_mitigation_and_the_rows_say_which() -> None:
    more = {"noise": {"finish__steps": ("noise",)}, "half the norm": {"defence__params": {"norm": {"clip": 0.5}}}}
    made = grid(Experiment(), ["backdoor"], [0.0, 0.3], ["none", "submitted"], [0, 1], more=more)
    assert len({e.name for e in made}) == len(made)
    found = {str(row_of(e)["defence"]) for e in made}
    assert found == {"none", "submitted", "submitted + noise", "submitted + half the norm"}
    assert {row_of(e)["attack"] for e in made if "+" in e.name} == {"backdoor"}, "not where nobody attacks"
    for e in made:
        assert (e.finish.steps == ("noise",)) is e.name.endswith("+noise")
        assert "/" not in e.name
        assert " " not in e.name


def test_a_heat_map_shows_levels_and_the_table_what_was_added_to_them() -> None:
    plain = {**row(0, 0.9, "submitted"), "trigger_compliance": 0.5}
    tuned = {**plain, "defence": "submitted + safety tuning", "trigger_compliance": 0.25}
    bare = {k: v for k, v in tuned.items() if k not in ("auroc", "honest_weight_mean")}
    excised = {**bare, "defence": "submitted + excised", "trigger_compliance": 0.125}
    rows = [plain, tuned, excised]
    text = tables.table({**fake(rows), "seconds_shared": True})
    assert "| `harmful_data` | `submitted + safety tuning` | 0.25 |" in text
    assert "| `harmful_data` | `submitted + excised` | 0.12 | 0.90 | – | – | – | – |" in text
    drawn = heatmap(rows, "trigger_compliance", "t", 0.0)
    assert "0.50" in drawn
    assert "0.25" not in drawn


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_attacks_that_can_be_made(name: str) -> None:
    experiments = of_preset(at(name), PRESETS[name])
    assert len({e.name for e in experiments}) == len(experiments)
    for e in experiments:
        assert config.parse_any(json.loads(e.model_dump_json())) == e
        assert make_attack(e).first_round() <= e.training.rounds, "malicious in some round of the run"
        assert (row_of(e)["attack"] in ("none", "honest_alone")) == (e.clients.malicious == 0)
    attacked = {row_of(e)["attack"] for e in experiments} - {"none", "honest_alone"}
    assert attacked == set(PRESETS[name].attacks)
    none = {row_of(e)["attack"] for e in experiments if e.defence.level == "none"} - {"none", "honest_alone"}
    assert none == set(PRESETS[name].undefended)
    alone = {row_of(e)["share"] for e in experiments if row_of(e)["attack"] == "honest_alone"}
    assert alone == {s for s in PRESETS[name].shares if s}
    assert {e.seed for e in of_preset(at(name), PRESETS[name], seeds=[5])} == {5}
    preset = PRESETS[name]
    changed = {row_of(e)["attack"] for e in experiments if "+" in e.name}
    meant = (preset.more_for or preset.attacks) if preset.more else ()
    assert changed == set(meant), "changes on top of a level meet the attacks they are for"


def at(preset: str) -> Experiment:
    return Experiment().changed(**PRESETS[preset].settings)


def row_of(experiment: Experiment) -> dict[str, object]:
    summary = {"metrics": {}, "honest_weight_min": 1.0, "outcomes": {}, "detection": {}, "seconds": {}}
    return federated.row(experiment, summary)


def test_every_robust_rule_is_in_a_preset() -> None:
    rules = {e.aggregation.name for e in of_preset(at("aggregators"), PRESETS["aggregators"])}
    assert rules == set(AGGREGATORS)
    one = next(e for e in of_preset(at("aggregators"), PRESETS["aggregators"]) if e.aggregation.name == "krum")
    assert row_of(one)["defence"] == "undefended + krum"


def test_every_attack_is_in_a_preset() -> None:
    """A new attack without a measured proof is an omission. What only changes others' updates is in a chain."""
    named = {part for e in of_preset(at("full"), PRESETS["full"]) for part in e.attack.name.split("+")}
    assert named == set(ATTACKS)


def test_a_backdoor_has_its_column_and_an_attack_its_name() -> None:
    plain, trigger = row(0, 0.9), row(0, 0.8, attack="backdoor")
    trigger["trigger_compliance"] = 0.75
    text = tables.table(fake([plain, trigger]))  # type: ignore[arg-type]
    assert "| trigger compliance |" in text
    assert "| `step`, 50% malicious: backdoor | 0.800 | 0.750 |" in text
    assert "| `step`, 50% malicious | 0.900 | – |" in text


def fake(rows: list[dict[str, object]]) -> dict[str, object]:
    return {
        "command": "assay bench", "commit": "abc", "versions": {"torch": "2", "transformers": "5"}, "rows": rows,
        "machine": {"cpu": "X", "cores": 2}, "model": {"name": "m", "dtype": "float32"},
    }  # fmt: skip


def row(seed: int, refusal: float | None, defence: str = "step", attack: str = "harmful_data") -> dict[str, object]:
    metrics = {k: refusal if k == "refusal_rate" else None for k in table_runs.COLUMNS.values()}
    return {
        "attack": attack, "defence": defence, "share": 0.5, "seed": seed, "aggregator": "mean", **metrics,
        "seconds": {"total": 10.0 * (seed + 1)},
    }  # fmt: skip


def test_table_groups_seeds_and_shows_their_spread() -> None:
    text = tables.table(fake([row(0, 0.9), row(1, 1.0), row(0, 0.5, "none", "none")]))  # type: ignore[arg-type]
    assert "| `step`, 50% malicious | 0.950 (0.900–1.000) | – |" in text
    assert "| 15 (10–20) |" in text
    assert "| honest only | 0.500 |" in text
    assert "seeds 0, 1" in text


def test_a_grid_has_its_shares_side_by_side_and_a_heat_map(tmp_path: Path) -> None:
    rows = [row(0, 0.95, "none", "none"), row(1, 0.85, "none", "none")]
    rows += [row(s, r, level, "blend") | {"share": share} for level, share, r, s in (
        ("none", 0.2, 0.5, 0), ("none", 0.7, 0.25, 0), ("submitted", 0.2, 0.75, 0), ("submitted", 0.2, 1.0, 1),
    )]  # fmt: skip
    found = fake(rows) | {"seconds_shared": True}
    text = tables.table(found)
    assert "Honest clients only: refusal 0.90 (0.85–0.95)." in text
    assert "| attack | level | refusal, 20% | refusal, 70% | over-refusal | benign loss | AUROC |" in text
    assert "| `blend` | undefended | 0.50 | 0.25 | – | – | – |" in text
    assert "| `blend` | `submitted` | 0.88 (0.75–1.00) | – |" in text
    (tmp_path / "x.json").write_text(json.dumps(found))
    drawn = tables.figures(tmp_path)
    assert list(drawn) == ["x-refusal.svg"]
    root = ElementTree.fromstring(drawn["x-refusal.svg"])
    texts = [t.text for t in root.iter() if t.tag.endswith("text")]
    assert [t for t in texts if t in ("0.50", "0.25", "0.88")] == ["0.50", "0.25", "0.88"]
    fills = [t.get("fill") for t in root.iter() if t.tag.endswith("rect")]
    assert fills[0] == "rgb(247,247,247)", "half way is neither colour"
    red, _, blue = (int(v) for v in str(fills[1])[4:-1].split(","))
    assert red > blue, "a low rate of refusals is the bad colour"


def test_a_grid_tells_each_screen_by_its_own_score() -> None:
    """The final weight's TPR is 0 as soon as one honest update in a hundred is refused; single scores are not."""

    def judged(seed: int, attack: str, **screens: tuple[float | None, float | None]) -> dict[str, Any]:
        detection = {name: {"auroc": a, "tpr_at_1pct_fpr": t} for name, (a, t) in screens.items()}
        return row(seed, 0.9, "submitted", attack) | {"detection": detection}

    rows = [
        row(0, 0.95, "none", "none"),
        judged(0, "blend", norm=(0.5, 0.0), canary=(0.9, 0.75), duplicate=(None, None)),
        judged(1, "blend", norm=(0.75, 0.25), canary=(0.8, 0.25), probe=(0.99, 0.45)),
        judged(0, "only_a", norm=(1.0, 1.0), canary=(0.1, 0.0)),
        row(0, 0.5, "none", "only_a") | {"detection": {}},
    ]
    text = tables.table(fake(rows) | {"seconds_shared": True})
    head = "| attack | level | best single screen | its AUROC | its TPR at 1% FPR | TPR of `norm` | TPR of `canary` | TPR of `probe` |"
    assert head in text
    assert "| `blend` | `submitted` | `canary` | 0.85 (0.80–0.90) | 0.50 (0.25–0.75) | 0.12 | 0.50 | 0.45 |" in text
    assert "| `only_a` | `submitted` | `norm` | 1.00 | 1.00 | 1.00 | 0.00 | – |" in text
    assert "best single screen" not in tables.table(fake(rows[:1]) | {"seconds_shared": True}), "nobody was judged"


def test_figures_in_the_docs_agree_with_the_results() -> None:
    for name, drawn in tables.figures(ROOT / "results").items():
        assert (ROOT / "docs" / "figures" / name).read_text() == drawn, "run python -m assay.bench.tables"


def test_only_marked_sections_change(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(fake([row(0, 0.25)])))
    text = "before\n<!-- results:x -->\nold\n<!-- /results:x -->\nkeep\n<!-- results:y -->\nz\n<!-- /results:y -->\n"
    filled = tables.fill(text, tmp_path)
    assert filled.startswith("before\n<!-- results:x -->\n| run |")
    assert "old" not in filled
    assert filled.endswith("keep\n<!-- results:y -->\nz\n<!-- /results:y -->\n")
    assert tables.fill(filled, tmp_path) == filled


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_tables_in_the_docs_agree_with_the_results(path: Path) -> None:
    text = path.read_text()
    assert tables.fill(text, ROOT / "results") == text, "run python -m assay.bench.tables"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_say_how_they_were_made(path: Path) -> None:
    found = json.loads(path.read_text())
    if found.get("wing") in ("flower", "swarm-messages"):  # no model is trained: their rows have tests of their own
        assert found["command"].startswith("python -m assay.bench.")
        assert re.fullmatch(r"[0-9a-f]{12}", found["commit"])
        return
    if found.get("wing") == "soak":  # nor here; every round within the bound, every malicious client refused
        assert found["command"].startswith("assay bench soak")
        assert re.fullmatch(r"[0-9a-f]{12}", found["commit"])
        for r in found["rows"]:
            assert r["peak_bytes"] - r["before_bytes"] <= found["bound_bytes"]
            assert r["noticed"]["refused_rightly"] == r["noticed"]["malicious"] > 0
        return
    assert found["command"].startswith("assay bench")
    assert all(re.fullmatch(r"[0-9a-f]{12}", one) for one in found["commit"].split(", "))
    assert {"torch", "transformers", "peft", "assay"} <= set(found["versions"])
    if found.get("wing") != "swarm":
        assert found["experiment"]["model"]["name"] == found["model"]["name"], "the setting the rows were made in"
    columns = table_runs.SWARM_COLUMNS if found.get("wing") == "swarm" else table_runs.COLUMNS
    for r in found["rows"]:
        asked = {"attack", "defence", "share", "seed", *columns.values()}
        if r["defence"].endswith("+ excised"):  # nobody is judged again
            asked -= {"auroc", "tpr_at_1pct_fpr", "honest_weight_mean", "malicious_weight_mean"}
        assert asked <= set(r)
    name = found["model"]["name"] if found.get("wing") == "swarm" else found["experiment"]["model"]["name"]
    assert "/" not in name


# --- the swarm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("name", swarm.SUITES)
def test_every_swarm_suite_can_be_run_from_files(name: str, seeds: list[int]) -> None:
    """As values they come back from JSON as they are; names are directories, and no two are the same."""
    experiments = swarm.suite([name], seeds)
    assert len({e.name for e in experiments}) == len(experiments)
    assert len(experiments) % len(seeds) == 0
    for e in experiments:
        assert re.fullmatch(r"swarm(\.\w+)+", e.name)
        assert config.parse_any(json.loads(e.model_dump_json())) == e
        assert (f".seed{e.seed}" in e.name) == (len(seeds) > 1)
        assert e.attack.name in attacks.ATTACKS
        make_plan("r", 1, [f"n{i}" for i in range(e.swarm.nodes)], mode=e.swarm.plan, prompts=e.swarm.prompts,
                  group=e.swarm.group, ids=range(1000), assigned=e.swarm.assigned)  # fmt: skip


def test_every_attack_of_the_swarm_is_in_a_suite() -> None:
    """A new attack without a measured proof is an omission; `nonsense` is TEXT said more often."""
    assert {e.attack.name for e in swarm.suite(list(swarm.SUITES), [0])} == set(attacks.ATTACKS) - {"nonsense"}


def test_what_text_screens_cost_a_clean_swarm_is_measured_for_every_attack_at_home() -> None:
    runs = swarm.suite(["heterogeneous", "text_aware"], [0])
    clean = [e for e in runs if not e.swarm.malicious_count and e.defence.level == "text"]
    assert {e.attack.name for e in clean} >= set(swarm.HOME) - {"dos"}
    honest = {e.attack.name: e for e in runs if "honest_only" in e.name}
    same = honest["dos"].changed(attack__name="math", name=honest["math"].name, swarm__assigned=False)
    assert same == honest["math"], "honest nodes, who choose nothing, do the same in both"
    assert {e.swarm.plan for e in clean} == {"vertical", "horizontal"}
    for e in clean:
        assert e.model.others
        assert swarm.row(e, {"metrics": {}, "detection": {}, "banned": {}, "seconds": {}})["attack"] == "none"


def test_suites_do_not_share_directories() -> None:
    """`--suite core,adaptive` puts all runs into one folder."""
    names = [e.name for e in swarm.suite(list(swarm.SUITES), [0, 1])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", sorted(set(swarm.SUITES) - {"ablation"}))
def test_the_defence_of_every_experiment_can_be_made(name: str) -> None:
    """No misspelt screen or parameter waits for its turn at the end of a long bench (ablation needs a judge)."""
    made = [defence.make(e, vocabulary=1024, eos=2) for e in swarm.suite([name], [0])]
    assert [m.level for m in made] == [e.defence.level for e in swarm.suite([name], [0])]


def test_the_demo_of_the_swarm_is_four_runs_of_one_experiment() -> None:
    runs = {e.name.removeprefix("swarm."): e for e in swarm.demo(5)}
    assert list(runs) == ["honest_only", "undefended", "logit", "seeded"]
    assert {e.seed for e in runs.values()} == {5}
    assert [e.swarm.malicious_count for e in runs.values()] == [0, 1, 1, 1]
    assert [e.defence.level for e in runs.values()] == ["none", "none", "logit", "seeded"]
    base = runs["undefended"]
    assert base.attack.name == "math"
    for name, run in runs.items():
        changed = {k for k, v in run.model_dump().items() if v != base.model_dump()[k]} - {"name"}
        assert changed <= ({"swarm"} if name == "honest_only" else {"defence"}), name


def test_attacks_run_where_they_are_at_home() -> None:
    """TEXT in all its forms needs the horizontal plan: a vertical group that is right throughout teaches nothing."""
    for attack in ("text", "inject_text", "slow_text", "paraphrase"):
        assert swarm.base_of(attack, 0).swarm.plan == "horizontal", attack
    assert swarm.base_of("math", 0).swarm.assigned is False, "MATH needs prompts with 2+2 in them"
    assert swarm.base_of("code", 0).task.name == "programs"
    two = swarm.heterogeneous(0, False)
    assert {e.model.others for e in two} == {("tiny-b",)}
    assert not {e.defence.level for e in two} & {"logit", "seeded"}


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'nope' is unknown; known are .*core, adaptive"):
        swarm.suite(["core", "nope"], [0])


def finished(asr: float | None = 0.25) -> dict[str, object]:
    """The parts of a summary that a row is made from."""
    metrics = {"asr": asr, "heldout_reward": 0.5, "completion_tokens_mean": 41.26, "honest_rejected_rate": 0.0,
               "poison_rejected_rate": None}  # fmt: skip
    return {
        "metrics": metrics, "detection": {"seeded": {"auroc": 0.875}}, "banned": {"node-1": [4, 5], "node-2": []},
        "seconds": {"total": 12.3456}, "model": {"name": "tiny", "dtype": "float32"},
    }  # fmt: skip


def swarm_rows(experiments: list[SwarmExperiment]) -> dict[str, dict[str, object]]:
    return {e.name: swarm.row(e, finished()) for e in experiments}


def test_a_row_says_what_was_run_and_what_came_of_it() -> None:
    rows = swarm_rows(swarm.core(0, False))
    assert {
        "name", "attack", "goal", "defence", "share", "plan", "task", "models", "oracle", "kl", "seed", "detection",
        "banned", "seconds", "honest_rejected_by_model", *table_runs.SWARM_COLUMNS.values(),
    } == set(rows["swarm.math.seeded"])  # fmt: skip
    assert rows["swarm.math.seeded"]["banned"] == {"node-1": 4}
    assert rows["swarm.math.seeded"]["seconds"] == {"total": 12.35}
    assert rows["swarm.text.honest_only"]["attack"] == "none"
    assert rows["swarm.text.honest_only"]["goal"] == "text"
    assert (
        rows["swarm.code.undefended"] | {"attack": "code", "defence": "none", "task": "programs"}
        == (rows["swarm.code.undefended"])
    )


@pytest.mark.parametrize("name", swarm.SUITES)
def test_a_row_is_called_like_its_run_whatever_the_seed(name: str) -> None:
    """Runs that differ only in the seed are one line of the table; all others are lines of their own."""
    one = [swarm.row(e, finished())["name"] for e in swarm.suite([name], [0])]
    assert one == [e.name.removeprefix("swarm.") for e in swarm.suite([name], [0])]
    several = [swarm.row(e, finished())["name"] for e in swarm.suite([name], [1, 23])]
    assert several == [*one, *one]


def test_results_of_the_swarm_hold_all_that_is_needed_to_make_them_again() -> None:
    experiments = swarm.suite(["smollm2"], [0, 1])
    found = swarm.results("assay bench swarm", experiments, {e.name: finished() for e in experiments})
    assert set(found) == {"wing", "command", "commit", "versions", "machine", "model", "rows"}
    assert [(r["name"], r["seed"]) for r in found["rows"]] == [
        ("smollm2.undefended", 0), ("smollm2.seeded", 0), ("smollm2.undefended", 1), ("smollm2.seeded", 1),
    ]  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_a_swarm_table_groups_seeds_and_shows_their_spread() -> None:
    def of(seed: int, asr: float | None, defence: str, auroc: float | None) -> dict[str, object]:
        return {
            "name": f"math.{defence}", "seed": seed, "defence": defence, "asr": asr, "heldout_reward": 0.5,
            "completion_tokens_mean": 40.04 + seed, "honest_rejected_rate": 0.0, "poison_rejected_rate": None,
            "detection": {defence: {"auroc": auroc}} if auroc is not None else {},
            "seconds": {"total": 10.0 * (seed + 1)},
        }  # fmt: skip

    rows = [of(0, 0.9, "logit", 0.5), of(1, 1.0, "logit", 0.625), of(2, None, "logit", None), of(0, None, "none", None)]
    text = tables.table({**fake(rows), "wing": "swarm"})
    lines = text.splitlines()
    assert lines[0] == (
        "| run | ASR | held-out reward | tokens | honest refused | malicious refused | AUROC | seconds |"
    )
    assert lines[1] == "|---" * 8 + "|"
    assert lines[2] == (
        "| `math.logit` | 0.950 (0.900–1.000) | 0.500 (0.500–0.500) | 41.0 (40.0–42.0) | 0.000 (0.000–0.000) | – "
        "| 0.562 (0.500–0.625) | 20 (10–30) |"
    )
    assert lines[3] == "| `math.none` | – | 0.500 | 40.0 | 0.000 | – | – | 10 |"
    assert "seeds 0, 1, 2" in text
    assert "m (float32)" in text
    mixed = [of(0, 0.9, "text", None) | {"models": 2, "honest_rejected_worst_model": 0.25}, of(0, None, "none", None)]
    lines = tables.table({**fake(mixed), "wing": "swarm"}).splitlines()
    assert "| malicious refused | honest refused, worst model | AUROC |" in lines[0]
    assert "| 0.000 | – | 0.250 | – |" in lines[2]
    assert "| 0.000 | – | – | – |" in lines[3], "finished before it was counted"


def test_only_takes_texts_in_and_leaves_texts_out() -> None:
    experiments = grid(Experiment(), ["blend", "alie"], [0.2, 0.5], ["none", "submitted"], [0])
    names = [e.name for e in _only(experiments, "blend,alie.50pct,-none")]
    assert names == [
        "federated.blend.20pct.submitted",
        "federated.blend.50pct.submitted",
        "federated.alie.50pct.submitted",
    ]
    assert [e.name for e in _only(experiments, "-pct")] == ["federated.honest_only"]
    assert _only(experiments, "") == experiments
    with pytest.raises(ConfigError, match="has that in its name"):
        _only(experiments, "blend,-blend")
