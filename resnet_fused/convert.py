"""Swap what can run fused in any model, in place, and back.

A module is swapped by its class: a block that takes :class:`Residual`'s steps becomes a :class:`FusedResidual`, any
other module gets a fused subclass of its own class. What is left alone is named, with the reason.
"""

import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from .blocks import FusedResidual, Residual, call_batch_norm_add_relu, call_batch_norm_relu, call_recomputing
from .matching import RETURNED, batch_norms, has_no_forward
from .rewrite import Fused, original_class, plan

# What a class may define of its own without changing how Python and nn.Module treat its instances.
_HARMLESS_OVERRIDES = {"__init__", "forward", "extra_repr", "__repr__", "__annotate_func__"}


class Swapped(NamedTuple):
    """A module whose class was swapped: its name in the model, that of its original class, and those of the batch norms
    that it runs fused."""

    name: str
    class_name: str
    batch_norms: tuple[str, ...] = ()


class Left(NamedTuple):
    """A module with batch norms that were left alone, and why."""

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
        lines = [] if self.fused or self.unfused else ["nothing was changed"]
        count = sum(len(batch_norms) for _, _, batch_norms in self.fused)
        titles = f"fused {count} batch norms:", "unfused:", "left:"
        for title, entries in zip(titles, (self.fused, self.unfused, self.left), strict=True):
            lines += [title] if entries else []
            for name, class_name, details in entries:
                details = details if isinstance(details, str) else ", ".join(details)
                lines.append(f"  {name or 'the model'} ({class_name})" + (f": {details}" if details else ""))
        return "\n".join(lines)


def fuse(model, filter_fn=None, *, memory_efficient=False):
    """Make every batch norm of ``model`` that a ReLU follows run fused with it, in place, and with a sum between them.

    The module whose forward holds the ReLU is swapped, by giving it another class: references to it, hooks, layers,
    parameters and ``state_dict`` stay as they are, and ``model`` itself may be such a module. Add and ReLU may be
    modules, functions, methods or in place; the batch norm may be inside an ``nn.Sequential`` without hooks.

    The new class is a subclass of the module's own, of the same name, with a forward written from a ``torch.fx`` trace.
    Where what the trace saw of the module has changed since (an attribute that the forward reads, hooks of a layer that
    is no longer called), and where an argument is given that has a default, the module's own forward runs, unfused.
    What that does besides calling layers and functions (print, ask the time or a global) was done when it was traced.

    A block whose layers are named ``conv1``, ``bn1``, ``conv2``, ``bn2`` and, maybe, ``conv3`` and whose forward takes
    the steps of :class:`Residual`'s becomes a :class:`FusedResidual`, which elides the convolutions' biases, too. Until
    :func:`unfuse`, it has the methods and class attributes of FusedResidual, not of its own class, takes its input by
    position, calls no ReLU child, and its output has the dtype of ``bn2``'s, as after ``Y += X``.

    Args:
        model: any nn.Module. Lazy layers need a first batch before. Fuse before ``torch.compile``, and unfuse before
            another tracer takes the model apart: ``torch.onnx``, TorchScript, ``torch.fx``, quantisation.
        filter_fn: ``filter_fn(module, name) -> bool``, asked about each module that could be swapped; False leaves it.
        memory_efficient: keep no output of ``relu(batch_norm(x))`` for backward that a convolution or max pooling of
            the same forward consumes, and nothing else: its backward recomputes it from x, to the bit, by one pass over
            memory. torch.compile decides by itself what it keeps. Modules that are fused already stay as they are.

    Returns:
        Report: ``fused``, the modules that were swapped, with the batch norms that they fuse, and ``left``, the modules
        whose forward calls other batch norms, with the reasons.

    Raises:
        TypeError: model is not an nn.Module.

    Whatever is raised, by ``filter_fn`` too, leaves the model as it was.
    """
    report, swaps, left = Report(), [], _LeftBatchNorms()
    inlined = set()
    for name, module in _named_modules(model):
        if module in inlined or has_no_forward(module) or not any(batch_norms(module)):
            continue
        planned = plan(module, memory_efficient)
        if planned.fused_class is not None and filter_fn is not None and not filter_fn(module, name):
            left.add(name, module, dict.fromkeys(planned.fused, "filter_fn said no") | planned.reasons)
            continue
        left.add(name, module, planned.reasons)
        if planned.fused_class is not None:
            inlined.update(map(module.get_submodule, planned.inlined))
            left.remove(module, planned.fused)
            swaps.append((module, FusedResidual if _is_residual(module, planned) else planned.fused_class))
            report.fused.append(Swapped(name, type(module).__name__, planned.fused))
    report.left = left.report()
    for module, fused_class in swaps:  # only now, when nothing can fail any more
        if fused_class is FusedResidual:
            added = {} if "conv3" in module.__dict__ or "conv3" in module._modules else {"conv3": None}
            added |= {"_memory_efficient": True} if memory_efficient else {}
            module.__dict__.update(added, _before_fuse=(type(module), tuple(added)))
        module.__class__ = fused_class
    return report


