"""Layers called fused: what FusedResidual's forward and every rewritten one is made of.

The operators are stricter than the layers (one dtype, one shape, an int64 counter). What they refuse, before they touch
anything, runs as layers here, so that nothing is refused that eager takes.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .backend import UnservedDevice
from .functional import BatchNorm, batch_norm_add_batch_norm_relu, batch_norm_add_relu, batch_norm_relu
from .recompute import recomputing

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain(layer, *classes):
    """Whether the layer, of one of the classes, does what its class's forward says and no more, so that its arithmetic
    may be fused. Without classes, of any."""
    return (
        (not classes or type(layer) in classes)
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and not _has_any_global_hook()
    )


class Convolved(NamedTuple):
    """The output of a convolution, and the bias that was left out of it."""

    output: torch.Tensor
    bias: torch.Tensor | None = None


def convolve(conv, input, recompute=False):
    """``conv(input)`` as :class:`Convolved`, with its bias where it must run as a module.

    With ``recompute`` as :func:`call_recomputing`.
    """
    with recomputing(input) if recompute else nullcontext():
        is_batched = type(conv) in CONVOLUTIONS and input.dim() == conv.weight.dim()  # else dimension 1 is no channels
        if is_batched and is_plain(conv):
            return Convolved(conv._conv_forward(input, conv.weight, None), conv.bias)
        return Convolved(conv(input))


def call_recomputing(consumer, input):
    """``consumer(input)``; where input is a ``relu(bn(input))`` of :func:`call_tail`, it is not kept for backward."""
    with recomputing(input):
        return consumer(input)


def _add_bias(input, bias):
    return input if bias is None else input + bias.to(input.dtype).view(-1, *[1] * (input.dim() - 2))


def _batch_norm_arguments(bn):
    """What the layer's forward would hand to F.batch_norm, with the counter beside it."""
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


def _attempt(operator, *args, **kwargs):
    """What the operator returns, or None where it refuses its arguments."""
    try:
        return operator(*args, **kwargs)
    except UnservedDevice:  # of a backend that was asked for by name
        raise
    except (TypeError, ValueError):
        return None


def call_tail(bn, input, inplace=None, residual=None, residual_bn=None, residual_first=False):
    """``relu(bn(input))``, ``relu(bn(input) + residual)`` or ``relu(bn(input) + residual_bn(residual))``.

    The batch norms are plain. Of what is :class:`Convolved` the bias is added first.

    Fused where a sum has the input's shape and type, and both batch norms are in the same mode: an out-of-place sum
    broadcasts, and promotes types. ``inplace``: whether it is an ``add_``; None: there is none. ``residual_first``: the
    order of the batch norms where they run one by one, which tells if they share statistics.
    """
    input, input_bias = input if isinstance(input, Convolved) else (input, None)
    residual, residual_bias = residual if isinstance(residual, Convolved) else (residual, None)
    bn._check_input_dim(input)
    arguments = _batch_norm_arguments(bn)
    if inplace is None:
        output = _attempt(batch_norm_relu, input, **arguments, input_bias=input_bias)
        return F.relu(bn(_add_bias(input, input_bias))) if output is None else output
    if residual_bn is not None:
        residual_bn._check_input_dim(residual)
        first, second = dict(arguments), _batch_norm_arguments(residual_bn)
        training = first.pop("training")
        if second.pop("training") == training and _are_alike(input, residual):
            norms = BatchNorm(**first, input_bias=input_bias), BatchNorm(**second, input_bias=residual_bias)
            output = _attempt(batch_norm_add_batch_norm_relu, input, residual, *norms, training)
            if output is not None:
                return output
        residual, residual_bias = _add_bias(residual, residual_bias), None
        if not residual_first:
            return _relu_of_sum(bn(_add_bias(input, input_bias)), residual_bn(residual), inplace)
        residual = residual_bn(residual)
    if _are_alike(input, residual, inplace):
        if residual_bias is not None:
            arguments["bias"] = residual_bias if bn.bias is None else bn.bias + residual_bias
        output = _attempt(batch_norm_add_relu, input, residual, **arguments, input_bias=input_bias)
        if output is not None:
            return output
    return _relu_of_sum(bn(_add_bias(input, input_bias)), _add_bias(residual, residual_bias), inplace)


def _relu_of_sum(output, residual, inplace):
    return F.relu(output.add_(residual) if inplace else output + residual)


def _are_alike(input, residual, broadcasts=False):
    return (
        isinstance(residual, torch.Tensor)
        and (broadcasts or residual.shape == input.shape)
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == input.layout
    )
