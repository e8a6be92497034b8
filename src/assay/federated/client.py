"""An honest client's part of a round: what it trains on its own rows, what it sends, and as which bytes.

The same whether the client is simulated in this process or is a Flower node with a data file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from assay import wire
from assay.contribution import LoraUpdate, Tensors, tensors_sha256
from assay.data import Example
from assay.federated.attacks.seat import Branch, Sending
from assay.federated.compute import TrainJob
from assay.federated.local_sft import LocalResult, LocalSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """What the server asks of every client beside the adapter: its steps, a shadow branch from the `initial` adapter."""

    wants_steps: bool
    wants_shadow: bool
    shadow_lr: float
    initial: Tensors


def branches(rows: Sequence[Example], duty: Duty) -> dict[str, Branch]:
    """The trainings of a round by name, "main" (what is submitted) first."""
    out = {"main": Branch(rows=tuple(rows), keep_steps=duty.wants_steps)}
    if duty.wants_shadow:
        out["shadow"] = Branch(rows=tuple(rows), start=duty.initial, lr=duty.shadow_lr, keep_steps=True)
    return out


def job(branch: Branch, start: Tensors, settings: LocalSettings, correction: Tensors | None) -> TrainJob:
    """One training. SCAFFOLD's `correction` belongs to the adapter of this round: a branch with its own start has none."""
    lr = settings.lr if branch.lr is None else branch.lr
    own = replace(settings, lr=lr, keep_steps=branch.keep_steps)
    if branch.start is not None:
        return TrainJob(branch.start, branch.rows, own, None, branch.objective)
    return TrainJob(start, branch.rows, own, correction, branch.objective)


def sending(made: Mapping[str, LocalResult], examples: int, duty: Duty) -> Sending:
    """What goes into the message once the branches are trained."""
    return Sending(
        tensors=made["main"].tensors,
        steps=made["main"].steps if duty.wants_steps else (),
        shadow=made["shadow"].steps if duty.wants_shadow else (),
        num_examples=examples,
    )


def message(sent: Sending, *, participant: str, run: str, round: int, base_sha256: str) -> bytes:
    """The bytes of it."""
    update = LoraUpdate(
        participant=participant,
        round=round,
        base_sha256=base_sha256,
        tensors=sent.tensors,
        sha256=tensors_sha256(sent.tensors),
        num_examples=sent.num_examples,
        steps=sent.steps,
        shadow=sent.shadow,
    )
    return wire.encode_update(update, run=run)
