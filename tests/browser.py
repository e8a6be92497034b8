"""Headless Chromium over its own pipe: no driver, no port, nothing to install.

The DevTools protocol is JSON, a message to a NUL byte, on file descriptors 3 (in) and 4 (out) of a browser started with
`--remote-debugging-pipe`. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 120.0  # seconds until a test gives up; nothing is measured against it


class Tab:
    """One page of the browser."""

    def __init__(self, to: int, out: int) -> None:
        self._to, self._out, self._pending, self._number, self._session = to, out, b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come in between are passed over."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            found = os.read(self._out, 1 << 20)
            assert found, "the browser is gone"
            self._pending += found
        line, self._pending = self._pending.split(b"\0", 1)
        return dict(json.loads(line))

    def open(self, address: str, until: str = "document.documentElement.dataset.assay") -> None:
        """Go there and wait until the expression is true; a page of Assay says `ready` or `failed`."""
        self.ask("Page.navigate", url="about:blank")  # else a new fragment alone would load nothing
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")
        self.ask("Page.navigate", url=address)
        self.wait(f"location.href !== 'about:blank' && document.readyState === 'complete' && ({until})")

    def wait(self, expression: str) -> Any:
        end = time.monotonic() + PATIENCE
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, text: str = "", code: int = 0) -> None:
        """One key, down and up, as a keyboard sends it."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def tab(self) -> None:
        self.press("Tab", code=9)

    def enter(self) -> None:
        self.press("Enter", "\r", 13)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def prefer(self, scheme: str) -> None:
        """light or dark."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def size(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def shot(self, file: Path) -> Path:
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))
        return file

    def print(self, file: Path) -> Path:
        found = self.ask("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def roles(self) -> list[tuple[str, str]]:
        """Role and name of every node that a screen reader is told of."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            (node.get("role", {}).get("value", ""), node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser of its own with one tab, gone afterwards."""
    assert BROWSER
    to_read, to_write = os.pipe()
    out_read, out_write = os.pipe()

    def pipes() -> None:  # in the child: 3 is read, 4 is written
        first, second = os.dup(to_read), os.dup(out_write)
        os.dup2(first, 3)
        os.dup2(second, 4)

    running = subprocess.Popen(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=pipes,
    )  # fmt: skip
    os.close(to_read)
    os.close(out_write)
    try:
        yield Tab(to_write, out_read)
    finally:
        os.close(to_write)  # it ends when its pipe does
        os.close(out_read)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
