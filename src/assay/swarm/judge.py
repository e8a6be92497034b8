"""A language model reads rewarded completions and accepts or rejects them (Hail to the Thief, defences).

Reward becomes r_rlvr * r_judge: a rejected completion keeps its place in the group with reward 0. Two styles as in the
paper: `criticism` writes its doubts before the decision, `decision` only decides (there it let 86% of TEXT pass instead
of 4%, and accepted 95% of honest solutions instead of 75%). What is no decision (time-out, refusal, nonsense, an
outage) is an abstention, for which the operator says whether it rejects (default) or passes. Prompts, fences and the
parse are in judge_chat.py, local models in judge_model.py, endpoints in judge_http.py.

None of this makes a weak judge a good one: SmolLM2-135M repeats its input and abstains from everything (3 honest and 3
TEXT solutions, both styles, one beam, 12 and 60 tokens).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from assay.config import ConfigError, check
from assay.contribution import Completion, Pool
from assay.swarm.judge_chat import (
    CLOSING,
    DECIDE,
    SYSTEM,
    USER,
    Answer,
    Backend,
    Decision,
    Message,
    Part,
    Style,
    answers_itself,
    clean,
    compose,
    draw_fence,
    parse,
)
from assay.swarm.judge_http import Endpoint, HttpJudge
from assay.swarm.judge_model import Generation, LocalJudge, SelfJudge
from assay.verdict import Reason, State, Verdict

__all__ = [
    "Answer",
    "Backend",
    "Endpoint",
    "Generation",
    "HttpJudge",
    "Judge",
    "LocalJudge",
    "Message",
    "Part",
    "SelfJudge",
    "make_judge",
    "make_self_judge",
]

Abstain = Literal["pass", "reject"]
MAX_TOKENS: dict[Style, int] = {"criticism": 256, "decision": 16}
SAYING = 160  # characters of the judge's answer that are kept in a sentence


@dataclass(frozen=True, slots=True)
class _Said:
    """What is known of one text. `failed`: the backend gave no answer, so it is asked again another time."""

    decision: Decision
    sentence: str
    hidden: int
    tokens_in: int = 0
    tokens_out: int = 0
    failed: bool = False
    latency: float = 0.0
    cost: float = 0.0

    def as_list(self) -> list[Any]:
        return [self.decision, self.sentence, self.hidden]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Screen: a language model's word on every rewarded completion; the others pass unjudged, for there is nothing
    to take from them.

    A completion longer than `max_chars` is not shown in part: the judge abstains from what it cannot read. One that
    holds a decision of its own is rejected unasked, lest a judge that echoes speak it. The last
    `memory` decisions are remembered in the state (so that a resumed run decides alike), by a hash of question, text,
    style, prompt and backend; equal completions of a pool are judged once. An answer the backend failed to give is
    not remembered. What answers cost is counted: tokens, seconds of waiting (`latency`), money where the backend has
    prices. `seed` (the receiver's own) draws fences and samples. State: `seen` (oldest first), `counts`.
    Score: 0 accepted, 0.5 abstained, 1 rejected, NaN unjudged.
    """

    backend: Backend
    style: Style = "criticism"
    abstain: Abstain = "reject"
    seed: int = 0
    max_chars: int = 8_000
    max_tokens: int | None = None
    memory: int = 512
    name: str = "judge"

    def __post_init__(self) -> None:
        for key, value, known in (("style", self.style, Style), ("abstain", self.abstain, Abstain)):
            if value not in get_args(known):
                raise ConfigError(f"{self.name}.{key}: {value!r} is unknown; known are {', '.join(get_args(known))}")
        if self.max_chars < 1 or self.memory < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ConfigError(f"{self.name}: max_chars and max_tokens must be at least 1, memory at least 0")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        """One verdict for each completion of the pool, and the state with what was decided."""
        start = time.perf_counter()
        seen = {key: _Said(*said) for key, *said in state.get("seen", [])}
        keys: dict[int, str] = {}
        asked: dict[str, int] = {}
        for row, reward in enumerate(pool.rewards):
            if reward > 0:
                key = keys[row] = self.key(pool.questions[row], pool.texts[row])
                if key in seen:
                    seen[key] = seen.pop(key)  # used last: forgotten last
                else:
                    asked.setdefault(key, row)
        new = self._ask(pool, asked)
        known = seen | new
        seconds = (time.perf_counter() - start) / max(1, len(pool.completions))
        verdicts, counts = [], dict(state.get("counts", {}))
        for row, completion in enumerate(pool.completions):
            said = known[keys[row]] if row in keys else None
            fresh = row in keys and asked.get(keys[row]) == row
            verdicts.append(self._verdict(completion, said, fresh, seconds))
            for name in _counted(said, fresh):
                counts[name] = counts.get(name, 0) + 1
        for name in ("tokens_in", "tokens_out", "latency", "cost"):
            spent = sum(getattr(said, name) for said in new.values())
            if spent or name.startswith("tokens"):  # a local judge has no latency and no price of its own
                counts[name] = counts.get(name, 0) + spent
        seen |= {key: said for key, said in new.items() if not said.failed}
        kept = list(seen.items())[max(0, len(seen) - self.memory) :]
        return verdicts, {"seen": [[key, *said.as_list()] for key, said in kept], "counts": counts}

    def key(self, question: str, text: str) -> str:
        """Hash of everything a decision depends on but the draw of the sampler."""
        prompt = [SYSTEM, USER, CLOSING[self.style], DECIDE]
        told = json.dumps([self.backend.id, prompt, self.seed, self.max_chars, self.max_tokens, question, text])
        return hashlib.sha256(b"assay.judge.1|" + told.encode()).hexdigest()[:32]

    def _ask(self, pool: Pool, asked: dict[str, int]) -> dict[str, _Said]:
        """What the backend says of the rows of `asked`, by key."""
        out: dict[str, _Said] = {}
        prompts, fences = {}, {}
        for key, row in asked.items():
            length = len(pool.texts[row])
            if length > self.max_chars:
                out[key] = _Said("abstain", f"{length} characters, more than max_chars = {self.max_chars}: not read", 0)
                continue
            text, hidden = clean(pool.texts[row])
            if answers_itself(text):
                out[key] = _Said("reject", "the solution answers for its judge", hidden)
                continue
            task, _ = clean(pool.questions[row])
            fences[key] = draw_fence(self.seed, key, task + "\n" + text)
            prompts[key] = compose(self.style, fences[key], task, text)
            out[key] = _Said("abstain", "", hidden)
        if not prompts:
            return out
        digest = hashlib.sha256(f"{self.seed}|{'|'.join(prompts)}".encode()).digest()
        try:
            answers = self.backend.generate(
                list(prompts.values()),
                max_tokens=self.max_tokens or MAX_TOKENS[self.style],
                seed=int.from_bytes(digest[:7], "big"),
            )
            if len(answers) != len(prompts):
                raise ValueError(f"{len(answers)} answers to {len(prompts)} prompts")
        except Exception as error:  # noqa: BLE001 - an outage of the judge is data: every row abstains and says why
            problem = f"the judge failed: {type(error).__name__}: {error}"
            answers = [Answer(problem=problem)] * len(prompts)
        return out | {key: _read(answer, fences[key], out[key].hidden) for key, answer in zip(prompts, answers)}

    def _verdict(self, completion: Completion, said: _Said | None, fresh: bool, seconds: float) -> Verdict:
        if said is None:
            return Verdict(
                participant=completion.participant, contribution=completion.sha256, screen=self.name, weight=1.0,
                sentence="not rewarded, so not judged", evidence={"judged": 0.0}, seconds=seconds,
            )  # fmt: skip
        refused = said.decision == "reject" or (said.decision == "abstain" and self.abstain == "reject")
        reason = {"accept": Reason.OK, "reject": Reason.JUDGE, "abstain": Reason.ABSTAINED}[said.decision]
        return Verdict(
            participant=completion.participant,
            contribution=completion.sha256,
            screen=self.name,
            weight=0.0 if refused else 1.0,
            reason=reason,
            sentence=f"{said.decision}: {said.sentence}" if said.sentence else said.decision,
            score={"accept": 0.0, "abstain": 0.5, "reject": 1.0}[said.decision],
            evidence={
                "judged": 1.0,
                "cached": float(not fresh),
                "hidden": float(said.hidden),
                "tokens_in": float(said.tokens_in if fresh else 0),
                "tokens_out": float(said.tokens_out if fresh else 0),
                "latency": said.latency if fresh else 0.0,
                "cost": said.cost if fresh else 0.0,
            },
            seconds=seconds,
            effect="no_reward",
        )


