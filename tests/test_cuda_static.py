"""What nvcc makes of the CUDA kernels, read off its machine code (SASS), for each generation of GPUs; no GPU needed.

Registers and shared memory leave room for the blocks that the plan counts on; the loop over rows moves 16 bytes at each
access and nothing else but a byte of the mask; nothing is rounded or added as fast-math would.
"""

import contextlib
import fcntl
import functools
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from .conftest import represented
from .sass import (
    bits_of,
    fewest_instructions,
    find,
    innermost_loops,
    instructions_of,
    instructions_of_ptx,
    is_global,
    loads_under_way,
    loops_of,
    output_of,
    successors,
)

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
KERNELS = SOURCES / "cuda" / "batch_norm_add_relu.cu"
FLAGS = ["-std=c++17", "-O3", *COMMON_NVCC_FLAGS]  # setup.py's and torch's

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "sm_120": 100 * 1024}  # likewise
RESERVED = 1024  # bytes of shared memory that each block takes besides
BLOCKS = (384, 256, 192)  # threads: the sizes that the plan chooses among

# Blocks of so many threads of which a multiprocessor holds fewer than the plan counts on, by their shared memory: how
# many it holds.
FEWER_BLOCKS = {
    "sm_120": {
        192: {
            f"{name}<{element}, 8{pooling}>": 3
            for name, poolings in (("statistics", [""]), ("gradient_sums", ["", ", max_pool of 1", ", max_pool of 8"]))
            for pooling in poolings
            for element in ("half", "bfloat16")
        },
    }
}

# Kernels --------------------------------------------------------------------------------------------------------------

FULL_WIDTHS = {"half": 8, "bfloat16": 8, "float": 4, "double": 2}
VARIANTS = {  # by width
    "statistics": lambda width: (None,),
    "normalize": lambda width: ("relu", "add_relu", "add_batch_norm_relu", "relu_max_pool"),
    "gradient_sums": lambda width: (None, *{"max_pool of 1", f"max_pool of {width}"}),
    "input_gradient": lambda width: (None, *{"max_pool of 1", f"max_pool of {width}"}),
}
MANGLED = re.compile(
    r"\d(?P<name>statistics|normalize|gradient_sums|input_gradient)"
    r"I(?P<element>6__half|13__nv_bfloat16|f|d)Li(?P<width>\d+)E"
    r"(?:L\w*8ResidualE(?P<residual>\d)ELb(?P<pools>\d)E|Li(?P<of_window>\d)E)?EEv"
)
ELEMENTS = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float", "d": "double"}


class Kernel(NamedTuple):
    """An instantiation of a kernel template."""

    name: str
    element: str
    width: int
    variant: str | None

    def __str__(self):
        return f"{self.name}<{', '.join(str(argument) for argument in self[1:] if argument is not None)}>"

    @property
    def is_full_width(self):
        return self.width == FULL_WIDTHS[self.element]

    @property
    def pools(self):
        return "max_pool" in (self.variant or "")


ALL_KERNELS = {
    Kernel(name, element, width, variant)
    for name, variants in VARIANTS.items()
    for element, full_width in FULL_WIDTHS.items()
    for width in (1, full_width)
    for variant in variants(width)
}


def kernel_of(mangled):
    """The Kernel of a mangled name; the name itself where it is another function's."""
    match = MANGLED.search(mangled)
    if not match:
        return "count_batches" if "count_batches" in mangled else mangled
    width, variant = int(match["width"]), None
    if match["residual"]:  # in the order of the enumeration Residual
        variant = VARIANTS["normalize"](width)[-1 if match["pools"] == "1" else int(match["residual"])]
    elif match["of_window"] not in (None, "0"):
        variant = f"max_pool of {match['of_window']}"
    return Kernel(match["name"], ELEMENTS[match["element"]], width, variant)


# Compilation ----------------------------------------------------------------------------------------------------------


