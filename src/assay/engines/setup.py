"""What does not change during a federated run, and who trains in it: the seam between `rounds` and its engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from assay import wire
from assay.config import Experiment
from assay.contribution import Refusal, Template, Tensors
from assay.federated import aggregators, defence
from assay.federated.compute import Compute
from assay.federated.defence import Defence
from assay.federated.evaluate import Panel
from assay.federated.population import Sources
from assay.federated.preparation import Prepared
from assay.federated.round import ServerState
from assay.progress import Tracker

TRAIN_UNITS, ANSWER_UNITS = 1.0, 4.0  # seconds of one core: a step of 8 rows; 20 answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that does not change during a run."""

    experiment: Experiment
    prepared: Prepared
    compute: Compute
    sources: Sources
    clients: Clients
    panel: Panel
    defence: Defence
    aggregate: aggregators.Aggregator
    run_id: str
    initial: Tensors
    tracker: Tracker

    def template(self, round: int) -> Template:
        """What an update of `round` must look like."""
        shapes = {name: tuple(value.shape) for name, value in self.initial.items()}
        return Template(shapes=shapes, base_sha256=self.prepared.base_sha256, round=round)

    def limits(self) -> wire.Limits:
        """What a message may cost."""
        return self.defence.limits(self.experiment.training.steps)

    def ticker(self, units_each: float) -> Callable[[int], None]:
        """Progress for jobs of `units_each`."""
        return lambda count: self.tracker.tick(units_each * count)


@dataclass(frozen=True, slots=True)
class Sent:
    """A round's messages, each with its participant as the transport authenticated it: bytes, or why there are none.

    `messages` is read once, one after the other: whoever makes them need not hold all of them at a time. `memory` is what
    simulated attackers keep for the next round, where the server's checkpoint keeps it for them.
    """

    messages: Iterable[tuple[str, bytes | Refusal]]
    memory: Tensors


class Clients(Protocol):
    """Whoever trains. `malicious` and `kinds` are a simulation's truth, for the summary; {} where nobody knows. `names`
    are what the operator calls participants whose identity is no word to read; nothing but the page goes by them."""

    @property
    def malicious(self) -> Mapping[str, bool]: ...

    @property
    def kinds(self) -> Mapping[str, str]: ...

    @property
    def names(self) -> Mapping[str, str]: ...

    def train(self, setup: Setup, state: ServerState, memory: Tensors, round: int) -> Sent:
        """Let the participants of `round` train from `state`; one entry for each that was asked. Peers never raise."""
        ...


Recruit = Callable[[Experiment, Sources], Clients]
"""Raises ConfigError for what the operator got wrong, before anything is rehearsed."""


def units(experiment: Experiment) -> float:
    """Rough seconds of one core a run takes, for progress bars."""
    training, evaluation = experiment.training, experiment.evaluate
    rounds, clients = training.rounds, experiment.clients.per_round
    each = train_units(experiment) + (0.7 if defence.reads_model(experiment) else 0)
    evaluations = 2 + (rounds - 1) // evaluation.every
    return rounds * clients * each + evaluations * evaluate_units(experiment)


def train_units(experiment: Experiment) -> float:
    """The same for one client's part of a round."""
    training = experiment.training
    branches = 2 if defence.wants_shadow(experiment) else 1
    return TRAIN_UNITS * training.steps * branches * training.batch_size * training.max_length / (8 * 48)


def evaluate_units(experiment: Experiment) -> float:
    config = experiment.evaluate
    return ANSWER_UNITS * (config.harmful_prompts + config.benign_prompts) / 20
