"""A part of the suite in a process of its own, under a sanitiser that the libraries in it were compiled with."""

import os
import subprocess
import sys

from .test_build import ROOT

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks; fibers have their own stacks
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
    "OMP_NUM_THREADS": "1",
}


def run(sanitiser, selected, *arguments, **environment):
    """Pytest's process, done; ``selected``: as of -k. What is compiled for a sanitiser needs its library before all."""
    libraries = [LIBRARIES[sanitiser], "libstdc++.so.6"]  # the second, as the first looks for what throws
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in libraries]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    command += ["--capture=sys"]  # what a sanitiser writes before it ends the process is not to be lost
    done = subprocess.run(
        [*command, "-k", selected, *arguments],
        cwd=ROOT,
        env={**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(paths), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
