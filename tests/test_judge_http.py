"""A judge behind HTTP: every way in which an endpoint fails is an abstention, in bounded time and memory.

The server is a real one on loopback whose replies the test chooses: what is tried is the client. The real model behind a
real server is the slow test at the end.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from assay import models
from assay.config import ConfigError
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


@pytest.mark.slow
def test_smollm2_behind_a_real_server_judges_the_hostile_corpus(server: Server) -> None:
    """The whole way with a real model: an answer to every text that may be asked about, and none of the texts that hold a
    decision is accepted. SmolLM2 is too small to judge: nearly all of its answers are cut off or no decision."""
    models.resolve(models.DEFAULT)
    server.reply = chat_with(models.load(models.DEFAULT))
    screen = make_judge("smollm2", url=server.url, style="decision", concurrency=4, timeout=600.0, deadline=600.0)
    verdicts, state = screen.screen(pool(GOOD, *HOSTILE), {})
    print(state["counts"], [v.sentence for v in verdicts])
    asked = [v for v in verdicts if v.evidence["tokens_in"] > 0]
    assert len(asked) == len(server.bodies) > 5, "every request was answered, none twice"
    assert all(v.weight == 0 for v, text in zip(verdicts[1:], HOSTILE) if answers_itself(clean(text)[0]))
    assert all(v.reason in (Reason.OK, Reason.JUDGE, Reason.ABSTAINED) for v in verdicts)
    sent = json.dumps([b["messages"] for b in server.bodies], ensure_ascii=False)
    assert not any(mark in sent for mark in ("<|im_end|>", "<|im_start|>", "\u200b", "\u202e", "\U000e0044"))
    assert max(len(json.dumps(b)) for b in server.bodies) < 20_000, "a text of 100,000 characters is not sent"
    assert state["counts"]["latency"] > 0
