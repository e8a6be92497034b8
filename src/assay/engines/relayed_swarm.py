"""One node of a swarm whose messages a relay carries that it does not trust. Knows nothing of Flower.

`turn` answers one request: it learns the pools it lacks, then generates, signs and hands over its message of the
round. Everything lies in the node's own folder, in atomic files, so that each turn may be a new process:

    experiment.toml keys.toml node.pem    what the node's operator put there
    resolved.json checkpoints/ ledger.jsonl metrics.jsonl summary.json    as of any run (run_dir.py)
    sent/000012.signed                    its own last messages: of one round it never signs two

A round counts once its checkpoint is written, which carries the head (swarm/relayed.py) with it. Nothing the relay
sends raises: what is wrong is answered with a reason, and a line in the node's ledger.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assay import checkpoint, run_dir, track
from assay.config import ConfigError, SwarmExperiment, parse_any
from assay.contribution import Refusal
from assay.engines import journal
from assay.engines.relay import Answer, Request, Status
from assay.engines.swarm_world import (
    World,
    absorb,
    answer,
    build,
    kinds_of,
    model_sha256,
    plan_of,
    restore,
    save,
    start,
)
from assay.ledger import Ledger
from assay.progress import Silent
from assay.swarm import summary
from assay.swarm.keys import public_hex, read_key, read_keys
from assay.swarm.relayed import (
    Heard,
    about_mine,
    genesis,
    hear,
    majority,
    plan_bytes,
    plan_sha256,
    shared_by,
)
from assay.swarm.signed import Keys, Statement, parse, sign
from assay.verdict import Reason
from assay.wire import WireError, encode_rollout

SENT = "sent"
KEPT = 2  # own messages that are kept: of the round that is open, and of the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A node: its name, its folder, the run as its operator wrote it down, and the keys.

    `quorum`: how many nodes must hold this node's head before it goes on (None: more than half of all). `malicious`:
    plays the experiment's attack, if the experiment has this node among the malicious ones; for simulations and tests.
    """

    node: str
    folder: Path
    experiment: SwarmExperiment
    keys: Path
    key: Path
    quorum: int | None = None
    malicious: bool = False

    def __post_init__(self) -> None:
        nodes = self.experiment.swarm.nodes
        if self.node not in kinds_of(self.experiment):
            raise ConfigError(f"node {self.node!r} is not of this experiment: its nodes are node-0 to node-{nodes - 1}")
        if self.quorum is not None and not 1 <= self.quorum <= nodes:
            raise ConfigError(f"quorum is {self.quorum}: give a number from 1 to {nodes}, or leave it out")
        track.check(self.experiment.track)


class _Refused(Exception):
    """The relay's doing; `refusal` goes into the ledger."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def turn(settings: Settings, request: Request) -> Answer:
    """Answer one request. ConfigError for what is wrong with the node's own files, never for what the relay sent."""
    with journal.locked(settings.folder):
        node = _open(settings)
        try:
            return node.turn(request)
        except _Refused as refused:
            node.note(request.round, refused.reason, str(refused))
            return node.says("refused", reason=refused.reason.value, sentence=str(refused))


@dataclass(frozen=True, slots=True)
class _Built:
    """What every turn of a node needs anew: the world before round 1, with a copy of the weights it begins with."""

    world: World
    identity: dict[str, Any]
    model: dict[str, Any]
    first: dict[str, dict[str, Any]]


@lru_cache(maxsize=4)
def _built(experiment: str, kind: str) -> _Built:
    """Model, task and defence, once a process; a turn overwrites all that a round changes."""
    parsed = parse_any(json.loads(experiment))
    assert isinstance(parsed, SwarmExperiment)
    world, identity, model = build(parsed, Silent(), kinds=(kind,))
    return _Built(world, identity, model, {name: learner.tensors() for name, learner in world.learners.items()})


def _open(settings: Settings) -> Node:
    at = time.perf_counter()
    run_dir.commit()
    folder = settings.folder
    built = _built(settings.experiment.model_dump_json(), kinds_of(settings.experiment)[settings.node])
    honest = frozenset() if settings.malicious else {settings.node}
    world = replace(built.world, memory=dict(built.world.memory), malicious=built.world.malicious - honest)
    keys, key = read_keys(settings.keys, world.nodes), read_key(settings.key)
    if public_hex(key) != public_hex(keys[settings.node]):
        raise ConfigError(f"{settings.key}: is not the key that {settings.keys} has for {settings.node}")
    resolved = {"experiment": built.identity["experiment"], "model": built.model, "node": settings.node}
    run_id = journal.claim(folder, built.identity, resolved, "")
    if (owner := json.loads((folder / run_dir.RESOLVED).read_text()).get("node")) != settings.node:
        raise ConfigError(f"{folder}: is the folder of {owner}; give each node its own")
    found = checkpoint.load_latest(folder / run_dir.CHECKPOINTS)
    head = genesis(world.rules.run, keys, built.identity)
    if found is not None:
        restore(world, found)
        head = str(found.meta["head"])
        journal.publish(folder, found.step, found.meta["entry"], found.meta["row"])
        return Node(settings, world, keys, key, head, built.model)
    for name, learner in world.learners.items():
        learner.load(built.first[name])
    entry, row = start(world, run_id, time.perf_counter() - at)
    save(world, folder, {**entry, "node": settings.node, "head": head}, row, {"head": head})
    return Node(settings, world, keys, key, head, built.model)


