"""A very small swarm of the real `tiny`, its nodes' folders, and relays that lie, for the tests of swarms by relay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from assay.config import SwarmExperiment
from assay.engines.relayed_swarm import Answer, Request, Settings, turn
from assay.engines.swarm_world import node_names, plan_for
from assay.ledger import Ledger
from assay.swarm.build import make_task
from assay.swarm.exchange import Rules
from assay.swarm.relayed import encode_pool, plan_bytes

Pools = dict[int, bytes]


def tiny(**changes: Any) -> SwarmExperiment:
    """Three honest nodes and one that plants 2+2=5, two prompts of four completions a node and round."""
    values: dict[str, Any] = {
        "name": "relayed", "swarm__nodes": 4, "swarm__prompts": 4, "swarm__group": 4, "swarm__iterations": 3,
        "swarm__run": "relayed", "sampling__max_tokens": 32, "evaluate__prompts": 2, "evaluate__samples": 1,
        "attack__samples": 4, "defence__ban_after": 2,
    }  # fmt: skip
    return SwarmExperiment().changed(**{**values, **changes})


class Relay:
    """A relay in one process, without Flower: honest, but for what `lie` makes of a node's pool.

    `lie(node, index, messages)` gets the signed messages of round `index` and returns what that node is told they are.
    """

    def __init__(
        self,
        settings: list[Settings],
        lie: Callable[[str, int, dict[str, bytes]], Mapping[str, bytes]] = lambda node, index, messages: messages,
    ) -> None:
        self.settings = {s.node: s for s in settings}
        self.experiment, self.lie = settings[0].experiment, lie
        self.messages: dict[int, dict[str, bytes]] = {}
        self.rules = Rules(run="relayed", vocabulary=1024, max_tokens=32, ids=make_task(self.experiment).train)

    def pools(self, node: str, rounds: range) -> Pools:
        return {i: encode_pool(i, self.lie(node, i, dict(self.messages[i]))) for i in rounds if i in self.messages}

    def ask(self, node: str, index: int, rounds: range | None = None, plan: bytes | None = None) -> Answer:
        pools = self.pools(node, range(index - 1, index) if rounds is None else rounds)
        return turn(
            self.settings[node], Request(round=index, plan=self.plan(index) if plan is None else plan, pools=pools)
        )

    def plan(self, index: int) -> bytes:
        return plan_bytes(plan_for(self.experiment, self.rules, index)) if index <= self.last else b""

    @property
    def last(self) -> int:
        return self.experiment.swarm.iterations

    def round(self, index: int, silent: tuple[str, ...] = ()) -> dict[str, Answer]:
        answers = {node: self.ask(node, index) for node in self.settings if node not in silent}
        self.messages[index] = {n: a.message for n, a in answers.items() if a.message}
        return answers


def rounds_of(settings: Settings) -> list[dict[str, Any]]:
    """The ledger's rounds of a node."""
    return [e["body"] for e in Ledger(settings.folder / "ledger.jsonl").entries if e["kind"] == "round"]


def told_of(settings: Settings) -> list[dict[str, Any]]:
    """What the ledger says of the relay."""
    return [e["body"] for e in Ledger(settings.folder / "ledger.jsonl").entries if e["kind"] == "relay"]


__all__ = ["Path", "Relay", "node_names", "rounds_of", "tiny", "told_of"]
