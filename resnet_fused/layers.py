"""The layers that ``fuse`` swaps in: they pass for the plain ones, and do what these do, or later and at once."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .backend import ops_for
from .calls import CONVOLUTIONS, batch_norm_of, is_plain
from .deferred import Call, Seen, Watched, defer, note_compiled, settle, under
from .inference import NORMALIZED, Chained, Step, as_plain, layout_for
from .recompute import recomputing

set_class = object.__dict__["__class__"].__set__
_FORWARD, _BATCH_NORM = nn.modules.batchnorm._BatchNorm.forward, F.batch_norm


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


def plain_state(layer):
    return {name: value for name, value in vars(layer).items() if name != "_learned"}


def _buffer(name):
    """A running statistic, up to date for whoever reads it."""

    def get(self):
        for attributes in (vars(self)["_buffers"], vars(self)):
            if name in attributes:
                settle((attributes[name],))
                return attributes[name]
        raise AttributeError(name)  # and so nn.Module's __getattr__ looks on

    return property(get, lambda self, value: vars(self).update({name: value}))


class Deferring(Swapped, nn.modules.batchnorm._BatchNorm):
    """A batch norm that puts its output off, once it has been seen where that goes."""

    running_mean, running_var, num_batches_tracked = map(
        _buffer, ("running_mean", "running_var", "num_batches_tracked")
    )

    @property
    def _buffers(self):
        buffers = vars(self)["_buffers"]
        settle(buffers.values())
        return buffers

    @_buffers.setter
    def _buffers(self, buffers):
        vars(self)["_buffers"] = buffers

    def forward(self, input):
        learned = self._learned
        if is_compiling():
            note_compiled(learned.number)
        if type(input) is Chained:
            if is_plain(self) and self.plain_class.forward is _FORWARD:
                norm, training = batch_norm_of(self)
                output = None if training else input.tail.take(Step(NORMALIZED, input, norm))
                if output is not None:
                    return output
            input = input.tail.make()
        ops = ops_for(input)
        if ops is None or not self._may_defer(input):
            return super().forward(input)
        if learned.decide():
            if input.is_cpu and not self.training and not torch.is_grad_enabled():
                # The operator wins nothing there in a network: the next convolution reads a colder tensor (0.96 to 1.04
                # of eager's speed on three CPUs).
                return super().forward(input)
            self._check_input_dim(input)
            try:
                call = Call(learned, input, *batch_norm_of(self), ops)
            except RuntimeError:  # of tensors made in inference mode, which count no versions
                return super().forward(input)
            return defer(call)
        token, output = learned.token(), super().forward(input)
        if token is not None and output.requires_grad:
            output.register_hook(token)
        if learned.rectified or learned.reason:
            return output
        learned.calls += 1
        if learned.calls > 2:
            learned.refuse("its output was not seen to go to a ReLU")
        return Watched.of(output, [Seen(learned, under(input), ((input, input._version),))])

    def _may_defer(self, input):
        return (
            type(input) is Tensor
            and not input.is_inference()
            and is_plain(self)
            and self.plain_class.forward is _FORWARD
            and F.batch_norm is _BATCH_NORM
            and has_strides_of_output(input)
            and not (self.training and input.numel() == input.shape[1])
        )


def has_strides_of_output(input):
    """Whether a batch norm's output has the strides of its input."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return input.is_contiguous() or (input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()]))


class Inferring(Swapped):
    """A convolution that, in eval and without gradients on a CPU, puts its output off, too."""

    def forward(self, input, *args, **kwargs):
        if is_compiling() or args or kwargs:
            return super().forward(input, *args, **kwargs)
        learned = self._learned
        if type(input) is not Tensor:
            input = as_plain(input)
        layout = layout_for(self, input)
        if layout is not None and (learned.steps is not None or not learned.is_watching()):
            return learned.put_off(self, input, layout)
        output = super().forward(input)
        return output if layout is None else learned.watch(self, input, output)

    def train(self, mode=True):
        if mode:
            self._learned.packed.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # moves and casts
        self._learned.packed.clear()
        return super()._apply(*args, **kwargs)


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


DEFERRING = dict.fromkeys(_torch_classes("BatchNorm"), Deferring)
RECOMPUTING = dict.fromkeys(CONVOLUTIONS, RecomputingConvolution)
RECOMPUTING |= dict.fromkeys(_torch_classes("ConvTranspose", "MaxPool"), Recomputing)
INFERRING = dict.fromkeys(_torch_classes("Conv", "ConvTranspose", dimensions=(2, 3)), Inferring)  # oneDNN's


def swapped_class(layer, *tables):
    """The class of ours for the layer, by the tables, beside what it does already; None where there is none."""
    found = [table.get(layer.__class__) for table in (INFERRING, RECOMPUTING, DEFERRING)]
    wanted = [table.get(layer.__class__) for table in tables]
    bases = [base for base in found if base is not None and (base in wanted or issubclass(type(layer), base))]
    return _swapped(layer.__class__, *bases) if bases else None


@cache
def _swapped(plain_class, *bases):
    # torch.fx takes layers of torch.nn's modules as they are.
    members = {"plain_class": plain_class, "__module__": plain_class.__module__, "__doc__": plain_class.__doc__}
    name = "".join(base.__name__ for base in bases) + plain_class.__name__
    return type(name, (*bases, plain_class), members)
