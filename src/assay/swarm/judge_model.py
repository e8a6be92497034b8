"""Transformers models as judges. Quoted text is tokenised apart from the rest and cannot hold a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from assay import models
from assay.config import ConfigError
from assay.config.common import Count, Frozen, Positive
from assay.swarm.judge_chat import Answer, Message, compose


class Generation(Frozen):
    """How a local judge samples. Defaults are the paper's (with Qwen2.5-14B-Instruct)."""

    top_k: Count = 10
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    temperature: Positive = 0.6
    beams: Count = 3
    batch: Count = 16
    """Prompts of one forward pass. Part of the result: one stream of random numbers serves a batch."""


def encode_quoted(tokenizer: Any, text: str, forbidden: frozenset[int]) -> list[int]:
    """Token ids of `text` without any of `forbidden`: control tokens in it are spelled out as plain characters.

    Where the tokenizer insists on one (an added token it does not call special), the text is cut within it.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if forbidden.isdisjoint(ids):
        return ids
    if len(text) == 1:
        return []
    half = len(text) // 2
    return encode_quoted(tokenizer, text[:half], forbidden) + encode_quoted(tokenizer, text[half:], forbidden)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Special ids and every added token that is more than white space or one character; the unknown token is allowed."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if len(token.content.strip()) > 1}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - ends  # an unknown character is no control token
    return frozenset((added | set(tokenizer.all_special_ids)) - unknown)


class SelfJudge:
    """A model that is already loaded, as a judge: the trained model judging itself (the paper: it collapses to yes).

    Raises ConfigError when the tokenizer has no chat template that can be filled.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Generation | None = None, name: str = "self") -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or Generation()
        self.id = f"{name}|{json.dumps(self.settings.model_dump(), sort_keys=True)}"
        self.forbidden = control_ids(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"judge {name}: its tokenizer has no chat template; give an instruction-tuned model")
        try:
            self.render(compose("criticism", "==0==", "1 + 1", "2"))
        except Exception as error:  # noqa: BLE001 - templates are programs: they raise what they like
            raise ConfigError(f"judge {name}: its chat template cannot be used ({type(error).__name__})") from None

    def segments(self, prompt: Sequence[Message]) -> list[tuple[bool, list[int]]]:
        """(quoted, token ids) of the pieces of a rendered chat. Each piece is tokenised by itself."""
        quoted = [part.text for message in prompt for part in message.parts if part.quoted]
        marks = iter(f"\ue000{i}\ue001" for i in range(len(quoted)))
        chat = [
            {"role": m.role, "content": "".join(next(marks) if p.quoted else p.text for p in m.parts)} for m in prompt
        ]
        try:
            text = self._template(chat)
        except Exception:  # noqa: BLE001 - some templates refuse a system turn, each with an error of its own
            text = self._template([{"role": "user", "content": "\n\n".join(m["content"] for m in chat)}])
        pieces = re.split("\ue000(\\d+)\ue001", text)
        if [int(i) for i in pieces[1::2]] != list(range(len(quoted))):
            raise ValueError("the chat template drops or reorders what it is given")
        out = []
        for at, piece in enumerate(pieces):
            if at % 2:
                out.append((True, encode_quoted(self.tokenizer, quoted[int(piece)], self.forbidden)))
            else:
                out.append((False, list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])))
        return out

    def _template(self, chat: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def render(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ready for the answer."""
        return [i for _, ids in self.segments(prompt) for i in ids]

    def generate(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, seed: int) -> list[Answer]:
        """Answers in batches of like length. A prompt that does not fit the model's window is not answered."""
        ids = [self.render(prompt) for prompt in prompts]
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        room = window - max_tokens
        answers = [Answer(tokens_in=len(i), problem=f"{len(i)} tokens exceed the judge's window") for i in ids]
        fitting = sorted((row for row in range(len(ids)) if len(ids[row]) <= room), key=lambda row: -len(ids[row]))
        training = self.model.training
        self.model.eval()
        try:
            for at in range(0, len(fitting), self.settings.batch):
                rows = fitting[at : at + self.settings.batch]
                for row, said in zip(rows, self._answer([ids[row] for row in rows], max_tokens, seed + at)):
                    text = self.tokenizer.decode(said, skip_special_tokens=True)
                    answers[row] = Answer(text, tokens_in=len(ids[row]), tokens_out=len(said))
        finally:
            self.model.train(training)
        return answers

    @torch.no_grad()
    def _answer(self, batch: list[list[int]], max_tokens: int, seed: int) -> list[list[int]]:
        """Sampled answers to one batch of prompts, padded on the left; the caller's random state is left alone."""
        from transformers import GenerationConfig

        device, width, settings = self.model.device, max(map(len, batch)), self.settings
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        theirs = getattr(self.model.generation_config, "eos_token_id", None)
        stops = {self.tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])} - {None}
        config = GenerationConfig(
            do_sample=True, top_k=settings.top_k, top_p=settings.top_p, temperature=settings.temperature,
            num_beams=settings.beams, max_new_tokens=max_tokens, repetition_penalty=1.0,
            eos_token_id=sorted(stops), pad_token_id=pad, use_cache=True,
        )  # fmt: skip
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), models.quiet_transformers():
            torch.manual_seed(seed)
            out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        said = [row[width:].tolist() for row in out]
        return [row[: next((at for at, i in enumerate(row) if i in stops or i == pad), len(row))] for row in said]


class LocalJudge(SelfJudge):
    """A Transformers model as judge: `smollm2-135m`, `tiny`, a directory or a hub id. ConfigError if it cannot load."""

    def __init__(self, name: str, dtype: str = "auto", settings: Generation | None = None) -> None:
        base = models.load(name, dtype)
        super().__init__(base.model, base.tokenizer, settings, f"{name}|{base.sha256}|{base.dtype}")
