"""What Triton's compiler makes of the kernels, ahead of time, for each generation of GPUs; no GPU needed.

The launches are those of the real glue, on CPU tensors, recorded instead of run; each is compiled as Triton would at
that launch, and its machine code read.
"""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from resnet_fused.triton_kernels import batch_norm_add_relu as glue
from resnet_fused.triton_kernels import plan as plan_module
from resnet_fused.triton_kernels.plan import make_plan

from . import raw_ops
from .conftest import represented
from .problem import Problem, in_layout
from .sass import bits_of, find, instructions_of_cubins, is_global, loops_of

NVDISASM = find("nvdisasm")  # the triton wheel has one
ARCHITECTURES = (80, 90, 100, 120)
BATCHES = (32, 128)
# Every activation of ResNet-18 for images of 224 and 96: channels and height.
ACTIVATIONS = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7), (64, 48), (64, 24), (128, 12), (256, 6), (512, 3))
HOT = {  # (loads, stores) of whole vectors for each row, by with_residual
    "statistics": {True: (1, 0), "normalized": (1, 0), False: (1, 0)},
    "normalize": {True: (2, 1), "normalized": (2, 1), False: (1, 1)},
    "gradient_sums": {True: (2, 0), "normalized": (3, 0), False: (2, 0)},
    "input_gradient": {True: (2, 2), "normalized": (3, 2), False: (2, 1)},
}
WINDOWS = ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2})

# A tile may lie beyond 2^31 elements. Few of that size run in the tests.
NARROW = re.compile(r"tensor<\d+x\d+x!tt.ptr<\w+>>, tensor<\d+x\d+xi32>")


def _launches(monkeypatch, shape, dtype, layout, with_residual, **windows):
    """(kernel, grid, options, arguments) of a forward and a backward in training."""
    launches = []
    monkeypatch.setattr(glue, "launch", lambda *launch: launches.append(launch))
    x = in_layout(torch.empty(shape, dtype=dtype), layout)
    vector = torch.ones(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    vectors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), vector)
    if with_residual == "normalized":
        vectors |= {f"residual_{name}": vector for name in vectors}
    problem = Problem(
        input=x,
        residual=x if with_residual else None,
        grad_output=in_layout(F.max_pool2d(x, **windows), layout) if windows else x,
        normalizes_residual=with_residual == "normalized",
        options={"training": True},
        windows=windows,
        **vectors,
    )
    raw_ops.backward(glue, problem, raw_ops.forward(glue, problem)())()
    return launches


_code = {}


