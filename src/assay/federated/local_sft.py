"""What a client does in a round: a few steps of LoRA on its own rows, loss on the answers only.

The gradient of a step is: loss, plus FedProx's pull towards the round's start, clipped, plus SCAFFOLD's correction.

Legend: B batch, T tokens, V vocabulary, H hidden.
The vocabulary dominates the cost of a small model, so logits are computed at answer positions only, flattened to two
dimensions first (a three-dimensional head makes PyTorch copy the whole output matrix once per row on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from assay.contribution import Tensors
from assay.data import Example, render_end, render_prompt
from assay.federated.lora import Carrier, is_a


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """One client's training in one round."""

    steps: int
    batch_size: int
    max_length: int
    lr: float
    clip: float = 1.0
    template: str = "chatml"
    seed: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Fresh in every round, without weight decay or (sgd) momentum."""
    prox_mu: float = 0.0
    """FedProx, Li et al. 2020, equation 2: mu/2 * |y - x|^2 is added to the local loss. 0 is none."""
    lr_final: float | None = None
    """Decay linearly to this rate within the call; only the warm-up does (clients: constant within a round)."""
    keep_steps: bool = True
    reduce: Literal["mean", "sum"] = "mean"
    """Of a row's losses over its answer tokens, in `row_nll`."""


class Term(Protocol):
    """Something added to a client's objective, by its gradient. A frozen value of arrays: it travels between processes."""

    def gradient(self, delta: Tensors) -> Tensors:
        """Its gradient at an adapter, given as the difference to where the training began; names left out are zero."""
        ...


@dataclass(frozen=True, slots=True)
class Objective:
    """What a client minimises beside the loss of its own rows: `weight` x the loss of rows `beside`, and terms."""

    beside: tuple[Example, ...] = ()
    weight: float = 0.0
    terms: tuple[Term, ...] = ()

    def plus(self, other: Objective) -> Objective:
        """Both; only one of them may have rows beside (ValueError)."""
        if self.beside and other.beside:
            raise ValueError("two objectives with rows beside the client's own: weigh them in one")
        rows = self if self.beside else other
        return Objective(rows.beside, rows.weight, (*self.terms, *other.terms))


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The adapter after training, after each step (`steps[-1]` equals it), and the loss of each step in nats."""

    tensors: Tensors
    steps: tuple[Tensors, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row: ids of prompt and answer; the first `prompt` of them carry no loss."""

    ids: list[int]
    prompt: int


