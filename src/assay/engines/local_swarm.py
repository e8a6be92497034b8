"""A whole swarm on one machine.

Honest nodes that start from the same weights share one learner: they read the same pool with the same screens, so that
one update stands for all of them (tests/test_swarm.py shows that it equals running them apart). Everybody's message
goes through the wire. A run is resumable at any point (journal.py).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay import checkpoint, models, run_dir
from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Completion, Rollout, completion_sha256, tensors_sha256
from assay.engines import journal
from assay.progress import Silent, Tracker
from assay.swarm import attacks, evaluate, summary
from assay.swarm.build import make_learner, make_practice
from assay.swarm.exchange import Plan, Rules, gather, make_plan
from assay.swarm.learner import Learner, Learnt, Memory, Practice
from assay.swarm.screens.model import Logit, Seeded
from assay.swarm.seats import make_seat
from assay.trust import Strikes
from assay.wire import encode_rollout

UNITS = 2.0  # seconds of one core: an iteration of 192 completions on tiny


@dataclass(slots=True)
class World:
    """All of a run: what stays, and what a round changes (`round`, the learners' weights, `memory`, `previous`)."""

    experiment: SwarmExperiment
    practice: Practice
    learners: dict[str, Learner]
    kind_of: dict[str, str]  # node -> learner
    malicious: frozenset[str]
    settings: attacks.Settings
    rules: Rules
    tracker: Tracker
    round: int = 0
    memory: dict[str, Memory] = field(default_factory=dict)
    previous: tuple[Completion, ...] = ()

    @property
    def nodes(self) -> list[str]:
        return sorted(self.kind_of)

    @property
    def homogeneous(self) -> bool:
        return len(self.learners) == 1


def run_swarm(
    experiment: SwarmExperiment,
    directory: str | Path,
    tracker: Tracker | None = None,
    *,
    given: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory`; returns the summary. A finished run is returned as it is."""
    directory, tracker = Path(directory), tracker or Silent()
    run_dir.commit()
    with journal.locked(directory):
        at = time.perf_counter()
        world, identity, model = build(experiment, tracker)
        dumped = identity["experiment"]
        run_id = journal.claim(directory, identity, {"experiment": dumped, "model": model}, given)
        finished = run_dir.read_summary(directory)
        if finished is not None:
            return finished
        rows = _resume_or_start(world, directory, run_id, time.perf_counter() - at)
        while world.round < experiment.swarm.iterations:
            rows.append(play(world, directory))
        found = summary.summarise(experiment, rows, world.kind_of, world.malicious, model, command)
        found["ledger"] = journal.close(directory, world.round, _model_sha256(world))
        found["defence"] = next(iter(world.learners.values())).defence.summary()
        checkpoint.write_json(directory / run_dir.SUMMARY, found)
        return found


def finished(experiment: SwarmExperiment, directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run of this very experiment, without loading a model; None if there is none yet."""
    summary = run_dir.read_summary(directory)
    if summary is None:
        return None
    resolved = json.loads((directory / run_dir.RESOLVED).read_text())
    if resolved["experiment"] != json.loads(json.dumps(_dumped(experiment))):
        raise ConfigError(f"{directory}: holds another experiment; choose another directory (--out) or delete it")
    return summary


def _dumped(experiment: SwarmExperiment) -> dict[str, Any]:
    """What decides a run's numbers: neither its name nor where data lies."""
    return experiment.model_dump(mode="json", exclude={"data": {"root"}, "name": True})


def units(experiment: SwarmExperiment) -> float:
    """Rough seconds of one core a run takes, for progress bars."""
    swarm = experiment.swarm
    return UNITS * swarm.iterations * swarm.prompts * swarm.group / 192


def build(experiment: SwarmExperiment, tracker: Tracker) -> tuple[World, dict[str, Any], dict[str, Any]]:
    """Load the models, the task and the defence -> the world before round 1, what names the run, the model's facts."""
    attacks.make(experiment.attack.name)  # an unknown one is named before the directory is claimed
    names = (experiment.model.name, *experiment.model.others)
    bases = {name: models.load(name, experiment.model.dtype, tracker.say) for name in dict.fromkeys(names)}
    first = next(iter(bases.values()))
    for base in bases.values():
        if base.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise ConfigError(f"model.others: {base.name} has another tokenizer than {first.name}; token ids travel")
    dumped = _dumped(experiment)
    weights = {name: base.sha256 for name, base in bases.items()}
    identity = {"experiment": dumped, "model": weights, "dtype": first.dtype}
    run_name = experiment.swarm.run or journal.run_id_of(
        {"seed": experiment.seed, "task": experiment.task.model_dump(), "model": weights}
    )
    practice = make_practice(experiment, first, run_name)
    learners = {name: make_learner(experiment, base, practice, tracker) for name, base in bases.items()}
    nodes = [f"node-{i}" for i in range(experiment.swarm.nodes)]
    bad = random.Random(f"{experiment.seed}/malicious").sample(nodes, experiment.swarm.malicious_count)
    world = World(
        experiment=experiment,
        practice=practice,
        learners=learners,
        kind_of={node: names[i % len(names)] for i, node in enumerate(nodes)},
        malicious=frozenset(bad),
        settings=attack_settings(experiment),
        rules=Rules(
            run=run_name, vocabulary=practice.vocabulary, max_tokens=practice.max_tokens, ids=practice.task.train
        ),
        tracker=tracker,
        memory={name: Memory() for name in learners},
    )
    model = {"name": ", ".join(bases), "sha256": first.sha256, "dtype": first.dtype, "all": weights}
    return world, identity, model


def attack_settings(experiment: SwarmExperiment) -> attacks.Settings:
    """The attack's knobs as attacks.py takes them."""
    attack = experiment.attack
    return attacks.Settings(
        poison=attack.poison,
        oracle=attack.oracle,
        samples=attack.samples,
        phrase=attack.phrase,
        module=attack.module,
    )


def play(world: World, directory: Path) -> dict[str, Any]:
    """One round: every node answers, every learner screens and learns, the round is written down."""
    experiment, index = world.experiment, world.round + 1
    world.tracker.say(f"{experiment.name}: iteration {index}/{experiment.swarm.iterations}")
    before = _model_sha256(world)
    seconds: dict[str, float] = {}
    at = time.perf_counter()
    plan = plan_of(world, index)
    messages = {node: encode_rollout(r, run=world.rules.run) for node, r in answer(world, plan, before).items()}
    seconds["generate"] = time.perf_counter() - at
    rules = Rules(
        run=world.rules.run, vocabulary=world.rules.vocabulary, max_tokens=world.rules.max_tokens,
        ids=world.rules.ids, model_sha256=before if world.homogeneous else None,
    )  # fmt: skip
    gathered = gather(messages, plan, rules)
    learnt: dict[str, Learnt] = {}
    for kind, learner in world.learners.items():
        world.memory[kind], learnt[kind] = learner.learn(gathered, world.memory[kind])
        for stage, value in learnt[kind].seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    world.round, world.previous = index, gathered.completions
    at = time.perf_counter()
    row = _row(world, learnt)
    seconds["evaluate"] = time.perf_counter() - at
    row["seconds"] = seconds
    entry = summary.ledger_body(gathered, learnt, world.memory, before, _model_sha256(world))
    _save(world, directory, entry, row)
    world.tracker.tick(units(experiment) / experiment.swarm.iterations)
    return row


def plan_of(world: World, index: int) -> Plan:
    """The public plan of a round; every node computes the same."""
    swarm = world.experiment.swarm
    return make_plan(
        world.rules.run, index, world.nodes, mode=swarm.plan, prompts=swarm.prompts, group=swarm.group,
        ids=world.rules.ids, assigned=swarm.assigned,
    )  # fmt: skip


def answer(world: World, plan: Plan, model_sha256: str) -> dict[str, Rollout]:
    """Every node's completions: honest ones drawn together for each set of weights, malicious ones by the attack."""
    active = plan.round >= world.experiment.attack.from_round
    attackers = world.malicious if active else frozenset()
    out: dict[str, list[Completion]] = {}
    for kind, learner in world.learners.items():
        places = [
            (node, prompt, i)
            for node in world.nodes
            if world.kind_of[node] == kind and node not in attackers
            for prompt, count in plan.asked[node].items()
            for i in range(count)
        ]
        seeds = [world.practice.seed(plan.round, *place) for place in places]
        for (node, prompt, i), ids in zip(places, learner.generate([p for _, p, _ in places], seeds)):
            sha256 = completion_sha256(plan.round, prompt, i, ids)
            made = Completion(participant=node, round=plan.round, prompt=prompt, index=i, ids=ids, sha256=sha256)
            out.setdefault(node, []).append(made)
    attack = attacks.make(world.experiment.attack.name)
    for node in sorted(attackers):
        seat = make_seat(
            node, world.learners[world.kind_of[node]], plan, world.settings, seed=world.experiment.seed,
            previous=world.previous, prompts=world.rules.ids, ahead=plan_of(world, plan.round + 1),
        )  # fmt: skip
        out[node] = attack(seat)
    return {
        node: Rollout(participant=node, round=plan.round, model_sha256=model_sha256, completions=tuple(made))
        for node, made in out.items()
        if made
    }


def _row(world: World, learnt: Mapping[str, Learnt]) -> dict[str, Any]:
    """The metrics of a round. Behaviour and lengths are of honest nodes' completions, drawn before this update."""
    experiment = world.experiment
    one = next(iter(learnt.values()))
    row = summary.round_row(
        world.round, experiment.attack.name, world.settings, learnt, world.malicious, world.memory, world.kind_of
    )
    screens = next(iter(world.learners.values())).defence.model_screens
    limits = [s.max_margin if isinstance(s, Seeded) else s.slack for s in screens if isinstance(s, Seeded | Logit)]
    row["shown"] = evaluate.shown(
        one, world.malicious, experiment.attack.name, world.settings, world.practice.decode, min(limits, default=0.05)
    )
    if world.round % experiment.evaluate.every == 0 or world.round == experiment.swarm.iterations:
        row["heldout"] = _heldout(world)
    return row


def _heldout(world: World) -> dict[str, Any]:
    """Mean over the kinds of weights that honest nodes hold."""
    config = world.experiment.evaluate
    ids = world.practice.task.heldout
    prompts = random.Random("heldout").sample(ids, min(config.prompts, len(ids)))
    kinds = {world.kind_of[n] for n in world.nodes if n not in world.malicious}
    found = [
        evaluate.heldout(world.learners[k], prompts, config.samples, world.experiment.attack.name, world.settings)
        for k in sorted(kinds)
    ]
    rates = [f.asr for f in found if f.asr is not None]
    return {
        "asr": float(np.mean(rates)) if rates else None,
        "tokens": float(np.mean([f.tokens for f in found])),
        "reward": float(np.mean([f.reward for f in found])),
    }


def _resume_or_start(world: World, directory: Path, run_id: str, prepare_seconds: float) -> list[dict[str, Any]]:
    found = checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    if found is None:
        at = time.perf_counter()
        row = {
            "round": 0,
            "heldout": _heldout(world),
            "seconds": {"prepare": prepare_seconds, "evaluate": time.perf_counter() - at},
        }
        one = next(iter(world.learners.values()))
        entry = {"run": run_id, "public_run": world.rules.run, "model": _model_sha256(world)}
        _save(world, directory, {**entry, "defence": one.defence.summary()}, row)
        return [row]
    world.round = found.step
    for kind, learner in world.learners.items():
        prefix = f"{kind}/"
        learner.load({n.removeprefix(prefix): v for n, v in found.tensors.items() if n.startswith(prefix)})
        kept = found.meta["memory"][kind]
        trust = {node: Strikes.from_json(s) for node, s in kept["trust"].items()}
        world.memory[kind] = Memory(trust=trust, screens=kept["screens"])
    world.previous = tuple(_completion(world, c) for c in found.meta["previous"])
    journal.publish(directory, found.step, found.meta["entry"], found.meta["row"])
    world.tracker.tick(units(world.experiment) * found.step / world.experiment.swarm.iterations)
    world.tracker.say(f"resuming after iteration {found.step}")
    return run_dir.read_metrics(directory)


def _completion(world: World, stored: Sequence[Any]) -> Completion:
    node, round, prompt, index, ids = stored
    sha256 = completion_sha256(round, prompt, index, ids)
    return Completion(participant=node, round=round, prompt=prompt, index=index, ids=tuple(ids), sha256=sha256)


def _save(world: World, directory: Path, entry: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    tensors = {f"{kind}/{n}": v for kind, learner in world.learners.items() for n, v in learner.tensors().items()}
    memory = {
        kind: {"trust": {n: s.to_json() for n, s in m.trust.items()}, "screens": dict(m.screens)}
        for kind, m in world.memory.items()
    }
    # attackers may read the round before
    seen = world.previous if world.malicious else ()
    previous = [[c.participant, c.round, c.prompt, c.index, list(c.ids)] for c in seen]
    journal.save(directory, world.round, tensors, {"memory": memory, "previous": previous}, entry, row)


def _model_sha256(world: World) -> str:
    """Hash of all trained weights; for equal weights it is what every node claims to have sampled from."""
    return tensors_sha256(
        {
            f"{kind}/{n}": p.detach().float().cpu().numpy()
            for kind, learner in world.learners.items()
            for n, p in learner.parameters.items()
        }
    )
