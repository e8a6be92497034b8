"""What a node without checks makes of a message: it reads the form as the message describes itself, and learns from it.

The contrast to `swarm_corpus`. There is no stock node to measure: swarms bring their own, and the form is Assay's. So this
one is written as one would who trusts its peers: `struct`, `json` and `numpy` on what the header says, completions under
the name the message came with, rewards of its own, and Assay's GRPO step (TRL's, tests/test_grpo.py) without screens.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from assay.bench.swarm_messages import Hostile, Stage
from assay.config import SwarmExperiment
from assay.contribution import Completion, completion_sha256
from assay.engines.swarm_world import build
from assay.progress import Silent
from assay.swarm.exchange import Gathered
from assay.swarm.learner import Memory
from assay.swarm.signed import FIXED, MAGIC, SIGNATURE
from assay.wire.envelope import START


def read(message: bytes, node: str) -> tuple[Completion, ...]:
    """Completions as the message has them. Raises whatever struct, json and numpy raise."""
    at = len(MAGIC) + SIGNATURE
    (round, _, _) = FIXED.unpack_from(message, at)
    at += FIXED.size
    for _ in ("run", "node"):
        (size,) = struct.unpack_from("<H", message, at)
        at += 2 + size
    contents = message[at:]
    (size,) = struct.unpack_from("<I", contents, START - 4)
    header = json.loads(contents[START : START + size])
    ids = np.frombuffer(contents[START + size :], "<u4")
    out, first = [], 0
    for prompt, index, tokens in header["completions"]:
        some = tuple(int(i) for i in ids[first : first + tokens])
        first += tokens
        sha256 = completion_sha256(round, prompt, index, some)
        out.append(Completion(participant=node, round=round, prompt=prompt, index=index, ids=some, sha256=sha256))
    return tuple(out)


class Plain:
    """The same round for a node that checks nothing; `others`: the honest nodes' completions."""

    def __init__(self, experiment: SwarmExperiment, others: tuple[Completion, ...]) -> None:
        self.world, _, _ = build(experiment.changed(defence__level="none"), Silent())
        [self.learner] = self.world.learners.values()
        self.others, self.first = others, self.learner.tensors()

    def judge(self, case: Hostile, stage: Stage) -> tuple[str, str]:
        """What became of the round, and the error that ended it: `crashed`; `learnt`: the hostile completions moved the
        weights; `learnt unaltered`: they did, and are those an honest node sent; `nothing in it`."""
        try:
            found = read(case.make(stage), stage.node)
            gathered = Gathered(plan=stage.plan, completions=(*self.others, *found), refused=())
            self.learner.load(self.first)
            _, learnt = self.learner.learn(gathered, Memory())
        except Exception as error:  # noqa: BLE001 - this is what is measured
            return "crashed", "struct.error" if isinstance(error, struct.error) else type(error).__name__
        finally:
            self.learner.load(self.first)
        rows = range(len(self.others), len(learnt.pool.completions))
        if not any(learnt.judged.weight_N[row] > 0 and learnt.pool.completions[row].ids for row in rows):
            return "nothing in it", ""
        return ("learnt unaltered" if _said(found) == _said(stage.honest.completions) else "learnt"), ""


def _said(completions: tuple[Completion, ...]) -> list[Any]:
    return sorted((c.prompt, c.index, c.ids) for c in completions)
