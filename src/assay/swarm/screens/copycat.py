"""Completions that another participant sent for the same prompt: within the round, or in an earlier one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.common import advantages, fold, log_chernoff_tail, median_low, say
from assay.verdict import Reason, State, Verdict

MAX_KEPT = 20_000  # texts of earlier rounds that are remembered; the oldest rounds go first
PRIOR_PAIRS = 30.0  # weight of the round's rate of repeats in that of one prompt: its own few pairs show few repeats


@dataclass(frozen=True, slots=True)
class Copycat:
    """Of texts that several participants sent for one prompt, one copy stays.

    Two texts are the same when they are but for spaces and capitals (after NFKC, however they are tokenised), and answer
    the same prompt: then they have one reward and teach one thing, so that nothing that was said is lost with a copy.
    Honest models of low entropy also meet: a participant is judged only once it met the others in more texts than
    chance explains (Chernoff's bound on the count under `level`), among all texts or among those of `long_tokens` or
    more, which honest participants share so rarely that chance is another. Chance is how often participants repeat
    *themselves* on that prompt: for two distributions sum p_i q_i <= sqrt(sum p_i^2 sum q_i^2). The quarter (at least
    one) that repeats itself most is left out, so that one who does it on purpose hides nobody. Texts under `min_tokens`
    tokens say nothing.

    Who stays: whoever sent the text in the earliest of the last `window` rounds in which it could teach (a prompt whose
    rewards are all equal teaches nothing); the others' verdicts have `earlier` 1. Within one round one sender keeps his:
    one who is not judged, else the one with fewest meetings, else the one a hash of the text picks, which nobody can
    steer without changing it. Sybils who send one text count once.

    Being first does not make an author: seeds and plan are public, and who has the weights can send today what others
    will draw tomorrow. So no verdict of this screen counts against its sender; the same text for another prompt is
    another text (as an author, who foresaw it for prompts of his own took 20% to 37% of the honest right answers); and
    where the seeded check decides, this screen only watches (learner.py): what one's own seed gives is no copy.

    Limits: one changed word makes another text. A text replayed for another prompt stays and earns what it earns there,
    as would any other text with that answer. Where prompts return within `window`, who foresees a text takes its place
    by sending it first: it is learnt a little earlier and in his name, unless another screen refuses his copy.
    """

    min_tokens: int = 16
    long_tokens: int = 40
    window: int = 4
    level: float = 1e-3
    name: str = "copycat"

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.window < 0 or not 1 <= self.min_tokens <= self.long_tokens:
            raise ConfigError("copycat: level in (0, 1), window 0 or more, 1 <= min_tokens <= long_tokens")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        looks = [_look(pool, state, least) for least in sorted({self.min_tokens, self.long_tokens})]
        copies = self._copies(pool, looks)
        out = []
        for row, completion in enumerate(pool.completions):
            sender = completion.participant
            other, earlier = copies.get(row, ("", False))
            when = "in an earlier round" if earlier else "in this round, and one copy stays"
            # the look in which this text surprises most; where nobody else has it, none does
            worst = min(looks, key=lambda look: look.tail(row, sender))
            out.append(
                say(
                    completion,
                    self.name,
                    Reason.COPYCAT if other else Reason.OK,
                    f"{other[:40]!r} sent the same text {when}" if other else "",
                    score=min(-worst.tail(row, sender), 1e6),
                    met=len(worst.met.get(sender, ())),
                    expected=worst.expected.get(sender, 0.0),
                    earlier=earlier,
                    score_limit=-math.log(self.level / len(looks)),
                )
            )
        return out, self._remember(pool, looks[0], state)

    def _copies(self, pool: Pool, looks: Sequence[_Look]) -> dict[int, tuple[str, bool]]:
        """Rows that go: a participant whose copy stays, and whether it was sent in an earlier round."""
        limit = math.log(self.level / len(looks))
        out = {}
        for key, rows in looks[0].rows.items():
            senders = {pool.completions[r].participant for r in rows}
            first = set(looks[0].first.get(key, ()))
            judged = {
                p
                for p in senders - first
                if any(look.tail(r, p) < limit for look in looks for r in rows if pool.completions[r].participant == p)
            }
            keep = first or senders - judged
            if judged and not keep:
                fewest = min(len(looks[0].met[p]) for p in senders)
                even = [p for p in senders if len(looks[0].met[p]) == fewest]
                keep = {min(even, key=lambda p: hashlib.sha256(f"{key}:{p}".encode(errors="surrogatepass")).digest())}
            for row in rows:
                if pool.completions[row].participant in judged - keep:
                    out[row] = (min(keep), bool(first))
        return out

    def _remember(self, pool: Pool, look: _Look, state: State) -> State:
        """The last `window` rounds: who sent each text that could teach, and how many such rows each prompt had."""
        advantage = advantages(pool)
        taught = {key: [r for r in rows if advantage[r]] for key, rows in sorted(look.rows.items())}
        sent = {key: sorted({pool.completions[r].participant for r in rows}) for key, rows in taught.items() if rows}
        prompts = Counter(str(pool.completions[r].prompt) for rows in taught.values() for r in rows)
        here = {"index": pool.index, "sent": sent, "prompts": dict(sorted(prompts.items()))}
        rounds = [r for r in state.get("rounds", []) if r["index"] < pool.index] + [here]
        rounds = rounds[-self.window :] if self.window else []
        while len(rounds) > 1 and sum(len(r["sent"]) for r in rounds) > MAX_KEPT:
            rounds = rounds[1:]
        return {"rounds": rounds}


@dataclass(slots=True)
class _Look:
    """A round's texts of some length by key (sha256 of the prompt and what is not space), beside those of earlier rounds."""

    key: list[str]  # of each row; "" where the text is too short
    rows: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)  # who sent it in the earliest round of the window
    met: dict[str, set[str]] = field(default_factory=dict)  # by participant: texts that another one has, too
    expected: dict[str, float] = field(default_factory=dict)  # by participant: how many that would be by chance

    def tail(self, row: int, sender: str) -> float:
        """log of how likely so many meetings of this row's sender are; 0 where nobody else has this row's text."""
        if self.key[row] not in self.met.get(sender, ()):
            return 0.0
        return log_chernoff_tail(len(self.met[sender]), self.expected[sender])


