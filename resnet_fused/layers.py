"""The layers that ``fuse`` swaps in: they pass for the plain ones, and do what these do, or later and at once."""

import copy
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map_only

from . import reference
from .backend import is_watched, ops_for
from .calls import CONVOLUTIONS, batch_norm_of, is_plain, normalizing
from .convolutions import CHANNELS_LAST
from .deferred import Traced, is_per_channel, is_small, note_compiled, settle
from .folding import Convolved, note_batch_norm, put_off
from .inference import NORMALIZED, Chain, Chained, Followed, Step, layout_for, parameters_of, source_of
from .ops import BatchNorm, Ops
from .pooling import is_worth, max_pool2d
from .recompute import recomputing
from .synchronized import group_of, over

set_class = object.__dict__["__class__"].__set__
_BATCH_NORM_CLASS = nn.modules.batchnorm._BatchNorm
_FORWARDS, _BATCH_NORM = {_BATCH_NORM_CLASS.forward, nn.SyncBatchNorm.forward}, F.batch_norm
_CONVOLVING = {conv.forward for conv in CONVOLUTIONS}
_MAX_POOLING, _MAX_POOL2D = nn.MaxPool2d.forward, F.max_pool2d
_ABSENT = object()
MULTIPLICATIONS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class Swapped(nn.Module):
    """A layer of a class of ours, in the place of the ``plain_class``, which ``__class__`` and pickles name."""

    __class__ = property(lambda self: self.plain_class, set_class)

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol):  # a file names no class of ours: what loads is plain
        make, (_, *arguments), *_ = super().__reduce_ex__(protocol)
        return make, (self.plain_class, *arguments), plain_state(self)


_OWN = {"_learned", "_own_buffers", "_follower"}


def own_state(layer):
    return {name: value for name, value in vars(layer).items() if name in _OWN}


def plain_state(layer):
    return {name: value for name, value in vars(layer).items() if name not in _OWN}


class OwnBuffers:
    """What ``vars(layer)["_buffers"]`` is, which torch.compile before 2.12 takes for the property of that name. Not a
    dict: torch.export would take one for state of the model's."""

    def __init__(self, buffers):
        self.dict = buffers


def _buffer(name):
    """A running statistic, up to date for whoever reads it."""

    def get(self):
        for attributes in (self._own_buffers.dict, vars(self)):
            if name in attributes:
                settle((attributes[name],))
                return attributes[name]
        return getattr(super(Deferring, self), name)  # a property of its class; else nn.Module's __getattr__ looks on

    return property(get, lambda self, value: vars(self).update({name: value}))


class Deferring(Swapped):
    """A batch norm that puts its output off, once it has been seen where that goes. A class with a forward of its own
    runs it, and what that forward computes of its input is put off."""

    running_mean, running_var, num_batches_tracked = map(
        _buffer, ("running_mean", "running_var", "num_batches_tracked")
    )

    @property
    def _buffers(self):
        buffers = self._own_buffers.dict
        settle(buffers.values())
        return buffers

    @_buffers.setter
    def _buffers(self, buffers):
        vars(self)["_buffers"], self._own_buffers = buffers, OwnBuffers(buffers)

    def forward(self, input=_ABSENT, *args, **kwargs):
        learned = self._learned
        if is_compiling():
            note_compiled(learned.number)
        if args or kwargs or input is _ABSENT:
            if not is_compiling():
                learned.refuse("it was called with other arguments than a tensor")
            return super().forward(*(() if input is _ABSENT else (input,)), *args, **kwargs)
        is_torchs = self.plain_class.forward in _FORWARDS and F.batch_norm is _BATCH_NORM
        if type(input) in (Chained, Followed):
            return self._of_convolution(input, is_torchs)
        if type(input) is Tensor and not is_compiling():
            learned.is_small = is_small(input, input.numel()) and group_of(self) is None
            is_done = learned.is_small or learned.reason is not None or (learned.rectified and not learned.pools)
            if is_done and input.is_cpu and not (self.training or torch.is_grad_enabled()):
                # The operator wins nothing there in a network: the next convolution reads a colder tensor (0.96 to 1.04
                # of eager's speed on three CPUs).
                return self._plain(input, is_torchs)
            note_batch_norm(self, input)
        if type(input) is Convolved:
            if not self.training:
                return super().forward(input)
            input = input.tail.make()
        if learned.is_small or (learned.reason is not None and not learned.decide()):
            return self._plain(input, is_torchs)
        ops = ops_for(input)
        if ops is None or not self._may_defer(input):
            return super().forward(input)
        if is_torchs:
            self._check_input_dim(input)
            ops = over(ops, group_of(self), learned)
            return learned.call(input, ops, super().forward, partial(batch_norm_of, self))
        offered = Offered.of(input, learned, ops)
        output = super().forward(offered)
        if not offered.is_normalized:
            learned.refuse("its forward has no batch norm of the input, or one of another type")
        return input if output is offered else output

    def _plain(self, input, is_torchs):
        if not is_torchs or is_compiling() or (self.training and isinstance(self, nn.SyncBatchNorm)):
            return super().forward(input)
        self._check_input_dim(input)  # and what that forward does, but looking each attribute up once
        norm, training = batch_norm_of(self)
        settle((norm.running_mean, norm.running_var, norm.num_batches_tracked))
        return reference.batch_norm(input, norm, training)

    def _of_convolution(self, input, is_torchs):
        """Of what tells a batch norm from other calls by itself."""
        if type(input) is Chained and not is_plain(self):  # hooks
            return super().forward(input.tail.make())
        if type(input) is Chained and is_torchs:
            norm, training = batch_norm_of(self)
            output = None if training else input.tail.take(Step(NORMALIZED, input, norm))
            if output is not None:
                return output
        if not is_torchs and is_frozen(self) and self.weight.dtype is input.dtype:  # else it promotes
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)

    def _may_defer(self, input):
        return (
            type(input) is Tensor
            and not input.is_inference()
            and is_plain(self)
            and has_strides_of_output(input)
            and input.dim() > 1
            and not (self.training and input.numel() == input.shape[1] and group_of(self) is None)
        )


