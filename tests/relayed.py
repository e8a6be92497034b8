"""A very small swarm of the real `tiny`, its nodes' folders, and relays that lie, for the tests of swarms by relay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from assay.bench.flower_grid import InProcessGrid
from assay.config import SwarmExperiment
from assay.engines.flower import swarm_node, swarm_relay
from assay.engines.relay import Answer, Request
from assay.engines.relayed_swarm import Settings, turn
from assay.engines.swarm_world import plan_for
from assay.ledger import Ledger
from assay.swarm.build import make_task
from assay.swarm.exchange import Rules
from assay.swarm.relayed import decode_pool, encode_pool, plan_bytes

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


def on_grid(
    settings: list[Settings], change: Callable[[str, Message], Any] = lambda node, reply: reply
) -> InProcessGrid:
    """The same nodes as Flower ClientApps on a grid in this process.

    `change(node, reply)` is what a node sends instead of its reply; None is silence.
    """

    def client(one: Settings) -> Any:
        app = swarm_node.make_app(lambda context: one)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        return lambda message: change(one.node, app(message, context))

    return InProcessGrid({11 + i: client(one) for i, one in enumerate(settings)})


def play(
    grid: InProcessGrid, settings: list[Settings], folder: Path, on_round: Callable[[int], None] = lambda index: None,
    **more: Any,
) -> None:  # fmt: skip
    """Run the relay's ServerApp to the end."""
    given = {"timeout": 0.05, "poll": 0.002, "attempts": 2, **more}
    relay = swarm_relay.RelaySettings(folder=folder, experiment=settings[0].experiment, keys=settings[0].keys, **given)
    swarm_relay.make_app(lambda context: relay, on_round)(
        grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    )


def pools_in(folder: Path, nodes: list[str]) -> dict[int, dict[str, bytes]]:
    """Messages by round, of the pools a relay has kept."""
    return {
        int(p.stem): decode_pool(p.read_bytes(), round=int(p.stem), nodes=nodes)
        for p in sorted((folder / "pools").glob("*.pool"))
    }


def rounds_of(settings: Settings) -> list[dict[str, Any]]:
    """The ledger's rounds of a node."""
    return [e["body"] for e in Ledger(settings.folder / "ledger.jsonl").entries if e["kind"] == "round"]


def told_of(settings: Settings) -> list[dict[str, Any]]:
    """What the ledger says of the relay."""
    return [e["body"] for e in Ledger(settings.folder / "ledger.jsonl").entries if e["kind"] == "relay"]
