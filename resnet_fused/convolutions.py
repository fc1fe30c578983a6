"""What a convolution's output is like, without computing it."""

import torch

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def geometry_of(layer):
    """Padding, stride, dilation and groups; None where the two sides are padded differently."""
    padding = layer.padding
    if isinstance(padding, str):
        sides = layer._reversed_padding_repeated_twice
        padding = tuple(sides[-2::-2])
        if padding != tuple(sides[::-2]):
            return None
    if layer.transposed:
        return padding, layer.output_padding, layer.stride, layer.dilation, layer.groups
    return padding, layer.stride, layer.dilation, layer.groups


def output_shape(layer, shape, padding):
    """That of the layer's output for an input of that shape. A size below 1: the input is smaller than the kernel."""
    channels, of_a_group, *kernel = layer.weight.shape
    axes = zip(shape[2:], kernel, layer.stride, padding, layer.dilation, layer.output_padding, strict=True)
    if layer.transposed:
        channels = of_a_group * layer.groups
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in axes]
    else:
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes]
    return torch.Size((shape[0], channels, *sizes))


def strides_of(shape, is_channels_last):
    strides, stride, last = [1] * len(shape), 1, len(shape) - 1
    for d in (1, *range(last, 1, -1), 0) if is_channels_last else range(last, -1, -1):
        strides[d], stride = stride, stride * shape[d]
    return tuple(strides)


def is_dense(tensor, format):
    return tensor.is_contiguous(memory_format=format)


def is_channels_last(tensor, format):
    """Whether PyTorch takes its format for channels_last: where it could be either, by its strides."""
    is_one_value = tensor.numel() == tensor.shape[0]
    is_by_strides = tensor.stride(1) == 1 and tensor.stride(-1) == tensor.shape[1] and not is_one_value
    return is_by_strides and is_dense(tensor, format)
