"""Make `docs/noise-vectors.json`: the seeded draw in numbers, for whoever writes a node in another language.

    python scripts/noise_vectors.py            # writes the file
    python scripts/noise_vectors.py --check    # compares, and says what differs

Restated in plain Python from the description in docs/VLLM.md. It imports nothing of Assay's and no tensor library: what
Assay draws is held against this, not the other way round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import Any

WORD = 2**32
FILE = Path(__file__).resolve().parents[1] / "docs" / "noise-vectors.json"
EXTREMES = (
    # seed, position, token
    (0, 0, 0), (0, 0, 49151), (1, 7, 1), (2**32, 31, 2), (2**63 - 1, 2**31, 3), (2**63 - 1, 2**32 - 1, 1023),
    (6636261888586188041, 123, 151935), (0x0123456789ABCDEF, 0x1234, 0x5678),
)  # fmt: skip
SEEDS = (
    ("run", 0, "node-a", 3, 0),
    ("run", 1, "node-a", 3, 0),
    ("a", 11, "b", 1, 1),
    ("a1", 1, "b", 1, 1),
    ("ä", 2, "ß", 5, 7),
)


def float32(value: float) -> float:
    """The nearest single-precision number (ties to even)."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def seed_of(run: str, round: int, node: str, prompt: int, index: int) -> int:
    digest = hashlib.sha256(b"assay.seed.1" + json.dumps([run, round, node, prompt, index]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "little") // 2


def murmur3(seed: int, position: int, token: int) -> int:
    """MurmurHash3_x86_32, hash seed 0, of the sixteen bytes seed (8), position (4), token (4), little-endian."""
    state = 0
    for word in struct.unpack("<4I", struct.pack("<QII", seed % 2**64, position % WORD, token % WORD)):
        word = word * 0xCC9E2D51 % WORD
        word = (word << 15 | word >> 17) % WORD
        state ^= word * 0x1B873593 % WORD
        state = (state << 13 | state >> 19) % WORD
        state = (state * 5 + 0xE6546B64) % WORD
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B % WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 % WORD
    return state ^ state >> 16


def philox(seed: int, position: int, token: int) -> int:
    """The first word of Philox4x32-10: counter (position, token, 0, 0), key the seed's low and high word."""
    c0, c1, c2, c3 = position % WORD, token % WORD, 0, 0
    k0, k1 = seed % WORD, seed // WORD % WORD
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high // WORD ^ c1 ^ k0, high % WORD, low // WORD ^ c3 ^ k1, low % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0


WORDS = {"murmur3": murmur3, "philox": philox}


def uniform(word: int) -> float:
    return float32((word + 0.5) / WORD)


def gumbel(word: int) -> float:
    u = min(uniform(word), 1.0 - 2.0**-24)
    return float32(-math.log(-math.log1p(-u)))


def decide(case: dict[str, Any]) -> dict[str, Any]:
    """A whole decision: candidates by (falling logit, rising id), cut at top_k, then at top_p; arg max after noise."""
    logit = [float32(float32(x) / float32(case["temperature"])) for x in case["logits"]]
    order = sorted(range(len(logit)), key=lambda token: (-logit[token], token))[: case["top_k"] or None]
    weight = [math.exp(logit[token] - logit[order[0]]) for token in order]
    before = [sum(weight[:n]) / sum(weight) for n in range(len(order))]
    kept = [token for token, mass in zip(order, before) if case["top_p"] == 1 or mass < case["top_p"]]
    noise = {t: gumbel(WORDS[case["noise"]](case["seed"], case["position"], t)) for t in sorted(kept)}
    score = {token: float32(logit[token] + noise[token]) for token in noise}
    best = max(score.values())
    return {
        **case,
        "candidates": sorted(kept),
        "gumbel": list(noise.values()),
        "scores": list(score.values()),
        "token": min(token for token, value in score.items() if value == best),
        "margins": [float32(best - value) for value in score.values()],
    }


def cases() -> list[dict[str, Any]]:
    """Logits on a grid of sixteenths (exact in every precision), with ties at the edges of top-k."""
    draw = random.Random(6)
    out = []
    samplers = [(1.0, 0, 1.0), (1.0, 4, 1.0), (0.5, 6, 1.0), (2.0, 0, 0.83), (0.75, 5, 0.71)]
    for number, (temperature, top_k, top_p) in enumerate(samplers * 2):
        logits = [draw.randint(-48, 48) / 16 for _ in range(12)]
        if top_k:  # two equal logits at the edge: the lower id stays
            order = sorted(range(12), key=lambda token: (-logits[token], token))
            logits[order[top_k]] = logits[order[top_k - 1]]
        case = {
            "noise": "murmur3" if number < len(samplers) else "philox",
            "seed": seed_of("vectors", number, "node", number, 0),
            "position": 40 + number,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "logits": logits,
        }
        out.append(decide(case))
    return out


def sequence() -> dict[str, Any]:
    """Three tokens after a prompt of five: what the position is. The same logits each time, so only it changes."""
    logits = [0.0] * 8
    seed = seed_of("vectors", 0, "sequence", 0, 0)
    tokens = []
    for step in range(3):
        case = {
            "noise": "murmur3",
            "seed": seed,
            "position": 5 + step - 1,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
        }
        tokens.append(decide({**case, "logits": logits})["token"])
    return {"seed": seed, "prompt_tokens": 5, "logits": logits, "positions": [4, 5, 6], "tokens": tokens}


def vectors() -> dict[str, Any]:
    draw = random.Random(1)
    places = [*EXTREMES, *((draw.randrange(2**63), draw.randrange(4096), draw.randrange(152_000)) for _ in range(24))]
    return {
        "format": "assay.noise-vectors/1",
        "described": "docs/VLLM.md, section The noise",
        "made_by": "scripts/noise_vectors.py",
        "seeds": [{"fields": list(fields), "seed": seed_of(*fields)} for fields in SEEDS],
        "noise": [
            {
                "seed": seed,
                "position": position,
                "token": token,
                **{
                    name: {
                        "word": (word := of(seed, position, token)),
                        "uniform": uniform(word),
                        "gumbel": gumbel(word),
                    }
                    for name, of in WORDS.items()
                },
            }
            for seed, position, token in places
        ],
        "edges": [
            {"word": word, "uniform": uniform(word), "gumbel": gumbel(word)}
            for word in (0, 1, 255, 256, 2**30 - 1, 2**30, 2**31, WORD - 257, WORD - 128, WORD - 1)
        ],
        "decisions": cases(),
        "sequence": sequence(),
    }


def text(found: dict[str, Any]) -> str:
    """JSON, one entry a line."""
    lines = ["{"]
    for at, (name, value) in enumerate(found.items()):
        end = "," if at + 1 < len(found) else ""
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f" {json.dumps(name)}: [\n  {rows}\n ]{end}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}{end}")
    return "\n".join([*lines, "}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    made = text(vectors())
    if not parser.parse_args().check:
        FILE.write_text(made, encoding="utf-8")
        return 0
    if FILE.read_text(encoding="utf-8") == made:
        return 0
    print(f"{FILE.name} is not what this script makes: run it without --check", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
