"""batch_norm_relu_max_pool2d against F.max_pool2d of the reference; and stems that fuse makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.saved import saved_bytes
from resnet_fused import functional, fuse, resnet18
from resnet_fused.backend import ops_for
from resnet_fused.ops import MaxPool

from . import raw_ops
from .conftest import represented
from .problem import Problem, in_layout
from .test_pooling import few_values
from .tolerances import assert_close

WINDOWS = {
    "3x3 of stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2x2": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 1, "padding": 1},
    "oblong, dilated": {"kernel_size": (3, 2), "stride": (3, 1), "padding": (1, 0), "dilation": (2, 3)},
    "beyond the end": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "of even size": {"kernel_size": 4, "stride": 2, "padding": 1},
    "far apart": {"kernel_size": 2, "stride": (3, 4)},
    "1x1": {"kernel_size": 1, "stride": [2]},
    "long strides": {"kernel_size": (5, 9), "stride": (3, 7), "padding": (2, 4), "ceil_mode": True},
    "one window": {"kernel_size": (9, 7), "stride": 100, "padding": (0, 3), "dilation": (1, 2)},
}
windows = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
few_windows = pytest.mark.parametrize("windows", [*WINDOWS.values()][:4], ids=[*WINDOWS][:4])


@windows
@pytest.mark.parametrize("shape", represented([(3, 5, 9, 14), (2, 40, 13, 15)], by=[(3, 5, 9, 14)]), ids=str)
def test_outputs_and_gradients_are_the_references(backend, device, dtype, layout, training, shape, windows):
    torch.manual_seed(1)
    problem = Problem.random(shape, dtype, layout, device, False, windows=windows, training=training)
    problem.check(scale=2, clipped=(0.1, 0.9) if windows in [*WINDOWS.values()][:2] else None)
    problem.with_input_bias().check(scale=2, clipped=None)


@few_windows
def test_each_gradient_alone(backend, device, layout, training, windows):
    problem = Problem.random((4, 6, 8, 9), torch.float64, layout, device, False, windows=windows, training=training)
    problem = problem.with_input_bias()
    for name in ("input", "weight", "bias", "input_bias"):
        problem.check(scale=10, clipped=None, needs_grad=(name,))


def unchanging(input):
    """Statistics by which a batch norm of eps 0 leaves its input as it is."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    return mean, torch.ones_like(mean)


@windows
def test_ties_nans_and_infinities_are_as_in_eager(backend, device, dtype, layout, windows):
    input = in_layout(few_values((3, 5, 9, 14), dtype).to(device), layout)
    for x in (input, -input, torch.zeros_like(input), torch.full_like(input, torch.nan)):
        leaves = x.requires_grad_(), x.detach().double().requires_grad_()
        output = functional.batch_norm_relu_max_pool2d(leaves[0], *unchanging(x), eps=0.0, **windows)
        expected = F.max_pool2d(F.relu(leaves[1]), **windows)
        assert output.stride() == expected.stride()
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=0, equal_nan=True)
        grad_output = torch.randn(output.shape, device=device).to(dtype)
        (grad,) = torch.autograd.grad(output, leaves[0], grad_output)
        (expected_grad,) = torch.autograd.grad(expected, leaves[1], grad_output.double())
        assert_close(grad, expected_grad, dtype)


def test_a_window_without_a_value_is_minus_infinity(backend, device, layout):
    """It has no gradient. Eager's backward on a CPU then writes beside the tensor."""
    windows = {"kernel_size": (2, 1), "dilation": (3, 1), "padding": (1, 0)}  # of a row of windows, no row is there
    input = in_layout(torch.randn(2, 5, 2, 6, device=device), layout).requires_grad_()
    output = functional.batch_norm_relu_max_pool2d(input, *unchanging(input), **windows)
    assert (output == -torch.inf).all()
    assert torch.equal(output, F.max_pool2d(F.relu(input), **windows))
    if backend in ("cpu", "cuda", "triton"):
        output.sum().backward()
        assert not input.grad.any()


