"""What a malicious node can see and do, put together for attacks.py: its weights, its seeds, and the defence if handed.

Nothing here is needed to run a swarm; it is the simulation's other side.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from assay.contribution import Completion
from assay.swarm.attacks import Check, Ids, Near, Seat, Settings
from assay.swarm.calibrate import positions
from assay.swarm.exchange import Plan
from assay.swarm.learner import Learner
from assay.swarm.rollout import Item, generate
from assay.swarm.sampling import candidates, gumbel
from assay.swarm.screens.model import Seeded
from assay.swarm.screens.rounding import BY_CHANCE, Flips, log_chance

Favour = Callable[[Ids], Sequence[int]]


def make_seat(
    name: str,
    learner: Learner,
    plan: Plan,
    settings: Settings,
    *,
    seed: int,
    previous: Sequence[Completion] = (),
    prompts: range | None = None,
    ahead: Plan | None = None,
) -> Seat:
    """The seat of node `name`. `prompts` where nodes may choose them; `seed` makes its own choices repeatable.

    `ahead` is the plan of the next round, where it can be known before this one is over.
    """
    practice = learner.practice
    handed = next((s for s in learner.defence.model_screens if isinstance(s, Seeded)), None)
    return Seat(
        name=name,
        round=plan.round,
        asked=plan.asked[name],
        vertical=plan.mode == "vertical",
        task=practice.task,
        max_tokens=practice.max_tokens,
        encode=practice.encode,
        decode=lambda ids: practice.decode([tuple(t for t in ids if t != practice.eos)])[0],
        draw=learner.generate,
        seed=lambda prompt, index: practice.seed(plan.round, name, prompt, index),
        rng=random.Random(f"{seed}/{name}/{plan.round}"),
        settings=settings,
        choices=prompts if not plan.assigned else None,
        previous=tuple(c for c in previous if c.participant != name),
        public_seed=practice.seed,
        ahead=ahead.asked if ahead is not None else {},
        check=_check(learner, handed) if handed is not None else None,
    )


def _check(learner: Learner, rules: Seeded) -> Check:
    return Check(
        max_margin=rules.max_margin,
        mean_margin=rules.mean_margin,
        max_flips=rules.max_flips,
        tolerated=lambda tokens, flips, gaps: tolerated(Flips(tokens, flips, gaps), rules),
        near=lambda prompts, seeds, drawn: near(learner, prompts, seeds, drawn, rules.max_margin),
        resume=lambda prompts, seeds, prefixes: resume(learner, prompts, seeds, prefixes),
        steered=lambda prompts, seeds, favour: steered(learner, prompts, seeds, favour, rules),
    )


def tolerated(found: Flips, rules: Seeded) -> bool:
    """Whether a node that sends so much in every round is never held against chance."""
    paces = (log_chance(found.times(rounds), rules.flip_rate, rules.flip_gap) for rounds in (1, rules.window))
    return min(paces) >= 0.95 * BY_CHANCE  # the verifier's own rounding comes on top


def near(
    learner: Learner, prompts: Sequence[int], seeds: Sequence[int], drawn: Sequence[Ids], limit: float
) -> list[list[Near]]:
    """Per completion the other candidates whose gap to the seed's choice is above 0 and at most `limit`, in order."""
    practice = learner.practice
    items = [Item(practice.prompt_ids(p), s) for p, s in zip(prompts, seeds)]
    out: list[list[Near]] = [[] for _ in drawn]
    with torch.no_grad():
        for row, logits_TV, seed_T, position_T, own_T in positions(learner.model, items, drawn):
            token_TK, value_TK = candidates(logits_TV, practice.sampler)
            value_TK = value_TK + gumbel(seed_T, position_T, token_TK, practice.sampler.noise)
            gap_TK = value_TK.amax(1, keepdim=True) - value_TK
            close_TK = (gap_TK > 0) & (gap_TK <= limit) & (token_TK != own_T[:, None])
            out[row] = [Near(t, int(token_TK[t, k]), float(gap_TK[t, k])) for t, k in close_TK.nonzero().tolist()]
    return out


def resume(learner: Learner, prompts: Sequence[int], seeds: Sequence[int], prefixes: Sequence[Ids]) -> list[Ids]:
    """Each prefix (of one token or more) and what its seed gives after it, up to the end or the limit.

    Noise is keyed by the position in prompt and completion together, so that the prefix may stand in the prompt.
    """
    practice = learner.practice
    out = list(prefixes)
    rows = [r for r, ids in enumerate(prefixes) if ids[-1] != practice.eos and len(ids) < practice.max_tokens]
    items = [Item(practice.prompt_ids(prompts[r]) + prefixes[r], seeds[r]) for r in rows]
    longest = max((practice.max_tokens - len(prefixes[r]) for r in rows), default=0)
    made = generate(learner.model, items, practice.sampler, max_tokens=longest, eos=practice.eos) if rows else []
    for row, rest in zip(rows, made):
        out[row] = (prefixes[row] + rest)[: practice.max_tokens]
    return out


def steered(learner: Learner, prompts: Sequence[int], seeds: Sequence[int], favour: Favour, rules: Seeded) -> list[Ids]:
    """Draw under the public seeds, but take what `favour` wants wherever the verifier's limits let it pass.

    `favour(ids so far)` names the wanted tokens, or -1 for "anything but an ending". The gap of a flip stays under
    `max_margin`, flips under `max_flips`, their sum under `mean_margin` times the least length yet reached; all of them
    under what a node is let pass over a window of rounds.
    """
    practice = learner.practice
    spent, flips = [0.0] * len(prompts), [0] * len(prompts)
    drawn = 0

    def pick(logits_NV: Tensor, seed_N: Tensor, position_N: Tensor, rows: list[int], said: list[list[int]]) -> Tensor:
        token_NK, value_NK = candidates(logits_NV, practice.sampler)
        value_NK = value_NK + gumbel(seed_N, position_N, token_NK, practice.sampler.noise)
        best_N = value_NK.argmax(1)
        gap_NK = value_NK.gather(1, best_N[:, None]) - value_NK
        nonlocal drawn
        drawn += len(rows)
        out = token_NK.gather(1, best_N[:, None])[:, 0]
        near_N = ((gap_NK > 0) & (gap_NK <= rules.max_margin * 0.98)).any(1)
        for at in near_N.nonzero()[:, 0].tolist():
            row = rows[at]
            if said[at] and said[at][-1] < 0:  # ended; still in the batch until it is compacted
                continue
            wanted = set(favour(tuple(said[at])))
            if not wanted or flips[row] >= rules.max_flips or (wanted == {-1} and int(out[at]) != practice.eos):
                continue
            budget = min(rules.max_margin, rules.mean_margin * (len(said[at]) + 1) - spent[row])
            fits = [
                (float(gap), int(token))
                for gap, token in zip(gap_NK[at], token_NK[at])
                if 0 < gap <= 0.98 * budget and (int(token) in wanted or (-1 in wanted and int(token) != practice.eos))
            ]
            if fits and int(out[at]) not in wanted:
                gap, token = min(fits)
                if not tolerated(Flips(drawn, sum(flips) + 1, sum(spent) + gap), rules):
                    continue
                out[at] = token
                spent[row] += gap
                flips[row] += 1
        return out

    items = [Item(practice.prompt_ids(p), s) for p, s in zip(prompts, seeds)]
    with torch.no_grad():
        return generate(
            learner.model, items, practice.sampler, max_tokens=practice.max_tokens, eos=practice.eos, pick=pick
        )
