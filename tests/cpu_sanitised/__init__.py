"""The CPU's kernels and glue, unmodified, compiled with sanitisers in the place of ``resnet_fused._C``.

A plugin of pytest, ``-p cpu_sanitised`` with ``tests`` on its path, which builds what RESNET_FUSED_SANITISER names,
once per change of the sources, and loads it before resnet_fused is imported, as ``tests`` does. For the process's
environment see ``tests.sanitisers``.
"""

import os
import sys
from pathlib import Path

import torch.utils.cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), HERE / "parallel.cpp")
# Without UBSan's checks of each access, null, alignment and object-size: they more than double minutes of compiling.
UNDEFINED = "signed-integer-overflow,shift,integer-divide-by-zero,bounds,bool,enum,unreachable,return"
FLAGS = {
    "address": [f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}"],
    "thread": ["-fsanitize=thread"],
}


def load():
    sanitiser = os.environ["RESNET_FUSED_SANITISER"]
    folder = ROOT / "build" / "cpu_sanitised" / f"{sanitiser}-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # As in setup.py, but for the sanitisers and for -O3, which takes them minutes.
    flags = [
        "-O1",
        "-g",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-Wno-psabi",
    ]
    defines = ["TORCH_TARGET_VERSION=0x020a000000000000"]
    defines += [f"{name}=test_{name}" for name in ("torch_parallel_for", "torch_get_num_threads")]
    return torch.utils.cpp_extension.load(
        "_C",
        [str(source) for source in sorted(SOURCES)],
        extra_cflags=[*FLAGS[sanitiser], *flags, *(f"-D{define}" for define in defines)],
        extra_ldflags=FLAGS[sanitiser][:1],
        build_directory=str(folder),
        with_cuda=False,
    )


sys.modules["resnet_fused._C"] = load()