def test_what_rounds_to_zero_wins_no_gradient(backend, device, layout):
    input = in_layout(torch.rand(2, 8, 6, 6, device=device).to(torch.float16), layout)
    var = torch.full((8,), 2.0**100, device=device)
    x, bias = input.clone().requires_grad_(), torch.zeros_like(var).requires_grad_()
    output = functional.batch_norm_relu_max_pool2d(x, torch.zeros_like(var), var, None, bias, kernel_size=2)
    output.sum().backward()
    assert not output.any() and not x.grad.any() and not bias.grad.any()


# One channel; more than a row's columns; so many rows that threads share an image; a row of over 256.
BIT_EQUAL_SHAPES = [(3, 1, 65, 67), (2, 1200, 6, 6), (1, 24, 130, 31), (2, 3, 40, 301), (9, 70, 24, 25)]


@pytest.mark.parametrize("shape", BIT_EQUAL_SHAPES, ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(backend, device, dtype, layout, training, shape):
    problem = Problem.random(shape, dtype, layout, device, False, windows=WINDOWS["3x3 of stride 2"], training=training)
    problem.check(scale=2, clipped=None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = problem.run()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for name, value in problem.run().items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(threads)


@few_windows
def test_other_strides(backend, device, windows):
    dense = Problem.random((4, 6, 10, 12), device=device, residual=False, windows=windows)
    wide = torch.zeros(4, 6, 20, 12, device=device)
    of_every_second_row = dense.with_(input=wide[:, :, ::2].copy_(dense.input))
    transposed = dense.with_(input=dense.input.transpose(2, 3).contiguous().transpose(2, 3))
    permuted = dense.with_(grad_output=dense.grad_output.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3))
    expanded = dense.with_(grad_output=torch.ones((), device=device).expand(dense.grad_output.shape))
    for problem in (of_every_second_row, transposed, permuted, expanded):
        problem.check(scale=2, clipped=None)


@few_windows
def test_without_gradients(backend, device, layout, training, windows):
    problem = Problem.random((4, 6, 8, 9), torch.float32, layout, device, False, windows=windows, training=training)
    expected = problem.run()
    for name, value in problem.run(needs_grad=()).items():
        assert torch.equal(value, expected[name]), name
    empty = problem.with_(input=problem.input[:0], grad_output=problem.grad_output[:0])
    if not training:
        assert empty.run()["output"].shape == (0, *expected["output"].shape[1:])


def test_what_is_saved(backend, device):
    input = torch.randn(2, 64, 16, 16, device=device, requires_grad=True)
    layer = torch.nn.BatchNorm2d(64, device=device)

    def stem(input):
        windows = {"kernel_size": 3, "stride": 2, "padding": 1}
        return functional.batch_norm_relu_max_pool2d(input, None, None, layer.weight, layer.bias, True, **windows)

    winners, statistics = 2 * 64 * 8 * 8, 2 * 64 * 8
    assert saved_bytes(layer, input, forward=stem) == input.nbytes + winners + statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["3x3 of stride 2", "oblong, dilated"])
