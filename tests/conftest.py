"""Nothing is fetched in tests, and nothing is written to the user's own cache unless a slow test asks for it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

# before anything imports the libraries, which read them once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import torch

from assay.config import Experiment, parse
from assay.engines.pool import Pool
from assay.federated.preparation import Prepared, prepare
from assay.progress import Silent


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Results to the last bit, whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own: the test must not lean on, or leave anything in, the user's."""
    before = os.environ.get("ASSAY_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ASSAY_CACHE"] = str(folder)
    yield folder
    os.environ.pop("ASSAY_CACHE") if before is None else os.environ.__setitem__("ASSAY_CACHE", before)


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest) -> Experiment:
    """The module's own experiment, its `TOML`."""
    return parse(tomllib.loads(request.module.TOML))


@pytest.fixture(scope="module")
def prepared(cache: Path, small: Experiment) -> Prepared:
    return prepare(small, Silent())


@pytest.fixture(scope="module")
def pool(prepared: Prepared, small: Experiment) -> Iterator[Pool]:
    with Pool(str(prepared.path), prepared.dtype, small.lora, small.workers) as made:
        yield made
