"""Swap the layers of any model, in place, and back, and tell what becomes of each batch norm."""

import contextlib
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from .blocks import FusedResidual, Residual
from .calls import is_plain
from .deferred import Learned
from .folding import Follower
from .inference import Route
from .layers import (
    Deferring,
    Folding,
    Inferring,
    OwnBuffers,
    deferring,
    folding,
    inferring,
    is_batch_norm,
    own_state,
    pooling,
    recomputing_inputs,
    set_class,
    swapped_class,
    synchronizing,
)

_FORWARD_OF_RESIDUAL = Residual.forward
_TAILS = {"bn1": "relu", "bn2": "add+relu"}  # of a FusedResidual

_LEARNED = (Deferring, "_learned", Learned), (Inferring, "_learned", Route), (Folding, "_follower", Follower)

# What one could do about a batch norm that is plain, by how the reason begins.
_ADVICE = {
    "its output went to": "only a ReLU, or a sum of two tensors and then a ReLU, is fused with it",
    "its output was not seen": "only a ReLU, or a sum of two tensors and then a ReLU, is fused with it",
    "its output is kept": "let go of it, a clone of it does as well",
    "its statistics were read": "read them, or call it again, when its output has been used",
    "a hook": "remove it",
    "under torch.compile": "call the model itself",
    "a small input": "on a CPU PyTorch's operators are faster there",
    "the operator takes less": "have input, residual and parameters of one type, or of float32 parameters",
}

# Of a module: its name, its class, and the batch norms among its children that are fused, or why others are not.
Fused = namedtuple("Fused", ("name", "class_name", "batch_norms"))
Left = namedtuple("Left", ("name", "class_name", "reason"))


class _Entry(NamedTuple):
    """A batch norm, the name and class of the module that holds it, and what tells its state now."""

    name: str
    parent: tuple[str, str]
    state: Callable[[], str]

    @property
    def child(self):
        return self.name.rpartition(".")[2] or "it"


def _state(layer):
    layer = layer()
    if layer is None or "_learned" not in vars(layer):
        return "plain: it is no longer swapped"
    return layer._learned.state() if is_plain(layer) else "plain: a hook, or a forward of its own"


def _state_in_inference(layer):
    route = layer and vars(layer).get("_learned")
    return route.state(layer) if isinstance(route, Route) else "plain: it is no longer swapped"


def _state_in_block(block, tail):
    block = block()
    is_fused = block is not None and isinstance(block, FusedResidual) and block.runs_fused()
    return tail if is_fused else "plain: a batch norm of its block has a hook, another class or a forward of its own"


