"""Which backend runs, what happens where it is missing, and what the user is told."""

import asyncio
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import resnet_fused
from resnet_fused import autograd, available_backends, functional, use_backend
from resnet_fused import backend as backend_module
from resnet_fused.ops import Ops

from . import cuda_on_cpu
from .problem import Problem


def _ops_of(call):
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    return {event.key for event in run.key_averages()}


def _call(device="cpu"):
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    return x, functional.batch_norm_relu(x, None, None, training=True)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the package's own backends, to change at will."""
    backends = dict(backend_module._backends)
    backends.pop(cuda_on_cpu.BACKEND, None)
    monkeypatch.setattr(backend_module, "_backends", backends)
    monkeypatch.setattr(backend_module, "_warned", set())
    monkeypatch.setattr(backend_module, "_serving", dict(backend_module._serving))
    return backends


def _python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_public_names_are_there():
    for name in resnet_fused.__all__:
        assert hasattr(resnet_fused, name)
    assert set(resnet_fused.__all__) >= {"Residual", "FusedResidual", "resnet18", "fuse", "unfuse", "use_backend"}


def test_auto_runs_the_fused_op_and_nothing_of_eagers(backend, device):
    with use_backend("auto"):
        ops = _ops_of(lambda: _call(device)[1].sum().backward())
    assert "resnet_fused::batch_norm_add_relu" in ops and "resnet_fused::batch_norm_add_relu_backward" in ops
    assert not ops & {"aten::batch_norm", "aten::native_batch_norm", "aten::relu"}


def test_eager_runs_no_fused_op_and_equals_it():
    problem = Problem.random((6, 10, 5, 5), torch.float64)
    expected = problem.run()
    with use_backend("eager"):
        assert not any(op.startswith("resnet_fused") for op in _ops_of(_call))
        actual = problem.check()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


def test_a_backward_runs_on_its_forwards_backend(backend, device):
    x, output = _call(device)
    with use_backend("eager"):
        ops = _ops_of(lambda: output.sum().backward())
    assert backend_module.get(backend).ops.batch_norm_add_relu_backward.name() in ops


def test_use_backend_nests_and_restores_after_an_error():
    with use_backend("cpu"):
        with pytest.raises(KeyError), use_backend("eager"):
            assert backend_module.select("cpu").name == "eager"
            raise KeyError
        assert backend_module.select("cpu").name == "cpu"


def test_blocks_of_use_backend_may_be_left_in_any_order():
    blocks = [use_backend(name) for name in ("cpu", "eager", "cpu")]
    for block in blocks:
        block.__enter__()
    names = []
    for left in (0, 2, 1):
        blocks[left].__exit__(None, None, None)
        names.append(backend_module.select("cpu").name)
    assert names == ["cpu", "eager", "cpu"]  # the third's, the second's, the process's


def test_each_thread_has_the_backend_that_it_uses():
    barrier = threading.Barrier(2)

    def chosen(name):
        with use_backend(name):
            barrier.wait(60)  # both are in their blocks
            return backend_module.select("cpu").name

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(chosen, ("cpu", "eager"))) == ["cpu", "eager"]


def test_each_asyncio_task_has_the_backend_that_it_uses():
    async def chosen(name):
        with use_backend(name):
            await asyncio.sleep(0)  # the other task enters, or leaves, its block
            return backend_module.select("cpu").name

    async def both():
        return await asyncio.gather(chosen("cpu"), chosen("eager"))

    assert asyncio.run(both()) == ["cpu", "eager"]


def test_an_unknown_backend_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="backend: expected one of .*'cpu'.*got 'tpu'"), use_backend("tpu"):
        pass


def test_a_backend_asked_for_by_name_refuses_another_device():
    x = torch.empty(4, 3, 5, 5, device="meta")
    refused = pytest.raises(backend_module.UnservedDevice, match="'cpu' serves inputs on cpu, got one on meta")
    with use_backend("cpu"), refused:
        functional.batch_norm_relu(x, None, None, training=True)


def test_a_missing_backend_is_named_with_cause_and_fix(registry):
    backend_module.register("cpu", "resnet_fused", ("cpu",), unavailable="not built; build it with make")
    assert "cpu" not in available_backends()
    with pytest.raises(ValueError, match="'cpu' is not available: not built; build it with make"), use_backend("cpu"):
        pass