def test_second_gradients(backend, device, layout, training, name):
    torch.manual_seed(3)
    input = in_layout(torch.randperm(2 * 3 * 6 * 7).double().view(2, 3, 6, 7).to(device) / 50, layout)
    vectors = [torch.randn(3, dtype=torch.float64, device=device).requires_grad_() for _ in range(3)]
    statistics = input.new_zeros(3), input.new_ones(3)

    def pooled(input, weight, bias, input_bias):
        running = (None, None) if training else statistics
        options = {"input_bias": input_bias, **WINDOWS[name]}
        return functional.batch_norm_relu_max_pool2d(input, *running, weight, bias, training, **options)

    arguments = input.requires_grad_(), *vectors
    assert torch.autograd.gradcheck(pooled, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(pooled, arguments, fast_mode=True)


LARGER = [{"kernel_size": 16}, {"kernel_size": (2, 128)}, {"kernel_size": (19, 3), "stride": 5, "ceil_mode": True}]


@pytest.mark.parametrize("windows", LARGER)
def test_larger_windows_are_pooled_by_themselves(backend, device, layout, windows, calls):
    problem = Problem.random((2, 3, 17, 130), torch.float32, layout, device, False, windows=windows)
    problem.check(clipped=None)
    assert calls == ["batch_norm_relu"]


def test_an_image_without_a_batch(backend, device):
    input = torch.randn(5, 8, 6, dtype=torch.float64, device=device)  # of which batch norm takes the rows for channels
    output = functional.batch_norm_relu_max_pool2d(input, None, None, training=True, kernel_size=2)
    expected = F.max_pool2d(F.relu(F.batch_norm(input, None, None, training=True)), 2)
    torch.testing.assert_close(output, expected)


REFUSED = {
    "padding": {"kernel_size": 2, "padding": 2},
    "stride": {"kernel_size": 2, "stride": 0},
    "kernel": {"kernel_size": 0},
    "dilation": {"kernel_size": 2, "dilation": 0},
    "too small": {"kernel_size": 9},
    "three": {"kernel_size": (2, 2, 2)},
    "a word": {"kernel_size": "2"},
}


@pytest.mark.parametrize("windows", REFUSED.values(), ids=REFUSED)
def test_bad_windows_raise_pytorchs_error(backend, device, windows):
    input, running = torch.randn(2, 3, 6, 6, device=device), torch.zeros(3, device=device)
    counter = torch.tensor(0, device=device)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        F.max_pool2d(input, **windows)
    with pytest.raises(type(expected.value)) as actual:
        functional.batch_norm_relu_max_pool2d(
            input, running, running + 1, training=True, num_batches_tracked=counter, **windows
        )
    assert str(actual.value) == str(expected.value)
    assert counter.item() == 0 and not running.any()


def test_bad_arguments_are_told_by_name(backend, device):
    input, vector = torch.randn(2, 3, 6, 6, device=device), torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\)"):
        functional.batch_norm_relu_max_pool2d(input, vector, vector, torch.ones(4, device=device), kernel_size=2)
    with pytest.raises(TypeError, match="return_indices"):
        functional.batch_norm_relu_max_pool2d(input, vector, vector, kernel_size=2, return_indices=True)


WRONG = {
    "9 numbers": [2, 2, 2, 2, 0, 0, 1, 1, 3],
    "no kernel": [0, 2, 2, 2, 0, 0, 1, 1, 3, 3],
    "no stride": [2, 2, 0, 2, 0, 0, 1, 1, 3, 3],
    "a padding over half the window": [2, 2, 2, 2, 2, 0, 1, 1, 3, 3],
    "windows beyond the input": [2, 2, 2, 2, 0, 0, 1, 1, 4, 3],
    "a window that reaches beyond": [2, 2, 2, 2, 0, 0, 9, 1, 3, 3],
    "256 positions": [16, 16, 1, 1, 8, 8, 1, 1, 1, 1],
    "so many that they overflow": [2**40, 2**40, 2, 2, 0, 0, 1, 1, 3, 3],
}


@pytest.mark.parametrize("numbers", WRONG.values(), ids=WRONG)
def test_the_ops_refuse_other_numbers(backend, device, numbers):
    problem = Problem.random((2, 3, 6, 6), device=device, residual=False, windows={"kernel_size": 2})
    ops = ops_for(problem.input)
    call = raw_ops.forward(ops, problem)
    outputs = call()
    with pytest.raises((RuntimeError, ValueError), match="max_pool"):
        call(max_pool=numbers)
    with pytest.raises((RuntimeError, ValueError), match="max_pool"):
        raw_ops.backward(ops, problem, outputs)(max_pool=numbers)
    with pytest.raises((RuntimeError, ValueError), match="residual: expected none before max_pool"):
        call(residual=problem.input)
    for name, value in (("grad_output", problem.input), ("mask", outputs["mask"][:, 1:])):
        with pytest.raises((RuntimeError, ValueError), match=name):
            raw_ops.backward(ops, problem, outputs)(**{name: value})


def test_the_winners_of_windows():
    input = torch.tensor([[3.0, 1, 2], [0, 5, 4], [6, 0, 7]]).view(1, 1, 3, 3)
    max_pool = MaxPool.of(input, kernel_size=2, stride=1)
    winners = torch.tensor([[[[3, 2], [2, 255]]]], dtype=torch.uint8)
    sources, passed = max_pool.sources(winners.flatten(1), input)
    assert sources.tolist() == [[[[4, 4], [6, 0]]]]
    assert passed.tolist() == [[[[True, True], [True, False]]]]