class Report:
    """What :func:`fuse` or :func:`unfuse` did, and what each batch norm, and in inference each convolution, does, told
    anew whenever it is read."""

    def __init__(self, entries=(), unfused=(), convolutions=()):
        self._entries, self._convolutions = entries, convolutions
        self.unfused = _fused(unfused)

    @property
    def layers(self) -> dict[str, str]:
        """What each batch norm does, by its name: "may fuse" (before its first call), "watched" (in that), "relu" or
        "add+relu", with which it is fused, "folded into its convolution", or "plain: " and why."""
        return {entry.name: entry.state() for entry in self._entries}

    @property
    def inference(self) -> dict[str, str]:
        """What each convolution does in inference, by its name: "may fuse" (before its first call), "watched" (in
        that), "convolution" and the steps that are one call with it, or "plain: " and why."""
        return {name: _state_in_inference(layer()) for name, layer in self._convolutions}

    @property
    def packed_bytes(self) -> int:
        """What the packed weights take now."""
        return sum(route.bytes() for route in self._routes())

    def _routes(self):
        learned = [vars(layer()).get("_learned") for _, layer in self._convolutions if layer() is not None]
        return [route for route in learned if isinstance(route, Route)]

    @property
    def fused(self) -> list[Fused]:
        return _fused(entry for entry in self._entries if not entry.state().startswith("plain: "))

    @property
    def left(self) -> list[Left]:
        states = [(entry, entry.state()) for entry in self._entries]
        left = _grouped(((*entry.parent, state[7:]), entry) for entry, state in states if state.startswith("plain: "))
        return [Left(*parent, f"{', '.join(children)}: {reason}") for (*parent, reason), children in left]

    def __str__(self):
        fused, left = self.fused, self.left
        lines = [] if fused or self.unfused or self._convolutions else ["nothing was changed"]
        reasons = Counter(state[7:] for state in self.layers.values() if state.startswith("plain: "))
        counts = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        title_of_fused = f"fused {len(self.layers) - reasons.total()} of {len(self.layers)} batch norms:"
        title_of_left = f"{reasons.total()} plain: {counts}:"
        for title, modules in ((title_of_fused, fused), ("unfused:", self.unfused), (title_of_left, left)):
            lines += [title] if modules else []
            for name, class_name, details in modules:
                details = details if isinstance(details, str) else ", ".join(details)
                lines.append(f"  {name or 'the model'} ({class_name}): {details}{_advice(details)}")
        return "\n".join(lines + self._lines_of_inference())

    def _lines_of_inference(self):
        lines, states = [], self.inference
        left = {name: state for name, state in states.items() if state.startswith("plain: ")}
        if states:
            size = f"{self.packed_bytes / 2**20:.1f} MiB packed"
            lines = [f"in inference: {len(states) - len(left)} convolutions with what follows them, {size}"]
        if converting := sum(route.converts() for route in self._routes()):
            lines.append(f"  {converting} convert their input: .to(memory_format=torch.channels_last) would spare that")
        return lines + [f"  {name}: {state}" for name, state in left.items()]

    def to_dict(self) -> dict[str, Any]:
        """The same in lists, dicts and strings, for JSON."""
        modules = {"fused": self.fused, "unfused": self.unfused, "left": self.left}
        dicts = {title: [m._asdict() for m in of_title] for title, of_title in modules.items()}
        inference = {"inference": self.inference, "packed_bytes": self.packed_bytes} if self._convolutions else {}
        return dicts | {"layers": self.layers} | inference


def _advice(details):
    reason = details.partition(": ")[2]
    return next((f"; {advice}" for start, advice in _ADVICE.items() if reason.startswith(start)), "")


def _grouped(entries):
    groups = {}
    for key, entry in entries:
        groups.setdefault(key, []).append(entry.child)
    return groups.items()


def _fused(entries):
    return [Fused(*parent, tuple(names)) for parent, names in _grouped((entry.parent, entry) for entry in entries)]


