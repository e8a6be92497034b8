"""A base model that carries one LoRA adapter, and the vectors that screens read off it.

PEFT does the LoRA; this module moves adapters in and out as named float32 arrays and picks the parts a probe looks at.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import save as save_safetensors

from assay import checkpoint
from assay.config import ConfigError, LoraSettings
from assay.contribution import Template, Tensors
from assay.models import Base

Features = Literal["first_b", "all_b", "all_a", "all"]


class Carrier:
    """A base model with one LoRA adapter in it. The base is frozen and shared; the adapter is set, trained, read."""

    def __init__(self, base: Base, settings: LoraSettings) -> None:
        self.base, self.settings = base, settings
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets) if settings.targets != ("all-linear",) else "all-linear",
            lora_dropout=0.0,  # dropout would make runs depend on the thread's random state
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.model: Any = get_peft_model(base.model, config)
            except ValueError as error:
                raise ConfigError(f"lora.targets: {str(error).splitlines()[0]}") from None
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()  # fp32 adapter on a bf16 base
        # generate() hands the head a strided slice, for which PyTorch copies the whole output matrix once per row on
        # a CPU: a contiguous one makes writing answers three times faster and changes no value
        head = self.model.get_base_model().get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))

    def get(self) -> dict[str, NDArray[np.float32]]:
        """The adapter now, under PEFT's state-dict names."""
        state = get_peft_model_state_dict(self.model)
        return {name: state[name].detach().float().cpu().numpy().copy() for name in sorted(state)}

    def set(self, tensors: Tensors) -> None:
        """Put an adapter in; names and shapes must be those of `get`."""
        state = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in tensors.items()}
        outcome = set_peft_model_state_dict(self.model, state)
        if outcome.unexpected_keys:
            raise ValueError(f"adapter has unknown tensor {outcome.unexpected_keys[0]}")

    def initial(self) -> dict[str, NDArray[np.float32]]:
        """Round 0's adapter from the fixed LoRA seed: A Kaiming-uniform as in PEFT, B zero. Machine-independent."""
        rng = np.random.default_rng(self.settings.seed)
        out = {}
        for name, value in self.get().items():
            bound = 1.0 / np.sqrt(value.shape[-1])  # kaiming_uniform with a = sqrt(5)
            fresh = rng.uniform(-bound, bound, value.shape) if is_a(name) else np.zeros(value.shape)
            out[name] = fresh.astype(np.float32)
        return out

    def template(self, round: int) -> Template:
        shapes = {name: tuple(value.shape) for name, value in self.get().items()}
        return Template(shapes=shapes, base_sha256=self.base.sha256, round=round)


def write_peft(folder: Path, adapter: Tensors, settings: LoraSettings, base: str) -> None:
    """An adapter in PEFT's format: `PeftModel.from_pretrained(base, folder)` loads it."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(settings.targets),
        "inference_mode": True,
    }
    checkpoint.write_atomic(folder / "adapter_model.safetensors", save_safetensors(dict(adapter)))
    checkpoint.write_json(folder / "adapter_config.json", config)


def layer_of(name: str) -> int:
    """Index of the transformer layer a tensor belongs to; -1 where the name shows none.

    >>> layer_of("base_model.model.model.layers.12.self_attn.q_proj.lora_B.weight")
    12
    """
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def is_a(name: str) -> bool:
    """Whether a tensor is a lora_A: what a frozen A keeps from training."""
    return "lora_A" in name


def feature_names(names: list[str], features: Features) -> tuple[str, ...]:
    """Sorted tensor names a probe reads: `first_b` (the paper's: lora_B of the first layer), `all_b`, `all_a`, `all`."""
    b = [n for n in names if "lora_B" in n]
    if features == "first_b":
        first = min((layer_of(n) for n in b), default=-1)
        chosen = [n for n in b if layer_of(n) == first]
    else:
        chosen = {"all_b": b, "all_a": [n for n in names if is_a(n)]}.get(features, list(names))
    if not chosen:
        raise ConfigError("the adapter has no lora_A or no lora_B tensors: probes read LoRA adapters only")
    return tuple(sorted(chosen))


def unit_rows(x_ND: NDArray[np.floating]) -> NDArray[np.float32]:
    """L2-normalise each row; a zero row stays zero (an update that changes nothing has no direction)."""
    norm_N1 = np.linalg.norm(x_ND.astype(np.float64), axis=1, keepdims=True)
    return (x_ND / np.where(norm_N1 > 0, norm_N1, 1.0)).astype(np.float32)
