"""The layers that ``fuse`` swaps in: they pass for the plain ones, and do what these do, or later and at once."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .backend import ops_for
from .calls import CONVOLUTIONS, batch_norm_of, is_plain
from .deferred import Call, Seen, Watched, defer, note_compiled, settle, under
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


def _swapped(plain_class, base):
    # torch.fx takes layers of torch.nn's modules as they are.
    members = {"plain_class": plain_class, "__module__": plain_class.__module__, "__doc__": plain_class.__doc__}
    return type(f"{base.__name__}{plain_class.__name__}", (base, plain_class), members)


def _torch_classes(*names):
    return [getattr(nn, f"{name}{dimensions}d") for name in names for dimensions in (1, 2, 3)]


DEFERRING = {plain: _swapped(plain, Deferring) for plain in _torch_classes("BatchNorm")}
RECOMPUTING = {plain: _swapped(plain, RecomputingConvolution) for plain in CONVOLUTIONS}
RECOMPUTING |= {plain: _swapped(plain, Recomputing) for plain in _torch_classes("ConvTranspose", "MaxPool")}
