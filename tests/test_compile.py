"""torch.compile, torch.export, torch.func and fake tensors do with the fused operators what eager does."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from resnet_fused import FusedResidual, functional, reference, use_backend

from .problem import Problem, in_layout
from .tolerances import assert_close


def _block(device, **kwargs):
    return FusedResidual(8, 8, **kwargs).to(device, torch.float64)


def _images(device, batch_size=4):
    return torch.randn(batch_size, 8, 6, 6, dtype=torch.float64, device=device)


def _assert_equal_states(actual, expected, dtype=torch.float64, scale=1e2):
    for (name, value), other in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert_close(value, other, dtype, scale, name)


@pytest.mark.parametrize(
    ("dtype", "layout", "momentum", "batch_sizes"),
    [
        (torch.float64, "contiguous", 0.1, (4, 4, 4)),
        (torch.float32, "channels_last", None, (4, 4, 4)),
        (torch.float64, "contiguous", 0.1, (4, 6, 5)),
    ],
    ids=["float64", "float32-channels_last-cumulative", "dynamic-batch"],
)
def test_three_training_steps_with_inductor_equal_eager(device, dtype, layout, momentum, batch_sizes):
    """One graph, compiled once; losses, parameters, running statistics and counters equal eager's after each step."""
    # 8 channels: with fewer than 6, oneDNN's gradient of a strided 1x1 convolution in channels_last is garbage.
    blocks = FusedResidual(8, 8), FusedResidual(8, 16, use_1x1conv=True, strides=2)
    eager = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).to(device, dtype)
    for block in blocks:
        block.bn1.momentum = block.bn2.momentum = momentum
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) for m in (eager, model)]
    for batch_size in batch_sizes:
        images = in_layout(_images(device, batch_size).to(dtype), layout)
        if len(set(batch_sizes)) > 1:
            torch._dynamo.mark_dynamic(images, 0)
        target = torch.randn(batch_size, 3, dtype=dtype, device=device)
        losses = [nn.functional.mse_loss(m(images), target) for m in (eager, compiled)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_close(losses[1], losses[0], dtype, 1e2, "loss")
        _assert_equal_states(model, eager, dtype)
    assert counter.frame_count == 1


def test_the_functions_compiled_with_inductor_equal_eager(device, training):
    """All, in one graph; compiled functions of tensors, not modules: the statistics are arguments."""

    def all_of_them(x, residual, weight, bias, residual_weight, residual_bias, *statistics):
        running_mean, running_var, counter, *of_residual = statistics
        options = {"training": training, "num_batches_tracked": counter}
        y = functional.batch_norm_add_relu(x, residual, running_mean, running_var, weight, bias, **options)
        z = functional.batch_norm_relu(y - 0.5, running_mean, running_var, weight, bias, **options)
        batch_norms = (
            functional.BatchNorm(running_mean, running_var, weight, bias, num_batches_tracked=counter),
            functional.BatchNorm(*of_residual[:2], residual_weight, residual_bias, None, 0.1, of_residual[2]),
        )
        return y, z, functional.batch_norm_add_batch_norm_relu(y, residual, *batch_norms, training)

    problem = Problem.random((6, 8, 5, 5), torch.float64, device=device, residual="normalized")
    names = ("input", "residual", "weight", "bias", "residual_weight", "residual_bias")
    results = []
    for function in (all_of_them, torch.compile(all_of_them, fullgraph=True)):
        leaves = [getattr(problem, name).clone().requires_grad_() for name in names]
        statistics = [getattr(problem, name).clone() for name in Problem.RUNNING]
        for at, count in ((2, 3), (5, 7)):
            statistics.insert(at, torch.tensor(count, device=device))
        outputs = function(*leaves, *statistics)
        grads = torch.autograd.grad(outputs, leaves, [problem.grad_output] * 3)
        results.append([*outputs, *grads, *statistics])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)


def test_a_tail_compiled_to_reduce_overhead_equals_eager(device, training):
    """In training with gradients, in eval without."""
    problem = Problem.random((6, 8, 5, 5), torch.float64, device=device, training=training)
    tail = torch.compile(functional.batch_norm_add_relu, mode="reduce-overhead", fullgraph=True)
    results = []
    for function in (functional.batch_norm_add_relu, tail):
        leaves = [getattr(problem, name).clone().requires_grad_(training) for name in ("input", "residual", "weight")]
        statistics = problem.running_mean.clone(), problem.running_var.clone()
        for _ in range(3):  # the first two warm up
            output = function(*leaves[:2], *statistics, leaves[2], problem.bias, training)
        grads = torch.autograd.grad(output, leaves, problem.grad_output) if training else []
        results.append([output, *grads, *statistics])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)


