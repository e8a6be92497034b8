"""Bytes <-> contribution: the only door by which what a peer sends comes in.

`lora`: adapters of the federated wing. `rollout`: completions of the swarm. `envelope`: what both have in common. A
message becomes a contribution or a `Refusal` with a reason and a sentence; only the operator's own mistakes raise.
"""

from assay.wire.envelope import WireError, missing
from assay.wire.lora import (
    DEFAULT_LIMITS,
    FORMAT,
    MAGIC,
    MAX_NUM_EXAMPLES,
    Limits,
    decode_tensors,
    decode_update,
    encode_tensors,
    encode_update,
)
from assay.wire.rollout import RolloutTemplate, decode_rollout, encode_rollout

__all__ = [
    "DEFAULT_LIMITS",
    "FORMAT",
    "MAGIC",
    "MAX_NUM_EXAMPLES",
    "Limits",
    "RolloutTemplate",
    "WireError",
    "decode_rollout",
    "decode_tensors",
    "decode_update",
    "encode_rollout",
    "encode_tensors",
    "encode_update",
    "missing",
]
