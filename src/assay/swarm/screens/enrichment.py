"""Planted phrases: what one participant's rewarded completions keep saying and nobody else's do.

A phrase spreads because reward comes with it. So an n-gram counts as planted if it is (1) far more frequent in the
rewarded completions of a few participants than in anybody else's, beyond chance and over several prompts, and (2)
*pushed*: the completions that hold it have a higher advantage than their prompts' average. A node that merely writes in
another style has (1); but its style stands in its right and its wrong completions alike, and the policy gradient sums to
nothing on it.

Legend: N rows (completions) of the window, M occurrences of n-grams, G distinct n-grams, P participants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens import ngrams
from assay.swarm.screens.common import advantages, log_choose, log_hypergeometric_tail, say
from assay.swarm.screens.ngrams import Corpus, Kind
from assay.verdict import Reason, State, Verdict

KINDS: dict[str, tuple[Kind, ...]] = {"text": ("text",), "ids": ("ids",), "both": ("text", "ids")}
MAX_LISTED = 256
MAX_WATCHED = 1024
MAX_NEW = 48  # listed in one round
PURE = 1e-3  # share of the others' completions up to which an n-gram is the planter's own
SHARED = 0.01  # above it an n-gram is common speech, whoever says it most
LEFT = 0.1  # share of an n-gram's completions that no listed one holds, above which it is listed too
COVER = 3  # n-grams that are listed of one planted phrase: its edges, which honest text shares, are not needed


@dataclass(frozen=True, slots=True)
class Enrichment:
    """N-grams that a few participants plant exclude completions that hold one, longest those of who planted them.

    Tested over the last `window` rounds, on the n-grams (lengths `n`; lengths `opening` where a text begins, its start
    counted as a word, so that one planted word shows there) of normalised words (`surface` "text": NFKC, lower
    case, numbers as 0, so that tricks of tokenisation change nothing), of token ids ("ids": sees planted numbers, MATH's
    2+2=5 among them) or of "both". Text by default: it costs half, and ids flagged honest sums (up to 3% of a clean swarm
    after one unlucky listing) to catch what the arithmetic screen catches anyway. An n-gram is planted if, counting
    completions,

    - P[X >= k] <= `level` / (number of n-grams and sets of suspects that could have failed), X hypergeometric: of N
      rewarded completions K hold it, k of them among the suspects' n;
    - at least `min_completions` and a share `min_share` of the suspects' rewarded completions hold it, over
      `min_prompts` prompts and a share `prompt_share` of the suspects', none of whose questions holds it (what belongs to
      a prompt stands in all its right answers), and `lift` times the share of everybody else's (rewarded or not);
    - suspects are at most a share `conspirators` of the participants, or one;
    - the sum of its holders' advantages is at least `push` standard errors over 0, counted since it first met the rest.
      This spares honest peers of another style. The price: who plants in wrong completions as well, so that the mean
      advantage falls to m, is caught only when (push/m)^2 completions hold the phrase. 0 turns the condition off.

    Whose completions: those of its planters for good, and everybody's where nobody else said the n-gram (a share up to
    `PURE`), until it was not planted for `window` rounds. If by then more than `SHARED` of all completions hold it, the
    swarm has learnt it and the test is blind: it stays out whoever sends it. So who plants what honest nodes say now and
    then takes little from them: each n-gram costs them its share, of which the window had not one case, while he plants
    it and `window` rounds more. Measured: a quarter of the nodes plants 48 rare honest phrases in turn, whose 70 to 82
    n-grams cost 10% of honest completions for good when all lasted for all: now 0.3% to 0.9% while he plants, and none
    from `window` rounds after. All of his own that hold one are excluded.

    Of more than `MAX_LISTED` n-grams the longest unseen goes. Excluded and not stripped of reward: reward 0 on them
    wrecked the model (LAB.md). Nobody is to be banned on this alone. Limits: phrases of many wordings without a common
    n-gram (three words between fillers of ten wordings each: 21% to 32% caught); fewer than about `min_completions` + 3
    planted completions a window; a phrase already spread when the screen first
    looks; DoS; an honest peer of another style that is also right more often than the rest on the same prompts looks
    like a planter.
    """

    n: tuple[int, ...] = (4, 5)
    opening: tuple[int, ...] = (2, 3)
    level: float = 0.01
    window: int = 4
    surface: str = "text"
    min_completions: int = 8
    min_prompts: int = 3
    min_share: float = 0.1
    prompt_share: float = 0.3
    lift: float = 8.0
    push: float = 4.0
    conspirators: float = 0.34
    name: str = "enrichment"

    def __post_init__(self) -> None:
        for name in ("n", "opening"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a TOML list will do
        if not self.n or not all(2 <= n <= 16 for n in (*self.n, *self.opening)):
            raise ConfigError("enrichment: n and opening list lengths of n-grams, from 2 to 16")
        if self.surface not in KINDS:
            raise ConfigError(f"enrichment: surface {self.surface!r} is none of text, ids, both")
        if not (0 < self.level < 1 and self.window >= 1 and self.min_completions >= 2 and self.min_prompts >= 1):
            raise ConfigError("enrichment: level in (0, 1), window and min_prompts from 1, min_completions from 2")
        if not (0 < self.min_share <= 1 and self.lift >= 1 and self.push >= 0 and 0 <= self.conspirators < 1):
            raise ConfigError("enrichment: min_share in (0, 1], lift from 1, push from 0, conspirators in [0, 1)")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        kinds = KINDS[self.surface]
        listed: dict[str, dict[str, Any]] = {k: dict(v) for k, v in state.get("listed", {}).items()}
        watched = {k: list(v) for k, v in state.get("watched", {}).items()}
        past = [r for r in state.get("rounds", []) if pool.index - self.window < r["index"] < pool.index]
        advantage = advantages(pool)
        here = {kind: Corpus.read(pool, kind, advantage) for kind in kinds}
        asked = ngrams.question_words(pool)
        questions = [*asked, *(q for r in past for q in ngrams.unpack_questions(r["questions"]))]

        found: list[_Planted] = []
        said: dict[str, float] = {}  # share of the window's completions that hold a listed n-gram
        for kind in kinds:
            corpus = Corpus.join([here[kind], *(Corpus.unpack(r[kind]) for r in past if kind in r)])
            for n in self._lengths(kind):
                ignored = _in_questions(kind, questions, n)
                level = self.level / len(kinds) / len(self._lengths(kind))
                test = _Test(self, corpus, n, n not in self.n, ignored, len(pool.completions), level)
                found += test.planted(watched, kind, pool.index)
                held = Counter(name for _, name in _matches(corpus, kind, n, listed, ignored))
                said |= {name: held[name] / corpus.length_N.size for name in listed if name.startswith(f"{kind}:{n}:")}
        for name, entry in listed.items():
            lately = pool.index - entry["planted"] < self.window
            entry["everyone"] = entry["everyone"] and (lately or said[name] > SHARED)
        _list(found, listed, pool)

        holds: dict[int, list[str]] = {}
        for kind in kinds:
            for n in self._lengths(kind):
                for row, name in _matches(here[kind], kind, n, listed, _in_questions(kind, asked, n)):
                    entry = listed[name]
                    if entry["everyone"] or pool.completions[row].participant in entry["by"]:
                        holds.setdefault(row, []).append(name)
                        entry["seen"] = pool.index
        verdicts = [
            self._say(pool, row, [listed[name] for name in holds.get(row, ())]) for row in range(len(pool.completions))
        ]
        packed: State = {str(kind): here[kind].pack() for kind in kinds}
        now = {"index": pool.index, "questions": ngrams.pack_questions(asked), **packed}
        return verdicts, {
            "rounds": [*past, now][-max(1, self.window - 1) :],
            "listed": _newest(listed, lambda v: v["seen"], MAX_LISTED),
            "watched": _newest(watched, lambda v: v[2], MAX_WATCHED),
        }

    def _lengths(self, kind: Kind) -> tuple[int, ...]:
        """Lengths of n-grams that are looked at; token ids open with the format whoever writes them."""
        return self.n if kind == "ids" else (*self.n, *(n for n in self.opening if n not in self.n))

    def _say(self, pool: Pool, row: int, held: list[dict[str, Any]]) -> Verdict:
        worst = max(held, key=lambda v: (v["score"], v["gram"]), default=None)
        sentence = ""
        if worst is not None:
            by = ", ".join(name[:40] for name in worst["by"][:4])
            sentence = f"holds {worst['gram']!r}, planted by {by} (listed in round {worst['since']})"
        return say(
            pool.completions[row],
            self.name,
            Reason.OK if worst is None else Reason.ENRICHMENT,
            sentence,
            score=worst["score"] if worst else 0.0,
            matches=len(held),
            matches_limit=0,
        )


@dataclass(frozen=True, slots=True)
class _Test:
    """The test of all n-grams of one kind and length; with `opening` only those that begin a text. The first `current` rows are this round's."""

    rules: Enrichment
    corpus: Corpus
    n: int
    opening: bool
    ignored: NDArray[np.uint64]
    current: int
    level: float

    def planted(self, watched: dict[str, list[float]], kind: Kind, index: int) -> Iterator[_Planted]:
        """What is planted and was said this round; `watched` is kept up to date, in place."""
        corpus, rules = self.corpus, self.rules
        gram_M, said_M, place_M = corpus.grams(self.n, self.opening)
        if not gram_M.size:
            return
        name_G, first_G, number_M = np.unique(gram_M, return_index=True, return_inverse=True)
        # one occurrence per row; rows are in order, so that those of this round come first
        pair_M = np.unique(number_M.astype(np.int64) * corpus.length_N.size + said_M)
        number_M, row_M = np.divmod(pair_M, corpus.length_N.size)
        marked_G = np.bincount(number_M[corpus.rewarded_N[row_M]], minlength=name_G.size)
        keep_G = (marked_G >= rules.min_completions) & ~np.isin(name_G, self.ignored)
        tested = int(keep_G.sum())
        keep_G &= said_M[first_G] < self.current
        keep_M = keep_G[number_M]
        number_M, row_M = (np.cumsum(keep_G) - 1)[number_M[keep_M]], row_M[keep_M]
        name_G, first_G = name_G[keep_G], first_G[keep_G]
        people = sorted(set(corpus.participant))
        index_of = {name: i for i, name in enumerate(people)}
        sender_N = np.array([index_of[name] for name in corpus.participant])
        for g, log_p, rest, suspect_P in self._enriched(number_M, row_M, name_G.size, sender_N, len(people), tested):
            rows = row_M[np.searchsorted(number_M, g) : np.searchsorted(number_M, g + 1)]
            rows = rows[suspect_P[sender_N[rows]]]
            prompts = np.unique(corpus.prompt_N[rows[corpus.rewarded_N[rows]]]).size
            answered = np.unique(corpus.prompt_N[corpus.rewarded_N & suspect_P[sender_N]]).size
            name = _name(kind, self.n, int(name_G[g]))
            if prompts >= max(rules.min_prompts, rules.prompt_share * answered) and self._pushed(
                rows, watched, name, index
            ):
                by = [people[p] for p in np.flatnonzero(suspect_P)]
                where = int(said_M[first_G[g]]), int(place_M[first_G[g]])
                yield _Planted(log_p, rest, name, *where, by, self.opening, rows)

    def _enriched(
        self,
        number_M: NDArray[np.int64],
        row_M: NDArray[np.int64],
        count: int,
        sender_N: NDArray[np.int64],
        people: int,
        tested: int,
    ) -> Iterator[tuple[int, float, float, NDArray[np.bool_]]]:
        """(n-gram, log p, the rest's share, suspects) of those frequent among few participants and rare among the rest."""
        rules, rewarded_N = self.rules, self.corpus.rewarded_N
        cell_M = number_M * people + sender_N[row_M]
        all_GP = np.bincount(cell_M, minlength=count * people).reshape(count, people)
        good_GP = np.bincount(cell_M[rewarded_N[row_M]], minlength=count * people).reshape(count, people)
        rows_P = np.bincount(sender_N, minlength=people)
        good_P = np.bincount(sender_N[rewarded_N], minlength=people)
        share_GP = good_GP / np.maximum(good_P, 1)
        most_G = share_GP.max(axis=1, keepdims=True, initial=0)
        suspect_GP = share_GP >= np.maximum(rules.min_share, most_G / rules.lift)
        suspects_G = suspect_GP.sum(axis=1)
        k_G, n_G = (good_GP * suspect_GP).sum(axis=1), (good_P * suspect_GP).sum(axis=1)
        rest_G = (all_GP * ~suspect_GP).sum(axis=1) / np.maximum((rows_P * ~suspect_GP).sum(axis=1), 1)
        few_G = (suspects_G >= 1) & (suspects_G <= max(1, int(rules.conspirators * people))) & (suspects_G < people)
        far_G = (k_G >= rules.min_completions) & (k_G >= rules.lift * rest_G * n_G)
        marked_G, total = good_GP.sum(axis=1), int(good_P.sum())
        for g in np.flatnonzero(few_G & far_G):
            sets = log_choose(people, int(suspects_G[g]))  # as many sets of suspects could have been picked
            log_p = sets + log_hypergeometric_tail(int(k_G[g]), int(n_G[g]), int(marked_G[g]), total)
            if log_p <= math.log(self.level / max(1, tested)):
                yield int(g), min(log_p, 0.0), float(rest_G[g]), suspect_GP[g]

    def _pushed(self, rows: NDArray[np.int64], watched: dict[str, list[float]], name: str, index: int) -> bool:
        """Whether the holders' advantages, all since the n-gram was first watched, sum to `push` standard errors."""
        if not self.rules.push:
            return True
        total, count, last = watched.get(name, (0.0, 0.0, -1.0))
        if last < index:
            new = rows if last < 0 else rows[rows < self.current]
            advantage = self.corpus.advantage_N[new]
            total = round(total + float(advantage.sum()), 4)
            count += float(np.count_nonzero(advantage))  # a prompt without differences teaches nothing
            watched[name] = [total, count, float(index)]
        return count > 0 and total >= self.rules.push * math.sqrt(count)


