"""Swap the residual blocks of any model for fused ones, in place, and back.

A block is known by its layers and its forward: children named as :class:`Residual`'s, and a ``torch.fx`` trace of its
forward that takes the same steps. What is not equal is left alone, and the report says why.
"""

import copy
import operator
import random
import sys
import types
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .blocks import FusedResidual, Residual, _is_plain

_LAYERS = ("conv1", "conv2", "bn1", "bn2")  # and conv3: None, absent or a layer

_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}

# Attributes of a block that its forward cannot change other than by assignment.
_CONSTANTS = (bool, int, float, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)

# What a class may define of its own without changing how Python and nn.Module treat its instances.
_HARMLESS_OVERRIDES = {"__init__", "forward", "extra_repr", "__repr__", "__annotate_func__"}


class Swapped(NamedTuple):
    """A block whose class was swapped: its name in the model, and the name of its original class."""

    name: str
    class_name: str


class Left(NamedTuple):
    """A module that was left alone, and why."""

    name: str
    class_name: str
    reason: str


@dataclass
class Report:
    """What :func:`fuse` and :func:`unfuse` did. ``print`` it."""

    fused: list[Swapped] = field(default_factory=list)
    unfused: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self):
        lines = []
        for verb, modules in (("fused", self.fused), ("unfused", self.unfused), ("left", self.left)):
            if modules:
                lines.append(f"{verb} {len(modules)}:")
            for name, class_name, *reason in modules:
                lines.append(": ".join([f"  {name or 'the model'} ({class_name})", *reason]))
        if not self.fused and not self.unfused:
            lines.insert(0, "nothing was changed")
        return "\n".join(lines)


def fuse(model, filter_fn=None):
    """Turn every residual block of ``model`` into a :class:`FusedResidual`, in place.

    A block is swapped by giving the module the fused class: references to it, its hooks, its layers, parameters and
    ``state_dict`` stay as they are, and ``model`` itself may be a block. Recognised are blocks of any class whose
    layers are named ``conv1``, ``conv2``, ``bn1``, ``bn2`` and, optionally, ``conv3``, and whose forward takes the
    steps of :class:`Residual`'s in training and in eval, however add and ReLU are spelled. Until :func:`unfuse`, such a
    block has the methods and class attributes of FusedResidual, not of its own class, takes its input by position,
    calls no ReLU child, and its output has the dtype of ``bn2``'s, as after ``Y += X``.

    Args:
        model: any nn.Module. Lazy layers need a first batch before. Fuse before ``torch.compile``.
        filter_fn: ``filter_fn(module, name) -> bool``, asked about each block that could be swapped; False leaves it.

    Returns:
        Report: ``fused``, the blocks that were swapped, and ``left``, with the reason, the modules that look like a
        block or directly own a batch norm, and were not.

    Raises:
        TypeError: model is not an nn.Module.

    Whatever is raised, by ``filter_fn`` too, leaves the model as it was.
    """
    report, blocks = Report(), []
    for name, module in _named_modules(model):
        if not _is_candidate(module):
            continue
        reason = _reason_to_leave(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn said no"
        if reason is None:
            blocks.append(module)
            report.fused.append(Swapped(name, type(module).__name__))
        else:
            report.left.append(Left(name, type(module).__name__, reason))
    for block in blocks:  # only now, when nothing can fail any more
        added = {} if "conv3" in block.__dict__ or "conv3" in block._modules else {"conv3": None}
        block.__dict__.update(added, _before_fuse=(type(block), tuple(added)))
        block.__class__ = FusedResidual
    return report


def unfuse(model):
    """Give every :class:`FusedResidual` of ``model`` its original class back, in place: what :func:`fuse` did, undone.

    A block that was built as a FusedResidual becomes a :class:`Residual`.

    Returns:
        Report: ``unfused``, with the classes the blocks have now; ``left``, instances of a subclass of FusedResidual.

    Raises:
        TypeError: model is not an nn.Module.
    """
    report = Report()
    for name, module in _named_modules(model):
        if type(module) is FusedResidual:
            original_class, added = module.__dict__.pop("_before_fuse", (Residual, ()))
            for attribute in added:
                del module.__dict__[attribute]
            module.__class__ = original_class
            report.unfused.append(Swapped(name, original_class.__name__))
        elif isinstance(module, FusedResidual):
            report.left.append(Left(name, type(module).__name__, "a subclass of FusedResidual"))
    return report


def _named_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return model.named_modules()  # a module under two names comes once


def _children(module):
    return {name: child for name, child in module._modules.items() if child is not None}


def _missing_layers(module):
    return [name for name in _LAYERS if name not in _children(module)]


def _is_candidate(module):
    owns_batch_norm = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in _children(module).values())
    return owns_batch_norm or not _missing_layers(module)


