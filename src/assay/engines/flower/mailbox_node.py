"""The mailbox of a node whose trainer runs by itself, as a Flower ClientApp: `assay.engines.flower.mailbox_node:app`.

The relay is `swarm_relay:app` with `mail=`. Like a swarm's node it believes only its own operator's `--node-config`:

    folder="/srv/swarm/node-0"    needed: mail.toml, keys.toml and node.pem lie in it
    wait= poll=                   seconds: for the trainer in each round (540), between two looks (0.2)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from assay.config import ConfigError
from assay.engines.flower.swarm_records import answer_content, read_request
from assay.engines.mailbox import Settings, turn
from assay.engines.relay import Answer, read_mail
from assay.swarm.keys import read_keys
from assay.wire import WireError

STATE = "assay.mail"


def settings_of(context: Context) -> Settings:
    """The node's settings from its own configuration. ConfigError says which key is missing or wrong."""
    given: dict[str, Any] = dict(context.node_config)
    if not isinstance(given.get("folder"), str):
        raise ConfigError('the mailbox needs folder in --node-config, for example folder="/srv/swarm/node-0"')
    folder = Path(given["folder"])
    return Settings(
        folder=folder,
        mail=read_mail(folder / "mail.toml"),
        nodes=len(read_keys(folder / "keys.toml")),
        **{key: float(given[key]) for key in ("wait", "poll") if key in given},
    )


def make_app(settings_of: Callable[[Context], Settings] = settings_of) -> ClientApp:
    """The app; `settings_of` says where a node's folder is, from its context."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        settings = settings_of(context)
        try:
            request = read_request(message.content)
        except WireError as error:
            answer = Answer(
                status="refused", learnt=0, head="", model="", reason=error.reason.value, sentence=str(error)
            )
        else:
            # no lock: the trainer writes beside, and two turns at once end with the same files
            answer = turn(settings, request)
        context.state[STATE] = ConfigRecord({"round": answer.learnt, "folder": str(settings.folder)})
        return Message(answer_content(answer), reply_to=message)

    return made


app = make_app()
