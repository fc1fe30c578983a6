"""Layers called fused: what FusedResidual's forward is made of, and what the layers that fuse swaps in know of layers.

The operators are stricter than the layers (one dtype, one shape, an int64 counter). What they refuse, before they touch
anything, runs as layers here, so that nothing is refused that eager takes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import autograd
from .backend import ops_for
from .functional import BatchNorm, like_input
from .reference import add_bias
from .synchronized import group_of, over

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain(layer, *classes):
    """Whether the layer, of one of the classes, does what its class's forward says and no more, so that its arithmetic
    may be fused. Without classes, of any."""
    return (
        (not classes or layer.__class__ in classes)
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


def convolve(conv, input):
    """``conv(input)`` as :class:`Convolved`, with its bias where it must run as a module."""
    is_batched = conv.__class__ in CONVOLUTIONS and input.dim() == conv.weight.dim()  # else dimension 1 is no channels
    if is_batched and is_plain(conv):
        return Convolved(conv._conv_forward(input, conv.weight, None), conv.bias)
    return Convolved(conv(input))


def batch_norm_of(layer):
    """What the layer's forward would hand to F.batch_norm, with the counter beside it, and whether it normalises by the
    batch's statistics."""
    # nn.Module looks attributes up three times as long.
    parameters, buffers = layer._parameters, layer.__dict__["_buffers"]
    training = layer.training
    is_tracking = training and layer.track_running_stats
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        counter = buffers["num_batches_tracked"] if is_tracking else None
    except KeyError:  # somebody has put something else in the place of one
        weight, bias, running_mean, running_var = layer.weight, layer.bias, layer.running_mean, layer.running_var
        counter = layer.num_batches_tracked if is_tracking else None
    uses_batch = training or (running_mean is None and running_var is None)
    if training and not is_tracking:
        running_mean = running_var = None
    momentum = 0.0 if layer.momentum is None and counter is None else layer.momentum
    return BatchNorm(running_mean, running_var, weight, bias, momentum, layer.eps, counter), uses_batch


def normalizing(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """What a call of F.batch_norm is handed, as :func:`batch_norm_of` says it; None where it would raise."""
    if running_mean is None and not training:
        return None
    return BatchNorm(running_mean, running_var, weight, bias, momentum, eps), training


def call_tail(bn, convolved, residual=None):
    """``relu(bn(input))`` or ``relu(bn(input) + residual)``, of what is :class:`Convolved`; unfused where refused."""
    output = _attempt(bn, *convolved, *residual or (None, None))
    if output is not None:
        return output
    output = bn(add_bias(*convolved))
    return F.relu(output if residual is None else output.add_(add_bias(*residual)))


def _attempt(bn, input, input_bias, residual, residual_bias):
    ops = ops_for(input, residual)
    if ops is None:
        return None
    bn._check_input_dim(input)
    norm, training = batch_norm_of(bn)
    if residual_bias is not None:
        norm = norm._replace(bias=residual_bias if norm.bias is None else norm.bias + residual_bias)
    if residual is not None:
        try:
            residual = like_input(residual, input)
        except (TypeError, ValueError):  # eager has an error of its own
            return None
    ops = over(ops, group_of(bn) if training else None)
    return autograd.attempt(ops, input, residual, norm._replace(input_bias=input_bias), None, training)
