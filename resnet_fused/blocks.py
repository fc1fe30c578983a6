"""The residual block, plain and fused. A block holds its layers and the data flow between them, no more."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .functional import BatchNorm, batch_norm_add_batch_norm_relu, batch_norm_add_relu, batch_norm_relu
from .recompute import recomputing


class Residual(nn.Module):
    """The plain block, and the reference: ``relu(bn2(conv2(relu(bn1(conv1(X))))) + X)``.

    Args:
        input_channels: channels of X.
        num_channels: channels of the output.
        use_1x1conv: send X through ``conv3``, a 1x1 convolution, before it is added; needed where the channels or,
            by ``strides``, the size change.
        strides: stride of ``conv1`` and ``conv3``.

    Shape: (N, input_channels, H, W) -> (N, num_channels, ceil(H / strides), ceil(W / strides)).

    Source: https://arxiv.org/abs/1512.03385, in the form of "Dive into Deep Learning", section 8.6.
    """

    def __init__(self, input_channels, num_channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3 is not None:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


def is_plain(layer, layer_class):
    """Whether the layer does what its class's forward says and no more, so that its arithmetic may be fused."""
    return has_no_additions(layer, layer_class) and not _has_any_global_hook()


def has_no_additions(layer, layer_class):
    """Whether the layer is plain but for hooks that are on every module."""
    return (
        type(layer) is layer_class
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


def _convolve_without_bias(conv, X):
    """(convolution without its bias, the bias), or (the layer's output, None) where it must run as a module."""
    if is_plain(conv, nn.Conv2d):
        return conv._conv_forward(X, conv.weight, None), conv.bias
    return conv(X), None


def _batch_norm_arguments(bn):
    """What nn.BatchNorm2d.forward would hand to F.batch_norm, with the counter beside it."""
    tracks = bn.training and bn.track_running_stats
    uses_running = not bn.training or bn.track_running_stats
    counter = bn.num_batches_tracked if tracks else None
    return {
        "running_mean": bn.running_mean if uses_running else None,
        "running_var": bn.running_var if uses_running else None,
        "weight": bn.weight,
        "bias": bn.bias,
        "training": bn.training or (bn.running_mean is None and bn.running_var is None),
        "momentum": 0.0 if bn.momentum is None and counter is None else bn.momentum,
        "eps": bn.eps,
        "num_batches_tracked": counter,
    }


def call_batch_norm_relu(bn, input):
    """``relu(bn(input))``, of a plain batch norm, fused."""
    bn._check_input_dim(input)
    return batch_norm_relu(input, **_batch_norm_arguments(bn))


def call_batch_norm_add_relu(bn, input, residual, inplace):
    """``relu(bn(input) + residual)``, or, ``inplace``, ``relu(bn(input).add_(residual))``; of a plain batch norm.

    Fused where both sums are the same: an out-of-place one broadcasts, and promotes types.
    """
    if not _are_alike(input, residual):
        output = bn(input)
        return F.relu(output.add_(residual) if inplace else output + residual)
    bn._check_input_dim(input)
    return batch_norm_add_relu(input, residual, **_batch_norm_arguments(bn))


def call_batch_norm_add_batch_norm_relu(bn, input, residual_bn, residual, inplace):
    """``relu(bn(input) + residual_bn(residual))``, of plain batch norms; ``inplace`` as above.

    Fused where the tensors are alike, and both batch norms in the same mode.
    """
    first, second = _batch_norm_arguments(bn), _batch_norm_arguments(residual_bn)
    training = first.pop("training")
    if not _are_alike(input, residual) or second.pop("training") != training:
        return call_batch_norm_add_relu(bn, input, residual_bn(residual), inplace)
    bn._check_input_dim(input)
    residual_bn._check_input_dim(residual)
    return batch_norm_add_batch_norm_relu(input, residual, BatchNorm(**first), BatchNorm(**second), training)


def _are_alike(input, residual):
    return (
        isinstance(residual, torch.Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def call_recomputing(consumer, input):
    """``consumer(input)``; where input is an output of :func:`call_batch_norm_relu`, it is not kept for backward."""
    with recomputing(input):
        return consumer(input)


def _sum_biases(bias, other):
    return other if bias is None else bias if other is None else bias + other


class FusedResidual(Residual):
    """A drop-in for :class:`Residual`: the same parameters, ``state_dict`` and numbers, with less memory traffic.

    Both batch norms run fused with what follows them, and the convolutions run without their biases: batch statistics
    cancel those of ``conv1`` and ``conv2`` (their gradient is a zero tensor), and that of ``conv3`` joins ``bn2``'s.

    The children stay plain ``nn.Conv2d`` and ``nn.BatchNorm2d``. One that is of another class, carries hooks or
    parametrizations, or has a ``forward`` of its own is called as a module, and that part runs unfused.

    Arguments and shapes as :class:`Residual`'s. The forward raises ValueError where X is not 4-D, and what
    :func:`resnet_fused.functional.batch_norm_add_relu` raises.
    """

    _memory_efficient = False  # fuse sets it on an instance

    @classmethod
    def from_residual(cls, block):
        """A FusedResidual that shares ``block``'s layers, and so its parameters and buffers."""
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name in ("conv1", "conv2", "conv3", "bn1", "bn2"):
            setattr(fused, name, getattr(block, name, None))
        fused.training = block.training  # not .train(): each batch norm keeps a mode of its own
        return fused

    def forward(self, X):
        if X.dim() != 4:
            raise ValueError(f"X: expected 4 dimensions, (N, C, H, W), got shape {tuple(X.shape)}")
        Y = self._conv_bn_relu(X)
        return self._conv_bn_add_relu(Y, X)

    def _conv_bn_relu(self, X):
        if not is_plain(self.bn1, nn.BatchNorm2d):
            return F.relu(self.bn1(self.conv1(X)))
        X, conv_bias = _convolve_without_bias(self.conv1, X)
        return batch_norm_relu(X, **_batch_norm_arguments(self.bn1), input_bias=conv_bias)

    def _conv_bn_add_relu(self, Y, X):
        if not is_plain(self.bn2, nn.BatchNorm2d):
            Y = self.bn2(self.conv2(Y))
            X = X if self.conv3 is None else self.conv3(X)
            return F.relu((Y + X.expand_as(Y)).to(Y.dtype))  # not in place: a hook may have kept Y
        with recomputing(Y) if self._memory_efficient else nullcontext():
            Y, conv_bias = _convolve_without_bias(self.conv2, Y)
        arguments = _batch_norm_arguments(self.bn2)
        if self.conv3 is not None:
            X, residual_bias = _convolve_without_bias(self.conv3, X)
            arguments["bias"] = _sum_biases(arguments["bias"], residual_bias)
        return batch_norm_add_relu(Y, X, **arguments, input_bias=conv_bias)
