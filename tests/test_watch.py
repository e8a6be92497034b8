"""`assay watch`: the page while a run goes on, for this machine and nobody else."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from assay.report import ReportError
from assay.report.watch import Server, Watched, server
from browser import BROWSER, browser
from test_report import HOSTILE, make_run


@contextmanager
def served(directory: Path) -> Iterator[Server]:
    with server(directory, 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


def ask(found: Server, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", found.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{found.server_port}" if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "assay"
    connection.close()
    return answer.status, text


def grow(run: Path, rounds: int, whole: Path) -> None:
    """What `whole` had written after so many rounds, into `run`."""
    run.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        lines = (whole / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[: rounds + 1]))


def test_only_the_page_its_data_and_only_by_the_loopback_s_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run", clients=2, malicious=1, rounds=1)
    (tmp_path / "secret").write_text("secret")
    with served(tmp_path) as found:
        assert found.server_address[0] == "127.0.0.1"
        status, page = ask(found)
        assert status == 200
        assert "connect-src 'self'" in page
        assert "Round by round" in page
        status, part = ask(found, "/page")
        assert (status, "Plotly, Inc" in part) == (200, False)
        assert json.loads(ask(found, "/version")[1])["version"] in page
        assert ask(found, "/", method="HEAD") == (200, "")
        for path in ("/secret", "/../secret", "/run/", "/run/ledger.jsonl", "/%2e%2e/secret", "/page/", "/?x"):
            assert ask(found, path)[0] == 404, path
        for host in ("evil.example", f"evil.example:{found.server_port}", "127.0.0.1", "127.0.0.1:1", "", f"localhost.evil:{found.server_port}"):  # fmt: skip
            status, text = ask(found, host=host)
            assert (status, "Round by round" in text) == (403, False), host
        assert ask(found, host=f"localhost:{found.server_port}")[0] == 200
        assert ask(found, method="POST")[0] == 501


def test_the_page_follows_the_files_and_not_oftener_than_its_cost_allows(tmp_path: Path) -> None:
    whole, now = make_run(tmp_path / "whole", clients=2, malicious=1, rounds=3), [0.0]
    place = tmp_path / "place"
    place.mkdir()
    watched = Watched(place, clock=lambda: now[0])
    page, version = watched.page()
    assert (version, "Waiting for the first round" in page.whole) == ("", True)
    grow(place / "run", 1, whole)
    page, first = watched.page()
    assert "1 round so far" in page.whole
    assert watched.page() == (page, first), "nothing changed, nothing made"
    watched._next = 5.0  # as after a page that took half a second
    grow(place / "run", 2, whole)
    assert watched.page()[1] == first
    now[0] = 5.0
    page, second = watched.page()
    assert second != first
    assert "2 rounds so far" in page.whole
    (place / "run" / "summary.json").write_text('{"na')  # being written
    page, third = watched.page()
    assert (third, "2 rounds so far" in page.whole, "is not JSON" in watched.problem) == (second, True, True)
    shutil.copy(whole / "summary.json", place / "run")
    shutil.copy(whole / "ledger.jsonl", place / "run")
    page, _ = watched.page()
    assert watched.problem == ""
    assert "so far" not in page.whole


def test_a_port_that_is_taken_and_a_place_that_is_none(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ReportError, match="choose another with --port"):
            server(tmp_path, taken.getsockname()[1])
    with pytest.raises(ReportError, match="is not a directory: pass one"):
        server(tmp_path / "nowhere", 0)


def test_the_command_serves_and_ends_cleanly(tmp_path: Path) -> None:
    make_run(tmp_path / "run", clients=2, malicious=1, rounds=1)
    running = subprocess.Popen(
        [sys.executable, "-m", "assay", "watch", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell ignores for what it runs behind
    )  # fmt: skip
    assert running.stdout
    said = running.stdout.readline()
    port = int(said.split("127.0.0.1:")[1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/version")
    assert connection.getresponse().status == 200
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=60)
    assert (running.returncode, out, error) == (0, "ended\n", "")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_an_open_page_is_refreshed_but_never_under_the_reader_s_hands(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", clients=4, malicious=2, rounds=3, names={1: HOSTILE})
    run = tmp_path / "place" / "run"
    run.parent.mkdir()
    grow(run, 1, whole)
    line = "document.querySelector('[data-live] output').textContent"
    rounds = "document.querySelector('[data-chart=refusal_rate]').data[0].x.length"
    with served(run.parent) as found, browser(tmp_path / "profile") as tab:
        tab.open(f"{found.address}#?f.find=client")
        tab.wait(f"{line}.startsWith('Live')")
        assert tab.run(rounds) == 2
        grow(run, 2, whole)
        tab.wait(f"{rounds} === 3")
        assert tab.run("document.querySelector('[data-filter=find]').value") == "client", "as the reader left it"
        assert len(tab.run("[...document.querySelectorAll('th > .opener')].map((n) => n.textContent)")) == 3
        tab.run("document.querySelector('[data-filter=find]').focus()")
        grow(run, 3, whole)
        tab.wait("document.querySelector('[data-live] button').textContent === 'Show what is new'")
        assert tab.run(rounds) == 3
        tab.run("document.querySelector('[data-live] button').click()")
        tab.wait(f"{rounds} === 4")
        assert tab.run("document.documentElement.dataset.errors") is None
        assert tab.run("document.documentElement.dataset.owned") is None
        found.shutdown()
        found.server_close()
        tab.wait(f"{line}.startsWith('assay watch has ended')")
        assert tab.run(rounds) == 4
