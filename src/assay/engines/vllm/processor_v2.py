"""Assay's logits processor for model runner V2: `--logits-processors assay.engines.vllm.processor_v2:SeededDraw`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from assay.engines.vllm.draw import Slots
from assay.engines.vllm.requests import check


class SeededDraw(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where this is checked
    """Requests with Assay's arguments get the token of their seed, all others are left alone."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.slots = Slots()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return self.slots.add(req_idx, sampling_params)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return self.slots.apply(logits, ctx.expanded_idx_mapping, ctx.pos)
