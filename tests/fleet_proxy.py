"""What stands in front of a SuperLink: ends TLS, passes on what nodes need, and nothing else.

    python fleet_proxy.py 127.0.0.1:OUTSIDE 127.0.0.1:SUPERLINK SERVER_FOLDER

Stands for any proxy with a rule on paths, as README.md of a deployment asks for.
"""

from __future__ import annotations

import ssl
import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

NEEDED = "/v1/fleet/"


def make(upstream: str, folder: str) -> Starlette:
    client = httpx.AsyncClient(verify=ssl.create_default_context(cafile=f"{folder}/ca.crt"), timeout=120)

    async def pass_on(request: Request) -> Response:
        if not request.url.path.startswith(NEEDED):
            return PlainTextResponse("not from here", 403)
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}
        url = f"https://{upstream}{request.url.path}"
        try:
            answer = await client.request(request.method, url, content=await request.body(), headers=headers)
        except httpx.TransportError:
            return PlainTextResponse("nobody there", 502)
        kept = {
            k: v
            for k, v in answer.headers.items()
            if k not in ("content-length", "transfer-encoding", "connection", "content-encoding")
        }
        return Response(answer.content, answer.status_code, kept)

    return Starlette(routes=[Route("/{path:path}", pass_on, methods=["GET", "POST"])])


if __name__ == "__main__":
    outside, upstream, folder = sys.argv[1:]
    host, _, port = outside.rpartition(":")
    uvicorn.run(
        make(upstream, folder), host=host, port=int(port), log_level="warning",
        ssl_certfile=f"{folder}/server.crt", ssl_keyfile=f"{folder}/server.key",
    )  # fmt: skip