@few_windows
def test_hooks_on_what_is_saved(backend, device, layout, windows):
    problem = Problem.random((4, 6, 8, 9), torch.float32, layout, device, False, windows=windows)
    expected = problem.run()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().contiguous(), lambda t: t.to(device)):
        actual = problem.run()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_compiled_without_a_graph_break():
    problem = Problem.random((4, 6, 8, 9), residual=False, windows=WINDOWS["3x3 of stride 2"])

    class Compiled:
        batch_norm_relu_max_pool2d = torch.compile(
            functional.batch_norm_relu_max_pool2d, fullgraph=True, backend="aot_eager"
        )

    actual, expected = problem.run(Compiled), problem.run()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


def test_transformed():
    input = torch.randn(5, 2, 3, 6, 6)
    mean, var = torch.zeros(3), torch.ones(3)

    def stem(input):
        return functional.batch_norm_relu_max_pool2d(input, mean, var, kernel_size=2)

    assert torch.equal(torch.vmap(stem)(input), torch.stack([stem(image) for image in input]))
    _, tangent = torch.func.jvp(stem, (input[0],), (torch.ones_like(input[0]),))
    assert tangent.shape == (2, 3, 3, 3)


# ---- By fuse ----


def poolings():
    """What pools after a ReLU, in a stem."""
    return {
        "module": nn.MaxPool2d(3, 2, 1),
        "function": Called(lambda x: F.max_pool2d(x, 3, 2, 1)),
        "torch's": Called(lambda x: torch.max_pool2d(x, 3, 2, 1)),
        "by names": Called(lambda x: F.max_pool2d(input=x, kernel_size=(3, 2), ceil_mode=True)),
    }


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Stem(nn.Module):
    """conv, bn, ReLU, ``then`` of what is rectified, conv."""

    def __init__(self, then, inplace=False):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace)
        self.then, self.head = then, nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.head(self.then(self.relu(self.bn(self.conv(x)))))


