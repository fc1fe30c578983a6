"""The public functions: formula, argument checks, and the hand-over to the backend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from . import autograd, reference
from .backend import is_watched, ops_for
from .checks import check, check_arguments
from .ops import BatchNorm, MaxPool
from .synchronized import of_several, over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:  # a torch may be built without
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", object)


def like_input(residual, input):
    """residual in the input's dtype and shape, as an in-place ``+=`` onto the normalised input would take it."""
    if residual.dtype != input.dtype:
        if residual.is_complex():
            raise TypeError(f"residual: expected a real tensor, to add to {input.dtype}, got {residual.dtype}")
        residual = residual.to(input.dtype)
    if residual.shape != input.shape:
        try:
            residual = residual.expand(input.shape)
        except RuntimeError:
            raise ValueError(
                f"residual: expected a shape that broadcasts to the input's, {tuple(input.shape)}, "
                f"got {tuple(residual.shape)}"
            ) from None
    return residual


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    input_bias: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""``relu(batch_norm(input))`` as one operator.

    .. math:: y = \max\Big(0, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta\Big)

    with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of each channel of the batch
    (``training=True``), or ``running_mean`` and ``running_var``. Exactly ``F.relu(F.batch_norm(...))``: ties, NaNs,
    running statistics and gradients of any order included.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64; any strides.
        running_mean, running_var: (C,), or both None (then ``training`` must be True). In training updated in place:
            ``running = (1 - momentum) * running + momentum * batch``, the variance by its unbiased estimate.
        weight, bias: gamma and beta, (C,), or None for 1 and 0.
        training: normalise by the batch's statistics, and update the running ones where given.
        momentum: any float, or None for the cumulative average ``1 / num_batches_tracked``, computed on the device.
        eps: added to the variance; > 0 in training, >= 0 otherwise.
        num_batches_tracked: one int64, incremented in training; needed where ``momentum=None``.
        input_bias: (C,), a bias that the convolution before left out: the result is that of ``input + input_bias``,
            without a pass over memory for it. Batch statistics cancel it; its gradient is then zero.
        process_group: in training, normalise by the statistics of the batches of all its processes, each of which
            calls this, as nn.SyncBatchNorm does; one collective forward and one backward, on any device. Batches may be
            of different sizes, or empty. The gradients of weight and bias are those of this process's batch. There are
            no second derivatives.

    The per-channel vectors have the input's dtype, or float32 where the input is float16 or bfloat16. Arithmetic is in
    float32, for float64 inputs in float64.

    Returns:
        (N, C, *), of the input's dtype and memory format (contiguous, channels_last or channels_last_3d).

    Raises:
        TypeError: input not one of the four types; a per-channel vector of another type than said above.
        ValueError: fewer than 2 dimensions; no channels; a vector that has not C values; tensors on several devices;
            only one of running_mean and running_var, or neither where training=False; one value per channel in
            training; eps out of range; momentum=None without num_batches_tracked; a backend chosen by name that does
            not serve the input's device; a process_group without this process.
        RuntimeError: the group's processes differ in channels, type or number of batch norms; what its collectives
            raise. The running statistics are then as they were.

    Source: Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167; PyTorch's ``F.batch_norm``.
    """
    batch_norm = BatchNorm(running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked, input_bias)
    return _call(input, None, batch_norm, None, training, process_group)


def batch_norm_add_relu(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    input_bias: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""``relu(batch_norm(input) + residual)``, the tail of a residual block, as one operator.

    .. math:: y = \max\Big(0, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + r\Big)

    Exactly ``F.relu(F.batch_norm(...).add_(residual))``; see :func:`batch_norm_relu` for the other arguments, what is
    returned and what is raised.

    Args:
        residual: of the input's shape, or one that broadcasts to it; any strides. Another real dtype is converted to
            the input's before it is added. None: the same as :func:`batch_norm_relu`.

    Raises:
        TypeError: a complex residual.
        ValueError: a residual whose shape does not broadcast to the input's, or on another device.

    Source: He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
    """
    batch_norm = BatchNorm(running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked, input_bias)
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        check_arguments(input, **batch_norm._asdict(), training=training)
        residual = like_input(residual, input)
    return _call(input, residual, batch_norm, None, training, process_group)


