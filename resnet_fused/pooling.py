"""Max pooling on a CPU by the kernel that PyTorch has for channels_last, saving positions alone for backward.

The kernel for contiguous tensors takes the windows one by one: 55 ms of a core of a Xeon for 32x64x48x48 and windows of
3x3, stride 2, where this takes 15, the conversions included.
"""

import torch
from torch.autograd import Function

from .ops import memory_format_of

_ops = torch.ops.aten
# Below, the conversions take longer than they save: channels, which that kernel has its vectors along, and values.
LEAST_CHANNELS, LEAST_VALUES = 8, 2**14


def is_worth(input):
    """Whether :func:`max_pool2d` takes the tensor, and is the faster one, or as fast where it is channels_last."""
    return (
        type(input) is torch.Tensor
        and input.is_cpu
        and input.dim() == 4
        and input.shape[1] >= LEAST_CHANNELS
        and input.numel() >= LEAST_VALUES
        and input.is_floating_point()
        and (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last))
    )


def max_pool2d(input, *options):
    """``F.max_pool2d`` of a dense tensor, (N, C, H, W), of any floating type, to the bit; gradients of any order.

    ``options``: kernel_size, stride, padding, dilation and ceil_mode. Raises what F.max_pool2d does. For backward it
    saves positions alone, where F.max_pool2d saves the input, too.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        return _MaxPool2d.apply(input, *options)
    return _pool(input, *options)[0]


def _pool(input, *options):
    """The output, and the position of each of its values."""
    both = _ops.max_pool2d_with_indices(input.contiguous(memory_format=torch.channels_last), *options)
    return [tensor.contiguous(memory_format=memory_format_of(input)) for tensor in both]


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, input, *options):
        output, positions = _pool(input, *options)
        ctx.save_for_backward(positions)
        ctx.shape, ctx.memory_format, ctx.options = input.shape, memory_format_of(input), options
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (positions,) = ctx.saved_tensors
        # Of the input only the shape and the layout are asked; what is not touched takes no memory.
        like = torch.empty(ctx.shape, dtype=grad_output.dtype, memory_format=ctx.memory_format)
        grad = _ops.max_pool2d_with_indices_backward(grad_output, like, *ctx.options, positions)
        return grad, *(None for _ in ctx.options)
