"""What one request to vLLM must hold, so that its tokens are those of a seed: as `SamplingParams`, as JSON for a server.

Whatever changes logits, candidates or the end of a completion is named and set to what does nothing, because servers
fill in what a request leaves open from the model's own generation_config.json. A completion ends at the plan's end
token and nowhere else: `ignore_eos` with that token in `stop_token_ids`, for models name further ends of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from assay.config import ConfigError
from assay.swarm.sampling import Sampler

Route = Literal["native", "processor"]
"""`native`: vLLM's sampler adds the noise; `processor`: Assay's logits processor does."""

PREFIX = "assay_"
"""Of the processor's arguments in `extra_args` (a server's `vllm_xargs`), flat as a server wants them."""

COLDEST, HOTTEST = 0.01, 2.0
"""vLLM raises a temperature below the first to it, and refuses one above the second (0.33.0)."""

NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "ignore_eos": True,
}
ABSENT = (
    "stop", "bad_words", "logit_bias", "allowed_token_ids", "structured_outputs", "guided_decoding",
    "thinking_token_budget", "repetition_detection",
)  # fmt: skip
"""Fields that change logits or the end and must not be there at all."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the processor is asked for in one request: a seed, and how logits become a distribution."""

    seed: int
    sampler: Sampler

    def arguments(self) -> dict[str, int | float | str]:
        """As `extra_args`.

        >>> Asked(7, Sampler(top_k=20)).arguments()
        {'assay_seed': 7, 'assay_temperature': 1.0, 'assay_top_k': 20, 'assay_top_p': 1.0, 'assay_noise': 'murmur3'}
        """
        s = self.sampler
        found = {"seed": self.seed, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "noise": s.noise}
        return {PREFIX + name: value for name, value in found.items()}

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None) -> Asked | None:
        """Read `extra_args`; None where nothing of Assay's is in them. ValueError where it is not what `arguments` makes.

        All five are wanted: a default on one side that is another on the other side would refuse every completion.
        """
        given = {k.removeprefix(PREFIX): v for k, v in (arguments or {}).items() if k.startswith(PREFIX)}
        if not given:
            return None
        wanted = {"seed", "temperature", "top_k", "top_p", "noise"}
        if given.keys() != wanted:
            odd = ", ".join(PREFIX + name for name in sorted(given.keys() ^ wanted))
            raise ValueError(f"give {', '.join(sorted(PREFIX + n for n in wanted))}, no more and no less (see {odd})")
        seed = given.pop("seed")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"{PREFIX}seed is {seed!r}: give a whole number, at least 0 and below 2**63")
        if isinstance(given["temperature"], str) or isinstance(given["top_p"], str):
            raise ValueError(f"{PREFIX}temperature and {PREFIX}top_p must be numbers")
        return cls(seed, Sampler(**given))


def parameters(seed: int, sampler: Sampler, *, max_tokens: int, eos: int, route: Route) -> dict[str, Any]:
    """Keywords of vLLM's `SamplingParams` for one completion. ConfigError for what the route cannot draw.

    Tokens come back as ids: `detokenize` is off, and the end token is among them where it was drawn.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed!r}: give a whole number, at least 0 and below 2**63")
    found = {**NEUTRAL, "max_tokens": max_tokens, "stop_token_ids": [eos], "detokenize": False}
    if route == "processor":
        # vLLM takes the arg max of what the processor leaves
        return {**found, "temperature": 0.0, "extra_args": dict(Asked(seed, sampler).arguments())}
    if route != "native":
        raise ConfigError(f"route is {route!r}: native or processor")
    if sampler.noise != "murmur3":
        raise ConfigError(f"vLLM's sampler has the noise murmur3, not {sampler.noise}: take route processor")
    if not COLDEST <= sampler.temperature <= HOTTEST:
        raise ConfigError(
            f"vLLM's sampler takes temperatures from {COLDEST} to {HOTTEST}, not {sampler.temperature}: take route processor"
        )
    return {
        **found,
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "seed": seed,
    }


def body(
    prompt: tuple[int, ...], seed: int, sampler: Sampler, *, model: str, max_tokens: int, eos: int, route: Route
) -> dict[str, Any]:
    """The JSON of a request to `/v1/completions` of `vllm serve`; the answer's ids are in `choices[0].token_ids`.

    A JSON library that has floats only rounds seeds above 2**53.
    """
    found = parameters(seed, sampler, max_tokens=max_tokens, eos=eos, route=route)
    found.pop("detokenize")
    if "extra_args" in found:
        found["vllm_xargs"] = found.pop("extra_args")
    return {**found, "model": model, "prompt": list(prompt), "return_token_ids": True, "add_special_tokens": False}


def check(params: Any) -> None:
    """Refuse a request that asks for a seed of Assay's and for what would change its tokens. ValueError says what.

    `params`: vLLM's SamplingParams. A request without Assay's arguments is none of our business.
    """
    if Asked.of(params.extra_args) is None:
        return
    if params.temperature != 0:
        raise ValueError(
            f"temperature is {params.temperature}: give 0 beside {PREFIX}seed, and {PREFIX}temperature in vllm_xargs"
        )
    for name, value in NEUTRAL.items():
        if name not in ("ignore_eos", "min_p") and getattr(params, name) != value:
            raise ValueError(f"{name} is {getattr(params, name)}: beside {PREFIX}seed it must be {value}")
    for name in ABSENT:
        if getattr(params, name, None):
            raise ValueError(f"{name} changes what is drawn: leave it out beside {PREFIX}seed")
