"""The swarm's relay as a Flower ServerApp: `assay.engines.flower.swarm_relay:app`.

One message a round carries the pool of the round before and the plan of this one; the replies are the next pool. The
relay reads no completion and learns nothing. It checks signatures only so that rubbish, or a message under another
node's name, does not take an honest one's place; nodes check all of it again. Its run config:

    folder="/srv/swarm/relay"    needed: earlier pools lie here, in atomic files
    experiment= keys=            default: experiment.toml and keys.toml in the folder
    mail=                        in place of an experiment, for trainers that bring their own plans (docs/TRL.md); default:
                                 mail.toml in the folder, if it is there
    timeout= poll=               seconds: how long a round waits for answers (600), between two looks (1.0)
    attempts=                    how often a round is asked again until a quorum has answered (10)
    keep-pools=                  pools that are kept for nodes that missed rounds (256)

A relay that is started again goes on after the last pool it has written. A node that lacks pools says so and is sent
them within the round. A round is closed when a quorum of nodes (more than half) has answered with the relay's own
history: with fewer no node would go on from it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from assay import checkpoint, config
from assay.config import ConfigError, SwarmExperiment
from assay.engines import journal
from assay.engines.flower.agenda import agenda_of
from assay.engines.flower.guard import GuardedGrid
from assay.engines.flower.swarm_records import read_answer, request_content
from assay.engines.relay import Answer, Mail, Request, read_mail
from assay.swarm.relayed import encode_pool, majority
from assay.swarm.signed import OVERHEAD, verified
from assay.verdict import Reason
from assay.wire import WireError

log = logging.getLogger("flwr")
CATCH_UP = 8
"""Earlier pools in one message at most; a node that lacks more comes back for the rest."""
ANSWER_BYTES = 1 << 16  # of an answer besides its message
DEFAULTS = {"timeout": 600.0, "poll": 1.0, "attempts": 10, "keep-pools": 256}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """What the relay's operator says; see the module."""

    folder: Path
    experiment: SwarmExperiment | Mail
    keys: Path
    timeout: float = 600.0
    poll: float = 1.0
    attempts: int = 10
    keep_pools: int = 256

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.keep_pools < 1:
            raise ConfigError(
                f"attempts is {self.attempts}, keep-pools is {self.keep_pools}: give numbers of at least 1"
            )


def settings_of(context: Context) -> RelaySettings:
    """The relay's settings from the run's config. ConfigError says which key is missing."""
    given: dict[str, Any] = {**DEFAULTS, **context.run_config}
    if not isinstance(given.get("folder"), str):
        raise ConfigError("the relay needs folder in the run config: flwr run . --run-config 'folder=\"/srv/relay\"'")
    folder = Path(given["folder"])
    return RelaySettings(
        folder=folder,
        experiment=_carried(given, folder),
        keys=Path(given.get("keys", folder / "keys.toml")),
        timeout=float(given["timeout"]),
        poll=float(given["poll"]),
        attempts=int(given["attempts"]),
        keep_pools=int(given["keep-pools"]),
    )


def _carried(given: Mapping[str, Any], folder: Path) -> SwarmExperiment | Mail:
    mail = Path(given.get("mail") or folder / "mail.toml")
    if "mail" in given or ("experiment" not in given and mail.exists()):
        return read_mail(mail)
    experiment = config.load(given.get("experiment", folder / "experiment.toml"))
    if not isinstance(experiment, SwarmExperiment):
        raise ConfigError(f"{folder}: the experiment is of the {experiment.wing} wing; this app is for swarms")
    return experiment


def make_app(
    settings_of: Callable[[Context], RelaySettings] = settings_of,
    on_round: Callable[[int], None] = lambda index: None,
    stopped: Callable[[], bool] = lambda: False,
) -> ServerApp:
    """The app; `settings_of` says what its operator wants, `on_round` is told of every round that is closed.

    `stopped` is asked while it waits: where the nodes' side of a simulation has died, nobody will ever answer.
    """
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        settings = settings_of(context)
        with journal.locked(settings.folder):
            Relay(settings, on_round, stopped).play(grid)

    return made


@dataclass(slots=True)
class _Round:
    """A round that is open: messages and the heads they name by swarm node; the rest by Flower node."""

    index: int
    messages: dict[str, bytes] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    told: dict[int, int] = field(default_factory=dict)


class _Grid(GuardedGrid):
    """A guarded grid that does not wait for nodes that are gone."""

    stopped: Callable[[], bool] = staticmethod(lambda: False)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.stopped():
            raise ConfigError("the simulation has ended before the run; its log says why")
        return super().pull_messages(message_ids)


