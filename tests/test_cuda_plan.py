"""The CUDA launch plan (csrc/cuda/plan.h), a pure function: it covers the tensor, and keeps a whole GPU busy."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import cuda_on_cpu

MULTIPROCESSORS = 132  # of an H100 or H200
OTHER_MULTIPROCESSORS = (16, 60, 108, 148)
ALWAYS_ENOUGH_IMAGES = (
    8,
    64,
    128,
    256,
)  # of two images, contiguous, a thread has two rows: 2.2 waves may be all there are
ELEMENT_SIZES = (2, 4, 8)
BATCHES = range(1, 257)
LARGE = 2**20  # bytes: from here on, a tensor has something to do for every multiprocessor
FULL = 0.8  # of the last wave
MANY_WAVES = 5  # from here on, how full the last one is matters little
MOST_PARTIAL_SUMS = 100  # that a thread of a tile's last block reads, while the GPU waits for that block

# Channels and height of every activation of ResNet-18 and ResNet-50, by the height of the image.
ACTIVATIONS = {
    224: (
        *((64, 112), (64, 56), (128, 28), (256, 14), (512, 7), (128, 56), (256, 56), (512, 28), (256, 28), (1024, 14)),
        *((512, 14), (2048, 7)),
    ),
    96: ((64, 48), (64, 24), (128, 12), (256, 6), (512, 3)),
}
SHAPES = [(channels, height) for shapes in ACTIVATIONS.values() for channels, height in shapes]


def outer_and_inner(layout, batch, height):
    return (batch, height**2) if layout == "contiguous" else (batch * height**2, 1)


def waves_of(blocks, threads, multiprocessors, resident_threads):
    """(waves, how full the last one is), of blocks that are dealt out evenly.

    A multiprocessor holds `resident_threads` threads. Blocks of less than one wave leave those idle that get one fewer.
    """
    resident = resident_threads // threads
    if blocks <= multiprocessors * resident:
        most = -(-blocks // multiprocessors)
        return 1, blocks / (multiprocessors * most)
    wave = multiprocessors * resident
    return blocks / wave, ((blocks - 1) % wave + 1) / wave


def uneven(threads, blocks, multiprocessors, resident_threads):
    """What leaves multiprocessors idle, or None."""
    if blocks < multiprocessors:
        return f"{blocks} blocks for {multiprocessors} multiprocessors"
    waves, last = waves_of(blocks, threads, multiprocessors, resident_threads)
    if waves < MANY_WAVES and last < FULL:
        return f"the last of {waves:.2f} waves is {last:.0%} full"
    return None


def misfit(plan, outer, channels, inner, element_size, aligned, max_threads):
    """What of the plan's geometry is wrong, or None."""
    columns = channels * inner
    tile = plan.threads_x * plan.width
    vectorised = aligned and columns * element_size % 16 == 0
    conditions = {
        "rows": plan.rows == outer,
        "columns": plan.columns == columns,
        "accesses of 16 bytes where they can be": plan.width == (16 // element_size if vectorised else 1),
        "threads": plan.threads == plan.threads_x * plan.threads_y <= max_threads and plan.threads % 32 == 0,
        "threads along columns": 8 <= plan.threads_x <= 128 and plan.threads_x % 8 == 0,
        "tiles cover the columns, none is empty": (plan.tiles - 1) * tile < columns <= plan.tiles * tile,
        "splits cover the rows, none is empty": (
            (plan.splits - 1) * plan.split_rows < outer <= plan.splits * plan.split_rows
        ),
        "blocks": 0 < plan.blocks == plan.tiles * plan.splits < 2**31,
    }
    return next((condition for condition, holds in conditions.items() if not holds), None)


def partial_sums(plan, channels, inner):
    """How many partial sums of each kind a thread of a tile's last block reads."""
    tile = plan.threads_x * plan.width
    tiles_of_a_channel = min(-(-(inner - 1) // tile) + 1, plan.tiles)
    channels_of_a_tile = min(-(-(tile - 1) // inner) + 1, channels)
    return plan.splits * tiles_of_a_channel * channels_of_a_tile / plan.threads


def describe(plan):
    return (
        f"{plan.threads_x} x {plan.threads_y} threads of {plan.width}, {plan.tiles} tiles, "
        f"{plan.splits} splits of {plan.split_rows} rows"
    )


@pytest.fixture(scope="module")
def emulation():
    return cuda_on_cpu.load()


def faults(emulation, layout, element_size, batches, multiprocessors):
    """Every activation and batch whose plan is not what it should be, and why."""
    for channels, height in SHAPES:
        for batch in batches:
            outer, inner = outer_and_inner(layout, batch, height)
            plan = emulation.Plan(outer, channels, inner, element_size, multiprocessors=multiprocessors)
            why = misfit(plan, outer, channels, inner, element_size, True, emulation.max_threads)
            if why is None and outer * channels * inner * element_size >= LARGE:
                why = uneven(plan.threads, plan.blocks, multiprocessors, emulation.resident_threads)
            if why is None and partial_sums(plan, channels, inner) > MOST_PARTIAL_SUMS:
                why = f"{partial_sums(plan, channels, inner):.0f} partial sums for a thread of a last block"
            if why is not None:
                yield f"({batch}, {channels}, {height}, {height}): {why}: {describe(plan)}"


@pytest.mark.parametrize("element_size", ELEMENT_SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_activation_of_resnet_keeps_a_gpu_busy(emulation, layout, element_size):
    found = list(faults(emulation, layout, element_size, BATCHES, MULTIPROCESSORS))
    assert not found, f"{len(found)} plans:\n" + "\n".join(found)


@pytest.mark.parametrize("multiprocessors", OTHER_MULTIPROCESSORS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_smaller_and_larger_gpus_are_kept_busy(emulation, layout, multiprocessors):
    batches = BATCHES if layout == "channels_last" else ALWAYS_ENOUGH_IMAGES
    found = [
        f"{element_size} bytes, {fault}"
        for element_size in ELEMENT_SIZES
        for fault in faults(emulation, layout, element_size, batches, multiprocessors)
    ]
    assert not found, f"{len(found)} plans:\n" + "\n".join(found)


def test_the_waves_of_a_plan_are_those_counted_here(emulation):
    for channels, height in SHAPES:
        for batch in (1, 32, 256):
            plan = emulation.Plan(batch, channels, height**2, 4)
            waves, last = waves_of(plan.blocks, plan.threads, MULTIPROCESSORS, emulation.resident_threads)
            assert plan.last_wave == pytest.approx(last)
            assert plan.waves == pytest.approx(waves if waves > 1 else last)


def extents(limit):
    """Small ones, those about powers of two, and any; `limit` at most."""
    near_powers = st.builds(
        lambda power, by: min(max(1, 2**power + by), limit), st.integers(0, limit.bit_length()), st.integers(-1, 1)
    )
    return st.one_of(st.integers(1, min(300, limit)), near_powers, st.integers(1, limit))


@st.composite
def divisions(draw):
    """(n, by), of 2^62 at most, and often about a multiple."""
    largest = draw(st.sampled_from([2**31, 2**32, 2**62]))
    by = draw(extents(largest))
    return max(0, by * draw(st.integers(0, largest // by)) + draw(st.integers(-1, 1))), by


@given(divisions())
def test_a_quotient_is_that_of_a_division(emulation, division):
    n, by = division
    assert emulation.quotient(n, by) == n // by


@st.composite
def tensors(draw):
    """(outer, channels, inner), of up to 2^37 elements: more than GPUs hold, of two bytes."""
    elements = 2**37
    outer = draw(extents(elements))
    channels = draw(extents(elements // outer))
    return outer, channels, draw(extents(elements // outer // channels))


@pytest.mark.parametrize("outer", [1, 2, 3, 5, 1000])
def test_a_block_is_whole_warps_and_not_too_large_for_any_width_of_a_row(emulation, outer):
    for columns in range(1, 300):
        plan = emulation.Plan(outer, columns, 1, 4, False)
        assert misfit(plan, outer, columns, 1, 4, False, emulation.max_threads) is None, (columns, describe(plan))


@given(tensors(), st.sampled_from(ELEMENT_SIZES), st.booleans(), st.integers(1, 256))
def test_any_tensor_is_covered(emulation, tensor, element_size, aligned, multiprocessors):
    plan = emulation.Plan(*tensor, element_size, aligned, multiprocessors)
    assert misfit(plan, *tensor, element_size, aligned, emulation.max_threads) is None, describe(plan)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        (2**31 + 1, 1, 1),  # all of them rows
        (1, 2**31 + 1, 1),
        (1, 1, 2**31 + 1),
        (2**25, 64, 1),
        (3, 2**10, 2**20 + 1),
        (1, 1, 2**36 + 1),
        (1, 2**36 + 2**12 + 1, 1),  # blocks of a warp would be too many
        (2**15, 64, 2**15),
    ],
)
@pytest.mark.parametrize("element_size", ELEMENT_SIZES)
def test_more_than_two_to_the_31_elements_are_covered(emulation, element_size, tensor, aligned):
    plan = emulation.Plan(*tensor, element_size, aligned)
    assert misfit(plan, *tensor, element_size, aligned, emulation.max_threads) is None, describe(plan)
    assert uneven(plan.threads, plan.blocks, MULTIPROCESSORS, emulation.resident_threads) is None, describe(plan)


# The checks above, on plans that are wrong ----------------------------------------------------------------------------

TENSOR = (32, 64, 56 * 56)
RIGHT = dict(rows=32, columns=64 * 56 * 56, width=4, threads_x=32, threads_y=8, tiles=1568, splits=4, split_rows=8)
WRONG = {
    "rows": dict(rows=31),
    "columns": dict(columns=64 * 56 * 55),
    "accesses of 16 bytes where they can be": dict(width=1, tiles=4 * 1568),
    "threads": dict(threads_y=16),
    "threads along columns": dict(threads_x=256, threads_y=1, tiles=196),
    "tiles cover the columns, none is empty": dict(tiles=1567),
    "splits cover the rows, none is empty": dict(split_rows=7),
    "blocks": dict(tiles=1568, splits=2**31, split_rows=1),
}


def plan_with(**changes):
    fields = {**RIGHT, **changes}
    threads, blocks = fields["threads_x"] * fields["threads_y"], fields["tiles"] * fields["splits"]
    return types.SimpleNamespace(**{"threads": threads, "blocks": blocks, **fields})


def test_a_right_plan_passes():
    assert misfit(plan_with(), *TENSOR, 4, True, 384) is None


@pytest.mark.parametrize(
    ("condition", "changes"),
    [
        *((condition, changes) for condition, changes in WRONG.items() if condition != "blocks"),
        ("accesses of 16 bytes where they can be", dict(width=8, tiles=784)),
        ("threads", dict(threads_x=8, threads_y=3, tiles=4 * 1568)),
        ("threads", dict(threads=128)),
        ("threads along columns", dict(threads_x=4, threads_y=8, tiles=8 * 1568)),
        ("tiles cover the columns, none is empty", dict(tiles=1569)),
        ("splits cover the rows, none is empty", dict(splits=5)),
        ("blocks", dict(blocks=2**31)),
        ("blocks", dict(blocks=0)),
    ],
)
def test_a_wrong_plan_is_found(condition, changes):
    assert misfit(plan_with(**changes), *TENSOR, 4, True, 384) == condition


def test_a_plan_wider_than_its_alignment_is_found():
    assert misfit(plan_with(), *TENSOR, 4, False, 384) == "accesses of 16 bytes where they can be"


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (131, "131 blocks for 132 multiprocessors"),
        (132, None),
        (133, "the last of 1.00 waves is 50% full"),  # one multiprocessor gets two
        (211, "the last of 1.00 waves is 80% full"),
        (212, None),
        (396, None),
        (397, "the last of 1.00 waves is 0% full"),
        (4 * 396 + 316, "the last of 4.80 waves is 80% full"),
        (4 * 396 + 317, None),
        (5 * 396 + 1, None),
    ],
)
def test_an_uneven_plan_is_found(blocks, why):
    assert uneven(256, blocks, 132, 768) == why


def test_partial_sums_are_counted():
    assert partial_sums(plan_with(), 64, 56 * 56) == 4 * 26 * 2 / 256  # a channel is on up to 26 tiles, a tile on 2
    assert partial_sums(plan_with(tiles=1, splits=10), 128, 1) == 10 * 128 / 256
