"""A swarm by relay on the real `tiny`, on Flower and without: it learns what the local engine learns, whoever lies."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from assay import checkpoint, ledger, run_dir
from assay.bench.flower_grid import InProcessGrid
from assay.config import ConfigError
from assay.engines import journal, local_swarm
from assay.engines.flower import swarm_node, swarm_relay, swarm_run
from assay.engines.flower.swarm_records import answer_content, read_answer
from assay.engines.relay import Answer, Request
from assay.engines.relayed_swarm import turn
from assay.swarm.keys import make_key, read_keys, write_keys
from assay.swarm.relayed import encode_pool
from relayed import Relay, on_grid, play, pools_in, rounds_of, tiny, told_of

pytestmark = pytest.mark.usefixtures("one_thread")
BAD, FIRST, LAST = "node-2", "node-0", "node-3"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Relay:
    """An unbroken run of Flower's apps on a grid in one process, whose messages travel as Flower's own bytes."""
    folder = tmp_path_factory.mktemp("played")
    settings = swarm_run.prepare(tiny(), folder)
    play(on_grid(settings), settings, folder / "relay")
    relay = Relay(settings)
    relay.messages = pools_in(folder / "relay", list(relay.settings))
    return relay


@pytest.fixture(scope="module")
def begun(played: Relay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two nodes that have learnt round 1 and signed round 2."""
    relay = fresh(played, tmp_path_factory.mktemp("begun"))
    relay.messages = {1: played.messages[1]}
    for node in (FIRST, "node-1"):
        relay.ask(node, 2)
    return relay.settings[FIRST].folder.parent


def fresh(played: Relay, folder: Path, lie: Any = None) -> Relay:
    """The same nodes and keys, nothing learnt yet."""
    settings = [replace(s, folder=folder / s.node) for s in played.settings.values()]
    return Relay(settings, lie) if lie else Relay(settings)


def test_nodes_end_where_the_local_engine_ends(played: Relay, tmp_path: Path) -> None:
    local_swarm.run_swarm(tiny(), tmp_path)
    entries = ledger.Ledger(tmp_path / run_dir.LEDGER).entries
    for settings in played.settings.values():
        assert ledger.verify(settings.folder / run_dir.LEDGER).ok
        told = rounds_of(settings)
        assert [{k: v for k, v in body.items() if k != "relay"} for body in told] == [
            e["body"] for e in entries if e["kind"] == "round"
        ]
        summary = run_dir.read_summary(settings.folder)
        assert summary is not None
        assert summary["fingerprint"] == entries[-1]["body"]["model"]
        assert summary["struck"][BAD] == [1, 2, 3]
        assert summary["banned"][BAD] == [2, 3]
        assert not any(summary["struck"][n] for n in played.settings if n != BAD)
        assert not told_of(settings)


def test_a_node_that_missed_rounds_learns_them_and_ends_with_the_same_weights(played: Relay, tmp_path: Path) -> None:
    relay = fresh(played, tmp_path)
    relay.messages = played.messages
    behind = relay.ask(LAST, 4, rounds=range(0))
    assert (behind.status, behind.learnt) == ("behind", 0)
    some = relay.ask(LAST, 4, rounds=range(1, 3))
    assert (some.status, some.learnt) == ("behind", 2)
    assert relay.ask(LAST, 4, rounds=range(4, 5)).learnt == 2, "a pool that does not follow is no help"
    done = relay.ask(LAST, 4, rounds=range(3, 4))
    assert (done.status, done.model) == ("done", run_dir.read_summary(played.settings[FIRST].folder)["fingerprint"])  # type: ignore[index]
    others, own = rounds_of(played.settings[FIRST]), rounds_of(relay.settings[LAST])
    assert [b["relay"]["head"] for b in own] == [b["relay"]["head"] for b in others]


def test_a_round_is_signed_once(played: Relay, tmp_path: Path) -> None:
    relay = fresh(played, tmp_path)
    first = relay.ask(FIRST, 1)
    assert relay.ask(FIRST, 1) == first
    assert first.message == played.messages[1][FIRST], "seeds and weights leave nothing to choose"
    # a node set back to before a pool does not sign the next round again on another one
    relay.messages[1] = dict(played.messages[1])
    assert relay.ask(FIRST, 2).status == "ok"
    for path in (tmp_path / FIRST / run_dir.CHECKPOINTS).glob("000001*"):
        path.unlink()
    del relay.messages[1][BAD]
    assert relay.ask(FIRST, 2).reason == "wrong_pool"