def fuse(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    memory_efficient: bool = False,
    inference: bool = False,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> Report:
    """Make every batch norm of ``model`` that a ReLU follows run fused with it, in place, and with a sum between them.

    The class of each batch norm is swapped; the model's own forward runs, always. The first call of a
    batch norm gives its real output and watches it: is it added to and rectified, and is that all? From then on the
    layer puts its output off: it returns a tensor without data, which a sum joins and a ReLU turns into one call of the
    operator. Whoever else touches that tensor gets what the plain layer gives, and the layer is plain from then on; so
    it is where somebody watches: torch.compile, torch.export, tracers, torch.func, modes, hooks on the layer.

    The class of each nn.MaxPool2d is swapped, too: on a CPU it pools contiguous tensors in a third of the time, and
    saves no input for backward. So is that of each convolution: in eval with gradients a batch norm that learns is
    folded into its weight, and its output, which eager keeps for backward, is never there.

    The package's own :class:`Residual` becomes a :class:`FusedResidual`.

    Args:
        model: any nn.Module. Lazy layers need a first batch before.
        filter_fn: ``filter_fn(module, name) -> bool``, asked about each layer or block to swap; False leaves it.
        memory_efficient: swap convolutions and max poolings, too: they keep no output of a fused
            ``relu(batch_norm(x))`` for backward, which recomputes it from x, to the bit.
        inference: swap 2d and 3d convolutions, transposed ones too: in eval, without gradients, on a CPU, in float32 or
            bfloat16, each is one call of oneDNN with the batch norm, the sum and the activation that were seen to
            follow, on folded weights, packed once and anew where one of them has changed. All else is as without.
        example_inputs: a tensor, or a tuple of arguments, for a first call, which is watched, in eval and without
            gradients, so that the next one is fused.

    Returns:
        Report: ``fused``, the modules with batch norms that are fused, or may be; ``left``, those with others, and why;
        ``layers``, the state of each; ``inference``, that of each convolution, and ``packed_bytes``. It follows what
        the layers do.

    Raises:
        TypeError: model is not an nn.Module. What ``filter_fn`` raises leaves the model as it was.
    """
    kinds = (
        [deferring, synchronizing, pooling, folding] + memory_efficient * [recomputing_inputs] + inference * [inferring]
    )
    swaps, entries, in_blocks = {}, [], {}
    for name, module in _named_modules(model):
        is_residual = type(module) is Residual and Residual.forward is _FORWARD_OF_RESIDUAL
        swapped = FusedResidual if is_residual else None if module in in_blocks else swapped_class(module, *kinds)
        is_wanted = swapped is None or filter_fn is None or filter_fn(module, name)
        if swapped is not None and is_wanted:
            swaps[module] = name, swapped
        if type(module) is FusedResidual or (is_residual and is_wanted):
            in_blocks |= {getattr(module, bn): partial(_state_in_block, ref(module), _TAILS[bn]) for bn in _TAILS}
        if is_batch_norm(module):
            reason = "filter_fn said no" if not is_wanted else _reason_to_leave(module)
            state = in_blocks.get(module) or (
                partial(str, f"plain: {reason}") if reason else partial(_state, ref(module))
            )
            entries.append(_entry(model, name, state))
    for module, (name, swapped) in swaps.items():  # only now, when nothing can fail any more
        set_class(module, swapped)
        for base, own, learned in _LEARNED:
            if issubclass(swapped, base):
                vars(module)[own] = learned(name or "the model")
        if issubclass(swapped, Deferring):
            vars(module)["_own_buffers"] = OwnBuffers(vars(module)["_buffers"])
    if example_inputs is not None:
        _watch(model, example_inputs)
    return Report(entries, convolutions=[(swaps[m][0], ref(m)) for m in swaps if issubclass(type(m), Inferring)])


def _watch(model, inputs):
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), torch.random.fork_rng():
        try:
            model.eval()(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        finally:
            for module, training in modes:
                module.training = training


def _reason_to_leave(batch_norm):
    if deferring(batch_norm):
        return None
    is_lazy = isinstance(batch_norm, nn.modules.lazy.LazyModuleMixin)
    return "it is lazy: run one batch first" if is_lazy else f"a {batch_norm.__class__.__name__}"


def unfuse(model: nn.Module) -> Report:
    """Give each layer and block of ``model`` that :func:`fuse` swapped its class back, in place. A block that was built
    as a FusedResidual becomes a :class:`Residual`.

    Returns:
        Report: ``unfused``, the modules with batch norms, or blocks, whose classes were given back.

    Raises:
        TypeError: model is not an nn.Module.
    """
    entries, in_blocks = [], set()
    for name, module in _named_modules(model):
        if type(module) is FusedResidual:
            in_blocks |= {module.bn1, module.bn2}
        if module in in_blocks or issubclass(type(module), Deferring):
            entries.append(_entry(model, name))
    for _, module in _named_modules(model):
        _restore(module)
    return Report(unfused=entries)


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which no module of ``model`` has a class of ours, for what takes it apart, as TorchScript does.

    Afterwards, on errors too, each has it again, unless it was given another one meanwhile.

    Raises:
        TypeError: model is not an nn.Module.
    """
    swapped = {module: (type(module), own_state(module)) for _, module in _named_modules(model)}
    unfuse(model)
    plain = {module: type(module) for module in swapped}
    try:
        yield model
    finally:
        for module, (swapped_class, state) in swapped.items():
            if type(module) is plain[module] is not swapped_class:
                set_class(module, swapped_class)
                vars(module).update(state)


def _restore(module):
    for name in own_state(module):
        del vars(module)[name]
    plain_class = Residual if type(module) is FusedResidual else getattr(type(module), "plain_class", None)
    if plain_class is not None:
        set_class(module, plain_class)


def _entry(model, name, state=str):
    parent = name.rpartition(".")[0]
    return _Entry(name, (parent, model.get_submodule(parent).__class__.__name__), state)


def _named_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return list(model.named_modules())  # a module under two names comes once
