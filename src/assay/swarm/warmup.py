"""Supervised steps on worked solutions before the swarm starts: a general model first has to know the format.

Hail to the Thief starts from models that solve a part of the task. `tiny` does; SmolLM2-135M out of the box does not.
All nodes start from the same weights, so the warm-up is made once for a base and a task, and cached.
Legend: N rows, T completion tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save

from assay import checkpoint, models
from assay.config import SwarmExperiment
from assay.progress import Silent, Tracker
from assay.swarm.grpo import token_logprobs
from assay.swarm.learner import Practice
from assay.swarm.rollout import score


def warm_up(
    model: Any, practice: Practice, experiment: SwarmExperiment, base_sha256: str, tracker: Tracker | None = None
) -> None:
    """Train `model`'s trainable parameters in place for `task.warmup_steps` steps; nothing to do for 0."""
    config = experiment.task
    if config.warmup_steps == 0:
        return
    tracker = tracker or Silent()
    path = _cached(experiment, practice, base_sha256)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if path.exists():
        found = load_file(path)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(found[name]))
        return
    optimizer = torch.optim.Adam(list(parameters.values()), lr=config.warmup_lr)
    for step in range(config.warmup_steps):
        tracker.say(f"warming up on {config.name}: step {step + 1}/{config.warmup_steps}")
        # from the far end of the training prompts: rounds draw from all of them, but hardly these
        train, first = practice.task.train, step * config.warmup_rows
        ids = [train[-1 - (first + i) % len(train)] for i in range(min(config.warmup_rows, len(train)))]
        _step(model, practice, ids, optimizer, experiment.grpo.micro_rows)
    arrays = {n: np.ascontiguousarray(p.detach().float().cpu().numpy()) for n, p in parameters.items()}
    checkpoint.write_atomic(path, save(arrays))


def _step(
    model: Any, practice: Practice, prompts: list[int], optimizer: torch.optim.Optimizer, micro_rows: int
) -> None:
    """One step of mean negative log-likelihood over the tokens of the solutions."""
    solutions = [practice.encode(practice.task.solution(p))[: practice.max_tokens] for p in prompts]
    total = sum(map(len, solutions))
    loss = torch.zeros((), device=model.device)
    for scored in score(model, [practice.prompt_ids(p) for p in prompts], solutions, micro_rows=micro_rows):
        logprob_NT = token_logprobs(scored.logits_NTV, scored.token_NT, 1.0)
        loss = loss - (logprob_NT * scored.mask_NT).sum() / total
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _cached(experiment: SwarmExperiment, practice: Practice, base_sha256: str) -> Path:
    """Where the warmed-up parameters lie: named by everything that decides them."""
    identity = {
        "base": base_sha256,
        "task": experiment.task.model_dump(mode="json"),
        "lora": [experiment.model.lora_r, experiment.model.lora_alpha],
        "dtype": experiment.model.dtype,
        "max_tokens": practice.max_tokens,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return models.cache_dir() / "swarm-warmup" / f"{name}.safetensors"