def unfuse(model):
    """Give every module of ``model`` that has a fused class its original one back, in place: what :func:`fuse` did,
    undone.

    A block that was built as a FusedResidual becomes a :class:`Residual`.

    Returns:
        Report: ``unfused``, with the classes the modules have now; ``left``, instances of a subclass of a fused class.

    Raises:
        TypeError: model is not an nn.Module.
    """
    report = Report()
    for name, module in _named_modules(model):
        if type(module) is FusedResidual:
            original, added = module.__dict__.pop("_before_fuse", (Residual, ()))
            for attribute in added:
                del module.__dict__[attribute]
        elif isinstance(module, Fused) and Fused in type(module).__bases__:
            original = original_class(module)
        else:
            if isinstance(module, FusedResidual | Fused):
                report.left.append(Left(name, type(module).__name__, "a subclass of a fused class"))
            continue
        module.__class__ = original
        report.unfused.append(Swapped(name, original.__name__))
    return report


def _named_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return list(model.named_modules())  # a module under two names comes once


class _LeftBatchNorms:
    """Every batch norm that nobody fuses, with the reason of the innermost module that knows one."""

    def __init__(self):
        self.reasons = {}  # batch norm -> (module's name, its class's, the batch norm's name in it, reason)
        self.fused = set()

    def add(self, name, module, reasons):
        for layer_name, reason in reasons.items():
            layer = module.get_submodule(layer_name)
            if layer not in self.reasons or reason != RETURNED:
                self.reasons[layer] = name, type(module).__name__, layer_name, reason

    def remove(self, module, names):
        self.fused.update(map(module.get_submodule, names))

    def report(self):
        grouped = {}
        for layer, (name, class_name, layer_name, reason) in self.reasons.items():
            if layer not in self.fused:
                grouped.setdefault((name, class_name), {}).setdefault(reason, []).append(layer_name)
        return [
            Left(*module, "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()))
            for module, reasons in grouped.items()
        ]


def _is_residual(module, planned):
    """Whether the module's forward is Residual's, and its class has nothing that the module would miss."""
    rewrite, graph = planned.rewrites[0], planned.graph
    has_conv3 = module._modules.get("conv3") is not None
    looks_at = {attribute.name for attribute in rewrite.attributes if attribute.kind is not type}
    parameters = inspect.signature(type(module).forward).parameters
    if rewrite.argument_class is not None or not looks_at <= {"conv3"} or len(parameters) != 2 or _overrides(module):
        return False
    steps = sum(node.op != "get_attr" for node in graph.nodes)
    if steps != 6 + has_conv3 or not type(module.bn1) is type(module.bn2) is nn.BatchNorm2d:
        return False
    X = ("input",)
    Y = ("conv2", (call_batch_norm_relu, ("bn1",), ("conv1", X)))
    tail = call_batch_norm_add_relu, ("bn2",), Y, ("conv3", X) if has_conv3 else X
    return _steps(graph.output_node()) in [("output", (*tail, inplace)) for inplace in (True, False)]


def _overrides(module):
    """What the module's class defines that Python and nn.Module look at."""
    own_classes = [base for base in type(module).__mro__ if not issubclass(nn.Module, base)]
    own = {name: value for base in own_classes for name, value in vars(base).items()}
    special = {name for name in own if hasattr(nn.Module, name) or name.startswith("__")}
    return {name for name in special - _HARMLESS_OVERRIDES if callable(own[name]) or name == "__slots__"}


def _steps(node):
    """What the node computes, as nested tuples."""
    if not isinstance(node, fx.Node):
        return node
    if node.target is call_recomputing:
        layer, input = node.args
        return layer.target, _steps(input)
    return ("input",) if node.op == "placeholder" else (node.target, *map(_steps, node.args))
