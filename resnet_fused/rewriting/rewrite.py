"""The fused class of a module, whose forward is a graph with fused calls, or the original where a guard fails."""

import abc
import contextlib
import linecache
import warnings
import weakref
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import calls
from .lookups import Guard, Reads, Scanner, asks_super_of_its_class, same
from .matching import Tails, batch_norms
from .tracing import BATCH_NORMS, LOCK, trace

FORMAT = 2  # of pickles, see restore


class Plan(NamedTuple):
    """What may become of a module."""

    reasons: dict[str, str]  # by the name of each batch norm that is not fused
    fused_class: type | None = None
    fused: tuple[str, ...] = ()  # the names of the others
    inlined: frozenset[str] = frozenset()  # the names of the Sequentials whose layers the module now calls itself


class _Refusal(Exception):
    """Why a module cannot have a fused class."""


def plan(module, memory_efficient=False):
    """The :class:`Plan` for the module, which stays as it is. Never raises."""
    names = [""]
    try:
        names = [name for name, _ in batch_norms(module)]
        with LOCK:
            return _plan(module, memory_efficient) if names else Plan({})
    except Exception as error:  # whatever a stranger's forward, class or attribute raises
        reason = str(error) if isinstance(error, _Refusal) else f"in a module that cannot be planned: {_told(error)}"
        return Plan(dict.fromkeys(names, reason))


