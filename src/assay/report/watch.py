"""The page of runs that are still going on, on this machine only: `server(directory, port)` for `assay watch`.

It listens on 127.0.0.1 and gives three things: the page, the page without plotly.js (to put in place of the one that is
open) and a version. There are no files behind it, so nothing can be listed or climbed out of. A Host header that does
not name the loopback is refused: a stranger's web site whose name is made to point here (DNS rebinding) would otherwise
be the same origin as this page, and could read it.

The page is made when it is asked for and files have changed, and not before ten times the seconds have passed that the
last one took: looking at a run must not slow it down.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from assay import run_dir
from assay.report import Page, render
from assay.report.records import ReportError, clean

FILES = (run_dir.SUMMARY, run_dir.METRICS, run_dir.LEDGER)
PATIENCE = 10  # times the seconds of the last page
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def runs_under(directory: Path) -> list[Path]:
    """The directory itself if it is a run with something to show, else those in it; none while all are preparing."""
    places = [directory, *sorted(path for path in directory.glob("*") if path.is_dir())]
    found = [path for path in places if any((path / name).is_file() for name in (run_dir.SUMMARY, run_dir.METRICS))]
    return found[:1] if found and found[0] == directory else found


class Watched:
    """The newest page of a directory. Safe for several threads: one of them makes it, the others wait."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock, self._lock = directory, clock, threading.Lock()
        self._page: Page | None = None
        self._of, self._next, self.problem = "", 0.0, ""

    def page(self) -> tuple[Page, str]:
        """The page and its version; it is made anew where files have changed and the last one was not just now."""
        with self._lock:
            of = self._state()
            if self._page is None or (of != self._of and self._clock() >= self._next):
                began = self._clock()
                self._make(of)
                self._next = self._clock() + PATIENCE * (self._clock() - began)
            assert self._page is not None
            return self._page, self._of

    def _make(self, of: str) -> None:
        runs = runs_under(self._directory)
        self.problem = "" if runs else f"nothing to show in {self._directory} yet"
        if runs:
            try:
                self._page, self._of = render(runs, title=f"{self._directory.name}, watched", version=of), of
                return
            except ReportError as error:  # half a file, most often: the next look finds the other half
                self.problem = str(error)
        if self._page is None or not self._of:
            self._page = Page(_waiting(str(clean(self.problem))), "")

    def _state(self) -> str:
        """A name for what the files are now."""
        told = []
        for run in runs_under(self._directory):
            for name in FILES:
                try:
                    stat = (run / name).stat()
                    told.append((str(run), name, stat.st_size, stat.st_mtime_ns))
                except OSError:
                    continue
        return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()[:16] if told else ""


def _waiting(text: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><title>Assay waits</title>'
        f"<h1>Waiting for the first round</h1><p>{escape(text)}</p></html>"
    )


class Server(ThreadingHTTPServer):
    """Bound to the loopback, whatever the port."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        names = ("127.0.0.1", "localhost")
        return tuple(f"{name}:{self.server_port}" for name in names) + (names if self.server_port == 80 else ())


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of three paths."""

    timeout = 30
    server: Server

    def do_GET(self) -> None:
        if (self.headers.get_all("Host") or []) not in [[host] for host in self.server.hosts]:
            self._send(403, "text/plain", "this page is for this machine: open it by the address that was printed\n")
        elif self.path == "/":
            self._send(200, "text/html", self.server.watched.page()[0].whole)
        elif self.path == "/page":
            self._send(200, "text/html", self.server.watched.page()[0].without_plotly)
        elif self.path == "/version":
            _, version = self.server.watched.page()
            said = {"version": version, "problem": str(clean(self.server.watched.problem))}
            self._send(200, "application/json", json.dumps(said))
        else:
            self._send(404, "text/plain", "there is only one page here\n")

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():  # of refusals too
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "assay"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the run's."""


def server(directory: Path, port: int) -> Server:
    """A server of `directory`'s page, bound but not yet serving. ReportError where the port cannot be had."""
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory: pass one that a run writes to, or a folder of such")
    try:
        return Server(Watched(directory), port)
    except (OSError, OverflowError) as error:
        raise ReportError(f"port {port} cannot be had ({error}): choose another with --port, 0 for any") from None
