"""`Screened`: any Message-API strategy of Flower, with Assay's screens between the clients' replies and it.

Legend: N participants, D flattened adapter.
"""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from assay import run_dir
from assay.config import ConfigError
from assay.contribution import Refusal, Round, Tensors, flatten, tensors_sha256, unflatten
from assay.engines.flower.acting import Acting, acting_of, describe, drawn, inner_attribute, relative
from assay.engines.flower.arrays import decode_arrays, encode_arrays, form_of
from assay.engines.flower.asking import Asked, array_names, nodes_of, sort_replies
from assay.engines.flower.guard import GuardedGrid
from assay.engines.flower.replies import (
    Limits,
    Protocol,
    Reply,
    participant_of,
    read_evaluation,
    read_training,
    shared_metrics,
)
from assay.federated.aggregators import ToleranceError
from assay.federated.canary import Gate, GateResult
from assay.federated.round import Outcome
from assay.ledger import Ledger
from assay.verdict import Screen, State, screen_round
from assay.wire import WireError

log = logging.getLogger("flwr")  # Flower's own, so that it shows where the operator looks
Aggregated = tuple[ArrayRecord | None, MetricRecord | None]


class Screened(Strategy):
    """Screens what clients reply before `strategy`, stock or foreign, aggregates it; everything else is delegated.

    `strategy`: a Message-API strategy; those of Flower's differential privacy go inside, not outside.
    `screens`: run over each round (assay.verdict); their memory is `states`, JSON to be saved and handed in again.
    `monitor`: names of screens that are recorded and do not act.
    `max_examples`: a client's num-examples is a claim and counts up to here; 1: every client counts the same.
    `claims`: metrics the strategy acts upon with the range a client's claim is clipped to, `{"train_loss": (0.1, 10)}`;
    replies without one are refused. `ledger`: a directory for the hash-chained record of the run.
    `arrays_name`, `metrics_name`: what the strategy calls the records of a reply; by default what was sent, "metrics".
    `seed`: of the draw (acting.py); drawn itself if not given, and to be kept from clients.
    `gate`: the canary on what the strategy made (federated.canary.Gate). Where it does not pass, the round is rolled back:
    the model stays as it was, and so does what the strategy remembers, as far as that can be copied.

    What the strategy sees of a reply: the arrays as read (in the order and dtypes that were sent), the count, and the
    metrics that all replies share. A round in which nobody is admitted, or in which the strategy fails on screened
    replies or returns what is no model, leaves the model as it is and says so. Raises ConfigError for what the operator
    got wrong. `outcome` is the last
    round's screening, `refused_evaluations` the last evaluation's refusals.

    >>> from flwr.serverapp.strategy import FedAvg
    >>> from assay.federated.screens import Duplicate, Norm, Structure
    >>> strategy = Screened(FedAvg(), screens=[Structure(), Norm(None), Duplicate()])
    >>> strategy.acting.how
    'counts'
    """

    def __init__(
        self,
        strategy: Strategy,
        screens: Sequence[Screen],
        *,
        monitor: Iterable[str] = (),
        max_examples: float = 1,
        claims: Mapping[str, tuple[float, float]] | None = None,
        limits: Limits | None = None,
        ledger: str | Path | None = None,
        states: Mapping[str, State] | None = None,
        arrays_name: str | None = None,
        metrics_name: str = "metrics",
        batch_size: int = 1,
        seed: int | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.strategy = strategy
        self.screens, self.monitor = tuple(screens), frozenset(monitor)
        self.acting: Acting = acting_of(strategy)
        self.max_examples = max_examples
        self.protocol = Protocol(
            count=inner_attribute(strategy, "weighted_by_key", "num-examples"),
            ranges=_ranges(self.acting, claims or {}),
            limits=limits or Limits(),
        )
        self.states: dict[str, State] = dict(states or {})
        self.arrays_name, self.metrics_name, self.batch_size = arrays_name, metrics_name, batch_size
        self.seed = secrets.randbits(64) if seed is None else seed
        self.gate = gate
        self.outcome: Outcome | None = None
        self.refused_evaluations: tuple[Refusal, ...] = ()
        self._initial: Tensors | None = None
        self._training: Asked | None = None
        self._evaluating: Asked | None = None
        self._check()
        self._ledger = _open(ledger)

    def _check(self) -> None:
        names = [screen.name for screen in self.screens]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"screens: {twice[0]} is named twice; a weight would count twice")
        if stray := sorted(self.monitor - set(names)):
            raise ConfigError(f"monitor: no screen {stray[0]!r}; there are {', '.join(names) or 'none'}")
        if cutting := [s.name for s in self.screens if getattr(s, "cuts_rows", False) and s.name not in self.monitor]:
            raise ConfigError(
                f"screens: {cutting[0]} wants rows cut to length, but a strategy merges whole replies; use acts='weight'"
            )
        if not 1 <= self.max_examples <= 1e9:
            raise ConfigError(f"max_examples must be from 1 to 1e9, got {self.max_examples}")

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # asked for before it is set, as copying and unpickling do
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def summary(self) -> None:
        """Log what is screened, how weights act, and the strategy's own summary."""
        screens = ", ".join(s.name + (" (monitor)" if s.name in self.monitor else "") for s in self.screens)
        log.info("\t├──> Assay:")
        log.info("\t│\t├── Screens: %s", screens or "none: replies are only read")
        log.info("\t│\t├── %s: %s", type(self.strategy).__name__, describe(self.acting))
        log.info("\t│\t├── Gate on the aggregate: %s", "none" if self.gate is None else "yes")
        log.info("\t│\t└── Claimed examples count up to: %g", self.max_examples)
        self.strategy.summary()

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """As every strategy's; a bare grid is guarded with the defaults, for replies are only as good as their source."""
        if not isinstance(grid, GuardedGrid):
            log.info("Assay: the grid is not guarded; GuardedGrid(grid) with its defaults is used")
            grid = GuardedGrid(grid)
        return super().start(grid, *args, **kwargs)

    # --- training -----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages; what they carry is what replies are compared with."""
        form, start = form_of(arrays)
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        names = {name for message in messages for name in array_names(message, form)}
        if len(names) > 1:
            raise ConfigError(
                f"messages carry arrays as {', '.join(sorted(names))}; Assay compares replies with one record"
            )
        if self._initial is None:
            self._initial = start
            self._record("start", {"model": tensors_sha256(start), **self._described()})
        self._training = Asked(server_round, nodes_of(messages), form, start, next(iter(names), "arrays"))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Read, screen, weigh, and let the strategy aggregate what is left. Replies never raise."""
        asked, self._training = self._training, None
        if asked is None or asked.round != server_round or asked.form is None or asked.start is None:
            raise ConfigError(f"round {server_round}: aggregate_train without configure_train of the same round")
        form, start = asked.form, asked.start
        read, refused = sort_replies(
            replies, asked.nodes, lambda message, node: read_training(message, node, server_round, form, self.protocol)
        )
        round = Round(
            index=server_round,
            start=start,
            initial=self._initial or start,
            updates=tuple(reply.update for reply in read if reply.update is not None),
            refused=tuple(refused),
            batch_size=self.batch_size,
        )
        # a round without updates is nothing to compare; screens keep what they remember
        screened = screen_round(round, self.screens if round.updates else (), self.states, monitor=self.monitor)
        self.states = dict(screened.states)
        weight = {reply.node: screened.weight[participant_of(reply.node)] for reply in read}
        memory = self._memory()
        after, metrics, why = self._aggregate(server_round, read, weight, asked)
        result, gate = "skipped" if after is None else "applied", None
        if self.gate is not None and after is not None:
            gate = self.gate.check(after, start, round.initial)
            if not gate.passed:
                after, result, why = None, "rolled_back", self._roll_back(gate, memory)
        self.outcome = Outcome(
            round=server_round,
            result=result,  # type: ignore[arg-type]
            why=why,
            screened=screened,
            model_before=tensors_sha256(start),
            model_after=tensors_sha256(start if after is None else after),
            gate=gate,
            num_examples={u.participant: u.num_examples for u in round.updates},
            seconds={},
        )
        self._record("round", self.outcome.ledger_body())
        _say(self.outcome)
        return (None if after is None else encode_arrays(after, form)), metrics

    def _memory(self) -> dict[str, Any] | None:
        """What the strategy remembers, where a gate may have to take a round back; None where it cannot be copied."""
        if self.gate is None:
            return None
        try:
            return copy.deepcopy(vars(self.strategy))
        except Exception as error:  # noqa: BLE001 - a foreign strategy may hold anything; said in the ledger below
            log.warning("Assay: what %s remembers cannot be copied: %s", type(self.strategy).__name__, error)
            return None

    def _roll_back(self, gate: GateResult, memory: dict[str, Any] | None) -> str:
        if memory is None:
            return f"{gate.sentence}; what {type(self.strategy).__name__} remembers of the round stays"
        vars(self.strategy).clear()
        vars(self.strategy).update(memory)
        return gate.sentence

    def _aggregate(
        self, round: int, read: Sequence[Reply], weight: Mapping[int, float], asked: Asked
    ) -> tuple[Tensors | None, MetricRecord | None, str]:
        """The model after the round, None where it stays as it is, with the reason."""
        share = relative(weight)
        if not share:
            return None, None, "no contribution was admitted"
        differ = any(w < 1 for w in share.values())
        own = self.acting.own if self.acting.how == "own" and differ else None
        if own is not None:
            present = [reply for reply in read if reply.node in share]
            try:
                return self._own(own(len(present)), present, share, asked)
            except ToleranceError as error:  # peers decide how many remain and with which weights
                log.warning("Assay: %s; the round is drawn", error)
        if self.acting.how != "counts" and differ:
            taking = drawn(share, self.seed, round)
            share = {node: 1.0 for node in share if taking[node]}
        present = [reply for reply in read if reply.node in share]
        messages = self._messages(present, [share[reply.node] for reply in present], asked)
        try:
            arrays, metrics = self.strategy.aggregate_train(round, messages)
        except Exception as error:  # peers decide how many remain: they must not end the run; said aloud
            log.exception("Assay: %s failed on screened replies", type(self.strategy).__name__)
            return None, None, f"{type(self.strategy).__name__} failed: {type(error).__name__}: {error}"
        if arrays is None:
            return None, metrics, f"{type(self.strategy).__name__} did not aggregate"
        assert asked.form is not None
        try:
            return decode_arrays(arrays, asked.form, max_abs_value=np.inf), metrics, ""
        except WireError as error:
            log.error("Assay: what %s made is no model: %s", type(self.strategy).__name__, error)
            return None, None, f"what {type(self.strategy).__name__} made is no model: {error}"

    def _own(
        self, aggregate: Callable[..., Any], present: Sequence[Reply], share: Mapping[int, float], asked: Asked
    ) -> tuple[Tensors, MetricRecord | None, str]:
        """Assay's weighted rule for one of Flower's that knows no weights. ToleranceError as the rule's."""
        assert asked.start is not None
        start_D = flatten(asked.start)
        delta_ND = np.stack([flatten(reply.update.tensors) - start_D for reply in present if reply.update])
        delta_D = aggregate(delta_ND, [share[reply.node] for reply in present])
        messages = self._messages(present, [share[reply.node] for reply in present], asked)
        metrics = self.strategy.train_metrics_aggr_fn(  # type: ignore[attr-defined] # all of these are FedAvg
            [message.content for message in messages], self.protocol.count
        )
        return unflatten(start_D + delta_D, asked.start), metrics, ""

    def _messages(self, replies: Sequence[Reply], shares: Sequence[float], asked: Asked) -> list[Message]:
        """Replies as the strategy shall see them: nothing in them that was not read."""
        counts = [self._count(reply, share) for reply, share in zip(replies, shares)]
        records = shared_metrics(replies, counts, self.protocol.count)
        out = []
        for reply, record in zip(replies, records):
            content = RecordDict({self.metrics_name: record})
            if reply.update is not None and asked.form is not None:
                content[self.arrays_name or asked.name] = encode_arrays(reply.update.tensors, asked.form)
            out.append(make_message(reply.metadata, content=content))
        return out

    def _count(self, reply: Reply, share: float) -> int | float:
        capped = min(reply.count, self.max_examples)
        return capped if share == 1 else capped * share

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages."""
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        self._evaluating = Asked(server_round, nodes_of(messages))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, over well-formed replies with capped counts: metrics of clients are claims, whoever sums them."""
        asked, self._evaluating = self._evaluating, None
        if asked is None or asked.round != server_round:
            raise ConfigError(f"round {server_round}: aggregate_evaluate without configure_evaluate of the same round")
        read, refused = sort_replies(replies, asked.nodes, lambda m, node: read_evaluation(m, node, self.protocol))
        self.refused_evaluations = tuple(refused)
        for refusal in refused:
            log.warning("Assay: evaluation by node %s: %s: %s", refusal.participant, refusal.reason, refusal.sentence)
        if not read:
            return None
        try:
            return self.strategy.aggregate_evaluate(server_round, self._messages(read, [1.0] * len(read), asked))
        except Exception:
            log.exception("Assay: %s failed on the metrics of well-formed replies", type(self.strategy).__name__)
            return None

    # --- records ------------------------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        return {
            "strategy": type(self.strategy).__name__,
            "acting": describe(self.acting),
            "screens": [screen.name for screen in self.screens],
            "monitor": sorted(self.monitor),
            "max_examples": self.max_examples,
            "gate": self.gate is not None,
        }

    def _record(self, kind: str, body: Mapping[str, Any]) -> None:
        if self._ledger is not None:
            self._ledger.append(kind, body)


