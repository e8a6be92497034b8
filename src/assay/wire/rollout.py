"""Bytes <-> `Rollout`: the only door by which a peer's completions come in.

One message is

    MAGIC (8 bytes) | u32 little-endian header length | JSON header (UTF-8) | token ids (little-endian u32)

The header lists the completions as [prompt, index, tokens]; their ids follow in the same order, without a gap. Token
ids only: text and reward are the receiver's business. Whatever a peer sends, `decode_rollout` returns: a `Rollout`, or
a `Refusal` of the whole message with a reason and a sentence. It raises only for the operator's own mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Completion, Refusal, Rollout, completion_sha256, pool_sha256
from assay.verdict import Reason
from assay.wire.envelope import START, WireError, check_header, decoded_or_refused, join, malformed, show, split

MAGIC = b"ASSAYRO1"
FORMAT = "assay.rollout/1"
MAX_TOKEN = 2**32 - 1  # a token id travels as u32
MAX_ID = 2**63 - 1  # rounds and prompts are hashed as int64

HEADER_TYPES: dict[str, type] = {
    "format": str,
    "participant": str,
    "run": str,
    "round": int,
    "model_sha256": str,
    "sha256": str,
    "completions": list,
}
# Header allowance: names of participant, run and model; and [prompt,index,tokens] at the largest numbers int64 has
BASE_HEADER_BYTES = 1 << 14
ENTRY_HEADER_BYTES = 80

Place = tuple[int, int]  # (prompt, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTemplate:
    """What the receiver asked one participant for. ValueError when it makes no sense.

    `asked`: prompt id -> number of completions. `model_sha256`: the weights to be sampled from; None takes any (a
    heterogeneous swarm), then the header's is only a claim. Ids must lie in [0, `vocabulary`). `free_choice`: None,
    or the prompt ids a participant may choose from (Hail to the Thief, MATH attack); then `asked` says only how many
    prompts, and how many completions of each.
    """

    round: int
    asked: Mapping[int, int]
    model_sha256: str | None
    vocabulary: int
    max_tokens: int
    free_choice: range | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.round <= MAX_ID:
            raise ValueError(f"round is {self.round}: give a number in [0, 2**63)")
        if not 1 <= self.vocabulary <= MAX_TOKEN + 1:
            raise ValueError(f"vocabulary is {self.vocabulary}: give a number in [1, 2**32]")
        if self.max_tokens < 1 or any(count < 1 for count in self.asked.values()):
            raise ValueError("max_tokens and every number of completions in asked must be at least 1")
        if self.model_sha256 is not None and not _is_sha256(self.model_sha256):
            raise ValueError(f"model_sha256 is {show(self.model_sha256)}: give 64 hex digits, or None to take any")
        offered = self.offered
        if len(offered) < len(self.asked):
            raise ValueError(f"free_choice offers {len(offered)} prompts, asked needs {len(self.asked)}")
        ends = [*offered[:1], *offered[-1:]] if isinstance(offered, range) else list(offered)
        if not all(0 <= prompt <= MAX_ID for prompt in ends):
            raise ValueError("prompt ids must lie in [0, 2**63)")

    @property
    def offered(self) -> range | Mapping[int, int]:
        """The prompt ids that may be answered."""
        return self.asked if self.free_choice is None else self.free_choice

    @property
    def completions(self) -> int:
        """Number of completions asked for."""
        return sum(self.asked.values())

    @property
    def header_bytes(self) -> int:
        """Largest JSON header in bytes."""
        return BASE_HEADER_BYTES + ENTRY_HEADER_BYTES * self.completions

    @property
    def message_bytes(self) -> int:
        """Largest message in bytes: every completion at full length, with the largest header allowed."""
        return START + self.header_bytes + 4 * self.max_tokens * self.completions


def encode_rollout(rollout: Rollout, *, run: str) -> bytes:
    """The message a node sends, sorted by (prompt, index). ValueError for a rollout no receiver could accept."""
    if not _is_sha256(rollout.model_sha256):
        raise ValueError(f"model_sha256 is {show(rollout.model_sha256)}: give the sha256 of the weights in hex")
    completions = sorted(rollout.completions, key=_place)
    if len({_place(c) for c in completions}) != len(completions):
        raise ValueError(f"{rollout.participant}: two completions have the same prompt and index")
    for c in completions:
        if (c.participant, c.round) != (rollout.participant, rollout.round):
            raise ValueError(f"{rollout.participant}: holds a completion of {c.participant} in round {c.round}")
        if not c.ids or not all(0 <= token <= MAX_TOKEN for token in c.ids):
            raise ValueError(f"{rollout.participant}: ids of prompt {c.prompt} must be at least one, each a u32")
        if c.sha256 != completion_sha256(c.round, c.prompt, c.index, c.ids):
            raise ValueError(f"{rollout.participant}: sha256 of prompt {c.prompt} is not its completion_sha256")
    header = {
        "format": FORMAT,
        "participant": rollout.participant,
        "run": run,
        "round": rollout.round,
        "model_sha256": rollout.model_sha256,
        "sha256": rollout.sha256,
        "completions": [[c.prompt, c.index, len(c.ids)] for c in completions],
    }
    return join(MAGIC, header, [np.array(c.ids, "<u4").tobytes() for c in completions])


def decode_rollout(
    message: bytes, *, template: RolloutTemplate, run: str, participant: str, max_message_bytes: int | None = None
) -> Rollout | Refusal:
    """Read one message, or say why not. Never raises for what a peer sent.

    `participant` is the sender as the transport authenticated it; the name in the header is only a claim and must
    agree. A message of another run or round is refused as `wrong_round`. Completions come back in the order of
    (prompt, index), whatever order they were sent in. Fewer than asked are returned as they are: whether a group is
    complete is for the screens to say. `max_message_bytes`: None = derived from the template.
    """
    limit = template.message_bytes if max_message_bytes is None else max_message_bytes
    if limit < 1:
        raise ValueError(f"max_message_bytes is {limit}: give a positive number or None")
    return decoded_or_refused(lambda: _decode(message, template, run, participant, limit), message, run, participant)


def _decode(message: bytes, template: RolloutTemplate, run: str, participant: str, limit: int) -> Rollout:
    if len(message) > limit:
        raise WireError(Reason.TOO_LARGE, f"message has {len(message)} bytes, limit {limit}")
    header, body = split(message, MAGIC, template.header_bytes, "rollout")
    model_sha256 = header.get("model_sha256")
    expected: list[tuple[str, object, Reason]] = [
        ("format", FORMAT, Reason.MALFORMED),
        ("participant", participant, Reason.WRONG_PARTICIPANT),
        ("run", run, Reason.WRONG_ROUND),
        ("round", template.round, Reason.WRONG_ROUND),
    ]
    if template.model_sha256 is not None:
        expected.append(("model_sha256", template.model_sha256, Reason.WRONG_BASE))
    check_header(header, HEADER_TYPES, expected)
    if not isinstance(model_sha256, str) or not _is_sha256(model_sha256):
        raise malformed(f"header: model_sha256 is {show(model_sha256)}, expected 64 hex digits")
    tokens = _entries(header["completions"], template.max_tokens)
    _check_plan(tokens, template)
    completions = _completions(
        _token_ids(body, sum(tokens.values()), template.vocabulary), tokens, template, participant
    )
    sha256 = pool_sha256(completions)
    if sha256 != header["sha256"]:
        sentence = f"completions have sha256 {sha256}, the header says {show(header['sha256'])}"
        raise WireError(Reason.HASH_MISMATCH, sentence)
    return Rollout(participant=participant, round=template.round, model_sha256=model_sha256, completions=completions)


def _entries(entries: object, max_tokens: int) -> dict[Place, int]:
    """The header's list of completions -> number of tokens by (prompt, index), in the order sent."""
    out: dict[Place, int] = {}
    for entry in entries if isinstance(entries, list) else []:
        if not (isinstance(entry, list) and len(entry) == 3 and all(type(number) is int for number in entry)):
            raise malformed(f"header: a completion is {show(entry)}, expected [prompt, index, tokens]")
        prompt, index, tokens = entry
        what = f"completion {show(index)} of prompt {show(prompt)}"
        if tokens < 1:
            raise malformed(f"{what} has {show(tokens)} tokens, expected at least 1")
        if tokens > max_tokens:
            raise WireError(Reason.TOO_LARGE, f"{what} has {show(tokens)} tokens, limit {max_tokens}")
        if (prompt, index) in out:
            raise WireError(Reason.DUPLICATE, f"{what} comes twice")
        out[prompt, index] = tokens
    return out


