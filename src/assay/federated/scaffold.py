"""SCAFFOLD (Karimireddy et al. 2020): control variates that take the clients' drift out of their local steps.

A client whose rows differ from the others' pulls its adapter y_i away from where all of them together would go. The
server keeps for each client the mean gradient c_i it last showed, and their mean c; c - c_i is added to every gradient
of the client's next round. A pair of pure functions: `correction(state, client)` before a round, `update(...)` after.

**The server derives c_i itself**, from what was submitted anyway (option II: c_i+ = c_i - c + (x - y_i) / (K * lr)):
it knows x, y_i, K, lr and the correction it sent. Nothing travels back beside the adapter, nothing can be forged beyond
it. This needs plain SGD, whose steps add up to lr times the gradients. Where this differs from the published algorithm,
it is because clients may lie (with equal weights and everybody present in every round there is no difference):

- A client's own gradients are clipped before the correction joins them (local_sft.take_step), so an honest c_i is at
  most `limit` = training.clip long, and every c_i is cut to that. Without it a client who ignores his correction would
  be credited with it again every round, and his c_i would grow for ever out of small steps that no screen minds.
- c is the *aggregate* of the c_i, by the aggregator and the trust weights of the adapter: a mean beside a median would
  let in by the side door whom the median keeps out. It is made anew each round; adding up differences, as published,
  leaves in c for good what a client put there before he was found out.
- A client of weight 0 is forgotten: nothing of him is in c, and nothing is sent to him. A client nobody knows yet, or
  who was forgotten, counts as c_i = c (published: 0, which would make him count c twice): no correction, no share in c.

What it does not stop: a client let in once looks like the mean from then on (his own pull is in c_i, and acts through c
with his weight), so screens that read directions see it best in his first round; the gate sees what comes of all.
Costs: M adapters of float32 in memory and in each checkpoint, for M clients seen.

Legend: N updates of a round, M clients known, D values of a flattened adapter. State is a dict of named float32 arrays:
`mean` (c_D), `weight` (trust_M, in the order of the sorted names) and `of/NAME` (c_i).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators import Aggregator
from assay.federated.local_sft import LocalSettings
from assay.spool import Matrix

Controls = Mapping[str, NDArray[np.float32]]
OF = "of/"


@dataclass(frozen=True, slots=True)
class Rule:
    """What turns a submission of this round into a mean gradient: `scale` = K * lr, `limit` = the clients' clip."""

    scale: float
    limit: float

    @classmethod
    def of(cls, settings: LocalSettings) -> Rule:
        return cls(settings.steps * settings.lr, settings.clip)


def correction(controls: Controls, client: str) -> NDArray[np.float32] | None:
    """c - c_i, to be added to each of the client's gradients; None where it is zero: nothing is known of him."""
    own_D = controls.get(OF + client)
    return None if own_D is None else controls["mean"] - own_D


def update(
    controls: Controls,
    clients: Sequence[str],
    delta_ND: Matrix,
    weight_N: NDArray[np.float64],
    rule: Rule,
    aggregate: Aggregator,
    refused: Collection[str] = (),
) -> dict[str, NDArray[np.float32]]:
    """The control variates after a round: `delta_ND` is y_i - x of `clients`, `refused` are those without an update.

    Raises the aggregator's ToleranceError.
    """
    names = [key.removeprefix(OF) for key in sorted(controls) if key.startswith(OF)]
    trust = dict(zip(names, controls["weight"].tolist())) if names else {}
    known = {name: controls[OF + name] for name in names}
    for client, delta_D, weight in zip(clients, delta_ND, weight_N):
        if weight > 0:
            sent_D = correction(controls, client)
            own_D = delta_D.astype(np.float64) / -rule.scale - (0.0 if sent_D is None else sent_D)
            length = float(np.linalg.norm(own_D))
            known[client] = (own_D * min(1.0, rule.limit / max(length, 1e-300))).astype(np.float32)
            trust[client] = float(weight)
    for client in {*refused, *(c for c, w in zip(clients, weight_N) if not w > 0)}:
        known.pop(client, None)
        trust.pop(client, None)
    if not known:
        return {}
    weight_M = np.array([trust[name] for name in sorted(known)], np.float32)
    mean_D = aggregate(np.stack([known[name] for name in sorted(known)]), weight_M)
    return {"mean": mean_D, "weight": weight_M, **{OF + name: own_D for name, own_D in known.items()}}