def _told(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _check(module):
    methods = ("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__")
    overridden = [name for name in methods if getattr(type(module), name, None) is not getattr(nn.Module, name, None)]
    children = [type(child).__module__ for child in module.children()]
    asking = asks_super_of_its_class(type(module))
    reasons = {
        "already fused": hasattr(type(module), "_original_class"),
        "in a scripted module": isinstance(module, torch.jit.ScriptModule),
        "in a parametrized module": is_parametrized(module),
        "in a module whose forward was replaced on the instance": "forward" in module.__dict__,
        "in a module made for quantisation": any(name.startswith(("torch.ao.", "torchao.")) for name in children),
        f"in a module whose class overrides {next(iter(overridden), None)}": overridden,
        f"in a module whose {asking} calls super() of its instance's class": asking,
    }
    for reason in (reason for reason, applies in reasons.items() if applies):
        raise _Refusal(reason)


def _plan(module, memory_efficient):
    _check(module)
    planned, rewrite, asks = _rewrite(module, memory_efficient, torch.Tensor)
    if rewrite is None:
        return planned
    rewrites = (rewrite,)
    if asks:  # it may take a list, too
        with contextlib.suppress(_Refusal):
            rewrites += _rewrite(module, memory_efficient, list)[1:2]
    fused_class = _fused_class(type(module), memory_efficient, rewrites)
    object.__setattr__(object.__new__(type(module)), "__class__", fused_class)  # raises where it cannot be swapped
    if not fused_class._holds(module):
        raise _Refusal("in a forward that changes what it reads, or beside a patched class of torch's layers")
    return planned._replace(fused_class=fused_class)


def _rewrite(module, memory_efficient, argument_class):
    """The plan, but for the class; the forward's source, and what that names; and whether the original asks for the
    class of an argument, which then is this one."""
    scanner, traced = Scanner(), []
    for mode in ("training", "eval"):
        try:
            traced.append(trace(module, mode == "training", scanner, argument_class))
        except Exception as error:
            raise _Refusal(f"in a forward that cannot be traced in {mode}: {_told(error)}") from error
    (graph, inlined, asks), (other_graph, *_) = traced
    if graph.python_code("self").src != other_graph.python_code("self").src:
        raise _Refusal("in a forward that differs between training and eval")
    tails = Tails(module, graph, memory_efficient)
    if not tails.fused:
        return Plan(tails.reasons), None, asks
    for name in sorted(bypassed := inlined | tails.bypassed):
        scanner.add(Guard(name, "{0}({module}, {1})", (calls.is_plain, type(module.get_submodule(name)))))
    for name in sorted(bypassed | tails.convolved):
        layer_class = type(module.get_submodule(name))
        expected = layer_class, _FORWARDS.get(layer_class, layer_class.forward), nn.Module
        scanner.add(Guard("", "{0}.forward is {1} and {0}.__call__ is {2}.__call__", expected))
    rewrite = _written(graph, scanner.guards.values(), argument_class if asks else None)
    return Plan(tails.reasons, None, tuple(tails.fused), inlined), rewrite, asks


# Of torch's layers those that a tail replaces, whose classes somebody may have patched before fuse.
_FORWARDS = {cls: cls.forward for cls in (*BATCH_NORMS, *calls.CONVOLUTIONS, nn.ReLU, nn.Identity, nn.Sequential)}

_FORWARD = """\
def forward(self, *args, **kwargs):
    for argument in (*args, *kwargs.values()):
        if {refuses}:
            break
    else:
        if len(args) + len(kwargs) == {count} and holds(self):
            return rewritten(self, *args, **kwargs)
    return (otherwise or original_class.forward)(self, *args, **kwargs)


def holds(self):
    try:
        {layers}
        return {conditions}
    except Exception:
        return False

"""


def _written(graph, guards, argument_class):
    """The source of a forward that runs the graph where the guards hold, and all that it names."""
    code, layers, conditions = graph.python_code("self"), {"": "self"}, ["not is_tracing()"]
    names = code.globals | {"Proxy": fx.Proxy, "is_tracing": torch.jit.is_tracing, "argument_class": argument_class}
    for guard in guards:
        values = {f"value_{len(names) + i}": value for i, value in enumerate(guard.values)}
        names |= values
        variable = layers.setdefault(guard.path, f"layer_{len(layers)}")
        conditions.append(f"({guard.expression.format(*values, module=variable)})")
    lookups = {path: "".join(f"._modules[{name!r}]" for name in path.split(".")) for path in layers if path}
    # The forward may ask for None; another tracer, for whom layers are to be called, passes proxies.
    refuses = "type(argument) is not argument_class", "argument is None or isinstance(argument, Proxy)"
    source = _FORWARD.format(
        count=sum(node.op == "placeholder" for node in graph.nodes),
        refuses=refuses[argument_class is None],
        layers="\n        ".join(f"{layers[path]} = self{lookup}" for path, lookup in lookups.items()),
        conditions=" and ".join(conditions),
    )
    return source + code.src.replace("def forward(", "def rewritten(", 1), tuple(names.items())


def is_fused(cls):
    """Whether it is a fused class, and not a subclass of one, of FSDP, say."""
    return "_original_class" in vars(cls)


class Fused(nn.Module):
    """The base of every fused class. Comes first among the bases, so that those of the user see no further subclass."""

    def __init_subclass__(cls, **arguments):
        if not is_fused(cls):
            super().__init_subclass__(**arguments)

    def __reduce_ex__(self, protocol):
        if not is_fused(type(self)):
            return super().__reduce_ex__(protocol)
        _, (_, *arguments), *state = super().__reduce_ex__(max(protocol, 2))
        return _New(type(self).__new__, type(self)), tuple(arguments), *state


class _New(partial):
    """Makes an instance: for a copy of the class itself, out of a pickle of the original one, which is fused again."""

    def __reduce__(self):
        (fused_class,) = self.args
        return restore, (FORMAT, fused_class._original_class, fused_class._recomputes)


def restore(format, original_class, *options):
    """What pickles name, and so stays: makes a module of the class, which is fused as soon as it has its state.

    Pickled is that there was a fused forward, not that forward: by now the class may have another one.
    """

    def new(*arguments):
        module = original_class.__new__(original_class, *arguments)
        name = original_class.__name__

        def set_state(state):
            del module.__dict__["__setstate__"]
            module.__setstate__(state)
            planned = plan(module, *options)
            module.__class__ = planned.fused_class or original_class
            if planned.fused_class is None:
                reasons = "; ".join(map(": ".join, planned.reasons.items()))
                warnings.warn(f"a {name} was saved fused, and loads unfused: {reasons}", stacklevel=2)

        if format == FORMAT:
            module.__dict__["__setstate__"] = set_state
        else:
            warnings.warn(f"a {name} saved by another version of resnet_fused loads unfused: fuse it", stacklevel=2)
        return module

    return new


def _fused_class(original_class, memory_efficient, rewrites):
    for subclass in type.__subclasses__(original_class):
        if same(vars(subclass).get("_rewrites"), rewrites) and subclass._recomputes is memory_efficient:
            return subclass
    functions = {"forward": None}
    for source, names in reversed(rewrites):
        variables = {"original_class": original_class, "otherwise": functions["forward"]}
        functions = variables | {name: v.compile() if isinstance(v, Reads) else v for name, v in names}
        file = f"<resnet_fused {original_class.__qualname__} {id(functions)}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks
        # Compiled for this class alone: torch.compile limits how often it compiles a code object.
        exec(compile(source, file, "exec"), functions)
        weakref.finalize(functions["forward"], linecache.cache.pop, file, None).atexit = False
    members = {name: getattr(original_class, name) for name in ("__doc__", "__module__", "__qualname__")}
    members |= {"__slots__": (), "forward": wraps(original_class.forward)(functions["forward"])}
    members |= {"_original_class": original_class, "_recomputes": memory_efficient, "_rewrites": rewrites}
    members["_holds"] = staticmethod(functions["holds"])
    # Not by the user's metaclass, which may keep a register of its classes.
    new = abc.ABCMeta.__new__ if isinstance(original_class, abc.ABCMeta) else type.__new__
    return new(type(original_class), original_class.__name__, (Fused, original_class), members)
