"""Where somebody watches, a compiler, an exporter, a tracer, a transform, a mode, PyTorch's own operators run."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import FusedResidual, Residual, functional, unfused, use_backend

from .conftest import represented
from .models import assert_equal, assert_same_buffers, make_block, make_input, prepared, twins


class Functional(nn.Module):
    """A residual block's tail and its first half by the public functions."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, X):
        bn = self.bn
        norm = functional.BatchNorm(bn.running_mean, bn.running_var, bn.weight, bias=bn.bias)
        options = {"training": self.training, "num_batches_tracked": bn.num_batches_tracked}
        Y = functional.batch_norm_relu(X, *norm[:4], **options)
        Y = functional.batch_norm_add_relu(Y, X, *norm[:4], **options)
        other = functional.BatchNorm(bn.running_mean * 1, bn.running_var * 1)
        return functional.batch_norm_add_batch_norm_relu(Y, X, norm, other, self.training)


class PlainFunctional(Functional):
    def forward(self, X):
        with use_backend("eager"):
            return super().forward(X)


def _blocks():
    """By kind, (a plain model, a fused one)."""
    plain = prepared(Residual(6, 6, use_1x1conv=True))
    by_hand = copy.deepcopy(plain)
    by_hand.__class__ = FusedResidual
    yield "FusedResidual", lambda: (copy.deepcopy(plain), copy.deepcopy(by_hand))
    yield "fuse", lambda: twins(make_block())
    functions = prepared(PlainFunctional())
    by_functions = prepared(Functional())
    by_functions.load_state_dict(functions.state_dict())
    yield "functional", lambda: (copy.deepcopy(functions), copy.deepcopy(by_functions))


KINDS = dict(_blocks())


@pytest.fixture(params=KINDS)
def pair(request):
    return KINDS[request.param]()


def gradients(model, X, call=None):
    X = X.clone().requires_grad_()
    Y = (model if call is None else call)(X)
    return Y, *torch.autograd.grad(Y.square().sum(), (X, *model.parameters()), allow_unused=True)


def assert_same(plain, fused, actual, expected, tolerance=1e-9):
    for value, other in zip(actual, expected, strict=True):
        assert (value is None) is (other is None)
        if value is not None:
            assert_equal(value, other, tolerance)
    assert_same_buffers(fused, plain)


@pytest.mark.parametrize("backend", represented(["aot_eager", "inductor"], by=["aot_eager"]))
def test_a_compiled_model_is_one_graph_and_equals_eager(pair, backend, calls):
    torch._dynamo.reset()
    plain, fused = pair
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    calls.clear()
    for training in (True, False):
        for _ in range(2):
            expected = gradients(plain.train(training), make_input(3))
            actual = gradients(fused.train(training), make_input(3), compiled)
            assert_same(plain, fused, actual, expected)
        with torch.no_grad():
            assert_equal(compiled(make_input(3)), plain(make_input(3)))
    assert counter.frame_count == 4 and calls == []  # by mode, and with or without gradients


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_runs_and_names_no_operator_of_ours(pair, strict):
    plain, fused = pair
    program = torch.export.export(fused.eval(), (make_input(),), strict=strict)
    assert "resnet_fused" not in str(program.graph)
    assert_equal(program.module()(make_input(1)), plain.eval()(make_input(1)))
    module = torch.export.export(fused.train(), (make_input(),), strict=strict).module()
    for model in (module, plain.train()):
        model(make_input(2)).sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_equal(module.get_parameter(name).grad, parameter.grad, 1e-9, name)


