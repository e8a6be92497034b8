"""Who owes which completions, and one pool for all: the plan of a round and what becomes of the messages.

The plan comes from public randomness (the run's public name and the round), so that every node can compute what every
other node was asked, and nobody picks his prompts. Messages go through the wire like a stranger's; what is late or
missing is a refusal like any other. Nodes that run apart compare the pool's hash (`agreement`) before they learn from
it; the engine on one machine has one pool for all, whose hash is in the ledger.

Plan and seeds hang on the run's public name and on the nodes' names: draw the public name after the names are fixed, or
a node can choose a name whose prompts it likes.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from assay.contribution import Completion, Refusal, Rollout, pool_sha256
from assay.wire import RolloutTemplate, decode_rollout, missing

Mode = Literal["vertical", "horizontal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`asked[node][prompt]` = completions owed. With free choice the prompts are examples: only their number binds."""

    round: int
    mode: Mode
    asked: Mapping[str, Mapping[int, int]]
    assigned: bool = True

    @property
    def owed(self) -> int:
        return sum(sum(prompts.values()) for prompts in self.asked.values())


def make_plan(
    run: str,
    round: int,
    nodes: Sequence[str],
    *,
    mode: Mode,
    prompts: int,
    group: int,
    ids: range,
    assigned: bool = True,
) -> Plan:
    """The plan of a round (Hail to the Thief, section on vertical and horizontal dRL).

    Vertical: each of the m nodes answers prompts / m prompts of its own with `group` completions each. Horizontal:
    every node answers all `prompts`, group / m completions each. ValueError where the numbers do not divide, or where
    the task has fewer than `prompts` ids.

    >>> plan = make_plan("run", 1, ["a", "b"], mode="vertical", prompts=4, group=6, ids=range(100))
    >>> [sorted(p.values()) for p in plan.asked.values()]
    [[6, 6], [6, 6]]
    """
    nodes = sorted(nodes)
    split = prompts if mode == "vertical" else group
    if not nodes or len(set(nodes)) != len(nodes) or split % len(nodes):
        what = "prompts" if mode == "vertical" else "completions a prompt"
        raise ValueError(f"{mode} plan: {split} {what} cannot be shared by {len(nodes)} nodes")
    if len(ids) < prompts:
        raise ValueError(f"the task has {len(ids)} prompts, a round needs {prompts}")
    # one draw without replacement: nobody's prompt is asked of another in vertical mode
    drawn = _rng(run, round).sample(ids, prompts)
    if mode == "horizontal":
        asked = {node: dict.fromkeys(drawn, group // len(nodes)) for node in nodes}
    else:
        each = prompts // len(nodes)
        asked = {node: dict.fromkeys(drawn[i * each : (i + 1) * each], group) for i, node in enumerate(nodes)}
    return Plan(round=round, mode=mode, asked=asked, assigned=assigned)


def _rng(run: str, round: int) -> random.Random:
    digest = hashlib.sha256(f"assay.plan.1\0{len(run)}\0{run}\0{round}".encode()).digest()
    return random.Random(int.from_bytes(digest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a receiver asks of every message besides the plan. `model_sha256` None: nodes' weights differ."""

    run: str
    vocabulary: int
    max_tokens: int
    ids: range
    model_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """One receiver's view of a round: completions in the order of (participant, prompt, index), and what was refused."""

    plan: Plan
    completions: tuple[Completion, ...]
    refused: tuple[Refusal, ...]

    @property
    def sha256(self) -> str:
        return pool_sha256(self.completions)


def gather(messages: Mapping[str, bytes | None], plan: Plan, rules: Rules) -> Gathered:
    """Read everybody's message. A sender who was not asked is ignored; who was asked and sent nothing is `missing`.

    With free choice the returned plan holds the prompts that were chosen; a node whose choice collides with another
    node's prompt keeps it (groups are per node).
    """
    completions: list[Completion] = []
    refused: list[Refusal] = []
    asked = dict(plan.asked)
    for node in sorted(plan.asked):
        message = messages.get(node)
        if message is None:
            refused.append(missing(node))
            continue
        read = decode_rollout(message, template=template(node, plan, rules), run=rules.run, participant=node)
        if isinstance(read, Refusal):
            refused.append(read)
            continue
        completions += read.completions
        if not plan.assigned:
            asked[node] = _chosen(read, plan.asked[node])
    order = sorted(completions, key=lambda c: (c.participant, c.prompt, c.index))
    final = Plan(round=plan.round, mode=plan.mode, asked=asked, assigned=plan.assigned)
    return Gathered(plan=final, completions=tuple(order), refused=tuple(refused))


def template(node: str, plan: Plan, rules: Rules) -> RolloutTemplate:
    """What `node`'s message must look like."""
    return RolloutTemplate(
        round=plan.round,
        asked=plan.asked[node],
        model_sha256=rules.model_sha256,
        vocabulary=rules.vocabulary,
        max_tokens=rules.max_tokens,
        free_choice=None if plan.assigned else rules.ids,
    )


def _chosen(rollout: Rollout, asked: Mapping[int, int]) -> dict[int, int]:
    """The prompts a node chose, each owing as many completions as the plan's; unchosen ones stay owed."""
    chosen = sorted({c.prompt for c in rollout.completions})
    return dict(zip([*chosen, *(p for p in asked if p not in chosen)][: len(asked)], asked.values()))


def agreement(hashes: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """The pool hash most nodes hold and the nodes that hold another (ties: the smaller hash).

    A node in the minority did not see what the others saw (a relay that tells different nodes different things, a
    message lost): it must not learn from this pool.
    """
    counts = Counter(hashes.values())
    common = min(counts, key=lambda value: (-counts[value], value))
    return common, tuple(sorted(node for node, value in hashes.items() if value != common))
