"""A soak: many clients, many rounds, adapters of a real size; memory, seconds and bytes on the disk of each round.

`assay bench soak` writes results/soak.json after every round, and `python -m assay.bench.tables` makes its table. The
server's side is the real one: messages through the wire, contributions into a spool as they come, `run_round` with the
screens that need no model and an aggregator, ledger, metrics and checkpoint. The clients are simulated
(soak_clients.py) and answer one at a time, as a server hears them. Legend: N clients, D values.
"""

from __future__ import annotations

import json
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay import checkpoint, contribution, ledger, run_dir, spool, wire
from assay.bench.soak_clients import BASE, NOTICED, RUN, Clients, adapter
from assay.config import AggregationConfig, ConfigError
from assay.contribution import LoraUpdate, Refusal, Template, flatten
from assay.engines import journal
from assay.federated import aggregators, server_opt
from assay.federated.defence import Defence
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.screens import Duplicate, Neighbours, Norm, ProbeFilter, Structure
from assay.spool import Spool
from assay.verdict import Screen

SCREENS = ("structure", "norm", "probe", "neighbours", "duplicate")
PLAIN = wire.Limits(max_steps=0)
OPT = server_opt.make("fedavg")
KEPT = ("adapter/", "aggregator/")
ROWS = "soak.json"
MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How large a soak is."""

    clients: int = 1000
    rounds: int = 20
    values: int = 3_400_000
    malicious: float = 0.1
    screens: tuple[str, ...] = ("structure", "norm", "probe", "neighbours")
    aggregator: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.screens:
            if name not in SCREENS:
                raise ConfigError(f"--screens: {name!r} is none of a soak's; known: {', '.join(SCREENS)}")
        if min(self.clients, self.rounds, self.values) < 1 or not 0 <= self.malicious <= 1:
            raise ConfigError("--clients, --rounds and --values must be at least 1, --malicious in [0, 1]")


def bound(clients: int, values: int) -> int:
    """Bytes a round may take beyond what the process held before it, whatever the number of rounds.

    Adapters in float32: 24 (the state before and after, one message as bytes and as numbers, float64 sums, the
    checkpoint). A panel, and the next one while it is read; blocks with their float64 copies. For each pair of clients
    what rules of distances keep, for each client its verdicts and ledger lines.
    """
    panel = min(4 * contribution.PANEL_VALUES, clients * values // 4)
    return 24 * 4 * values + 2 * panel + 24 * 4 * contribution.BLOCK_VALUES + 48 * clients**2 + 64_000 * clients


def soak(settings: Settings, directory: Path) -> Iterator[dict[str, Any]]:
    """Play the rounds that are left in `directory`, a row each, written down when it is given.

    ConfigError where another soak is there, SpoolError where the disk is too small.
    """
    identity = {key: value for key, value in asdict(settings).items() if key != "rounds"}
    with journal.locked(directory):
        journal.claim(directory, {"soak": identity}, {"soak": identity}, "")
        spool.check_room(directory, settings.clients, flatten(adapter(settings.values)).size)
        clients = Clients.make(settings.clients, settings.values, settings.malicious, settings.seed)
        defence = Defence(level="soak", screens=tuple(_screens(clients, settings)))
        aggregate = aggregators.from_config(AggregationConfig(name=settings.aggregator), clients.initial)
        state = _start_or_resume(clients, directory)
        while state.round < settings.rounds:
            state, row = _play(state, clients, settings, defence, aggregate, directory)
            yield row
        journal.close(directory, settings.rounds, "")


def _start_or_resume(clients: Clients, directory: Path) -> ServerState:
    found = checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    if found is None:
        state = ServerState(round=0, adapter=clients.initial, initial=clients.initial, opt={})
        _write(directory, state, {"run": RUN}, {"round": 0})
        return state
    journal.publish(directory, found.step, found.meta["entry"], found.meta["row"])
    kept = {kind: {n.removeprefix(kind): v for n, v in found.tensors.items() if n.startswith(kind)} for kind in KEPT}
    return ServerState(
        round=found.step, adapter=kept["adapter/"], initial=clients.initial, opt={}, screens=found.meta["screens"],
        memory=kept["aggregator/"],
    )  # fmt: skip


def _screens(clients: Clients, settings: Settings) -> Iterator[Screen]:
    for name in settings.screens:
        if name == "structure":
            yield Structure()
        elif name == "norm":
            yield Norm(None)
        elif name == "probe":
            yield ProbeFilter(clients.probe(), 0.0)
        elif name == "neighbours":
            yield Neighbours(*clients.bank(), limit=1.0)
        else:
            yield Duplicate()


def _play(
    state: ServerState, clients: Clients, settings: Settings, defence: Defence, aggregate: aggregators.Aggregator,
    directory: Path,
) -> tuple[ServerState, dict[str, Any]]:  # fmt: skip
    memory, started = Peak(), time.perf_counter()
    with Spool(directory, state.adapter) as held:
        updates, refused = _hear(clients, state, held)
        heard = time.perf_counter()
        state, outcome = run_round(state, updates, refused, defence, aggregate, OPT, AggregationConfig(), 8)
        on_disk = held.bytes
        judged = time.perf_counter()
        _write(directory, state, outcome.ledger_body(), {"round": state.round, "weights": outcome.screened.weight})
    done = time.perf_counter()
    return state, {
        "round": state.round,
        "outcome": outcome.result,
        "clients": settings.clients,
        "values": flatten(state.adapter).size,
        "peak_bytes": memory.bytes(),
        "counted": memory.counted,
        "spool_bytes": on_disk,
        "run_bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "noticed": noticed(clients, outcome),
        "seconds": {
            "hear": heard - started,
            **outcome.seconds,
            "judge": judged - heard,
            "write": done - judged,
            "total": done - started,
        },
    }


def _hear(clients: Clients, state: ServerState, held: Spool) -> tuple[list[LoraUpdate], list[Refusal]]:
    """Everybody's message, one at a time, on its way to the disk."""
    shapes = {name: tuple(value.shape) for name, value in state.adapter.items()}
    template = Template(shapes=shapes, base_sha256=BASE, round=state.round + 1)
    updates, refused = [], []
    for name in clients.kinds:
        message = clients.message(name, template.round, state.adapter)
        if message is None:
            refused.append(wire.missing(name))
            continue
        read = wire.decode_update(message, template=template, run=RUN, participant=name, limits=PLAIN)
        del message  # or the next client's is made beside it
        if isinstance(read, LoraUpdate):
            updates.append(held.keep(read))
        else:
            refused.append(read)
        del read
    return updates, refused


