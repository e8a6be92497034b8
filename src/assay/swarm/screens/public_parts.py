"""What of a module a peer's program may use: held against the real module, as it is on this machine."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from functools import lru_cache

# of these modules no more than this; of the others what they make public
USABLE: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "abc": "ABC abstractmethod",
        "contextlib": "contextmanager suppress nullcontext closing ExitStack",
        "dataclasses": "dataclass field asdict astuple replace is_dataclass",
        "enum": "Enum IntEnum StrEnum Flag IntFlag auto unique",
        "functools": "reduce lru_cache cache partial cmp_to_key total_ordering cached_property",
        "types": "SimpleNamespace MappingProxyType NoneType",
        "typing": "Any AnyStr Callable ClassVar Collection Counter DefaultDict Deque Dict Final FrozenSet Generator Generic"
        " Hashable Iterable Iterator List Literal Mapping MutableMapping NamedTuple NoReturn Optional OrderedDict Protocol"
        " Self Sequence Set Sized SupportsFloat SupportsInt Text Tuple Type TypeVar Union TYPE_CHECKING cast overload",
    }.items()
}
UNUSABLE = {"operator": frozenset({"attrgetter", "methodcaller"}), "string": frozenset({"Formatter"})}


def listed(module: str, allowed: frozenset[str]) -> bool:
    """Whether a dotted module or one of its parents is allowed."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in allowed for i in range(len(parts)))


def submodule(module: str, name: str, allowed: frozenset[str]) -> str:
    """The listed module that `name` is in a module: `abc` in collections; "" where it is none, or none that is listed."""
    dotted = f"{module}.{name}"
    if dotted in allowed:
        return dotted
    real = _real(module, allowed)
    found = vars(real).get(name) if real else None
    if inspect.ismodule(found) and not name.startswith("_") and listed(found.__name__, allowed):
        return found.__name__
    return ""


@lru_cache(256)
def _real(module: str, allowed: frozenset[str]) -> types.ModuleType | None:
    """A listed module of the standard library; None for all others: a peer wrote the name, and nodes must agree."""
    parts = module.split(".")
    if not listed(module, allowed) or parts[0] not in sys.stdlib_module_names or any(p[:1] == "_" for p in parts):
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@lru_cache(256)
def public(module: str, allowed: frozenset[str]) -> frozenset[str]:
    """What a program may use of a module; empty where the module is not known here."""
    real = _real(module, allowed)
    if real is None:
        return frozenset()
    found = USABLE.get(module)
    if found is None:
        said = getattr(real, "__all__", None)
        found = frozenset(
            name
            for name, value in vars(real).items()
            if not name.startswith("_") and not inspect.ismodule(value)
            and (said is None or name in said or isinstance(value, (int, float, str, list)))
        )  # fmt: skip
    return found - UNUSABLE.get(module, frozenset())


def star(module: str, allowed: frozenset[str]) -> frozenset[str]:
    """What `from module import *` binds."""
    real = _real(module, allowed)
    if real is None:
        return frozenset({"*"})
    return frozenset(getattr(real, "__all__", None) or (n for n in vars(real) if not n.startswith("_")))


def hides(name: str, allowed: frozenset[str]) -> bool:
    """Whether a name in an unknown module could be a module that is not listed: random._os is os."""
    plain = name.lstrip("_")
    return name.startswith("_") or (plain in sys.stdlib_module_names and plain not in allowed)
