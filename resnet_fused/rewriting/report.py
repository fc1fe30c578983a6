"""Swap the classes of what can run fused in any model, in place, and back. What is left is named, with the reason."""

import contextlib
from collections import namedtuple
from dataclasses import dataclass, field

from torch import nn

from ..blocks import FusedResidual, MemoryEfficientFusedResidual, Residual
from .matching import RETURNED
from .rewrite import Plan, is_fused, plan

_FORWARD_OF_RESIDUAL = Residual.forward

# A module whose class was swapped: its name, its original class, and the batch norms that it runs fused.
Swapped = namedtuple("Swapped", ("name", "class_name", "batch_norms"), defaults=[()])
# A module with batch norms that were left alone, and why.
Left = namedtuple("Left", ("name", "class_name", "reason"))


@dataclass
class Report:
    """What :func:`fuse` and :func:`unfuse` did. ``print`` it."""

    fused: list[Swapped] = field(default_factory=list)
    unfused: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self):
        lines = [] if self.fused or self.unfused else ["nothing was changed"]
        fused = f"fused {sum(len(swapped.batch_norms) for swapped in self.fused)} batch norms:"
        for title, entries in ((fused, self.fused), ("unfused:", self.unfused), ("left:", self.left)):
            lines += [title] if entries else []
            for name, class_name, details in entries:
                details = details if isinstance(details, str) else ", ".join(details)
                lines.append(f"  {name or 'the model'} ({class_name})" + (f": {details}" if details else ""))
        return "\n".join(lines)

    def to_dict(self):
        """The same in lists, dicts and strings, for JSON."""
        return {title: [entry._asdict() for entry in entries] for title, entries in vars(self).items()}


def fuse(model, filter_fn=None, *, memory_efficient=False):
    """Make every batch norm of ``model`` that a ReLU follows run fused with it, in place, and with a sum between them.

    The module whose forward holds the ReLU gets another class: a subclass of its own, of one name, whose forward is
    written from a ``torch.fx`` trace (the package's own :class:`Residual` becomes a :class:`FusedResidual`). Add and
    ReLU may be modules, functions, methods or in place, the batch norm inside an ``nn.Sequential`` without hooks. The
    bias of a convolution before it is left to the batch norm, which cancels it in training: zero gradient.

    Every call compares what the trace looked up (attributes, methods, globals, closures, layers' classes and hooks).
    Where one has changed, or an argument is given that has a default, the original forward runs. A forward is refused
    that looks up what cannot be compared (a list, a dict), asks for a mode of torch, or draws random numbers.

    Args:
        model: any nn.Module. Lazy layers need a first batch before. Fuse before ``torch.compile``; inside
            ``with unfused(model):`` other tracers find the plain model: ``torch.onnx``, TorchScript, quantisation.
        filter_fn: ``filter_fn(module, name) -> bool``, asked about each module that could be swapped; False leaves it.
        memory_efficient: keep no output of ``relu(batch_norm(x))`` for backward that a convolution or max pooling of
            the same forward consumes, and nothing else: its backward recomputes it from x, to the bit.

    Returns:
        Report: ``fused``, the modules that were swapped, with the batch norms that they fuse, and ``left``, the modules
        whose forward calls other batch norms, with the reasons: whatever a model does, it is left, and nothing raised.

    Raises:
        TypeError: model is not an nn.Module. What ``filter_fn`` raises leaves the model as it was.
    """
    report, swaps, inlined, fused = Report(), [], set(), set()
    reasons = {}  # of each batch norm that is left, from the innermost module that knows one
    for name, module in _named_modules(model):
        if module in inlined:
            continue
        planned = plan(module, memory_efficient)
        if planned.fused_class is not None and filter_fn is not None and not filter_fn(module, name):
            planned = Plan(dict.fromkeys(planned.fused, "filter_fn said no") | planned.reasons)
        for layer_name, reason in planned.reasons.items():
            layer = module.get_submodule(layer_name)
            if layer not in reasons or reason != RETURNED:
                reasons[layer] = (name, type(module).__name__), reason, layer_name
        if planned.fused_class is not None:
            inlined.update(map(module.get_submodule, planned.inlined))
            fused.update(map(module.get_submodule, planned.fused))
            swaps.append((module, planned.fused_class))
            report.fused.append(Swapped(name, type(module).__name__, planned.fused))
    left = {}
    for names, reason, layer_name in (told for layer, told in reasons.items() if layer not in fused):
        left.setdefault(names, {}).setdefault(reason, []).append(layer_name)
    for names, told in left.items():
        told = [f"{', '.join(layers) or 'it'}: {reason}" for reason, layers in told.items()]
        report.left.append(Left(*names, "; ".join(told)))
    for module, fused_class in swaps:  # only now, when nothing can fail any more
        if type(module) is Residual and Residual.forward is _FORWARD_OF_RESIDUAL:
            fused_class = MemoryEfficientFusedResidual if memory_efficient else FusedResidual
        module.__class__ = fused_class
    return report


def unfuse(model):
    """Give every module of ``model`` that has a fused class its original one back, in place: what :func:`fuse` did,
    undone. A block that was built as a FusedResidual becomes a :class:`Residual`.

    Returns:
        Report: ``unfused``, with the classes the modules have now; ``left``, instances of a subclass of a fused class.

    Raises:
        TypeError: model is not an nn.Module.
    """
    report = Report()
    for name, module in _named_modules(model):
        if is_fused(type(module)):
            module.__class__ = type(module)._original_class
            report.unfused.append(Swapped(name, type(module).__name__))
        elif hasattr(type(module), "_original_class"):
            report.left.append(Left(name, type(module).__name__, "a subclass of a fused class"))
    return report


@contextlib.contextmanager
def unfused(model):
    """A context in which no module of ``model`` has a fused class, for what takes it apart, as ``torch.onnx`` does.

    Afterwards, on errors too, each has its fused class again, unless it was given another one meanwhile.

    Raises:
        TypeError: model is not an nn.Module.
    """
    classes = {module: type(module) for _, module in _named_modules(model) if is_fused(type(module))}
    unfuse(model)
    try:
        yield model
    finally:
        for module, fused_class in classes.items():
            if type(module) is fused_class._original_class:
                module.__class__ = fused_class


def _named_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return list(model.named_modules())  # a module under two names comes once
