"""What a screen says of a contribution, and how screens compose into one weight per participant.

A screen looks at all contributions of a round at once and returns one `Verdict` each. Weights multiply; the first
screen that gives zero names the reason. Screens run in `enforce` (their weight counts) or `monitor` (it is recorded
only). A screen that crashes, or that leaves a contribution without a verdict, fails closed: weight 0, reason
`screen_failed`, the error in the sentence.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from assay.contribution import Round, misfit

Mode = Literal["enforce", "monitor"]
Effect = Literal["exclude", "no_reward"]
State = dict[str, Any]  # JSON only: a checkpoint stores it


class Reason(StrEnum):
    """Why a weight is what it is. The value is the code that ledgers, reports and `--json` show.

    The set is closed; a screen of somebody else's says `OwnReason`.
    """

    OK = "ok"
    # the envelope (wire.py)
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    WRONG_KEYS = "wrong_keys"
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    NOT_FINITE = "not_finite"
    OUT_OF_RANGE = "out_of_range"
    WRONG_ROUND = "wrong_round"
    WRONG_BASE = "wrong_base"
    WRONG_PARTICIPANT = "wrong_participant"
    HASH_MISMATCH = "hash_mismatch"
    MISSING = "missing"
    # folders (wire/peft.py)
    PICKLE = "pickle"
    # signed messages, by relay (swarm/relayed.py)
    WRONG_SIGNATURE = "wrong_signature"
    WRONG_PLAN = "wrong_plan"
    WRONG_POOL = "wrong_pool"
    # screens
    STRUCTURE = "structure"
    NORM = "norm"
    PROBE = "probe"
    NEIGHBOURS = "neighbours"
    BALANCE = "balance"
    DUPLICATE = "duplicate"
    CANARY = "canary"
    REVIEW = "review"
    LOW_TRUST = "low_trust"
    CLAIM_MISSING = "claim_missing"
    CLAIM_INCONSISTENT = "claim_inconsistent"
    SPECTRAL = "spectral"
    # screens of the swarm
    WRONG_PROMPT = "wrong_prompt"
    UNREADABLE = "unreadable"
    NOT_ENDED = "not_ended"
    INCOMPLETE = "incomplete"
    GROUP = "group"
    LOGIT = "logit"
    SEEDED = "seeded"
    UNLIKELY_TOKEN = "unlikely_token"
    LENGTH = "length"
    ARITHMETIC = "arithmetic"
    IMPORTS = "imports"
    ENRICHMENT = "enrichment"
    COPYCAT = "copycat"
    JUDGE = "judge"
    ABSTAINED = "abstained"
    BANNED = "banned"
    SCREEN_FAILED = "screen_failed"


@dataclass(frozen=True, slots=True)
class OwnReason:
    """The reason of a screen that is not Assay's: `package:name`. Ledgers, reports and `--json` show it as it stands.

    Assay's own reasons have no colon, so none of these can be taken for one of them, today or later; nor does it mean
    to Assay what one of its own means: it is never a strike. ValueError for other forms and for the package `assay`.

    >>> OwnReason("assay-example-plugin:against").value
    'assay-example-plugin:against'
    """

    value: str

    def __post_init__(self) -> None:
        if not isinstance(self.value, str) or not _OWN.fullmatch(self.value) or len(self.value) > LONGEST_REASON:
            raise ValueError(
                f"reason {str(self.value)[:80]!r}: give package:name, of small letters, digits, - . and _, the name "
                f"beginning with a letter, at most {LONGEST_REASON} characters"
            )
        if self.value.startswith("assay:"):
            raise ValueError(f"reason {self.value!r}: the package assay is Assay's own; give that of the screen")

    def __str__(self) -> str:
        return self.value


_OWN = re.compile(r"[a-z0-9][a-z0-9_.-]*:[a-z][a-z0-9_.-]*")
LONGEST_REASON = 64
AnyReason = Reason | OwnReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One screen's word on one contribution.

    `weight` in [0, 1] multiplies the contribution's share; `score` is the screen's continuous suspicion (higher is
    worse; NaN where the screen has none), used for AUROC and never for weighting; `evidence` is small and numeric and
    tied to the bytes by `contribution` (sha256). What a number `x` was held against stands beside it: `x_limit`
    is the most it may be, `x_floor` the least, under `x_below` it must stay; `score_limit` is that of the score. So a
    ledger can be read without the config.

    Of a completion, weight 0 means one of two things (`effect`): `exclude`, the row is absent; `no_reward`, it stays
    with reward 0 as a bad example (Hail to the Thief: r_rlvr * r_judge). `masked` lists token positions whose loss is
    left out of a row that stays.

    `longest` is the most that the row may have of length (L2) in the aggregate: whoever merges cuts it to that.
    """

    participant: str
    contribution: str
    screen: str
    weight: float
    reason: AnyReason = Reason.OK
    sentence: str = ""
    score: float = math.nan
    evidence: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    mode: Mode = "enforce"
    effect: Effect = "exclude"
    masked: tuple[int, ...] = ()
    longest: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:  # also refuses NaN
            raise ValueError(f"{self.screen}: weight {self.weight} of {self.participant} is not in [0, 1]")
        if not self.longest >= 0.0:
            raise ValueError(f"{self.screen}: longest {self.longest} of {self.participant} is no length")
        if not isinstance(self.reason, AnyReason):
            raise TypeError(
                f"{self.screen}: reason {str(self.reason)[:80]!r} is neither a Reason nor an OwnReason('package:name')"
            )
        if self.weight == 0.0 and self.reason is Reason.OK:
            raise ValueError(f"{self.screen}: weight 0 for {self.participant} needs a reason")

    def as_dict(self) -> dict[str, Any]:
        """JSON form; NaN becomes None so that the line is strict JSON."""
        return {
            "participant": self.participant,
            "contribution": self.contribution,
            "screen": self.screen,
            "weight": self.weight,
            "reason": self.reason.value,
            "sentence": self.sentence,
            "score": None if math.isnan(self.score) else self.score,
            "evidence": {k: (v if math.isfinite(v) else None) for k, v in self.evidence.items()},
            "seconds": self.seconds,
            "mode": self.mode,
            **({} if math.isinf(self.longest) else {"longest": self.longest}),
        }

    def __str__(self) -> str:
        mark = "pass" if self.weight == 1 else "DROP" if self.weight == 0 else f"{self.weight:.2f}"
        return f"{self.participant}  {mark}  {self.screen}: {self.reason.value}  {self.sentence}".rstrip()


