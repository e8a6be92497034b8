"""A swarm node as a Flower ClientApp: `assay.engines.flower.swarm_node:app`.

Everything a node trusts comes from its own operator, in the SuperNode's `--node-config`, never from the run's config,
which is the relay's:

    node="node-0" folder="/srv/swarm/node-0"     needed
    experiment= keys= key=                       default: experiment.toml, keys.toml and node.pem in the folder
    quorum=                                      default: more than half of the nodes
    malicious=                                   true plays the experiment's attack (tests)

`Context.state` holds the round, the head and the folder, and nothing is read from it but that: in a deployment Flower
loses large contexts without a word, and every message is a new process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from assay import config
from assay.config import ConfigError, SwarmExperiment
from assay.engines.flower.swarm_records import answer_content, read_request
from assay.engines.relay import Answer
from assay.engines.relayed_swarm import Settings, turn
from assay.wire import WireError

STATE = "assay.swarm"


def settings_of(context: Context) -> Settings:
    """The node's settings from its own configuration. ConfigError says which key is missing or wrong."""
    given: dict[str, Any] = dict(context.node_config)
    for key in ("node", "folder"):
        if not isinstance(given.get(key), str):
            raise ConfigError(f'the swarm needs {key} in --node-config, for example node="node-0" folder="/srv/node-0"')
    folder = Path(given["folder"])
    experiment = config.load(given.get("experiment", folder / "experiment.toml"))
    if not isinstance(experiment, SwarmExperiment):
        raise ConfigError(f"{folder}: the experiment is of the {experiment.wing} wing; this app is for swarms")
    return Settings(
        node=given["node"],
        folder=folder,
        experiment=experiment,
        keys=Path(given.get("keys", folder / "keys.toml")),
        key=Path(given.get("key", folder / "node.pem")),
        quorum=given.get("quorum"),
        malicious=given.get("malicious") is True,
    )


def make_app(settings_of: Callable[[Context], Settings] = settings_of) -> ClientApp:
    """The app; `settings_of` says who a node is, from its context."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        # one thread: sums in another order end in other last bits, and equal nodes in unequal weights
        torch.set_num_threads(1)
        settings = settings_of(context)
        answer = _answer(settings, message)
        context.state[STATE] = ConfigRecord(
            {"round": answer.learnt, "head": answer.head, "folder": str(settings.folder)}
        )
        return Message(answer_content(answer), reply_to=message)

    return made


def _answer(settings: Settings, message: Message) -> Answer:
    try:
        request = read_request(message.content)
    except WireError as error:
        return Answer(status="refused", learnt=0, head="", model="", reason=error.reason.value, sentence=str(error))
    return turn(settings, request)


app = make_app()
