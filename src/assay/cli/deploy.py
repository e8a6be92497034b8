"""`assay deploy`: the files of a deployment on Flower."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from assay.cli.common import Json, show

deploy_app = typer.Typer(
    help="A deployment on Flower: TLS, authenticated nodes.", rich_markup_mode="markdown", no_args_is_help=True
)


class Kind(StrEnum):
    """What is deployed: one of the two wings, or a relay between trainers of TRL."""

    FEDERATED = "federated"
    SWARM = "swarm"
    TRL = "trl"


@deploy_app.command("init")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; must not be there yet.")],
    wing: Annotated[Kind, typer.Option(help="What is deployed.")] = Kind.FEDERATED,
    nodes: Annotated[int, typer.Option(help="How many nodes.")] = 10,
    address: Annotated[str, typer.Option(help="host:port under which nodes reach the server.")] = "127.0.0.1:9092",
    model: Annotated[
        str, typer.Option(help="Base model: smollm2-135m, tiny, a directory or a hub id. [default: smollm2-135m; tiny]")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the experiment.")] = "deployment",
    as_json: Json = False,
) -> None:
    """Write a Flower app, an experiment with fresh secrets, and scripts with every command up to the run.

    Nothing is started and no key is made: read README.md in the folder. Everything is Flower's own, to be changed.

    Examples:

        assay deploy init hospitals --nodes 5 --address flower.example.org:9092

        assay deploy init swarm --wing swarm --nodes 4
    """
    from assay.engines.flower.deploying import Deployment, write

    chosen = model or ("smollm2-135m" if wing is Kind.FEDERATED else "tiny")
    made = Deployment(wing=wing.value, nodes=nodes, address=address, model=chosen, name=name)
    files = write(directory, made)
    told = "\n".join([*map(str, files), f"read {directory / 'README.md'}: every command, in order"])
    show({"directory": str(directory), "files": [str(file) for file in files]}, as_json, told)
