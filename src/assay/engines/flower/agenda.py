"""What a relay carries: a swarm's experiment, whose plans follow from it, or mail, of which it knows no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay import models
from assay.config import SwarmExperiment
from assay.engines.relay import Mail
from assay.engines.swarm_world import dumped, node_names, plan_for, public_name
from assay.swarm.build import make_task
from assay.swarm.exchange import Rules, template
from assay.swarm.keys import read_keys
from assay.swarm.relayed import plan_bytes
from assay.swarm.signed import Keys

ANY_VOCABULARY = 2**32  # the relay reads no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Agenda:
    """`keys`: of all nodes, by name. `plan`: what is said of a round's plan. `max_contents`: bytes of one message."""

    run: str
    keys: Keys
    rounds: int
    max_contents: int
    plan: Callable[[int], bytes]
    identity: dict[str, Any]


def agenda_of(what: SwarmExperiment | Mail, keys: Path) -> Agenda:
    """ConfigError for keys that do not fit the experiment."""
    if isinstance(what, Mail):
        return Agenda(
            run=what.run, keys=read_keys(keys), rounds=what.rounds, max_contents=what.max_bytes, plan=lambda index: b"",
            identity={"mail": asdict(what)},
        )  # fmt: skip
    nodes = node_names(what)
    run = what.swarm.run  # where it has a name of its own, the relay needs no model
    rules = Rules(
        run=run or public_name(what, _weights(what)), vocabulary=ANY_VOCABULARY, max_tokens=what.sampling.max_tokens,
        ids=make_task(what).train,
    )  # fmt: skip
    first = plan_for(what, rules, 1)
    return Agenda(
        run=rules.run, keys=read_keys(keys, nodes), rounds=what.swarm.iterations,
        max_contents=max(template(node, first, rules).message_bytes for node in nodes),
        plan=lambda index: plan_bytes(plan_for(what, rules, index)), identity={"experiment": dumped(what)},
    )  # fmt: skip


def _weights(experiment: SwarmExperiment) -> dict[str, str]:
    names: Iterable[str] = dict.fromkeys((experiment.model.name, *experiment.model.others))
    return {name: models.load(name, experiment.model.dtype).sha256 for name in names}
