"""The ClientApp of the federated wing: trains on this node's own rows as the server orders, and sends what came of it.

`assay.engines.flower.federated_client:app` in a Flower app's pyproject.toml. Where the node config names `data`, the node
is a real one; without it, and with `simulation = true` in the run config, it plays the simulated client of its
partition. What goes wrong here becomes an error reply: a ClientApp that crashes never answers in a deployment, and its
round would last until the time is over.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from assay import data, models
from assay.config import ConfigError, Experiment
from assay.contribution import unflatten
from assay.data import Example
from assay.engines.flower.federated_messages import Order, Received, read_order, write_update
from assay.engines.flower.federated_nodes import PARTITION, WHO
from assay.engines.flower.federated_partition import attack, client_of
from assay.engines.flower.federated_settings import Settings
from assay.federated import client, scaffold
from assay.federated.attacks import Sending
from assay.federated.compute import Compute, Serial
from assay.federated.lora import Carrier
from assay.federated.preparation import client_settings, prepare
from assay.progress import Silent

log = logging.getLogger("flwr")
STATE = "assay"
SettingsOf = Callable[[Context], Settings]


def make_app(settings_of: SettingsOf) -> ClientApp:
    """The ClientApp; `settings_of` reads the run config, which a real node never asks for."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        return _answered(message, lambda: _train(message, context, settings_of))

    @made.query()
    def query(message: Message, context: Context) -> Message:
        """Which simulated client this node plays; -1 of a real node."""
        partition = -1 if "data" in context.node_config else context.node_config.get(PARTITION, -1)
        return Message(RecordDict({WHO: ConfigRecord({PARTITION: partition})}), reply_to=message)

    return made


def _settings(context: Context) -> Settings:
    return Settings.of(context.run_config)


app = make_app(_settings)


def _answered(message: Message, work: Callable[[], RecordDict]) -> Message:
    try:
        return Message(work(), reply_to=message)
    except ConfigError as error:
        told = str(error)
    except Exception as error:  # noqa: BLE001 - to crash is to be waited for; the node's log has it whole
        told = type(error).__name__
    log.exception("Assay: no update in this round")
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)


def _train(message: Message, context: Context, settings_of: SettingsOf) -> RecordDict:
    received, node = read_order(message.content), context.node_config
    if "data" in node:
        rows = tuple(data.load(str(node["data"])))
        compute = compute_of(received, received.order.experiment, str(node.get("base", "")))
        with threads(int(node.get("threads", 0))):
            update = honest_update(received, rows, compute)
    else:
        settings = settings_of(context)
        if not settings.simulation:
            raise ConfigError(
                "the node config has no `data`: start the SuperNode with --node-config and its rows' file"
            )
        compute = compute_of(received, settings.experiment, "")
        with threads(1):  # as the workers of the local engine: the last bits depend on it
            me = client_of(settings, int(node.get(PARTITION, -1)))
            if me.malicious:
                update = written(received.order, attack(settings, me, received, compute))
            else:
                update = honest_update(received, me.clean, compute)
    digest = hashlib.sha256(update).hexdigest()
    context.state[STATE] = ConfigRecord({"round": received.order.round, "sha256": digest})
    return write_update(update)


def honest_update(received: Received, rows: Sequence[Example], compute: Compute) -> bytes:
    """The message of a client that trains on `rows` as it was told to."""
    order = received.order
    training = order.experiment.training
    if len(rows) < training.batch_size:
        raise ConfigError(f"the node's data has {len(rows)} rows, a batch has {training.batch_size}")
    duty = client.Duty(
        wants_steps=order.wants_steps,
        wants_shadow=order.wants_shadow,
        shadow_lr=training.shadow_lr or training.lr,
        initial=received.initial,
    )
    settings = replace(client_settings(order.experiment, order.round), seed=order.seed)
    correction_D = scaffold.correction(received.controls, order.participant)
    correction = None if correction_D is None else unflatten(correction_D, received.adapter)
    branches = client.branches(rows, duty)
    jobs = [client.job(branch, received.adapter, settings, correction) for branch in branches.values()]
    made = dict(zip(branches, compute.train(jobs)))
    return written(order, client.sending(made, len(rows), duty))


def written(order: Order, sending: Sending) -> bytes:
    """The bytes of what a client sends in answer to its order."""
    return client.message(
        sending, participant=order.participant, run=order.run, round=order.round, base_sha256=order.base_sha256
    )


def compute_of(received: Received, experiment: Experiment, base: str) -> Serial:
    """The order's model with an adapter in it. ConfigError where it is another model than the server's."""
    carrier = _carrier(experiment.model_dump_json(), base)
    if carrier.base.sha256 != received.order.base_sha256:
        raise ConfigError("the base model here is not the server's; name a copy of it as `base` in the node config")
    like, found = carrier.get(), received.adapter
    if {n: v.shape for n, v in like.items()} != {n: v.shape for n, v in found.items()}:
        raise ConfigError("the adapter of the order does not fit the model; install the same releases on both sides")
    return Serial(carrier)


@lru_cache(maxsize=1)
def _carrier(dumped: str, base: str) -> Carrier:
    """Kept between rounds where the process is (simulation); a deployed node is a new process for each message."""
    experiment = Experiment.model_validate_json(dumped)
    if base:
        return Carrier(models.load(base, models.resolve_dtype(experiment.model.dtype)), experiment.lora)
    prepared = prepare(experiment, Silent())
    return Carrier(models.load(str(prepared.path), prepared.dtype), experiment.lora)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Train with so many threads; 0 leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