class Synchronizing(Swapped):
    """An nn.SyncBatchNorm, which works on CPUs, too, and tells the other processes whether it wants to defer."""

    def forward(self, input):
        if is_watched():
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        ops = over(ops_for(input), group_of(self), self._learned) or Ops
        return ops.batch_norm(input, *batch_norm_of(self))


class Offered(Traced):
    """The input of a batch norm whose class has a forward of its own, for that to take: the first thing it computes of
    it, if that is a batch norm, also one of constant statistics written as ``input * scale + bias``, may be put off."""

    @staticmethod
    def of(input, learned, ops):
        self = input.as_subclass(Offered)
        self.input, self.learned, self.ops, self.is_normalized = input, learned, ops, False
        return self

    @classmethod
    def asked(cls, function, types, args, kwargs):
        offered = next(tensor for tensor in tree_leaves((args, kwargs)) if type(tensor) is cls)
        if function is _BATCH_NORM:
            batch_norm = normalizing(*args, **kwargs)
        elif function in MULTIPLICATIONS and len(args) == 2 and not kwargs:
            batch_norm = _scaling(*args)
        else:
            batch_norm = None
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.input, (args, kwargs))
        if batch_norm is None:
            return function(*args, **kwargs)
        offered.is_normalized = True
        plain = lambda _: function(*args, **kwargs)  # noqa: E731
        return offered.learned.call(offered.input, offered.ops, plain, lambda: batch_norm)


def _scaling(a, b):
    """``input * scale`` as a batch norm and whether it is of the batch's statistics; None where it is none."""
    input, scale = (a, b) if type(a) is Offered else (b, a)
    if not is_per_channel(scale, input):
        return None
    is_captured = scale.is_cuda and torch.cuda.is_current_stream_capturing()  # then its memory is the graph's
    mean, var = (_constants.__wrapped__ if is_captured else _constants)(scale.numel(), scale.dtype, scale.device)
    return BatchNorm(mean, var, scale.flatten(), None, 0.0, 0.0), False


@cache
def _constants(channels, dtype, device):
    with torch.inference_mode(False):
        zeros = torch.zeros(channels, dtype=dtype, device=device)
        return zeros, torch.ones_like(zeros)


def is_frozen(layer):
    """Whether the layer is a batch norm of constant statistics, its four vectors buffers of the usual names. It is
    tried, in float64: classes of one name have had other formulas."""
    known, forward = layer._learned.frozen, layer.plain_class.forward
    if forward not in known:
        known[forward] = not layer._parameters and is_plain(layer) and _computes_batch_norm(layer)
    return known[forward]


def _computes_batch_norm(layer):
    probe, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
    set_class(probe, layer.plain_class)
    try:
        vectors = [getattr(probe.double(), name) for name in ("running_mean", "running_var", "weight", "bias")]
        for vector in vectors:
            vector.uniform_(1e-3, 1, generator=generator)
        input = torch.rand(2, len(vectors[0]), 3, 3, generator=generator, dtype=torch.float64, device="cpu")
        torch.testing.assert_close(probe(input), F.batch_norm(input, *vectors, eps=probe.eps), rtol=1e-9, atol=1e-9)
    except (AttributeError, TypeError, RuntimeError, AssertionError):
        return False
    return True


def has_strides_of_output(input):
    """Whether a batch norm's output has the strides of its input."""
    format = CHANNELS_LAST.get(input.dim())
    return input.is_contiguous() or (format is not None and input.is_contiguous(memory_format=format))


