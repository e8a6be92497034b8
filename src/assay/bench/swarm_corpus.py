"""Hostile messages in the pool of a swarm's round, as a node takes them: `python -m assay.bench.swarm_corpus` writes
results/swarm-corpus.json, from which `python -m assay.bench.tables` makes the table of docs/FLOWER.md.

Four nodes of the real `tiny`; three are honest, the fourth's message is the hostile one. It stands in the pool itself,
as if the relay had let everything through. Measured for each:
  survived   nothing raised; every honest completion is learnt from; the weights after the round are those of the same
             round without the fourth node (closer than 1e-5; exactly, where the message never got to the screens)
  harmed     anything else
and the reason the node gives for the hostile message. Beside it what a node without checks makes of it (`swarm_plain`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assay import checkpoint, run_dir
from assay.bench.swarm_hostile import CORPUS
from assay.bench.swarm_messages import Hostile, Stage
from assay.bench.swarm_plain import Plain
from assay.config import SwarmExperiment
from assay.engines.swarm_world import answer, build, model_sha256, plan_of
from assay.progress import Silent
from assay.swarm.learner import Learnt, Memory
from assay.swarm.relayed import Heard, encode_pool, genesis, hear, plan_sha256
from assay.swarm.signed import Statement, sign
from assay.verdict import Reason
from assay.wire import encode_rollout

HOSTILE, OTHER = "node-3", "node-0"
CLOSE = 1e-5
"""Between two weights: a fiftieth of Adam's first step. Rows that are out still stand in the micro-batches, whose sums end
in other last bits, and Adam divides small gradients by their own size; 2.2e-6 was seen."""
RESULTS = Path("results/swarm-corpus.json")


def experiment() -> SwarmExperiment:
    """Four honest nodes, one prompt of four completions each: a group that is refused leaves nothing of its node."""
    return SwarmExperiment().changed(
        name="swarm-corpus", swarm__nodes=4, swarm__malicious=0.0, swarm__prompts=4, swarm__group=4, swarm__run="corpus"
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a message."""

    outcome: str
    reason: str
    sentence: str = ""
    weights: str = ""
    """`same`: to the bit those of the round without the fourth node; `close`; `other`."""
    strike: bool = False


class Theatre:
    """One round, played again for every message: the world before it, the honest messages, the round without the fourth."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.world, identity, _ = build(experiment(), Silent())
        [self.learner] = self.world.learners.values()
        self.first = self.learner.tensors()
        keys = {n: Ed25519PrivateKey.from_private_bytes(n.encode().ljust(32)) for n in self.world.nodes}
        self.keys = {n: key.public_key() for n, key in keys.items()}
        self.head = genesis("corpus", self.keys, identity)
        self.plan, self.rules = plan_of(self.world, 1), self.world.reading
        made = answer(self.world, self.plan, model_sha256(self.world))
        statements = {
            n: Statement(
                run="corpus", round=1, node=n, plan=plan_sha256(self.plan), head=self.head,
                contents=encode_rollout(rollout, run="corpus"),
            )
            for n, rollout in made.items()
        }  # fmt: skip
        self.messages = {n: sign(s, keys[n]) for n, s in statements.items()}
        self.stage = Stage(
            node=HOSTILE, plan=self.plan, ahead=plan_of(self.world, 2), rules=self.rules, honest=made[HOSTILE],
            statement=statements[HOSTILE], key=keys[HOSTILE], keys=self.keys, other_key=keys[OTHER], other=OTHER,
            other_rollout=made[OTHER], other_message=self.messages[OTHER], eos=self.world.practice.eos,
            redraw=lambda prompt, seed: self.learner.generate([prompt], [seed])[0],
        )  # fmt: skip
        del self.messages[HOSTILE]
        _, learnt, self.without = self.play({})
        self.admitted = _admitted(learnt)

    def hear(self, extra: dict[str, bytes]) -> Heard:
        pool = encode_pool(1, {**self.messages, **extra})
        return hear(pool, plan=self.plan, rules=self.rules, keys=self.keys, head=self.head)

    def play(self, extra: dict[str, bytes]) -> tuple[Memory, Learnt, dict[str, Any]]:
        """The round with these messages more: memory, what was learnt, the weights after it."""
        self.learner.load(self.first)
        gathered = self.hear(extra).gathered(self.rules)
        memory, learnt = self.learner.learn(gathered, Memory())
        weights = {n: p.detach().numpy().copy() for n, p in self.learner.parameters.items()}
        self.learner.load(self.first)
        return memory, learnt, weights

    def judge(self, case: Hostile) -> Seen:
        """What a node makes of the honest messages and this one."""
        try:
            memory, learnt, weights = self.play({HOSTILE: case.make(self.stage)})
        except Exception as error:  # noqa: BLE001 - this is what is measured
            return Seen("crashed", type(error).__name__, str(error))
        apart = max(float(np.abs(weights[n] - self.without[n]).max()) for n in weights)
        told = "same" if apart == 0 else "close" if apart <= CLOSE else "other"
        admitted = _admitted(learnt)
        unharmed = all(admitted[n] == self.admitted[n] for n in self.messages) and not admitted.get(HOSTILE)
        reason, sentence = _reason(learnt)
        strike = bool(memory.trust[HOSTILE].rounds) if HOSTILE in memory.trust else False
        return Seen("survived" if unharmed and told != "other" else "harmed", reason, sentence, told, strike)


def _admitted(learnt: Learnt) -> dict[str, int]:
    out: dict[str, int] = {}
    for row, completion in enumerate(learnt.pool.completions):
        out[completion.participant] = out.get(completion.participant, 0) + int(learnt.judged.weight_N[row] > 0)
    return out


def _reason(learnt: Learnt) -> tuple[str, str]:
    """Why the hostile message was refused, or the first of its rows for a reason of its own."""
    for refusal in learnt.pool.refused:
        if refusal.participant == HOSTILE:
            return refusal.reason, refusal.sentence
    found = [v for v in learnt.judged.deciding if v is not None and v.participant == HOSTILE]
    own = [v for v in found if v.reason is not Reason.GROUP] or found
    return (own[0].reason.value, own[0].sentence) if own else ("ok", "")


def measure(corpus: Sequence[Hostile] = CORPUS) -> list[dict[str, Any]]:
    """A row per message: what it is, what became of the round, why it was refused, whether it cost its node a strike, and
    what a node without checks does with it."""
    theatre, out = Theatre(), []
    plain = Plain(experiment(), theatre.hear({}).gathered(theatre.rules).completions)
    for case in corpus:
        seen, (became, error) = theatre.judge(case), plain.judge(case, theatre.stage)
        out.append(
            {
                "name": case.name, "what": case.what, "expected": case.reason, "assay": seen.outcome,
                "reason": seen.reason, "sentence": seen.sentence, "weights": seen.weights, "strike": seen.strike,
                "plain": became, "plain_error": error,
            }
        )  # fmt: skip
    return out


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m assay.bench.swarm_corpus", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    path = parser.parse_args(list(arguments)).results
    run_dir.commit()
    rows = measure()
    found = {
        "wing": "swarm-messages",
        "command": "python -m assay.bench.swarm_corpus",
        "commit": run_dir.commit(),
        "versions": {**run_dir.versions(), "cryptography": version("cryptography")},
        "machine": run_dir.machine(),
        "rows": rows,
    }
    checkpoint.write_json(path, found)
    wrong = [row for row in rows if row["assay"] != "survived" or row["reason"] != row["expected"]]
    for row in wrong:
        print(json.dumps(row))
    print(f"{len(rows)} messages, {len(wrong)} not as expected; {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
