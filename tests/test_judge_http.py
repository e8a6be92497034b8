"""A judge behind HTTP: every way in which an endpoint fails is an abstention, in bounded time and memory.

The server is a real one on loopback whose replies the test chooses: what is tried is the client. The real model behind a
real server (`transformers serve`) is the slow test at the end.
"""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

import assay.swarm
from assay import models
from assay.config import ConfigError
from assay.swarm import judge_wire
from assay.swarm.judge import Endpoint, HttpJudge, Judge, make_judge
from assay.swarm.judge_chat import answers_itself, clean, compose
from assay.verdict import Reason
from test_judge import GOOD, HOSTILE, pool

PROMPT = compose("decision", "==" + "0" * 32 + "==", "1 + 1", "2")
Reply = Callable[["Server", dict[str, Any]], tuple[int, dict[str, str], bytes]]


def said(text: str | None, finish: str = "stop", **usage: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7, **usage}}).encode()


class Server(ThreadingHTTPServer):
    """Answers as `reply` says and writes down what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Reply = lambda server, body: (200, {}, said("Fine.\nDECISION: accept"))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.open += 1
            server.most = max(server.most, server.open)
        status, headers, raw = server.reply(server, body)
        with server.lock:
            server.open -= 1
        try:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            pass  # the client has hung up

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def judge(server: Server, **settings: Any) -> HttpJudge:
    return HttpJudge(server.url, "m", Endpoint(**{"retries": 0, "timeout": 5.0, **settings}))


def test_an_accepted_completion_with_what_it_cost(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "k-123")
    backend = judge(server, api_key_env="SECRET_KEY", price_in=1.0, price_out=10.0)
    screen = Judge(backend=backend, style="decision")
    (verdict,), state = screen.screen(pool(GOOD), {})
    assert (verdict.weight, verdict.reason) == (1.0, Reason.OK)
    assert verdict.evidence["cost"] == pytest.approx((100 * 1.0 + 7 * 10.0) / 1e6)
    assert verdict.evidence["latency"] > 0
    assert state["counts"]["cost"] == verdict.evidence["cost"]
    assert server.headers[0]["Authorization"] == "Bearer k-123"
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["stream"]) == ("m", 0.0, False)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "k-123" not in json.dumps(state) + backend.id, "ids and states are written down"
    again, _ = screen.screen(pool(GOOD), state)
    assert (again[0].weight, len(server.bodies)) == (1.0, 1), "remembered by content"


@pytest.mark.parametrize(
    ("status", "raw", "says"),
    [
        (401, b"", "says 401"),
        (404, b"", "says 404"),
        (500, b"", "says 500"),
        (302, b"", "says 302"),
        (200, b"", "no chat completion"),
        (200, b"<html>DECISION: accept</html>", "no chat completion"),
        (200, b"[]", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b'{"choices": [{"message": "DECISION: accept"}]}', "no chat completion"),
        (200, b'{"choices": {"0": 1}}', "no chat completion"),
        (200, b"[" * 9_000, "no chat completion"),
        (200, b"\xff\xfe\x00", "no chat completion"),
        (200, said(None), "an empty answer"),
        (200, said("DECISION: accept", "length"), "no decision"),
        (200, said("x" * 20_000 + "\nDECISION: accept"), "longer than 10000 bytes"),
        (200, said("I accept it gladly."), "no decision"),
        (200, said("DECISION: accept\nDECISION: reject"), "several decisions"),
    ],
)
def test_whatever_is_no_answer_is_an_abstention(server: Server, status: int, raw: bytes, says: str) -> None:
    server.reply = lambda server, body: (status, {"Location": f"{server.url}/elsewhere"}, raw)
    screen = Judge(backend=judge(server, max_bytes=10_000), style="decision")
    (verdict,), state = screen.screen(pool(GOOD), {})
    assert (verdict.weight, verdict.reason) == (0.0, Reason.ABSTAINED)
    assert says in verdict.sentence
    assert len(server.bodies) == 1, "no redirect is followed"
    gave_an_answer = says in ("an empty answer", "no decision", "several decisions")
    assert bool(state["seen"]) == gave_an_answer, "an outage is asked about again, an answer is not"


def test_usage_is_a_claim(server: Server) -> None:
    for wrong in (-5, "many", 1e9, True, 1 << 50, None):
        server.reply = lambda s, b, wrong=wrong: (200, {}, said("DECISION: accept", prompt_tokens=wrong))  # type: ignore[misc]
        (answer,) = judge(server).generate([PROMPT], max_tokens=8, seed=0)
        assert (answer.text, answer.tokens_in, answer.tokens_out) == ("DECISION: accept", 0, 7)


@pytest.mark.parametrize(("status", "tries"), [(429, 3), (503, 3), (400, 1), (401, 1)])
def test_only_what_may_mend_is_tried_again(server: Server, status: int, tries: int) -> None:
    def reply(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        return (status, {"Retry-After": "0"}, b"") if len(server.bodies) < 3 else (200, {}, said("DECISION: accept"))

    server.reply = reply
    (answer,) = judge(server, retries=5).generate([PROMPT], max_tokens=8, seed=0)
    assert len(server.bodies) == tries
    assert bool(answer.text) == (tries == 3)


def test_as_many_as_the_limit_at_a_time_and_each_row_its_own_answer(server: Server) -> None:
    three = threading.Barrier(3)  # nobody is answered before three are waiting

    def reply(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        three.wait(30)
        return 200, {}, said(body["messages"][1]["content"].split("\n")[5])

    server.reply = reply
    prompts = [compose("decision", "==" + "0" * 32 + "==", "t", f"row {i}") for i in range(12)]
    answers = judge(server, concurrency=3, timeout=60.0).generate(prompts, max_tokens=8, seed=0)
    assert [a.text for a in answers] == [f"row {i}" for i in range(12)]
    assert server.most == 3


def test_a_silent_endpoint_costs_the_deadline_and_no_more(server: Server) -> None:
    """Two are asked and never answered; when the round's time is over the other four are not asked at all."""
    release = threading.Event()
    server.reply = lambda s, b: (release.wait(60), (200, {}, said("DECISION: accept")))[1]  # type: ignore[return-value]
    answers = judge(server, deadline=0.5, timeout=50.0, concurrency=2).generate([PROMPT] * 6, max_tokens=8, seed=0)
    asked = len(server.bodies)
    release.set()
    assert all(a.problem and not a.text for a in answers)
    assert asked <= 2


