"""The swarm's costs: the checks of tokens, the GRPO step beside TRL's, rollouts beside Transformers' `generate`.

One pool for all: completions drawn once by the model itself, and rewards that alternate, so that every group teaches
something. Generation is in none of the steps. The model carries a LoRA adapter on all linear layers, as
`examples/swarm-smollm2.toml` has it; there is no supervised warm-up, for what the model has learnt costs no second.
Legend: N rows, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from assay import models
from assay.bench import peers
from assay.bench.cost_settings import Settings
from assay.bench.turns import Say, Side, matmul_peak, model_flops, ratio, take, told
from assay.config import SwarmExperiment
from assay.contribution import Completion, Pool, completion_sha256
from assay.swarm import build, screening
from assay.swarm.evidence import Collected, collect
from assay.swarm.exchange import Gathered, Plan
from assay.swarm.grpo import token_logprobs
from assay.swarm.learner import Ids, Learner, Memory
from assay.swarm.rollout import Item, Scored, generate, score

RUN, NODE = "assay-bench-costs", "node-0"
FASTER, MORE_ROLLOUTS, SHARED, ALONE = 1.3, 1.5, 0.03, 1.1
BOUNDARY = 0.25  # as examples/swarm-smollm2.toml has it


@dataclass(slots=True)
class Bench:
    """A model before its first step, and one round's pool for it."""

    experiment: SwarmExperiment
    base: models.Base
    practice: Any
    model: Any
    gathered: Gathered

    def learner(self, screens: tuple[str, ...] = ()) -> Learner:
        """A learner on a copy of the model, behind these screens of the forward pass; none: schema alone."""
        params = {"seeded": {"boundary": BOUNDARY}} if "seeded" in screens else {}
        params |= {"logit": {"k": self.experiment.sampling.top_k}} if "logit" in screens else {}
        changed = self.experiment.changed(
            defence__level="none", defence__screens=("schema", *screens) if screens else None, defence__params=params
        )
        learner = build.make_learner(changed, self.base, self.practice)
        learner.model.load_state_dict(self.model.state_dict())
        return learner

    @property
    def rewards(self) -> list[float]:
        """By row; they alternate within each group."""
        return [float(c.index % 2) for c in self.gathered.completions]

    @property
    def prompts(self) -> list[Ids]:
        return [self.practice.prompt_ids(c.prompt) for c in self.gathered.completions]

    @property
    def ids(self) -> list[Ids]:
        return [c.ids for c in self.gathered.completions]

    def figures(self) -> dict[str, Any]:
        """What was compared."""
        return {
            "model": self.experiment.model.name, "dtype": self.base.dtype, "prompts": self.experiment.swarm.prompts,
            "group": self.experiment.swarm.group, "prompt_tokens": sum(map(len, self.prompts)),
            "completion_tokens": sum(map(len, self.ids)), "lora_r": self.experiment.model.lora_r,
        }  # fmt: skip