def _reason_to_leave(module):
    """Why the module cannot become a FusedResidual, or None."""
    if type(module) is FusedResidual:
        return "already fused"
    if missing := _missing_layers(module):
        return f"not a residual block: no {', '.join(missing)}"
    return _reason_of_class(module) or _reason_of_layers(module) or _reason_of_forward(module)


def _reason_of_class(block):
    """What the block has of its own and would lose with its class."""
    if isinstance(block, torch.jit.ScriptModule):
        return "a scripted module"
    if is_parametrized(block):
        return "it is parametrized"
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    own_classes = [base for base in type(block).__mro__ if not issubclass(nn.Module, base)]
    own_names = {name for base in own_classes for name, value in vars(base).items() if callable(value)}
    special = {name for name in own_names if hasattr(nn.Module, name) or name.startswith("__")}
    if overridden := special - _HARMLESS_OVERRIDES:
        return f"its class overrides {', '.join(sorted(overridden))}"
    try:
        object.__setattr__(object.__new__(type(block)), "__class__", FusedResidual)
    except TypeError as error:  # __slots__, for one
        return f"its class cannot be swapped: {error}"
    return None


def _reason_of_layers(block):
    for name, layer in _children(block).items():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            return f"{name} is lazy and not initialised: run one batch first"
        if name in ("bn1", "bn2") and not isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            return f"{name}: expected a BatchNorm2d, got {type(layer).__name__}"
    if block.__dict__.get("conv3") is not None:
        return f"conv3: expected a layer or None, got {type(block.conv3).__name__}"
    return None


def _reason_of_forward(block):
    """How the block's forward, traced in training and in eval, differs from Residual's, or None."""
    for training in (True, False):
        mode = "training" if training else "eval"
        try:
            graph = _trace(block, training)
        except Exception as error:  # whatever a stranger's forward raises
            message = str(error).partition("\n")[0]
            return f"its forward cannot be traced in {mode}: {type(error).__name__}: {message}"
        if difference := _Comparison(block, graph).difference():
            return f"its forward differs in {mode}: {difference}"
    return None


class _InPlaceProxy(fx.Proxy):
    """fx records ``Y += X`` as ``Y + X``, but ``X += Y`` on the block's input is not ``X + Y``."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Every layer is one step; what changes how steps run, and is no step itself, is refused."""

    proxy_buffer_attributes = True  # else a forward that counts its calls would count in the real buffer

    def trace(self, root):
        self._modes = _modes()
        return super().trace(root)

    def create_node(self, *args, **kwargs):
        if _modes() != self._modes:
            raise RuntimeError("it runs steps under no_grad, autocast, checkpointing or the like")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module, module_qualified_name):
        return True

    def proxy(self, node):
        return _InPlaceProxy(node, self)


def _modes():
    torch.autocast_increment_nesting()
    autocast_depth = torch.autocast_decrement_nesting()  # counts autocast(enabled=False), too
    saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_depth, saved_tensors_hooks


