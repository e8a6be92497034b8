"""Assay: the security layer for collaborative training of language models."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as _version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.engines.screen import Screening

__version__ = _version("assay")


def screen(paths: Sequence[str | Path], **options: Any) -> Screening:
    """Verdicts on LoRA adapters on disk or hub, one each; options are those of `engines.screen.screen_adapters`.

    for verdict in assay.screen(["client-1/", "client-2/"], base="smollm2-135m", probe="probe.safetensors"):
        print(verdict)
    """
    from assay.engines.screen import screen_adapters  # torch and PEFT only for who screens

    return screen_adapters(paths, **options)