NVCC = find("nvcc")
NVDISASM = find("nvdisasm")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc: it comes with the CUDA toolkit")
needs_nvdisasm = pytest.mark.skipif(
    NVCC is None or NVDISASM is None,
    reason="there is no nvcc or no nvdisasm: the CUDA toolkit has both, triton the latter",
)


def compile_kernels(source, architecture, folder, *flags):
    """(what ptxas says of each kernel, their machine code): texts, kept in `folder` while nothing changes."""
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256("\n".join([output_of(NVCC, "--version"), *FLAGS, *flags, architecture]).encode())
    for path in [source, *sorted(path for path in SOURCES.rglob("*.*h") if path.is_file())]:
        key.update(path.read_bytes())
    cubin, log, code, made = (folder / name for name in ("kernels.cubin", "ptxas.txt", "sass.txt", "key.txt"))
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(folder / "lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # against other processes of pytest-xdist
        if not made.exists() or made.read_text() != key.hexdigest():
            made.unlink(missing_ok=True)
            code.unlink(missing_ok=True)
            log.write_text(
                output_of(NVCC, *FLAGS, *flags, f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-o", cubin, source)
            )
            made.write_text(key.hexdigest())
        if NVDISASM and not code.exists():
            code.write_text(output_of(NVDISASM, "-c", cubin))
    return log.read_text(), code.read_text() if NVDISASM else ""


@functools.cache
def compiled(architecture):
    """({kernel: Resources}, {kernel: [Instruction]}) of csrc/cuda/batch_norm_add_relu.cu."""
    log, code = compile_kernels(KERNELS, architecture, ROOT / "build" / "cuda_static" / architecture)
    return resources_of(log), instructions_of(code, kernel_of)


@pytest.fixture(params=represented(ARCHITECTURES, by=["sm_90"]))
def architecture(request):
    return request.param


@pytest.fixture
def resources(architecture):
    return compiled(architecture)[0]


@pytest.fixture
def code(architecture):
    return compiled(architecture)[1]


# Registers and memory -------------------------------------------------------------------------------------------------


class Resources(NamedTuple):
    registers: int
    shared: int  # bytes
    stack: int
    spills: int


def resources_of(log):
    """{kernel: Resources}, as `ptxas -v` prints them."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        kernel = kernel_of(text[: text.index("'")])
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        ).groups()
        registers = re.search(r"Used (\d+) registers", text)[1]
        shared = re.search(r"(\d+) bytes smem", text)
        found[kernel] = Resources(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
    return found


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def blocks_by_registers(registers, threads):
    """Blocks that a multiprocessor has registers for. A warp takes a multiple of 256, and is one of a quarter's."""
    of_a_warp = round_up(32 * round_up(registers, 8), 256)
    return REGISTERS // 4 // of_a_warp * 4 // (threads // 32)


def blocks_by_shared_memory(shared, architecture):
    return SHARED_MEMORY[architecture] // round_up(shared + RESERVED, 128)


@functools.cache
def constants():
    """The constants of csrc/cuda/plan.h, by name."""
    text = (SOURCES / "cuda" / "plan.h").read_text()
    return {name: int(value) for name, value in re.findall(r"^constexpr int (\w+) = (\d+);", text, re.MULTILINE)}


# Machine code ---------------------------------------------------------------------------------------------------------


def hot_loops(code):
    """The loops over rows: those that access global memory and nothing shared, as only they keep all in registers."""
    return [
        loop
        for loop in loops_of(code)
        if any(is_global(code[i]) for i in loop) and not any(code[i].is_one_of("LDS", "STS") for i in loop)
    ]


def with_callees(code, loop):
    """A loop's instructions and those of the functions that it calls."""
    following = list(successors(code))
    reached, work = set(loop), [target for i in loop if code[i].is_call for target in code[i].targets]
    while work:
        i = work.pop()
        if i not in reached:
            reached.add(i)
            work += following[i] + (list(code[i].targets) if code[i].is_call else [])
    return [code[i] for i in sorted(reached)]


class Traffic(NamedTuple):
    """Accesses of a row of threads: of vectors, and of bytes of the mask."""

    loads: int = 0
    stores: int = 0
    mask_loads: int = 0
    mask_stores: int = 0


def traffic_of(kernel):
    if kernel.name == "statistics":
        return Traffic(loads=1)
    if kernel.name == "normalize":
        with_residual = kernel.variant != "relu"
        return Traffic(loads=1 + with_residual, stores=1, mask_stores=1)
    return Traffic(loads=2, stores=0 if kernel.name == "gradient_sums" else 2, mask_loads=1)


def narrow_accesses(code, expected):
    """What is not as it should be with the accesses of the loops over rows: a list, empty where all is well."""
    faults, complete = [], False
    for loop in hot_loops(code):
        counts = dict.fromkeys(Traffic._fields, 0)
        backward = [(code[j].address, code[i].address) for i in loop for j in code[i].targets if j in loop and j <= i]
        for i in loop:
            instruction = code[i]
            if not is_global(instruction):
                continue
            where = f"{instruction.operation} at {instruction.address:#x}"
            is_load, bits = instruction.is_one_of("LDG", "LD"), bits_of(instruction)
            field = ("loads" if is_load else "stores") if bits >= 128 else "mask_loads" if is_load else "mask_stores"
            counts[field] += 1
            if bits < 128 and (bits > 8 or not getattr(expected, field)):
                faults.append(f"{where}: narrower than 16 bytes")
            if not instruction.is_one_of("LDG", "STG"):
                faults.append(f"{where}: not known to be of global memory")
            if not any(target <= instruction.address <= branch for target, branch in backward):
                faults.append(f"{where}: not between a branch and where it goes back to")
        # As many rows as are stored; there may be more loads, of which a branch takes some.
        rows = counts["stores"] // expected.stores if expected.stores else 1
        complete |= rows > 0 and all(counts[field] >= rows * count for field, count in expected._asdict().items())
    if not complete:
        faults.append(f"no loop with {expected}, or a multiple")
    return faults


DOUBLE = re.compile(r"(DADD|DMUL|DFMA|DSETP|DMNMX)(\.|$)|.*(\.F64|64H)(\.|$)")


def double_arithmetic(code):
    """Operations on doubles in the loops over rows, and calls of what is not known."""
    return [
        i.operation
        for loop in hot_loops(code)
        for i in with_callees(code, loop)
        if DOUBLE.match(i.operation) or i.is_call and not i.targets
    ]


NEGATION = re.compile(r"FADD\.FTZ R\d+, -R\d+, -RZ")  # on the way to a reciprocal that is rounded right


def flushing(code):
    """Operations in the loops over rows that take subnormals for zeros."""
    instructions = [code[i] for loop in hot_loops(code) for i in loop]
    return [i.operation for i in instructions if ".FTZ" in i.operation and not NEGATION.match(i.operation + i.operands)]


def unordered_sums(code):
    """Atomic operations other than the count of arrivals: their order, and so a float's rounding, is any."""
    atomics = [i.operation for i in code if i.is_one_of("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS")]
    return [operation for operation in atomics if ".INC" not in operation]


def spills_in_loops(code):
    """Local memory in the loops over rows."""
    return [code[i].operation for loop in hot_loops(code) for i in loop if code[i].is_one_of("LDL", "STL")]


def divisions_in_joins(code):
    """Of PTX: divisions in the loops over sums, in shared memory and of other blocks, and of 64 bits anywhere."""
    joins = [
        loop
        for loop in innermost_loops(code)
        if any(code[i].operation.startswith(("ld.shared", "ld.global.cg")) for i in loop)
    ]
    inside = {i for loop in joins for i in loop}
    return [
        instruction.operation
        for i, instruction in enumerate(code)
        if re.match(r"(div|rem)\.[su]64" if i not in inside else r"div|rem|rcp", instruction.operation)
    ]


def bytes_in_flight(code):
    """Of the loop over rows, on a multiprocessor, by as many threads as the plan counts on."""
    return constants()["kResidentThreads"] * 16 * max(loads_under_way(code, loop) for loop in hot_loops(code))


# The kernels ----------------------------------------------------------------------------------------------------------


@needs_nvcc
def test_every_instantiation_is_looked_at(resources):
    assert set(resources) == ALL_KERNELS | {"count_batches"}


@needs_nvdisasm
def test_the_code_of_every_instantiation_is_looked_at(code):
    assert set(code) == ALL_KERNELS | {"count_batches"}


@needs_nvcc
def test_nothing_spills(resources):
    assert {str(kernel): r.stack for kernel, r in resources.items() if r.stack or r.spills} == {}


@needs_nvcc
@pytest.mark.parametrize("threads", BLOCKS)
def test_registers_leave_room_for_the_planned_threads(resources, threads):
    planned = constants()["kResidentThreads"] // threads
    short = {
        str(kernel): r.registers
        for kernel, r in resources.items()
        if isinstance(kernel, Kernel) and blocks_by_registers(r.registers, threads) < planned
    }
    assert short == {}


@needs_nvcc
@pytest.mark.parametrize("threads", BLOCKS)
def test_shared_memory_leaves_room_for_the_planned_threads(architecture, resources, threads):
    known = FEWER_BLOCKS.get(architecture, {}).get(threads, {})
    planned = constants()["kResidentThreads"] // threads
    blocks = {str(kernel): blocks_by_shared_memory(r.shared, architecture) for kernel, r in resources.items()}
    assert {kernel: count for kernel, count in blocks.items() if count < known.get(kernel, planned)} == {}


def test_the_sizes_of_blocks_are_those_of_the_plan():
    sizes = re.search(r"for \(const int threads : \{([\d, ]+)\}\)", (SOURCES / "cuda" / "plan.h").read_text())
    assert sorted(BLOCKS) == sorted(int(size) for size in sizes[1].split(","))
    assert max(BLOCKS) == constants()["kMaxThreads"]


@needs_nvdisasm
def test_the_loop_over_rows_moves_16_bytes_at_each_access(code):
    kernels = [kernel for kernel in ALL_KERNELS if kernel.is_full_width and not kernel.pools]
    faults = {str(kernel): narrow_accesses(code[kernel], traffic_of(kernel)) for kernel in kernels}
    assert {kernel: found for kernel, found in faults.items() if found} == {}


def accesses(code, *operations):
    """The widths in bits of those in the loops over rows, by how many there are."""
    inside = {i for loop in hot_loops(code) for i in loop}
    return Counter(bits_of(code[i]) for i in inside if code[i].is_one_of(*operations))


@needs_nvdisasm
def test_windows_are_read_in_vectors(code):
    """Of neighbouring channels: a load, or store, for them, and one for their winners, of a byte each."""
    for kernel in ALL_KERNELS:
        if not kernel.is_full_width or kernel.variant not in ("relu_max_pool", f"max_pool of {kernel.width}"):
            continue
        winners = 8 * kernel.width
        if kernel.name == "normalize":
            expected = {128: 3}, {128: 1, winners: 1}
        else:  # each load twice: of the first row, and of those that follow
            expected = {128: 3, winners: 2}, {128: 1} if kernel.name == "input_gradient" else {}
        assert (accesses(code[kernel], "LDG"), accesses(code[kernel], "STG")) == expected, str(kernel)


@needs_nvdisasm
@pytest.mark.parametrize(
    ("name", "variant", "most"),
    [
        ("statistics", None, 280),
        ("normalize", "add_relu", 390),
        ("gradient_sums", None, 250),
        ("input_gradient", None, 345),
    ],
)
def test_few_instructions_come_before_the_rows(name, variant, most):
    """Of a thread with a row or two, as at 3x3, they are the most, even by the shortest way: loads of the first row,
    coefficients to shared memory, and from there."""
    code = compiled("sm_90")[1][Kernel(name, "float", 4, variant)]
    rows = {i for loop in hot_loops(code) if any(bits_of(code[i]) == 128 for i in loop) for i in loop}
    stops = (
        lambda i: is_global(code[i]) and bits_of(code[i]) == 128,
        lambda i: code[i].is_one_of("STS"),
        lambda i: code[i].is_one_of("BAR"),
        lambda i: code[i].is_one_of("LDS"),
        lambda i: i in rows,
    )
    assert fewest_instructions(code, *stops) <= most


@needs_nvdisasm
def test_the_values_of_a_window_take_few_instructions(code):
    """Three at once, 13 to 17 instructions each; with a position and a branch for each they were 25."""
    for kernel in ALL_KERNELS:
        if kernel.variant == "relu_max_pool" and kernel.width == 1 and kernel.element != "double":
            loops = [[code[kernel][i] for i in loop] for loop in innermost_loops(code[kernel])]
            _, loop = max((loop[0].address, loop) for loop in loops if any(map(is_global, loop)))
            loads = sum(i.is_one_of("LDG") for i in loop)
            assert (loads, len(loop) // loads <= 17) == (3, True), str(kernel)


def least_bytes_in_flight(kernel):
    """An H100 wants 32 to 40 KB. What gives 24 holds eight coefficients a column, or four and two stores."""
    halves_of_both = kernel.variant == "add_batch_norm_relu" and kernel.element in ("half", "bfloat16")
    return 24576 if halves_of_both or kernel.name == "input_gradient" else 32768


@needs_nvdisasm
def test_the_loop_over_rows_keeps_memory_busy(code):
    kernels = [kernel for kernel in ALL_KERNELS if kernel.is_full_width and not kernel.pools]
    found = {kernel: bytes_in_flight(code[kernel]) for kernel in kernels}
    assert {str(kernel): count for kernel, count in found.items() if count < least_bytes_in_flight(kernel)} == {}


@needs_nvcc
def test_joining_sums_takes_no_division(tmp_path):
    output_of(NVCC, *FLAGS, "-arch=sm_90", "-ptx", "-o", tmp_path / "kernels.ptx", KERNELS)
    code = instructions_of_ptx((tmp_path / "kernels.ptx").read_text(), kernel_of)
    assert set(code) == ALL_KERNELS | {"count_batches"}
    assert {str(kernel): divisions_in_joins(code[kernel]) for kernel in code if divisions_in_joins(code[kernel])} == {}
    for kernel in ALL_KERNELS:  # that the loops are found
        sums = kernel.name in ("statistics", "gradient_sums")
        assert any(i.operation.startswith("ld.global.cg") for i in code[kernel]) == sums


@needs_nvdisasm
def test_partial_sums_of_other_blocks_are_loaded_four_at_once(code):
    """Each comes from L2, some 300 cycles away."""

    def is_fresh(load):
        return load.is_one_of("LDG") and ".STRONG" in load.operation

    for kernel in ALL_KERNELS:
        joins = [loop for loop in innermost_loops(code[kernel]) if any(is_fresh(code[kernel][i]) for i in loop)]
        under_way = [loads_under_way(code[kernel], loop, is_fresh) for loop in joins]
        assert len(joins) == {"statistics": 2, "gradient_sums": 1}.get(kernel.name, 0), str(kernel)
        assert all(loads >= 4 for loads in under_way), (str(kernel), under_way)


@needs_nvdisasm
def test_the_sums_of_a_thread_are_stored_16_bytes_at_a_time(code):
    """In shared memory, where a float at a time, eight threads' would be in one bank."""
    for kernel in ALL_KERNELS:
        if kernel.name in ("statistics", "gradient_sums") and kernel.is_full_width:
            stores = [i for i in code[kernel] if i.is_one_of("STS") and bits_of(i) == 128]
            assert len(stores) == (4 if kernel.width == 8 else 2), str(kernel)


@needs_nvdisasm
def test_the_loop_over_rows_computes_in_float(code):
    kernels = [kernel for kernel in ALL_KERNELS if kernel.element != "double"]
    assert all(hot_loops(code[kernel]) for kernel in kernels)
    faults = {str(kernel): double_arithmetic(code[kernel]) for kernel in kernels}
    assert {kernel: found for kernel, found in faults.items() if found} == {}


@needs_nvdisasm
@pytest.mark.parametrize("check", [flushing, unordered_sums], ids=lambda check: check.__name__)
def test_nothing_is_rounded_or_ordered_as_by_fast_math(code, check):
    assert {str(kernel): check(instructions) for kernel, instructions in code.items() if check(instructions)} == {}


# The checks above, on kernels with faults -----------------------------------------------------------------------------

PLANTED = r"""
#define KERNEL(name) extern "C" __global__ void name(const float4* x, float4* y, unsigned char* mask, int n)
#define EACH_ROW for (int i = threadIdx.x; i < n; i += blockDim.x)

__device__ float sum(float4 v) { return v.x + v.y * v.z + v.w; }
__device__ __noinline__ float inverse(float value) { return (float)(1.1 / (double)value); }

KERNEL(right) {
  EACH_ROW { const float4 v = x[i]; y[i] = v; mask[i] = v.x > 0; }
}
KERNEL(narrow_load) {
  EACH_ROW y[i] = {((const float*)x)[i], 1, 2, 3};
}
KERNEL(narrow_store) {
  EACH_ROW ((float*)y)[i] = sum(x[i]);
}
KERNEL(other_loop) {
  EACH_ROW y[i] = x[i];
  const float* next = (const float*)x;
  EACH_ROW mask[i] = next[i] > 0;
}
KERNEL(no_loop) {
  y[threadIdx.x] = x[threadIdx.x];
}
KERNEL(doubles) {
  EACH_ROW { float4 v = x[i]; v.x = (float)(v.x * 1.1); y[i] = v; }
}
KERNEL(doubles_in_a_function) {
  EACH_ROW { float4 v = x[i]; v.x = inverse(v.x); y[i] = v; }
}
KERNEL(loads_ahead) {
  float4 v = x[threadIdx.x], w = x[threadIdx.x + blockDim.x];
  for (int i = threadIdx.x; i < n; i += 2 * blockDim.x) {
    y[i] = {sum(v), 1, 2, 3};
    v = __ldg(x + i + 2 * blockDim.x);
    y[i + blockDim.x] = {sum(w), 1, 2, 3};
    w = __ldg(x + i + 3 * blockDim.x);
  }
}
KERNEL(divides) {
  __shared__ float sums[1024];
  sums[threadIdx.x] = x[threadIdx.x].x;
  __syncthreads();
  float total = 0;
  for (int i = threadIdx.x % 4; i < 1024; i += 4) total += sums[i / n * 32 + i % n];
  mask[threadIdx.x] = total > 0;
}
KERNEL(atomic_float) {
  EACH_ROW atomicAdd((float*)y, sum(x[i]));
}
KERNEL(atomic_count) {
  atomicInc((unsigned*)y, 7);
}
KERNEL(subnormals) {
  EACH_ROW { float4 v = x[i]; v.x = v.x * v.y + v.z; y[i] = v; }
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float4* x, float4* y, unsigned char*, int n) {
  float4 sums[16] = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float4 v = x[16 * i + k];
      sums[k].x += v.x, sums[k].y += v.y * v.x, sums[k].z += v.z * v.y, sums[k].w += v.w * v.z;
    }
  }
#pragma unroll
  for (int k = 0; k < 16; ++k) y[16 * threadIdx.x + k] = sums[k];
}
"""


@functools.cache
def planted(folder, *flags):
    folder.mkdir(exist_ok=True)
    source = folder / "planted.cu"
    source.write_text(PLANTED)
    log, code = compile_kernels(source, "sm_90", folder, *flags)
    return resources_of(log), instructions_of(code, kernel_of)


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


COPY = Traffic(loads=1, stores=1)
COPY_WITH_MASK = Traffic(loads=1, stores=1, mask_stores=1)


@needs_nvdisasm
def test_a_kernel_without_a_fault_passes(planted_folder):
    resources, code = planted(planted_folder)
    assert (resources["right"].stack, resources["right"].spills) == (0, 0)
    assert narrow_accesses(code["right"], COPY_WITH_MASK) == []
    for check in (double_arithmetic, flushing, spills_in_loops, unordered_sums):
        assert check(code["right"]) == []
    assert unordered_sums(code["atomic_count"]) == []


@needs_nvdisasm
@pytest.mark.parametrize(
    ("name", "expected", "fault"),
    [
        ("right", COPY, r"STG\.E\.U8 at \w+: narrower than 16 bytes"),
        ("right", COPY._replace(loads=2), "no loop with"),
        ("narrow_load", COPY, r"LDG\.E\S* at \w+: narrower than 16 bytes"),
        ("narrow_store", COPY, r"STG\.E at \w+: narrower than 16 bytes"),
        ("narrow_store", COPY_WITH_MASK, r"STG\.E at \w+: narrower than 16 bytes"),
        ("other_loop", COPY_WITH_MASK, r"LDG\.E\S* at \w+: narrower than 16 bytes"),
        ("no_loop", COPY, "no loop with"),
    ],
)
def test_a_narrow_access_is_found(planted_folder, name, expected, fault):
    faults = narrow_accesses(planted(planted_folder)[1][name], expected)
    assert any(re.match(fault, found) for found in faults), faults


@needs_nvdisasm
@pytest.mark.parametrize(
    ("check", "name"),
    [
        (double_arithmetic, "doubles"),
        (double_arithmetic, "doubles_in_a_function"),
        (unordered_sums, "atomic_float"),
        (spills_in_loops, "spills"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_operation_is_found(planted_folder, check, name):
    assert check(planted(planted_folder)[1][name]) != []


@needs_nvdisasm
@pytest.mark.parametrize(("name", "loads"), [("loads_ahead", 2), ("right", 1)])
def test_loads_under_way_are_counted(planted_folder, name, loads):
    code = planted(planted_folder)[1][name]
    assert max(loads_under_way(code, loop) for loop in hot_loops(code)) == loads


@needs_nvcc
def test_a_division_in_a_join_is_found(planted_folder):
    planted(planted_folder)
    output_of(NVCC, *FLAGS, "-arch=sm_90", "-ptx", "-o", planted_folder / "planted.ptx", planted_folder / "planted.cu")
    code = instructions_of_ptx((planted_folder / "planted.ptx").read_text())
    assert divisions_in_joins(code["divides"]) != []
    assert divisions_in_joins(code["right"]) == []


@needs_nvdisasm
def test_fast_math_is_found(planted_folder):
    assert flushing(planted(planted_folder)[1]["subnormals"]) == []
    assert flushing(planted(planted_folder / "fast", "-use_fast_math")[1]["subnormals"]) != []


@needs_nvcc
def test_a_spill_is_found(planted_folder):
    spilling = planted(planted_folder)[0]["spills"]
    assert spilling.stack > 0 and spilling.spills > 0 and spilling.registers <= 32


@pytest.mark.parametrize(
    ("registers", "threads", "blocks"),
    [(80, 384, 2), (81, 384, 1), (80, 256, 3), (81, 256, 2), (80, 192, 4), (81, 192, 3), (40, 384, 4), (255, 256, 1)],
)
def test_a_register_too_many_is_found(registers, threads, blocks):
    assert blocks_by_registers(registers, threads) == blocks


@pytest.mark.parametrize(
    ("shared", "architecture", "blocks"),
    [(36864, "sm_120", 2), (24576, "sm_120", 4), (24577, "sm_120", 3), (36864, "sm_90", 6), (36864, "sm_80", 4)],
)
def test_too_much_shared_memory_is_found(shared, architecture, blocks):
    assert blocks_by_shared_memory(shared, architecture) == blocks
