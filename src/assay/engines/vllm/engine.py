"""`generate` with a `vllm.LLM` in the place of a Transformers model, and whether that engine can do it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from assay.config import ConfigError
from assay.engines.vllm.requests import Route, parameters
from assay.swarm.rollout import Item
from assay.swarm.sampling import Sampler

READ = ("0.31", "0.32", "0.33")
"""Releases whose sampler's noise was read and is Assay's `murmur3`. Earlier ones had another; a later one may."""


def generate(
    llm: Any, items: Sequence[Item], sampler: Sampler, *, max_tokens: int, eos: int, route: Route = "native"
) -> list[tuple[int, ...]]:
    """Token ids of each completion, as `assay.swarm.rollout.generate` draws them but for rounding.

    `llm`: a `vllm.LLM` on the weights of the round. Route `processor` needs it made with `logits_processors=[SeededDraw]`
    of the model runner in use (`processor_v1`, `processor_v2`). Raises ConfigError, before anything is drawn, where the
    engine would give other tokens or end a completion early.
    """
    try:
        from vllm import SamplingParams
    except ImportError as error:
        raise ConfigError(f"vLLM is not installed ({error}); install the build for your GPU: docs.vllm.ai") from error
    longest = max((len(item.prompt) for item in items), default=0) + max_tokens
    if told := problem(llm.llm_engine.vllm_config, longest, route):
        raise ConfigError(told)
    wanted = [
        SamplingParams(**parameters(item.seed, sampler, max_tokens=max_tokens, eos=eos, route=route)) for item in items
    ]
    prompts = [{"prompt_token_ids": list(item.prompt)} for item in items]
    return [tuple(int(token) for token in out.outputs[0].token_ids) for out in llm.generate(prompts, wanted)]


def problem(config: Any, longest: int, route: Route, installed: str | None = None) -> str:
    """Why an engine of this `VllmConfig` cannot draw seeded completions of up to `longest` tokens; empty if it can."""
    model = config.model_config
    if config.speculative_config is not None:
        return "speculative decoding draws tokens in another way: start vLLM without it"
    if model.max_model_len < longest:
        return f"max_model_len is {model.max_model_len}, prompt and completion may need {longest}: completions would be cut"
    if route == "processor":
        if not model.logits_processors:
            return "route processor needs vLLM made with logits_processors=[SeededDraw]: see docs/VLLM.md"
        return ""
    if not getattr(config, "use_v2_model_runner", False):
        return "route native needs model runner V2: take route processor, or VLLM_USE_V2_MODEL_RUNNER=1"
    if getattr(model, "use_fp64_gumbel", False):
        return "use_fp64_gumbel draws other noise: leave it off"
    release = installed or _version()
    if ".".join(release.split(".")[:2]) not in READ:
        return f"the noise of vLLM {release} is not known to be Assay's (read: {', '.join(READ)}): take route processor"
    return ""


def _version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:  # a build of one's own under another name
        return "unknown"
