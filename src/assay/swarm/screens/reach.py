"""What a program may reach: the modules of a list, of each its public parts that are no modules, and nothing by a string.

An allow-list over the syntax tree. A module is only ever the left side of a dot, so that it can be neither renamed, stored
nor handed on; its attributes are held against the real module. What reads attributes or runs text by a string is out, and
so is what changes how a class is made (`dataclass` runs text made of the names in `__annotations__`).
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from assay.swarm.screens.public_parts import hides, listed, public, star, submodule

# refused wherever they stand, also as a mere name: `run = exec`
REFUSED = frozenset({
    "__import__", "exec", "eval", "compile", "globals", "getattr", "setattr", "delattr", "breakpoint", "__builtins__",
    "__loader__", "__spec__", "importlib", "builtins", "get_type_hints", "ForwardRef",
    "attrgetter", "methodcaller", "import_module",
})  # fmt: skip
# refused where called, or where used without having been given a value: honest programs have a variable called `open`
GUARDED = frozenset({"open", "memoryview", "input"})
# refused but after a plain `vars = ...` of the program's own; `help("thief")` imports
SOFT = frozenset({"vars", "locals", "help"})
# attributes refused on anything: they read attributes by a string, load modules, or are where a module would turn up
INDIRECT = frozenset({
    "attrgetter", "methodcaller", "modules", "import_module", "get_type_hints", "ForwardRef", "get_field", "vformat",
    "format_field", "get_value", "meta_path", "path_hooks", "path_importer_cache", "find_spec", "find_module",
    "find_loader", "load_module", "exec_module", "create_module", "module_from_spec", "update_wrapper",
})  # fmt: skip
FRAMES = frozenset(
    name
    for kind in (types.FrameType, types.TracebackType, types.CodeType, types.GeneratorType, types.CoroutineType,
                 types.AsyncGeneratorType)
    for name in dir(kind)
    if name.startswith(("f_", "tb_", "co_", "gi_", "cr_", "ag_"))
)  # fmt: skip
POWERFUL = frozenset({"sys", "os", "builtins", "bltns", "importlib", "pkgutil", "runpy", "inspect", "gc", "ctypes"})
HARMLESS_DUNDERS = frozenset(
    {"__init__", "__name__", "__doc__", "__post_init__", "__len__", "__str__", "__repr__", "__add__"}
)
PLAIN_DUNDERS = frozenset({"__name__", "__doc__", "__slots__", "__all__", "__version__", "__author__", "__hash__"})
HARMLESS_UNDERSCORES = frozenset({"_replace", "_asdict", "_make", "_fields", "_value_", "_name_"})
# special methods: a class may have its own, by `def` alone
METHODS = HARMLESS_DUNDERS | {
    name for methods in map(dir, (int, float, str, list, dict, set, type(iter([])))) for name in methods if name[:2] == "__"
} | {"__enter__", "__exit__", "__call__", "__missing__", "__getattr__", "__bool__", "__set_name__", "__get__", "__set__",
     "__matmul__", "__copy__", "__deepcopy__"}  # fmt: skip
METHODS -= {"__class__", "__class_getitem__", "__dict__", "__doc__", "__name__"}
TWO = "two modules"  # by one name: nothing can be said of it, and no such module is ever listed
BUILTIN_PATTERNS = frozenset({"int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "set", "frozenset"})
TYPE_READERS = frozenset({"print", "str", "repr", "isinstance", "issubclass"})


@dataclass(frozen=True, slots=True)
class Program:
    """What has to be known of a whole program before one of its nodes can be judged."""

    allowed: frozenset[str]
    modules: dict[str, str]  # names that stand for modules, and for which
    freed: dict[str, int]  # names that are plain values from the end of this line on, whatever they were before
    stored: frozenset[str]  # names given a value otherwise than by an import
    own: frozenset[str]  # attributes and methods that the program itself makes
    dataclass: frozenset[str]  # names of dataclasses.dataclass
    shadowed: dict[ast.AST, frozenset[str]]  # parameters in whose reach a node stands
    parents: dict[ast.AST, ast.AST]


def reaches(tree: ast.Module, allowed: frozenset[str]) -> list[tuple[int, str]]:
    """Line and objection, for everything in the tree that is not allowed."""
    program = _survey(tree, allowed)
    return [(getattr(node, "lineno", 0), said) for node in program.shadowed for said in _of(node, program)]


def _survey(tree: ast.Module, allowed: frozenset[str]) -> Program:
    modules: dict[str, str] = {}
    own: set[str] = set()
    stored: set[str] = set()
    unsure: set[str] = set()  # names that change at a place that may run at any time, or not at all
    parents: dict[ast.AST, ast.AST] = {}
    shadowed: dict[ast.AST, frozenset[str]] = {tree: frozenset()}
    top = {id(statement) for statement in tree.body}
    everywhere = {n for node in ast.walk(tree) if isinstance(node, (ast.Global, ast.Nonlocal)) for n in node.names}
    everywhere |= {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in top
        for name, _ in _bound_modules(node, allowed)
    }
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        outside = shadowed[node]
        inside = outside | (_parameters(node) - everywhere)
        body = {id(part) for part in _body(node)}  # defaults and decorators stand outside
        for child in ast.iter_child_nodes(node):
            parents[child], shadowed[child] = node, inside if id(child) in body else outside
            waiting.append(child)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, module in _bound_modules(node, allowed):
                modules[name] = module if modules.get(name, module) == module else TWO
                unsure |= {name} if parents[node] is not tree else set()
        elif isinstance(node, (ast.Name, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            name = node.id if isinstance(node, ast.Name) else node.attr
            own.add(name)
            stored |= {name} if isinstance(node, ast.Name) else set()
            unsure |= {name} if isinstance(node.ctx, ast.Del) else set()
        elif isinstance(node, ast.arg):
            stored.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            stored.add(node.name)
            own.add(node.name)
    freed: dict[str, int] = {}
    for statement in tree.body:  # these run once and in order
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            for name, _ in _bound_modules(statement, allowed):
                freed.pop(name, None)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name) and target.id not in unsure:
                    freed.setdefault(target.id, statement.end_lineno or statement.lineno)
    decorators = frozenset(
        alias.asname or alias.name
        for node in shadowed
        if isinstance(node, ast.ImportFrom) and node.module == "dataclasses"
        for alias in node.names
        if alias.name == "dataclass"
    )
    return Program(allowed, modules, freed, frozenset(stored), frozenset(own), decorators, shadowed, parents)


def _parameters(node: ast.AST) -> set[str]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return set()
    given = node.args
    return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a}


def _body(node: ast.AST) -> Sequence[ast.AST]:
    if isinstance(node, ast.Lambda):
        return [node.body]
    return node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else []


def _bound_modules(node: ast.Import | ast.ImportFrom, allowed: frozenset[str]) -> Iterator[tuple[str, str]]:
    """The names that an import binds to modules, and to which."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif submodule(node.module or "", alias.name, allowed):
            yield alias.asname or alias.name, submodule(node.module or "", alias.name, allowed)


