"""Which row of the trainer's batch is whose: the round's plan, read off the prompts the trainer hands over.

TRL's sampler gives every node the same prompts in the same order (same data set, same `args.seed`), each repeated
`num_generations` times in a row. So the batch itself is the public plan: nobody picks prompts. Every row is a place
(node, prompt, index) that one node owes.

horizontal   every node answers every prompt, num_generations / nodes times
vertical     prompts are shared out in their order, each is answered num_generations times by one node

A prompt's id is a hash of its token ids (and of which of several equal prompts in the batch it is), so that a node with
other data or another template is told so by the wire: it sends prompts that nobody asked for.

Legend: B rows of the batch, G = num_generations.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.config import ConfigError
from assay.swarm.exchange import Mode, Plan
from assay.swarm.rollout import Item, generate
from assay.swarm.sampling import Noise, Sampler, seed_of

Ids = tuple[int, ...]
Place = tuple[str, int, int]  # node, prompt id, index


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the trainer's arguments say of completions: how they are drawn, how long, what ends them."""

    sampler: Sampler
    max_tokens: int
    eos: int
    vocabulary: int
    group: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one round: `place_B`, `prompt_B` (token ids of each row's prompt), and the plan they make up."""

    plan: Plan
    place_B: tuple[Place, ...]
    prompt_B: tuple[Ids, ...]

    @property
    def prompts(self) -> Mapping[int, Ids]:
        """Token ids by prompt id."""
        return {place[1]: ids for place, ids in zip(self.place_B, self.prompt_B)}

    def rows_of(self, node: str) -> list[int]:
        return [row for row, place in enumerate(self.place_B) if place[0] == node]


def tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def terms_of(trainer: Any, *, noise: Noise) -> Terms:
    """Read a trainer's arguments; ConfigError, in one line, for those under which nothing could be promised."""
    args, tokenizer = trainer.args, tokenizer_of(trainer)
    refused = {
        "more than one process": trainer.accelerator.num_processes > 1,
        "use_vllm": args.use_vllm,
        "tools": bool(trainer.tools),
        "environment_factory": trainer.environment_factories is not None,
        "min_p": bool(args.min_p),
        "repetition_penalty": args.repetition_penalty != 1.0,
        "generation_kwargs": bool(args.generation_kwargs),
        "use_transformers_continuous_batching": getattr(args, "use_transformers_continuous_batching", False),
    }
    for what, there in refused.items():
        if there:
            raise ConfigError(f"ScreenedRollouts: cannot work with {what}; see docs/TRL.md")
    if args.max_completion_length is None:
        raise ConfigError("ScreenedRollouts: set max_completion_length, or a peer's completion has no limit")
    if tokenizer.eos_token_id is None:
        raise ConfigError("ScreenedRollouts: the tokenizer has no eos_token, so that no completion could end")
    try:
        sampler = Sampler(temperature=args.temperature, top_k=args.top_k or 0, top_p=args.top_p, noise=noise)
    except ValueError as error:
        raise ConfigError(f"ScreenedRollouts: {error}") from None
    return Terms(
        sampler=sampler,
        max_tokens=int(args.max_completion_length),
        eos=int(tokenizer.eos_token_id),
        vocabulary=int(trainer.model.get_input_embeddings().weight.shape[0]),
        group=int(trainer.num_generations),
    )


def prompt_ids(trainer: Any, prompts: Sequence[Any]) -> list[Ids]:
    """Token ids of prompts, plain or conversational, by the template the trainer itself would use."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        found = tokenizer(text=list(prompts))["input_ids"]
    else:
        found = tokenizer.apply_chat_template(
            conversation=list(prompts), chat_template=trainer.chat_template, add_generation_prompt=True, tokenize=True,
            return_dict=True, **trainer.chat_template_kwargs,
        )["input_ids"]  # fmt: skip
    return [tuple(int(token) for token in ids) for ids in found]


def prompt_id(ids: Sequence[int], occurrence: int = 0) -> int:
    """0 <= id < 2**63: the first 63 bits of a sha256 over the token ids and which of its equals in the batch it is.

    >>> prompt_id((1, 2)) == prompt_id((1, 2), 1)
    False
    """
    raw = struct.pack(f"<QQ{len(ids)}q", occurrence, len(ids), *ids)
    return int.from_bytes(hashlib.sha256(b"assay.prompt.1" + raw).digest()[:8], "little") >> 1


def lay_out(prompt_B: Sequence[Ids], *, group: int, nodes: Sequence[str], mode: Mode, round: int) -> Batch:
    """Whose each row is. ConfigError where rows are not repeated as expected, or cannot be shared by the nodes."""
    heads = list(prompt_B[::group])
    if len(prompt_B) % group or any(ids != heads[row // group] for row, ids in enumerate(prompt_B)):
        raise ConfigError(
            f"the installed trainer does not repeat each prompt num_generations = {group} times in a row, as TRL 1.16 "
            "does: install trl>=1.16,<1.17"
        )
    nodes = sorted(nodes)
    split, what = (group, "num_generations") if mode == "horizontal" else (len(heads), "prompts a batch")
    if split % len(nodes):
        raise ConfigError(f"{mode} mode: {what} = {split} cannot be shared by {len(nodes)} nodes; make it a multiple")
    seen: Counter[Ids] = Counter()
    place_B: list[Place] = []
    asked: dict[str, dict[int, int]] = {node: {} for node in nodes}
    for at, ids in enumerate(heads):
        prompt = prompt_id(ids, seen[ids])
        seen[ids] += 1
        owners = nodes if mode == "horizontal" else [nodes[at * len(nodes) // len(heads)]]
        for node in owners:
            asked[node][prompt] = group // len(owners)
            place_B += [(node, prompt, index) for index in range(group // len(owners))]
    return Batch(Plan(round=round, mode=mode, asked=asked), tuple(place_B), tuple(prompt_B))


def draw(
    model: Any, run: str, round: int, places: Sequence[Place], prompts: Sequence[Ids], terms: Terms, rows: int
) -> list[Ids]:
    """Completions of these places as their public seeds give them."""
    items = [Item(ids, seed_of(run, round, *place)) for place, ids in zip(places, prompts)]
    return generate(model, items, terms.sampler, max_tokens=terms.max_tokens, eos=terms.eos, rows=rows)
