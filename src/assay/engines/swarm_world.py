"""One world of a swarm: models, practice, plan, what is remembered; one round's answers and one round's learning.

Both engines stand on it: `local_swarm` plays everybody in one process, `relayed_swarm` one node of a run whose messages
a relay carries.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from assay import models
from assay.checkpoint import Checkpoint
from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Completion, Rollout, completion_sha256, tensors_sha256
from assay.engines import journal
from assay.progress import Tracker
from assay.swarm import attacks, evaluate, summary
from assay.swarm.build import make_learner, make_practice
from assay.swarm.exchange import Gathered, Plan, Rules, make_plan
from assay.swarm.learner import Learner, Learnt, Memory, Practice
from assay.swarm.screens.model import Logit, Seeded
from assay.swarm.seats import make_seat
from assay.trust import Strikes


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
        return len(set(self.kind_of.values())) == 1

    @property
    def reading(self) -> Rules:
        """What is asked of messages now: with equal weights also that they were sampled from these."""
        return replace(self.rules, model_sha256=model_sha256(self) if self.homogeneous else None)


def dumped(experiment: SwarmExperiment) -> dict[str, Any]:
    """What decides a run's numbers: neither its name nor where data lies nor who follows it."""
    return experiment.model_dump(mode="json", exclude={"data": {"root"}, "name": True, "track": True})


def node_names(experiment: SwarmExperiment) -> list[str]:
    """Names of the nodes, which plan and seeds hang on."""
    return [f"node-{i}" for i in range(experiment.swarm.nodes)]


def kinds_of(experiment: SwarmExperiment) -> dict[str, str]:
    """Which model each node starts from."""
    names = (experiment.model.name, *experiment.model.others)
    return {node: names[i % len(names)] for i, node in enumerate(node_names(experiment))}


def malicious_nodes(experiment: SwarmExperiment) -> frozenset[str]:
    """The nodes that play the experiment's attack, drawn by its seed."""
    nodes = node_names(experiment)
    return frozenset(random.Random(f"{experiment.seed}/malicious").sample(nodes, experiment.swarm.malicious_count))


def public_name(experiment: SwarmExperiment, weights: Mapping[str, str]) -> str:
    """The run's public name: given, or made of seed, task and the hashes of the models it starts from."""
    return experiment.swarm.run or journal.run_id_of(
        {"seed": experiment.seed, "task": experiment.task.model_dump(), "model": dict(weights)}
    )