def _random_states():
    """Where the generators stand that a forward may draw from: a trace shows one draw's branch, and not the draw."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state().tolist(), numpy and numpy.random.get_state()[2]


def _shell(module, training):
    """A stand-in for tracing: of the module's class, sharing its tensors, without what a trace could change in it."""
    blank = nn.Module().__dict__
    shell = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if name in blank or isinstance(value, _CONSTANTS):
            shell.__dict__[name] = copy.copy(value)
    shell.__dict__["training"] = training
    return shell


def _trace(block, training):
    """The graph of the block's forward in one mode. RuntimeError where the graph is not all that the forward does."""
    shell = _shell(block, training)
    for name, child in _children(block).items():
        shell._modules[name] = _shell(child, training)
    attributes, random_states = dict(shell.__dict__), _random_states()
    with torch.set_grad_enabled(training):  # a grad mode that the forward sets differs from one of the two
        graph = _Tracer().trace(shell)
    if _random_states() != random_states:
        raise RuntimeError("it draws random numbers")
    assigned = [name for name, value in shell.__dict__.items() if attributes.get(name, shell) is not value]
    if assigned:
        raise RuntimeError(f"it assigns to {', '.join(assigned)}")
    return graph


class _Comparison:
    """Of the graph of a block's forward with the steps of Residual's."""

    def __init__(self, block, graph):
        self.block = block
        self.graph = graph
        self.matched = set()

    def difference(self):
        """The first one, seen from the output, or None."""
        X = ("input",)
        Y = ("bn2", ("conv2", ("relu", ("bn1", ("conv1", X)))))
        expected = ("output", ("relu", ("add", Y, ("conv3", X) if "conv3" in _children(self.block) else X)))
        *_, output = self.graph.nodes
        if mismatch := self._mismatch(output, expected):
            return mismatch
        further = [self._label(node) for node in self.graph.nodes if node not in self.matched]
        return f"besides, it has {', '.join(further)}" if further else None

    def _mismatch(self, node, expected):
        self.matched.add(node)
        label, *expected_inputs = expected
        inputs = self._inputs(node)
        if label == "add":
            inputs.sort(key=lambda input: self._label(input) != "bn2")
        got_labels = [self._label(input) for input in inputs]
        expected_labels = [expected_input[0] for expected_input in expected_inputs]
        if got_labels != expected_labels:
            return f"expected {label}({', '.join(expected_labels)}), got {label}({', '.join(got_labels)})"
        return next(filter(None, map(self._mismatch, inputs, expected_inputs)), None)

    def _label(self, node):
        """What the node does: a step of Residual's forward, or anything else that says it is none."""
        if not isinstance(node, fx.Node):
            return repr(node)
        if node.op == "placeholder":
            is_input = node.prev.op == "root" and not node.target.startswith("*")
            return "input" if is_input else f"argument {node.target}"
        if node.op == "get_attr":
            return f"self.{node.target}"
        if node.op == "call_module":
            return node.target if node.target in (*_LAYERS, "conv3") else self._label_of_module(node.target)
        if node.target in _RELUS:
            return "relu"
        if node.target in _IN_PLACE_ADDS and self._label(node.args[0]) != "bn2":
            return f"in-place add to {self._label(node.args[0])}"
        if node.target in _ADDS | _IN_PLACE_ADDS:
            return "add"
        return f"{getattr(node.target, '__name__', node.target)}()"

    def _label_of_module(self, name):
        module = self.block.get_submodule(name)
        if type(module) is not nn.ReLU:
            return f"{type(module).__name__}()"
        return "relu" if _is_plain(module, nn.ReLU) else "ReLU with hooks or a forward of its own"

    def _inputs(self, node):
        """The node's arguments, without those that change nothing: relu's inplace, and add's alpha where it is 1."""
        if node.op == "placeholder":
            return []
        neutral = {"relu": (True, False), "add": (1,)}.get(self._label(node), ())
        arguments = (*node.args, *node.kwargs.values())
        return [argument for argument in arguments if isinstance(argument, fx.Node) or argument not in neutral]
