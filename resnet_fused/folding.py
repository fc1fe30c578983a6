"""Fine-tuning with constant statistics: a batch norm that learns its weight, scaled into the convolution before it,

    batch_norm(convolution(x, W, b)) = convolution(x, W * scale, (b - mean) * scale + bias),
    scale = weight / sqrt(var + eps),

by PyTorch's own operators, which give all gradients. The convolution's output, of which the weight's gradient is made
otherwise, is never there, and so not kept for backward.
"""

import contextlib
from weakref import WeakValueDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import device_type_of, ops_for
from .calls import CONVOLUTIONS, batch_norm_of, is_plain, normalizing
from .convolutions import CHANNELS_LAST, geometry_of, is_channels_last, output_shape, strides_of
from .deferred import Deferred, Learned, PutOff, defer, is_small, under

_DTYPES = torch.float32, torch.float64, torch.bfloat16  # a scaled weight would leave float16's range
_TENSORS = Tensor, nn.Parameter
# Elements of the output for each of the weight, which is scaled, and its gradient, and kept for backward. Of 0.5, 2, 4
# and 16 a ResNet-50's step keeps the fewest bytes with 2 and 4 (32 of 96x96), and takes the same time with all.
LEAST_OUTPUT = 4


class Convolution(PutOff):
    """``layer(input)``, put off for a batch norm."""

    def __init__(self, layer, learned, input, shape, strides):
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.shape, self.strides = shape, strides
        super().__init__(learned, input)

    def _version(self):
        version = self.input._version + self.weight._version
        return version if self.bias is None else version + self.bias._version

    def is_open(self):
        return super().is_open() and not _is_cast(self.input)

    @contextlib.contextmanager
    def as_called(self):
        with super().as_called(), torch.autocast(device_type_of(self.input), enabled=False):
            yield

    def tensors(self):
        return self.input, self.weight, self.bias

    def of(self, input, weight, bias):
        self.check()
        return self.layer._conv_forward(input, weight, bias)

    def normalized(self, norm):
        """The batch norm of it, or None where it has to be made for that."""
        output = _scaled(self.layer, self.input, norm) if self.is_open() else None
        if output is not None:
            self.ends_with(output)
        return output


class Convolved(Deferred):
    """What a :class:`Convolution` gives, without data."""

    @staticmethod
    def __new__(cls, tail):
        x = tail.input
        self = Tensor._make_wrapper_subclass(cls, tail.shape, strides=tail.strides, dtype=x.dtype, device=x.device)
        self.tail = tail
        return self

    @classmethod
    def asked(cls, function, types, args, kwargs):
        if function is F.batch_norm and type(args[0]) is cls:
            norm, training = normalizing(*args, **kwargs) or (None, True)
            output = None if training else args[0].tail.normalized(norm)
            if output is not None:
                return output
        return super().asked(function, types, args, kwargs)


class Follower(Learned):
    """The batch norm that takes a convolution's output."""

    kind = "a convolution"

    def __init__(self, name):
        super().__init__(name)
        self.batch_norm = None  # referenced weakly
        self.output = self.under = None  # of a call that is watched, the former likewise, the latter as long
        self.folds = False  # the latest call, for the report

    def watch(self, layer, input, output):
        self.calls += 1
        if _layout_of(layer, input) != (output.shape, output.stride()):
            self.refuse("its output has another layout than is expected")
        self.output, self.under, _watched[id(output)] = ref(output, self.forget), under(input), self

    def forget(self, _):
        self.under = None  # whose hooks may keep tensors

    def wants(self):
        layer = self.batch_norm and self.batch_norm()
        # Of what a pooling takes, too, as much is kept either way, and the operator is faster.
        return self.reason is None and layer is not None and _keeps_its_input(layer) and not layer._learned.pools


_watched: WeakValueDictionary[int, Follower] = WeakValueDictionary()  # by the id of an output


def note_batch_norm(layer, input):
    """The layer takes the input."""
    follower = _watched.pop(id(input), None) if len(_watched) else None
    if follower is not None and follower.output() is input and follower.under == under(input):
        follower.batch_norm, layer._learned.follower = ref(layer), ref(follower)
        follower.output = follower.under = None


def _is_cast(input):
    """Whether convolutions cast: rounded to bfloat16, a scaled weight costs up to 1.4 times eager's error."""
    return torch.is_autocast_enabled(device_type_of(input))


def _keeps_its_input(layer):
    """Whether the batch norm's statistics are constant, and its weight learns."""
    weight = layer._parameters.get("weight")
    return not layer.training and weight is not None and weight.requires_grad


def _scaled(layer, input, norm):
    """The batch norm of the convolution, as one convolution; None where it has other types."""
    mean, var, weight, bias, _, eps, *_ = norm
    vectors = mean, var, weight, weight if bias is None else bias
    if any(vector is None or vector.dtype is not layer.weight.dtype for vector in vectors):
        return None
    scale = (var + eps).rsqrt() * weight
    shift = (-mean if layer.bias is None else layer.bias - mean) * scale
    scaled = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    return layer._conv_forward(input, scaled, shift if bias is None else shift + bias)


def _layout_of(layer, input):
    """Shape and strides of the layer's output; None where they are not known."""
    geometry, weight, format = geometry_of(layer), layer.weight, CHANNELS_LAST.get(input.dim())
    if geometry is None or input.dim() != weight.dim():
        return None
    shape = output_shape(layer, input.shape, geometry[0])
    in_channels_last = format is not None and any(is_channels_last(tensor, format) for tensor in (input, weight))
    return shape, strides_of(shape, in_channels_last)


def _layout_if_worth(layer, input):
    """Of the layer's output, where it is to be folded, else None."""
    parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    if (
        any(type(tensor) not in _TENSORS or tensor.is_inference() for tensor in (input, *parameters))
        or any(parameter.dtype is not input.dtype or parameter.device != input.device for parameter in parameters)
        or input.dtype not in _DTYPES
        or _is_cast(input)
        or not layer.weight.requires_grad
        or input.numel() == 0
        or input.shape[1] != layer.in_channels
        or not is_plain(layer, *CONVOLUTIONS)
        or ops_for(input) is None
    ):
        return None
    layout = _layout_of(layer, input)
    if layout is None or min(layout[0]) < 1:
        return None
    elements = layout[0].numel()
    return None if is_small(input, elements) or elements < LEAST_OUTPUT * layer.weight.numel() else layout


def put_off(layer, follower, input):
    """The layer's output, put off; None where that is not worth it, or cannot be."""
    layout = _layout_if_worth(layer, input)
    return None if layout is None else defer(Convolution(layer, follower, input, *layout), Convolved)


def folded(layer, batch_norm, input):
    """``batch_norm(layer(input))`` as one convolution; None where that is not worth it, or cannot be."""
    if not torch.is_grad_enabled() or not _keeps_its_input(batch_norm) or _layout_if_worth(layer, input) is None:
        return None
    norm, training = batch_norm_of(batch_norm)
    return None if training else _scaled(layer, input, norm)
