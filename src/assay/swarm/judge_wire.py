"""The wire under `openai`'s client: what reaches a judge's endpoint, and how much of what comes back.

The client reads keys, organisation and further headers from the environment, sends along what machine it runs on, reads
a reply however long it is, and obeys the endpoint about retries. So nothing passes here but what is listed: of a request
the body, the operator's key and four plain headers, of a reply its status, a bounded body and a bounded Retry-After.
No proxy is used, whatever the environment names: the prompts and the key go to the address the operator wrote.
Certificates are the system's, or those of SSL_CERT_FILE and SSL_CERT_DIR. Only judge_http.py imports this, when asked.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx2
from openai import APIConnectionError, APIStatusError, OpenAI
from openai import OpenAIError as OpenAIError  # for judge_http.py, which must load without the package

LONGEST_WAIT = 30.0
"""Seconds between two tries at most, whatever the endpoint asks for."""
OVER = "the judge's time for this round was over"
CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")
"""Trace events of httpcore that bring a new socket."""


class Final(OpenAIError):
    """What no other try would mend: `openai` hands on errors of its own kind without another try."""


class Wire(httpx2.BaseTransport):
    """The transport of one round. `begin` starts its clock, `hang_up` ends whatever is still under way."""

    def __init__(self, *, key: str, timeout: float, max_bytes: int, connections: int) -> None:
        self.key, self.timeout, self.max_bytes = key, timeout, max_bytes
        self.until = math.inf
        self._inner = httpx2.HTTPTransport(limits=httpx2.Limits(max_connections=connections))
        self._lock, self._sockets, self._over = threading.Lock(), list[socket.socket](), False

    def client(self, url: str, retries: int) -> OpenAI:
        """A client over this wire. The key it is given never leaves: `handle_request` sets the operator's, or none."""
        http = httpx2.Client(transport=self, trust_env=False, follow_redirects=False)
        return OpenAI(
            base_url=url, api_key="unused", organization="", project="", webhook_secret="",
            timeout=self.timeout, max_retries=retries, http_client=http,
        )  # fmt: skip

    def begin(self, seconds: float) -> float:
        """`time.monotonic()` at which the round's time is over."""
        self.until = time.monotonic() + seconds
        return self.until

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        end = min(time.monotonic() + self.timeout, self.until)
        left = end - time.monotonic()
        if left <= 0:
            raise Final(OVER)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        headers["User-Agent"] = "assay"
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        extensions: dict[str, Any] = {"timeout": httpx2.Timeout(left).as_dict(), "trace": self._trace}
        sent = httpx2.Request(
            request.method, request.url, headers=headers, content=request.read(), extensions=extensions
        )
        reply = self._inner.handle_request(sent)
        try:
            body = self._body(reply, end) if reply.is_success else b""
        finally:
            reply.close()
        return httpx2.Response(reply.status_code, headers=self._kept(reply.headers), content=body)

    def hang_up(self) -> None:
        """Wake every thread that still reads or writes; it finds its connection at an end. Nothing is closed under it:
        the number of a closed socket may already be another's."""
        with self._lock:
            self._over = True
            for one in self._sockets:
                _shut(one)

    def close(self) -> None:
        self._inner.close()

    def _body(self, reply: httpx2.Response, end: float) -> bytes:
        """The bytes as they came, never unpacked: what small compressed bytes become has no bound. A time-out of the socket
        begins again with every byte, so the clock is read here too."""
        parts, size = [], 0
        for part in reply.iter_raw():
            size += len(part)
            if size > self.max_bytes:
                raise Final(f"the judge's reply is longer than {self.max_bytes} bytes")
            if time.monotonic() > end:
                raise httpx2.ReadTimeout("the reply only trickles in") from TimeoutError()
            parts.append(part)
        return b"".join(parts)

    def _kept(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Retry-After in seconds, bounded, and nothing else."""
        try:
            asked = float(headers.get("Retry-After", ""))
        except ValueError:
            return {}
        wait = min(asked, LONGEST_WAIT, self.until - time.monotonic())
        return {"Retry-After": f"{wait:.3f}"} if wait > 0 else {}

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event in CONNECTED:
            made = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.append(made)
                if self._over:
                    _shut(made)


def problem_of(error: OpenAIError) -> str:
    """One sentence; for a failed connection with the name of what lies at its root (`ConnectionRefusedError`)."""
    if isinstance(error, APIStatusError):
        return f"the judge's endpoint says {error.status_code}"
    if isinstance(error, APIConnectionError):
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        return f"the judge's endpoint cannot be reached: {type(root).__name__}"
    return str(error) if isinstance(error, Final) else f"the judge's client failed: {type(error).__name__}"


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # ended already; the plain shutdown also for TLS, whose own changes what a reader holds
        socket.socket.shutdown(one, socket.SHUT_RDWR)