class Relay:
    """Plays rounds on a grid."""

    def __init__(
        self,
        settings: RelaySettings,
        on_round: Callable[[int], None] = lambda index: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.on_round, self.stopped = settings, on_round, stopped
        self.agenda = agenda = agenda_of(settings.experiment, settings.keys)
        journal.claim(settings.folder, agenda.identity, agenda.identity, "")
        self.pools = settings.folder / "pools"
        self._learnt: dict[int, int] = {}  # Flower node -> rounds it says it has learnt

    def play(self, grid: Grid) -> None:
        """All rounds from the first that has no pool yet, and the message after the last. ConfigError without a quorum."""
        limit = OVERHEAD + self.agenda.max_contents + ANSWER_BYTES
        guarded = _Grid(grid, timeout=self.settings.timeout, poll=self.settings.poll, max_reply_bytes=limit)
        guarded.stopped = self.stopped
        self._wait(guarded)
        for index in range(self.last + 1, self.agenda.rounds + 1):
            self._keep(index, self._gather(guarded, index))
            self.on_round(index)
        self._gather(guarded, self.agenda.rounds + 1)

    @property
    def last(self) -> int:
        """The newest pool that is on the disk; 0 if there is none."""
        return max((int(path.stem) for path in self.pools.glob("[0-9]*.pool")), default=0)

    def _keep(self, index: int, messages: dict[str, bytes]) -> None:
        checkpoint.write_atomic(self._path(index), encode_pool(index, messages))
        self._path(index - self.settings.keep_pools).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.pools / f"{index:06d}.pool"

    def _wait(self, grid: Grid) -> None:
        """Until everybody is connected, or the time-out is over: the rounds will tell whether it is enough."""
        end = time.monotonic() + self.settings.timeout
        while len(list(grid.get_node_ids())) < len(self.agenda.keys) and time.monotonic() < end:
            time.sleep(self.settings.poll)

    def _gather(self, grid: GuardedGrid, index: int) -> dict[str, bytes]:
        """Ask for round `index` until a quorum holds one history -> signed messages by node."""
        round, quorum = _Round(index), majority(len(self.agenda.keys))
        for _ in range(self.settings.attempts):
            asked = [id for id in grid.get_node_ids() if id not in round.answered]
            while asked:  # again and at once only those that were sent pools they lacked
                asked = self._ask(grid, round, asked)
            held = (
                len(round.answered)
                if index > self.agenda.rounds
                else max(Counter(round.heads.values()).values(), default=0)
            )
            if held >= quorum:
                return round.messages
            log.warning("Assay: round %d has %d answers of one history, asking again", index, held)
            time.sleep(self.settings.poll)
        raise ConfigError(
            f"round {index}: no {quorum} of {len(self.agenda.keys)} nodes answered with one history; see their ledgers, and "
            "start the run again when they are back: it goes on where it stopped"
        )

    def _ask(self, grid: GuardedGrid, round: _Round, ids: list[int]) -> list[int]:
        """One message to each, and what they say; returns those that are to be sent more pools."""
        sent = [
            grid.create_message(request_content(self._request(id, round.index)), "train", id, str(round.index))
            for id in ids
        ]
        further = []
        for reply in grid.send_and_receive(sent):
            id, answer = reply.metadata.src_node_id, self._read(reply)
            if answer is None:
                continue
            self._learnt[id] = answer.learnt
            if answer.status == "behind":
                if not self._path(answer.learnt + 1).exists():
                    log.warning("Assay: node %s lacks pool %d, which is not kept", id, answer.learnt + 1)
                elif round.told.get(id, -1) < answer.learnt:  # it has got further, or has just said where it stands
                    round.told[id] = answer.learnt
                    further.append(id)
                continue
            round.answered.add(id)
            if answer.status == "refused":
                log.warning("Assay: node %s refuses: %s: %s", id, answer.reason, answer.sentence)
            elif answer.status == "ok" and answer.message:
                self._take(id, round, answer.message)
        return further

    def _request(self, id: int, index: int) -> Request:
        """The pool of the round before; for a node that is behind, those it lacks."""
        first = min(self._learnt.get(id, index - 2), index - 2) + 1
        wanted = range(max(1, first), min(index, max(1, first) + CATCH_UP))
        pools = {i: self._path(i).read_bytes() for i in wanted if self._path(i).exists()}
        return Request(round=index, plan=self.agenda.plan(index) if index <= self.agenda.rounds else b"", pools=pools)

    def _read(self, reply: Message) -> Answer | None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            log.warning("Assay: node %s: %s", node, reply.error.reason)
            return None
        try:
            return read_answer(reply.content, OVERHEAD + self.agenda.max_contents)
        except WireError as error:
            log.warning("Assay: answer of node %s refused: %s: %s", node, error.reason.value, error)
            return None

    def _take(self, id: int, round: _Round, message: bytes) -> None:
        """A message for the pool, if it is the first one that its node's key has signed for this round."""
        try:
            statement = verified(message, self.agenda.keys, self.agenda.max_contents)
            if (statement.run, statement.round) != (self.agenda.run, round.index):
                raise WireError(Reason.WRONG_ROUND, f"signed for round {statement.round}, expected {round.index}")
            if statement.node in round.messages:
                raise WireError(Reason.DUPLICATE, f"a second message of {statement.node}")
        except WireError as error:
            log.warning("Assay: message of node %s is left out: %s: %s", id, error.reason.value, error)
            return
        round.messages[statement.node], round.heads[statement.node] = message, statement.head


app = make_app()
