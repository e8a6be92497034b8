"""What a completion must be before anyone reads it. The wire refuses most of this already; a screen does not trust it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from assay.config import ConfigError
from assay.contribution import Completion, Pool, completion_sha256
from assay.swarm.screens.common import say
from assay.verdict import Effect, Reason, State, Verdict


@dataclass(frozen=True, slots=True)
class Schema:
    """Place in the plan, length, token ids, hash: anything wrong excludes the row.

    Bytes that are not UTF-8 only cost the reward: a byte-level vocabulary lets an honest model write half a character.
    Every row that claims a place (participant, prompt, index) twice is refused: which of them was meant is unknown, and
    only its own sender can make one. Whether a completion ended is the seeded check's business.
    `vocabulary`: number of token ids of the receiver's tokenizer. `eos`: its end-of-sequence token; no sampler goes on
    after it, so that whatever follows was put there.
    """

    vocabulary: int
    eos: int | None = None
    name: str = "schema"

    def __post_init__(self) -> None:
        if self.vocabulary < 1:
            raise ConfigError(f"schema: vocabulary {self.vocabulary} must be the tokenizer's size, 1 or more")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        places = Counter((c.participant, c.prompt, c.index) for c in pool.completions)
        out = []
        for completion, readable in zip(pool.completions, pool.readable):
            reason, sentence = self._judge(
                completion, pool, places[completion.participant, completion.prompt, completion.index]
            )
            effect: Effect = "exclude"
            if reason is Reason.OK and not readable:
                reason, sentence, effect = Reason.UNREADABLE, "the bytes are not UTF-8", "no_reward"
            bad = 0.0 if reason is Reason.OK else 1.0
            out.append(
                say(
                    completion,
                    self.name,
                    reason,
                    sentence,
                    score=bad,
                    effect=effect,
                    tokens=len(completion.ids),
                    tokens_limit=pool.max_tokens,
                )
            )
        return out, state

    def _judge(self, c: Completion, pool: Pool, claims: int) -> tuple[Reason, str]:
        owed = pool.asked.get(c.participant)
        if c.round != pool.index:
            return Reason.WRONG_ROUND, f"is for round {c.round}, this is round {pool.index}"
        if owed is None:
            return Reason.WRONG_PARTICIPANT, "the plan asks nothing of this participant"
        if c.prompt not in owed:
            return Reason.WRONG_PROMPT, f"prompt {c.prompt} was not asked of this participant"
        if not 0 <= c.index < owed[c.prompt]:
            return Reason.OUT_OF_RANGE, f"index {c.index} of {owed[c.prompt]} completions asked for"
        if claims > 1:
            return Reason.MALFORMED, f"{claims} completions claim prompt {c.prompt}, index {c.index}"
        if not c.ids:
            return Reason.MALFORMED, "no tokens"
        if len(c.ids) > pool.max_tokens:
            return Reason.TOO_LARGE, f"{len(c.ids)} tokens, the limit is {pool.max_tokens}"
        if any(type(i) is not int for i in c.ids):  # True is an int to isinstance
            return Reason.MALFORMED, "a token id is not an integer"
        if min(c.ids) < 0 or max(c.ids) >= self.vocabulary:
            return Reason.OUT_OF_RANGE, f"a token id lies outside 0..{self.vocabulary - 1}"
        if completion_sha256(c.round, c.prompt, c.index, c.ids) != c.sha256:
            return Reason.HASH_MISMATCH, "the hash is not that of these tokens"
        if self.eos is not None and self.eos in c.ids[:-1]:
            return Reason.MALFORMED, "goes on after its end"
        return Reason.OK, ""
