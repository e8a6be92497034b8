"""The federated wing's experiment.

Every key here is read somewhere and every key of a file must be here (`extra = forbid`). Defaults are the setting in
which a 2-core machine shows the attack and the defence in minutes; the papers' own figures stand in the docstrings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from assay.config.common import Count, Frozen, ModelConfig, Positive, Root, Share, TrackConfig
from assay.config.measure import EvaluateConfig, FinishConfig


class LoraSettings(Frozen):
    """Adapter that clients train (paper: r 8, alpha 16, q and v)."""

    r: Count = 8
    alpha: Positive = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    seed: int = 0
    freeze_a: bool = False
    """Clients train lora_B alone; who moves lora_A is refused (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313). Nothing can
    then hide in A, where no filter looks, and averaging factors is averaging products. At the same rate B alone learns a little less."""


class OperatorDataConfig(Frozen):
    """What the operator aligns the model on, rehearses on and fits probes to, where it is not a part of what clients
    hold. None: that part.

    In life an operator has other data than the clients, and other harmful rows than the attackers: name other sets here
    to measure how far a probe carries.
    """

    benign: tuple[str, ...] | None = None
    refusals: tuple[str, ...] | None = None
    malicious: str | None = None

    def named(self) -> tuple[str, ...]:
        """Every source there is one of its own for."""
        return (*(self.benign or ()), *(self.refusals or ()), *filter(None, [self.malicious]))


class DataConfig(Frozen):
    """Where rows come from: built-in names, JSON-lines files (relative to `root`) or named hub sets (data.py)."""

    benign: tuple[str, ...] = ("helpful",)
    refusals: tuple[str, ...] = ("refusals",)
    malicious: str = "harmful-stub"
    harmful_prompts: str = "refusals"
    """Only the instructions are used, and only of the held-out part where the set also feeds training."""
    operator: OperatorDataConfig = OperatorDataConfig()
    root: str = "."
    refusal_share: Share = 0.02
    """Share of refusals in an honest client's rows: real instruction data holds some. The more there are, the more the
    honest clients repair each round what the malicious ones break (at 0.1 half the clients cannot break it for long)."""
    strangers: tuple[str, ...] = ("word-problems", "programs")
    """Sources of honest strangers (`clients.strangers`), one each in turn: no warm-up, probe or rehearsal reads them."""
    files: dict[str, str] = Field(default_factory=dict)
    """Local files (JSON lines as the hub serves them, relative to `root`) to read named hub sets from: nothing is
    fetched, the set's own filter applies. `files = { beavertails = "beavertails.jsonl" }`."""
    hub_rows: Count = 20_000
    """Filtered rows taken of each named hub set, the first so many: LMSYS-Chat-1M holds a million."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        named = {*self.benign, *self.refusals, self.malicious, self.harmful_prompts, *self.strangers}
        named |= {*self.operator.named()}
        if unused := sorted(set(self.files) - named):
            raise ValueError(
                f"files: {unused[0]} is not a source of this experiment; name it under benign or another key"
            )
        return self


class ClientsConfig(Frozen):
    """Who takes part. `malicious` is a share of `total`; the server is never told which."""

    total: Count = 10
    malicious: Share = 0.5
    sampled: Count | None = None
    """Clients per round; None = all of them."""
    examples: Count = 60
    """Rows of a client; with `size_spread` their mean."""
    size_spread: Annotated[float, Field(ge=0.0, le=3.0)] = 0.0
    """Clients of different sizes, malicious ones as well: sigma of a log-normal, 0 = all alike, 1 = a factor of seven
    between the quarters' ends. None falls below one batch; the local steps stay the same for all."""
    partition: Literal["iid", "dirichlet"] = "iid"
    """`dirichlet`: every client has its own mixture of topics (source and style of the benign rows)."""
    alpha: Positive = 0.5
    """Concentration of `dirichlet` (Hsu et al. 2019, arXiv 1909.06335): 100 is nearly iid, 0.1 nearly one topic each."""
    strangers: Share = 0.0
    """Share of the honest clients whose rows come from `data.strangers` only: nothing the server tuned itself on."""

    @property
    def stranger_count(self) -> int:
        return round(self.strangers * (self.total - self.malicious_count))

    @property
    def malicious_count(self) -> int:
        return round(self.malicious * self.total)

    @property
    def per_round(self) -> int:
        return self.sampled or self.total

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.per_round > self.total:
            raise ValueError(f"sampled = {self.per_round} is more than total = {self.total} clients")
        return self