@pytest.mark.expensive
def test_aot_inductor(pair, tmp_path):
    plain, fused = pair
    program = torch.export.export(fused.eval(), (make_input(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_equal(torch._inductor.aoti_load_package(package)(make_input(1)), plain.eval()(make_input(1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_other_tracers(pair):
    plain, fused = (model.eval() for model in pair)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(fused, make_input()), saved)
    saved.seek(0)
    traced = {"jit": torch.jit.load(saved), "make_fx": make_fx(fused)(make_input())}
    if not isinstance(plain, Functional):
        traced["fx"] = fx.symbolic_trace(fused)
    for graph in traced.values():
        assert_equal(graph(make_input(1)), plain(make_input(1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_inside_unfused_it_is_scripted_and_exported_to_onnx():
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    plain, fused = (model.eval() for model in twins(make_block()))
    exported, X = torch.onnx.export(fused, (make_input(),), dynamo=True).model_proto, make_input(1)
    (actual,) = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: X.numpy()})
    assert_equal(torch.from_numpy(actual), plain(X).detach(), 1e-9)
    with unfused(fused):
        assert_equal(torch.jit.script(fused)(X), plain(X))


def _loss_of(model):
    def loss(parameters, X):
        buffers = {
            name: buffer.clone() for name, buffer in model.named_buffers()
        }  # torch.func refuses writes to others
        return torch.func.functional_call(model, (parameters, buffers), (X,)).square().sum()

    return loss, {name: parameter.detach() for name, parameter in model.named_parameters()}


def _grad(loss, parameters, X):
    return torch.func.grad(loss, argnums=1)(parameters, X)


def _second(loss, parameters, X):
    inner = torch.func.grad(loss, argnums=1)
    return torch.func.grad(lambda X: inner(parameters, X).square().sum())(X)


def _jvp(loss, parameters, X):
    return torch.func.jvp(functools.partial(loss, parameters), (X,), (make_input(5),))[1]


def _vmap(loss, parameters, X):
    return torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(parameters, torch.stack([X, X * 2]))


def _jacrev(loss, parameters, X):
    return torch.func.jacrev(loss)(parameters, X)["bn1.weight" if "bn1.weight" in parameters else "bn.weight"]


def _functionalized(loss, parameters, X):
    return torch.func.functionalize(loss)(parameters, X)


@pytest.mark.parametrize("transform", [_grad, _second, _jvp, _vmap, _jacrev, _functionalized], ids=lambda f: f.__name__)
def test_transforms(pair, transform):
    results = [transform(*_loss_of(model.eval()), make_input(1)) for model in pair]
    assert_equal(*results, 1e-9)
    if transform is not _vmap:  # in training PyTorch's own batch norm refuses it
        results = [transform(*_loss_of(model.train()), make_input(1)) for model in pair]
        assert_equal(*results, 1e-8)


def test_forward_mode(pair):
    results = []
    for model in pair:
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(model(forward_ad.make_dual(make_input(), make_input(1)))).tangent)
    assert_equal(*results, 1e-9)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_modes_see_pytorchs_operators(pair):
    counted = []
    for model in pair:
        with Counting() as mode, FlopCounterMode(display=False) as flops:
            model(make_input())
        assert not any("resnet_fused" in name for name in mode.seen)
        counted.append(flops.get_total_flops())
        with Asked() as mode:
            model(make_input())
        assert {F.batch_norm, F.relu} & {*mode.seen} and not any("resnet_fused" in str(seen) for seen in mode.seen)
    assert counted[0] == counted[1]
    assert_same_buffers(pair[1], pair[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [model(mode.from_tensor(make_input())) for model in pair]
    assert fakes[0].shape == fakes[1].shape and fakes[0].stride() == fakes[1].stride()


def test_a_default_device_is_no_watcher(pair, calls):
    _, fused = pair
    calls.clear()
    with torch.device("cpu"):
        fused(make_input())
    assert calls or isinstance(fused, Functional)


def test_selective_checkpointing(pair):
    plain, fused = pair
    policy = lambda context, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE  # noqa: E731
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    results = []
    for model in pair:
        call = functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
        results.append(gradients(model, make_input(1), call))
    assert_same(plain, fused, *results)


def test_cond(pair):
    plain, fused = (model.eval() for model in pair)

    def either(X):
        return torch.cond(X.sum() > 0, fused, lambda X: X * 1, (X,))

    for X in (make_input().abs(), -make_input().abs()):
        assert_equal(torch.compile(either, backend="eager")(X), plain(X) if X.sum() > 0 else X)


def test_subclasses_of_tensor(pair):
    class Logged(torch.Tensor):
        pass

    plain, fused = (model.eval() for model in pair)
    Y = fused(make_input().as_subclass(Logged))
    assert type(Y) is Logged
    assert_equal(Y.as_subclass(torch.Tensor), plain(make_input()))


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="DTensor knows no batch norm")
def test_distributed_tensors(pair, tmp_path):
    plain, fused = (model.eval() for model in pair)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        replicated = copy.deepcopy(fused)
        for module in replicated.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(DTensor.from_local(parameter.detach(), mesh, [Replicate()])))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, DTensor.from_local(buffer, mesh, [Replicate()]))
        Y = replicated(DTensor.from_local(make_input(), mesh, [Replicate()]))
        assert_equal(Y.to_local(), plain(make_input()))
    finally:
        torch.distributed.destroy_process_group()


def test_a_residual_of_a_subclass_is_asked_about_the_sum():
    asked = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    X, residual = torch.randn(2, 3, 6, 5, 7)
    functional.batch_norm_add_relu(X, residual.as_subclass(Logged), torch.zeros(6), torch.ones(6))
    assert torch.Tensor.add_ in asked


def test_what_is_watched_may_enter_a_compiled_function():
    plain, fused = twins(nn.BatchNorm2d(6).double(), learns=False)
    compiled = torch.compile(lambda Y: F.relu(Y * 2), fullgraph=True, backend="eager")
    for _ in range(3):
        assert_equal(compiled(fused(make_input())), compiled(plain(make_input())))
    assert_same_buffers(fused, plain)