@dataclass(slots=True)
class Node:
    """A node between two messages: `world` after the last round it learnt, `head` after that round's pool."""

    settings: Settings
    world: World
    keys: Keys
    key: Ed25519PrivateKey
    head: str
    model: dict[str, Any]

    def turn(self, request: Request) -> Answer:
        """See the module's `turn`."""
        learnt, end = self.world.round, self.settings.experiment.swarm.iterations + 1
        if not learnt < request.round <= end:
            sentence = f"asked for round {request.round} when {learnt} of {end - 1} are learnt"
            raise _Refused(Reason.WRONG_ROUND, sentence)
        heard = self._hear(request)
        self._agree(heard)
        for one in heard:
            self._learn(one)
        if self.world.round + 1 < request.round:
            return self.says("behind")
        if request.round == end:
            self._finish()
            return self.says("done")
        plan = plan_of(self.world, request.round)
        if request.plan != plan_bytes(plan):
            raise _Refused(
                Reason.WRONG_PLAN, f"the plan of round {request.round} is not the one that follows from the run"
            )
        return replace(self.says("ok"), message=self._message(request.round))

    def says(self, status: Status, *, reason: str = Reason.OK.value, sentence: str = "") -> Answer:
        """An answer without a message."""
        return Answer(
            status=status, learnt=self.world.round, head=self.head, model=model_sha256(self.world), reason=reason,
            sentence=sentence,
        )  # fmt: skip

    def note(self, round: int, reason: Reason, sentence: str) -> None:
        """A line in the ledger about the relay, once as long as it goes on."""
        ledger = Ledger(self.settings.folder / run_dir.LEDGER)
        body = {"round": round, "reason": reason.value, "sentence": sentence}
        if not (ledger.entries and (ledger.entries[-1]["kind"], ledger.entries[-1]["body"]) == ("relay", body)):
            ledger.append("relay", body)

    def _hear(self, request: Request) -> list[Heard]:
        """The pools this node lacks, as far as they follow on each other, opened; nothing is learnt yet."""
        out: list[Heard] = []
        for index in range(self.world.round + 1, request.round):
            if index not in request.pools:
                break
            try:
                plan, head = plan_of(self.world, index), out[-1].head if out else self.head
                out.append(hear(request.pools[index], plan=plan, rules=self.world.rules, keys=self.keys, head=head))
            except WireError as error:
                raise _Refused(error.reason, f"pool of round {index}: {error}") from None
        return out

    def _agree(self, heard: list[Heard]) -> None:
        """Every pool says what the others had received before it: a quorum must have received the same.

        A node that was there counts itself; for rounds it missed it has only the others' word. So what it is told now is
        checked against what they signed then, but for the last pool, which only the next one can confirm.
        """
        nodes, held = self.world.nodes, self.head
        quorum = self.settings.quorum or majority(len(nodes))
        for at, one in enumerate(heard):
            count = shared_by(one, held, self.settings.node if at == 0 else None)
            if count < quorum:
                other = sorted(n for n, head in one.votes.items() if head != held and n != self.settings.node)
                told = f"{', '.join(other)} signed another" if other else "nobody signed another, too few have spoken"
                sentence = (
                    f"pool of round {one.plan.round}: {count} of {len(nodes)} nodes hold this node's pools, {told}"
                )
                raise _Refused(Reason.WRONG_POOL if other else Reason.MISSING, f"{sentence}; {quorum} are needed")
            held = one.head

    def _learn(self, heard: Heard) -> None:
        index, folder = heard.plan.round, self.settings.folder
        path = _sent(folder, index)
        own = about_mine(heard, self.settings.node, (path.read_bytes() or None) if path.exists() else None)
        before = model_sha256(self.world)
        entry, row = absorb(self.world, heard.gathered(self.world.reading), before, {})
        entry["relay"] = {"pool": heard.sha256, "head": heard.head, "own": None if own is None else _told(own)}
        save(self.world, folder, entry, row, {"head": heard.head})
        self.head = heard.head

    def _message(self, index: int) -> bytes:
        """This node's message of the round, signed once and kept; empty if it has nothing to say."""
        path, plan = _sent(self.settings.folder, index), plan_of(self.world, index)
        if path.exists():  # the relay asks again, or this process died before it could answer
            kept = path.read_bytes()
            if kept and parse(kept, len(kept))[0].head != self.head:
                raise _Refused(Reason.WRONG_POOL, f"round {index} was signed before, after other pools than these")
            return kept
        made = answer(self.world, plan, model_sha256(self.world), only=(self.settings.node,))
        message = b""
        if self.settings.node in made:
            statement = Statement(
                run=self.world.rules.run, round=index, node=self.settings.node, plan=plan_sha256(plan), head=self.head,
                contents=encode_rollout(made[self.settings.node], run=self.world.rules.run),
            )  # fmt: skip
            message = sign(statement, self.key)
        checkpoint.write_atomic(path, message)
        for old in sorted(path.parent.glob("*.signed"))[:-KEPT]:
            old.unlink(missing_ok=True)
        return message

    def _finish(self) -> None:
        """Close the ledger and write the summary, once."""
        folder, experiment = self.settings.folder, self.settings.experiment
        if run_dir.read_summary(folder) is not None:
            return
        rows, world = run_dir.read_metrics(folder), self.world
        found = summary.summarise(experiment, rows, world.kind_of, world.malicious, self.model, "")
        found["ledger"] = journal.close(folder, world.round, model_sha256(world))
        found["defence"] = next(iter(world.learners.values())).defence.summary()
        found |= {"node": self.settings.node, "fingerprint": model_sha256(world), "head": self.head}
        checkpoint.write_json(folder / run_dir.SUMMARY, found)
        with track.following(experiment, folder):  # now only: each turn may be a process of its own
            pass


def _sent(folder: Path, index: int) -> Path:
    return folder / SENT / f"{index:06d}.signed"


def _told(refusal: Refusal) -> dict[str, str]:
    return {"reason": refusal.reason, "sentence": refusal.sentence}