def test_a_compiled_block_follows_modes_and_backend(device):
    """A stale graph would go on with what it was compiled for."""
    torch._dynamo.reset()  # the recompilations of other backends count, too
    eager, x = _block(device), _images(device)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    changes = [
        lambda block: block.train(),
        lambda block: block.bn1.eval(),
        lambda block: block.eval(),
        lambda block: setattr(block.bn2, "eps", 0.5),
        lambda block: block.bn2.requires_grad_(False),
    ]
    for change in changes:
        change(eager), change(model)
        y, z = eager(x), compiled(x)
        y.sum().backward(), z.sum().backward()
        assert_close(z, y, torch.float64)
        _assert_equal_states(model, eager)
        for parameter, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert_close(parameter.grad, other.grad, torch.float64, 1e2)
    graphs = counter.frame_count
    with use_backend("eager"):
        assert_close(compiled(x), eager(x), torch.float64)
    assert counter.frame_count == graphs + 1


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_compiled_caller_may_catch_a_refusal_and_run_eager(device, needs_grad):
    """Of a counter that is no int64: in one graph, and counted once."""

    def caught(x, counter):
        try:
            return functional.batch_norm_relu(x, None, None, training=True, num_batches_tracked=counter)
        except (TypeError, ValueError):
            return reference.batch_norm_relu(x, None, None, training=True, num_batches_tracked=counter)

    x, counter = _images(device).requires_grad_(needs_grad), torch.tensor(3.0, device=device)
    output = torch.compile(caught, backend="aot_eager", fullgraph=True)(x, counter)
    assert_close(output, torch.relu(nn.functional.batch_norm(x, None, None, training=True)), torch.float64)
    assert counter == 4


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_block_equals_eager(device, training, strict):
    """Of any batch size, and with the updates of its running statistics."""
    block = _block(device).train(training)
    before = copy.deepcopy(block)
    batch_size = torch.export.Dim("batch_size", min=2)
    program = torch.export.export(block, (_images(device),), dynamic_shapes=({0: batch_size},), strict=strict)
    for (name, value), other in zip(block.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other), f"export changed {name}"
    exported, x = program.module(), _images(device, 7)
    with torch.no_grad():
        for _ in range(2):
            assert_close(exported(x), block(x), torch.float64)
    for name, value in exported.state_dict().items():
        assert_close(value, block.state_dict()[name], torch.float64, name=name)


def test_a_package_of_aotinductor_equals_eager(device):
    class Tails(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.residual_bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x, residual):
            bn, of_residual = (
                functional.BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias)
                for bn in (self.bn, self.residual_bn)
            )
            y = functional.batch_norm_add_relu(functional.batch_norm_relu(x, *bn[:4]), residual, *bn[:4])
            return functional.batch_norm_add_batch_norm_relu(y, residual, bn, of_residual)

    tails, x, residual = Tails().to(device, torch.float64).eval(), _images(device), _images(device)
    program = torch.export.export(tails, (x, residual))
    compiled = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
    assert_close(compiled(residual, x), tails(residual, x), torch.float64)


def test_a_traced_block_is_saved_and_loaded(device):
    """torch.jit.trace records eager's operators: TorchScript refuses to save a Python function."""
    block, x = _block(device).eval(), _images(device)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(block, x), saved)
    saved.seek(0)
    assert_close(torch.jit.load(saved)(x[:3]), block(x[:3]), torch.float64)


def _loss_of(block, grad_output):
    """The loss as a function of (parameters, X), and the parameters."""
    buffers = dict(block.named_buffers())

    def loss(parameters, x):
        return (torch.func.functional_call(block, (parameters, buffers), (x,)) * grad_output).sum()

    return loss, {name: parameter.detach() for name, parameter in block.named_parameters()}


def test_torch_func_grad_through_functional_call_equals_autograd(device, training):
    block, x, grad_output = _block(device).train(training), _images(device), _images(device)
    loss, parameters = _loss_of(block, grad_output)
    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    expected = torch.autograd.grad(block(x), [*block.parameters(), x], grad_output)
    for name, actual, other in zip([*grads, "X"], [*grads.values(), grad_x], expected, strict=True):
        assert_close(actual, other, torch.float64, name=name)


