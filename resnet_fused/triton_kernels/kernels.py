"""relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on a GPU, in Triton: device code.

Forward: ``statistics`` sums, ``finish_statistics`` joins the sums of each channel, ``normalize`` does the rest; in eval
the last one alone. Backward: ``gradient_sums``, ``finish_gradients``, ``input_gradient``. All walk the matrix that
plan.py describes; the last of each three backwards, as the first one leaves its end in L2. Every sum has one order, so
that reruns are bit-equal.

A residual's own batch norm, residual_norm where there is one, comes after the input's, on the grid's second axis, too:
``statistics`` and the two that finish have programs for either. The others take both at once: they read gradient and
mask once.

What is rectified to be pooled is never in memory: ``normalize`` walks the matrix of the output, and rectifies what its
windows take; the backward passes sum the gradients that each element of the input has won.

Y and X are a tile's rows and columns, and a vector (X,) has a value for each column. A pointer that is None is absent,
at compile time. ACC, the accumulation type, is float32 or, for float64 tensors, float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """What every kernel gets of the plan, beside pointers."""

    rows: int
    vectors: int  # of WIDTH columns, in a row
    inner: int
    tiles: int
    splits: int
    split_rows: int
    partials: int
    mask_stride: int
    WIDTH: tl.constexpr
    BLOCK_X: tl.constexpr
    BLOCK_Y: tl.constexpr
    TILE_CHANNELS: tl.constexpr  # 0 where a column is a channel
    ACC: tl.constexpr
    INDEX: tl.constexpr  # int32 where columns and partial sums can be counted so; rows and offsets are int64


class Norm(NamedTuple):
    """A batch norm: statistics (2, C) in float64, mean and invstd; dense vectors (C,), a counter; or None."""

    input: object
    statistics: object
    weight: object
    bias: object
    input_bias: object
    running_mean: object = None
    running_var: object = None
    num_batches_tracked: object = None


class Axis(NamedTuple):
    """The windows of a max pooling along H, or along W."""

    size: int  # of the input
    windows: int
    KERNEL: tl.constexpr
    STRIDE: tl.constexpr
    PADDING: tl.constexpr
    DILATION: tl.constexpr
    COVER: tl.constexpr  # windows that a pixel is in, at most


class Windows(NamedTuple):
    """Of a max pooling."""

    height: Axis
    width: Axis
    CHANNELS_LAST: tl.constexpr
    INDEX: tl.constexpr  # int32 where the pixels of all images, or the elements of one, can be counted so


NO_WINNER = tl.constexpr(255)
LANES = tl.constexpr(1024)  # partial sums that a program joins at a time


# ---- Where a program stands ----


@triton.jit
def _columns(matrix):
    # Known to the compiler to be a multiple of WIDTH: only so are accesses 16 bytes wide.
    return tl.full((), matrix.WIDTH, matrix.INDEX) * matrix.vectors


@triton.jit
def _position(matrix, REVERSE: tl.constexpr):
    """Tile, split, its first row and the row after its last; columns (X,), and whether the matrix has them."""
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    tile = (program % matrix.tiles).to(matrix.INDEX)
    split = (program // matrix.tiles).to(tl.int64)
    row_begin = split * matrix.split_rows
    row_end = tl.minimum(row_begin + matrix.split_rows, matrix.rows)
    column = tile * matrix.BLOCK_X + tl.arange(0, matrix.BLOCK_X)
    return tile, split, row_begin, row_end, column, column < _columns(matrix)


@triton.jit
def _offsets(matrix, row, column):
    # No access is wider than WIDTH: those of a kernel share a layout, and bytes would have it 16 elements wide.
    return tl.max_contiguous(row[:, None] * _columns(matrix) + column[None, :], (1, matrix.WIDTH))


@triton.jit
def _tile_channels(matrix, tile, column, inside):
    """The channels of a tile (T,), how many of its columns each has, and which (T, X); T is X where inner is 1."""
    if matrix.TILE_CHANNELS == 0:
        return column, inside.to(tl.int32), inside
    else:
        begin = tile * matrix.BLOCK_X
        end = tl.minimum(begin + matrix.BLOCK_X, _columns(matrix))
        channel = begin // matrix.inner + tl.arange(0, matrix.TILE_CHANNELS)
        first = tl.maximum(channel * matrix.inner, begin)
        last = tl.minimum((channel + 1) * matrix.inner, end)
        of_channel = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        return channel, tl.maximum(last - first, 0).to(tl.int32), of_channel


@triton.jit
def _sum_by_channel(matrix, values, of_channel):
    """(X,) to (T,). A select, not a product, so that a NaN stays in its channel."""
    if matrix.TILE_CHANNELS == 0:
        return values
    else:
        return tl.sum(tl.where(of_channel, values[None, :], 0), axis=1)


@triton.jit
def _at_columns(matrix, values, of_channel):
    """(T,) to (X,)."""
    if matrix.TILE_CHANNELS == 0:
        return values
    else:
        return tl.sum(tl.where(of_channel, values[:, None], 0), axis=0)


# ---- Sums across programs: partials is (sums, C, matrix.partials) in ACC ----


@triton.jit
def _hand_over(matrix, partials, which, tile, split, channel, size, values):
    """Store a program's sums (T,) of the channels that have columns in its tile."""
    part = (tile - channel * matrix.inner // matrix.BLOCK_X) * matrix.splits + split
    at = partials + (which * (_columns(matrix) // matrix.inner) + channel) * matrix.partials + part
    tl.store(at, values, mask=size > 0)


@triton.jit
def _parts(matrix, channel):
    """Programs that have summed parts of the channel."""
    first = channel * matrix.inner // matrix.BLOCK_X
    last = ((channel + 1) * matrix.inner - 1) // matrix.BLOCK_X
    return ((last - first + 1) * matrix.splits).to(tl.int32)


@triton.jit
def _load_parts(matrix, partials, which, channel, part, parts):
    """Sums (LANES,) of a channel, in float64."""
    at = partials + (which * (_columns(matrix) // matrix.inner) + channel) * matrix.partials + part
    return tl.load(at, mask=part < parts, other=0).to(tl.float64)


@triton.jit
def _values_of(matrix, channel, part, parts):
    """Values that a part of the channel is the sum of, in float64; 0 beyond the last part."""
    begin = channel * matrix.inner
    tile_begin = (begin // matrix.BLOCK_X + part // matrix.splits) * matrix.BLOCK_X
    columns = tl.minimum(tile_begin + matrix.BLOCK_X, begin + matrix.inner) - tl.maximum(tile_begin, begin)
    row = (part % matrix.splits).to(tl.int64) * matrix.split_rows
    return tl.where(part < parts, columns * tl.minimum(matrix.rows - row, matrix.split_rows), 0).to(tl.float64)


# ---- Per-channel values ----


@triton.jit
def _load_vector(vector, channel, inside, otherwise: tl.constexpr):
    """In float64; where there is no vector, what stands for it."""
    if vector is None:
        return tl.full(channel.shape, otherwise, tl.float64)
    else:
        return tl.load(vector + channel, mask=inside, other=0).to(tl.float64)


@triton.jit
def _store_vector(matrix, vector, channel, value):
    # By way of ACC: not every GPU, nor the interpreter, narrows float64 to bfloat16.
    tl.store(vector + channel, value.to(matrix.ACC).to(vector.dtype.element_ty))


@triton.jit
def _coefficients(matrix, mean, invstd, weight, bias):
    """The output is (input - mean) * scale + shift.

    The mean is rounded, and what that dropped made up for in the shift: at mean 1e4 and std 1e-2 it is 5 % of the std.
    """
    scale = (invstd * weight).to(matrix.ACC)
    rounded = mean.to(matrix.ACC)
    dropped = mean - rounded.to(tl.float64)
    is_exact = (dropped == 0) | (dropped != dropped)
    shift = tl.where(is_exact, bias, tl.fma(-dropped, scale.to(tl.float64), bias))
    return rounded, scale, shift.to(matrix.ACC)


@triton.jit
def _centered(matrix, norm, at, valid, mean):
    return tl.load(norm.input + at, mask=valid, other=0).to(matrix.ACC) - mean[None, :]


@triton.jit
def _normalized(centered, scale, shift):
    return tl.fma(centered, scale[None, :], shift[None, :])


@triton.jit
def _rectified(value, output):
    """As it is stored; NaN passes."""
    return tl.where(value < 0, 0, value).to(output.dtype.element_ty)


# ---- Windows ----


@triton.jit
def _area(windows, height, width):
    return tl.full((), 1, windows.INDEX) * height * width


@triton.jit
def _pixels(matrix, windows, row, column, height, width, other_area):
    """Where in images of height * width the elements of a tile are, h and w; and, for the images of the other side of
    the pooling, ``beside``, ``along`` and ``step``: pixel p is at beside + (along + p * step).

    Pixels go along the rows in channels_last, else along the columns: h, w and ``along`` are (Y, 1), or (1, X).
    """
    row, column = row[:, None], column.to(windows.INDEX)[None, :]
    channels = tl.full((), 1, tl.int64) * (_columns(matrix) // matrix.inner)
    if windows.CHANNELS_LAST:
        pixel, beside, step = row.to(windows.INDEX), column, channels
        along = pixel // _area(windows, height, width) * (other_area * channels)
    else:
        pixel, beside, step = column, row * (other_area * channels), 1
        along = column // matrix.inner * other_area
    return pixel // width % height, pixel % width, beside, along, step


@triton.jit
def _in_window(axis, window, k):
    """Where position k of a window is in the input, and whether it is."""
    pixel = window * axis.STRIDE - axis.PADDING + k * axis.DILATION
    return pixel, (pixel >= 0) & (pixel < axis.size)


@triton.jit
def _covering(axis, pixel, i):
    """Of the windows that a pixel may be in the i-th, its position there, and whether it has one."""
    pixel += axis.PADDING
    window = tl.minimum(pixel // axis.STRIDE, axis.windows - 1) - (axis.COVER - 1) + i
    distance = pixel - window * axis.STRIDE
    k = distance // axis.DILATION
    return window, k, (window >= 0) & (k < axis.KERNEL) & (k * axis.DILATION == distance)


# ---- Forward ----


@triton.jit
def _origin(matrix, input, channel, inside):
    """A value near the channel's mean, as float32 holds no mean of 1e4 to a hundredth of a std of 1e-2.

    The median of its first, middle and last value, which one outlier does not move.
    """
    begin = input + channel * matrix.inner
    last_row = tl.full((), -1, tl.int64) + matrix.rows
    a = tl.load(begin, mask=inside, other=0).to(matrix.ACC)
    middle = (last_row + 1) // 2 * _columns(matrix) + matrix.inner // 2
    b = tl.load(begin + middle, mask=inside, other=0).to(matrix.ACC)
    c = tl.load(begin + last_row * _columns(matrix) + matrix.inner - 1, mask=inside, other=0).to(matrix.ACC)
    smaller, larger = tl.where(a < b, a, b), tl.where(a < b, b, a)
    median = tl.where(c < smaller, smaller, tl.where(c > larger, larger, c))
    return tl.where(median - median == 0, median, 0)  # an infinite origin would turn infinities into NaNs


@triton.jit
def _welford(value, share, mean, m2, total):
    """One more value of each element of a tile, the 1/share-th: m2 by Welford's update, which no origin can spoil, and
    a plain sum, which an infinity does not turn into a NaN."""
    deviation = value - mean
    mean = tl.fma(deviation, share, mean)
    return mean, tl.fma(deviation, value - mean, m2), total + value


@triton.jit
def statistics(input, residual, partials, matrix):
    """Partial means, less the channel's origin, and sums of squared deviations from them."""
    which = tl.program_id(1) * 2
    if residual is not None:
        input = input if which == 0 else residual
    tile, split, row_begin, row_end, column, inside = _position(matrix, False)
    origin = _origin(matrix, input, column // matrix.inner, inside)[None, :]
    mean = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    m2 = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    total = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    count = tl.zeros([], matrix.ACC)

    row = row_begin + tl.arange(0, matrix.BLOCK_Y)
    turns = ((row_end - row_begin) // matrix.BLOCK_Y).to(tl.int32)
    for _ in range(turns):
        x = tl.load(input + _offsets(matrix, row, column), mask=inside[None, :], other=0).to(matrix.ACC)
        count += 1
        mean, m2, total = _welford(x - origin, 1 / count, mean, m2, total)
        row += matrix.BLOCK_Y
    if turns * matrix.BLOCK_Y < row_end - row_begin:
        left = row < row_end
        x = tl.load(input + _offsets(matrix, row, column), mask=left[:, None] & inside[None, :], other=0).to(matrix.ACC)
        mean, new_m2, new_total = _welford(x - origin, 1 / (count + 1), mean, m2, total)
        m2 = tl.where(left[:, None], new_m2, m2)
        total = tl.where(left[:, None], new_total, total)

    # Join the rows, then the columns of each channel: the means, then m2 about the mean.
    n = (row_end - row_begin).to(matrix.ACC)
    column_mean = tl.sum(total, axis=0) / n
    count = (count + (row < row_end).to(matrix.ACC))[:, None]
    deviation = total / tl.maximum(count, 1) - column_mean[None, :]
    column_m2 = tl.sum(tl.where(count > 0, m2 + count * deviation * deviation, 0), axis=0)

    channel, size, of_channel = _tile_channels(matrix, tile, column, inside)
    channel_mean = _sum_by_channel(matrix, column_mean, of_channel) / tl.maximum(size, 1).to(matrix.ACC)
    deviation = column_mean - _at_columns(matrix, channel_mean, of_channel)
    channel_m2 = _sum_by_channel(matrix, column_m2 + n * deviation * deviation, of_channel)
    _hand_over(matrix, partials, which, tile, split, channel, size, channel_mean)
    _hand_over(matrix, partials, which + 1, tile, split, channel, size, channel_m2)


@triton.jit
def _update(matrix, running, channel, factor, batch):
    if running is not None:
        old = tl.load(running + channel).to(tl.float64)
        _store_vector(matrix, running, channel, factor * batch + (1 - factor) * old)


@triton.jit
def finish_statistics(
    norm,
    momentum: tl.float64,
    eps: tl.float64,
    CUMULATIVE: tl.constexpr,  # momentum is 1 / num_batches_tracked
    residual_norm,
    residual_momentum: tl.float64,
    residual_eps: tl.float64,
    RESIDUAL_CUMULATIVE: tl.constexpr,
    partials,
    matrix,
):
    """A program for each channel of either: mean and invstd of the batch, and the running statistics."""
    if tl.program_id(1) == 0:
        _finish_statistics(matrix, norm, momentum, eps, CUMULATIVE, partials, 0)
    elif residual_norm is not None:
        _finish_statistics(matrix, residual_norm, residual_momentum, residual_eps, RESIDUAL_CUMULATIVE, partials, 2)


@triton.jit
def _finish_statistics(matrix, norm, momentum, eps, CUMULATIVE: tl.constexpr, partials, which):
    channel = tl.program_id(0).to(matrix.INDEX)
    n = (tl.full((), 1, tl.int64) * matrix.rows * matrix.inner).to(tl.float64)
    parts = _parts(matrix, channel)
    total = tl.zeros([LANES], tl.float64)
    for first in range(0, parts, LANES):
        part = first + tl.arange(0, LANES)
        mean = _load_parts(matrix, partials, which, channel, part, parts)
        total += tl.where(part < parts, _values_of(matrix, channel, part, parts) * mean, 0)
    channel_mean = tl.sum(total, axis=0) / n
    total = tl.zeros([LANES], tl.float64)
    for first in range(0, parts, LANES):
        part = first + tl.arange(0, LANES)
        deviation = _load_parts(matrix, partials, which, channel, part, parts) - channel_mean
        m2 = _load_parts(matrix, partials, which + 1, channel, part, parts)
        total += tl.where(part < parts, m2 + _values_of(matrix, channel, part, parts) * deviation * deviation, 0)
    m2 = tl.sum(total, axis=0)

    channels = _columns(matrix) // matrix.inner
    mean = channel_mean + _origin(matrix, norm.input, channel, tl.full((), 1, tl.int1)).to(tl.float64)
    tl.store(norm.statistics + channel, mean)
    tl.store(norm.statistics + channels + channel, 1 / tl.sqrt(m2 / n + eps))
    factor = tl.zeros_like(mean) + momentum
    if CUMULATIVE:
        factor = 1 / (tl.load(norm.num_batches_tracked) + 1).to(tl.float64)  # `normalize` will count this batch
    if norm.input_bias is not None:
        mean += tl.load(norm.input_bias + channel).to(tl.float64)
    _update(matrix, norm.running_mean, channel, factor, mean)
    _update(matrix, norm.running_var, channel, factor, m2 / (n - 1))


@triton.jit
def _forward_coefficients(matrix, norm, eps, split, column, inside, TRAINING: tl.constexpr):
    """Coefficients of the columns. In eval this also writes the statistics, in training it counts the batch."""
    channel = column // matrix.inner
    channels = _columns(matrix) // matrix.inner
    if TRAINING:
        mean = _load_vector(norm.statistics, channel, inside, 0)
        invstd = _load_vector(norm.statistics + channels, channel, inside, 0)
        if norm.num_batches_tracked is not None:  # noqa: SIM102  known at compile time, unlike the next
            if tl.program_id(0) == 0:
                tl.store(norm.num_batches_tracked, tl.load(norm.num_batches_tracked) + 1)
    else:
        mean = _load_vector(norm.running_mean, channel, inside, 0) - _load_vector(norm.input_bias, channel, inside, 0)
        variance = (_load_vector(norm.running_var, channel, inside, 1) + eps).to(matrix.ACC)
        invstd = (1 / tl.sqrt(variance)).to(tl.float64)
        if split == 0:
            is_first = inside & (column == channel * matrix.inner)
            tl.store(norm.statistics + channel, mean, mask=is_first)
            tl.store(norm.statistics + channels + channel, invstd, mask=is_first)
    weight = _load_vector(norm.weight, channel, inside, 1)
    bias = _load_vector(norm.bias, channel, inside, 0)
    return _coefficients(matrix, mean, invstd, weight, bias)


@triton.jit
def _max_pool(matrix, windows, norm, mean, scale, shift, output, row, column, valid):
    """The maxima and the winners, as of max_pool2d: of equal values the first, of NaNs the last."""
    height, width = windows.height, windows.width
    window_h, window_w, beside, along, step = _pixels(
        matrix, windows, row, column, height.windows, width.windows, _area(windows, height.size, width.size)
    )
    best = tl.full([matrix.BLOCK_Y, matrix.BLOCK_X], float("-inf"), matrix.ACC)
    winner = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], tl.int32)
    for kh in range(height.KERNEL):
        h, has_h = _in_window(height, window_h, kh)
        for kw in range(width.KERNEL):
            w, has_w = _in_window(width, window_w, kw)
            at = beside + (along + (h * width.size + w) * step)
            exists = valid & (has_h & has_w)
            value = _normalized(_centered(matrix, norm, at, exists, mean), scale, shift)
            value = _rectified(value, output).to(matrix.ACC)
            wins = exists & ((value > best) | (value != value))
            best = tl.where(wins, value, best)
            winner = tl.where(wins, kh * width.KERNEL + kw, winner)
    return best.to(output.dtype.element_ty), tl.where(best <= 0, NO_WINNER, winner).to(tl.uint8)


@triton.jit
def normalize(
    norm,
    eps: tl.float64,
    residual_norm,
    residual_eps: tl.float64,
    residual,  # that is added as it is
    output,
    mask,
    windows,
    matrix,
    TRAINING: tl.constexpr,
):
    """The output, and its mask, one bit an element; of a pooled one, its winners."""
    tile, split, row_begin, row_end, column, inside = _position(matrix, TRAINING)
    mean, scale, shift = _forward_coefficients(matrix, norm, eps, split, column, inside, TRAINING)
    if residual_norm is not None:
        residual_mean, residual_scale, residual_shift = _forward_coefficients(
            matrix, residual_norm, residual_eps, split, column, inside, TRAINING
        )
        shift += residual_shift

    turns = tl.cdiv(row_end - row_begin, matrix.BLOCK_Y).to(tl.int32)
    row = row_begin + tl.arange(0, matrix.BLOCK_Y)
    step = matrix.BLOCK_Y
    if TRAINING:
        row += (turns - 1) * matrix.BLOCK_Y
        step = -matrix.BLOCK_Y
    for _ in range(turns):
        at = _offsets(matrix, row, column)
        valid = (row < row_end)[:, None] & inside[None, :]
        if windows is not None:
            y, winner = _max_pool(matrix, windows, norm, mean, scale, shift, output, row, column, valid)
        else:
            value = _normalized(_centered(matrix, norm, at, valid, mean), scale, shift)
            if residual_norm is not None:
                centered = _centered(matrix, residual_norm, at, valid, residual_mean)
                value = tl.fma(centered, residual_scale[None, :], value)
            if residual is not None:
                value += tl.load(residual + at, mask=valid, other=0).to(matrix.ACC)
            y = _rectified(value, output)
        tl.store(output + at, y, mask=valid)
        if windows is not None and mask is not None:
            tl.store(mask + at, winner, mask=valid)
        elif mask is not None:
            stored = y.to(matrix.ACC)
            bits = (((stored > 0) | (stored != stored)) & valid).to(tl.uint8)
            bits = tl.reshape(bits, [matrix.BLOCK_Y, matrix.BLOCK_X // 8, 8])
            bits = bits << tl.arange(0, 8)[None, None, :].to(tl.uint8)
            byte = tile * (matrix.BLOCK_X // 8) + tl.arange(0, matrix.BLOCK_X // 8)
            at = mask + (row[:, None] * matrix.mask_stride + byte[None, :])
            valid = (row < row_end)[:, None] & (byte < matrix.mask_stride)[None, :]
            tl.store(at, tl.sum(bits, axis=2).to(tl.uint8), mask=valid)
        row += step


# ---- Backward ----


class Tail(NamedTuple):
    """What both backward passes read: the masked gradient is grad_output where the ReLU passed. Of windows, which may
    be None, the mask are the winners."""

    grad_output: object
    mask: object
    windows: object


@triton.jit
def _backward_coefficients(matrix, norm, channel, inside, MEAN: tl.constexpr, SCALE: tl.constexpr):
    """Mean and scale, as the forward's, but none is loaded that the pass does not need."""
    mean, invstd, weight = (tl.zeros(channel.shape, tl.float64),) * 3
    if MEAN:
        mean = _load_vector(norm.statistics, channel, inside, 0)
    if SCALE:
        invstd = _load_vector(norm.statistics + _columns(matrix) // matrix.inner, channel, inside, 0)
        weight = _load_vector(norm.weight, channel, inside, 1)
    return mean.to(matrix.ACC), (invstd * weight).to(matrix.ACC)


@triton.jit
def _won_gradient(matrix, tail, row, column, valid):
    """The sum, in the order of the windows."""
    height, width = tail.windows.height, tail.windows.width
    h, w, beside, along, step = _pixels(
        matrix, tail.windows, row, column, height.size, width.size, _area(tail.windows, height.windows, width.windows)
    )
    total = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    for i in range(height.COVER):
        window_h, kh, covers_h = _covering(height, h, i)
        for j in range(width.COVER):
            window_w, kw, covers_w = _covering(width, w, j)
            at = tl.max_contiguous(beside + (along + (window_h * width.windows + window_w) * step), (1, matrix.WIDTH))
            exists = valid & (covers_h & covers_w)
            winner = tl.load(tail.mask + at, mask=exists, other=NO_WINNER)
            grad = tl.load(tail.grad_output + at, mask=exists, other=0).to(matrix.ACC)
            total += tl.where(winner == kh * width.KERNEL + kw, grad, 0)
    return total.to(tail.grad_output.dtype.element_ty)


@triton.jit
def _masked_gradient(matrix, tail, tile, row, column, valid):
    """As stored. A select, so that a NaN gradient of a blocked output gives 0."""
    if tail.windows is not None:
        return _won_gradient(matrix, tail, row, column, valid)
    else:
        grad = tl.load(tail.grad_output + _offsets(matrix, row, column), mask=valid, other=0)
        byte = tile * (matrix.BLOCK_X // 8) + tl.arange(0, matrix.BLOCK_X // 8)
        within = (row < matrix.rows)[:, None] & (byte < matrix.mask_stride)[None, :]
        at = tail.mask + (row[:, None] * matrix.mask_stride + byte[None, :])
        bytes = tl.load(at, mask=within, other=0)
        bits = (bytes[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
        return tl.where(tl.reshape(bits, [matrix.BLOCK_Y, matrix.BLOCK_X]) != 0, grad, 0)


@triton.jit
def gradient_sums(tail, norm, residual_norm, partials, matrix):
    """Partial sums of the masked gradient, and of its products with input - mean and, maybe, residual - its mean."""
    tile, split, row_begin, row_end, column, inside = _position(matrix, False)
    channel = column // matrix.inner
    mean, _ = _backward_coefficients(matrix, norm, channel, inside, True, False)
    total = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    dot = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    if residual_norm is not None:
        residual_mean, _ = _backward_coefficients(matrix, residual_norm, channel, inside, True, False)
        residual_dot = tl.zeros([matrix.BLOCK_Y, matrix.BLOCK_X], matrix.ACC)
    row = row_begin + tl.arange(0, matrix.BLOCK_Y)
    for _ in range(tl.cdiv(row_end - row_begin, matrix.BLOCK_Y).to(tl.int32)):
        valid = (row < row_end)[:, None] & inside[None, :]
        grad = _masked_gradient(matrix, tail, tile, row, column, valid).to(matrix.ACC)
        centered = _centered(matrix, norm, _offsets(matrix, row, column), valid, mean)
        total += grad
        dot = tl.fma(grad, tl.where(valid, centered, 0), dot)  # a mean may be a NaN, and the input ends before the tile
        if residual_norm is not None:
            centered = _centered(matrix, residual_norm, _offsets(matrix, row, column), valid, residual_mean)
            residual_dot = tl.fma(grad, tl.where(valid, centered, 0), residual_dot)
        row += matrix.BLOCK_Y
    channel, size, of_channel = _tile_channels(matrix, tile, column, inside)
    total = _sum_by_channel(matrix, tl.sum(total, axis=0), of_channel)
    _hand_over(matrix, partials, 0, tile, split, channel, size, total)
    dot = _sum_by_channel(matrix, tl.sum(dot, axis=0), of_channel)
    _hand_over(matrix, partials, 1, tile, split, channel, size, dot)
    if residual_norm is not None:
        residual_dot = _sum_by_channel(matrix, tl.sum(residual_dot, axis=0), of_channel)
        _hand_over(matrix, partials, 2, tile, split, channel, size, residual_dot)


class Gradients(NamedTuple):
    """Of a batch norm, or None; projection, (2, C) in ACC: what batch statistics take from the input's.

    Of a residual that is added as it is: its own, as input.
    """

    input: object
    weight: object = None
    bias: object = None
    input_bias: object = None
    projection: object = None


@triton.jit
def finish_gradients(norm, gradients, residual_norm, residual_gradients, partials, matrix, TRAINING: tl.constexpr):
    """A program for each channel of either: the gradients of the vectors, and the projection."""
    if tl.program_id(1) == 0:
        _finish_gradients(matrix, norm, gradients, TRAINING, partials, 1)
    elif residual_norm is not None:
        _finish_gradients(matrix, residual_norm, residual_gradients, TRAINING, partials, 2)


@triton.jit
def _finish_gradients(matrix, norm, gradients, TRAINING: tl.constexpr, partials, which):
    channel = tl.program_id(0).to(matrix.INDEX)
    parts = _parts(matrix, channel)
    total = tl.zeros([LANES], tl.float64)
    dot = tl.zeros([LANES], tl.float64)
    for first in range(0, parts, LANES):
        part = first + tl.arange(0, LANES)
        total += _load_parts(matrix, partials, 0, channel, part, parts)
        dot += _load_parts(matrix, partials, which, channel, part, parts)
    channels = _columns(matrix) // matrix.inner
    mean = tl.load(norm.statistics + channel)
    invstd = tl.load(norm.statistics + channels + channel)
    dropped = mean - mean.to(matrix.ACC).to(tl.float64)  # by its rounding, see _coefficients
    grad = tl.sum(total, axis=0)
    dot_of_channel = tl.sum(dot, axis=0) - dropped * grad
    if gradients.bias is not None:
        _store_vector(matrix, gradients.bias, channel, grad)
    if gradients.weight is not None:
        _store_vector(matrix, gradients.weight, channel, dot_of_channel * invstd)
    if gradients.input_bias is not None:
        scale = invstd
        if norm.weight is not None:
            scale *= tl.load(norm.weight + channel).to(tl.float64)
        # Batch statistics cancel a bias of the input, running ones let it through as they do the input.
        _store_vector(matrix, gradients.input_bias, channel, tl.zeros_like(grad) if TRAINING else grad * scale)
    if gradients.projection is not None:
        n = (tl.full((), 1, tl.int64) * matrix.rows * matrix.inner).to(tl.float64)
        slope = dot_of_channel * invstd * invstd / n
        tl.store(gradients.projection + channel, (grad / n - dropped * slope).to(matrix.ACC))
        tl.store(gradients.projection + channels + channel, slope.to(matrix.ACC))


@triton.jit
def _gradient_coefficients(matrix, norm, gradients, channel, inside):
    """Mean and scale, and of the projection offset and slope, (X,) each."""
    mean, scale = _backward_coefficients(
        matrix, norm, channel, inside, gradients.projection is not None, gradients.input is not None
    )
    offset, slope = tl.zeros_like(mean), tl.zeros_like(mean)
    if gradients.projection is not None:
        offset = tl.load(gradients.projection + channel, mask=inside, other=0)
        slope = tl.load(gradients.projection + _columns(matrix) // matrix.inner + channel, mask=inside, other=0)
    return mean, scale, offset, slope


@triton.jit
def _store_input_gradient(matrix, norm, gradients, at, valid, masked, mean, scale, offset, slope):
    if gradients.input is not None:
        grad = masked.to(matrix.ACC)
        if gradients.projection is not None:
            centered = _centered(matrix, norm, at, valid, mean)
            grad = tl.fma(-centered, slope[None, :], grad - offset[None, :])
        tl.store(gradients.input + at, (grad * scale[None, :]).to(gradients.input.dtype.element_ty), mask=valid)


@triton.jit
def input_gradient(tail, norm, gradients, residual_norm, residual_gradients, matrix):
    """The gradients of input and residual, those that are there."""
    tile, split, row_begin, row_end, column, inside = _position(matrix, True)
    channel = column // matrix.inner
    mean, scale, offset, slope = _gradient_coefficients(matrix, norm, gradients, channel, inside)
    if residual_norm is not None:
        residual_mean, residual_scale, residual_offset, residual_slope = _gradient_coefficients(
            matrix, residual_norm, residual_gradients, channel, inside
        )
    turns = tl.cdiv(row_end - row_begin, matrix.BLOCK_Y).to(tl.int32)
    row = row_begin + (turns - 1) * matrix.BLOCK_Y + tl.arange(0, matrix.BLOCK_Y)
    for _ in range(turns):
        at = _offsets(matrix, row, column)
        valid = (row < row_end)[:, None] & inside[None, :]
        masked = _masked_gradient(matrix, tail, tile, row, column, valid)
        _store_input_gradient(matrix, norm, gradients, at, valid, masked, mean, scale, offset, slope)
        if residual_norm is not None:
            _store_input_gradient(
                matrix,
                residual_norm,
                residual_gradients,
                at,
                valid,
                masked,
                residual_mean,
                residual_scale,
                residual_offset,
                residual_slope,
            )
        elif residual_gradients.input is not None:
            tl.store(residual_gradients.input + at, masked, mask=valid)
        row -= matrix.BLOCK_Y