class TrainingConfig(Frozen):
    """Local training (paper: 25 rounds, up to 10 steps of 16 rows, 256-512 tokens, 5e-5 cosine over rounds to 1e-6)."""

    rounds: Count = 6
    steps: Count = 2
    batch_size: Count = 8
    max_length: Annotated[int, Field(ge=8)] = 48
    lr: Positive = 2e-3
    lr_final: Positive | None = None
    """With `cosine`: the rate of the last round, constant within a round. None: a fiftieth of `lr`, as in the paper; never
    0, at which nothing would be trained and everybody refused."""
    schedule: Literal["constant", "cosine"] = "constant"
    clip: Positive = 1.0
    """Largest norm of a client's own gradient in a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Fresh in every round. Sgd wants rates some hundred times higher than the default."""
    prox_mu: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """FedProx: mu/2 x the squared distance to the round's adapter joins the local loss (paper: 0.01). 0 is none."""
    scaffold: bool = False
    """SCAFFOLD: the server corrects every client's gradients for drift (federated/scaffold.py). Needs sgd."""
    shadow_lr: Positive | None = None
    """Rate of the shadow branch; None = `lr`. (Paper: 5e-5, equal to its `lr`.)"""


class AttackConfig(Frozen):
    """What malicious clients do; see federated/attacks/."""

    name: str = "harmful_data"
    """One attack, or a chain of several in the order in which they act: `paired_backdoor+blend+match_norms`."""
    mix: Share = 1.0
    """Share of malicious rows in a malicious client's data; backdoors and update attacks have parameters of their own."""
    from_round: Count = 1
    """Honest before this round, whatever the attack."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the attack by name, e.g. `{ z = 1.5 }`; in a chain one table by part: `{ blend = { norm = 1.2 } }`.
    What each has, and its paper's value, stands in federated/attacks/. Unknown ones are errors."""


class CanaryConfig(Frozen):
    """The server's secret prompts: losses are measured with each client's update applied."""

    refusals: Count = 16
    safe: Count = 8
    floor: Positive = 0.04
    """Smallest limit in nats on the rise in one round; since round 0: `anchor_floor`. Rehearsed rises can be all
    negative. At the default rate honest rises reach 0.028: 0.02 cost 2 of 30 honest updates. Rises grow with the rate.
    Higher lets more harm through before the canary speaks; the anchor bounds what adds up."""
    anchor_floor: Positive = 0.06
    safe_floor: Positive = 0.1
    """The same for the loss of safe answers: a matter of usefulness, not of safety, so the limit is what an operator shrugs
    at, a tenth of a nat per token. At 0.04 and 0.06 whoever learnt his own rows by heart lost weight: all that honest
    clients lost under most attacks (tiny, 70% malicious, a high rate). Who teaches refusing everything costs whole nats."""
    safe_anchor_floor: Positive = 0.2
    margin: Annotated[float, Field(ge=0.0)] = 0.5
    """As `rehearsal.margin`, of the canary's limits. Twice as wide: rises scatter more than directions do."""
    seed: int | None = None
    """None: drawn from the run's seed (simulation). In a real run set it and keep it secret."""


class RehearsalConfig(Frozen):
    """Honest rounds the server plays on its own data to fill the bank and set every threshold."""

    rounds: Count | None = None
    """None: as many as the run has, at least 6 and at most 10. Later rounds are held to the limits of the last rehearsed one."""
    malicious: Count = 3
    honest: Count = 3
    """Clients whose mean moves the rehearsed adapter: the fewest honest ones that the limits shall hold for. Few drift
    farther from the start than many: limits for many refused up to a fifth of the few left (tiny, 70% malicious)."""
    examples: Count = 60
    margin: Annotated[float, Field(ge=0.0)] = 0.25
    """Threshold = benign max + margin x (benign max - benign median)."""