def batch_norm_add_batch_norm_relu(
    input: Tensor,
    residual: Tensor,
    batch_norm: BatchNorm,
    residual_batch_norm: BatchNorm,
    training: bool = False,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""``relu(batch_norm(input) + batch_norm(residual))``, the tail of a block that downsamples, as one operator.

    .. math::
        y = \max\Big(0, \frac{x - \mu_x}{\sqrt{\sigma_x^2 + \epsilon_x}} \gamma_x + \beta_x
            + \frac{r - \mu_r}{\sqrt{\sigma_r^2 + \epsilon_r}} \gamma_r + \beta_r\Big)

    Exactly ``F.relu(F.batch_norm(input, ...).add_(F.batch_norm(residual, ...)))``; see :func:`batch_norm_relu` for the
    statistics, types, and what is returned and raised.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64; any strides.
        residual: of the input's shape and dtype; any strides.
        batch_norm, residual_batch_norm: what normalises each, a :class:`BatchNorm`, with momentum and eps of its own,
            and, in training, with running statistics and counter of its own.
        training, process_group: of both, which share a collective.

    Raises:
        TypeError: a residual of another dtype than the input's.
        ValueError: a residual of another shape or on another device; in training, the same running statistics or
            counter for both. What is wrong with a vector of ``residual_batch_norm`` is told under its name with
            ``residual_`` before it.

    Source: He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, section 3.3,
    option B; ``downsample`` in torchvision's and timm's ResNets.
    """
    return _call(input, residual, batch_norm, residual_batch_norm, training, process_group)


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    num_batches_tracked: Tensor | None = None,
    input_bias: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""``max_pool2d(relu(batch_norm(input)), kernel_size, ...)``, the stem of a residual network, as one operator.

    .. math::
        y_w = \max_{i \in w} \max\Big(0, \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta\Big)

    over each window :math:`w` of each channel. What is pooled is never in memory: beside input and per-channel
    vectors it saves a byte for each element of the output, the position in its window that the gradient goes to. Of
    equal values that is the first, of NaNs the last, as in F.max_pool2d. See :func:`batch_norm_relu` for the other
    arguments, what is returned and what is raised.

    Args:
        input: (N, C, H, W).
        kernel_size, stride, padding, dilation, ceil_mode: as F.max_pool2d's. Windows of more than 255 positions, and an
            input of three dimensions, are pooled by an operator of their own.

    Raises:
        RuntimeError, TypeError: windows that F.max_pool2d refuses, in its words. The running statistics are then as
            they were.

    Source: He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, table 1;
    PyTorch's ``F.max_pool2d``.
    """
    batch_norm = BatchNorm(running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked, input_bias)
    options = kernel_size, stride, padding, dilation
    max_pool = None if is_watched() else MaxPool.of(input, *options, ceil_mode)
    if max_pool is not None:
        return _call(input, None, batch_norm, None, training, process_group, max_pool)
    output = _call(input, None, batch_norm, None, training, process_group)
    return F.max_pool2d(output, *options, ceil_mode=ceil_mode)


def _call(input, residual, batch_norm, residual_batch_norm, training, process_group, max_pool=None):
    tensors = input, residual, batch_norm.running_mean, batch_norm.weight, batch_norm.bias
    if residual_batch_norm is not None:
        tensors += residual_batch_norm.running_mean, residual_batch_norm.weight, residual_batch_norm.bias
    ops = ops_for(*tensors)
    group = of_several(process_group) if training else None
    if ops is not None:
        arguments = input, residual, batch_norm, residual_batch_norm, training, max_pool
        output = autograd.attempt(over(ops, group), *arguments)
        if output is not None:
            return output
    arguments = input, residual, batch_norm, residual_batch_norm, training
    check(*arguments, is_whole_batch=group is None)
    normalized = reference.batch_norm if group is None else over(ops, group).batch_norm
    return reference.batch_norm_add_relu(*arguments, normalized, max_pool)