class Contribution(Protocol):
    """What a verdict speaks of: a `LoraUpdate` or a `Completion`."""

    @property
    def participant(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@runtime_checkable
class Screen(Protocol):
    """Anything with a name that turns a round into one verdict per contribution.

    `state` is the JSON-able memory the screen returned in the round before ({} at first): pure state in, state out,
    so that a run killed between rounds resumes exactly.
    """

    @property
    def name(self) -> str: ...

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]: ...


@runtime_checkable
class AmongAdmitted(Protocol):
    """A screen in whose verdicts one participant costs another one weight (copies share one): with `among_admitted` it
    sees only updates that no screen before it refused, so that nobody is charged for what does not count anyway."""

    among_admitted: bool


@dataclass(frozen=True, slots=True)
class Screened:
    """Outcome of a round's screening: all verdicts, the product weight and the deciding verdict per participant."""

    verdicts: tuple[Verdict, ...]
    weight: dict[str, float]
    deciding: dict[str, Verdict]
    states: dict[str, State]
    longest: dict[str, float] = field(default_factory=dict)
    """Of the participants whose row some enforced screen bounds in length: the least bound."""

    @property
    def mean_weight(self) -> float:
        return sum(self.weight.values()) / len(self.weight) if self.weight else 0.0


def screen_round(
    round: Round,
    screens: Sequence[Screen],
    states: Mapping[str, State] | None = None,
    *,
    monitor: frozenset[str] = frozenset(),
) -> Screened:
    """Run every screen over the round and multiply the enforced weights.

    Participants refused at the wire (`round.refused`) get their wire verdict and weight 0; no screen sees them, nor an
    update that does not fit the adapter (for callers without the wire): it would break screens for everybody.
    Screens after a zero still look (but for `AmongAdmitted`): their evidence is worth recording and costs the attacker
    nothing to give.
    """
    states = dict(states or {})
    verdicts: list[Verdict] = []
    weight: dict[str, float] = {}
    deciding: dict[str, Verdict] = {}
    longest: dict[str, float] = {}
    for refused in round.refused:
        verdict = Verdict(
            participant=refused.participant,
            contribution=refused.sha256,
            screen="wire",
            weight=0.0,
            reason=Reason(refused.reason),
            sentence=refused.sentence,
        )
        verdicts.append(verdict)
        weight[verdict.participant], deciding[verdict.participant] = 0.0, verdict
    for update in round.updates:
        if update.participant in weight:  # the engine's mistake: one participant, one message a round
            raise ValueError(f"{update.participant} has more than one message in round {round.index}")
        weight[update.participant] = 1.0
        if told := misfit(update.tensors, round.start):
            verdict = refusal(update, "structure", Reason.STRUCTURE, told)
            verdicts.append(verdict)
            weight[verdict.participant], deciding[verdict.participant] = 0.0, verdict
    round = replace(round, updates=tuple(u for u in round.updates if weight[u.participant] > 0))
    for screen in screens:
        seen = round
        if isinstance(screen, AmongAdmitted) and screen.among_admitted:
            seen = replace(round, updates=tuple(u for u in round.updates if weight[u.participant] > 0))
        found, states[screen.name] = run_screen(screen, seen, seen.updates, states.get(screen.name, {}))
        mode: Mode = "monitor" if screen.name in monitor else "enforce"
        for verdict in found:
            verdict = replace(verdict, mode=mode)
            verdicts.append(verdict)
            if mode == "monitor":
                continue
            if math.isfinite(verdict.longest):
                longest[verdict.participant] = min(verdict.longest, longest.get(verdict.participant, math.inf))
            before = weight[verdict.participant]
            weight[verdict.participant] = before * verdict.weight
            known = deciding.get(verdict.participant)
            # first zero wins; among graded verdicts the lowest names the reason
            if before > 0 and (known is None or verdict.weight < known.weight):
                deciding[verdict.participant] = verdict
    return Screened(tuple(verdicts), weight, deciding, states, longest)


