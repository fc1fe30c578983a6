"""The fused class of a module: a subclass of its own, whose forward is written from a graph with fused calls.

Where what the graph takes for granted no longer holds, a hook that was added since, say, it runs the original forward.
"""

import contextlib
import functools
import linecache
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.package import sys_importer

from .blocks import (
    FusedResidual,
    call_batch_norm_add_batch_norm_relu,
    call_batch_norm_add_relu,
    call_batch_norm_relu,
    call_recomputing,
    has_no_additions,
    is_plain,
)
from .matching import batch_norms, find_tails
from .tracing import Attribute, trace


def _fused_call(tail, bn, residual_bn=None):
    """The function that computes the tail, and its arguments; ``bn`` is the node of the batch norm's module."""
    if tail.add is None:
        return call_batch_norm_relu, (bn, tail.input)
    if residual_bn is None:
        return call_batch_norm_add_relu, (bn, tail.input, tail.residual, tail.adds_in_place)
    return call_batch_norm_add_batch_norm_relu, (bn, tail.input, residual_bn, tail.residual, tail.adds_in_place)


class Rewrite(NamedTuple):
    """The source of a forward with fused calls, and what it takes for granted."""

    source: str
    arguments: tuple[str, ...]
    argument_class: type | None
    layers: frozenset[tuple[str, type]]  # that the original forward calls, and this one does not
    attributes: frozenset[Attribute]

    def holds(self, module, arguments):
        for argument in arguments:
            if argument is None or (self.argument_class is not None and type(argument) is not self.argument_class):
                return False
        for path, layer_class in self.layers:
            if not has_no_additions(_layer(module, path), layer_class):
                return False
        for attribute in self.attributes:
            if not attribute.holds_in(_layer(module, attribute.path)):
                return False
        return not _has_any_global_hook()