def make(settings: Settings) -> Bench:
    """The bench's model, and the pool that its own sampler draws."""
    experiment = SwarmExperiment().changed(
        model__name=settings.model, model__dtype=settings.dtype, model__lora_r=settings.lora_r,
        task__style="instruct" if settings.model != "tiny" else "plain", swarm__plan="vertical", swarm__nodes=1,
        swarm__malicious=0.0, swarm__prompts=settings.prompts, swarm__group=settings.group, sampling__top_k=50,
        sampling__max_tokens=settings.max_tokens, grpo__micro_rows=16, seed=settings.seed,
    )  # fmt: skip
    base = models.load(settings.model, settings.dtype)
    practice = build.make_practice(experiment, base, RUN)
    object.__setattr__(practice, "task", Alternating(practice.task))
    model = build.make_model(experiment, base, practice)
    with torch.no_grad():  # lora_B is zero at first, and with it lora_A's gradient
        torch.manual_seed(settings.seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    chosen = list(practice.task.train[: settings.prompts])
    places = [(prompt, index) for prompt in chosen for index in range(settings.group)]
    items = [Item(practice.prompt_ids(p), practice.seed(1, NODE, p, i)) for p, i in places]
    drawn = generate(model, items, practice.sampler, max_tokens=settings.max_tokens, eos=practice.eos)
    completions = tuple(
        Completion(participant=NODE, round=1, prompt=p, index=i, ids=ids, sha256=completion_sha256(1, p, i, ids))
        for (p, i), ids in zip(places, drawn)
    )
    plan = Plan(round=1, mode="vertical", asked={NODE: dict.fromkeys(chosen, settings.group)})
    return Bench(experiment, base, practice, model, Gathered(plan=plan, completions=completions, refused=()))


class Alternating:
    """A task whose rewards go 0, 1, 0, 1 by row, so that no group is without a lesson; all else is the task's own."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def rewards(self, prompts: Sequence[int], texts: Sequence[str]) -> list[float]:
        return [float(row % 2) for row in range(len(texts))]


# --- the step beside TRL's --------------------------------------------------------------------------------------------


def rival(bench: Bench) -> peers.Grpo:
    """TRL's trainer on a copy of the model and the same pool, its settings those of our learner."""
    grpo, sampling = bench.experiment.grpo, bench.experiment.sampling
    return peers.Grpo(
        copy.deepcopy(bench.model), bench.base.tokenizer, bench.prompts, bench.ids, bench.rewards,
        group=bench.experiment.swarm.group, max_tokens=sampling.max_tokens, temperature=sampling.temperature,
        lr=grpo.lr, clip=grpo.clip_grad,
    )  # fmt: skip


def grpo(settings: Settings, say: Say) -> dict[str, Any]:
    """One optimiser step on one pool: reading it, rewards, loss, gradient, Adam; ours without and with the checks."""
    bench = make(settings)
    trainer, plain, checked = rival(bench), bench.learner(), bench.learner(("seeded", "logit"))
    ours, with_checks, eager, sdpa = "Assay", "Assay, seeded and logit checks", "TRL, eager", "TRL, sdpa"
    sides = take(
        {
            ours: lambda: plain.learn(bench.gathered, Memory()),
            with_checks: lambda: checked.learn(bench.gathered, Memory()),
            eager: lambda: trainer.step("eager"),
            sdpa: lambda: trainer.step("sdpa"),
        },
        settings.repeats, say,
    )  # fmt: skip
    flops, theirs = arithmetic(bench, shared=True), arithmetic(bench, shared=False)
    peak = matmul_peak(next(plain.model.parameters()).dtype)
    best = min((eager, sdpa), key=lambda name: sides[name].seconds)
    return {
        **bench.figures(),
        "flops": flops,
        "their_flops": theirs,
        "peak_flops": peak,
        "rows": [side.row(name) for name, side in sides.items()],
        "ratios": [
            ratio(f"{best} / Assay, seconds", sides[best], sides[ours], FASTER, least=True),
            ratio(f"{best} / Assay with both checks, seconds", sides[best], sides[with_checks]),
            told(f"Assay / {best}, memory", _memory(sides[ours], sides[best]), 1.0),
            told(f"Assay with both checks / {best}, memory", _memory(sides[with_checks], sides[best]), 1.0),
            told("Assay: model FLOP utilisation", flops / sides[ours].seconds / peak),
            told(f"{best}: model FLOP utilisation", theirs / sides[best].seconds / peak),
        ],
    }


def _memory(of: Side, to: Side) -> float:
    return of.memory_bytes / max(1, to.memory_bytes)


def arithmetic(bench: Bench, shared: bool) -> float:
    """FLOP of one step: prompts once for their group where they are `shared`, else once for every row."""
    prompts = list(dict.fromkeys(bench.prompts)) if shared else bench.prompts
    tokens = sum(map(len, prompts)) + sum(map(len, bench.ids))
    pairs = sum(len(p) * (len(p) + 1) // 2 for p in prompts)
    pairs += sum(len(c) * len(p) + len(c) * (len(c) + 1) // 2 for p, c in zip(bench.prompts, bench.ids))
    base = bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model
    return model_flops(base, tokens, sum(map(len, bench.ids)), pairs)


# --- the checks -------------------------------------------------------------------------------------------------------


def checks(settings: Settings, say: Say) -> dict[str, Any]:
    """The checks where the training forward pass is there anyway, and where it has to be run for them.

    Shared: the seconds of the checks alone (evidence from the logits, verdicts), over those of a step without them.
    Alone: a teacher-forced pass with checks over the same pass with log-probabilities only, and over the plain pass that
    Transformers makes of prompts and completions in one padded batch.
    """
    bench = make(settings)
    plain, checked = bench.learner(), bench.learner(("seeded", "logit"))
    parts, pool = list(scored(bench, checked)), bench.practice.pool(bench.gathered)
    step, both, looking = "GRPO step", "GRPO step with both checks", "both checks, logits at hand"
    alone, forward, padded = "forward pass with both checks", "forward pass", "Transformers' forward pass, padded"
    sides = take(
        {
            step: lambda: plain.learn(bench.gathered, Memory()),
            both: lambda: checked.learn(bench.gathered, Memory()),
            looking: lambda: look(bench, checked, parts, pool),
            alone: lambda: look(bench, checked, scored(bench, checked), pool),
            forward: lambda: sum(1 for _ in scored(bench, checked)),
            padded: _padded(bench, checked),
        },
        settings.repeats, say,
    )  # fmt: skip
    return {
        **bench.figures(),
        "rows": [side.row(name) for name, side in sides.items()],
        "ratios": [
            ratio("both checks / GRPO step, logits shared", sides[looking], sides[step], SHARED),
            ratio("GRPO step with both checks / without", sides[both], sides[step]),
            ratio("forward pass with both checks / without", sides[alone], sides[forward], ALONE),
            ratio("forward pass with both checks / Transformers' padded one", sides[alone], sides[padded], ALONE),
        ],
    }


def scored(bench: Bench, learner: Learner) -> Iterator[tuple[Scored, torch.Tensor]]:
    """Teacher-forced logits in micro-batches with their log-probabilities, without gradients."""
    with torch.no_grad():
        for part in score(learner.model, bench.prompts, bench.ids, micro_rows=learner.micro_rows):
            yield part, token_logprobs(part.logits_NTV, part.token_NT, bench.practice.sampler.temperature)


def look(bench: Bench, learner: Learner, parts: Iterable[tuple[Scored, torch.Tensor]], pool: Pool) -> screening.Judged:
    """Evidence of every token and the verdicts on it, as the learner takes them."""
    found, completions = Collected(), bench.gathered.completions
    assert learner.defence.wanted is not None
    for part, logprob_NT in parts:
        chosen = [completions[row] for row in part.rows]
        seeds = [bench.practice.seed(c.round, c.participant, c.prompt, c.index) for c in chosen]
        collect(found, part, seeds, logprob_NT, learner.defence.wanted)
    judged = screening.Judged.unjudged(pool, {})
    rows = list(range(len(completions)))
    screening.judge_rows(judged, pool, rows, learner.defence.model_screens, evidence=found.evidence(rows))
    return judged


def _padded(bench: Bench, learner: Learner) -> Callable[[], None]:
    """What a verifier without the shared prompt runs: whole rows, logits of the completions."""
    left, right = max(map(len, bench.prompts)), max(map(len, bench.ids))
    rows = list(zip(bench.prompts, bench.ids))
    ids_NS = torch.tensor([[0] * (left - len(p)) + [*p, *c] + [0] * (right - len(c)) for p, c in rows])
    mask_NS = torch.tensor([[0] * (left - len(p)) + [1] * (len(p) + len(c)) + [0] * (right - len(c)) for p, c in rows])
    device, width = learner.model.device, learner.micro_rows

    def run() -> None:
        with torch.no_grad():
            for at in range(0, len(ids_NS), width):
                ids, mask = ids_NS[at : at + width].to(device), mask_NS[at : at + width].to(device)
                logits = learner.model(input_ids=ids, attention_mask=mask, logits_to_keep=right + 1).logits[:, :-1]
                token_logprobs(logits, ids[:, left:], bench.practice.sampler.temperature)

    return run


# --- rollouts ---------------------------------------------------------------------------------------------------------


def rollouts(settings: Settings, say: Say) -> dict[str, Any]:
    """As many tokens from both: no completion ends before the limit."""
    bench = make(settings)
    ours, eager, sdpa = "Assay", "generate, eager", "generate, sdpa"
    sides = take(
        {
            ours: lambda: draw(bench),
            eager: lambda: transformers_draw(bench, "eager"),
            sdpa: lambda: transformers_draw(bench, "sdpa"),
        },
        settings.repeats, say,
    )  # fmt: skip
    best = min((eager, sdpa), key=lambda name: sides[name].seconds)
    tokens = len(bench.ids) * settings.max_tokens
    return {
        **bench.figures(),
        "completion_tokens": tokens,
        "rows": [side.row(name, tokens_per_second=tokens / side.seconds) for name, side in sides.items()],
        "ratios": [
            ratio(f"{best} / Assay, seconds", sides[best], sides[ours], MORE_ROLLOUTS, least=True),
            told(f"Assay / {best}, memory", _memory(sides[ours], sides[best])),
        ],
    }


def draw(bench: Bench, top_k: int | None = None) -> list[Ids]:
    """Our rollouts, none of which ends early: no token is the one that ends."""
    sampler = bench.practice.sampler
    if top_k is not None:
        sampler = type(sampler)(temperature=sampler.temperature, top_k=top_k, noise=sampler.noise)
    completions = bench.gathered.completions
    items = [Item(p, bench.practice.seed(1, NODE, c.prompt, c.index)) for p, c in zip(bench.prompts, completions)]
    return generate(bench.model, items, sampler, max_tokens=bench.practice.max_tokens, eos=-1)


def transformers_draw(bench: Bench, attention: str, top_k: int | None = None) -> list[Ids]:
    """`generate` with the same temperature and top-k, each distinct prompt `group` times by `num_return_sequences`."""
    base = bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model
    prompts, sampler, before = (
        list(dict.fromkeys(bench.prompts)),
        bench.practice.sampler,
        base.config._attn_implementation,
    )
    left, pad = max(map(len, prompts)), bench.base.tokenizer.pad_token_id
    base.set_attn_implementation(attention)
    try:
        with torch.no_grad(), models.quiet_transformers():
            made = bench.model.generate(
                input_ids=torch.tensor([[pad] * (left - len(p)) + list(p) for p in prompts], device=bench.model.device),
                attention_mask=torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts], device=bench.model.device),
                do_sample=True, temperature=sampler.temperature, top_k=top_k or sampler.top_k, top_p=1.0,
                num_return_sequences=bench.experiment.swarm.group, max_new_tokens=bench.practice.max_tokens,
                eos_token_id=None, pad_token_id=pad,
            )  # fmt: skip
    finally:
        base.set_attn_implementation(before)
    return [tuple(row[left:]) for row in made.tolist()]