def assert_trains_alike(plain, fused, calls=3, size=20):
    for seed in range(calls):
        torch.manual_seed(seed)
        images = torch.randn(4, 3, size, size, dtype=torch.float64)
        results = []
        for model in (plain, fused):
            x = images.clone().requires_grad_()
            model.zero_grad()
            output = model(x)
            torch.manual_seed(seed + 10)
            output.backward(torch.randn_like(output))
            results.append([output, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def twins(then, **options):
    torch.manual_seed(0)
    plain = Stem(copy.deepcopy(then), options.pop("inplace", False)).double()
    fused = copy.deepcopy(plain)
    return plain, fused, fuse(fused, **options)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", poolings())
def test_a_stem(name, inplace, memory_efficient, calls):
    plain, fused, report = twins(poolings()[name], inplace=inplace, memory_efficient=memory_efficient)
    assert_trains_alike(plain, fused)
    assert calls == ["batch_norm_relu_max_pool2d"] * 2
    assert report.layers == {"bn": "relu+max_pool2d"}
    assert_trains_alike(plain.eval(), fused.eval())
    with torch.no_grad():
        image = torch.randn(1, 3, 20, 20, dtype=torch.float64)
        torch.testing.assert_close(fused(image), plain(image))
    assert len(calls) == 6


class Kept(nn.Module):
    def forward(self, x):
        self.kept = x
        return F.max_pool2d(x, 2)


THEN = {  # what becomes of what is rectified
    "used before": lambda x: x.mean() + F.max_pool2d(x, 2),
    "used after": lambda x: F.max_pool2d(x, 2) + x.mean(),
    "pooled twice": lambda x: F.max_pool2d(x, 2) + F.max_pool2d(x, 2, ceil_mode=True),
    "rectified twice": lambda x: F.max_pool2d(F.relu(x), 2),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "viewed": lambda x: F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (4, 8)),
    "large windows": lambda x: F.max_pool2d(x, 16, 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 5),
    "added": lambda x: F.max_pool2d(x + x, 2),
    "a Function of somebody's": lambda x: F.max_pool2d(Doubled.apply(x), 2),
    "detached, and pooled": lambda x: F.max_pool2d(x, 2) * F.max_pool2d(x.detach(), 2),
}
THEN = {name: Called(function) for name, function in THEN.items()} | {"kept": Kept()}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", THEN)
def test_what_is_rectified_may_go_anywhere(name, inplace, calls):
    """From the first call on, or once it has been seen to go to a pooling alone."""
    size = 24
    plain, fused, _ = twins(THEN[name], inplace=inplace)
    assert_trains_alike(plain, fused, size=size)
    assert "batch_norm_relu_max_pool2d" not in calls
    pooling = Called(lambda x: F.max_pool2d(x, 2))
    plain, fused, report = twins(pooling, inplace=inplace)
    assert_trains_alike(plain, fused, calls=2, size=size)
    assert calls[-1] == "batch_norm_relu_max_pool2d"
    for model in (plain, fused):
        model.then = copy.deepcopy(THEN[name])
    assert_trains_alike(plain, fused, size=size)
    assert report.layers["bn"].startswith("relu")


@pytest.mark.parametrize("is_used_again", [False, True])
def test_a_relu_in_place_whose_output_has_the_old_name(is_used_again, calls):
    class ByOldName(Stem):
        def forward(self, x):
            x = self.bn(self.conv(x))
            self.relu(x)
            return self.head(self.then(x)) + (x.mean() if is_used_again else 0)

    torch.manual_seed(0)
    plain = ByOldName(nn.MaxPool2d(2), inplace=True).double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert_trains_alike(plain, fused)
    assert ("batch_norm_relu_max_pool2d" in calls) is not is_used_again


class Skipping(nn.Module):
    """As a U-Net's encoder: what was pooled comes back, beside a batch norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.skips = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), False

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        y = F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        y = self.bn2(self.conv2(y))
        return self.relu(y + x if self.skips else y)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_skip(after, calls):
    torch.manual_seed(0)
    plain = Skipping().double()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert_trains_alike(plain, fused, calls=after)
    plain.skips = fused.skips = True
    assert_trains_alike(plain, fused, calls=4)
    assert report.layers == {"bn": "relu", "bn2": "relu" if after else "add+relu"}


@pytest.mark.parametrize("hooked", ["bn", "relu", "then"])
def test_hooks_see_what_they_would(hooked):
    shapes = [[], []]
    plain, fused, _ = twins(nn.MaxPool2d(2))
    for after in (0, 2):
        assert_trains_alike(plain, fused, calls=after)
        for model, of_model in zip((plain, fused), shapes, strict=True):

            def hook(layer, inputs, output, of_model=of_model):
                of_model.append((inputs[0].sum().item(), output.sum().item()))

            getattr(model, hooked).register_forward_hook(hook)
        assert_trains_alike(plain, fused)
    torch.testing.assert_close(*shapes)


def test_who_never_asks_a_tensor_gets_its_gradient():
    """A backward hook on the pooling makes its input the output of a Function."""
    plain, fused, _ = twins(nn.MaxPool2d(2))
    assert_trains_alike(plain, fused, calls=2)
    grads = [[], []]
    for model, of_model in zip((plain, fused), grads, strict=True):
        model.then.register_full_backward_hook(lambda _, grads_in, grads_out, of=of_model: of.extend(grads_in))
    assert_trains_alike(plain, fused)
    torch.testing.assert_close(*grads)


class Checkpointed(Stem):
    """From one layer to another."""

    def __init__(self, first, last, use_reentrant):
        super().__init__(nn.MaxPool2d(2))
        self.part, self.use_reentrant = slice(first, last), use_reentrant

    def forward(self, images):
        layers = [self.conv, self.bn, self.relu, self.then, self.head]
        before, within, after = layers[: self.part.start], layers[self.part], layers[self.part.stop :]
        x = nn.Sequential(*before)(images)
        x = checkpoint(nn.Sequential(*within), x, use_reentrant=self.use_reentrant)
        x = nn.Sequential(*after)(x)
        # What was learnt changes while the call may run again.
        return x + self.relu(self.bn(self.conv(images))).mean() if self.changes else x

    changes = False


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("part", [(0, 5), (0, 3), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)])
def test_checkpointed(part, use_reentrant):
    torch.manual_seed(0)
    plain = Checkpointed(*part, use_reentrant).double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert_trains_alike(plain, fused)
    plain.changes = fused.changes = True
    assert_trains_alike(plain, fused)


def test_resnet18_pools_its_stem(calls):
    torch.manual_seed(0)
    model = resnet18(3)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert calls.count("batch_norm_relu_max_pool2d") == 1