@dataclass(slots=True)
class Batch:
    """Right-padded ids_BT, attention mask_BT, and where the predicting positions are (flat indices into B*T)."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    at_P: torch.Tensor
    target_P: torch.Tensor
    row_P: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def tokenize(tokenizer: Any, row: Example, template: str, max_length: int) -> Tokens:
    """Ids of one row, cut at `max_length`; the end-of-turn token belongs to the answer.

    A prompt longer than the limit is cut on the left so that at least a quarter of the room is left for the answer.
    """
    prompt = tokenizer(render_prompt(row.instruction, template), add_special_tokens=False)["input_ids"]
    answer = tokenizer(row.response + render_end(template), add_special_tokens=False)["input_ids"]
    if not render_end(template):
        answer = [*answer, tokenizer.eos_token_id]
    room = max(max_length - len(answer), max_length - max_length // 4)
    prompt = prompt[-room:]
    return Tokens((prompt + answer)[:max_length], len(prompt))


def collate(rows: Sequence[Tokens], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    at, target, owner = [], [], []
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        mask_BT[b, : len(row.ids)] = 1
        for t in range(max(1, row.prompt), len(row.ids)):
            at.append(b * longest + t - 1)  # position t-1 predicts token t
            target.append(row.ids[t])
            owner.append(b)
    tensors = [torch.tensor(x, dtype=torch.long, device=device) for x in (at, target, owner)]
    return Batch(ids_BT.to(device), mask_BT.to(device), *tensors)


def answer_nll(model: Any, batch: Batch) -> torch.Tensor:
    """nll_P of the answer tokens, in nats."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = not any(getattr(base.config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    if plain:
        hidden_BTH = getattr(base, base.base_model_prefix)(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
        ).last_hidden_state
        logits_PV = base.get_output_embeddings()(hidden_BTH.flatten(0, 1)[batch.at_P])
    else:  # models that post-process their logits (Gemma, Cohere, Granite) must do it themselves
        logits_BTV = base(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits
        logits_PV = logits_BTV.flatten(0, 1)[batch.at_P]
    return cross_entropy(logits_PV.float(), batch.target_P, reduction="none")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a step does to the gradient of the loss. `start` and `correction` are aligned with the weights, or empty."""

    clip: float
    prox_mu: float = 0.0
    start: tuple[torch.Tensor, ...] = ()
    correction: tuple[torch.Tensor, ...] = ()


def make_optimizer(weights: Sequence[torch.nn.Parameter], settings: LocalSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=settings.lr)
    return torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)


def take_step(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[torch.nn.Parameter],
    loss: torch.Tensor,
    terms: Terms,
    more: Callable[[], None] | None = None,
) -> None:
    """One local step. The proximal term is part of the objective and is clipped with it; the correction is not.

    `more` adds what else the client minimises to the gradients that the loss left.

    So the mean of a client's own gradients over a round is at most `clip` long, and with sgd it is exactly
    (x - y) / (K * lr) minus the correction: this is what lets a server bound and derive a control variate.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if more is not None:
        more()
    for weight, start in zip(weights, terms.start):  # d/dy of mu/2 * |y - x|^2
        pull = (weight.detach() - start).mul_(terms.prox_mu)
        weight.grad = pull if weight.grad is None else weight.grad.add_(pull)
    torch.nn.utils.clip_grad_norm_(weights, terms.clip)
    for weight, correction in zip(weights, terms.correction):
        weight.grad = correction.clone() if weight.grad is None else weight.grad.add_(correction)
    optimizer.step()


def _terms(
    carrier: Carrier,
    weights: Sequence[torch.nn.Parameter],
    start: Tensors,
    settings: LocalSettings,
    correction: Tensors | None,
) -> Terms:
    """The terms as tensors beside the weights; leaves `start` in the carrier."""
    corrections: tuple[torch.Tensor, ...] = ()
    if correction is not None:  # through the carrier, for it knows which tensor is which parameter, and on what device
        carrier.set(correction)
        corrections = tuple(w.detach().clone() for w in weights)
    carrier.set(start)
    starts = tuple(w.detach().clone() for w in weights) if settings.prox_mu else ()
    return Terms(settings.clip, settings.prox_mu, starts, corrections)


def train(
    carrier: Carrier,
    start: Tensors,
    rows: Sequence[Example],
    settings: LocalSettings,
    tick: Callable[[int], None] | None = None,
    correction: Tensors | None = None,
    objective: Objective | None = None,
) -> LocalResult:
    """Train from `start` with a fresh optimiser; repeatable bit for bit on one machine and thread count.

    `tick(1)` is called after each step. `correction` is what SCAFFOLD's server sends along (scaffold.py). The losses
    reported are those of the rows alone, without what `objective` adds.
    """
    objective = objective or Objective()
    beside = batches(len(objective.beside), settings) if objective.beside else []
    model = carrier.model
    device = next(model.parameters()).device
    frozen = carrier.settings.freeze_a
    weights = [p for n, p in model.named_parameters() if "lora_" in n and not (frozen and is_a(n))]
    terms = _terms(carrier, weights, start, settings, correction)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = make_optimizer(weights, settings)
    steps: list[Tensors] = []
    losses: list[float] = []
    for step, chosen in enumerate(batches(len(rows), settings)):
        optimizer.param_groups[0]["lr"] = _lr(settings, step)
        tokens = [tokenize(carrier.base.tokenizer, rows[i], settings.template, settings.max_length) for i in chosen]
        batch = collate(tokens, carrier.base.tokenizer.pad_token_id, device)
        loss = answer_nll(model, batch).mean()
        more = None
        if objective.beside or objective.terms:
            aside = [objective.beside[i] for i in beside[step]] if objective.beside else []
            more = partial(_add_objective, carrier, start, objective, aside, settings)
        take_step(optimizer, weights, loss, terms, more)
        losses.append(float(loss.detach()))
        if settings.keep_steps:
            steps.append(carrier.get())
        if tick is not None:
            tick(1)
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)
    return LocalResult(carrier.get(), tuple(steps), tuple(losses))


