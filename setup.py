"""Builds the C++ extension. Everything else is in pyproject.toml."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = "2.10"  # also the stable ABI that the extension is built for: see TORCH_TARGET_VERSION

try:
    import torch
    from packaging.version import Version
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    sys.exit(
        f"resnet_fused: the build needs torch>={MINIMUM_TORCH} and packaging ({error}). Run `pip install .` without "
        "--no-build-isolation, or first `pip install torch packaging ninja pybind11 setuptools`."
    )

if Version(torch.__version__).release < Version(MINIMUM_TORCH).release:
    sys.exit(
        f"resnet_fused: the build needs torch>={MINIMUM_TORCH}, found {torch.__version__}. "
        "Run `pip install --upgrade torch`."
    )

compiler = shlex.split(get_cxx_compiler())[0]
if not shutil.which(compiler):
    sys.exit(
        f"resnet_fused: no C++ compiler ({compiler} is not on PATH). Install one (Debian, Ubuntu: `apt-get install g++ "
        "python3-dev`) or set CXX."
    )


def max_jobs() -> int:
    """One compiler per core, but no more than memory holds, at 1 GiB each."""
    try:
        gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    except (ValueError, OSError):
        gibibytes = 4
    return max(1, min(os.cpu_count() or 1, gibibytes))


os.environ.setdefault("MAX_JOBS", str(max_jobs()))
major, minor = (int(part) for part in MINIMUM_TORCH.split("."))

setup(
    ext_modules=[
        CppExtension(
            "resnet_fused._C",
            sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-fopenmp-simd",
                # The order of operations is part of the interface (csrc/cpu/kernels_impl.h).
                "-ffp-contract=off",
                # No float exceptions are read, and errno neither: lets selects and square roots vectorise.
                "-fno-trapping-math",
                "-fno-math-errno",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
