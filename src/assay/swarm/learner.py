"""One node's side of a round: read the pool, screen it, learn from what is admitted.

The screens that need logits share the training forward pass: a chunk of whole prompt groups is scored with gradients,
its evidence read, its rows judged, its advantages taken over the admitted rows, and only then the loss goes back.
Legend: N rows of a chunk, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.contribution import Pool, TokenEvidence
from assay.swarm import screening
from assay.swarm.defence import Defence
from assay.swarm.evidence import Collected, collect
from assay.swarm.exchange import Gathered, Mode
from assay.swarm.grpo import GrpoSettings, LossSums, advantages, loss_sums, normaliser, token_logprobs
from assay.swarm.rollout import Item, generate, score
from assay.swarm.sampling import Sampler, seed_of
from assay.swarm.screening import Judged
from assay.swarm.tasks import Task
from assay.trust import Strikes
from assay.verdict import AnyScreen, State

Ids = tuple[int, ...]
Texts = Callable[[Sequence[Ids]], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """What all nodes of a run have in common: the task, how prompts are written, how completions are drawn."""

    run: str
    task: Task
    prompt_ids: Callable[[int], Ids]
    decode: Texts
    encode: Callable[[str], Ids]
    eos: int
    vocabulary: int
    sampler: Sampler
    max_tokens: int

    def seed(self, round: int, node: str, prompt: int, index: int) -> int:
        return seed_of(self.run, round, node, prompt, index)

    def pool(self, gathered: Gathered) -> Pool:
        """The receiver's own reading of a round's messages: texts, rewards, and where completions end."""
        return read_pool(
            gathered, self.task.question, self.task.rewards, self.decode, eos=self.eos, max_tokens=self.max_tokens
        )


def read_pool(
    gathered: Gathered,
    question: Callable[[int], str],
    rewards: Callable[[Sequence[int], Sequence[str]], Sequence[float]],
    decode: Texts,
    *,
    eos: int,
    max_tokens: int,
) -> Pool:
    """A receiver's reading of a round's messages. `rewards(prompts, texts)` are its own."""
    completions = gathered.completions
    prompts = [c.prompt for c in completions]
    # special tokens end or begin turns; they are no part of what was said
    texts = decode([c.ids[: c.ids.index(eos)] if eos in c.ids else c.ids for c in completions])
    asked: dict[int, str] = {p: question(p) for p in set(prompts)}
    return Pool(
        index=gathered.plan.round,
        completions=completions,
        questions=tuple(asked[p] for p in prompts),
        texts=tuple(texts),
        rewards=tuple(rewards(prompts, texts)) if completions else (),
        ended=tuple(bool(c.ids) and c.ids.index(eos) == len(c.ids) - 1 if eos in c.ids else False for c in completions),
        readable=tuple("\ufffd" not in text for text in texts),
        asked=gathered.plan.asked,
        max_tokens=max_tokens,
        refused=gathered.refused,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a node remembers between rounds besides its weights."""

    trust: Mapping[str, Strikes] = field(default_factory=dict)
    screens: Mapping[str, State] = field(default_factory=dict)


@dataclass(slots=True)
class Learnt:
    """What a round did to a node: its reading of the pool, the verdicts, the loss, where the seconds went."""

    pool: Pool
    mode: Mode
    judged: Judged
    collected: Collected
    defence: Defence
    loss: float
    grad_norm: float
    seconds: dict[str, float]


@dataclass(slots=True)
class _Chunk:
    """A chunk's forward pass: per micro-batch its rows, log-probabilities (with graph) and mask."""

    parts: list[tuple[tuple[int, ...], Tensor, Tensor]]


def nothing(device: torch.device) -> LossSums:
    """The empty sum."""
    return LossSums(torch.zeros((), device=device), 0.0, 0.0)