def test_auto_falls_back_to_eager_with_one_warning(registry):
    backend_module.register("cpu", "resnet_fused", ("cpu",), unavailable="not built; build it with make")
    with pytest.warns(UserWarning, match="runs plain PyTorch operators .*not built; build it with make"):
        _call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])
def test_an_op_may_refuse_by_any_error_and_other_errors_are_raised(error):
    """C++ refuses by RuntimeError, Triton's glue by what it means."""

    class Ops:
        spans_processes = False

        def forward(self, *arguments, **options):
            raise error("no")

    norm = functional.BatchNorm(torch.zeros(3), torch.ones(3), num_batches_tracked=torch.tensor(3.0))
    x = torch.randn(4, 3, 5, 5)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            assert autograd.attempt(Ops(), x, None, norm, None, True) is None
            with pytest.raises(error, match="no"):
                autograd.attempt(Ops(), x, None, norm._replace(num_batches_tracked=None), None, True)


def test_the_package_may_be_imported_a_second_time_in_one_process():
    code = """
import sys, torch, resnet_fused
for name in [name for name in sys.modules if name.startswith("resnet_fused")]:
    del sys.modules[name]
import resnet_fused as again
assert again is not resnet_fused
print(again.functional.batch_norm_relu(torch.ones(4, 3), None, None, training=True).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0.0", done.stderr


def test_a_further_backend_joins_by_register(registry):
    backend_module.register("cpu-again", "resnet_fused", ("cpu",))
    assert "cpu-again" in available_backends()
    with use_backend("cpu-again"):
        Problem.random((6, 10, 5, 5)).check()


def test_the_ops_in_triton_have_the_schemas_of_those_in_cpp():
    for name in Ops._fields:
        in_cpp, in_triton = (
            str(getattr(getattr(torch.ops, namespace), name).default._schema).partition("::")[2]
            for namespace in ("resnet_fused", "resnet_fused_triton")
        )
        assert in_triton == in_cpp


def test_auto_takes_triton_for_gpus_where_cuda_is_not_built(registry):
    backend_module.register("cuda", "resnet_fused", ("cuda",), unavailable="not built")
    assert backend_module.select("cuda").name == "triton"
    assert backend_module.select("cpu").name == "cpu"


def test_triton_where_it_is_not_installed_is_named_with_the_fix():
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest); "
        "from resnet_fused import __main__ as m; print(m.report())"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "triton not available: the package triton" in done.stdout and "`pip install triton`" in done.stdout


def test_the_environment_chooses_the_backend():
    code = "import resnet_fused.backend as b; print(b.select('cpu').name)"
    assert _python("-c", code, RESNET_FUSED_BACKEND="eager").stdout.strip() == "eager"
    assert _python("-c", code, RESNET_FUSED_BACKEND="auto").stdout.strip() == "cpu"
    refused = _python("-c", code, RESNET_FUSED_BACKEND="tpu")
    assert refused.returncode != 0 and "got 'tpu'" in refused.stderr


def test_the_module_says_what_there_is():
    done = _python("-m", "resnet_fused")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "cpu    C++, instruction set" in done.stdout


def test_without_the_extension_it_imports_and_says_why():
    code = (
        "import sys; sys.modules['resnet_fused._C'] = None; from resnet_fused import __main__ as m; print(m.report())"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "not available: the C++ extension resnet_fused._C was not built" in done.stdout
    assert "pip install" in done.stdout


# The build's errors ---------------------------------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _setup(stand_in="", **environment):
    """setup.py's message, with Python code run before it in place of what the machine lacks."""
    code = f"import sys; sys.argv = ['setup.py', '--version']\n{stand_in}\nexec(open('setup.py').read())"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_missing_compiler_is_named_with_the_fix():
    done = _setup(CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler (no-such-compiler is not on PATH)" in done.stderr and "apt-get install g++" in done.stderr


def test_a_too_old_torch_is_named_with_the_fix():
    done = _setup("import torch; torch.__version__ = '2.9.1'")
    assert done.returncode != 0
    assert "needs torch>=2.10, found 2.9.1" in done.stderr and "pip install --upgrade torch" in done.stderr


def test_a_build_without_torch_is_told_what_to_install():
    done = _setup("sys.modules['torch'] = None")
    assert done.returncode != 0
    assert "the build needs torch>=2.10" in done.stderr and "--no-build-isolation" in done.stderr
