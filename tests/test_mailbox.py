"""Trainers that keep their own time, by a relay that nobody trusts: what reaches whom, and how lies are found out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from assay.bench.flower_grid import InProcessGrid
from assay.config import ConfigError
from assay.engines import mailbox
from assay.engines.flower import mailbox_node, swarm_relay
from assay.engines.mailbox import Settings, pool_file, sent_file, turn
from assay.engines.relay import Mail, Request, read_mail
from assay.engines.trl.relayed import NO_PLAN, RelayError, RelayExchange
from assay.swarm.keys import make_key, public_hex, read_key, write_keys
from assay.swarm.relayed import decode_pool, encode_pool
from assay.swarm.signed import parse

NODES, ROUNDS, LARGE = ["node-0", "node-1", "node-2"], 3, 1000
Lie = Callable[[str, int, dict[str, bytes]], Mapping[str, bytes]]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    public = {}
    for node in NODES:
        (tmp_path / node).mkdir()
        public[node] = make_key(tmp_path / node / "node.pem")
    (tmp_path / "relay").mkdir()
    for folder in tmp_path.iterdir():
        write_keys(folder / "keys.toml", public)
        (folder / "mail.toml").write_text(f'run = "run-1"\nrounds = {ROUNDS}\nmax_bytes = {LARGE}\n')
    return {node: tmp_path / node for node in NODES}


def exchange(folder: Path, **more: object) -> RelayExchange:
    return RelayExchange(folder, node=folder.name, **{"timeout": 20.0, "poll": 0.01, **more})  # type: ignore[arg-type]


def said(node: str, round: int) -> bytes:
    return f"{node} in round {round}".encode() * 3


def settings(folder: Path) -> Settings:
    return Settings(folder=folder, mail=read_mail(folder / "mail.toml"), nodes=len(NODES), wait=20.0, poll=0.01)


def heads(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "heads").iterdir())]


def deliver(folders: Mapping[str, Path], round: int, lie: Lie = lambda node, round, messages: messages) -> None:
    """A relay by hand: everybody's message of a round into everybody's mailbox, as `lie` tells it."""
    messages = {node: sent_file(folder, round).read_bytes() for node, folder in folders.items()}
    for node, folder in folders.items():
        pool = encode_pool(round, lie(node, round, dict(messages)))
        turn(settings(folder), Request(round=round + 1, plan=b"", pools={round: pool}), sleep=lambda seconds: None)


def others(node: str) -> dict[str, int]:
    return dict.fromkeys([n for n in NODES if n != node], LARGE)


def play(folders: Mapping[str, Path], rounds: int, lie: Lie = lambda node, round, messages: messages) -> None:
    """Rounds in which everybody publishes, the relay delivers, and everybody collects."""
    for round in range(1, rounds + 1):
        for node, folder in folders.items():
            exchange(folder).publish(round, said(node, round))
        for node in folders:  # the mailboxes need no wait: the next round's message is not asked for here
            sent_file(folders[node], round + 1).parent.mkdir(exist_ok=True)
            sent_file(folders[node], round + 1).touch()
        deliver(folders, round, lie)
        for folder in folders.values():
            sent_file(folder, round + 1).unlink()
        for node, folder in folders.items():
            exchange(folder).collect(round, others(node))


def test_trainers_hear_each_other_through_flowers_messages(folders: dict[str, Path], tmp_path: Path) -> None:
    """Relay and mailboxes as Flower apps; each trainer a thread of its own that waits for pools."""

    def client(folder: Path) -> Callable[[Message], Message]:
        app = mailbox_node.make_app()
        given = {"folder": str(folder), "wait": 20.0, "poll": 0.01}
        context = Context(run_id=1, node_id=1, node_config=given, state=RecordDict(), run_config={})
        return lambda message: app(message, context)

    def train(node: str) -> list[Mapping[str, bytes | None]]:
        seat, found = exchange(folders[node]), []
        for round in range(1, ROUNDS + 1):
            seat.publish(round, said(node, round))
            found.append(seat.collect(round, others(node)))
        return found

    grid = InProcessGrid({11 + at: client(folder) for at, folder in enumerate(folders.values())})
    given = {"folder": str(tmp_path / "relay"), "timeout": 20.0, "poll": 0.01}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=given)
    with ThreadPoolExecutor(len(NODES)) as pool:
        running = [pool.submit(train, node) for node in NODES]
        swarm_relay.app(grid, context)
        heard = [one.result() for one in running]
    expected = [{node: said(node, round) for node in NODES} for round in range(1, ROUNDS + 1)]
    assert heard == [expected] * len(NODES)  # one's own as the others have it
    assert len({tuple(heads(folder)) for folder in folders.values()}) == 1
    assert len(set(heads(folders["node-0"]))) == ROUNDS


def test_a_trainer_that_goes_back_sends_what_it_sent_before(folders: dict[str, Path]) -> None:
    play(folders, 2)
    one, path = folders["node-1"], sent_file(folders["node-1"], 2)
    before = path.read_bytes()
    exchange(one).publish(2, said("node-1", 2))
    exchange(one).publish(2, b"something else")  # a second signature would be two messages of one round
    assert path.read_bytes() == before
    statement, _, _ = parse(before, LARGE)
    assert (statement.contents, statement.plan) == (said("node-1", 2), NO_PLAN)
    again = exchange(one).collect(2, others("node-1"))
    assert again["node-1"] == said("node-1", 2)


def test_what_the_relay_changes_or_loses_reaches_nobody(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """For everybody alike: a message altered, one under another name, one left out. All hold the same, and go on."""

    def lie(node: str, round: int, messages: dict[str, bytes]) -> dict[str, bytes]:
        if round == 1:
            messages["node-0"] = messages["node-0"][:-1] + b"!"
        elif round == 2:
            messages["node-1"] = messages["node-2"]
        else:
            del messages["node-2"]
        return messages

    play(folders, 3, lie)
    for round, lost in enumerate(NODES, start=1):
        for node, folder in folders.items():
            assert exchange(folder).collect(round, others(node)) == {
                name: None if name == lost else said(name, round) for name in NODES
            }
    for told in ("wrong_signature", "wrong_participant", "this node's own message is not in the pool"):
        assert told in caplog.text
    assert len({tuple(heads(folder)) for folder in folders.values()}) == 1


def test_different_pools_for_different_nodes_are_found_out_a_round_later(folders: dict[str, Path]) -> None:
    def lie(node: str, round: int, messages: dict[str, bytes]) -> dict[str, bytes]:
        if (node, round) == ("node-2", 1):
            del messages["node-0"]
        return messages

    play(folders, 1, lie)
    for node in ("node-0", "node-1"):  # the two who are the majority go on without the third
        play_one(folders, node)
    with pytest.raises(
        RelayError, match="1 of 3 nodes hold this node's pools, node-0, node-1 signed another; 2 are needed"
    ):
        play_one(folders, "node-2")
    assert exchange(folders["node-0"]).collect(2, others("node-0")) == {
        "node-0": said("node-0", 2), "node-1": said("node-1", 2), "node-2": None,
    }  # fmt: skip


def play_one(folders: dict[str, Path], node: str) -> None:
    """Round 2 for one node, of what all have signed."""
    for name, folder in folders.items():
        exchange(folder).publish(2, said(name, 2))
    pool = encode_pool(2, {name: sent_file(folder, 2).read_bytes() for name, folder in folders.items()})
    sent_file(folders[node], 3).touch()
    turn(settings(folders[node]), Request(round=3, plan=b"", pools={2: pool}))
    exchange(folders[node]).collect(2, others(node))


def test_a_mailbox_takes_what_fits_and_forgets_nothing(folders: dict[str, Path]) -> None:
    play(folders, 2)
    folder = folders["node-0"]
    one, first = settings(folder), pool_file(folder, 1).read_bytes()
    asked = [
        (Request(round=9, plan=b""), "refused", "wrong_round"),
        (Request(round=2, plan=b"", pools={2: first}), "refused", "wrong_round"),
        (Request(round=3, plan=b"", pools={1: first + b" "}), "refused", "wrong_pool"),
        (Request(round=4, plan=b"", pools={3: bytes(mailbox.largest_pool(one.mail, 3) + 1)}), "refused", "too_large"),
        (Request(round=4, plan=b"", pools={}), "behind", "ok"),
    ]
    for request, status, reason in asked:
        answer = turn(one, request)
        assert (answer.status, answer.reason, answer.learnt) == (status, reason, 2)
    assert pool_file(folder, 1).read_bytes() == first
    quick = Settings(folder=folder, mail=one.mail, nodes=3, wait=0.02, poll=0.01)
    silent = turn(quick, Request(round=3, plan=b"", pools={}))
    assert (silent.status, silent.message, silent.reason) == ("ok", b"", "missing")
    messages = decode_pool(first, round=1, nodes=NODES)
    assert set(messages) == set(NODES)


def test_a_relay_that_sends_rubbish_or_nothing_stops_the_trainer(folders: dict[str, Path]) -> None:
    seat = exchange(folders["node-0"], timeout=0.05)
    seat.publish(1, b"x")
    with pytest.raises(RelayError, match="no pool of round 1"):
        seat.collect(1, others("node-0"))
    pool_file(folders["node-0"], 1).parent.mkdir()
    for pool in (b"", b"rubbish", encode_pool(2, {}), encode_pool(1, {"stranger": b"x"})):
        pool_file(folders["node-0"], 1).write_bytes(pool)
        with pytest.raises(RelayError, match="pool of round 1"):
            seat.collect(1, others("node-0"))
    pool_file(folders["node-0"], 1).write_bytes(encode_pool(1, {}))
    with pytest.raises(RelayError, match="too few have spoken"):
        seat.collect(1, others("node-0"))
    with pytest.raises(RelayError, match="never collected"):
        seat.publish(2, b"x")


def test_a_message_is_read_to_its_limit(folders: dict[str, Path]) -> None:
    play(folders, 1)
    heard = exchange(folders["node-0"]).collect(1, {"node-1": 5})
    assert heard["node-1"] == said("node-1", 1)[:6]  # one byte more: the wire sees that it is too long


def test_mistakes_of_the_operator_are_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["node-0"]
    with pytest.raises(ConfigError, match="node-9"):
        RelayExchange(folder, node="node-9")
    with pytest.raises(ConfigError, match="quorum is 4"):
        exchange(folder, quorum=4)
    with pytest.raises(ConfigError, match="max_bytes is 1000"):
        exchange(folder).publish(1, bytes(1001))
    play(folders, 1)
    (tmp_path / "other").mkdir()
    stolen = shutil.copytree(folder, tmp_path / "other" / "node-1")
    assert public_hex(read_key(stolen / "node.pem")) != public_hex(read_key(folders["node-1"] / "node.pem"))
    with pytest.raises(ConfigError, match="is not the key"):
        exchange(stolen)
    file = tmp_path / "mail.toml"
    for text, why in (
        ("", "needs run and rounds"), ('run = "a b"\nrounds = 1', "run: give"), ('run = "a"\nrounds = 0', "rounds: give"),
        ('run = "a"\nrounds = true', "rounds: give"), ('run = "a"\nrounds = 1\nmore = 2', "more is no key"), ("run", "TOML"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            read_mail(file)
    file.write_text('run = "a"\nrounds = 7')
    assert read_mail(file) == Mail(run="a", rounds=7)
    (folder / "heads" / f"{ROUNDS:06d}").write_text("0" * 64)
    with pytest.raises(ConfigError, match="begins round 4"):
        exchange(folder).publish(ROUNDS + 1, b"x")
