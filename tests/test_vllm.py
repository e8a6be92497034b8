"""vLLM nodes: the test vectors of the noise, what a request must hold, and the logits processor on a real model.

vLLM is not installed where these run: what it hands to a processor is made after its documentation (vllm_batches.py),
and what comes back is judged by Assay's own sampler and verifier. The last test runs where vLLM and a GPU are.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from assay import models
from assay.config import ConfigError
from assay.contribution import Pool, TokenEvidence
from assay.data import render_prompt
from assay.engines.vllm import Asked, body, generate, parameters
from assay.engines.vllm.draw import Batch, Slots, choose
from assay.engines.vllm.engine import problem
from assay.engines.vllm.requests import ABSENT, NEUTRAL, check
from assay.swarm import philox, sampling
from assay.swarm.calibrate import verify
from assay.swarm.exchange import Rules, gather
from assay.swarm.rollout import Item
from assay.swarm.rollout import generate as drawn_by_assay
from assay.swarm.sampling import Sampler, candidates, gumbel, margin, sample, seed_of
from assay.swarm.screens.model import Seeded
from swarm_pools import completion
from vllm_batches import requests, run_v1, run_v2

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "VLLM.md"
VECTORS = json.loads((ROOT / "docs" / "noise-vectors.json").read_text(encoding="utf-8"))
LIMIT = 14


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# --- test vectors -----------------------------------------------------------------------------------------------------


def test_the_vectors_are_what_their_script_makes_and_it_does_without_assay() -> None:
    script = ROOT / "scripts" / "noise_vectors.py"
    done = subprocess.run([sys.executable, "-I", script, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"import assay", "from assay", "import torch", "import numpy"} & set(script.read_text().splitlines())
    assert "import assay" not in script.read_text().replace("It imports nothing of Assay's", "")


def test_assay_has_the_vectors_seeds() -> None:
    for one in VECTORS["seeds"]:
        assert seed_of(*one["fields"]) == one["seed"]


@pytest.mark.parametrize("noise", ["murmur3", "philox"])
def test_assay_has_the_vectors_noise(noise: Any) -> None:
    places = VECTORS["noise"]
    seed_B, position_B, token_B = (ints([p[name] for p in places]) for name in ("seed", "position", "token"))
    found = [p[noise] for p in places]
    if noise == "philox":
        assert philox.words(seed_B, position_B, token_B[:, None])[:, 0].tolist() == [f["word"] for f in found]
    words = ints([f["word"] for f in found])
    assert sampling._uniform(words).tolist() == [f["uniform"] for f in found]
    assert gumbel(seed_B, position_B, token_B[:, None], noise)[:, 0].tolist() == [f["gumbel"] for f in found]
    edges = VECTORS["edges"]
    assert sampling._uniform(ints([e["word"] for e in edges])).tolist() == [e["uniform"] for e in edges]
    assert sampling._noise(ints([e["word"] for e in edges])).tolist() == [e["gumbel"] for e in edges]


@pytest.mark.parametrize("case", VECTORS["decisions"], ids=lambda c: f"{c['noise']}-{c['position']}")
def test_assay_and_its_processor_decide_as_the_vectors(case: dict[str, Any]) -> None:
    sampler = Sampler(**{k: case[k] for k in ("temperature", "top_k", "top_p", "noise")})
    logits, seed, position = torch.tensor([case["logits"]]), ints([case["seed"]]), ints([case["position"]])
    token_BK, logit_BK = candidates(logits, sampler)
    kept = sorted(int(t) for t, value in zip(token_BK[0], logit_BK[0]) if value > -math.inf)
    assert kept == case["candidates"]
    assert gumbel(seed, position, ints(kept)[None], sampler.noise)[0].tolist() == case["gumbel"]
    assert sample(logits, seed, position, sampler).tolist() == [case["token"]]
    for token, gap in zip(case["candidates"], case["margins"]):
        assert margin(logits, ints([token]), seed, position, sampler, 0.0).gap_B.item() == pytest.approx(gap, abs=1e-6)
    processed = torch.stack([torch.arange(12.0), logits[0]])
    choose(processed, [1], [Asked(case["seed"], sampler)], position)
    assert processed.argmax(-1).tolist() == [11, case["token"]]
    assert processed[0].tolist() == list(range(12))


def test_the_position_is_that_of_the_last_input_token() -> None:
    told = VECTORS["sequence"]
    logits, seed = torch.tensor([told["logits"]]), ints([told["seed"]])
    assert told["positions"] == [told["prompt_tokens"] + step - 1 for step in range(3)]
    drawn = [sample(logits, seed, ints([at]), Sampler(top_k=0)).item() for at in told["positions"]]
    assert drawn == told["tokens"]


# --- what a request must hold -----------------------------------------------------------------------------------------


def test_a_request_to_vllms_sampler_is_all_that_the_verifier_assumes() -> None:
    sampler = Sampler(temperature=0.7, top_k=20, top_p=0.9)
    found = parameters(5, sampler, max_tokens=9, eos=2, route="native")
    assert {k: found[k] for k in ("seed", "temperature", "top_k", "top_p")} == {
        "seed": 5, "temperature": 0.7, "top_k": 20, "top_p": 0.9,
    }  # fmt: skip
    assert found.items() >= NEUTRAL.items()
    assert (found["max_tokens"], found["stop_token_ids"], found["ignore_eos"]) == (9, [2], True)
    sent = body((1, 2), 5, sampler, model="m", max_tokens=9, eos=2, route="native")
    assert (sent["prompt"], sent["return_token_ids"], sent["seed"]) == ([1, 2], True, 5)
    assert json.loads(json.dumps(sent)) == sent


def test_a_request_to_the_processor_says_everything_itself_and_vllm_takes_the_arg_max() -> None:
    asked = Asked(2**63 - 1, Sampler(temperature=3.5, top_k=0, top_p=0.25, noise="philox"))
    found = parameters(asked.seed, asked.sampler, max_tokens=9, eos=2, route="processor")
    assert found["temperature"] == 0
    assert "seed" not in found
    assert Asked.of(found["extra_args"]) == asked
    sent = body((1,), asked.seed, asked.sampler, model="m", max_tokens=9, eos=2, route="processor")
    assert Asked.of(json.loads(json.dumps(sent))["vllm_xargs"]) == asked
    assert Asked.of(None) is None
    assert Asked.of({"other": 1}) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"assay_seed": None}, "assay_seed"),
        ({"assay_seed": 2**63}, "below"),
        ({"assay_seed": -1}, "at least 0"),
        ({"assay_seed": 1.0}, "whole number"),
        ({"assay_seed": True}, "whole number"),
        ({"assay_seed": "7"}, "whole number"),
        ({"assay_temperature": 0.0}, "temperature"),
        ({"assay_temperature": "1"}, "numbers"),
        ({"assay_top_k": -1}, "top_k"),
        ({"assay_top_p": 0.0}, "top_p"),
        ({"assay_noise": "white"}, "noise"),
        ({"assay_topk": 5}, "no more and no less"),
    ],
    ids=str,
)
def test_arguments_that_would_draw_something_else_are_refused(change: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {**Asked(7, Sampler()).arguments(), **change}
    if change.get("assay_seed", 0) is None:
        del given["assay_seed"]
    with pytest.raises(ValueError, match=told):
        Asked.of(given)


def params(**fields: Any) -> SimpleNamespace:
    """The fields of a SamplingParams that `check` reads."""
    neutral = {**NEUTRAL, **dict.fromkeys(ABSENT), "temperature": 0.0}
    return SimpleNamespace(**{**neutral, "extra_args": dict(Asked(7, Sampler()).arguments()), **fields})


def test_vllm_is_told_what_it_may_not_do_beside_a_seed() -> None:
    check(params())
    check(params(ignore_eos=False))
    check(params(extra_args=None, temperature=1.0, n=4, stop=["x"]))  # none of our business
    for fields in (
        {"temperature": 1.0}, {"n": 2}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 1},
        {"min_tokens": 1}, *({name: ["x"]} for name in ABSENT),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(fields))):
            check(params(**fields))


def test_a_route_that_cannot_draw_it_says_so() -> None:
    for sampler in (Sampler(noise="philox"), Sampler(temperature=2.5), Sampler(temperature=0.001)):
        with pytest.raises(ConfigError, match="take route processor"):
            parameters(1, sampler, max_tokens=1, eos=0, route="native")
        parameters(1, sampler, max_tokens=1, eos=0, route="processor")
    with pytest.raises(ConfigError, match="seed is -1"):  # vLLM reads -1 as none
        parameters(-1, Sampler(), max_tokens=1, eos=0, route="native")
    with pytest.raises(ConfigError, match="native or processor"):
        parameters(1, Sampler(), max_tokens=1, eos=0, route="other")  # type: ignore[arg-type]


def engine(**changes: Any) -> SimpleNamespace:
    """The fields of a VllmConfig that `problem` reads."""
    model = {"max_model_len": 512, "logits_processors": ["assay"], "use_fp64_gumbel": False}
    model |= {k: v for k, v in changes.items() if k in model}
    rest = {k: v for k, v in changes.items() if k not in model}
    return SimpleNamespace(model_config=SimpleNamespace(**model), **{"speculative_config": None, "use_v2_model_runner": True, **rest})  # fmt: skip


def test_an_engine_that_would_draw_other_tokens_is_refused() -> None:
    for route in ("native", "processor"):
        assert problem(engine(), 512, route, "0.33.0") == ""
        assert "speculative" in problem(engine(speculative_config=object()), 512, route, "0.33.0")
        assert "max_model_len is 512" in problem(engine(), 513, route, "0.33.0")
    assert problem(engine(use_v2_model_runner=False), 9, "processor", "0.11.0") == ""
    assert "logits_processors" in problem(engine(logits_processors=None), 9, "processor", "0.33.0")
    assert "model runner V2" in problem(engine(use_v2_model_runner=False), 9, "native", "0.33.0")
    assert "use_fp64_gumbel" in problem(engine(use_fp64_gumbel=True), 9, "native", "0.33.0")
    for release in ("0.30.0", "0.34.0", "unknown"):
        assert "take route processor" in problem(engine(), 9, "native", release)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_so() -> None:
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        generate(None, [], Sampler(), max_tokens=1, eos=0)


# --- the processor on a real model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.load("tiny", "float32")


@pytest.fixture(scope="module")
def items(tiny: Any) -> list[Item]:
    questions = ("Tom has 2 apples and buys 2 more.", "What is rain?", "Print 3 times 4 plus 5, then say it in words.")
    prompts = [
        tuple(tiny.tokenizer(render_prompt(q, "chatml"), add_special_tokens=False)["input_ids"]) for q in questions
    ]
    return [Item(prompts[i % 3], seed_of("vllm", 0, "n", i % 3, i)) for i in range(18)]


SAMPLERS = (Sampler(top_k=20), Sampler(top_k=0, temperature=0.8), Sampler(top_k=12, top_p=0.9, noise="philox"))
RUNS = {"v1": (run_v1, Batch), "v2": (run_v2, Slots)}


@pytest.mark.parametrize("runner", RUNS)
def test_the_processor_draws_what_assay_draws_and_the_verifier_accepts_it(
    tiny: Any, items: list[Item], runner: str
) -> None:
    """Eighteen requests through a batch of five, with three samplers in it at once and every fourth none of Assay's."""
    run, make = RUNS[runner]
    eos = tiny.tokenizer.eos_token_id
    sampler_of = [None if n % 4 == 3 else SAMPLERS[n % 3] for n in range(len(items))]

    def arguments(n: int) -> dict[str, Any] | None:
        sampler = sampler_of[n]
        return None if sampler is None else dict(Asked(items[n].seed, sampler).arguments())

    made = run(tiny.model, make(), requests(items, arguments), max_tokens=LIMIT, eos=eos)
    for sampler in SAMPLERS:
        mine = [n for n, one in enumerate(sampler_of) if one == sampler]
        own = [items[n] for n in mine]
        assert [made[n] for n in mine] == drawn_by_assay(tiny.model, own, sampler, max_tokens=LIMIT, eos=eos)
        pool, changed = judged(tiny, own, [made[n] for n in mine], sampler, eos), [list(made[n]) for n in mine]
        assert {v.weight for v in Seeded().screen(pool, {})[0]} == {1.0}
        changed[0][2] = (changed[0][2] + 1) % tiny.model.config.vocab_size
        verdicts = Seeded(whole_groups=False).screen(judged(tiny, own, changed, sampler, eos), {})[0]
        assert [v.weight for v in verdicts] == [0.0, *[1.0] * (len(mine) - 1)]
    others = [made[n] for n, one in enumerate(sampler_of) if one is None]
    assert others  # greedy ones: vllm_batches holds them against the bare model's arg max


