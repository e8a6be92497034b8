"""A judge behind any OpenAI-compatible endpoint: vLLM, llama.cpp, `transformers serve`, a hosted one.

One POST to `/chat/completions` a prompt, a bounded number at a time, over the standard library: the one call that is
needed is no reason for a client package. The endpoint is the operator's choice and is still not believed more than it
must be: its body is bounded, redirects are not followed (they would carry the key elsewhere), and whatever is not an
answer is an abstention with its reason. An endpoint gets text, so quoted text cannot be tokenised apart as a local
judge does; `judge_chat.clean` has broken the chat markup in it.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message as Headers
from http.client import HTTPException
from typing import IO, Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from assay.config import ConfigError
from assay.config.common import Count, Frozen, Positive
from assay.swarm.judge_chat import Answer, Message

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may mend."""
LONGEST_WAIT = 30.0
"""Seconds between two tries at most, whatever the endpoint asks for."""


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        return None


class HttpJudge:
    """Backend for `Judge`. ConfigError for an address that is none."""

    def __init__(self, url: str, model: str, settings: Endpoint | None = None) -> None:
        self.settings = settings or Endpoint()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(
                f"judge: {url!r} is no http(s) address; write http://host:port/v1, the key in the environment"
            )
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        asked = self.settings.model_dump(include={"temperature"})
        self.id = f"{self.url}|{model}|{json.dumps(asked, sort_keys=True)}"  # not the key: ids are written down
        self._opener = urllib.request.build_opener(_NoRedirect)

    def generate(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, seed: int) -> list[Answer]:
        """An answer for each prompt in order, or its problem; at most `concurrency` requests at a time."""
        until = time.monotonic() + self.settings.deadline
        gate = threading.Semaphore(self.settings.concurrency)
        out = [Answer(problem="the judge's time for this round was over")] * len(prompts)

        def one(at: int) -> None:
            with gate:
                answer = self._ask(prompts[at], max_tokens, (seed + at) % 2**31, until)
            if time.monotonic() <= until:  # later, the caller has gone on
                out[at] = answer

        pool = ThreadPoolExecutor(min(self.settings.concurrency, max(1, len(prompts))))
        futures = [pool.submit(one, at) for at in range(len(prompts))]
        for future in futures:
            try:
                future.result(timeout=max(0.0, until - time.monotonic()))
            except TimeoutError:
                break
        pool.shutdown(wait=False, cancel_futures=True)
        return list(out)

    def _ask(self, prompt: Sequence[Message], max_tokens: int, seed: int, until: float) -> Answer:
        """One prompt with its tries. Waits double, with jitter, and follow Retry-After within bounds."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": m.role, "content": m.text} for m in prompt],
                "max_tokens": max_tokens,
                "temperature": self.settings.temperature,
                "seed": seed,
                "stream": False,
            }
        ).encode()
        begun, wait = time.monotonic(), 0.5
        for turn in range(self.settings.retries + 1):
            left = until - time.monotonic()
            if left <= 0:
                return Answer(problem="the judge's time for this round was over", seconds=time.monotonic() - begun)
            raw, problem, after = self._post(body, min(self.settings.timeout, left))
            if raw is not None:
                return self._read(raw, time.monotonic() - begun)
            if after is None or turn == self.settings.retries:
                break
            pause = min(max(after, wait * random.uniform(0.5, 1.0)), LONGEST_WAIT, max(0.0, until - time.monotonic()))
            time.sleep(pause)
            wait *= 2
        return Answer(problem=problem, seconds=time.monotonic() - begun)

    def _post(self, body: bytes, timeout: float) -> tuple[bytes | None, str, float | None]:
        """The body of a good reply; or its problem and, where another try may help, seconds to wait before it."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "assay"}
        if key := os.environ.get(self.settings.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=timeout) as reply:
                raw = _bounded(reply, self.settings.max_bytes, time.monotonic() + timeout)
        except urllib.error.HTTPError as error:
            error.close()
            return None, f"the judge's endpoint says {error.code}", _after(error) if error.code in AGAIN else None
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", error)
            return None, f"the judge's endpoint cannot be reached: {type(reason).__name__}", 0.0
        if len(raw) > self.settings.max_bytes:
            return None, f"the judge's reply is longer than {self.settings.max_bytes} bytes", None
        return raw, "", None

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


def _bounded(reply: Any, most: int, until: float) -> bytes:
    """The body, or the part of it that shows it to be too long. TimeoutError where it only trickles in: the socket's own
    time-out begins again with every byte."""
    parts, size = [], 0
    while size <= most and (part := reply.read1(1 << 16)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(parts)


def _count(usage: Any, key: str) -> int:
    """A count the endpoint claims: a whole number that can be, else 0."""
    found = usage.get(key) if isinstance(usage, Mapping) else None
    return found if type(found) is int and 0 <= found < 1 << 40 else 0


def _after(error: urllib.error.HTTPError) -> float:
    """Seconds the endpoint asks to wait; 0 where it says nothing one can read."""
    try:
        found = float(error.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return found if 0 <= found <= LONGEST_WAIT else LONGEST_WAIT if found > 0 else 0.0
