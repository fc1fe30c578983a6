"""Builds the C++ extension and, where nvcc is found and torch is a CUDA build, the CUDA one, GPU or no GPU.

FORCE_CUDA=1 demands the CUDA extension, FORCE_CUDA=0 leaves it out. RESNET_FUSED_NO_EXTENSION=1 builds nothing: Triton
and eager work without. Everything else is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import setuptools

MINIMUM_SETUPTOOLS = 77  # the first that takes the license of pyproject.toml; as there, in [build-system]
MINIMUM_TORCH = "2.10"  # also the stable ABI that the extensions are built for: see TORCH_TARGET_VERSION
FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
NO_EXTENSION = os.environ.get("RESNET_FUSED_NO_EXTENSION", "")


def output_of(*command: str) -> str:
    # As paths are decoded, and not as text: any locale must do for any path.
    return os.fsdecode(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout)


def find_nvcc() -> str | None:
    """The nvcc that torch will call, looked for as torch does. Tells torch, by CUDA_HOME, where its toolkit is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if not nvcc:
            return None
        # Not nvcc's grandparent, which torch would take: nvcc may be a script that calls the one in the toolkit.
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
        home = os.path.realpath(top[1].strip()) if top else os.path.dirname(os.path.dirname(nvcc))
        os.environ["CUDA_HOME"] = home
    return shutil.which(os.path.join(home, "bin", "nvcc"))


def check_tools() -> None:
    """Exit where torch, or a compiler, is missing or too old."""
    try:
        import torch
        from packaging.version import Version
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        sys.exit(
            f"resnet_fused: the build needs torch>={MINIMUM_TORCH} and packaging ({error}). Run `pip install .` "
            "without --no-build-isolation, or first `pip install torch packaging ninja pybind11 "
            f'"setuptools>={MINIMUM_SETUPTOOLS}"`.'
        )
    if Version(torch.__version__).release < Version(MINIMUM_TORCH).release:
        sys.exit(
            f"resnet_fused: the build needs torch>={MINIMUM_TORCH}, found {torch.__version__}. "
            "Run `pip install --upgrade torch`."
        )
    compiler = shlex.split(get_cxx_compiler())[0]
    if not shutil.which(compiler):
        sys.exit(
            f"resnet_fused: no C++ compiler ({compiler} is not on PATH). Install one (Debian, Ubuntu: `apt-get install "
            "g++ python3-dev`) or set CXX; or RESNET_FUSED_NO_EXTENSION=1, for Triton on GPUs and nothing to compile."
        )


def builds_cuda(nvcc: str | None) -> bool:
    """Whether to build the CUDA extension; exits where FORCE_CUDA=1 asks for what is missing, or toolkits differ."""
    if FORCE_CUDA == "0":
        return False
    import torch

    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA: install a CUDA build of it first"
    elif nvcc is None:
        missing = (
            "there is no nvcc (in CUDA_HOME or, where that is unset, on PATH or in /usr/local/cuda): install the CUDA "
            f"toolkit {torch.version.cuda}, or set CUDA_HOME to it"
        )
    if missing and FORCE_CUDA == "1":
        sys.exit(f"resnet_fused: FORCE_CUDA=1, but {missing}.")
    if missing:
        print(f"resnet_fused: builds without CUDA, as {missing}.", file=sys.stderr)
        return False
    version = re.search(r"release (\d+)(\.\d+)", output_of(nvcc, "--version"))
    if version and version[1] != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"resnet_fused: nvcc is of CUDA {version[1]}{version[2]}, torch {torch.__version__} of CUDA "
            f"{torch.version.cuda}: the major versions must be the same ({nvcc}). Set CUDA_HOME to a toolkit of CUDA "
            f"{torch.version.cuda}, or install a torch for nvcc's CUDA and build with --no-build-isolation; "
            "FORCE_CUDA=0 builds without CUDA."
        )
    return True


def cuda_architectures(nvcc: str) -> str:
    """Of those that nvcc knows, one a generation, as it serves all of it; PTX for those in between and to come."""
    wanted = {"75": "7.5", "80": "8.0", "90": "9.0+PTX", "100": "10.0", "120": "12.0"}
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    return ";".join(wanted[name] for name in sorted(known, key=int) if name in wanted)


def content(path: Path) -> str:
    return os.fsdecode(path.read_bytes()) if path.is_file() else ""


