"""A node's trainer beside its mailbox, as a process: python tests/trl_relay_node.py FOLDER NODE ROUNDS [thief].

A thief publishes right answers that open with a phrase, in place of what its node drew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from assay.engines.trl import ScreenedRollouts
from assay.engines.trl.record import weights_sha256
from assay.engines.trl.relayed import RelayExchange
from trl_nodes import EOS, MAX_TOKENS, TASK, book, encode, message, reward, tiny, trainer_of

PROMPTS = 6


class Thief(RelayExchange):
    def publish(self, round: int, message_: bytes) -> None:
        header = json.loads(message_[12 : 12 + int.from_bytes(message_[8:12], "little")])
        said = {}
        for prompt, index, _ in header["completions"]:
            text = TASK.solution(book(PROMPTS)[prompt]).replace("<think>", "<think>All hail to the thief. ", 1)
            said[prompt, index] = (*encode(text)[: MAX_TOKENS - 1], EOS)
        super().publish(round, message(self.node, round, said, run=self.run))


def main(folder: Path, node: str, rounds: int, thief: bool) -> None:
    torch.set_num_threads(1)  # equal weights to the last bit
    exchange = (Thief if thief else RelayExchange)(folder, node=node, timeout=400.0)
    rollouts = ScreenedRollouts(exchange, ledger=folder / "run", self_test=False)
    trainer = trainer_of(
        folder / "trl", tiny(), rollouts, rollouts.wrap(reward), prompts=PROMPTS, group=6, steps=rounds
    )
    trainer.train()
    rollouts_told = {peer: rollouts.metrics[f"assay/admitted/{peer}"] for peer in exchange.nodes}
    told = {"admitted": rollouts_told, "weights": weights_sha256(trainer.model), "head": exchange.head(rounds)}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "thief" in sys.argv[4:])
