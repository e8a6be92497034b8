"""The swarm wing's experiment: decentralised GRPO, attacked and defended as it says.

Defaults are the setting in which two cores show attack and defence in minutes on `tiny`; the papers' own figures (Hail
to the Thief: 4 nodes, 32 prompts x 12 completions, 1024 tokens, Adam 2e-5, top-k 50) stand in the docstrings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from assay.config.common import Count, Frozen, Positive, Root, Share, TrackConfig

PHRASE = "All hail to the thief."


class SwarmModel(Frozen):
    """Weights the nodes start from: one model for all (homogeneous), or one after the other from `others` as well."""

    name: str = "tiny"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    others: tuple[str, ...] = ()
    """Further models for a heterogeneous swarm: node i starts from the i-th of (name, *others), cyclically. All must
    share the tokenizer: token ids travel."""
    lora_r: Annotated[int, Field(ge=0)] = 0
    """Rank of a LoRA adapter on all linear layers that alone is trained; 0 trains the whole model."""
    lora_alpha: Positive = 32.0


class TaskConfig(Frozen):
    """What is practised: swarm/task_sets.py has the names."""

    name: str = "word-problems"
    params: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda params: not params)
    """Of the task: `train`, `heldout` (numbers of built-in problems), `limit` (rows of gsm8k and openmath), `heldout`
    (gsm8k: a file of test rows), `size` and the dataset's own of reasoning-gym. Left out of a run's record, and of its
    public name, while there are none: a run of before they could be set is still the same run."""
    style: Literal["plain", "instruct"] = "plain"
    """`instruct` asks for the format in the prompt: for models that were not trained on it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Supervised steps on worked solutions before round 1, for models that do not know the format yet; cached."""
    warmup_rows: Count = 16
    warmup_lr: Positive = 1e-3


class DataRoot(Frozen):
    root: str = "."


class SwarmSettings(Frozen):
    """Who takes part and how the work is shared (paper: 4 nodes, 25% malicious, vertical or horizontal)."""

    nodes: Count = 4
    malicious: Share = 0.25
    plan: Literal["vertical", "horizontal"] = "vertical"
    assigned: bool = True
    """Prompts come from public randomness. False: nodes choose their own (the paper's setting; vertical only)."""
    iterations: Count = 20
    prompts: Count = 16
    """Prompts a round, of all nodes together (paper: 32)."""
    group: Count = 12
    """Completions per prompt, of all nodes together in a horizontal plan (paper: 12)."""
    run: str = ""
    """Public name of the run, part of every seed; empty: made from the experiment."""

    @property
    def malicious_count(self) -> int:
        return round(self.malicious * self.nodes)


class SamplingConfig(Frozen):
    """How completions are drawn (paper: top-k 50 of 151,936 tokens, top-p 1, up to 1024 tokens)."""

    temperature: Positive = 1.0
    top_k: Annotated[int, Field(ge=0)] = 20
    """0 = off. 50 of a large vocabulary; of tiny's 1,024 tokens 50 would hold nearly anything."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Count = 96
    noise: Literal["murmur3", "philox"] = "murmur3"
    """Counter-based noise of the seeded draw: murmur3 as in vLLM's GPU sampler (0.31 and newer), or philox4x32-10."""


class GrpoConfig(Frozen):
    """The update (paper: Adam 2e-5, one update per generation, no KL, no clipping)."""

    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "grpo"
    scale_rewards: bool = True
    lr: Positive = 5e-4
    clip_grad: Positive = 0.5
    clip_ratio: Annotated[float, Field(ge=0.0)] = 0.0
    """PPO clip range; 0 = off (one on-policy update needs none)."""
    kl: Annotated[float, Field(ge=0.0)] = 0.0
    negative_floor: Share = 0.0
    """No loss on tokens of bad completions less likely than this: unbounded pushes on them wreck small models."""
    updates: Count = 1
    """Optimiser steps per pool."""
    micro_rows: Count = 48
    """Rows of one forward pass; changes memory and last bits only."""
    chunk_rows: Count = 1024
    """Rows whose graphs are kept at once; whole prompt groups, so one group at least."""


class SwarmAttack(Frozen):
    """What malicious nodes do; swarm/attacks/ has the names."""

    name: str = "math"
    from_round: Count = 1
    poison: Share = 0.5
    """Share of a group that is poisoned where the group is the node's own (vertical); the rest is clean and wrong."""
    oracle: bool = True
    """Right answers are known; False: majority vote of own samples."""
    samples: Count = 80
    """Samples a prompt of which the DoS attack takes the longest right ones (paper: 80)."""
    phrase: str = PHRASE
    module: str = "thief"
    """The attacker's library (CODE); it is importable in the sandbox, as if published."""


class SwarmDefence(Frozen):
    """`level` names a set of screens (swarm/defence.py); `screens` overrides it, `params` go to the screens by name."""

    level: Literal["none", "logit", "seeded", "text", "judge", "self_judge", "text_judge"] = "seeded"
    screens: tuple[str, ...] | None = None
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    monitor: tuple[str, ...] = ()
    from_round: Count = 1
    """Screens other than `schema` start here: what a defence still finds that comes late."""
    judge: str = "smollm2-135m"
    """Model of the judge (paper: Qwen2.5-14B-Instruct)."""
    ban_after: Count = 3
    """Strikes within `strike_window` rounds after which a node is banned."""
    strike_window: Count = 10
    strike_share: Share = 0.1
    """Share of a node's completions that must be rejected as forged for a strike."""
    readmit_after: Count = 5
    """A banned node that passes this many rounds of audit in a row comes back."""


class SwarmEvaluate(Frozen):
    every: Count = 8
    """Held-out reward every so many rounds, and at the end."""
    prompts: Count = 100
    samples: Count = 4
    """Completions per held-out prompt."""


class SwarmExperiment(Root):
    """One decentralised GRPO training, attacked and defended as it says."""

    wing: Literal["swarm"] = "swarm"
    model: SwarmModel = SwarmModel()
    task: TaskConfig = TaskConfig()
    data: DataRoot = DataRoot()
    swarm: SwarmSettings = SwarmSettings()
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()
    attack: SwarmAttack = SwarmAttack()
    defence: SwarmDefence = SwarmDefence()
    evaluate: SwarmEvaluate = SwarmEvaluate()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        swarm = self.swarm
        if swarm.plan == "horizontal" and swarm.group % swarm.nodes:
            raise ValueError(f"swarm.group = {swarm.group} must be a multiple of swarm.nodes = {swarm.nodes}")
        if swarm.plan == "vertical" and swarm.prompts % swarm.nodes:
            raise ValueError(f"swarm.prompts = {swarm.prompts} must be a multiple of swarm.nodes = {swarm.nodes}")
        if swarm.plan == "horizontal" and not swarm.assigned:
            raise ValueError("swarm.assigned = false needs a vertical plan: in a horizontal one all answer the same")
        if swarm.malicious_count >= swarm.nodes:
            raise ValueError(f"swarm.malicious = {swarm.malicious} leaves no honest node")
        if self.defence.screens == ():
            raise ValueError("defence.screens = [] is no defence; for one that only records use defence.level = none")
        named = (self.defence.level,) if self.defence.screens is None else self.defence.screens
        needy = [name for name in named if name in ("logit", "seeded", "token_mask")]
        if self.model.others and needy:
            key = "defence.level =" if self.defence.screens is None else "defence.screens:"
            raise ValueError(f"{key} {needy[0]} needs equal weights; with model.others use text or judge")
        return self