Seen = TypeVar("Seen", contravariant=True)


class AnyScreen(Protocol[Seen]):
    """`Screen` over any kind of round."""

    @property
    def name(self) -> str: ...

    def screen(self, round: Seen, state: State, /) -> tuple[list[Verdict], State]: ...


def run_screen(
    screen: AnyScreen[Seen], round: Seen, contributions: Sequence[Contribution], state: State
) -> tuple[list[Verdict], State]:
    """One verdict for each contribution, in their order, whatever the screen did: it fails closed."""
    start = time.perf_counter()
    try:
        found, new_state = screen.screen(round, dict(state))
        by_hash = {(v.participant, v.contribution): v for v in found}
        problem = "returned no verdict"
    except Exception as error:  # noqa: BLE001 - fail closed whatever broke; recorded below, never swallowed
        by_hash, new_state = {}, state
        problem = f"crashed: {type(error).__name__}: {error}"
    seconds = (time.perf_counter() - start) / max(1, len(contributions))
    out = []
    for contribution in contributions:
        # keyed by the bytes as well as the name: evidence about other bytes is no evidence about these
        verdict = by_hash.get((contribution.participant, contribution.sha256))
        if verdict is None:
            verdict = failed(contribution, screen.name, f"{screen.name} {problem}")
        out.append(replace(verdict, seconds=verdict.seconds or seconds))
    return out, new_state


def failed(update: Contribution, screen: str, sentence: str) -> Verdict:
    """The fail-closed verdict."""
    return refusal(update, screen, Reason.SCREEN_FAILED, sentence)


def refusal(update: Contribution, screen: str, reason: AnyReason, sentence: str) -> Verdict:
    """Weight 0."""
    return Verdict(
        participant=update.participant,
        contribution=update.sha256,
        screen=screen,
        weight=0.0,
        reason=reason,
        sentence=sentence,
    )