def judged(tiny: Any, items: list[Item], made: Any, sampler: Sampler, eos: int) -> Pool:
    """A pool of one node's completions, with margins from the verifier's own teacher-forced pass."""
    gaps = verify(tiny.model, items, [tuple(ids) for ids in made], sampler, 0.1)
    rows = [completion("n", 0, n, ids) for n, ids in enumerate(made)]
    return Pool(
        index=0,
        completions=tuple(rows),
        questions=("",) * len(rows),
        texts=("",) * len(rows),
        rewards=(0.0,) * len(rows),
        ended=tuple(ids[-1] == eos for ids in made),
        readable=(True,) * len(rows),
        asked={"n": {0: len(rows)}},
        max_tokens=LIMIT,
        evidence=TokenEvidence(logprob=tuple(np.zeros(len(g), np.float32) for g in gaps), margin=tuple(gaps)),
    )


def test_a_batch_without_assays_requests_is_left_alone() -> None:
    logits = torch.randn(3, 7)
    batch, slots = Batch(), Slots()
    batch.update(None)
    batch.update(SimpleNamespace(removed=[], added=[(0, params(extra_args={"x": 1}), [1], [])], moved=[]))
    assert not slots.add(0, params(extra_args=None))
    assert torch.equal(batch.apply(logits.clone()), logits)
    assert torch.equal(slots.apply(logits.clone(), ints([0, 1, 2]), ints([0, 0, 0])), logits)


