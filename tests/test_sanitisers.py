"""The CPU's kernels and glue, and autograd above them, make no fault of memory, arithmetic or threads."""

import shutil
import sys

import pytest

from . import sanitisers

pytestmark = [
    pytest.mark.expensive,  # some minutes to compile, until a source changes
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="preloads g++'s sanitiser"),
]

SELECTED = {
    "address": "cpu and not cuda and (each_gradient or values_and_gradients or strange or nan or tie or refuse)",
    # Large enough for threads.
    "thread": "cpu and not cuda and ((bit_equal and float32) or resnet18_shapes)",
}


@pytest.mark.parametrize("sanitiser", SELECTED)
def test_the_cpu_passes_under_a_sanitiser(sanitiser):
    files = [f"tests/test_{name}.py" for name in ("ops", "edges", "properties", "max_pool")]
    plugin = "-p", "cpu_sanitised"  # not tests.cpu_sanitised: the package imports resnet_fused
    environment = {"RESNET_FUSED_SANITISER": sanitiser, "PYTHONPATH": str(sanitisers.ROOT / "tests")}
    sanitisers.run(sanitiser, SELECTED[sanitiser], *plugin, *files, **environment)
