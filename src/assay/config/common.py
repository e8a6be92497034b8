"""What both wings' configurations stand on: frozen checked values, TOML in, one-line errors out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A mistake of the operator; the message is one line that says what to do."""


class Frozen(BaseModel):
    """Base of every table: no unknown keys, no changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(Frozen):
    """Base model: `smollm2-135m`, `tiny`, a local directory or a Hugging Face hub id."""

    name: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    template: Literal["chatml", "alpaca"] = "chatml"
    align: bool = True
    """Give the base its safety warm-up first (small base models refuse next to nothing). False for aligned models."""


class TrackConfig(Frozen):
    """Experiment trackers that show a run beside its own files (assay.track). No part of what a run is: they may be
    switched on and off between the parts of one run."""

    to: tuple[str, ...] = ()
    """`tensorboard`, `wandb`, `trackio`, one of another package, or `package.module:callable`."""
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Parameters of single trackers: `[track.params.wandb]` with `project = "mine"`."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.to)) < len(self.to):
            raise ValueError("to: one tracker is named twice")
        return self


class Root(Frozen):
    """A whole experiment of either wing."""

    name: str = "experiment"
    seed: int = 0

    def changed(self, **changes: Any) -> Self:
        """A checked copy; nested keys are joined by two underscores: `changed(defence__level="step")`."""
        values = self.model_dump()
        for key, value in changes.items():
            *path, last = key.split("__")
            at = values
            for part in path:
                at = at[part]
            at[last] = value
        return check(type(self), values)


Kind = TypeVar("Kind", bound=BaseModel)


def check(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Check values; every problem is one `ConfigError` line naming the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "experiment"
        raise ConfigError(f"{where}: {_say(kind, first)}") from None


def _say(kind: type[BaseModel], problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        known = _known(kind, problem["loc"])
        return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if problem["type"] == "value_error" else f"{message} (got {problem['input']!r})"


def _known(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the table in which the unknown key stands."""
    table: Any = kind
    for part in loc[:-1]:
        field = table.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        table = field.annotation
    return list(table.model_fields)