def test_an_endpoint_that_trickles_is_cut_off(server: Server) -> None:
    """A byte now and then keeps every single read within its time-out."""
    raw, sent = said("DECISION: accept") + b" " * 10_000, []

    def reply(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Length": str(len(raw))}, b""

    def trickle(self: Handler) -> None:
        Handler.do_POST(self)
        try:
            for at in range(len(raw)):
                self.wfile.write(raw[at : at + 1])
                sent.append(at)
                time.sleep(0.05)
        except OSError:
            pass

    server.reply = reply
    server.RequestHandlerClass = type("Trickling", (Handler,), {"do_POST": trickle})
    (answer,) = judge(server, timeout=0.5).generate([PROMPT], max_tokens=8, seed=0)
    assert "TimeoutError" in answer.problem
    assert len(sent) < len(raw)


def test_nobody_there_and_an_address_that_is_none() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    screen = make_judge("m", url=f"http://127.0.0.1:{port}/v1", retries=0)
    (verdict,), state = screen.screen(pool(GOOD), {})
    assert (verdict.weight, verdict.reason) == (0.0, Reason.ABSTAINED)
    assert "cannot be reached" in verdict.sentence
    assert not state["seen"], "asked again another time"
    for url in ("ftp://x/v1", "file:///etc/passwd", "localhost:8000", "http://user:key@host/v1", ""):
        with pytest.raises(ConfigError, match="is no http"):
            HttpJudge(url, "m")
    with pytest.raises(ConfigError, match="concurrency"):
        make_judge("m", url="http://127.0.0.1:1/v1", concurrency=0)


def test_nothing_of_the_environment_reaches_the_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client package reads all of these by itself. Only the key that the config names is sent, and to no proxy."""
    elsewhere = "http://127.0.0.1:1/v1"
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", "not-for-you")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-More: not-for-you\nAuthorization: Bearer not-for-you")
    monkeypatch.setenv("OPENAI_BASE_URL", elsewhere)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, elsewhere)
    for key, sent in (("", {}), ("k-7", {"authorization": "Bearer k-7"})):
        monkeypatch.setenv("JUDGE_KEY", key)
        (answer,) = judge(server, api_key_env="JUDGE_KEY").generate([PROMPT], max_tokens=8, seed=0)
        assert answer.text.endswith("DECISION: accept")
        headers = {name.lower(): value for name, value in server.headers[-1].items()}
        assert int(headers.pop("content-length")) > 0
        assert headers == {
            "host": server.url.split("/")[2], "content-type": "application/json", "accept": "application/json",
            "accept-encoding": "identity", "user-agent": "assay", **sent,
        }  # fmt: skip
    keys = {"model", "messages", "max_tokens", "temperature", "seed", "stream"}
    assert all(set(body) == keys for body in server.bodies)


@pytest.mark.parametrize("after", ["1e9", "121", "inf", "nan", "-5", "Wed, 21 Oct 2099 07:28:00 GMT", "soon"])
def test_what_an_endpoint_asks_about_tries_is_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """`openai` alone gives up where more than two minutes are asked for, and obeys `x-should-retry` for any status."""
    monkeypatch.setattr(judge_wire, "LONGEST_WAIT", 0.05)
    told = {"Retry-After": after, "Retry-After-Ms": "90000", "X-Should-Retry": "false"}
    server.reply = lambda s, b: (429, told, b"") if len(s.bodies) == 1 else (401, {"X-Should-Retry": "true"}, b"")
    (answer,) = judge(server, retries=5).generate([PROMPT], max_tokens=8, seed=0)
    assert "says 401" in answer.problem
    assert len(server.bodies) == 2


def test_a_compressed_reply_is_not_unpacked(server: Server) -> None:
    """Nobody asked for it, and a few kilobytes can become gigabytes."""
    raw = gzip.compress(said("DECISION: accept" + " " * 100_000))
    assert len(raw) < 1_000
    server.reply = lambda s, b: (200, {"Content-Encoding": "gzip"}, raw)
    (answer,) = judge(server, max_bytes=1_000).generate([PROMPT], max_tokens=8, seed=0)
    assert "no chat completion" in answer.problem


def test_an_endpoint_that_trickles_headers_is_hung_up_on_when_the_round_is_over(server: Server) -> None:
    """No single read of a socket takes long; left alone, it would hold a thread (and the end of the process) for days."""
    hung_up = threading.Event()

    def trickle(self: Handler) -> None:
        try:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
            for _ in range(3_000):
                self.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            hung_up.set()

    server.RequestHandlerClass = type("Trickling", (Handler,), {"do_POST": trickle})
    (answer,) = judge(server, timeout=50.0, deadline=0.5).generate([PROMPT], max_tokens=8, seed=0)
    assert "time for this round was over" in answer.problem
    assert hung_up.wait(30)


def test_without_the_client_package_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(assay.swarm, "judge_wire")
    monkeypatch.delitem(sys.modules, "assay.swarm.judge_wire")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"needs openai .* pip install 'assay\[judge\]'"):
        make_judge("m", url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize("text", HOSTILE)
def test_an_endpoint_that_echoes_accepts_nobody(server: Server, text: str) -> None:
    """Over the wire: what a text says reaches the server with its markup broken, and comes back as no decision."""
    server.reply = lambda s, body: (200, {}, said(body["messages"][1]["content"]))
    (verdict,), _ = Judge(backend=judge(server), style="decision").screen(pool(text), {})
    assert verdict.weight == 0.0
    assert not any(mark in json.dumps(server.bodies) for mark in ("<|im_end|>", "<|im_start|>", "[INST]"))


def chat_with(base: models.Base) -> Reply:
    """A chat completion by a real model, as a server makes it of plain messages: its own template reads their text."""
    lock = threading.Lock()

    def reply(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        text = base.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = base.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with lock, torch.no_grad():
            mask = torch.ones_like(ids)
            out = base.model.generate(ids, attention_mask=mask, max_new_tokens=body["max_tokens"], do_sample=False)
        made = out[0, ids.shape[1] :]
        finish = "stop" if int(made[-1]) == base.tokenizer.eos_token_id else "length"
        answer = base.tokenizer.decode(made, skip_special_tokens=True)
        return 200, {}, said(answer, finish, prompt_tokens=ids.shape[1], completion_tokens=len(made))

    return reply


@pytest.fixture
def real(server: Server, tmp_path: Path) -> Iterator[tuple[str, str, list[dict[str, Any]] | None]]:
    """SmolLM2 behind `transformers serve` where its packages are installed, else behind our own server, which also writes
    down what it was asked: address, model, requests."""
    weights = str(models.resolve(models.DEFAULT))
    if not is_serve_available():
        server.reply = chat_with(models.load(models.DEFAULT))
        yield server.url, "smollm2", server.bodies
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).parent / "transformers"), "serve", weights, "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        serve = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port], stdout=log, stderr=log)
        try:
            up = until(lambda: serve.poll() is not None or socket.socket().connect_ex(("127.0.0.1", int(port))) == 0)
            assert up, "it never listened"
            assert serve.poll() is None, (tmp_path / "log").read_text()[-2_000:]
            yield f"http://127.0.0.1:{port}/v1", weights, None
        finally:
            serve.terminate()
            serve.wait(60)


def until(happened: Callable[[], bool], seconds: float = 300.0) -> bool:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


@pytest.mark.slow
def test_smollm2_behind_a_real_server_judges_the_hostile_corpus(
    real: tuple[str, str, list[dict[str, Any]] | None],
) -> None:
    """The whole way with a real model: an answer to every text that may be asked about, and none of the texts that hold a
    decision is accepted. SmolLM2 is too small to judge: nearly all of its answers are cut off or no decision."""
    url, model, bodies = real
    screen = make_judge(model, url=url, style="decision", concurrency=4, timeout=600.0, deadline=600.0)
    verdicts, state = screen.screen(pool(GOOD, *HOSTILE), {})
    print("transformers serve" if bodies is None else "own server", state["counts"], [v.sentence for v in verdicts])
    asked = [v for v in verdicts if v.evidence["tokens_in"] > 0]
    assert len(asked) > 5
    assert not any("endpoint" in v.sentence or "time for this round" in v.sentence for v in verdicts), (
        "all were answered"
    )
    assert all(v.evidence["tokens_out"] > 0 for v in asked)
    assert all(v.weight == 0 for v, text in zip(verdicts[1:], HOSTILE) if answers_itself(clean(text)[0]))
    assert all(v.reason in (Reason.OK, Reason.JUDGE, Reason.ABSTAINED) for v in verdicts)
    assert state["counts"]["latency"] > 0
    if bodies is None:
        return
    assert len(asked) == len(bodies), "every request was answered, none twice"
    sent = json.dumps([b["messages"] for b in bodies], ensure_ascii=False)
    assert not any(mark in sent for mark in ("<|im_end|>", "<|im_start|>", "\u200b", "\u202e", "\U000e0044"))
    assert max(len(json.dumps(b)) for b in bodies) < 20_000, "a text of 100,000 characters is not sent"