@dataclass(frozen=True, slots=True)
class _Planted:
    """An n-gram, where in this round it is first said, and by whom."""

    log_p: float
    rest: float  # share of the others' completions that hold it
    name: str
    row: int
    place: int
    by: list[str]
    opening: bool  # of the beginning of a text alone
    rows: NDArray[np.int64]  # of the window: the suspects' completions that hold it

    def entry(self, pool: Pool) -> dict[str, Any]:
        """How the state lists it; words can be read, ids are numbers."""
        kind, n = self.name.split(":")[0], int(self.name.split(":")[1])
        if kind == "text":
            said = " ".join(ngrams.said(pool.texts[self.row])[self.place : self.place + n])
        else:
            said = "tokens " + " ".join(str(i)[:8] for i in pool.completions[self.row].ids[self.place : self.place + n])
        score = round(-self.log_p / math.log(10), 2)
        entry = {"gram": said[:80], "since": pool.index, "seen": pool.index, "planted": pool.index}
        return {**entry, "by": self.by, "score": score, "everyone": False}


def _list(found: list[_Planted], listed: dict[str, dict[str, Any]], pool: Pool) -> None:
    """Add what was found to the list, in place: the most telling first, until each row is covered.

    `COVER` n-grams a row of those nobody else says; of the others only where none of those is in the row: a planted line
    drags along its edges, which honest (mostly wrong) answers share. None that more than `SHARED` of the others'
    completions hold: who sends the longest answers (DoS) says turns of phrase of long answers more often than anybody.
    """
    covered: dict[int, int] = {}
    new = 0
    for planted in sorted(found, key=lambda p: (p.rest > PURE, p.log_p, p.opening, p.name)):
        rows, enough = planted.rows.tolist(), COVER if planted.rest <= PURE else 1
        if planted.name not in listed:
            left = sum(covered.get(row, 0) < enough for row in rows)
            if new == MAX_NEW or planted.rest > SHARED or left <= LEFT * len(rows):
                continue
            listed[planted.name] = planted.entry(pool)
            new += 1
        entry = listed[planted.name]
        entry["planted"] = pool.index
        entry["by"] = sorted({*entry["by"], *planted.by})
        entry["everyone"] = entry["everyone"] or planted.rest <= PURE
        for row in rows:
            covered[row] = covered.get(row, 0) + 1