def _ranges(acting: Acting, claims: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """What claims are clipped to: the operator's ranges, and those that follow from the strategy."""
    ranges = {name: known for name, known in acting.needs.items() if known is not None} | dict(claims)
    for name in acting.needs:
        if name not in ranges:
            raise ConfigError(
                f"{acting.why}, and a client may claim any: say what to believe at most, "
                f"Screened(..., claims={{{name!r}: (0.1, 10.0)}})"
            )
    for name, (low, high) in ranges.items():
        if not -np.inf < low <= high < np.inf:
            raise ConfigError(f"claims: the range of {name!r} must be two finite numbers in order, got {(low, high)}")
    return ranges


def _open(ledger: str | Path | None) -> Ledger | None:
    if ledger is None:
        return None
    opened = Ledger(Path(ledger) / run_dir.LEDGER)
    if opened.entries:
        raise ConfigError(f"{opened.path} already holds a run: one ledger, one run; name another directory")
    return opened


def _say(outcome: Outcome) -> None:
    weight = outcome.screened.weight
    full = sum(w == 1 for w in weight.values())
    log.info("Assay: round %d: %d of %d replies at full weight", outcome.round, full, len(weight))
    for name in sorted(weight):
        if weight[name] < 1 and name in outcome.screened.deciding:
            log.warning("Assay: %s", outcome.screened.deciding[name])
    if outcome.why:
        log.warning("Assay: round %d: model unchanged: %s", outcome.round, outcome.why)
