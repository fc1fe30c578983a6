"""The fused class of a module: a subclass of its own, whose forward is written from a graph with fused calls.

Where what the graph takes for granted no longer holds, a hook that was added since, say, it runs the original forward.
"""

import abc
import contextlib
import itertools
import linecache
import operator
import warnings
import weakref
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from .. import calls
from ..blocks import FusedResidual
from .lookups import Guard, Reads, Scanner, asks_super_of_its_class, same
from .matching import BATCH_NORMS, batch_norms, find_tails
from .tracing import LOCK, trace

FORMAT = 2  # of pickles, see restore


class Rewrite(NamedTuple):
    """A forward with fused calls, as source and the globals of that, and what it takes for granted."""

    source: str
    globals: tuple[tuple[str, object], ...]
    arguments: int
    argument_class: type | None
    guards: tuple[Guard, ...]


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
    try:
        with LOCK:
            return _plan(module, memory_efficient)
    except Exception as error:  # whatever a stranger's forward, class or attribute raises
        reason = str(error) if isinstance(error, _Refusal) else f"in a module that cannot be planned: {_told(error)}"
        return Plan({name: reason for name, _ in batch_norms(module)})


def _told(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _check(module):
    if isinstance(module, Fused | FusedResidual):
        raise _Refusal("already fused")
    if isinstance(module, torch.jit.ScriptModule):
        raise _Refusal("in a scripted module")
    if is_parametrized(module):
        raise _Refusal("in a parametrized module")
    if "forward" in module.__dict__:
        raise _Refusal("in a module whose forward was replaced on the instance")
    if any(type(child).__module__.startswith(("torch.ao.", "torchao.")) for child in module.children()):
        raise _Refusal("in a module made for quantisation")
    pickling = {"__reduce__": object.__reduce__, "__reduce_ex__": object.__reduce_ex__}
    for name in ("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"):
        if getattr(type(module), name, None) is not pickling.get(name):
            raise _Refusal(f"in a module whose class overrides {name}")
    if method := asks_super_of_its_class(type(module)):
        raise _Refusal(f"in a module whose {method} calls super() of its instance's class")


def _plan(module, memory_efficient):
    _check(module)
    planned, rewrite = _rewrite(module, memory_efficient, torch.Tensor)
    if rewrite is None:
        return planned
    rewrites = (rewrite,)
    if rewrite.argument_class is not None:  # the forward asks, and may take a list, too
        with contextlib.suppress(_Refusal):
            rewrites += _rewrite(module, memory_efficient, list)[1:]
    fused_class = _fused_class(type(module), memory_efficient, rewrites)
    object.__setattr__(object.__new__(type(module)), "__class__", fused_class)  # raises where it cannot be swapped
    if not fused_class._holds(module):
        raise _Refusal("in a forward that changes what it reads, or beside a patched class of torch's layers")
    return planned._replace(fused_class=fused_class)


def _rewrite(module, memory_efficient, argument_class):
    """The plan, but for the class, and the rewrite, in which an argument is of the class where the forward asks."""

    def is_without_hooks(name):
        layer = module.get_submodule(name)
        return calls.is_plain(layer, type(layer))

    tails, reasons = find_tails(module, _trace(module, True, Scanner(), is_without_hooks, argument_class)[0])
    # What is inside one Sequential is for that one's own forward.
    inlined = frozenset().union(*(tail.sequentials for tail in tails if not tail.is_inside_one))
    if all(tail.is_inside_one for tail in tails):
        return Plan(reasons), None
    scanner = Scanner()
    graph, asks = _trace(module, True, scanner, inlined.__contains__, argument_class)
    if _code(graph).src != _code(_trace(module, False, scanner, inlined.__contains__, argument_class)[0]).src:
        raise _Refusal("in a forward that differs between training and eval")
    tails, _ = find_tails(module, graph)
    fused = tuple(node.target for tail in tails for node in tail.batch_norms)
    bypassed = {step.target for tail in tails for step in tail.all_steps if step.op == "call_module"} | inlined
    for name in sorted(bypassed):
        _guard_bypassed(scanner, name, module.get_submodule(name))
    for convolution in (type(module.get_submodule(node.target)) for tail in tails for node in tail.convolutions):
        scanner.add(Guard("", "{0}.forward is {1}", (convolution, _FORWARDS[convolution])))
    _replace(graph, tails, memory_efficient)
    code, arguments = _code(graph), sum(node.op == "placeholder" for node in graph.nodes)
    argument_class = argument_class if asks else None
    rewrite = Rewrite(code.src, (*code.globals.items(),), arguments, argument_class, (*scanner.guards.values(),))
    return Plan(reasons, None, fused, inlined), rewrite


def _guard_bypassed(scanner, path, layer):
    """That the layer's call is still its class's forward, the one that was fused, and no more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    scanner.add(Guard(path, "type({module}) is {0} and 'forward' not in {module}.__dict__", (type(layer),)))
    scanner.add(Guard(path, f"not ({' or '.join(f'{{module}}.{name}' for name in hooks)})"))
    classes = type(layer), _FORWARDS.get(type(layer), type(layer).forward), nn.Module
    scanner.add(Guard("", "{0}.forward is {1} and {0}.__call__ is {2}.__call__", classes))


# Of torch's layers those that a tail replaces, whose classes somebody may have patched before fuse.
_FORWARDS = {cls: cls.forward for cls in (*BATCH_NORMS, *calls.CONVOLUTIONS, nn.ReLU, nn.Identity, nn.Sequential)}


def _trace(module, training, *arguments):
    try:
        return trace(module, training, *arguments)
    except Exception as error:
        mode = "training" if training else "eval"
        raise _Refusal(f"in a forward that cannot be traced in {mode}: {_told(error)}") from error


def _code(graph):
    for node in graph.nodes:
        node.type = None  # annotations would have to be imported
    return graph.python_code("self")


def _replace(graph, tails, memory_efficient):
    consumers = {tail.consumer: True for tail in tails if memory_efficient and tail.consumer}
    outputs = {}  # of convolutions that leave out their bias: output and bias
    for node in (node for tail in tails for node in tail.convolutions):
        with graph.inserting_before(node):
            options = (True,) if consumers.pop(node, False) else ()
            call = _call(graph, calls.convolve, node, *options)
            outputs[node] = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    for node in consumers:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_call(graph, calls.call_recomputing, node))
        graph.erase_node(node)
    for tail in tails:
        with graph.inserting_before(tail.add or tail.batch_norm):
            call = graph.call_function(*_fused_call(graph, tail, outputs))
        tail.steps[-1].replace_all_uses_with(call)
        for step in (*reversed(tail.all_steps), *tail.convolutions):
            graph.erase_node(step)


def _call(graph, function, node, *options):
    return graph.call_function(function, (graph.get_attr(node.target), *node.all_input_nodes, *options))


def _fused_call(graph, tail, outputs):
    """The function that computes the tail, its arguments, and those by name."""
    input, input_bias = outputs.get(tail.input, (tail.input, None))
    residual, residual_bias = outputs.get(tail.residual, (tail.residual, None))
    biases = {"input_bias": input_bias, "residual_bias": residual_bias}
    biases = {name: bias for name, bias in biases.items() if bias is not None}
    bn, *residual_bn = (graph.get_attr(node.target) for node in tail.batch_norms)
    if tail.add is None:
        return calls.call_batch_norm_relu, (bn, input), biases
    if not residual_bn:
        return calls.call_batch_norm_add_relu, (bn, input, residual, tail.adds_in_place), biases
    order = tail.adds_in_place, tail.normalizes_residual_first
    return calls.call_batch_norm_add_batch_norm_relu, (bn, input, *residual_bn, residual, *order), biases


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
        return _New(type(self)), tuple(arguments), *state


class _New(NamedTuple):
    """Makes an instance: for a copy of the class itself, out of a pickle of the original one, which is fused again."""

    fused_class: type

    def __call__(self, *arguments):
        return self.fused_class.__new__(self.fused_class, *arguments)

    def __reduce__(self):
        return restore, (FORMAT, self.fused_class._original_class, self.fused_class._recomputes)


def restore(format, original_class, *options):
    """What pickles name, and so stays: makes a module of the class, which is fused as soon as it has its state.

    Pickled is that there was a fused forward, not that forward: by now the class may have another one.
    """

    def new(*arguments):
        module = original_class.__new__(original_class, *arguments)
        if format == FORMAT:
            module.__dict__["__setstate__"] = partial(_set_state, module, *options)
        else:
            name = original_class.__name__
            warnings.warn(f"a {name} saved by another version of resnet_fused loads unfused: fuse it", stacklevel=2)
        return module

    return new


def _set_state(module, memory_efficient, state):
    del module.__dict__["__setstate__"]
    module.__setstate__(state)
    planned = plan(module, memory_efficient)
    if planned.fused_class is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in planned.reasons.items())
        warnings.warn(f"a {type(module).__name__} was saved fused, and loads unfused: {reasons}", stacklevel=3)
    else:
        module.__class__ = planned.fused_class


def _fused_class(original_class, memory_efficient, rewrites):
    for subclass in filter(is_fused, type.__subclasses__(original_class)):
        if subclass._recomputes is memory_efficient and same(subclass._rewrites, rewrites):
            return subclass
    # Functions of its own: torch.compile limits how often it compiles a code object.
    functions, file = _execute(original_class, rewrites)
    members = {name: getattr(original_class, name) for name in ("__doc__", "__module__", "__qualname__")}
    members |= {"__slots__": (), "forward": wraps(original_class.forward)(functions["forward"])}
    members |= {"_original_class": original_class, "_recomputes": memory_efficient, "_rewrites": rewrites}
    members["_holds"] = staticmethod(functions["holds_0"])
    # Not by the user's metaclass, which may keep a register of its classes.
    new = abc.ABCMeta.__new__ if isinstance(original_class, abc.ABCMeta) else type.__new__
    fused_class = new(type(original_class), original_class.__name__, (Fused, original_class), members)
    weakref.finalize(fused_class, linecache.cache.pop, file, None).atexit = False
    return fused_class


def _execute(original_class, rewrites):
    """The functions of a fused class by name, and the name of the file that tracebacks show of them."""
    namespace = {"original_class": original_class, "Proxy": fx.Proxy, "is_tracing": torch.jit.is_tracing}
    namespace["has_any_global_hook"] = _has_any_global_hook
    lines = ["def forward(self, *args, **kwargs):"]
    for i, rewrite in enumerate(rewrites):
        namespace[f"class_{i}"] = rewrite.argument_class
        # The forward may ask for None; another tracer, for whom layers are to be called, passes proxies.
        refused = "argument is None or isinstance(argument, Proxy)"
        lines += [
            f"    if len(args) + len(kwargs) == {rewrite.arguments}:",
            "        for argument in (*args, *kwargs.values()):",
            f"            if {f'type(argument) is not class_{i}' if rewrite.argument_class else refused}:",
            "                break",
            "        else:",
            f"            if holds_{i}(self):",
            f"                return rewritten_{i}(self, *args, **kwargs)",
        ]
    lines += ["    return original_class.forward(self, *args, **kwargs)"]
    for i, rewrite in enumerate(rewrites):
        lines += _source_of_guards(rewrite.guards, f"holds_{i}", namespace)
        lines += rewrite.source.strip().replace("def forward(", f"def rewritten_{i}(", 1).splitlines()
        namespace |= rewrite.globals
    file, source = f"<resnet_fused {original_class.__qualname__} {next(_count)}>", "\n".join(lines)
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), namespace)
    return namespace, file


_count = itertools.count()


def _source_of_guards(guards, name, namespace):
    """A function that tells whether all of them hold; the values that it needs go into the namespace."""
    variables, modules = {"": "self"}, []  # path -> the variable that has the module
    conditions = ["not has_any_global_hook()", "not is_tracing()"]
    for guard in guards:
        for path in itertools.accumulate(filter(None, guard.path.split(".")), "{}.{}".format):
            if path not in variables:
                parent, _, layer = path.rpartition(".")
                modules.append(f"        module_{len(variables)} = {variables[parent]}._modules[{layer!r}]")
                variables[path] = f"module_{len(variables)}"
        values = [f"_value_{len(namespace) + i}" for i in range(len(guard.values))]
        namespace |= zip(values, (v.compile() if isinstance(v, Reads) else v for v in guard.values), strict=True)
        conditions.append(guard.expression.format(*values, module=variables[guard.path]))
    yield from (f"def {name}(self):", "    try:", *modules)
    yield from (f"        if {' and '.join(f'({condition})' for condition in conditions)}:", "            return True")
    yield from ("    except Exception:", "        pass", "    return False")