def _compile(architecture, kernel, grid, options, *arguments):
    """The machine code of the kernel as Triton specialises it for these arguments; many shapes share one."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    key = source.hash(), options.hash(), architecture
    if key not in _code:
        _code[key] = triton.compile(source, target=target, options=options.__dict__).asm
    return _code[key]


def _instructions(architecture, asms):
    """Of each; launches that share a kernel, and a cubin, share a list."""
    cubins = list({asm["cubin"]: None for asm in asms})
    processor = f"SM{architecture}{'a' if architecture >= 90 else ''}"  # as Triton has it
    codes = dict(zip(cubins, instructions_of_cubins(NVDISASM, processor, cubins), strict=True))
    return [codes[asm["cubin"]] for asm in asms]


def _spills(code):
    return [f"{i.operation}: a spill" for i in code if i.is_one_of("LDL", "STL")]


def _faults(code, expected):
    """What is not as it should be: spills, and accesses in the loops over rows of less than 16 bytes."""
    faults = _spills(code)
    loads = stores = 0
    for i in {i for loop in loops_of(code) for i in loop}:
        if not is_global(code[i]):
            continue
        bits, is_load = bits_of(code[i]), code[i].is_one_of("LDG", "LD")
        if bits >= 128:
            loads, stores = loads + is_load, stores + (not is_load)
        elif bits > 16:  # one or two bytes of the mask
            faults.append(f"{code[i].operation}: narrower than 16 bytes")
    if loads == 0 or (loads * expected[1], stores * expected[0]) != (stores * expected[0], loads * expected[1]):
        faults.append(f"{loads} loads and {stores} stores of 16 bytes, not a multiple of {expected}")
    return faults


needs_nvdisasm = pytest.mark.skipif(NVDISASM is None, reason="there is no nvdisasm: it comes with CUDA or triton")


@needs_nvdisasm
@pytest.mark.parametrize("dtype", represented([torch.float32, torch.bfloat16], by=[torch.float32]), ids=str)
@pytest.mark.parametrize("architecture", represented(ARCHITECTURES, by=[90]))
def test_nothing_spills_and_every_row_moves_16_bytes_at_each_access(monkeypatch, architecture, dtype, layout):
    found, hot = {}, {}
    for batch, (channels, height) in itertools.product(BATCHES, ACTIVATIONS):
        for with_residual in (True, "normalized", False) if height == 24 else (True,):
            for launch in _launches(monkeypatch, (batch, channels, height, height), dtype, layout, with_residual):
                name = launch[0].fn.__name__
                asm = _compile(architecture, *launch)
                if name in HOT:
                    hot[name, batch, channels, height, with_residual] = asm
                if narrow := NARROW.findall(asm["ttir"]):
                    found[name, "offsets"] = narrow
                if "ftz" in asm["ptx"]:  # the mask of a subnormal output would be that of zero
                    found[name, "ftz"] = asm["ptx"].count("ftz")
    for key, code in zip(hot, _instructions(architecture, hot.values()), strict=True):
        if faults := _faults(code, HOT[key[0]][key[-1]]):
            found[key] = faults
    assert found == {}


@needs_nvdisasm
@pytest.mark.expensive
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_other_types_compile_without_a_spill(monkeypatch, dtype, layout, with_residual):
    launches = _launches(monkeypatch, (128, 64, 24, 24), dtype, layout, with_residual)
    for code in _instructions(90, [_compile(90, *launch) for launch in launches]):
        assert _spills(code) == []


@needs_nvdisasm
@pytest.mark.parametrize(
    "dtype", represented([torch.float32, torch.bfloat16, torch.float64], by=[torch.float32]), ids=str
)
@pytest.mark.parametrize("architecture", represented(ARCHITECTURES, by=[90]))
@pytest.mark.parametrize("windows", represented(WINDOWS, by=WINDOWS[:1]), ids=str)
def test_pooling_spills_nothing_and_reads_neighbours_together(monkeypatch, architecture, dtype, layout, windows):
    """Of channels 16 bytes at each access, and as many winners; of pixels, which are read apart, one by one."""
    neighbours = 16 // dtype.itemsize if layout == "channels_last" else 1
    launches = _launches(monkeypatch, (32, 64, 24, 24), dtype, layout, False, **windows)
    launches = [launch for launch in launches if launch[0].fn.__name__ in (*HOT,)[1:]]
    asms = [_compile(architecture, *launch) for launch in launches]
    assert [NARROW.findall(asm["ttir"]) for asm in asms] == [[], [], []]
    for launch, code in zip(launches, _instructions(architecture, asms), strict=True):
        name = launch[0].fn.__name__
        assert _spills(code) == [], name
        inside = {i for loop in loops_of(code) for i in loop}
        loads = {bits_of(code[i]) for i in inside if is_global(code[i]) and code[i].is_one_of("LDG", "LD")}
        winners = set() if name == "normalize" else {8 * neighbours}
        assert loads == {8 * dtype.itemsize * neighbours} | winners, name


# ---- The plan ----


@given(
    outer=st.integers(1, 10**7),
    channels=st.integers(1, 5000),
    inner=st.integers(1, 10**6),
    element_size=st.sampled_from([2, 4, 8]),
)
def test_a_plan_covers_the_tensor(outer, channels, inner, element_size):
    plan = make_plan(outer, channels, inner, element_size)
    assert (plan.rows, plan.columns, plan.channels) == (outer, channels * inner, channels)
    assert (plan.tiles - 1) * plan.block_x < plan.columns <= plan.tiles * plan.block_x
    assert (plan.splits - 1) * plan.split_rows < plan.rows <= plan.splits * plan.split_rows
    assert plan.split_rows % plan.block_y == 0
    assert plan.columns % plan.width == 0 and plan.width * element_size <= 16
    assert plan.block_x % 8 == 0 and plan.block_x * plan.block_y * max(element_size, 4) <= plan_module.TILE_BYTES
    assert plan.tile_channels * plan.block_x <= 2**14
    for channel in {0, channels // 2, channels - 1}:
        first, last = channel * inner // plan.block_x, ((channel + 1) * inner - 1) // plan.block_x
        assert (last - first + 1) * plan.splits <= plan.partials
    if inner > 1:
        for tile in {0, plan.tiles // 2, plan.tiles - 1}:
            begin, end = tile * plan.block_x, min((tile + 1) * plan.block_x, plan.columns)
            assert (end - 1) // inner - begin // inner < plan.tile_channels


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("channels", "height"), ACTIVATIONS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_neither_64_channels_nor_3x3_limit_the_programs(batch, channels, height, element_size, layout):
    outer, inner = (batch, height**2) if layout == "contiguous" else (batch * height**2, 1)
    plan = make_plan(outer, channels, inner, element_size)
    assert plan.programs >= plan_module.MINIMUM_PROGRAMS // 2
    assert plan.width * element_size == 16
