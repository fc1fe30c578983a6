"""Swap what can run fused in any model, in place, and back.

A module is swapped by its class: a block that takes the steps of :class:`Residual` becomes a :class:`FusedResidual`, and
any other one gets a fused subclass of its own class. What is left alone is named, with the reason.
"""

import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from .blocks import FusedResidual, Residual, call_batch_norm_add_relu, call_batch_norm_relu
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
        lines = []
        count = sum(len(swapped.batch_norms) for swapped in self.fused)
        for title, entries in (
            (f"fused {count} batch norms, in", self.fused),
            ("unfused", self.unfused),
            ("left, in", self.left),
        ):
            if entries:
                lines.append(f"{title} {len(entries)} modules:".replace(" 1 modules", " 1 module"))
            for name, class_name, details in entries:
                line = f"  {name or 'the model'} ({class_name})"
                details = details if isinstance(details, str) else ", ".join(details)
                lines.append(f"{line}: {details}" if details else line)
        if not self.fused and not self.unfused:
            lines.insert(0, "nothing was changed")
        return "\n".join(lines)


def fuse(model, filter_fn=None):
    """Make every batch norm of ``model`` that a ReLU follows run fused with it, in place, and with a sum between them.

    The module whose forward holds the ReLU is swapped by giving it another class. References to it, hooks, layers,
    parameters and ``state_dict`` stay as they are, and ``model`` itself may be such a module. Add and ReLU may be modules,
    functions, methods or in place, and the batch norm may be inside an ``nn.Sequential`` without hooks.

    The new class is a subclass of the module's own, with its name, and a forward written from a ``torch.fx`` trace. What
    the forward does in Python besides calling layers and functions (print, count, ask a global) it did when it was
    traced. Where what it saw of the module has changed since (an attribute that it reads, a hook on a layer that is no
    longer called), and where an argument is given that has a default, the module's own forward runs, unfused.

    A block whose layers are named ``conv1``, ``bn1``, ``conv2``, ``bn2`` and, maybe, ``conv3`` and whose forward takes
    the steps of :class:`Residual`'s becomes a :class:`FusedResidual`, which saves the convolutions' biases, too. Until
    :func:`unfuse`, it has the methods and class attributes of FusedResidual, not of its own class, takes its input by
    position, calls no ReLU child, and its output has the dtype of ``bn2``'s, as after ``Y += X``.

    Args:
        model: any nn.Module. Lazy layers need a first batch before. Fuse before ``torch.compile``, and unfuse before
            another tracer takes the model apart: ``torch.onnx``, TorchScript, ``torch.fx``, quantisation.
        filter_fn: ``filter_fn(module, name) -> bool``, asked about each module that could be swapped; False leaves it.

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
        planned = plan(module)
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
        layers = dict(batch_norms(module))
        for layer, reason in reasons.items():
            if not (layers[layer] in self.reasons and reason == RETURNED):
                self.reasons[layers[layer]] = name, type(module).__name__, layer, reason

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


_LAYERS = ("conv1", "conv2", "bn1", "bn2")  # and conv3: None, absent or a layer


def _is_residual(module, planned):
    """Whether the module's forward is Residual's, and its class nothing that the module would miss."""
    is_described = all(isinstance(module._modules.get(name), nn.Module) for name in _LAYERS)
    if not is_described or type(module.bn1) is not nn.BatchNorm2d or type(module.bn2) is not nn.BatchNorm2d:
        return False
    own_classes = [base for base in type(module).__mro__ if not issubclass(nn.Module, base)]
    own_names = {name for base in own_classes for name, value in vars(base).items() if callable(value)}
    special = {name for name in own_names if hasattr(nn.Module, name) or name.startswith("__")}
    if special - _HARMLESS_OVERRIDES or len(inspect.signature(module.forward).parameters) != 1:
        return False
    (rewrite, *others) = planned.rewrites
    looks_at = {attribute.name for attribute in rewrite.attributes if attribute.path or attribute.kind is not type}
    if others or rewrite.argument_class is not None or not looks_at <= {"conv3"}:
        return False
    X = ("input",)
    Y = (call_batch_norm_relu, ("bn1",), ("conv1", X))
    shortcut = X if module._modules.get("conv3") is None else ("conv3", X)
    steps = [
        ("output", (call_batch_norm_add_relu, ("bn2",), ("conv2", Y), shortcut, inplace)) for inplace in (True, False)
    ]
    return _steps(planned.graph.output_node()) in steps and len(planned.graph.nodes) == (
        9 if "conv3" in shortcut else 8
    )


def _steps(node):
    """What the node computes, as nested tuples."""
    if not isinstance(node, fx.Node):
        return node
    return ("input",) if node.op == "placeholder" else (node.target, *map(_steps, node.args))