def test_torch_func_second_derivatives_equal_autograds(device):
    block, x, grad_output, direction = _block(device), *(_images(device) for _ in range(3))
    loss, parameters = _loss_of(block, grad_output)
    grad = torch.func.grad(loss, argnums=1)
    actual = torch.func.grad(lambda x: (grad(parameters, x) * direction).sum())(x)
    with use_backend("eager"):
        x.requires_grad_()
        (first,) = torch.autograd.grad(block(x), x, grad_output, create_graph=True)
        (expected,) = torch.autograd.grad(first, x, direction)
    assert expected.abs().max() > 1e-3  # batch statistics curve the loss
    assert_close(actual, expected, torch.float64, 1e2)


def test_vmap_and_forward_mode_are_refused(device):
    block, x = _block(device), _images(device)
    with pytest.raises(RuntimeError, match="vmap over BatchNormReLU"):
        torch.func.vmap(block)(x.expand(2, *x.shape))
    with pytest.raises(NotImplementedError, match="implement the jvp"):
        torch.func.jvp(block, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="implement the jvp"):
        block(torch.autograd.forward_ad.make_dual(x, x))


def _layouts():
    """Tensors whose memory format is not plain from their strides, or is unusual."""
    for shape in ((2, 8, 8, 1), (4, 1, 9, 9), (4, 9, 1, 1)):
        yield f"{shape}", torch.randn(shape)
        yield f"{shape}-channels_last", torch.randn(shape).to(memory_format=torch.channels_last)
    image = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    yield "channels_last", image
    yield "channels_last-one-image", image[:1]
    yield "channels_last-some-channels", image[:, 1:4]
    yield "channels_last-one-channel", image[:, :1]
    yield "channels_last-every-second-row", image[:, :, ::2]
    yield "permuted", torch.randn(5, 2, 7, 6).permute(1, 0, 3, 2)
    yield "sliced", torch.randn(2, 5, 6, 7)[:, 1:4, :, 2:5]
    yield "expanded", torch.randn(2, 5, 1, 1).expand(2, 5, 3, 3)
    yield "empty", torch.randn(0, 5, 6, 7)
    yield "(N, C)", torch.randn(5, 6).t()
    yield "(N, C, L)", torch.randn(2, 6, 5).transpose(1, 2)
    yield "channels_last_3d", torch.randn(2, 5, 3, 4, 6).contiguous(memory_format=torch.channels_last_3d)


def _outputs_and_gradients(x, residual, vectors):
    x, residual = (tensor.detach().requires_grad_() for tensor in (x, residual))
    y = functional.batch_norm_add_relu(x, residual, *vectors, training=True)
    z = functional.batch_norm_relu(x, *vectors, training=True)
    batch_norms = (functional.BatchNorm(*(v.clone() for v in vectors)) for _ in range(2))
    w = functional.batch_norm_add_batch_norm_relu(x, residual, *batch_norms, training=True)
    grad_x, grad_residual = torch.autograd.grad(w, (x, residual), torch.ones_like(w))
    return {
        "add_batch_norm_relu": w,
        "add_batch_norm_relu, grad_x": grad_x,
        "add_batch_norm_relu, grad_residual": grad_residual,
        "add_relu": y,
        "relu": z,
        "grad_input": torch.autograd.grad(z, x, torch.ones_like(z))[0],
        **dict(
            zip(("grad_x", "grad_residual"), torch.autograd.grad(y, (x, residual), torch.ones_like(y)), strict=True)
        ),
    }


@pytest.mark.parametrize("x", [pytest.param(tensor, id=name) for name, tensor in _layouts()])
def test_fake_tensors_have_the_strides_of_real_ones(device, x):
    tensors = (
        x.to(device),
        torch.randn(x.shape, device=device),
        [torch.ones(x.shape[1], device=device) for _ in range(4)],
    )
    real = _outputs_and_gradients(*tensors)
    with FakeTensorMode() as mode:
        fake = _outputs_and_gradients(*torch.utils._pytree.tree_map(mode.from_tensor, tensors))
    for name, tensor in real.items():
        layout = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        assert layout == (fake[name].shape, fake[name].stride(), fake[name].dtype, fake[name].device), name


def test_a_make_fx_graph_of_the_gradient_equals_eager(device):
    problem = Problem.random((6, 8, 5, 5), torch.float64, device=device)
    vectors = problem.running_mean, problem.running_var, problem.weight, problem.bias

    def gradient(x, residual):
        y = functional.batch_norm_add_relu(x, residual, *(v.clone() for v in vectors), training=True)
        return torch.autograd.grad(y, (x, residual), problem.grad_output)

    tensors = problem.input.requires_grad_(), problem.residual.requires_grad_()
    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    others = [torch.randn_like(tensor).requires_grad_() for tensor in tensors]
    for actual, expected in zip(graph(*others), gradient(*others), strict=True):
        assert_close(actual, expected, torch.float64)
