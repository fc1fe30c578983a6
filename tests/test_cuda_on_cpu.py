"""The emulation by which the CUDA kernels run on the CPU: each fault of a kernel is found, and nothing else is one.

The kernels are in cuda_on_cpu/faults.cu.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from .conftest import represented

EMULATION = Path(__file__).parent / "cuda_on_cpu"
COMPILE = [
    os.environ.get("CXX", "g++"),
    *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-DRESNET_FUSED_CUDA_ON_CPU"),
    *(f"-I{EMULATION}", f"-I{EMULATION.parent.parent / 'csrc' / 'cuda'}"),
    *("-x", "c++"),
]
FLAVOURS = {
    "optimised": ["-O2"],
    "sanitised": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "ucontext": ["-O1", "-DEMULATE_WITH_UCONTEXT"],  # what other CPUs than x86-64 use
}
SEEDS = range(4)

NOT_HANDED_OVER = r"block \d, thread \d+: load of what block \d, thread \d+ wrote: it was not handed over"
NOT_TAKEN_OVER = r"block \d, thread \d+: load of what block \d, thread \d+ wrote: it was not taken over"
SHARED_RACE = r"(load|store) of Shared element \d+(: a race with thread \d+|, which no thread of this block wrote)"

FAULTS = {
    "barrier_and_return": r"block \d, thread \d+: waits at __syncthreads for thread 70, which returned",
    "barrier_and_shuffle": r"__shfl_xor_sync with mask 0xff for thread 3, which waits at __syncthreads",
    "shuffle_and_return": r"__shfl_down_sync with mask 0xff for thread 5, which returned",
    "missing_lanes": r"__syncwarp: mask 0xffffffff names lanes that do not exist: there are 8",
    "different_operations": r"waits at __(syncwarp|ballot_sync) .* which waits at __(syncwarp|ballot_sync) ",
    "different_masks": r"with mask 0xf for thread 1, which waits at __ballot_sync with mask 0xff",
    "caller_outside_mask": r"__syncwarp: the calling lane is not in its mask 0xff",
    "source_outside_mask": r"__shfl_down_sync: reads from lane \d+, which is not in its mask 0x",
    "odd_width": r"__shfl_sync: width 6",
    "load_past_the_end": r"block 0, thread 0: load of 4 bytes out of bounds: element 16 to 16 of 16",
    "store_before_the_begin": r"store of 8 bytes out of bounds: element -1 to -1 of 16",
    "vector_past_the_end": r"store of 16 bytes out of bounds: element 16 to 19 of 18",
    "vector_misaligned": r"load of 16 bytes misaligned: element 4 is at \d+",
    "atomic_past_the_end": r"atomic of 4 bytes out of bounds: element 16 to 16 of 16",
    "load_null": r"load of 4 bytes through a null Global",
    "shared_past_the_end": r"store of Shared out of bounds: element 72 of 72",
    "shared_not_written": r"load of Shared element 7, which no thread of this block wrote",
    "read_after_write": SHARED_RACE,
    "write_after_read": SHARED_RACE,
    "write_after_two_reads": r"(load|store) of Shared element 0: a race with thread (0|64)",
    "write_after_write": r"store of Shared element 0: a race with thread (0|64)",
    "read_in_warp": SHARED_RACE,
    "read_in_another_group": SHARED_RACE,
    "global_race": r"(load|store) of what .* a race, with no __syncthreads or __syncwarp between",
    "global_race_in_warp": r"(load|store) of what .* a race, with no __syncthreads or __syncwarp between",
    "two_writers": r"store of what .* a race, with no __syncthreads or __syncwarp between",
    "bytes_of_words": r"(load|store) of what .* a race, with no __syncthreads or __syncwarp between",
    "overlapping_blocks": r"store of what block \d, thread (0|71) wrote: it was not handed over",
    "no_atomic_at_last": NOT_TAKEN_OVER,
    "not_written": r"^2 of 144 bytes of an output were not written, the first at byte 18$",
    "shared_atomic": r"atomic of a word that another stream, or graph, uses",
    "load_not_written": r"load of 4 bytes that were not written",
    "freed": r"load of memory that was freed",
    "another_device": r"load of memory of device 0 in a launch on device 1",
    "stream_of_another_device": r"cudaErrorInvalidResourceHandle",
    "allocated_on_another_stream": r"load of memory that was allocated for another stream",
    "replayed": r"load of 4 bytes that were not written",
}
HAND_OVER_FAULTS = {
    "by_groups-no_fence": NOT_HANDED_OVER,
    "by_groups-early_fence": NOT_HANDED_OVER,
    "by_groups-no_syncwarp_before": NOT_HANDED_OVER,
    "by_groups-no_atomic": NOT_HANDED_OVER,
    "by_groups-no_fence_after": NOT_TAKEN_OVER,
    "by_groups-no_syncwarp_after": NOT_TAKEN_OVER,
    "by_groups-stale_load": r"other blocks' writes are read with load_fresh",
    "by_blocks-early_fence": NOT_HANDED_OVER,
    "by_blocks-no_barrier": NOT_HANDED_OVER,
    "too_many_blocks": r"a launch of 2147483648 blocks, of at most 2\^31 - 1: cudaErrorInvalidConfiguration",
}
COUNTERS = {
    "copy_bytes": "ok: 1 launches, 360 threads, 360 bytes read, 360 bytes written, 0 atomics",
    "copy_floats": "ok: 1 launches, 360 threads, 1440 bytes read, 1440 bytes written, 0 atomics",
    "copy_float_vectors": "ok: 1 launches, 360 threads, 5760 bytes read, 5760 bytes written, 0 atomics",
    "copy_half_vectors": "ok: 1 launches, 360 threads, 5760 bytes read, 5760 bytes written, 0 atomics",
    "copy_half_pairs": "ok: 1 launches, 360 threads, 1440 bytes read, 1440 bytes written, 0 atomics",
    "by_groups-none": "ok: 2 launches, 720 threads, 2880 bytes read, 2944 bytes written, 90 atomics",
    "by_blocks-none": "ok: 2 launches, 720 threads, 2880 bytes read, 3456 bytes written, 10 atomics",
    "by_blocks-fence_before_barrier": "ok: 2 launches, 720 threads, 2880 bytes read, 3456 bytes written, 10 atomics",
    "dimensions": "ok: 1 launches, 180 threads, 0 bytes read, 720 bytes written, 0 atomics",
}
WORKING = [*(f"{name}-mended" for name in FAULTS), "groups", "after_a_fault", "host_threads"]


@pytest.fixture(scope="session", params=represented(FLAVOURS, by=["optimised"]))
def run(request, tmp_path_factory):
    program = tmp_path_factory.mktemp(request.param) / "faults"
    sources = [EMULATION / "faults.cu", EMULATION / "emulator.cpp", EMULATION / "runtime.cpp"]
    subprocess.run([*COMPILE, *FLAVOURS[request.param], *sources, "-o", program], check=True)
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}

    def run(*arguments, **keywords):
        command = [program, *map(str, arguments)]
        return subprocess.run(command, env={**os.environ, **options}, capture_output=True, timeout=60, **keywords)

    return run


@pytest.mark.parametrize("name", [*FAULTS, *HAND_OVER_FAULTS])
def test_a_fault_is_found_in_any_order(run, name):
    error = {**FAULTS, **HAND_OVER_FAULTS}[name]
    for seed in SEEDS:
        result = run(name, seed, text=True)
        assert result.returncode == 1 and re.search(error, result.stdout.strip()), result
        assert result.stderr == ""


@pytest.mark.parametrize("name", WORKING)
def test_what_is_right_runs_in_any_order(run, name):
    for seed in SEEDS:
        result = run(name, seed, text=True)
        assert result.returncode == 0 and result.stdout.startswith("ok: "), result
        assert result.stderr == ""


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_are_exact(run, name):
    for seed in SEEDS:
        assert run(name, seed, text=True).stdout.strip() == COUNTERS[name]


def test_a_seed_is_an_order(run):
    orders = [run("by_groups-no_fence", seed, text=True).stdout for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert orders[:4] == orders[4:] and len(set(orders)) == 4
    assert len({order.split(",")[0] for order in orders}) > 1  # blocks that came last


def test_half_types_are_rounded_as_pytorch_rounds_them(run):
    halves = torch.arange(-(2**15), 2**15).short()
    cases = [torch.randint(-(2**31), 2**31, (100_000,)).int().view(torch.float32)]
    for dtype in (torch.float16, torch.bfloat16):
        values = halves.view(dtype).float()
        ties = (values[:-1] + values[1:]) / 2
        cases += [values, ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, ties * 2)]
    floats = torch.cat(cases)
    result = torch.frombuffer(bytearray(run("convert", input=floats.numpy().tobytes()).stdout), dtype=torch.float32)
    expected = torch.stack([floats.half().float(), floats.bfloat16().float()], 1)
    result = result.view_as(expected)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("p.store(0, p.load(1));", None),
        ("*p;", "no match for 'operator*'"),
        ("p[0];", "no match for 'operator[]'"),
        ("p + 1;", "no match for 'operator+'"),
        ("*shared;", "no match for 'operator*'"),
        ("shared[0];", "no match for 'operator[]'"),
        ("Global<const float>(p).load(0);", "no matching function"),
        ("Global<const float>().store(0, 1);", "not written"),
        ("Global<float>().atomic_inc(0, 1);", "static assertion failed"),
        ("Global<double>().load_vector<4>(0);", "the widest access is of 16 bytes"),
        ("__shfl_sync(1, dim3(), 0);", "no matching function"),
    ],
)
def test_there_is_no_way_around_the_checks(tmp_path, statement, error):
    source = tmp_path / "kernel.cu"
    source.write_text(
        '#include "memory.cuh"\nusing namespace resnet_fused::cuda;\n'
        f"__global__ void kernel(Global<float> p, Shared<float, 2> shared) {{ {statement} (void)shared; }}\n"
    )
    command = [*COMPILE, "-Wno-unused", "-fsyntax-only", source]
    result = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
    if error is None:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0 and error in result.stderr