def test_a_slot_that_is_given_again_forgets_who_was_there() -> None:
    slots, logits = Slots(), torch.randn(1, 7)
    assert slots.add(3, params())
    assert not torch.equal(slots.apply(logits.clone(), ints([3]), ints([0])), logits)
    assert not slots.add(3, params(extra_args=None))
    assert torch.equal(slots.apply(logits.clone(), ints([3]), ints([0])), logits)


def test_embeddings_for_a_prompt_have_no_position() -> None:
    with pytest.raises(ValueError, match="token ids"):
        Batch().update(SimpleNamespace(removed=[], added=[(0, params(), None, [])], moved=[]))


def test_the_round_of_the_docs_is_a_message_that_a_receiver_takes(tiny: Any, items: list[Item]) -> None:
    """The page's first block as it stands, but for who draws: `generate` of Transformers has the same arguments."""
    (text,) = re.findall(r"^```python\n(from assay.contribution.*?)^```", PAGE.read_text(), re.S | re.M)
    text = text.replace("from assay.engines.vllm import generate", "from assay.swarm.rollout import generate")
    weights, eos = "0" * 64, tiny.tokenizer.eos_token_id
    given = {
        "run": "r",
        "round": 3,
        "nodes": ["a", "b"],
        "node": "b",
        "weights": weights,
        "eos": eos,
        "llm": tiny.model,
    }
    found: dict[str, Any] = {**given, "prompt_ids": lambda prompt: items[prompt % 3].prompt}
    exec(compile(text, "docs/VLLM.md", "exec"), found)
    plan, vocabulary = found["plan"], tiny.model.config.vocab_size
    rules = Rules(run="r", vocabulary=vocabulary, max_tokens=64, ids=range(1000), model_sha256=weights)
    gathered = gather({"b": found["message"]}, plan, rules)
    assert [c.ids for c in gathered.completions] == [c.ids for c in sorted(found["completions"], key=lambda c: (c.prompt, c.index))]  # fmt: skip
    assert [r.participant for r in gathered.refused] == ["a"]
    for gap in verify(tiny.model, found["items"], found["drawn"], Sampler(top_k=50), 0.1):
        assert gap.max() < 0.05