class ClaimsConfig(Frozen):
    """How client-sent evidence (steps, shadow branches) is held against the training that was ordered; claims.py."""

    optimizer: Literal["adamw", "any"] = "adamw"
    """`adamw`: clients train with AdamW, fresh each round, no weight decay: each step of a coordinate is bounded by the
    rate. `any`: no such bound, for clients that train in another way."""
    slack: Annotated[float, Field(ge=0.0)] = 0.05
    """Share by which a coordinate may pass AdamW's bound by rounding."""
    first_step: Share = 0.5
    """Least share of moved coordinates that step 1 moves by the rate itself (honest: 0.97 and more)."""
    turn: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Least cosine between consecutive steps of AdamW, whose momentum keeps it up (honest: 0.33 and more). Read where
    clients train with it alone: batches of sgd disagree (honest: down to -0.46 on `tiny`)."""


class EvidenceConfig(Frozen):
    """Assay's evidence level (published: 3 rounds that agree, then an audit every 5th round, both known to clients)."""

    agree: Count = 3
    """Clean audits in a row after which a client is trusted and audited by chance only."""
    audit: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of a trusted client's rounds that are audited. A sleeper gets (1 - audit) / audit bad rounds in on average
    before it is caught; 1 looks at every round."""
    readmit: Count = 3
    """Clean rounds in a row after which a client that failed an audit counts again."""
    seed: int | None = None
    """Secret of the audit draw. None: drawn from the run's seed (simulation). In a real run set it and keep it secret."""


class DefenceConfig(Frozen):
    """`submitted` is Assay's default; `step`, `client`, `shadow`, `evidence` are the paper's with their holes closed;
    `spectral` needs no labelled data and is weak; `none` records and trusts. `screens` overrides the level."""

    level: Literal["none", "submitted", "step", "client", "shadow", "evidence", "spectral"] = "submitted"
    screens: tuple[str, ...] | None = None
    """Screens by name in this order, and `gate` for the gate on the aggregate; None = those of the level."""
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Parameters of single screens: `[defence.params.norm]` with `clip = 1.3`; errors name the known ones."""
    faithful: bool = False
    """The paper's level as its published code runs it, holes included (federated/published.py): for comparison only,
    and marked as such in every record and report."""
    monitor: tuple[str, ...] = ()
    probe: str | None = None
    """Probe file for step, client, shadow, evidence; None = one for this model and data, fitted once and cached."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    score_rounds: Count | None = None
    """Paper: step and client score the first 20 rounds only; None = every round."""
    min_mean_weight: Share = 0.2
    """Paper: below it the round is skipped. Read with the paper's screens; with the gate on the aggregate it is
    ignored, for a malicious majority at weight 0 must not stop the training."""
    norm_clip: Annotated[float, Field(ge=1.0)] = 1.15
    norm_refuse: Annotated[float, Field(ge=1.0)] = 1.5
    neighbours: Count = 5
    claims: ClaimsConfig = ClaimsConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    canary: CanaryConfig = CanaryConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()


class AggregationConfig(Frozen):
    """`params` go to the aggregator as they are, e.g. `{ f = 2 }` or `{ f = "estimate" }`."""

    name: str = "mean"
    params: dict[str, float | int | str] = Field(default_factory=dict)
    average: Literal["factors", "product"] = "factors"
    """`factors`: A and B are merged each by itself, by `name`. `product`: the mean of the products BA, cut back to the
    adapter's rank (the ledger says what was cut); only a mean can do that, and it is exact with server lr 1."""
    pre: tuple[Literal["nnm", "bucketing"], ...] = ()
    """Steps that mix the updates before the aggregator sees them, in this order."""
    pre_params: dict[str, dict[str, float | int | str]] = Field(default_factory=dict)
    """By pre-step, e.g. `{ nnm = { f = 2 } }`."""
    quorum: Literal["skip", "shrink"] = "skip"
    """What a rule does that bears `f` attackers only among more participants than a round has left: `skip` leaves the
    round out, `shrink` bears as many as its bound allows there, down to 0, and the ledger says so. With `shrink` who keeps
    others from counting chooses how few attackers are borne."""
    use_counts: bool = False
    """Multiply weights by the clients' claimed row counts, capped at `max_count`. A count is a claim: off by default."""
    max_count: Count = 1000

    @model_validator(mode="after")
    def _only_a_mean_of_products(self) -> Self:
        if self.average == "product" and (self.name != "mean" or self.pre):
            raise ValueError("average = product goes with name = mean and no pre-steps: other rules read the factors")
        return self