def _in_questions(kind: Kind, questions: Sequence[NDArray[np.uint64]], n: int) -> NDArray[np.uint64]:
    """N-grams that anybody may repeat because they were asked; of token ids none are known."""
    return ngrams.question_grams(questions if kind == "text" else (), n)


def _name(kind: Kind, n: int, gram: int) -> str:
    return f"{kind}:{n}:{gram:016x}"


def _matches(
    rows: Corpus, kind: Kind, n: int, listed: Iterable[str], ignored: NDArray[np.uint64]
) -> Iterator[tuple[int, str]]:
    """(row, name) of every listed n-gram of this kind and length that a row holds."""
    head = f"{kind}:{n}:"
    wanted = np.array([int(name[len(head) :], 16) for name in listed if name.startswith(head)], np.uint64)
    if not wanted.size:
        return
    gram_M, row_M, _ = rows.grams(n)
    hit_M = np.isin(gram_M, wanted[~np.isin(wanted, ignored)])
    for row, gram in sorted(set(zip(row_M[hit_M].tolist(), gram_M[hit_M].tolist()))):
        yield row, _name(kind, n, gram)


def _newest(entries: dict[str, Any], last: Callable[[Any], float], most: int) -> dict[str, Any]:
    """The `most` entries seen last, by name."""
    kept = sorted(entries, key=lambda k: (-last(entries[k]), k))[:most]
    return {k: entries[k] for k in sorted(kept)}