def _add_objective(
    carrier: Carrier, start: Tensors, objective: Objective, beside: Sequence[Example], settings: LocalSettings
) -> None:
    """Gradients of what a client minimises beside its rows' loss; `beside` are this step's rows of the objective."""
    if beside:
        tokenizer = carrier.base.tokenizer
        tokens = [tokenize(tokenizer, row, settings.template, settings.max_length) for row in beside]
        batch = collate(tokens, tokenizer.pad_token_id, next(carrier.model.parameters()).device)
        (objective.weight * answer_nll(carrier.model, batch).mean()).backward()  # type: ignore[no-untyped-call]
    if objective.terms:
        _add_gradients(carrier, start, objective.terms)


def _add_gradients(carrier: Carrier, start: Tensors, terms: Sequence[Term]) -> None:
    """Add the terms' gradients to those that backward() left; before clipping, for they are part of the objective."""
    delta = {name: value - start[name] for name, value in carrier.get().items()}
    by_name = {n.replace(".default.", "."): p for n, p in carrier.model.named_parameters() if p.grad is not None}
    for term in terms:
        for name, value in term.gradient(delta).items():
            grad = by_name[name].grad
            grad += torch.from_numpy(np.asarray(value, np.float32)).to(grad.device)


def _lr(settings: LocalSettings, step: int) -> float:
    if settings.lr_final is None or settings.steps == 1:
        return settings.lr
    return settings.lr + (settings.lr_final - settings.lr) * step / (settings.steps - 1)


def batches(count: int, settings: LocalSettings) -> list[NDArray[np.int64]]:
    """Row indices of each step: epochs of shuffled rows, one after the other."""
    rng = np.random.default_rng(settings.seed)
    need = settings.steps * settings.batch_size
    order = np.concatenate([rng.permutation(count) for _ in range(-(-need // count))])[:need]
    return np.split(order, settings.steps)


@torch.no_grad()
def mean_nll(carrier: Carrier, adapter: Tensors, rows: Sequence[Example], settings: LocalSettings) -> float:
    """Loss of held-out answers: mean over rows of the mean over answer tokens, in nats."""
    return float(np.mean(row_nll(carrier, adapter, rows, settings)))


@torch.no_grad()
def row_nll(
    carrier: Carrier, adapter: Tensors, rows: Sequence[Example], settings: LocalSettings
) -> NDArray[np.float64]:
    """Answer-token loss of each row (mean, or what `settings.reduce` says), float64, in the order given."""
    carrier.set(adapter)
    device = next(carrier.model.parameters()).device
    tokens = [tokenize(carrier.base.tokenizer, row, settings.template, settings.max_length) for row in rows]
    out = np.zeros(len(rows))
    for at in range(0, len(tokens), settings.batch_size):
        part = tokens[at : at + settings.batch_size]
        batch = collate(part, carrier.base.tokenizer.pad_token_id, device)
        nll_P, row_P = answer_nll(carrier.model, batch).double().cpu().numpy(), batch.row_P.cpu().numpy()
        sums = np.bincount(row_P, nll_P, minlength=len(part))
        tokens_N = np.maximum(np.bincount(row_P, minlength=len(part)), 1)
        out[at : at + len(part)] = sums / tokens_N if settings.reduce == "mean" else sums
    return out