def _of(node: ast.AST, program: Program) -> Iterator[str]:
    """The objections to one node."""
    for name in _names(node):
        if (_dunder(name) and name not in PLAIN_DUNDERS) or (isinstance(node, ast.alias) and name[:2] == "__"):
            yield f"use of {show(name)}"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from _imports(node, program.allowed)
        scope = program.parents[node]
        while not isinstance(scope, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope = program.parents[scope]
        if isinstance(scope, ast.ClassDef):  # its attributes would be modules
            yield "an import in a class"
    elif isinstance(node, ast.Name):
        yield from _name(node, program)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in GUARDED | SOFT:
            yield f"use of {show(node.func.id)}"
    elif isinstance(node, ast.Attribute):
        module = _module(node.value, program)
        if module is not None:
            yield from _part(module, node, program)
        elif _unlisted(node, program):
            yield f"use of .{show(node.attr)}"
    elif isinstance(node, ast.MatchClass):  # `case object(__class__=c)` reads attributes, `case A(c)` by __match_args__
        yield from (
            f"use of .{show(a)}" for a in node.kwd_attrs if a.startswith("_") or a in INDIRECT | FRAMES | POWERFUL
        )
        builtin = isinstance(node.cls, ast.Name) and node.cls.id in BUILTIN_PATTERNS - program.stored
        if node.patterns and not builtin:
            yield "a pattern of a class by position"
    elif isinstance(node, ast.ClassDef):
        if node.keywords:
            yield f"use of {show(node.keywords[0].arg or '**')} in a class"
    elif isinstance(node, (ast.Global, ast.Nonlocal)):
        yield from (f"use of {show(name)}" for name in node.names if name in REFUSED or name[:2] == "__")


def _part(module: str, node: ast.Attribute, program: Program) -> Iterator[str]:
    """The objections to a dot behind a module."""
    known = public(module, program.allowed)
    if submodule(module, node.attr, program.allowed):
        if not isinstance(program.parents[node], ast.Attribute):
            yield f"use of {show(f'{module}.{node.attr}')} as a value"
    elif not listed(module, program.allowed):
        if module == TWO or any(
            name.startswith(f"{module}.") for name in program.allowed
        ):  # else its import was refused
            yield f"use of .{show(node.attr)}"
    elif _unknown(node.attr, known, program.allowed):
        yield f"use of .{show(node.attr)}"
    elif module == "dataclasses" and node.attr == "dataclass" and not _decorates(node, program):
        yield "use of dataclass but on a plain class"
    if not isinstance(node.ctx, ast.Load):
        yield f"change of {show(module)}"


def _decorates(node: ast.expr, program: Program) -> bool:
    """Whether this, called or not, comes first to a class without bases, which cannot have been forged."""
    user = program.parents[node]
    if isinstance(user, ast.Call) and user.func is node:
        node, user = user, program.parents[user]
    return isinstance(user, ast.ClassDef) and not user.bases and user.decorator_list[-1:] == [node]


def _names(node: ast.AST) -> Iterator[str]:
    """Names that a node gives to something without an `ast.Name`; special methods are named by `def`."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node.name if node.name not in METHODS else ""
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, (ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        yield node.name or ""
    elif isinstance(node, ast.MatchMapping):
        yield node.rest or ""
    elif isinstance(node, ast.alias):
        yield node.asname or ""


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _imports(node: ast.Import | ast.ImportFrom, allowed: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import of {show(a.name)}" for a in node.names if not listed(a.name, allowed))
        return
    module = node.module or ""
    for alias in node.names:
        name = f"{'.' * node.level}{module}"
        if node.level or not (listed(module, allowed) or f"{module}.{alias.name}" in allowed):
            yield f"import of {show(name)}"
        elif alias.name == "*":
            if not star(module, allowed) <= public(module, allowed):
                yield f"import of {show(name)}.*"
        elif not submodule(module, alias.name, allowed) and _unknown(alias.name, public(module, allowed), allowed):
            yield f"import of {show(f'{name}.{alias.name}')}"


def _unknown(name: str, known: frozenset[str], allowed: frozenset[str]) -> bool:
    """Whether a module that makes `known` public has no such part to use; nothing is known of some modules."""
    return name not in known if known else hides(name, allowed)


def _name(node: ast.Name, program: Program) -> Iterator[str]:
    load = isinstance(node.ctx, ast.Load)
    # within a class `__m` is another name, `_A__m`
    dunder = node.id[:2] == "__" and node.id not in PLAIN_DUNDERS
    soft = node.id in SOFT and load and node.lineno <= program.freed.get(node.id, node.lineno)
    if node.id in REFUSED or dunder or soft or (node.id in GUARDED and load and node.id not in program.stored):
        yield f"use of {show(node.id)}"
    elif node.id == "type" and load and not _reads_type(node, program):
        yield "use of type"
    elif load and node.id in program.dataclass and not _decorates(node, program):
        yield "use of dataclass but on a plain class"
    elif load and _module(node, program) is not None and not isinstance(program.parents[node], ast.Attribute):
        yield f"use of {show(node.id)} as a value"


def _reads_type(node: ast.Name, program: Program) -> bool:
    """`type(x) == int`, `print(type(x))`, `type(x).__name__`: nothing that could make a class."""
    call = program.parents[node]
    if not isinstance(call, ast.Call) or call.func is not node or len(call.args) != 1 or call.keywords:
        return False
    user = program.parents[call]
    if isinstance(user, ast.Call):
        return isinstance(user.func, ast.Name) and user.func.id in TYPE_READERS - program.stored
    return isinstance(user, (ast.Compare, ast.FormattedValue)) or (
        isinstance(user, ast.Attribute) and user.attr == "__name__"
    )


def _module(node: ast.expr, program: Program) -> str | None:
    """The module that a chain of names stands for; None where it is none."""
    if isinstance(node, ast.Name):
        freed = node.lineno > program.freed.get(node.id, node.lineno)
        return None if freed or node.id in program.shadowed[node] else program.modules.get(node.id)
    if isinstance(node, ast.Attribute):
        module = _module(node.value, program)
        return None if module is None else submodule(module, node.attr, program.allowed) or None
    return None


def _unlisted(node: ast.Attribute, program: Program) -> bool:
    """Whether an attribute of something that is no module is objected to."""
    name = node.attr
    if name in INDIRECT or name in FRAMES:
        return True
    if _dunder(name):
        return name not in HARMLESS_DUNDERS
    self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    if self or name in program.own:
        return False
    return name in POWERFUL or (name.startswith("_") and name not in HARMLESS_UNDERSCORES)


def show(name: str) -> str:
    """A peer's name, short and on one line."""
    return name[:40] if name.isprintable() else ascii(name[:40])