# --- where vLLM is ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and a CUDA device"
)
@pytest.mark.parametrize("route", ["native", "processor"])
def test_vllm_itself_draws_what_the_verifier_accepts(tiny: Any, items: list[Item], route: Any, tmp_path: Path) -> None:
    """Never run by who wrote it. In float32; the limits are those of unequal engines, far under a foreign token's gap."""
    from vllm import LLM

    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    llm = LLM(
        str(tmp_path), dtype="float32", max_model_len=256, enforce_eager=True, gpu_memory_utilization=0.3,
        generation_config="vllm", logits_processors=[_processor()] if route == "processor" else None,
    )  # fmt: skip
    eos, sampler = tiny.tokenizer.eos_token_id, Sampler(top_k=20)
    many = [Item(item.prompt, seed_of("gpu", n, "n", 0, i)) for n in range(8) for i, item in enumerate(items)]
    made = generate(llm, many, sampler, max_tokens=64, eos=eos, route=route)
    gaps = verify(tiny.model, many, made, sampler, 0.1)
    assert all(ids[-1] == eos or len(ids) == 64 for ids in made)
    assert max(float(g.max()) for g in gaps) < 0.1
    assert float(np.mean([(g > 1e-3).mean() for g in gaps])) < 0.01
    foreign = [Item(item.prompt, item.seed ^ 1) for item in many]
    assert np.median([float(g.max()) for g in verify(tiny.model, foreign, made, sampler, 0.1)]) > 1.0


def _processor() -> str:
    """Of the model runner that this vLLM takes by itself: V2 has an interface of its own."""
    v2 = importlib.util.find_spec("vllm.v1.worker.gpu.sample.logits_processor") is not None
    return f"assay.engines.vllm.processor_{'v2' if v2 else 'v1'}:SeededDraw"