class Inferring(Swapped):
    """A convolution that, in eval and without gradients on a CPU, puts its output off, too."""

    def forward(self, input, *args, **kwargs):
        if is_compiling() or args or kwargs:
            return super().forward(input, *args, **kwargs)
        learned = self._learned
        if type(input) is not Tensor:
            input = source_of(input)
        elif input.shape == learned.too_small:
            weight, bias = parameters_of(self)
            if weight is not None and self.plain_class.forward in _CONVOLVING:
                return self._conv_forward(input, weight, bias)
            return super().forward(input)
        layout = layout_for(self, input)
        if layout is not None and (learned.steps is not None or not learned.is_watching()):
            return learned.put_off(self, input, layout)
        if type(input) is Chain:
            input = input.make()
        output = super().forward(input)
        return output if layout is None else learned.watch(self, input, output)

    def train(self, mode=True):
        if mode:
            self._learned.packed.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # moves and casts
        self._learned.packed.clear()
        return super()._apply(*args, **kwargs)


class Folding(Swapped):
    """A convolution whose output is put off for a batch norm of constant statistics that learns its weight."""

    def forward(self, input, *args, **kwargs):
        is_patched = self.plain_class.forward not in _CONVOLVING
        if not torch.is_grad_enabled() or args or kwargs or is_patched or is_compiling():
            return super().forward(input, *args, **kwargs)
        follower = self._follower
        output = put_off(self, follower, input) if follower.decide() else None
        follower.folds = output is not None
        if output is None:
            token, output = follower.token(), super().forward(input)
            if token is not None and output.requires_grad:
                output.register_hook(token)
            if follower.batch_norm is None and follower.calls < 2 and not is_watched():
                follower.watch(self, input, output)
        return output


class Pooling(Swapped):
    """A max pooling that on a CPU takes contiguous tensors as if they were in channels_last, and saves no input."""

    def forward(self, input):
        is_torchs = self.plain_class.forward is _MAX_POOLING and F.max_pool2d is _MAX_POOL2D
        if is_torchs and not self.return_indices and is_worth(input) and is_plain(self) and ops_for(input):
            options = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
            return max_pool2d(input, *options)
        return super().forward(input)


class Recomputing(Swapped):
    """A convolution or pooling that keeps no fused ReLU's output for backward."""

    def forward(self, input, *args, **kwargs):
        with recomputing(input):
            return super().forward(input, *args, **kwargs)


class RecomputingConvolution(Swapped):
    """Likewise, for who calls its convolution without its bias, too."""

    def _conv_forward(self, input, weight, bias):
        with recomputing(input):
            return super()._conv_forward(input, weight, bias)


def _torch_classes(*names, dimensions=(1, 2, 3)):
    return [getattr(nn, f"{name}{n}d") for name in names for n in dimensions]


_RECOMPUTING = dict.fromkeys(CONVOLUTIONS, RecomputingConvolution)
_RECOMPUTING |= dict.fromkeys(_torch_classes("ConvTranspose", "MaxPool"), Recomputing)
_INFERRING = dict.fromkeys(_torch_classes("Conv", "ConvTranspose", dimensions=(2, 3)), Inferring)  # oneDNN's
_FOLDING = dict.fromkeys(CONVOLUTIONS, Folding)
_LEFT = nn.modules.lazy.LazyModuleMixin, torch.jit.ScriptModule


def is_batch_norm(module):
    """Whether it is a batch norm of any kind: those that are no nn.BatchNorm are known by the name of their class, if
    they hold none."""
    if isinstance(module, _BATCH_NORM_CLASS):
        return True
    name = getattr(module, "original_name", module.__class__.__name__)  # original_name: of a scripted module
    return "BatchNorm" in name and not any(isinstance(layer, _BATCH_NORM_CLASS) for layer in module.modules())


# The class for a layer, or None.
def deferring(layer):
    is_of_its_own = isinstance(layer, nn.SyncBatchNorm) and layer.__class__ is not nn.SyncBatchNorm
    return Deferring if is_batch_norm(layer) and not isinstance(layer, _LEFT) and not is_of_its_own else None


def synchronizing(layer):
    return Synchronizing if layer.__class__ is nn.SyncBatchNorm else None


def recomputing_inputs(layer):
    return _RECOMPUTING.get(layer.__class__)


def pooling(layer):
    return Pooling if layer.__class__ is nn.MaxPool2d else None


def folding(layer):
    return _FOLDING.get(layer.__class__)


def inferring(layer):
    return _INFERRING.get(layer.__class__)


def swapped_class(layer, *kinds):
    """The class of ours for the layer, of the kinds, beside what it does already; None where there is none."""
    found = [kind(layer) for kind in (inferring, folding, recomputing_inputs, pooling, deferring, synchronizing)]
    wanted = [kind(layer) for kind in kinds]
    bases = [base for base in found if base is not None and (base in wanted or issubclass(type(layer), base))]
    return _swapped(layer.__class__, *bases) if bases else None


@cache
def _swapped(plain_class, *bases):
    # torch.fx takes layers of torch.nn's modules as they are.
    members = {"plain_class": plain_class, "__module__": plain_class.__module__, "__doc__": plain_class.__doc__}
    name = "".join(base.__name__ for base in bases) + plain_class.__name__
    return type(name, (*bases, plain_class), members)
