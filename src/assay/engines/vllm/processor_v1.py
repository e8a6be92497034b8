"""Assay's logits processor for model runner V1: `--logits-processors assay.engines.vllm.processor_v1:SeededDraw`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from assay.engines.vllm.draw import Batch
from assay.engines.vllm.requests import check


class SeededDraw(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where this is checked
    """Requests with Assay's arguments get the token of their seed, all others are left alone."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.batch = Batch()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: that would put it behind the arg max."""
        return False

    def update_state(self, batch_update: Any) -> None:
        self.batch.update(batch_update)

    def apply(self, logits: Tensor) -> Tensor:
        return self.batch.apply(logits)
