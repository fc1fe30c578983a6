"""What a forward looks up beside its arguments, as guards: conditions under which a second look would find the same.

What can be compared cheaply is guarded, by identity or, of numbers and strings, by value. What cannot is refused.
"""

import dis
import enum
import re
import types
from typing import NamedTuple

import torch
from torch import nn

_SCALARS = (bool, int, float, complex, str, bytes)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_COMPARED = (*_SCALARS, tuple, types.BuiltinFunctionType)  # by value: a builtin method of a class is new at each look
_IMMUTABLE = (
    *(*_FUNCTIONS, type, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, type(torch.ops.aten.relu)),
)
_IS_ABOUT_A_MODE = re.compile(
    r"_?(is|are|get)_.*(enabled|dtype|default_device|precision|compiling|export|exporting|state|threads|initialized)$"
    r"|set_|(manual_|initial_)?seed"
)
_CANNOT_BE_FOLLOWED = {"type", "vars", "globals", "locals", "eval", "exec"}
_OWNERS = (types.ModuleType, type, type(None))  # of builtin functions; a list's append() changes the list


class Guard(NamedTuple):
    """An expression that must hold, of the module of that path, ``{module}``, and of the values, ``{0}``, ``{1}``."""

    path: str
    expression: str
    values: tuple = ()

    @classmethod
    def same(cls, path, expression, value):
        return cls(path, _same(expression, "{0}", value, "{1}"), (value, same))


class Reads(NamedTuple):
    """Names that a function reads of its module and closure, as expressions, and what they stood for."""

    function: types.FunctionType
    expressions: tuple[str, ...]
    values: tuple

    def compile(self):
        """A function that looks them up as that one does, and tells whether they are the same."""
        cells, names = _cells(self.function), [f"_{i}" for i in range(len(self.values))]
        conditions = " and ".join(map(_same, self.expressions, names, self.values))
        make = eval(f"lambda _same, {', '.join((*cells, *names))}: lambda: {conditions}", self.function.__globals__)
        return make(same, *cells.values(), *self.values)


def same(value, other):
    if value is other or type(value) is not type(other):
        return value is other
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(same, value, other))
    return isinstance(value, _COMPARED) and value == other


def _same(expression, name, value, function="_same"):
    is_compared = isinstance(value, _COMPARED) and not isinstance(value, bool)
    return f"{function}({expression}, {name})" if is_compared else f"{expression} is {name}"


def plain_class(module):
    """The module's class, of a fused one the original: fuse may swap a layer, and isinstance() answers the same."""
    return vars(type(module)).get("_original_class", type(module))


