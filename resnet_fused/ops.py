"""The raw ops of a backend, whose schemas are in csrc/ops.cpp; the tensors that they take, return and save.

They have no fake implementations: where somebody traces, PyTorch's own operators run.
"""

from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

from . import reference


class BatchNorm(NamedTuple):
    """One of the two batch norms of :func:`batch_norm_add_batch_norm_relu`: arguments of :func:`batch_norm_relu`."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    input_bias: Tensor | None = None


class MaxPool(NamedTuple):
    """Windows of :func:`torch.nn.functional.max_pool2d`, of H and W each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    output_size: tuple[int, int]

    @staticmethod
    def of(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        """None where the ops have no such windows. Raises what max_pool2d does."""
        options = kernel_size, stride, padding, dilation, ceil_mode
        try:
            return _max_pool(input.shape, *(tuple(o) if isinstance(o, list) else o for o in options))
        except (RuntimeError, TypeError):
            F.max_pool2d(input, *options[:4], ceil_mode=ceil_mode)  # whose words depend on the device
            raise

    @staticmethod
    def of_numbers(numbers, input, has_residual):
        """What :meth:`numbers` says, for an op in Python; None of None."""
        if numbers is None:
            return None
        if has_residual:
            raise ValueError("residual: expected none before max_pool")
        if len(numbers) == 10:
            *options, output_size = zip(numbers[::2], numbers[1::2], strict=True)
            for ceil_mode in (False, True):
                with suppress(RuntimeError):
                    max_pool = _max_pool(input.shape, *options, ceil_mode)
                    if max_pool is not None and max_pool.output_size == output_size:
                        return max_pool
        raise ValueError(f"max_pool: expected windows over the input, of at most 255 positions, got {numbers}")

    def numbers(self):
        """As the ops take it."""
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, *self.output_size]

    def sources(self, winners, input):
        """For each element of the output the one of (H * W) that wins, and whether a gradient goes there."""
        sizes = (len(winners), *self.output_size, input.shape[1])
        if memory_format_of(input) == torch.contiguous_format:
            winners = winners.view(sizes[0], sizes[3], *self.output_size)
        else:
            winners = winners.view(sizes).movedim(-1, 1)
        passed = winners != 255
        position, index = torch.where(passed, winners, 0).long(), 0
        in_window = position // self.kernel_size[1], position % self.kernel_size[1]
        for axis, size in enumerate(input.shape[2:]):
            begins = torch.arange(self.output_size[axis], device=input.device) * self.stride[axis] - self.padding[axis]
            begins = begins.view(-1, 1) if axis == 0 else begins
            index = index * size + begins + in_window[axis] * self.dilation[axis]
        return torch.where(passed, index, 0), passed


@lru_cache(1024)
def _max_pool(shape, *options):
    output = F.max_pool2d(torch.empty(shape, device="meta"), *options[:4], ceil_mode=options[4])
    kernel_size, stride, padding, dilation = (_pair(option) for option in options[:4])
    if len(shape) != 4 or kernel_size[0] * kernel_size[1] > 255:
        return None
    sizes = zip(kernel_size, padding, dilation, shape[2:], strict=True)
    if any((kernel - 1) * distance >= size + 2 * pad for kernel, pad, distance, size in sizes):  # by ceil_mode
        return None
    return MaxPool(kernel_size, stride or kernel_size, padding, dilation, options[4], tuple(output.shape[2:]))


def _pair(option):
    if isinstance(option, int):
        return option, option
    return option and tuple(option) * (2 // len(option))


def new_statistics(input, norms):
    # float64, whatever the input: rounded to float32, a mean of 1e4 is off by 5 % of a standard deviation of 1e-2.
    return input.new_empty((norms, 2, input.shape[1]), dtype=torch.float64)


def memory_format_of(input):
    """That of the output: in which the ops see every tensor."""
    # Python's suggest_memory_format, unlike C++'s, takes (4, 1, 9, 9) of strides (81, 1, 9, 1) for channels_last.
    return torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)


def new_like_input(input, needed=True):
    return torch.empty_like(input, memory_format=memory_format_of(input)) if needed else None


def new_per_channel(input, parameter, needed):
    if not needed:
        return None
    return input.new_empty(input.shape[1], dtype=torch.float64 if parameter is None else parameter.dtype)


def new_gradients(like, weight, bias, input_bias, need_input, need_weight, need_bias, need_input_bias):
    """Of one batch norm: its input's, dense as the output of ``like`` is, and its vectors'; None where not needed."""
    return (
        new_like_input(like, need_input),
        new_per_channel(like, weight, need_weight),
        new_per_channel(like, bias, need_bias),
        new_per_channel(like, input_bias, need_input_bias),
    )


def matrix_shape(input):
    """Rows and columns of the dense input as the GPUs' kernels take it, and their mask."""
    if memory_format_of(input) == torch.contiguous_format:
        return input.shape[0], input.numel() // input.shape[0] if input.shape[0] else 0
    return input.numel() // input.shape[1], input.shape[1]


def unpack_mask(mask, input):
    """The mask's bits as booleans of the input's shape."""
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    values = bits.flatten(1)[:, : input.numel() // max(len(mask), 1)].bool()
    if memory_format_of(input) == torch.contiguous_format:
        return values.reshape(input.shape)
    return values.reshape(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)


class Ops(NamedTuple):
    """A backend's ops, resolved once: looking them up on every call costs 2 us of 125 at 8 elements."""

    batch_norm_add_relu: OpOverload
    batch_norm_add_relu_backward: OpOverload
    batch_norm_statistics: OpOverload

    spans_processes = False
    batch_norm = staticmethod(reference.batch_norm)

    @classmethod
    def of(cls, namespace: str) -> "Ops":
        return cls(*(getattr(getattr(torch.ops, namespace), name).default for name in cls._fields))

    def beside(self, other):
        """The ops for a tail of two batch norms, this one's and the other's; None where there are none."""
        return self if other == self else None

    def forward(
        self,
        input,
        residual,
        batch_norm,
        residual_batch_norm,
        training,
        max_pool=None,
        need_mask=False,
        statistics=None,
    ):
        """(output, mask, statistics), None for what was not asked for."""
        arguments, options = (input, *batch_norm, training, need_mask, residual), {}
        if residual_batch_norm is not None:
            arguments += residual_batch_norm
        if statistics is not None:
            options["statistics"] = statistics
        if max_pool is not None:
            options["max_pool"] = max_pool.numbers()
        return self.batch_norm_add_relu(*arguments, **options)

    def backward(self, training, max_pool, needed, grad_output, mask, statistics, *tensors, grad_means=None):
        """The gradients of ``tensors``: input, weight, bias, input_bias, and the same of the residual, all of it None
        where it has no batch norm. ``needed``: whether each is.
        """
        input, weight, bias, input_bias, residual, *of_residual = tensors
        arguments = grad_output, mask, statistics, training, input, weight, bias, input_bias, *needed[:5]
        if residual is not None:
            arguments += residual, *of_residual, *needed[5:]
        options = {}
        if grad_means is not None:
            options["grad_means"] = grad_means
        if max_pool is not None:
            options["max_pool"] = max_pool.numbers()
        return self.batch_norm_add_relu_backward(*arguments, **options)
