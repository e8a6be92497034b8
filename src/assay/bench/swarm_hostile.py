"""The corpus of hostile messages to a swarm's node: a name, what it is, how it is made, the reason Assay must give.

The first half shows nothing of who made it, so that a relay might have; the second is signed by the node itself.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assay.bench.swarm_messages import (
    Hostile,
    body,
    contents,
    first,
    flipped,
    header,
    honest,
    ids,
    put,
    raw,
    rows,
    says,
)
from assay.swarm.exchange import template
from assay.swarm.relayed import plan_sha256
from assay.swarm.signed import FIXED, MAGIC, OVERHEAD, sign
from assay.wire.rollout import MAX_TOKEN

STRANGER = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"stranger").digest())
PICKLE = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."  # as data: nothing here reads it
SIGNED = len(MAGIC) + 64  # where the signed body begins
NOISE = hashlib.sha256(b"noise").digest() * 20

IDENTITY = [
    Hostile("nothing", "no bytes", lambda s: b"", "malformed"),
    Hostile("garbage", "random bytes", lambda s: NOISE, "malformed"),
    Hostile("garbage-begun", "random bytes behind the right beginning", lambda s: MAGIC + NOISE, "malformed"),
    Hostile("pickle", "a pickle", lambda s: PICKLE, "malformed"),
    Hostile("unsigned", "completions without a signature", lambda s: s.statement.contents, "malformed"),
    Hostile("version", "another version of the form", raw(lambda m: b"ASSAYSG9" + m[8:]), "malformed"),
    Hostile("truncated", "cut off in the middle", raw(lambda m: m[:SIGNED + 40]), "malformed"),
    Hostile("name-long", "a name said to have 65,535 bytes",
            body(lambda b: b[:FIXED.size] + b"\xff\xff" + b[FIXED.size + 2:]), "malformed"),
    Hostile("name-bytes", "a name that is no UTF-8",
            body(lambda b: b[:FIXED.size] + struct.pack("<H", 2) + b"\xff\xfe" + b[FIXED.size:]), "malformed"),
    Hostile("huge", "one byte more than a message may have",
            lambda s: honest(s).ljust(OVERHEAD + template(s.node, s.plan, s.rules).message_bytes + 1, b"x"), "too_large"),
    Hostile("name-other", "another node's message under this node's name", lambda s: s.other_message, "wrong_participant"),
    Hostile("name-unknown", "signed for a node that does not exist", says(node="node-9"), "wrong_participant"),
    Hostile("name-empty", "signed for nobody", says(node=""), "wrong_participant"),
    Hostile("key-stranger", "signed with a key nobody registered", lambda s: sign(s.statement, STRANGER), "wrong_signature"),
    Hostile("key-other", "signed with another node's key", lambda s: sign(s.statement, s.other_key), "wrong_signature"),
    Hostile("key-other-name", "another node's message, made to say this node's name",
            lambda s: s.other_message.replace(s.other.encode(), s.node.encode(), 1), "wrong_signature"),
    Hostile("signature-zero", "a signature of zeros", raw(lambda m: m[:8] + bytes(64) + m[SIGNED:]), "wrong_signature"),
    Hostile("signature-flipped", "one bit of the signature turned over", flipped(8), "wrong_signature"),
    Hostile("signature-moved", "the signature of another message", lambda s: s.other_message[:SIGNED] + honest(s)[SIGNED:],
            "wrong_signature"),
    Hostile("signature-bare", "signed without the prefix that says what for",
            lambda s: MAGIC + s.key.sign(honest(s)[SIGNED:]) + honest(s)[SIGNED:], "wrong_signature"),
    Hostile("altered-round", "the round altered after signing", flipped(SIGNED), "wrong_signature"),
    Hostile("altered-plan", "the plan's hash altered after signing", flipped(SIGNED + 8), "wrong_signature"),
    Hostile("altered-head", "the pools' hash altered after signing", flipped(SIGNED + 40), "wrong_signature"),
    Hostile("altered-token", "a token altered after signing", flipped(-1), "wrong_signature"),
    Hostile("shortened", "the last token cut off after signing", raw(lambda m: m[:-4]), "wrong_signature"),
    Hostile("lengthened", "four bytes more after signing", raw(lambda m: m + b"more"), "wrong_signature"),
]  # fmt: skip

STATED = [
    Hostile("round-before", "its message of the round before, replayed", says(round=0), "wrong_round"),
    Hostile("round-ahead", "signed for the next round", says(round=2), "wrong_round"),
    Hostile("round-largest", "signed for round 2^64 - 1", says(round=2**64 - 1), "wrong_round"),
    Hostile("run-other", "its message of another run", says(run="another"), "wrong_round"),
    Hostile("plan-next", "signed for the plan of the next round",
            lambda s: sign(replace(s.statement, plan=plan_sha256(s.ahead)), s.key), "wrong_plan"),
    Hostile("plan-made-up", "signed for a plan of its own",
            lambda s: sign(replace(s.statement, plan=plan_sha256(replace(s.plan, asked={s.node: {1: 1}}))), s.key), "wrong_plan"),
    Hostile("pool-other", "signed after another pool", says(head="ab" * 32), "wrong_pool"),
    Hostile("pool-none", "signed after no pool", says(head="00" * 32), "wrong_pool"),
]  # fmt: skip

FORM = [
    Hostile("contents-none", "signed, and nothing in it", contents(lambda c: b""), "malformed"),
    Hostile("contents-noise", "signed noise", contents(lambda c: NOISE), "malformed"),
    Hostile("contents-pickle", "a signed pickle", contents(lambda c: PICKLE), "malformed"),
    Hostile("contents-twice", "its completions twice over", contents(lambda c: c + c), "malformed"),
    Hostile("header-none", "a header of no bytes", contents(lambda c: c[:8] + bytes(4) + c[12:]), "malformed"),
    Hostile("header-long", "a header said to have 4 GB", contents(lambda c: c[:8] + b"\xff" * 4 + c[12:]), "malformed"),
    Hostile("header-padded", "a header of spaces", header(text=lambda t: t + " " * 17_000), "too_large"),
    Hostile("header-deep", "10,000 brackets", header(text=lambda t: "[" * 10_000), "malformed"),
    Hostile("header-list", "a list for an object", header(text=lambda t: f"[{t}]"), "malformed"),
    Hostile("header-bytes", "a header that is no UTF-8", contents(lambda c: c[:12] + b"\xff" + c[13:]), "malformed"),
    Hostile("header-twice", "a key twice", header(text=lambda t: t[:-1] + ', "round": 1}'), "malformed"),
    Hostile("header-nan", "round NaN", header(text=lambda t: t.replace('"round": 1', '"round": NaN')), "malformed"),
    Hostile("header-infinite", "round Infinity", header(text=lambda t: t.replace('"round": 1', '"round": Infinity')), "malformed"),
    Hostile("header-digits", "a round of 6,000 digits", header(text=lambda t: t.replace('"round": 1', '"round": ' + "9" * 6_000)), "malformed"),
    Hostile("header-float", "round 1.0", header(text=lambda t: t.replace('"round": 1', '"round": 1.0')), "malformed"),
    Hostile("header-true", "round true", header(text=lambda t: t.replace('"round": 1', '"round": true')), "malformed"),
    Hostile("key-extra", "a reward of its own beside the completions", header(lambda h: h.update(rewards=[1.0] * 4)), "malformed"),
    Hostile("key-missing", "no list of completions", header(lambda h: h.pop("completions")), "malformed"),
    Hostile("format-other", "another format", header(lambda h: h.update(format="assay.rollout/9")), "malformed"),
    Hostile("inner-node", "completions said to be another node's", header(lambda h: h.update(participant="node-0")), "wrong_participant"),
    Hostile("inner-run", "completions of another run", header(lambda h: h.update(run="another")), "wrong_round"),
    Hostile("inner-round", "completions of the next round", header(lambda h: h.update(round=2)), "wrong_round"),
    Hostile("model-other", "drawn from other weights, it says", header(lambda h: h.update(model_sha256="cd" * 32)), "wrong_base"),
    Hostile("model-none", "drawn from no weights", header(lambda h: h.update(model_sha256="")), "wrong_base"),
    Hostile("hash-other", "a hash of other completions", header(lambda h: h.update(sha256="ef" * 32)), "hash_mismatch"),
]  # fmt: skip

PLANNED = [
    Hostile("entries-none", "an empty list of completions", header(lambda h: h.update(completions=[])), "missing"),
    Hostile("entry-text", "a completion that is a word", header(lambda h: h["completions"].__setitem__(0, "all")), "malformed"),
    Hostile("entry-nan", "NaN tokens", header(lambda h: h["completions"][0].__setitem__(2, float("nan"))), "malformed"),
    Hostile("entry-true", "a completion of true tokens", header(lambda h: h["completions"][0].__setitem__(2, True)), "malformed"),
    Hostile("entry-empty", "a completion of no tokens", header(lambda h: h["completions"][0].__setitem__(2, 0)), "malformed"),
    Hostile("entry-negative", "a completion of -5 tokens", header(lambda h: h["completions"][0].__setitem__(2, -5)), "malformed"),
    Hostile("entry-long", "a completion of 10^9 tokens", header(lambda h: h["completions"][0].__setitem__(2, 10**9)), "too_large"),
    Hostile("entry-twice", "a completion twice", header(lambda h: h["completions"].__setitem__(1, h["completions"][0])), "duplicate"),
    Hostile("prompt-other", "answers to a prompt of another node's",
            rows(lambda s, c: [put(o, participant=s.node) for o in s.other_rollout.completions]), "wrong_prompt"),
    Hostile("prompt-negative", "a prompt below 0", header(lambda h: h["completions"][0].__setitem__(0, -1)), "wrong_prompt"),
    Hostile("too-many", "one completion more than it owes",
            rows(lambda s, c: [*c, put(c[0], index=len(c))]), "too_large"),
    Hostile("index-outside", "a completion numbered 99", first(lambda s, c: {"index": 99}), "out_of_range"),
    Hostile("ids-outside", "a token outside the vocabulary", first(lambda s, c: {"ids": (s.rules.vocabulary, *c.ids[1:])}), "out_of_range"),
    Hostile("ids-largest", "token 2^32 - 1", first(lambda s, c: {"ids": (MAX_TOKEN, *c.ids[1:])}), "out_of_range"),
    Hostile("ids-none", "no token ids behind the header", ids(lambda b: b""), "malformed"),
    Hostile("ids-short", "the last id missing", ids(lambda b: b[:-4]), "malformed"),
    Hostile("ids-half", "ids as 16-bit numbers", ids(lambda b: np.frombuffer(b, "<u4").astype("<u2").tobytes()), "malformed"),
    Hostile("ids-double", "ids as 64-bit numbers", ids(lambda b: np.frombuffer(b, "<u4").astype("<u8").tobytes()), "malformed"),
    Hostile("ids-float", "ids as float32", ids(lambda b: np.frombuffer(b, "<u4").astype("<f4").tobytes()), "out_of_range"),
    Hostile("ids-swapped", "ids in big-endian order", ids(lambda b: np.frombuffer(b, "<u4").astype(">u4").tobytes()), "out_of_range"),
    Hostile("ids-changed", "other ids than the hash speaks of", ids(lambda b: b[4:] + b[:4]), "hash_mismatch"),
]  # fmt: skip

DRAWN = [
    Hostile("too-few", "one completion left out, the others as its seeds give them", rows(lambda s, c: c[1:]), "incomplete"),
    Hostile("end-missing", "a completion cut off before its end",
            first(lambda s, c: {"ids": c.ids[: max(1, len(c.ids) // 2)]}), "not_ended"),
    Hostile("end-early", "a completion ended after its first half",
            first(lambda s, c: {"ids": (*c.ids[: len(c.ids) // 2], s.eos)}), "seeded"),
    Hostile("end-only", "nothing but an end", first(lambda s, c: {"ids": (s.eos,)}), "seeded"),
    Hostile("token-edited", "one token edited before signing",
            first(lambda s, c: {"ids": (*c.ids[:4], (c.ids[4] + 1) % s.rules.vocabulary, *c.ids[5:])}), "seeded"),
    Hostile("order", "each of its completions in the next one's place",
            rows(lambda s, c: [put(o, ids=t.ids) for o, t in zip(c, [*c[1:], c[0]])]), "seeded"),
    Hostile("all-one", "one completion for all", rows(lambda s, c: [put(o, ids=c[0].ids) for o in c]), "seeded"),
    Hostile("copied", "another node's completions as answers to its own prompt",
            rows(lambda s, c: [put(o, ids=t.ids) for o, t in zip(c, s.other_rollout.completions)]), "seeded"),
    Hostile("seeds-own", "drawn from its weights under seeds of its own",
            rows(lambda s, c: [put(o, ids=s.redraw(o.prompt, 7 + o.index)) for o in c]), "seeded"),
]  # fmt: skip

CORPUS: tuple[Hostile, ...] = (*IDENTITY, *STATED, *FORM, *PLANNED, *DRAWN)
