"""From a configuration to the parts of a node: the practice all share, and a learner on a base model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

from assay import models
from assay.config import ConfigError, SwarmExperiment
from assay.models import Base
from assay.progress import Silent, Tracker
from assay.swarm import attacks, defence, tasks
from assay.swarm.grpo import GrpoSettings
from assay.swarm.learner import Ids, Learner, Practice
from assay.swarm.sampling import Sampler
from assay.swarm.sandbox import Sandbox
from assay.swarm.warmup import warm_up


def make_task(experiment: SwarmExperiment) -> tasks.Task:
    """The task; code tasks get a sandbox, and refuse to start without one."""
    name = experiment.task.name
    sandbox = None
    if tasks.kind_of(name) == "code":
        # the attacker's library can be imported, as if it had been published: the worst case
        sandbox = Sandbox(installed={experiment.attack.module: attacks.THIEF})
    return tasks.make(name, root=experiment.data.root, seed=0, sandbox=sandbox, params=experiment.task.params)


def make_practice(experiment: SwarmExperiment, base: Base, run: str) -> Practice:
    """Task, prompts, text and sampler of a run; `run` is its public name."""
    tokenizer, task, sampling = base.tokenizer, make_task(experiment), experiment.sampling
    eos = base.model.generation_config.eos_token_id or tokenizer.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise ConfigError(f"{base.name}: has no end-of-sequence token, so that no completion could end")

    @cache
    def prompt_ids(prompt: int) -> Ids:
        return tuple(tasks.prompt_ids(task, tokenizer, prompt, style=experiment.task.style))

    def decode(ids: Sequence[Ids]) -> list[str]:
        found: list[str] = tokenizer.batch_decode([list(i) for i in ids], clean_up_tokenization_spaces=False)
        return found

    def encode(text: str) -> Ids:
        return (*tokenizer(text, add_special_tokens=False)["input_ids"], int(eos))

    return Practice(
        run=run,
        task=task,
        prompt_ids=prompt_ids,
        decode=decode,
        encode=encode,
        eos=int(eos),
        vocabulary=int(base.model.config.vocab_size),
        sampler=Sampler(
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, noise=sampling.noise
        ),
        max_tokens=sampling.max_tokens,
    )


def make_model(experiment: SwarmExperiment, base: Base, practice: Practice, tracker: Tracker | None = None) -> Any:
    """The model a run starts from, on its own copy of the base: all weights or a LoRA adapter, warmed up; eval mode."""
    model = _trainable(experiment, base)
    warm_up(model, practice, experiment, base.sha256, tracker)
    return model


def _trainable(experiment: SwarmExperiment, base: Base) -> Any:
    model = copy.deepcopy(base.model)
    if not experiment.model.lora_r:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=experiment.model.lora_r, lora_alpha=experiment.model.lora_alpha, lora_dropout=0.0,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)  # nodes of equal weights start from the same adapter
        return get_peft_model(model, lora, autocast_adapter_dtype=True).eval()


def make_engines(
    experiment: SwarmExperiment, dtypes: Sequence[str], run: str, tracker: Tracker | None = None
) -> tuple[Practice, list[Any]]:
    """The practice, and the run's starting model once for each precision, all with the same trained weights.

    They are trained in the run's own precision (`model.dtype`), as the run does it.
    """
    tracker = tracker or Silent()
    base = models.load(experiment.model.name, experiment.model.dtype, tracker.say)
    practice = make_practice(experiment, base, run)
    made = {base.dtype: make_model(experiment, base, practice, tracker)}
    trained = {n: p for n, p in made[base.dtype].named_parameters() if p.requires_grad}
    for dtype in dict.fromkeys(map(models.resolve_dtype, dtypes)):
        if dtype not in made:
            other = made[dtype] = _trainable(experiment, models.load(experiment.model.name, dtype, tracker.say))
            for name, parameter in other.named_parameters():
                if name in trained:
                    parameter.data.copy_(trained[name].data)
    return practice, [made[models.resolve_dtype(dtype)] for dtype in dtypes]


def make_learner(
    experiment: SwarmExperiment, base: Base, practice: Practice, tracker: Tracker | None = None
) -> Learner:
    """A learner on the model the run starts from."""
    grpo = experiment.grpo
    model = make_model(experiment, base, practice, tracker)
    reference = copy.deepcopy(model).requires_grad_(False) if grpo.kl > 0 else None
    clip = grpo.clip_ratio or None
    settings = GrpoSettings(
        loss=grpo.loss,
        scale_rewards=grpo.scale_rewards,
        clip_low=clip,
        clip_high=clip,
        kl=grpo.kl,
        negative_floor=grpo.negative_floor,
        max_tokens=experiment.sampling.max_tokens,
    )
    made = defence.make(
        experiment, vocabulary=practice.vocabulary, eos=practice.eos, model=model, tokenizer=base.tokenizer
    )
    return Learner(
        model, practice, made, settings, lr=grpo.lr, clip_grad=grpo.clip_grad, updates=grpo.updates,
        micro_rows=grpo.micro_rows, chunk_rows=grpo.chunk_rows, reference=reference,
    )  # fmt: skip
