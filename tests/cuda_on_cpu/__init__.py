"""The CUDA backend on a CPU: its kernels and glue, unmodified, compiled by g++ against an emulation of CUDA.

:func:`load` builds it, once per flavour and change of the sources, and registers the backend ``cuda-emulated``.
"""

import functools
import os
from pathlib import Path

import torch.utils.cpp_extension

import resnet_fused.backend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BACKEND = "cuda-emulated"
MULTIPROCESSORS = 4  # of the emulated GPU, where a test does not say otherwise
LIBRARY = "resnet_fused_cuda_on_cpu"
SOURCES = (
    ROOT / "csrc/ops.cpp",
    HERE / "glue.cpp",
    HERE / "kernels.cpp",
    HERE / "emulator.cpp",
    HERE / "runtime.cpp",
    HERE / "torch_cuda.cpp",
    HERE / "module.cpp",
)
FLAVOURS = {
    "optimised": ["-O2"],
    "sanitised": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


@functools.cache
def load():
    """The module _cuda_on_cpu, in the flavour that RESNET_FUSED_EMULATION names, optimised by default."""
    flavour = os.environ.get("RESNET_FUSED_EMULATION", "optimised")
    folder = ROOT / "build" / "cuda_on_cpu" / f"{flavour}-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAVOURS[flavour], "-ffp-contract=off", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    # A 64-bit index that is kept in 32 bits would show only past 2^31 elements, which take too long here.
    flags += ["-Wconversion", "-Werror=conversion"]
    defines = ["RESNET_FUSED_CUDA_ON_CPU", "USE_CUDA", f"RESNET_FUSED_LIBRARY={LIBRARY}"]
    defines += ["TORCH_TARGET_VERSION=0x020a000000000000"]
    module = torch.utils.cpp_extension.load(
        "_cuda_on_cpu",
        [str(source) for source in SOURCES],
        extra_include_paths=[str(HERE)],
        extra_cflags=[*flags, *(f"-D{define}" for define in defines)],
        extra_ldflags=["-fsanitize=address,undefined"] if flavour == "sanitised" else [],
        build_directory=str(folder),
        with_cuda=False,
    )
    module.set_multiprocessors(MULTIPROCESSORS)
    resnet_fused.backend.register(BACKEND, LIBRARY, ("cpu",), detail="the CUDA kernels on a CPU")
    return module


def ops():
    return resnet_fused.backend.get(BACKEND).ops


def load_if_named(backend):
    """Load the emulated backend where ``backend`` is its name."""
    if backend == BACKEND:
        load()