def noticed(clients: Clients, outcome: Outcome) -> dict[str, Any]:
    """Whether each malicious client was refused for what it did, and what honest ones kept of their weight."""
    deciding, weight = outcome.screened.deciding, outcome.screened.weight
    bad = {name: kind for name, kind in clients.kinds.items() if kind != "honest"}
    right = [n for n, k in bad.items() if weight[n] == 0 and deciding[n].reason.value in NOTICED[k]]
    honest = [weight[name] for name in clients.kinds if name not in bad]
    return {
        "malicious": len(bad),
        "refused_rightly": len(right),
        "honest_weight_mean": sum(honest) / len(honest) if honest else None,
        "reasons": dict(sorted(Counter(deciding[n].reason.value for n in bad if n in deciding).items())),
    }


def _write(directory: Path, state: ServerState, entry: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    tensors = {f"adapter/{name}": value for name, value in state.adapter.items()}
    tensors |= {f"aggregator/{name}": value for name, value in state.memory.items()}
    journal.save(directory, state.round, tensors, {"screens": dict(state.screens)}, entry, row)


class Peak:
    """The most memory since it was made: of the process, by the kernel; of Python's allocations alone, where
    tracemalloc is on (tests: a count, the same on every machine)."""

    def __init__(self) -> None:
        self.counted = "tracemalloc" if tracemalloc.is_tracing() else _kernel()
        if self.counted == "tracemalloc":
            tracemalloc.reset_peak()
        elif self.counted == "VmHWM":
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def bytes(self) -> int:
        if self.counted == "tracemalloc":
            return tracemalloc.get_traced_memory()[1]
        if self.counted == "VmHWM":
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process began


def _kernel() -> str:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss"
    return "VmHWM"


def results(command: str, settings: Settings, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results/soak.json holds. A row's `before_bytes` is the process's memory as its soak began."""
    values = rows[0]["values"] if rows else settings.values
    return {
        "wing": "soak",
        "command": command,
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
        "machine": run_dir.machine(),
        "settings": {**asdict(settings), "values": values},
        "bound_bytes": bound(settings.clients, values),
        "in_memory_bytes": 4 * settings.clients * values,
        "rows": list(rows),
    }


def run(
    settings: Settings, directory: Path, path: Path | None, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole soak, or what is left of it; `path` is written after every round. ValueError where the ledger does not
    verify at its end. A round that ended with its process has no row: it was counted and not measured."""
    run_dir.commit()  # of what is run, whatever is committed meanwhile
    before, rows = Peak().bytes(), _measured(directory)
    for row in soak(settings, directory):
        rows.append({**row, "before_bytes": before})
        found = results(command, settings, rows)
        for where in (directory / ROWS, path):
            if where is not None:
                checkpoint.write_json(where, found)
        spent = row["seconds"]["total"]
        say(f"round {row['round']}/{settings.rounds}: {spent:.0f} s, peak {row['peak_bytes'] / MB:.0f} MB")
    verified = ledger.verify(directory / run_dir.LEDGER)
    if not verified.ok or verified.entries != settings.rounds + 2:
        told = f"{verified.problem}; {verified.entries} entries, expected {settings.rounds + 2}"
        raise ValueError(f"{directory}: the soak's ledger does not verify: {told}")
    return results(command, settings, rows)


def _measured(directory: Path) -> list[dict[str, Any]]:
    """Rows of the rounds so far."""
    path, found = directory / ROWS, checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() and found else []
    return [row for row in rows if found and row["round"] <= found.step]
