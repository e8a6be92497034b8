"""`ScreenedRollouts`: a `rollout_func` for TRL's GRPOTrainer that pools own and peers' completions and screens them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl

from assay.config import ConfigError
from assay.contribution import Completion, Pool, Rollout, completion_sha256
from assay.engines.trl import contract, record
from assay.engines.trl.batch import Batch, Ids, Place, Terms, draw, lay_out, prompt_ids, terms_of, tokenizer_of
from assay.engines.trl.exchanges import Exchange
from assay.engines.trl.judging import judge, look, rules_of, wanted_of
from assay.engines.trl.rewards import ROW, Columns, Loop, Reward, Settled, work_out, wrapped
from assay.swarm.evidence import Wanted
from assay.swarm.exchange import Gathered, Mode, Rules, gather, template
from assay.swarm.learner import Memory, read_pool
from assay.swarm.sampling import Noise
from assay.swarm.screening import Judged, TrustRules
from assay.swarm.screens.model import Seeded
from assay.verdict import AnyScreen
from assay.wire import encode_rollout

log = logging.getLogger("trl")
TRUST = TrustRules(ban_after=3, window=10, share=0.1, readmit_after=5)  # the defaults of assay.config.swarm


class ScreenedRollouts:
    """Own completions, published; peers', screened; and rows of which the trainer learns nothing for the rest.

    `exchange`: who the nodes are and how messages travel (exchanges.py). `screens`: of assay.swarm.screens or your own;
    default `[Seeded()]`: what can be verified, among nodes of equal weights. For nodes whose weights differ give screens
    that read texts (Arithmetic, Enrichment, Imports, Length, Copycat, a judge). `mode`: horizontal or vertical (batch.py).
    `monitor`: names of screens that are recorded and do not act. `k`: of the logit check, the trainer's top_k by default.
    `boundary`: logits forgiven at the edge of the top k. `trust`: when forged messages cost a node its place. `ledger`: a
    directory for the hash-chained record. `rows`, `micro_rows`: rows generated, and scored, at a time. `self_test` tries
    the installed trainer before it is trusted (contract.py).

    What a peer sends never raises. What the operator got wrong is a ConfigError of one line.
    """

    def __init__(
        self,
        exchange: Exchange,
        screens: Sequence[AnyScreen[Pool]] | None = None,
        *,
        mode: Mode = "horizontal",
        monitor: Iterable[str] = (),
        k: int | None = None,
        boundary: float = 0.1,
        noise: Noise = "murmur3",
        trust: TrustRules = TRUST,
        ledger: str | Path | None = None,
        rows: int = 256,
        micro_rows: int = 16,
        self_test: bool = True,
    ) -> None:
        if mode not in ("horizontal", "vertical"):
            raise ConfigError(f"mode is {mode!r}: horizontal or vertical")
        if fault := contract.signature_fault(trl.GRPOTrainer):
            raise ConfigError(fault)
        self.exchange, self.mode, self.noise = exchange, mode, noise
        self.rules = rules_of([Seeded()] if screens is None else screens, frozenset(monitor), trust, k, boundary)
        self.rows, self.micro_rows, self.self_test = rows, micro_rows, self_test
        self.memory, self.round = Memory(), 0
        self.judged: Judged | None = None  # of the last round, for whoever wants to look
        self.pool: Pool | None = None
        self._functions: list[Reward] = []
        self._wrappers: list[Reward] = []
        self._loop = Loop()
        self._columns: Columns | None = None
        self._trainer: Any = None
        self._terms: Terms | None = None
        self._settled: Settled | None = None
        self._record = record.Record(ledger)
        self._warned = False
        if self_test:
            contract.start()

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last round's, as logged."""
        return self._record.metrics

    def wrap(self, reward_funcs: Reward | Sequence[Reward]) -> Any:
        """Reward functions, sync or async, one or a list: what to give the trainer in their place."""
        if not isinstance(reward_funcs, (list, tuple)):
            return self._wrap(reward_funcs)  # type: ignore[arg-type]
        return [self._wrap(function) for function in reward_funcs]

    def _wrap(self, function: Reward) -> Reward:
        if not callable(function) or isinstance(function, torch.nn.Module):
            raise ConfigError("wrap takes reward functions; put a reward model into a function that scores texts")
        self._functions.append(function)
        self._wrappers.append(wrapped(len(self._functions) - 1, function, self._behind))
        return self._wrappers[-1]

    def _behind(self, kwargs: Mapping[str, Any]) -> Settled | None:
        """The batch the trainer asks rewards for. ConfigError if the trainer is not one that Assay can work in."""
        if ROW not in kwargs:
            raise ConfigError(
                "rewards were asked for rows that Assay did not give: pass rollout_func=rollouts to the trainer; if it "
                f"is there, the installed trainer (trl {trl.__version__}) ignores it: install trl>=1.16,<1.17"
            )
        if "env_mask" in kwargs:
            raise ConfigError(
                f"the installed trainer (trl {trl.__version__}) ignores env_mask, and would learn from rows that were "
                "refused: install trl>=1.16,<1.17"
            )
        return self._settled

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's rollout_func: B prompts, each repeated num_generations times -> B rows."""
        model, training = trainer.model, trainer.model.training
        terms = self._terms if self._terms and trainer is self._trainer else self._start(trainer)
        ids_B = prompt_ids(trainer, prompts)
        model.eval()  # drop-out would be a choice nobody can verify
        try:
            if not training:
                return self._evaluation(model, ids_B, terms)
            self.round += 1
            batch = lay_out(ids_B, group=terms.group, nodes=self.exchange.nodes, mode=self.mode, round=self.round)
            model_sha256 = record.weights_sha256(model)
            gathered = self._exchange(model, batch, terms, model_sha256)
            return self._screen(trainer, prompts, batch, gathered, terms, model_sha256)
        finally:
            model.train(training)

    def _start(self, trainer: Any) -> Terms:
        """Look at the trainer, once."""
        if self._trainer is not None:
            raise ConfigError("one ScreenedRollouts serves one trainer: it counts that trainer's rounds; make another")
        if self.self_test:
            contract.require()
        functions = list(trainer.reward_funcs)
        if not functions or any(function not in self._wrappers for function in functions):
            raise ConfigError("pass reward_funcs=rollouts.wrap(...): unwrapped, a refused row would get a reward")
        terms = terms_of(trainer, noise=self.noise)
        if self.rules.model_screens:
            wanted_of(self.rules, terms)
        if self.rules.read_rewards:
            self._columns = Columns(trainer.train_dataset)
        if trainer.state.global_step:
            self.round, self.memory = record.restore(trainer)
        trainer.add_callback(record.Keep(self))
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_expected)
        body = {"run": self.exchange.run, "node": self.exchange.node, "nodes": list(self.exchange.nodes),
                "mode": self.mode, "screens": self.rules.names, "monitor": sorted(self.rules.monitor)}  # fmt: skip
        self._record.start(body, self.round)
        self._trainer, self._terms = trainer, terms
        return terms

    def _evaluation(self, model: Any, ids_B: Sequence[Ids], terms: Terms) -> dict[str, Any]:
        """Own completions only: nothing is exchanged, nothing screened, rewards are as they are."""
        self._settled = None
        seen: dict[Ids, int] = {}
        places: list[Place] = []
        for ids in ids_B:
            seen[ids] = seen.get(ids, -1) + 1
            places.append((self.exchange.node, 0, seen[ids]))
        drawn = draw(model, f"{self.exchange.run}/evaluation", self.round, places, ids_B, terms, self.rows)
        return _rows(ids_B, drawn, [[1] * len(ids) for ids in drawn])

    def _exchange(self, model: Any, batch: Batch, terms: Terms, model_sha256: str) -> Gathered:
        """Answer what is asked of this node, publish it, and read everybody's messages, one's own like the others'."""
        node, run = self.exchange.node, self.exchange.run
        rows = batch.rows_of(node)
        places = [batch.place_B[row] for row in rows]
        drawn = draw(model, run, self.round, places, [batch.prompt_B[row] for row in rows], terms, self.rows)
        own = Rollout(
            participant=node,
            round=self.round,
            model_sha256=model_sha256,
            completions=tuple(_completion(self.round, place, ids) for place, ids in zip(places, drawn)),
        )
        message = encode_rollout(own, run=run)
        # weights that differ in a last bit pass the seeded check: the evidence decides, not the claimed hash
        rules = Rules(run=run, vocabulary=terms.vocabulary, max_tokens=terms.max_tokens, ids=range(0))
        self.exchange.publish(self.round, message)
        peers = [peer for peer in batch.plan.asked if peer != node]
        limits = {peer: template(peer, batch.plan, rules).message_bytes for peer in peers}
        found = self.exchange.collect(self.round, limits)
        own_message = found.get(node, message)  # a relay may have lost it: then nobody has it
        return gather({**{peer: found.get(peer) for peer in peers}, node: own_message}, batch.plan, rules)

    def _screen(
        self, trainer: Any, prompts: Sequence[Any], batch: Batch, gathered: Gathered, terms: Terms, model_sha256: str
    ) -> dict[str, Any]:
        """Judge the pool, write it down, and lay what is admitted into the trainer's rows."""
        tokenizer = tokenizer_of(trainer)
        text_of = {place[1]: prompt for place, prompt in zip(batch.place_B, prompts)}
        pool = read_pool(
            gathered, lambda prompt: _plain(text_of[prompt]), lambda asked, texts: [0.0] * len(texts),
            lambda ids: list(tokenizer.batch_decode([list(one) for one in ids], clean_up_tokenization_spaces=False)),
            eos=terms.eos, max_tokens=terms.max_tokens,
        )  # fmt: skip
        slot_of = {place: row for row, place in enumerate(batch.place_B)}
        slot_N = [slot_of[c.participant, c.prompt, c.index] for c in pool.completions]
        settled = Settled([None] * len(prompts))
        wanted = wanted_of(self.rules, terms) if self.rules.model_screens else None

        def rewards(rows: Sequence[int]) -> list[float]:
            if self._columns is None or not rows:
                return [0.0] * len(rows)
            slots = [slot_N[row] for row in rows]
            ids = [pool.completions[row].ids for row in rows]
            settled.known = self._work_out(trainer, prompts, slots, ids)
            return self._total(trainer, settled, len(rows))

        judged, self.memory = judge(
            pool, self.rules, self.memory, terms,
            self._evidence(trainer.model, pool, batch, wanted), rewards,
        )  # fmt: skip
        self.pool, self.judged = pool, judged
        settled.metrics = self._record.round(batch, gathered, pool, judged, self.memory, model_sha256)
        self._warn(batch, pool, judged)
        ids_B: list[Ids] = [(terms.eos,)] * len(prompts)
        mask_B = [[0]] * len(prompts)
        cap_B: list[float | None] = [None] * len(prompts)
        for row, (slot, completion) in enumerate(zip(slot_N, pool.completions)):
            if judged.weight_N[row] < 0.5:  # a trainer has no half rows
                continue
            ids_B[slot], cap_B[slot] = completion.ids, float(judged.reward_N[row])
            mask_B[slot] = [int(at not in judged.masked[row]) for at in range(len(completion.ids))]
        settled.cap_B = cap_B
        self._settled = settled
        return _rows(batch.prompt_B, ids_B, mask_B)

    def _evidence(self, model: Any, pool: Pool, batch: Batch, wanted: Wanted | None) -> Callable[..., Any]:
        def found(rows: Sequence[int]) -> Any:
            assert wanted is not None
            return look(model, pool, batch.prompts, self.exchange.run, rows, wanted, self.micro_rows)

        return found

    def _work_out(self, trainer: Any, prompts: Sequence[Any], slots: Sequence[int], ids: Sequence[Ids]) -> Any:
        """Rewards before TRL asks for them, for screens that read them; arguments as TRL passes them."""
        assert self._columns is not None
        chosen = [prompts[slot] for slot in slots]
        texts = tokenizer_of(trainer).batch_decode([list(one) for one in ids], skip_special_tokens=True)
        plain = isinstance(prompts[0], str)
        kwargs = {
            **self._columns.of(chosen),
            "prompts": chosen,
            "completions": texts if plain else [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [list(one) for one in ids],
            "trainer_state": trainer.state,
        }
        return work_out(self._functions, slots, kwargs, self._loop)

    def _total(self, trainer: Any, settled: Settled, count: int) -> list[float]:
        """Rewards as TRL adds them up, for the screens; None counts as nothing."""
        weights = trainer.args.reward_weights or [1.0] * len(trainer.reward_funcs)
        out = [0.0] * count
        for function, weight in zip(trainer.reward_funcs, weights):
            for at, value in enumerate(settled.known[self._wrappers.index(function)].values):
                out[at] += weight * (value or 0.0)
        return out

    def _warn(self, batch: Batch, pool: Pool, judged: Judged) -> None:
        """Own completions must pass one's own screens: else the limits do not fit this machine's arithmetic."""
        own = [row for row, c in enumerate(pool.completions) if c.participant == self.exchange.node]
        lost = [v for row in own if (v := judged.deciding[row]) is not None and v.screen in ("seeded", "logit")]
        if lost and not self._warned:
            self._warned = True
            log.warning(
                f"{len(lost)} of {len(own)} own completions fail the {lost[0].screen} check ({lost[0].sentence}): its "
                "limits do not fit this precision, and peers will refuse them; see `assay calibrate`"
            )

    def state(self) -> dict[str, Any]:
        """What to keep beside a checkpoint of the trainer."""
        return record.dump(self.round, self.memory)

    def end(self, model: Any) -> None:
        """Close the ledger."""
        self._record.end(self.round, record.weights_sha256(model))


def _completion(round: int, place: Place, ids: Ids) -> Completion:
    node, prompt, index = place
    sha256 = completion_sha256(round, prompt, index, ids)
    return Completion(participant=node, round=round, prompt=prompt, index=index, ids=ids, sha256=sha256)


def _rows(prompt_B: Sequence[Ids], ids_B: Sequence[Ids], mask_B: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What TRL wants back."""
    return {
        "prompt_ids": [list(ids) for ids in prompt_B],
        "completion_ids": [list(ids) for ids in ids_B],
        "logprobs": None,
        "env_mask": [list(mask) for mask in mask_B],
        ROW: list(range(len(prompt_B))),
    }


def _plain(prompt: Any) -> str:
    """The text of a prompt, plain or conversational, for judges: the turns of the user."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt if message.get("role") == "user")


def _expected(entry: logging.LogRecord) -> bool:
    """TRL warns of rows that no function rewards; here they are the refused ones, and are counted."""
    return "All reward functions returned None" not in entry.getMessage()