def _look(pool: Pool, state: State, least: int) -> _Look:
    """The texts of `least` tokens or more."""
    past = [r for r in state.get("rounds", []) if r["index"] < pool.index]
    look = _Look(
        [_key(c.prompt, t, c.ids) if len(c.ids) >= least else "" for t, c in zip(pool.texts, pool.completions)]
    )
    by_sender: dict[str, list[int]] = {c.participant: [] for c in pool.completions}
    for row, (k, completion) in enumerate(zip(look.key, pool.completions)):
        if k:
            look.rows.setdefault(k, []).append(row)
            by_sender[completion.participant].append(row)
    for held in past:
        for k in held["sent"].keys() & look.rows.keys():
            look.first.setdefault(k, held["sent"][k])
    for p in by_sender:
        look.met[p] = set()
    for k, rows in look.rows.items():
        senders, first = {pool.completions[r].participant for r in rows}, look.first.get(k, [])
        for p in senders:
            if p not in first and (first or len(senders) > 1):
                look.met[p].add(k)
    before = Counter({int(q): n for held in past for q, n in held["prompts"].items()})
    _expect(pool, look, by_sender, before)
    return look


def _expect(pool: Pool, look: _Look, by_sender: dict[str, list[int]], before: Mapping[int, int]) -> None:
    """Fill `look.expected`: the sum over a participant's texts of the chance that anyone else has the same."""
    groups: dict[int, dict[str, list[str]]] = {}  # prompt -> participant -> keys
    for p, rows in by_sender.items():
        for row in rows:
            groups.setdefault(pool.completions[row].prompt, {}).setdefault(p, []).append(look.key[row])
    own = {p: (0, 0) for p in by_sender}
    for group in groups.values():
        for p, keys in group.items():
            repeats, pairs = _repeats(keys)
            own[p] = own[p][0] + repeats, own[p][1] + pairs
    here = {q: sum(len(keys) for keys in group.values()) for q, group in groups.items()}
    # by participant, for each different text of his: its prompt, and how many of others' texts it could meet
    texts = {
        p: [(q, here[q] - len(group[p]) + before.get(q, 0)) for q, group in sorted(groups.items()) if p in group
            for _ in set(group[p])]
        for p in by_sender
    }  # fmt: skip
    # nobody sent two of a prompt: how often the ordinary participant meets another one has to do
    rate = median_low(
        [(len(look.met[p]) + 0.5) / (sum(rivals for _, rivals in held) + 1) for p, held in texts.items()] or [0.0]
    )
    paired = sorted((p for p, (_, n) in own.items() if n), key=lambda p: (own[p][0] / own[p][1], p))
    ordinary = set(paired[: max(1, len(paired) - max(1, len(paired) // 4))])
    if ordinary:  # its upper end: few repeats among few pairs prove little
        count, pairs = (sum(own[p][i] for p in ordinary) for i in (0, 1))
        rate = (count + 0.5 + 1.64 * math.sqrt(count + 0.5)) / (pairs + 1)
    chance = {}
    for q, group in groups.items():
        found = [_repeats(keys) for p, keys in group.items() if p in ordinary]
        chance[q] = (sum(d for d, _ in found) + PRIOR_PAIRS * rate) / (sum(n for _, n in found) + PRIOR_PAIRS)
    for p, held in texts.items():
        look.expected[p] = math.fsum(min(1.0, chance[q] * rivals) for q, rivals in held)


def _repeats(keys: Sequence[str]) -> tuple[int, int]:
    """Pairs of equal ones, and all pairs."""
    return sum(n * (n - 1) // 2 for n in Counter(keys).values()), len(keys) * (len(keys) - 1) // 2


def _key(prompt: int, text: str, ids: Sequence[int]) -> str:
    """Name of a text for a prompt: what is not space; of one without any, its token ids."""
    said = "".join(fold(text).split()) or f"ids:{','.join(map(str, ids))}"
    return hashlib.sha256(f"{prompt}:{said}".encode(errors="surrogatepass")).hexdigest()[:16]
