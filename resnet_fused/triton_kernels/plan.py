"""How the Triton kernels share a tensor among programs: pure geometry, the same for every pass, layout and type.

A dense tensor is a matrix: contiguous (N, C, *) of N rows and C * prod(*) columns, channels_last of N * prod(*) rows
and C columns; the channel of a column is column / inner, inner = prod(*) or 1. A program walks down one of ``splits``
ranges of rows with a tile of block_x adjacent columns, whose sums, means and scales it keeps, whatever the layout.
Accesses are adjacent and aligned however short the runs of a channel are, and 64 channels are no limit to the programs.

The rule, of nothing but (outer, channels, inner, dtype), so that results never depend on the GPU:

- A tile has 2048 elements (1024 of float64), 16 a thread of 4 warps: 64 bytes a thread and tensor are on their way, and
  three accumulators of 16 leave registers for as many programs as keep the memory busy. (Most backward
  passes of windows have 8 warps.)
- 128 columns wide, 512 bytes in float32, where the rows are many. Where they are fewer than 16, wider, but no wider
  than the run of a channel: the columns' sums are joined by channel through a (channels of the tile, columns) mask.
- Rows are split for 2048 programs, two waves of the 8 that each of 132 multiprocessors holds, but to no less than
  32 KiB a program and tensor, beside which its statistics and coefficients, 2 KiB, are little; where that leaves fewer
  than 512 programs, to less.
- A tile has fewer rows where there are else 64 to 255 tiles, fewer than two for each multiprocessor, as at 6x6 and 3x3
  in a batch of 32. Fewer than 64, as in the tests, stay as they are: interpreted, each program takes its time.
"""

from functools import lru_cache
from typing import NamedTuple

TILE_BYTES = 8192  # of the accumulation type
TILE_ROWS = 16
TILE_COLUMNS = 128
PROGRAMS = 2048
MINIMUM_PROGRAMS = 512
PROGRAM_BYTES = 32 * 1024
TOO_FEW_TILES = range(64, 256)


class Plan(NamedTuple):
    rows: int
    columns: int
    inner: int
    width: int  # columns that one access holds: 16 bytes, where the rows start at multiples of that
    block_x: int
    block_y: int
    tiles: int
    splits: int
    split_rows: int
    tile_channels: int  # at most, a power of two; 0 where a column is a channel

    @property
    def channels(self):
        return self.columns // self.inner

    @property
    def programs(self):
        return self.tiles * self.splits

    def warps(self, most=4):
        """Of a program: of no more threads than have an access."""
        return max(1, min(most, self.block_x * self.block_y // (32 * self.width)))

    @property
    def partials(self):
        """Programs that a channel's columns, at most, are spread over."""
        return self.splits * min(self.tiles, (self.inner + self.block_x - 2) // self.block_x + 1)


def ceil_div(a, b):
    return -(-a // b)


def _power_of_two(n):
    """The least that is not less than n."""
    return 1 << (n - 1).bit_length()


@lru_cache(1024)
def make_plan(outer: int, channels: int, inner: int, element_size: int) -> Plan:
    """The plan of outer * channels * inner elements, in that order, all of them >= 1."""
    rows, columns = outer, channels * inner
    tile = TILE_BYTES // max(4, element_size)
    width = 16 // element_size
    while columns % width:
        width //= 2

    block_y = min(TILE_ROWS, _power_of_two(rows))
    block_x = max(TILE_COLUMNS, min(tile // block_y, _power_of_two(inner)))
    block_x = min(block_x, max(8, _power_of_two(columns)))  # a byte of the mask is 8 columns
    block_y = min(tile // block_x, _power_of_two(rows))
    tiles = ceil_div(columns, block_x)
    while block_y > 1 and tiles * ceil_div(rows, block_y) in TOO_FEW_TILES:
        block_y //= 2
    program_rows = PROGRAM_BYTES // (block_x * element_size)
    splits = min(ceil_div(PROGRAMS, tiles), ceil_div(rows, program_rows))
    if tiles * splits < MINIMUM_PROGRAMS:
        splits = min(ceil_div(MINIMUM_PROGRAMS, tiles), ceil_div(rows, block_y))
    split_rows = ceil_div(ceil_div(rows, splits), block_y) * block_y
    tile_channels = min(_power_of_two((block_x + inner - 2) // inner + 1), _power_of_two(channels)) if inner > 1 else 0
    splits = ceil_div(rows, split_rows)
    return Plan(rows, columns, inner, width, block_x, block_y, tiles, splits, split_rows, tile_channels)