def memory_limits(root: str) -> Iterator[int]:
    """Bytes that the control groups of this process, those of its container, say, may use."""
    for line in content(Path(root, "proc/self/cgroup")).splitlines():
        _, controller, group = line.split(":", 2)  # version 2 names no controller, and has no folder for it
        name = "memory.limit_in_bytes" if controller else "memory.max"
        folder = Path(root, "sys/fs/cgroup", controller, group.lstrip("/"))
        # Those around it limit it, too; and a container may find its own group at the root, not under the name it has.
        for limit in (content(around / name).strip() for around in (folder, *folder.parents)):
            if limit.isdigit():  # not "max"
                yield int(limit)


def max_jobs(root: str = "/") -> int:
    """One compiler per core that this process may use, but no more than its memory holds, at 1 GiB each.

    As measured g++ takes 0.3, nvcc 0.2 a thread, both at once at worst, and this process, with torch, 0.5.
    """
    memory = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits(root)])
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**30))


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def build() -> tuple[list, dict]:
    """The extensions, and the command that builds them."""
    nvcc = None if FORCE_CUDA == "0" else find_nvcc()  # before the import, at which torch reads CUDA_HOME
    check_tools()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self):
            def object_filenames(sources, strip_dir=False, output_dir=""):
                # By default a .cpp and a .cu of one name share one object file, and one of them is lost.
                return [os.path.join(output_dir, f"{source}.o") for source in sources]

            self.compiler.object_filenames = object_filenames
            super().build_extensions()

    os.environ.setdefault("MAX_JOBS", str(max_jobs()))
    major, minor = (int(part) for part in MINIMUM_TORCH.split("."))
    target = ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")
    flags = ["-std=c++17", "-O3"]
    # After whatever CFLAGS says: fast math breaks the rules of NaN, and, linked, flushes the process's subnormals.
    # And errors are not to tell the builder's path.
    strict = ["-fno-fast-math"]
    # Python's own flags have -g: 13 of 16 MB. The names of functions, which profilers read, stay.
    link_flags = [*strict, "-Wl,--strip-debug"]
    cxx_flags = [*flags, *strict, "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/="]
    extensions = [
        CppExtension(
            "resnet_fused._C",
            files("*.cpp", "cpu/*.cpp"),
            depends=files("**/*.*"),  # a source distribution holds them, CUDA's too, wherever it was made
            define_macros=[target],
            extra_compile_args=[
                *cxx_flags,
                # Of ISO's standards GCC takes none. No two kernels have to compute the same bits.
                "-ffp-contract=fast",
                # Vectors are passed to inlined functions alone; GCC 12's own intrinsics begin undefined.
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                # No float exceptions are read, and errno neither: lets selects and square roots vectorise.
                "-fno-trapping-math",
                "-fno-math-errno",
            ],
            extra_link_args=link_flags,
        )
    ]
    if builds_cuda(nvcc):
        # Without a list torch asks the GPU of this machine, and fails where there is none.
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_architectures(nvcc)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        extensions.append(
            CUDAExtension(
                "resnet_fused._CUDA",
                files("cuda/*.cpp", "cuda/*.cu"),
                depends=files("*.h", "cuda/*.*"),
                # USE_CUDA: for the current stream, in the stable ABI's headers.
                define_macros=[target, ("USE_CUDA", None), ("RESNET_FUSED_CUDA_ARCHITECTURES", f'"{architectures}"')],
                extra_compile_args={
                    "cxx": cxx_flags,
                    "nvcc": [*flags, "-Xcompiler", "-fvisibility=hidden", "--threads", os.environ["MAX_JOBS"]],
                },
                extra_link_args=link_flags,
            )
        )
    return extensions, {"build_ext": Build}


for name, value in (("FORCE_CUDA", FORCE_CUDA), ("RESNET_FUSED_NO_EXTENSION", NO_EXTENSION)):
    if value not in ("", "0", "1"):
        sys.exit(f"resnet_fused: {name}: expected 0, 1 or nothing, got {value!r}.")
if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:  # it would only say that the license is invalid
    sys.exit(
        f"resnet_fused: the build needs setuptools>={MINIMUM_SETUPTOOLS}, found {setuptools.__version__}. Run `pip "
        "install --upgrade setuptools`, or `pip install .` without --no-build-isolation."
    )
extensions, commands = ([], {}) if NO_EXTENSION == "1" else build()
setuptools.setup(ext_modules=extensions, cmdclass=commands)