def _check_plan(places: Iterable[Place], template: RolloutTemplate) -> None:
    """Every (prompt, index) must be one that was asked for; not every one asked for must be there."""
    groups: dict[int, list[int]] = {}
    for prompt, index in places:
        groups.setdefault(prompt, []).append(index)
    if not groups and template.asked:
        raise WireError(Reason.MISSING, f"message holds no completion, asked for {template.completions}")
    for prompt in groups:
        if prompt not in template.offered:
            raise WireError(Reason.WRONG_PROMPT, f"prompt {show(prompt)} was not asked for")
    asked = template.asked
    if template.free_choice is not None:
        if len(groups) > len(asked):
            raise WireError(Reason.TOO_LARGE, f"{len(groups)} prompts chosen, asked for {len(asked)}")
        # the largest group against the largest asked for: if any assignment fits, this one does
        chosen = sorted(groups, key=lambda prompt: max(groups[prompt]), reverse=True)
        asked = dict(zip(chosen, sorted(asked.values(), reverse=True)))
    for prompt, indices in groups.items():
        count = asked[prompt]
        if len(indices) > count:
            raise WireError(Reason.TOO_LARGE, f"prompt {prompt} has {len(indices)} completions, asked for {count}")
        if outside := [index for index in indices if not 0 <= index < count]:
            sentence = f"prompt {prompt} has a completion {show(outside[0])}, expected 0 to {count - 1}"
            raise WireError(Reason.OUT_OF_RANGE, sentence)


def _token_ids(body: memoryview, tokens: int, vocabulary: int) -> NDArray[np.uint32]:
    """All token ids of the message."""
    if len(body) != 4 * tokens:
        raise malformed(f"{tokens} tokens need {4 * tokens} bytes, {len(body)} follow the header")
    ids: NDArray[np.uint32] = np.frombuffer(body, "<u4")
    if ids.size and (largest := int(ids.max())) >= vocabulary:
        bad = int((ids >= vocabulary).sum())
        raise WireError(Reason.OUT_OF_RANGE, f"{bad} token ids outside the vocabulary of {vocabulary}, e.g. {largest}")
    return ids


def _completions(
    ids: NDArray[np.uint32], tokens: Mapping[Place, int], template: RolloutTemplate, participant: str
) -> tuple[Completion, ...]:
    """Cut the ids into completions, in the order of (prompt, index)."""
    out, at = [], 0
    for (prompt, index), count in tokens.items():
        own = tuple(ids[at : at + count].tolist())
        at += count
        sha256 = completion_sha256(template.round, prompt, index, own)
        out.append(
            Completion(
                participant=participant, round=template.round, prompt=prompt, index=index, ids=own, sha256=sha256
            )
        )
    return tuple(sorted(out, key=_place))


def _place(completion: Completion) -> Place:
    return completion.prompt, completion.index


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