def build(
    experiment: SwarmExperiment, tracker: Tracker, kinds: Collection[str] | None = None
) -> tuple[World, dict[str, Any], dict[str, Any]]:
    """Load the models, the task and the defence -> the world before round 1, what names the run, the model's facts.

    `kinds`: the models that are to learn here (None: all of the experiment's).
    """
    attacks.make(experiment.attack.name)  # an unknown one is named before the directory is claimed
    names = (experiment.model.name, *experiment.model.others)
    bases = {name: models.load(name, experiment.model.dtype, tracker.say) for name in dict.fromkeys(names)}
    first = next(iter(bases.values()))
    for base in bases.values():
        if base.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise ConfigError(f"model.others: {base.name} has another tokenizer than {first.name}; token ids travel")
    weights = {name: base.sha256 for name, base in bases.items()}
    identity = {"experiment": dumped(experiment), "model": weights, "dtype": first.dtype}
    run_name = public_name(experiment, weights)
    practice = make_practice(experiment, first, run_name)
    learning = {name: base for name, base in bases.items() if kinds is None or name in kinds}
    learners = {name: make_learner(experiment, base, practice, tracker) for name, base in learning.items()}
    world = World(
        experiment=experiment,
        practice=practice,
        learners=learners,
        kind_of=kinds_of(experiment),
        malicious=malicious_nodes(experiment),
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


def plan_of(world: World, index: int) -> Plan:
    """The public plan of a round; every node computes the same."""
    return plan_for(world.experiment, world.rules, index)


def plan_for(experiment: SwarmExperiment, rules: Rules, index: int) -> Plan:
    """The same, for whoever has no model."""
    swarm = experiment.swarm
    return make_plan(
        rules.run, index, node_names(experiment), mode=swarm.plan, prompts=swarm.prompts, group=swarm.group,
        ids=rules.ids, assigned=swarm.assigned,
    )  # fmt: skip


def answer(world: World, plan: Plan, model_sha256: str, only: Collection[str] | None = None) -> dict[str, Rollout]:
    """Every node's completions: honest ones drawn together for each set of weights, malicious ones by the attack.

    `only`: the nodes that are wanted (None: all).
    """
    active = plan.round >= world.experiment.attack.from_round
    attackers = world.malicious if active else frozenset()
    wanted = [node for node in world.nodes if only is None or node in only]
    out: dict[str, list[Completion]] = {}
    for kind, learner in world.learners.items():
        places = [
            (node, prompt, i)
            for node in wanted
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
    for node in sorted(attackers & set(wanted)):
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


def absorb(
    world: World, gathered: Gathered, before: str, seconds: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every learner screens and learns from one round -> its ledger entry and its metrics; `seconds` is added to."""
    learnt: dict[str, Learnt] = {}
    for kind, learner in world.learners.items():
        world.memory[kind], learnt[kind] = learner.learn(gathered, world.memory[kind])
        for stage, value in learnt[kind].seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    world.round, world.previous = gathered.plan.round, gathered.completions
    at = time.perf_counter()
    row = _row(world, learnt)
    seconds["evaluate"] = time.perf_counter() - at
    row["seconds"] = seconds
    return summary.ledger_body(gathered, learnt, world.memory, before, model_sha256(world)), row


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
        row["heldout"] = heldout(world)
    return row


def heldout(world: World) -> dict[str, Any]:
    """Mean over the kinds of weights that honest nodes hold, as far as they are here."""
    config = world.experiment.evaluate
    ids = world.practice.task.heldout
    prompts = random.Random("heldout").sample(ids, min(config.prompts, len(ids)))
    kinds = {world.kind_of[n] for n in world.nodes if n not in world.malicious} & set(world.learners)
    kinds = kinds or set(world.learners)  # a malicious node's own model may be nobody else's
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


def start(world: World, run_id: str, prepare_seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ledger entry and metrics of round 0, before training."""
    at = time.perf_counter()
    row = {
        "round": 0,
        "heldout": heldout(world),
        "seconds": {"prepare": prepare_seconds, "evaluate": time.perf_counter() - at},
    }
    one = next(iter(world.learners.values()))
    entry = {"run": run_id, "public_run": world.rules.run, "model": model_sha256(world)}
    return {**entry, "defence": one.defence.summary()}, row


def restore(world: World, found: Checkpoint) -> None:
    """Put the world back to where a checkpoint left it."""
    world.round = found.step
    for kind, learner in world.learners.items():
        prefix = f"{kind}/"
        learner.load({n.removeprefix(prefix): v for n, v in found.tensors.items() if n.startswith(prefix)})
        kept = found.meta["memory"][kind]
        trust = {node: Strikes.from_json(s) for node, s in kept["trust"].items()}
        world.memory[kind] = Memory(trust=trust, screens=kept["screens"])
    world.previous = tuple(_completion(world, c) for c in found.meta["previous"])


def _completion(world: World, stored: Sequence[Any]) -> Completion:
    node, round, prompt, index, ids = stored
    sha256 = completion_sha256(round, prompt, index, ids)
    return Completion(participant=node, round=round, prompt=prompt, index=index, ids=tuple(ids), sha256=sha256)


def save(
    world: World,
    directory: Path,
    entry: Mapping[str, Any],
    row: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Make the round real; `more` is kept in the checkpoint beside the world."""
    tensors = {f"{kind}/{n}": v for kind, learner in world.learners.items() for n, v in learner.tensors().items()}
    memory = {
        kind: {"trust": {n: s.to_json() for n, s in m.trust.items()}, "screens": dict(m.screens)}
        for kind, m in world.memory.items()
    }
    # attackers may read the round before
    seen = world.previous if world.malicious else ()
    previous = [[c.participant, c.round, c.prompt, c.index, list(c.ids)] for c in seen]
    journal.save(directory, world.round, tensors, {"memory": memory, "previous": previous, **(more or {})}, entry, row)


def model_sha256(world: World) -> str:
    """Hash of all trained weights; for equal weights it is what every node claims to have sampled from."""
    return tensors_sha256(
        {
            f"{kind}/{n}": p.detach().float().cpu().numpy()
            for kind, learner in world.learners.items()
            for n, p in learner.parameters.items()
        }
    )
