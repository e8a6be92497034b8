"""`assay watch`: the report of a run that goes on, in the browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

PORT = 8642


def watch(
    directory: Annotated[Path, typer.Argument(help="A run directory, or a folder of them; the run may be going on.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any that is free.", min=0, max=65535)] = PORT,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Show the report while a run goes on, at an address of this machine only. Ctrl-C ends it.

    Examples:

        assay watch runs/mine --open  # beside `assay run` in another terminal

        assay watch runs --port 0     # all runs in the folder, side by side
    """
    from assay.report.watch import server

    with server(directory, port) as serving:
        print(f"{directory}: {serving.address} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(serving.address)
        try:
            serving.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("ended", flush=True)
