"""What the arguments of the fused operators may be."""

import torch

# Types of the input, and for each those that its per-channel vectors may have.
_VECTOR_TYPES = {
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


def check_device(name, tensor, input):
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected a tensor on the input's device, {input.device}, got one on {tensor.device}")


def check_like_input(name, tensor, input, shape=None):
    """``shape``: where it is not the input's."""
    check_device(name, tensor, input)
    shape = input.shape if shape is None else shape
    if tensor.shape != shape or tensor.dtype != input.dtype:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} and the input's type, {input.dtype}, "
            f"got {tuple(tensor.shape)} of {tensor.dtype}"
        )


def check_input(input):
    if input.dtype not in _VECTOR_TYPES:
        raise TypeError(f"input: expected float16, bfloat16, float32 or float64, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions, (N, C, *), got shape {tuple(input.shape)}")
    if input.shape[1] == 0:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")


def _check_vectors(input, prefix, **vectors):
    channels, types = input.shape[1], _VECTOR_TYPES[input.dtype]
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (channels,):
            raise ValueError(
                f"{prefix}{name}: expected shape ({channels},), one value per channel of the input, "
                f"got {tuple(vector.shape)}"
            )
        check_device(prefix + name, vector, input)
        if vector.dtype not in types:
            expected = " or ".join(map(str, types))
            raise TypeError(f"{prefix}{name}: expected {expected} for an input of {input.dtype}, got {vector.dtype}")


def check_residual(residual, input):
    """The residual of a batch norm of its own, which neither broadcasts nor is converted."""
    if residual.dtype != input.dtype:
        raise TypeError(f"residual: expected the input's type, {input.dtype}, got {residual.dtype}")
    if residual.shape != input.shape:
        raise ValueError(f"residual: expected the input's shape, {tuple(input.shape)}, got {tuple(residual.shape)}")
    check_device("residual", residual, input)


def check_arguments(
    input, weight, bias, input_bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, prefix=""
) -> None:
    """Raise ValueError or TypeError where an argument is not what the ops take; says which, what it should be and is.

    The raw ops refuse the same, in fewer words: on the hot path they check, and this explains. ``prefix``: of the names
    of a batch norm's arguments.
    """
    check_input(input)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check_vectors(input, prefix, **vectors, input_bias=input_bias)
    if (running_mean is None) != (running_var is None):
        given = "running_mean" if running_var is None else "running_var"
        raise ValueError(
            f"{prefix}running_mean, {prefix}running_var: expected both or neither, got only {prefix}{given}"
        )
    if num_batches_tracked is not None:
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            raise ValueError(
                f"{prefix}num_batches_tracked: expected one int64, got shape "
                f"{tuple(num_batches_tracked.shape)} of {num_batches_tracked.dtype}"
            )
        check_device(f"{prefix}num_batches_tracked", num_batches_tracked, input)
    elif momentum is None:
        raise ValueError(f"{prefix}momentum: None, the cumulative average, needs num_batches_tracked, got None for it")
    if training:
        if not eps > 0:
            raise ValueError(f"{prefix}eps: expected a number > 0 where batch statistics are used, got {eps}")
    else:
        if not eps >= 0:
            raise ValueError(f"{prefix}eps: expected a number >= 0, got {eps}")
        if running_mean is None:
            raise ValueError(f"{prefix}running_mean, {prefix}running_var: expected both where training=False, got None")


def check(input, residual, batch_norm, residual_batch_norm, training, is_whole_batch=True) -> None:
    """Raise ValueError or TypeError where a call, of the arguments of the last public function, is refused."""
    check_arguments(input, **batch_norm._asdict(), training=training)
    if training and is_whole_batch and input.numel() == input.shape[1]:
        raise ValueError(f"input: expected more than 1 value per channel in training, got {tuple(input.shape)}")
    if residual_batch_norm is None:
        if residual is not None:
            check_device("residual", residual, input)
        return
    check_residual(residual, input)
    check_arguments(residual, **residual_batch_norm._asdict(), training=training, prefix="residual_")
    for name in ("running_mean", "running_var", "num_batches_tracked") if training else ():
        tensor = getattr(batch_norm, name)
        if tensor is not None and tensor is getattr(residual_batch_norm, name):
            raise ValueError(f"residual_{name}: expected one of its own, got the {name} of the input's batch norm")


def check_of_forward(input, statistics, *norms) -> None:
    """What a backward, or a recomputation, gets of the batch norms: of each (weight, bias, input_bias)."""
    check_input(input)
    for prefix, (weight, bias, input_bias) in zip(("", "residual_"), norms, strict=False):
        _check_vectors(input, prefix, weight=weight, bias=bias, input_bias=input_bias)
    check_statistics("statistics", statistics, len(norms), input)


def check_statistics(name, statistics, norms, input) -> None:
    check_device(name, statistics, input)
    shape = (norms, 2, input.shape[1])
    if statistics.shape != shape or statistics.dtype != torch.float64 or not statistics.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous float64 tensor of shape {shape}, "
            f"got {tuple(statistics.shape)} of {statistics.dtype}"
        )