def _layer(module, path):
    """The module's layer of that path, or None."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


class Plan(NamedTuple):
    """What may become of a module."""

    reasons: dict[str, str]  # by the name of each batch norm that is not fused
    fused_class: type | None = None
    fused: tuple[str, ...] = ()  # the names of the others
    inlined: frozenset[str] = frozenset()  # the names of the Sequentials whose layers the module now calls itself
    rewrites: tuple[Rewrite, ...] = ()
    graph: fx.Graph | None = None  # that of the first of them


class _Refusal(Exception):
    """Why a module cannot have a fused class."""


@contextlib.contextmanager
def _refusing(what):
    try:
        yield
    except Exception as error:  # whatever a stranger's forward raises
        message = str(error).partition("\n")[0]
        raise _Refusal(f"{what}: {type(error).__name__}: {message}") from error


def plan(module, memory_efficient=False):
    """The :class:`Plan` for the module, which stays as it is."""
    try:
        _check(module)
        return _plan(module, memory_efficient)
    except _Refusal as refusal:
        return Plan({name: str(refusal) for name, _ in batch_norms(module)})


def _check(module):
    if isinstance(module, Fused) or type(module) is FusedResidual:
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


def _plan(module, memory_efficient):
    found = _rewrite(module, memory_efficient, torch.Tensor)
    if not found.rewrites:
        return found
    rewrites = found.rewrites
    if rewrites[0].argument_class is not None:
        with contextlib.suppress(_Refusal):
            rewrites += _rewrite(module, memory_efficient, list).rewrites
    with _refusing("in a class that cannot be swapped"):
        fused_class = _fused_class(type(module), rewrites)
        object.__setattr__(object.__new__(type(module)), "__class__", fused_class)
    return found._replace(fused_class=fused_class, rewrites=rewrites)


def _rewrite(module, memory_efficient, argument_class):
    """The plan, but for the class, in which an argument is of ``argument_class`` where the forward asks."""

    def is_without_hooks(name):
        layer = module.get_submodule(name)
        return is_plain(layer, type(layer))

    tails, reasons = find_tails(module, _trace(module, True, is_without_hooks, argument_class).graph)
    # What is inside one Sequential is for that one's own forward.
    inlined = frozenset().union(*(tail.sequentials for tail in tails if not tail.is_inside_one))
    if all(tail.is_inside_one for tail in tails):
        return Plan(reasons)
    traces = [_trace(module, training, inlined.__contains__, argument_class) for training in (True, False)]
    if len({_code(traced.graph).src for traced in traces}) > 1:
        raise _Refusal("in a forward that differs between training and eval")
    graph = traces[0].graph
    tails, _ = find_tails(module, graph)
    bypassed = {step.target for tail in tails for step in tail.all_steps if step.op == "call_module"} | inlined
    for tail in tails:
        _replace(graph, tail)
        if memory_efficient and tail.consumer:
            _replace_consumer(graph, tail.consumer)
    with _refusing("its forward cannot be written down"):
        source = _source(graph)
    rewrite = Rewrite(
        source=source,
        arguments=tuple(node.target for node in graph.nodes if node.op == "placeholder"),
        argument_class=traces[0].argument_class,
        layers=frozenset((name, type(module.get_submodule(name))) for name in bypassed),
        attributes=frozenset(
            attribute
            for traced in traces
            for attribute in traced.attributes
            if attribute.full_name not in bypassed  # those must even be plain
        ),
    )
    fused = tuple(node.target for tail in tails for node in tail.batch_norms)
    return Plan(reasons, None, fused, inlined, (rewrite,), graph)


def _replace(graph, tail):
    with graph.inserting_before(tail.add or tail.batch_norm):
        call = graph.call_function(*_fused_call(tail, *(graph.get_attr(node.target) for node in tail.batch_norms)))
    tail.steps[-1].replace_all_uses_with(call)
    for step in reversed(tail.all_steps):
        graph.erase_node(step)


def _replace_consumer(graph, consumer):
    with graph.inserting_before(consumer):
        call = graph.call_function(call_recomputing, (graph.get_attr(consumer.target), *consumer.all_input_nodes))
    consumer.replace_all_uses_with(call)
    graph.erase_node(consumer)


def _trace(module, training, inlined, argument_class):
    with _refusing(f"in a forward that cannot be traced in {'training' if training else 'eval'}"):
        return trace(module, training, inlined, argument_class)


def _code(graph):
    for node in graph.nodes:
        node.type = None  # annotations would have to be imported
    return graph.python_code("self")


def _source(graph):
    code = _code(graph)
    used = {name: value for name, value in code.globals.items() if name in code.src}
    return f"{_format_import_block(used, sys_importer)}\n{code.src}"


class Fused:
    """The base of every fused class. Pickles and copies have the original class and the source to make it from."""

    __slots__ = ()

    def __reduce_ex__(self, protocol):
        _, (_, *arguments), *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (self._original_class, self._rewrites, *arguments), *state


def _new(original_class, rewrites, *arguments):
    fused_class = _fused_class(original_class, rewrites)
    return fused_class.__new__(fused_class, *arguments)


def original_class(module):
    """The class that the module had before it got its fused one."""
    return module._original_class


@functools.cache
def _fused_class(original_class, rewrites):
    runs = [(rewrite, _run(original_class, rewrite)) for rewrite in rewrites]

    @functools.wraps(original_class.forward)
    def forward(self, *args, **kwargs):
        for rewrite, run in runs:
            if len(args) + len(kwargs) == len(rewrite.arguments) and rewrite.holds(self, (*args, *kwargs.values())):
                return run(self, *args, **kwargs)
        return original_class.forward(self, *args, **kwargs)

    namespace = {
        "__doc__": original_class.__doc__,
        "__module__": original_class.__module__,
        "__qualname__": original_class.__qualname__,
        "__slots__": (),
        "_original_class": original_class,
        "_rewrites": rewrites,
        "forward": forward,
    }
    # The original class comes first, or instances could not change to this one.
    return type(original_class)(original_class.__name__, (original_class, Fused), namespace)


def _run(original_class, rewrite):
    """The function that the source defines."""
    filename = f"<resnet_fused {original_class.__qualname__} {hash(rewrite):x}>"
    linecache.cache[filename] = len(rewrite.source), None, rewrite.source.splitlines(keepends=True), filename
    namespace = {}
    exec(compile(rewrite.source, filename, "exec"), namespace)
    return namespace["forward"]