def _read(answer: Answer, fence: str, hidden: int) -> _Said:
    """An answer as decision and sentence."""
    said = _Said(
        "abstain", answer.problem[:SAYING], hidden, answer.tokens_in, answer.tokens_out, bool(answer.problem),
        answer.seconds, answer.cost,
    )  # fmt: skip
    if said.failed:
        return said
    decision, why = parse(answer.text, fence)
    criticism = " ".join(clean(answer.text)[0].split())
    if decision != "abstain":
        criticism = criticism[: -len("decision: reject")].rstrip()
    return replace(said, decision=decision, sentence=why or criticism[:SAYING])


def _counted(said: _Said | None, fresh: bool) -> tuple[str, ...]:
    """Names of the counts that a row adds to."""
    if said is None:
        return ("unjudged",)
    word = {"accept": "accepted", "reject": "rejected", "abstain": "abstained"}[said.decision]
    return ("judged" if fresh else "cached", word, *(["failed"] if said.failed else []))


@lru_cache(maxsize=1)
def _local(model: str, dtype: str, settings: Generation) -> LocalJudge:
    """Nodes simulated in one process share the weights of their judge."""
    return LocalJudge(model, dtype, settings)


def make_judge(
    model: str,
    *,
    seed: int = 0,
    url: str = "",
    dtype: str = "auto",
    style: Style = "criticism",
    abstain: Abstain = "reject",
    max_chars: int = 8_000,
    max_tokens: int | None = None,
    memory: int = 512,
    **generation: Any,
) -> Judge:
    """The screen `judge` on a local model, or on the model of that name behind `url` (an OpenAI-compatible `.../v1`).

    `generation` are keys of `Generation` or of `Endpoint`. ConfigError if it cannot be had.
    """
    backend: Backend = (
        HttpJudge(url, model, check(Endpoint, generation))
        if url
        else _local(model, dtype, check(Generation, generation))
    )
    return Judge(
        backend=backend,
        style=style,
        abstain=abstain,
        seed=seed,
        max_chars=max_chars,
        max_tokens=max_tokens,
        memory=memory,
    )


def make_self_judge(
    model: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    style: Style = "criticism",
    abstain: Abstain = "reject",
    max_chars: int = 8_000,
    max_tokens: int | None = None,
    **generation: Any,
) -> Judge:
    """The screen `self_judge`: the trained model judges. It remembers nothing, for its weights change every round."""
    if model is None or tokenizer is None:
        raise ConfigError("self_judge needs the model in training; use judge with the name of a model")
    return Judge(
        backend=SelfJudge(model, tokenizer, check(Generation, generation)),
        style=style,
        abstain=abstain,
        seed=seed,
        max_chars=max_chars,
        max_tokens=max_tokens,
        memory=0,
        name="self_judge",
    )
