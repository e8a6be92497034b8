"""A judge behind any OpenAI-compatible endpoint: vLLM, llama.cpp, `transformers serve`, a hosted one.

One chat completion a prompt, a bounded number at a time, by the `openai` package (extra `assay[judge]`), which also
tries again. The endpoint is the operator's choice and is still not believed more than it must be: judge_wire.py bounds
what it may send and how long it may take, redirects are not followed (they would carry the key elsewhere), and whatever
is not an answer is an abstention with its reason. Replies are read here and not by `openai`, whose objects hold whatever
types the endpoint sent. An endpoint gets text, so quoted text cannot be tokenised apart as a local judge does;
`judge_chat.clean` has broken the chat markup in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from assay.config import ConfigError
from assay.config.common import Count, Frozen, Positive
from assay.swarm.judge_chat import Answer, Message


class Endpoint(Frozen):
    """How an endpoint is asked. Prices are per million tokens, in any currency; cost is in the same."""

    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    concurrency: Count = 8
    timeout: Positive = 60.0
    """Seconds one try may take."""
    deadline: Positive = 300.0
    """Seconds for all prompts of a round together; what is not answered then abstains."""
    retries: Annotated[int, Field(ge=0)] = 3
    max_bytes: Count = 1 << 20
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; none is sent where it is not set."""
    price_in: Annotated[float, Field(ge=0.0)] = 0.0
    price_out: Annotated[float, Field(ge=0.0)] = 0.0


class HttpJudge:
    """Backend for `Judge`. ConfigError for an address that is none, and where `openai` is not installed."""

    def __init__(self, url: str, model: str, settings: Endpoint | None = None) -> None:
        self.settings = settings or Endpoint()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(
                f"judge: {url!r} is no http(s) address; write http://host:port/v1, the key in the environment"
            )
        try:
            from assay.swarm import judge_wire
        except ImportError as error:
            raise ConfigError(f"a judge at a url needs openai ({error}); pip install 'assay[judge]'") from error
        self._wire = judge_wire
        self.base = url.rstrip("/")
        self.url, self.model = self.base + "/chat/completions", model
        asked = self.settings.model_dump(include={"temperature"})
        self.id = f"{self.url}|{model}|{json.dumps(asked, sort_keys=True)}"  # not the key: ids are written down

    def generate(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, seed: int) -> list[Answer]:
        """An answer for each prompt in order, or its problem; at most `concurrency` requests at a time."""
        settings = self.settings
        wire = self._wire.Wire(
            key=os.environ.get(settings.api_key_env, ""),
            timeout=settings.timeout,
            max_bytes=settings.max_bytes,
            connections=settings.concurrency,
        )
        client = wire.client(self.base, settings.retries)
        create = client.chat.completions.with_raw_response.create
        until = wire.begin(settings.deadline)
        out = [Answer(problem=self._wire.OVER)] * len(prompts)

        def one(at: int) -> None:
            answer = self._ask(create, prompts[at], max_tokens, (seed + at) % 2**31)
            if time.monotonic() <= until:  # later, the caller has gone on
                out[at] = answer

        pool = ThreadPoolExecutor(min(settings.concurrency, max(1, len(prompts))))
        futures = [pool.submit(one, at) for at in range(len(prompts))]
        try:
            for future in futures:
                future.result(timeout=max(0.0, until - time.monotonic()))
        except TimeoutError:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            wire.hang_up()
            if all(future.done() for future in futures):
                client.close()
        return list(out)

    def _ask(self, create: Callable[..., Any], prompt: Sequence[Message], max_tokens: int, seed: int) -> Answer:
        """One prompt with its tries."""
        begun = time.monotonic()
        try:
            reply = create(
                model=self.model,
                messages=[{"role": m.role, "content": m.text} for m in prompt],
                max_tokens=max_tokens,
                temperature=self.settings.temperature,
                seed=seed,
                stream=False,
            )
        except self._wire.OpenAIError as error:
            return Answer(problem=self._wire.problem_of(error), seconds=time.monotonic() - begun)
        return self._read(reply.content, time.monotonic() - begun)

    def _read(self, raw: bytes, seconds: float) -> Answer:
        """An answer out of a reply, or what is wrong with it."""
        try:
            reply = json.loads(raw)
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            usage = reply.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return Answer(problem="the judge's reply is no chat completion", seconds=seconds)
        tokens_in, tokens_out = (_count(usage, key) for key in ("prompt_tokens", "completion_tokens"))
        price = self.settings.price_in * tokens_in + self.settings.price_out * tokens_out
        spent = Answer(tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds, cost=price / 1e6)
        if not isinstance(text, str):
            text = ""  # a refusal: an answer without a decision, which is remembered as one
        if choice.get("finish_reason") == "length":
            # cut off wherever the limit fell, also behind a decision that was about to be doubted
            text += "\n[cut off at max_tokens]"
        return replace(spent, text=text)


def _count(usage: Any, key: str) -> int:
    """A count the endpoint claims: a whole number that can be, else 0."""
    found = usage.get(key) if isinstance(usage, Mapping) else None
    return found if type(found) is int and 0 <= found < 1 << 40 else 0