def is_constant(value):
    """Whether what a forward does with the value depends on which one it is, and on nothing that may change in it."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_constant, value))
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    return type(value) in _SCALARS or (isinstance(value, _IMMUTABLE) and isinstance(owner, _OWNERS))


def _refuse_unless_constant(name, value):
    if not is_constant(value):
        raise RuntimeError(f"it reads {name}, a {type(value).__name__}")
    of_torch = isinstance(value, (*_FUNCTIONS, type)) and (value.__module__ is None or _is_of_torch(value))
    if of_torch and _IS_ABOUT_A_MODE.match(value.__name__):
        raise RuntimeError(f"it asks or sets a mode of torch by {name}")


def _is_of_torch(thing):
    return (getattr(thing, "__module__", None) or "").split(".")[0] == "torch"


def _instructions(code):
    """The names and arguments of the code's instructions, and of those of the functions in it."""
    inner = [_instructions(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sum(inner, [(each.opname, each.argval) for each in dis.get_instructions(code)])


def _cells(function):
    """By name. Python's own, for super(), never changes."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {name: cell for name, cell in cells.items() if name != "__class__"}


def _function_of(value):
    """Of what a class has under a name, the function that a look at it, or a call, runs; or None."""
    value = value.fget if isinstance(value, property) else value.__func__ if isinstance(value, staticmethod) else value
    return value if isinstance(value, types.FunctionType) else None


def asks_super_of_its_class(cls):
    """The user's method that calls ``super(self.__class__, self)``, which in a subclass finds itself; or None."""
    bases = [base for base in cls.__mro__ if not issubclass(nn.Module, base) and not _is_of_torch(base)]
    for function in filter(None, (_function_of(value) for base in bases for value in vars(base).values())):
        names = [name for _, name in _instructions(function.__code__)]
        if any(name == "super" and {"type", "__class__"} & set(names[i + 1 : i + 4]) for i, name in enumerate(names)):
            return function.__qualname__
    return None


class Scanner:
    """Follows functions, without running them, to all that they read."""

    def __init__(self):
        self.guards = {}  # in order, each once
        self.asks = set()  # the builtins that they call
        self._followed = set()

    def add(self, guard):
        self.guards.setdefault((guard.path, guard.expression, *map(id, guard.values)), guard)

    def look_up(self, path, cls, name, every=False):
        """Guard what the class has under the name, and follow it. ``every``: what its bases have, too, for super()."""
        bases = [base for base in cls.__mro__ if not issubclass(nn.Module, base)]
        owners = [base for base in bases if name in vars(base)]
        if every and owners:
            self.add(Guard("", "{0}.__mro__ is {1}", (cls, cls.__mro__)))
            for base in set(bases) - set(owners):
                self.add(Guard("", f"{name!r} not in {{0}}.__dict__", (base,)))
        for base in owners if every else owners[:1]:
            value, is_first = vars(base)[name], base is owners[0]
            if function := _function_of(value):
                found = f"type({{module}}).{name}" if path and is_first else f"{{1}}.{name}"
                expected = value if isinstance(value, property) else function
                self.add(Guard(path, f"{found} is {{0}}", (expected, cls if is_first else base)))
                if is_first and (path or name != "forward"):
                    self.add(Guard(path, f"{name!r} not in {{module}}.__dict__"))
                self.follow(function, path, cls)
            else:
                _refuse_unless_constant(f"{path}.{name}".lstrip("."), value)
                self.add(Guard.same(path, f"{{module}}.{name}", value))

    def follow(self, function, path="", cls=None):
        """Guard what the function, one of the class, reads, and what the functions read that it calls by name."""
        for each in function if isinstance(function, tuple) else ():
            self.follow(each)
        if not isinstance(function, types.FunctionType) or _is_of_torch(function) or (function, cls) in self._followed:
            return
        self._followed.add((function, cls))
        cells, instructions = _cells(function), _instructions(function.__code__)
        found = {f"{name}.cell_contents": cell.cell_contents for name, cell in cells.items()}
        stored = set()
        for i, (opcode, name) in enumerate(instructions):
            if opcode in ("STORE_GLOBAL", "DELETE_GLOBAL") or (opcode == "STORE_DEREF" and name in cells):
                raise RuntimeError(f"it assigns to {name}")
            if opcode in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH"):
                raise RuntimeError("it catches exceptions")
            if opcode == "STORE_ATTR":
                stored.add(name)
                if instructions[i - 1][0] in ("LOAD_GLOBAL", "LOAD_DEREF"):
                    raise RuntimeError(f"it assigns to {instructions[i - 1][1]}.{name}")
            if opcode == "MATCH_CLASS":
                self.asks.add("isinstance")
            elif opcode == "LOAD_GLOBAL" and name in function.__globals__:
                found.update([_resolve(name, function.__globals__[name], instructions[i + 1 :])])
            elif opcode == "LOAD_GLOBAL":
                self.asks.add(name)
        for name in sorted(_CANNOT_BE_FOLLOWED & self.asks):
            raise RuntimeError(f"it calls {name}()")
        for name in stored:
            if any(text.endswith(f".{name}") for text in found):
                raise RuntimeError(f"it assigns to {name} of a class or module")
        defaults = (function.__defaults__ or ()) + tuple((function.__kwdefaults__ or {}).values())
        defaults = [(f"a default of {function.__name__}", default) for default in defaults if cls is None]
        # By importlib.reload() and the like a function gets other code.
        code = function.__code__, function.__defaults__
        self.add(Guard("", "{0}.__code__ is {1} and {0}.__defaults__ is {2}", (function, *code)))
        for name, value in (*defaults, *found.items()):
            _refuse_unless_constant(name.removesuffix(".cell_contents"), value)
            self.follow(value)
        if found:
            self.add(Guard("", "{0}()", (Reads(function, tuple(found), tuple(found.values())),)))
        for name in function.__code__.co_names if ("LOAD_GLOBAL", "super") in instructions else ():
            self.look_up(path, cls, name, every=True)


def _resolve(name, value, following):
    """The longest dotted name that the instructions read of modules and classes, and its value."""
    for opcode, attribute in (each for each in following if each[0] not in ("COPY", "DUP_TOP")):
        is_read = opcode in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, (types.ModuleType, type))
        if not is_read or not hasattr(value, attribute):
            break
        name, value = f"{name}.{attribute}", getattr(value, attribute)
    while getattr(value, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace" and value.__closure__:
        value = value.__wrapped__  # torch.fx has wrapped it while it traces
    return name, value
