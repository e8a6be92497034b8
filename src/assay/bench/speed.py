"""What aggregators cost, side by side in one run: Assay's, byzfl's, Flower's, and the published rules restated plainly.

All get the same matrix and the same threads, one after the other, `repeats` times in turn; of each the fastest counts,
because whatever else the machine does only ever adds. The measure of all of them is one read of the data: the fastest of
two plain sums over it. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from assay import run_dir
from assay.bench.restated import rules
from assay.bench.soak import Peak
from assay.bench.soak_clients import STEP, adapter
from assay.contribution import flatten
from assay.federated import aggregators

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`values`: about so many; `f`: attackers the rules are told to bear."""

    clients: int = 20
    values: int = 3_400_000
    f: int = 4
    repeats: int = 3
    seed: int = 0


def matrix(settings: Settings) -> tuple[NDArray[np.float32], list[int]]:
    """delta_ND of clients that agree as honest clients do, and the adapter's layers."""
    tensors = adapter(settings.values)
    layers = [tensors[name].size for name in sorted(tensors)]
    rng, size = np.random.default_rng(settings.seed), flatten(tensors).size
    delta_ND = rng.standard_normal((settings.clients, size), np.float32)
    delta_ND += rng.standard_normal(size, np.float32)
    delta_ND *= np.float32(STEP)
    return delta_ND, layers


def ours(settings: Settings, layers: list[int]) -> dict[str, aggregators.Aggregator]:
    """Assay's rules by name."""
    f = {"f": settings.f}
    params: dict[str, dict[str, Any]] = {
        "trimmed_mean": f, "krum": f, "multi_krum": f, "bulyan": f, "dnc": f, "lasa": {"layers": tuple(layers)},
    }  # fmt: skip
    return {name: aggregators.make(name, **params.get(name, {})) for name in aggregators.AGGREGATORS}


def calls(settings: Settings, delta_ND: NDArray[np.float32], layers: list[int]) -> dict[tuple[str, str], Call]:
    """(rule, whose) -> one call on the matrix."""
    ones_N, flat = np.ones(len(delta_ND)), delta_ND.reshape(-1)
    shared = torch.from_numpy(delta_ND)  # the same memory
    out: dict[tuple[str, str], Call] = {
        ("read", "numpy"): lambda: float(np.dot(flat, flat)),
        ("read", "torch"): lambda: float(shared.sum()),
    }
    for name, rule in ours(settings, layers).items():
        out[name, "assay"] = lambda rule=rule: rule(delta_ND, ones_N)  # type: ignore[misc]
    for name, plain in rules(settings.f, layers).items():
        out[name, "restated"] = lambda plain=plain: plain(shared)  # type: ignore[misc]
    for name, theirs in _byzfl(settings.f).items():
        both = (("byzfl", delta_ND), ("byzfl, torch", shared))
        for kind, data in both[: 1 if name == "centred_clipping" else 2]:  # that one adds an array to a tensor
            out[name, kind] = lambda theirs=theirs, data=data: theirs(data)  # type: ignore[misc]
    out |= {(name, "flower"): call for name, call in _flower(settings, delta_ND).items()}
    return out


def _byzfl(f: int) -> dict[str, Callable[[Any], Any]]:
    """byzfl's aggregators alone: the package's own `__init__` imports torchvision, which they have no use for."""
    for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
        del sys.modules[name]  # a bare module has no spec, and find_spec takes what is there
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        return {}
    for name, folder in (("byzfl", ""), ("byzfl.aggregators", "aggregators"), ("byzfl.utils", "utils")):
        bare = types.ModuleType(name)
        bare.__path__ = [str(Path(next(iter(spec.submodule_search_locations))) / folder)]
        sys.modules[name] = bare
    rule = importlib.import_module("byzfl.aggregators.aggregators")
    return {
        "mean": rule.Average(), "median": rule.Median(), "trimmed_mean": rule.TrMean(f=f), "krum": rule.Krum(f=f),
        "multi_krum": rule.MultiKrum(f=f), "geometric_median": rule.GeometricMedian(),
        "centred_clipping": rule.CenteredClipping(),
    }  # fmt: skip


def _flower(settings: Settings, delta_ND: NDArray[np.float32]) -> dict[str, Call]:
    """Flower's functions on lists of arrays."""
    try:
        flower: Any = importlib.import_module("flwr.server.strategy.aggregate")
    except ImportError:
        return {}
    f, n = settings.f, settings.clients
    results = [([row_D], 1) for row_D in delta_ND]
    return {
        "mean": lambda: flower.aggregate(results),
        "median": lambda: flower.aggregate_median(results),
        "trimmed_mean": lambda: flower.aggregate_trimmed_avg(results, (f + 0.5) / n),
        "krum": lambda: flower.aggregate_krum(results, f, 0),
        "multi_krum": lambda: flower.aggregate_krum(results, f, n - f),
        "bulyan": lambda: flower.aggregate_bulyan(list(results), f, flower.aggregate_krum, to_keep=0),
    }


def measure(settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per rule and author: seconds (fastest, all), ratio to one read, memory beyond the matrix in bytes."""
    delta_ND, layers = matrix(settings)
    made = calls(settings, delta_ND, layers)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in made}
    memory: dict[tuple[str, str], int] = {}
    for turn in range(settings.repeats):
        for key, call in made.items():
            peak = Peak()
            before, at = peak.bytes(), time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - at)
            memory[key] = max(0, peak.bytes() - before)
            say(f"{turn + 1}/{settings.repeats} {key[0]} by {key[1]}: {seconds[key][-1]:.2f} s")
    read = min(min(spent) for (name, _), spent in seconds.items() if name == "read")
    return [
        {
            "rule": name, "by": by, "seconds": min(spent), "all_seconds": spent, "reads": min(spent) / read,
            "memory_bytes": memory[name, by], "matrix_bytes": delta_ND.nbytes,
        }
        for (name, by), spent in seconds.items()
    ]  # fmt: skip


def results(command: str, settings: Settings, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results/aggregators.json holds."""
    return {
        "wing": "speed",
        "command": command,
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
        "machine": {**run_dir.machine(), "threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "rows": rows,
    }