class Learner:
    """A model that learns with GRPO from screened pools. `reference` is the frozen model of the KL penalty."""

    def __init__(
        self,
        model: Any,
        practice: Practice,
        defence: Defence,
        settings: GrpoSettings,
        *,
        lr: float,
        clip_grad: float = 0.5,
        updates: int = 1,
        micro_rows: int = 48,
        chunk_rows: int = 1024,
        reference: Any = None,
    ) -> None:
        if settings.kl > 0 and reference is None:
            raise ValueError("a KL penalty needs a reference model")
        self.model, self.practice, self.defence, self.settings = model.eval(), practice, defence, settings
        self.clip_grad, self.updates = clip_grad, updates
        self.micro_rows, self.chunk_rows, self.reference = micro_rows, chunk_rows, reference
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=lr)

    def generate(self, prompts: Sequence[int], seeds: Sequence[int]) -> list[Ids]:
        """Completions of prompts under seeds, as this node's weights draw them."""
        items = [Item(self.practice.prompt_ids(p), s) for p, s in zip(prompts, seeds)]
        return generate(
            self.model, items, self.practice.sampler, max_tokens=self.practice.max_tokens, eos=self.practice.eos
        )

    def learn(self, gathered: Gathered, memory: Memory) -> tuple[Memory, Learnt]:
        """Screen one round and take the optimiser's steps. Bad data never raises; nothing admitted, nothing learnt."""
        at = time.perf_counter()
        defence = self.defence.active(gathered.plan.round)
        pool = self.practice.pool(gathered)
        seconds = {"reward": time.perf_counter() - at}
        at = time.perf_counter()
        schema = [s for s in defence.screens if s.name == "schema"]
        judged = screening.judge_pool(pool, schema, memory.screens, defence.monitor)
        for row, completion in enumerate(pool.completions):
            if memory.trust.get(completion.participant, Strikes()).banned:
                screening.apply(judged, row, screening.banned(completion))
        learnt = Learnt(pool, gathered.plan.mode, judged, Collected(), defence, 0.0, 0.0, seconds)
        looked = self._compare(learnt)
        seconds["screen"] = time.perf_counter() - at
        at = time.perf_counter()
        self._update(learnt, looked)
        seconds["update"] = time.perf_counter() - at
        trust = screening.update_trust(memory.trust, pool, judged.verdicts, defence.trust)
        return Memory(trust=trust, screens=judged.states), learnt

    def _compare(self, learnt: Learnt) -> bool:
        """Let the screens of texts see the rows that stand, and say whether the model screens have judged all rows.

        These screens compare participants and remember rounds: what a banned node sends, or what schema, seeded or
        logit refuse, must move none of their statistics, now or later. So model screens go first where there are both:
        a forward pass of its own (LAB.md: two fifths of the time of generation), and no level pays it by default. What
        one's own seed gives is no copy, whoever sent it before: where the seeded check decides, copycat only watches.
        """
        defence, pool = learnt.defence, learnt.pool
        others = [s for s in defence.screens if s.name != "schema"]
        looked = bool(others and defence.model_screens)
        if looked:
            rows = [r for r, c in enumerate(pool.completions) if c.ids]
            self._look(learnt, rows)
            self._judge(learnt, rows)
        seeded = {s.name for s in defence.model_screens} & {"seeded"} - defence.monitor
        standing = [r for r, w in enumerate(learnt.judged.weight_N) if w > 0]
        self._apply(learnt, others, standing, defence.monitor | ({"copycat"} if seeded else frozenset()))
        return looked

    def _look(self, learnt: Learnt, rows: Sequence[int]) -> None:
        """Evidence only, no graph."""
        with torch.no_grad():
            for some in self._chunks(learnt.pool, rows):
                self._forward(learnt, some)

    def _audit(self, learnt: Learnt) -> list[int]:
        """Look at rows that are out already: a banned node's, or malformed ones."""
        if not learnt.defence.model_screens:
            return []
        rows = [r for r, w in enumerate(learnt.judged.weight_N) if w == 0 and learnt.pool.completions[r].ids]
        self._look(learnt, rows)
        return rows

    def _update(self, learnt: Learnt, looked: bool) -> None:
        """All optimiser steps of the round; the first one judges as it goes, unless all rows have been looked at.

        Rows that are out are judged with the rest of their group, so that it does not look incomplete.
        """
        rows = [r for r, w in enumerate(learnt.judged.weight_N) if w > 0 and learnt.pool.completions[r].ids]
        prompt_of = [c.prompt for c in learnt.pool.completions]
        beside: dict[int, list[int]] = {}
        for row in () if looked else self._audit(learnt):
            beside.setdefault(prompt_of[row], []).append(row)
        old: dict[int, Tensor] = {}
        for update in range(self.updates):
            judging = update == 0 and not looked
            sums = nothing(self.model.device)
            for some in self._chunks(learnt.pool, rows):
                chunk = self._forward(learnt, some, first=judging)
                if judging:
                    prompts = sorted({prompt_of[r] for r in some})
                    self._judge(learnt, [*some, *(r for p in prompts for r in beside.pop(p, ()))])
                sums = sums + self._backward(learnt, some, chunk, old)
            if judging and beside:
                self._judge(learnt, [r for group in beside.values() for r in group])
            self._step(learnt, sums)

    def _chunks(self, pool: Pool, rows: Sequence[int]) -> list[list[int]]:
        """Whole prompt groups, as many as fit."""
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(pool.completions[row].prompt, []).append(row)
        out: list[list[int]] = []
        for group in groups.values():
            if out and len(out[-1]) + len(group) <= self.chunk_rows:
                out[-1] += group
            else:
                out.append(list(group))
        return out

    def _forward(self, learnt: Learnt, rows: Sequence[int], first: bool = True) -> _Chunk:
        completions = [learnt.pool.completions[r] for r in rows]
        prompts = [self.practice.prompt_ids(c.prompt) for c in completions]
        parts = []
        for scored in score(self.model, prompts, [c.ids for c in completions], micro_rows=self.micro_rows):
            here = tuple(rows[i] for i in scored.rows)
            logprob_NT = token_logprobs(scored.logits_NTV, scored.token_NT, self.practice.sampler.temperature)
            if first and learnt.defence.wanted is not None:
                chosen = [completions[i] for i in scored.rows]
                seeds = [self.practice.seed(c.round, c.participant, c.prompt, c.index) for c in chosen]
                collect(learnt.collected, replace(scored, rows=here), seeds, logprob_NT.detach(), learnt.defence.wanted)
            parts.append((here, logprob_NT, scored.mask_NT))
        return _Chunk(parts)

    def _judge(self, learnt: Learnt, rows: Sequence[int]) -> None:
        """Model screens on a chunk: its groups are whole, so that the group rule sees what it needs."""
        if learnt.defence.model_screens:
            evidence = learnt.collected.evidence(rows)
            self._apply(learnt, learnt.defence.model_screens, rows, learnt.defence.monitor, evidence)

    def _apply(
        self,
        learnt: Learnt,
        screens: Sequence[AnyScreen[Pool]],
        rows: Sequence[int],
        monitor: frozenset[str],
        evidence: TokenEvidence | None = None,
    ) -> None:
        """Let screens that see only these rows of the pool judge them."""
        screening.judge_rows(learnt.judged, learnt.pool, rows, screens, monitor, evidence)

    def _backward(self, learnt: Learnt, rows: Sequence[int], chunk: _Chunk, old: dict[int, Tensor]) -> LossSums:
        judged, pool = learnt.judged, learnt.pool
        index = list(rows)
        group_N = np.array(self.group_of(learnt))[index]
        advantage_N = advantages(
            torch.tensor(judged.reward_N[index]), torch.tensor(group_N), torch.tensor(judged.weight_N[index]),
            scale=self.settings.scale_rewards,
        ).float()  # fmt: skip
        advantage = dict(zip(rows, advantage_N))
        total = nothing(chunk.parts[0][1].device)
        for here, logprob_NT, mask_NT in chunk.parts:
            mask_NT = mask_NT.clone()
            for i, row in enumerate(here):
                if judged.masked[row]:
                    mask_NT[i, list(judged.masked[row])] = False
            device = logprob_NT.device
            old_NT = self._old(here, logprob_NT, old)
            total = total + loss_sums(
                logprob_NT,
                mask_NT,
                torch.stack([advantage[r] for r in here]).to(device),
                torch.tensor(judged.weight_N[list(here)], dtype=torch.float32, device=device),
                self.settings,
                old_logprob_NT=old_NT,
                ref_logprob_NT=self._reference(pool, here, logprob_NT) if self.settings.kl > 0 else None,
            )
        if total.loss.requires_grad:
            total.loss.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    @staticmethod
    def group_of(learnt: Learnt) -> list[int]:
        """Number of each row's group: a prompt's in horizontal mode; in vertical mode a node's own, though another chose
        the same prompt."""
        whole = learnt.mode == "horizontal"
        keys = [("" if whole else c.participant, c.prompt) for c in learnt.pool.completions]
        number = {key: n for n, key in enumerate(sorted(set(keys)))}
        return [number[key] for key in keys]

    def _old(self, rows: Sequence[int], logprob_NT: Tensor, old: dict[int, Tensor]) -> Tensor | None:
        """Log-probabilities at the first update, for the ratio of later ones."""
        if self.settings.clip_low is None:
            return None
        for row, logprob_T in zip(rows, logprob_NT.detach()):
            old.setdefault(row, logprob_T)
        width = logprob_NT.shape[1]
        return torch.stack([torch.nn.functional.pad(old[r][:width], (0, max(0, width - len(old[r])))) for r in rows])

    @torch.no_grad()
    def _reference(self, pool: Pool, rows: Sequence[int], logprob_NT: Tensor) -> Tensor:
        completions = [pool.completions[r] for r in rows]
        prompts = [self.practice.prompt_ids(c.prompt) for c in completions]
        out_NT = torch.zeros_like(logprob_NT)
        for scored in score(self.reference, prompts, [c.ids for c in completions], micro_rows=self.micro_rows):
            found = token_logprobs(scored.logits_NTV, scored.token_NT, self.practice.sampler.temperature)
            out_NT[list(scored.rows), : found.shape[1]] = found
        return out_NT

    def _step(self, learnt: Learnt, sums: LossSums) -> None:
        divisor = normaliser(self.settings, sums)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if divisor > 0 and grads:
            for grad in grads:
                grad /= divisor
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_grad)
            learnt.grad_norm = float(norm)
            if learnt.grad_norm > 0 and np.isfinite(learnt.grad_norm):
                self.optimizer.step()
            learnt.loss = float(sums.loss) / divisor
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Weights and optimiser state, for a checkpoint: copies, which later steps leave alone."""
        out = {f"weight/{n}": p.detach().float().cpu().numpy().copy() for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                out[f"adam/{key}/{n}"] = value.detach().float().cpu().numpy().copy()
        return out

    def load(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take weights and optimiser state from a checkpoint; what the optimiser remembered before is gone."""
        self.optimizer.state.clear()
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.copy_(torch.from_numpy(np.array(tensors[f"weight/{n}"])))
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"adam/{key}/{n}" in tensors:
                        state[key] = torch.from_numpy(np.array(tensors[f"adam/{key}/{n}"])).to(
                            "cpu" if key == "step" else p.device
                        )
                if state:
                    self.optimizer.state[p] = state
