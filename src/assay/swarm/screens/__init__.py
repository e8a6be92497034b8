"""Screens of the swarm by name. A screen is a frozen value with `name` and `screen(pool, state)`.

Third parties add theirs under the entry point group `assay.swarm_screens`: a callable that takes the parameters of
`defence.params.<name>` and returns such a value.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.judge import make_judge, make_self_judge
from assay.swarm.screens.arithmetic import Arithmetic
from assay.swarm.screens.copycat import Copycat
from assay.swarm.screens.enrichment import Enrichment
from assay.swarm.screens.imports import Imports
from assay.swarm.screens.length import Length
from assay.swarm.screens.model import Logit, Seeded, TokenMask
from assay.swarm.screens.schema import Schema
from assay.verdict import AnyScreen

SCREENS: dict[str, Any] = {
    "arithmetic": Arithmetic,
    "copycat": Copycat,
    "enrichment": Enrichment,
    "imports": Imports,
    "judge": make_judge,
    "length": Length,
    "logit": Logit,
    "schema": Schema,
    "seeded": Seeded,
    "self_judge": make_self_judge,
    "token_mask": TokenMask,
}


def make(name: str, **params: Any) -> AnyScreen[Pool]:
    """The screen called `name`. ConfigError for an unknown name or parameter."""
    factory = SCREENS.get(name)
    if factory is None:
        found = [e for e in entry_points(group="assay.swarm_screens") if e.name == name]
        if not found:
            raise ConfigError(f"unknown screen {name!r}; known: {', '.join(sorted(SCREENS))}")
        factory = found[0].load()
    try:
        screen: AnyScreen[Pool] = factory(**params)
    except TypeError as error:
        raise ConfigError(f"screen {name}: {error}") from None
    return screen