def test_a_killed_turn_leaves_nothing_half_done(played: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = fresh(played, tmp_path)
    relay.messages = played.messages
    for index, name in ((2, "write_atomic"), (3, "save")):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, name, _dies)
            with pytest.raises(KeyboardInterrupt):
                relay.ask(FIRST, index)
        assert relay.ask(FIRST, index).message == played.messages[index][FIRST]
        assert ledger.verify(relay.settings[FIRST].folder / run_dir.LEDGER).ok


def _dies(*args: Any, **more: Any) -> None:
    raise KeyboardInterrupt


# --- a relay that lies -----------------------------------------------------------------------------------------------


def without_first(node: str, index: int, messages: dict[str, bytes]) -> Mapping[str, bytes]:
    """Nodes 2 and 3 are told that node 0 said nothing in round 1."""
    return {n: m for n, m in messages.items() if index > 1 or node in (FIRST, "node-1") or n != FIRST}


def test_an_equivocating_relay_is_found_out_one_round_later(played: Relay, begun: Path, tmp_path: Path) -> None:
    """Node 3 alone is told something else: nobody sees it in round 2, everybody in round 3."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    relay = fresh(played, tmp_path, without_first)
    relay.messages = {1: played.messages[1]}
    victim = relay.ask(LAST, 2)
    assert victim.status == "ok"
    relay.messages[2] = {**played.messages[2], LAST: victim.message}
    first, last = relay.ask(FIRST, 3), relay.ask(LAST, 3)
    assert (first.status, last.status, last.reason, last.learnt) == ("ok", "refused", "wrong_pool", 1)
    [told] = told_of(relay.settings[LAST])
    assert (told["round"], told["reason"]) == (3, "wrong_pool")
    assert "node-0, node-1, node-2 signed another" in told["sentence"]
    seen = rounds_of(relay.settings[FIRST])[-1]
    assert [(r["participant"], r["reason"]) for r in seen["refused"]] == [(LAST, "wrong_pool")]
    assert not seen["learners"]["tiny"]["trust"][LAST]["rounds"], "the victim gets no strike for it"


def test_two_halves_that_were_told_two_things_both_stop(played: Relay, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    relay = fresh(played, tmp_path, without_first)
    relay.messages = {1: played.messages[1]}
    relay.messages[2] = played.messages[2] | {node: relay.ask(node, 2).message for node in (BAD, LAST)}
    assert {(a.status, a.reason) for a in (relay.ask(n, 3) for n in (FIRST, LAST))} == {("refused", "wrong_pool")}


@pytest.mark.parametrize("what", ["altered", "dropped", "replayed", "swapped"])
def test_a_message_changed_for_everybody_is_seen_at_once(played: Relay, begun: Path, tmp_path: Path, what: str) -> None:
    """All hold the same pool, so all go on together; whose message it was sees that it is not what it sent."""

    def lie(node: str, index: int, messages: dict[str, bytes]) -> Mapping[str, bytes]:
        if index != 2:
            return messages
        mine = bytearray(messages[FIRST])
        mine[-1] ^= 1
        new = {"altered": bytes(mine), "replayed": relay.messages[1][FIRST], "swapped": messages["node-1"]}
        return {n: new.get(what) if n == FIRST else m for n, m in messages.items() if n != FIRST or what != "dropped"}  # type: ignore[return-value]

    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    relay = fresh(played, tmp_path, lie)
    relay.messages = {1: played.messages[1], 2: played.messages[2]}
    answers = {node: relay.ask(node, 3) for node in (FIRST, "node-1")}
    assert {a.status for a in answers.values()} == {"ok"}
    assert len({a.model for a in answers.values()}) == 1
    reason = {
        "altered": "wrong_signature",
        "dropped": "missing",
        "replayed": "wrong_round",
        "swapped": "wrong_participant",
    }
    for node in answers:
        last = rounds_of(relay.settings[node])[-1]
        assert [(r["participant"], r["reason"]) for r in last["refused"]] == [(FIRST, reason[what])]
        assert FIRST not in {n for n, s in last["learners"]["tiny"]["trust"].items() if s["rounds"]}
    own = rounds_of(relay.settings[FIRST])[-1]["relay"]["own"]
    assert own["reason"] == ("missing" if what == "dropped" else "hash_mismatch")
    assert rounds_of(relay.settings["node-1"])[-1]["relay"]["own"] is None


def test_a_false_history_is_not_learnt_when_catching_up(played: Relay, tmp_path: Path) -> None:
    """What others signed in round 2 says what round 1 was, before a node that was away learns any of it."""
    relay = fresh(played, tmp_path, lambda node, index, m: {n: m[n] for n in m if index > 1 or n != FIRST})
    relay.messages = played.messages
    answer = relay.ask(LAST, 4, rounds=range(1, 4))
    assert (answer.status, answer.reason, answer.learnt) == ("refused", "wrong_pool", 0)
    assert rounds_of(relay.settings[LAST]) == []
    honest = fresh(played, tmp_path)
    honest.messages = played.messages
    assert honest.ask(LAST, 4, rounds=range(1, 4)).status == "done", "nothing is lost: the true pools do"


def test_too_few_voices_are_no_history(played: Relay, tmp_path: Path) -> None:
    """An eclipsed node, which hears only of itself and one other, stops: so would a swarm whose majority is silent."""
    relay = fresh(played, tmp_path, lambda node, index, m: {n: m[n] for n in m if n in (LAST, BAD)})
    relay.messages = played.messages
    answer = relay.ask(LAST, 2)
    assert (answer.status, answer.reason) == ("refused", "missing")
    assert "2 of 4 nodes hold this node's pools" in answer.sentence
    relay.settings[LAST] = replace(relay.settings[LAST], quorum=2)
    assert relay.ask(LAST, 2).status == "ok"


def test_whoever_has_other_keys_or_another_experiment_is_found_out_in_round_1(played: Relay, tmp_path: Path) -> None:
    relay = fresh(played, tmp_path)
    public = read_keys(played.settings[LAST].keys, played.settings)
    keys = {n: k.public_bytes_raw().hex() for n, k in public.items()} | {"node-1": make_key(tmp_path / "mallory.pem")}
    write_keys(tmp_path / "swapped.toml", keys)
    relay.settings[LAST] = replace(relay.settings[LAST], keys=tmp_path / "swapped.toml")
    relay.settings["node-1"] = replace(relay.settings["node-1"], experiment=relay.experiment.changed(grpo__lr=1e-3))
    relay.messages[1] = played.messages[1] | {node: relay.ask(node, 1).message for node in ("node-1", LAST)}
    # two of four speak for another start: nobody goes on, and each says who differs
    answers = {node: relay.ask(node, 2) for node in (FIRST, LAST)}
    assert {a.reason for a in answers.values()} == {"wrong_pool"}
    assert "node-1, node-3 signed another" in answers[FIRST].sentence


def garbage(relay: Relay, index: int) -> dict[int, bytes]:
    messages = relay.messages[1]
    return {
        1: [
            b"",
            b"no pool at all",
            encode_pool(2, messages),
            encode_pool(1, {**messages, "node-9": b"x"}),
            encode_pool(1, messages) + b"x",
            encode_pool(1, messages)[:-1],
            encode_pool(1, {FIRST: bytes(1 << 20)}),
        ][index]
    }


@pytest.mark.parametrize(
    ("index", "reason"),
    [*enumerate(["malformed", "malformed", "wrong_round", "malformed", "malformed", "malformed", "too_large"])],
)  # fmt: skip
def test_what_is_no_pool_is_not_learnt(played: Relay, tmp_path: Path, index: int, reason: str) -> None:
    settings = fresh(played, tmp_path).settings[FIRST]
    asked = Request(round=2, plan=played.plan(2), pools=garbage(played, index))
    for _ in range(2):
        answer = turn(settings, asked)
        assert (answer.status, answer.reason, answer.learnt) == ("refused", reason, 0)
    assert [t["reason"] for t in told_of(settings)] == [reason], "said once"


def test_other_plans_and_other_rounds_are_not_answered(played: Relay, tmp_path: Path) -> None:
    relay = fresh(played, tmp_path)
    relay.messages = {1: played.messages[1]}
    assert relay.ask(FIRST, 1, plan=relay.plan(2)).reason == "wrong_plan"
    assert relay.ask(FIRST, 5, rounds=range(1, 2)).reason == "wrong_round"
    assert relay.ask(FIRST, 0).reason == "wrong_round"
    assert not list((tmp_path / FIRST / "sent").glob("*"))
    relay.ask(FIRST, 2)
    assert relay.ask(FIRST, 1).reason == "wrong_round", "a relay cannot go back"


@pytest.mark.parametrize(
    ("changes", "match"), [({"node": "node-4"}, "node-0 to node-3"), ({"quorum": 5}, "from 1 to 4")]
)  # fmt: skip
def test_wrong_settings_are_the_operators_mistake(played: Relay, changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        replace(played.settings[FIRST], **changes)


def test_a_folder_or_a_key_of_another_node_is_the_operators_mistake(played: Relay) -> None:
    one, other = played.settings[FIRST], played.settings["node-1"]
    with pytest.raises(ConfigError, match="is the folder of node-0"):
        turn(replace(other, folder=one.folder), Request(round=4, plan=b""))
    with pytest.raises(ConfigError, match="is not the key"):
        turn(replace(one, key=other.key), Request(round=4, plan=b""))


def test_two_processes_never_work_in_one_folder(played: Relay) -> None:
    with journal.locked(played.settings[FIRST].folder), pytest.raises(ConfigError, match="another process"):
        played.ask(FIRST, 4)


# --- on Flower -------------------------------------------------------------------------------------------------------


def test_a_relay_goes_on_where_it_stopped_and_brings_late_nodes_up(played: Relay, tmp_path: Path) -> None:
    """Node 3 is away in round 1, and somebody without a key answers too; the relay dies, starts again."""
    settings = list(fresh(played, tmp_path).settings.values())
    folder = tmp_path / "relay"

    def intruder(message: Message) -> Message:
        return Message(
            answer_content(Answer(status="ok", learnt=0, head="", model="", message=b"rubbish")), reply_to=message
        )

    away = on_grid(settings[:3])
    away.nodes = {**away.nodes, 99: intruder}
    with pytest.raises(KeyboardInterrupt):
        play(away, settings, folder, on_round=_dies)
    assert [p.name for p in (folder / "pools").iterdir()] == ["000001.pool"]
    play(on_grid(settings), settings, folder)
    pools = pools_in(folder, list(played.settings))
    assert [set(pools[i]) for i in (1, 2, 3)] == [{FIRST, "node-1", BAD}, set(played.settings), set(played.settings)]
    ends = {run_dir.read_summary(s.folder)["fingerprint"] for s in settings}  # type: ignore[index]
    assert len(ends) == 1
    told = rounds_of(settings[0])
    assert [[(r["participant"], r["reason"]) for r in body["refused"]] for body in told] == [
        [(LAST, "missing")],
        [],
        [],
    ]
    assert [body["relay"]["head"] for body in rounds_of(settings[3])] == [body["relay"]["head"] for body in told]


def test_a_relay_without_a_quorum_says_so(played: Relay, tmp_path: Path) -> None:
    settings = list(fresh(played, tmp_path).settings.values())
    with pytest.raises(ConfigError, match="no 3 of 4 nodes answered with one history"):
        play(on_grid(settings[:2]), settings, tmp_path / "relay")


def test_requests_that_are_none_are_refused(played: Relay) -> None:
    one = played.settings[FIRST]
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    for content in (
        RecordDict(),
        RecordDict({"assay.asked": ConfigRecord({"round": "1", "plan": b""}), "assay.pools": ConfigRecord()}),
        RecordDict({"assay.asked": ConfigRecord({"round": 1, "plan": b""}), "assay.pools": ConfigRecord({"-1": b""})}),
        RecordDict({"assay.asked": ConfigRecord({"round": 1, "plan": b""}), "assay.pools": ConfigRecord({"1": "x"})}),
    ):
        grid = InProcessGrid({11: lambda m: swarm_node.make_app(lambda c: one)(m, context)})
        [reply] = grid.send_and_receive([grid.create_message(content, "train", 11, "")], timeout=1)
        assert read_answer(reply.content, 10).reason == "malformed"


def test_a_node_is_what_its_own_operator_says(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text('wing = "swarm"\n')
    given = {"node": "node-1", "folder": str(tmp_path)}
    context = Context(run_id=1, node_id=1, node_config=given, state=RecordDict(), run_config={"node": "node-0"})
    found = swarm_node.settings_of(context)
    assert (found.node, found.keys, found.key) == ("node-1", tmp_path / "keys.toml", tmp_path / "node.pem")
    assert (found.quorum, found.malicious) == (None, False)
    context.node_config.pop("folder")
    with pytest.raises(ConfigError, match="--node-config"):
        swarm_node.settings_of(context)
    context.run_config = {"folder": str(tmp_path), "keep-pools": 3}
    assert swarm_relay.settings_of(context).keep_pools == 3


@pytest.mark.slow
def test_flowers_simulation_ends_where_the_local_engine_ends(tmp_path: Path) -> None:
    found = swarm_run.run_swarm(tiny(), tmp_path / "flower")
    local = local_swarm.run_swarm(tiny(), tmp_path / "local")
    model = ledger.Ledger(tmp_path / "local" / run_dir.LEDGER).entries[-1]["body"]["model"]
    assert set(found["fingerprints"].values()) == {model}
    assert {k: found[k] for k in ("struck", "banned", "metrics")} == {
        k: local[k] for k in ("struck", "banned", "metrics")
    }
    assert found["banned"][BAD] == [2, 3]
    assert swarm_run.run_swarm(tiny(), tmp_path / "flower") == found, "a finished run is taken as it is"