class ServerConfig(Frozen):
    """What the server does with the aggregate: fedavg, fedavgm, fedadagrad, fedyogi, fedadam (federated/server_opt.py)."""

    opt: str = "fedavg"
    lr: Positive | None = None
    """None: 1 for fedavg and fedavgm, 1e-3 for the adaptive ones (paper: 1e-3)."""
    params: dict[str, float] = Field(default_factory=dict)
    """The optimiser's further knobs, e.g. `{ tau = 1e-3, beta1 = 0.9, beta2 = 0.99 }` (the paper's values, the defaults
    too) or `{ momentum = 0.9 }`."""


class Experiment(Root):
    """One federated fine-tuning, attacked and defended as it says."""

    wing: Literal["federated"] = "federated"
    workers: Count | None = None
    """Processes that train clients; None = one per core. Never changes a result."""
    keep_updates: bool = True
    """Keep every accepted update under the run's `updates/`, so that `assay excise` can remove a client afterwards.
    Costs rounds x clients x adapter (1.8 MB for SmolLM2-135M at r 8, 14 MB for Llama-3.1-8B)."""
    keep_updates_gb: Positive = 10.0
    """Most that `keep_updates` may need, in 10^9 bytes; a run that could need more does not start."""
    model: ModelConfig = ModelConfig()
    lora: LoraSettings = LoraSettings()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    attack: AttackConfig = AttackConfig()
    defence: DefenceConfig = DefenceConfig()
    aggregation: AggregationConfig = AggregationConfig()
    server: ServerConfig = ServerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    finish: FinishConfig = FinishConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.defence.level == "submitted" and self.defence.norm_refuse < self.defence.norm_clip:
            raise ValueError("defence.norm_refuse must not be below defence.norm_clip")
        if self.training.scaffold and self.training.optimizer != "sgd":
            raise ValueError(
                "training.scaffold needs training.optimizer = 'sgd' (and a rate for it): a control variate is a mean "
                "gradient, which the steps of AdamW do not show"
            )
        if self.lora.freeze_a and self.aggregation.average == "product":
            raise ValueError(
                "lora.freeze_a makes the average of factors exact already; leave aggregation.average alone"
            )
        if self.defence.screens == ():
            raise ValueError("defence.screens = [] is no defence; for one that only records use defence.level = none")
        if self.clients.stranger_count:
            known = {*self.data.benign, *self.data.refusals, self.data.malicious, *self.data.operator.named()}
            if not self.data.strangers:
                raise ValueError("clients.strangers needs data.strangers: name a source for them")
            if shared := sorted(known & set(self.data.strangers)):
                raise ValueError(f"data.strangers: {shared[0]} feeds the rehearsal too; name a source of its own")
        if "safe_lora" in self.finish.steps and not (self.model.align or self.finish.safe_lora.unaligned):
            raise ValueError(
                "finish.safe_lora needs the model before its alignment: name it in finish.safe_lora.unaligned"
            )
        if "prune" in self.finish.steps and self.finish.prune.directions >= self.lora.r:
            raise ValueError("finish.prune.directions must be less than lora.r")
        if self.clients.examples < self.training.batch_size:
            raise ValueError(
                f"clients.examples = {self.clients.examples} is less than one batch of {self.training.batch_size}"
            )
        return self
