"""What must hold at the edges: ties, NaNs, extreme values, empty and strange tensors, bad input."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import functional, use_backend
from resnet_fused.backend import get

from . import raw_ops
from .conftest import represented_where_interpreted
from .problem import Problem, in_layout
from .tolerances import assert_close

# Layout and strides ---------------------------------------------------------------------------------------------------


def _strange_inputs(device):
    """(name, tensor): strides that are ambiguous, permuted, sliced, expanded, overlapping or offset."""
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, device=device)  # noqa: E731
    for shape in ((2, 8, 8, 1), (4, 1, 9, 9), (4, 9, 1, 1), (1, 5, 3, 3)):
        yield f"ambiguous-{shape}", randn(*shape)
        yield f"ambiguous-channels_last-{shape}", in_layout(randn(*shape), "channels_last")
    yield "ambiguous-one-channel", randn(4, 9, 9).as_strided((4, 1, 9, 9), (81, 1, 9, 1))
    yield "permuted", randn(4, 5, 6, 7).permute(0, 2, 1, 3)
    yield "permuted-to-front", randn(4, 5, 6, 7).permute(3, 0, 1, 2)
    yield "sliced", randn(4, 5, 12, 7)[:, :, ::2]
    yield "sliced-channels", randn(4, 10, 6, 7)[:, 3:8]
    yield "sliced-channels_last", in_layout(randn(4, 5, 12, 7), "channels_last")[:, :, 1::2]
    yield "sliced-channels-channels_last", in_layout(randn(4, 10, 6, 7), "channels_last")[:, 3:8]
    yield "expanded-batch", randn(1, 5, 6, 7).expand(4, 5, 6, 7)
    yield "expanded-channels", randn(4, 1, 6, 7).expand(4, 5, 6, 7)
    yield "overlapping", randn(200).as_strided((4, 5, 6, 3), (20, 9, 3, 1))
    yield "offset", randn(4 * 5 * 6 * 7 + 1)[1:].view(4, 5, 6, 7)
    yield "3d-permuted", randn(4, 6, 5).transpose(1, 2)
    yield "5d-sliced-channels_last_3d", in_layout(randn(2, 3, 4, 5, 6), "channels_last")[..., ::2]
    yield "transposed-2d", randn(5, 7).t()


@pytest.mark.parametrize("name", [name for name, _ in _strange_inputs("cpu")])
def test_strange_strides_give_eagers_values_and_memory_format(backend, device, training, with_residual, name):
    x = dict(_strange_inputs(device))[name]
    problem = Problem.random(tuple(x.shape), torch.float64, device=device, residual=with_residual, training=training)
    problem = problem.with_(input=x)
    results = problem.check(clipped=None)
    if with_residual == "normalized":
        problem.with_(input=problem.residual, residual=x).check(clipped=None)
    expected = F.batch_norm(x, problem.running_mean.clone(), problem.running_var.clone(), training=training)
    assert results["output"].stride() == expected.stride()


@pytest.mark.parametrize("name", [name for name, x in _strange_inputs("cpu") if x.shape == (4, 5, 6, 7)])
def test_a_residual_of_any_strides_is_read_right(backend, device, layout, name):
    problem = Problem.random((4, 5, 6, 7), torch.float64, layout, device)
    problem.with_(residual=dict(_strange_inputs(device))[name]).check(clipped=None)


def test_per_channel_vectors_of_any_stride(backend, device, training):
    problem = Problem.random((4, 5, 6, 7), torch.float64, device=device, training=training)
    running_mean, running_var = (torch.stack([v, v], 1)[:, 0] for v in (problem.running_mean, problem.running_var))
    expected = problem.run()
    functional.batch_norm_add_relu(
        problem.input,
        problem.residual,
        running_mean,
        running_var,
        problem.weight.expand(2, 5).t()[:, 0],
        training=training,
    )
    torch.testing.assert_close(running_mean, expected["running_mean"], rtol=0, atol=0)
    torch.testing.assert_close(running_var, expected["running_var"], rtol=0, atol=0)


@pytest.mark.parametrize("channels", represented_where_interpreted([1, 3, 6, 9, 10, 48, 63, 65, 728], by=[1, 9, 65]))
def test_any_number_of_channels(backend, device, layout, training, with_residual, channels):
    problem = Problem.random((5, channels, 7, 5), torch.float32, layout, device, with_residual, training=training)
    problem.check(clipped=(0.2, 0.8) if channels == 1 else (0.3, 0.7))


# Values ---------------------------------------------------------------------------------------------------------------

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mean_far_above_the_deviation_survives(backend, device, dtype, layout, with_residual):
    problem = Problem.random((8, 6, 9, 9), dtype, layout, device, with_residual)
    x = in_layout((1e4 + 1e-2 * torch.randn(8, 6, 9, 9, dtype=torch.float64)).to(device, dtype), layout)
    # float32 inputs are spaced 1e-3 here; the reference sees the same rounded values. In float64 the reference's own
    # x * scale + shift loses 6 of its 16 digits, for each batch norm.
    problem = problem.with_(input=x)
    if with_residual == "normalized":
        problem = problem.with_(residual=in_layout(x.flip(0, 2, 3), layout))
    problem.check(scale=1 if dtype == torch.float32 else 4000)


def test_an_outlier_where_the_statistics_start_costs_no_accuracy(backend, device, layout):
    problem = Problem.random((64, 3, 8, 8), torch.float32, layout, device)
    x = problem.input.clone()
    x[0, :, 0, 0] = 1e4
    problem.with_(input=x).check(scale=5, clipped=None)


def test_a_constant_channel_has_variance_zero(backend, device, layout, with_residual):
    problem = Problem.random((4, 5, 6, 7), torch.float32, layout, device, with_residual)
    x = problem.input.clone()
    x[:, 1] = 3.0
    x[:, 3] = 1e4
    problem = problem.with_(input=x)
    actual, expected = problem.run(), problem.reference()
    for name in ("output", "grad_weight", "grad_bias", "running_mean", "running_var"):
        assert_close(actual[name], expected[name], torch.float32, name=name)
    torch.testing.assert_close(actual["grad_weight"][[1, 3]], torch.zeros(2, device=device))
    assert_close(actual["grad_input"][:, [1, 3]], expected["grad_input"][:, [1, 3]], torch.float32, 4)
    assert_close(actual["grad_input"][:, [0, 2, 4]], expected["grad_input"][:, [0, 2, 4]], torch.float32)


@pytest.mark.parametrize("value", represented_where_interpreted(NOT_FINITE, by=NOT_FINITE[:2]), ids=str)
@pytest.mark.parametrize("position", [(0, 0), (3, 5), ([0, 3], [0, 5])], ids=["first", "last", "both"])
def test_nan_or_inf_in_one_channel_stays_there(backend, device, layout, training, with_residual, value, position):
    problem = Problem.random((4, 5, 6, 6), torch.float32, layout, device, with_residual, training=training)
    clean = problem.run()
    others = [0, 1, 3, 4]
    for changed in ("input", "residual") if with_residual == "normalized" else ("input",):
        x = getattr(problem, changed).clone()
        x[position[0], 2, position[1], position[1]] = value
        actual, expected = (f() for p in [problem.with_(**{changed: x})] for f in (p.run, p.reference))
        for name in actual.keys() - {"num_batches_tracked", "residual_num_batches_tracked"}:
            channels = (slice(None), others) if actual[name].dim() > 1 else others
            torch.testing.assert_close(actual[name][channels], clean[name][channels], rtol=0, atol=0)
            assert torch.equal(actual[name].isnan().cpu(), expected[name].isnan()), name
            assert torch.equal(actual[name].isinf().cpu(), expected[name].isinf()), name


def test_vectors_of_any_stride_are_read_and_updated_where_they_are(backend, device, training, with_residual):
    problem = Problem.random((4, 3, 5, 5), device=device, residual=with_residual, training=training).with_input_bias()
    arguments = {name: getattr(problem, name) for name in (*Problem.DIFFERENTIABLE, *Problem.RUNNING)}
    vectors = {name: tensor for name, tensor in arguments.items() if tensor is not None and tensor.dim() == 1}
    spaced = {name: torch.stack([vector, torch.full_like(vector, 7)], 1) for name, vector in vectors.items()}
    arguments |= {name: both[:, 0] for name, both in spaced.items()} | problem.options
    actual, expected = {"output": problem.call(functional, arguments)}, problem.reference()
    for name, value in (
        actual | {name: both[:, 0] for name, both in spaced.items() if name in problem.RUNNING}
    ).items():
        assert_close(value, expected[name], torch.float32, name=name)
    assert all((both[:, 1] == 7).all() for both in spaced.values())


def _ties(device, dtype, layout):
    """Outputs of exactly 0 in channel 0, by gamma = beta = residual = 0, and NaN where the residual is."""
    problem = Problem.random((4, 3, 5, 5), dtype, layout, device)
    weight, bias, residual = problem.weight.clone(), problem.bias.clone(), problem.residual.clone()
    weight[0] = bias[0] = 0
    residual[:, 0] = 0
    residual[1, 1] = float("nan")
    return problem.with_(weight=weight, bias=bias, residual=residual)


def test_a_tie_at_zero_blocks_the_gradient_and_nan_passes_it(backend, device, dtype, layout):
    problem = _ties(device, dtype, layout)
    results = problem.run()
    assert torch.count_nonzero(results["output"][:, 0]) == 0
    assert torch.count_nonzero(results["grad_residual"][:, 0]) == 0
    assert results["output"][1, 1].isnan().all()
    torch.testing.assert_close(results["grad_residual"][1, 1], problem.grad_output[1, 1])


def test_a_tie_at_zero_without_residual(backend, device, dtype, layout):
    problem = Problem.random((4, 3, 5, 5), dtype, layout, device, residual=False)
    zero = torch.zeros_like(problem.weight)
    results = problem.with_(weight=zero, bias=zero).run()
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        assert torch.count_nonzero(results[name]) == 0, name


def test_a_tie_at_zero_of_two_batch_norms(backend, device, dtype, layout):
    """Shifts that cancel, and a NaN that the batch's statistics spread over its channel of the residual."""
    problem = Problem.random((4, 3, 5, 5), dtype, layout, device, "normalized")
    vectors = {name: getattr(problem, name).clone() for name in ("weight", "bias", "residual_weight", "residual_bias")}
    vectors["weight"][0] = vectors["residual_weight"][0] = 0
    vectors["residual_bias"][0] = -vectors["bias"][0]
    residual = problem.residual.clone()
    residual[0, 1, 0, 0] = float("nan")
    results = problem.with_(residual=residual, **vectors).run()
    assert torch.count_nonzero(results["output"][:, 0]) == 0
    assert results["output"][:, 1].isnan().all()
    assert results["grad_bias"][0] == results["grad_residual_bias"][0] == 0
    expected = problem.grad_output[:, 1].double().sum()
    assert_close(results["grad_bias"][1:2], expected[None], torch.float32, 4)


def test_a_nan_gradient_where_the_output_is_blocked_gives_zero(backend, device, layout, training, with_residual):
    problem = Problem.random((4, 3, 5, 5), torch.float32, layout, device, with_residual, training=training)
    output = problem.run()["output"]
    grad_output = torch.where(output <= 0, float("nan"), problem.grad_output)
    expected = problem.with_(grad_output=torch.where(output <= 0, 0.0, problem.grad_output)).run()
    actual = problem.with_(grad_output=grad_output).run()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_output_that_underflows_to_zero_as_stored_is_blocked(backend, device, dtype, layout, with_residual):
    tiny = torch.finfo(dtype).smallest_normal * 2.0 ** -(10 if dtype == torch.float16 else 7)  # smallest subnormal
    problem = Problem.random((4, 3, 5, 5), dtype, layout, device, with_residual)
    zero = torch.zeros_like(problem.weight)
    changes = {"weight": zero, "bias": zero + tiny / 4}
    if with_residual == "normalized":
        changes |= {"residual_weight": zero, "residual_bias": zero}
    elif with_residual:
        changes["residual"] = torch.zeros_like(problem.residual)
    results = problem.with_(**changes).run()
    assert torch.count_nonzero(results["output"]) == 0
    assert torch.count_nonzero(results["grad_bias"]) == 0
    changes["bias"] = zero + tiny
    results = problem.with_(**changes).run()
    assert torch.count_nonzero(results["output"]) == results["output"].numel()
    assert torch.count_nonzero(results["grad_bias"]) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_and_rounded_as_pytorch_does(backend, device, dtype):
    """All 65,536 of them as the residual of a normalised 0, and rounding ties from a bias of half a unit."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    for bias in (0.0, 1.0, 2.0**-25, 3 * 2.0**-12):
        actual = functional.batch_norm_add_relu(
            torch.zeros(1, 1, 256, 256, dtype=dtype, device=device),
            every.to(device),
            zero,
            one,
            one,
            zero + bias,
            eps=0.0,
        )
        expected = torch.relu(every.float() + bias).to(dtype)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_as_an_input(backend, device, dtype):
    """A quarter of it, so that an infinity that was read as a large number shows."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    actual = functional.batch_norm_relu(every.to(device), zero, one, one / 4, zero, eps=0.0)
    expected = torch.relu(every.float() / 4).to(dtype)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


# In eager, too, each thread flushes or does not: of bfloat16 only one thread's values are defined.
@pytest.mark.parametrize(("dtype", "threads"), [(torch.float16, 1), (torch.float16, 2), (torch.bfloat16, 1)], ids=str)
def test_subnormals_are_flushed_where_eager_flushes_them(dtype, threads):
    """All 65,536 values, as the input and as the residual."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    none, (zero, one), before = torch.zeros_like(every), torch.tensor([[0.0], [1.0]]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.set_flush_denormal(True)
        results = []
        for backend in ("auto", "eager"):
            with use_backend(backend):
                sums = ((every, none), (none, every))
                eps = 1e-30  # which adds nothing to 1; before torch 2.12 its own batch norm refuses 0
                results.append([functional.batch_norm_add_relu(*tensors, zero, one, eps=eps) for tensors in sums])
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_float16_overflows_to_infinity_as_in_eager(backend, device):
    x = torch.full((2, 1, 2, 2), 60000.0, dtype=torch.float16, device=device)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    output = functional.batch_norm_add_relu(x, x, zero, one, eps=0.0)
    assert output.isinf().all()


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)], ids=str)
def test_an_empty_batch_changes_no_statistics_and_counts(backend, device, layout, with_residual, shape):
    x = in_layout(torch.empty(shape, device=device), layout).requires_grad_()
    weight, bias = (torch.randn(4, device=device, requires_grad=True) for _ in range(2))
    running_mean, running_var = torch.randn(4, device=device), torch.rand(4, device=device)
    statistics = running_mean.clone(), running_var.clone()
    counter = torch.tensor(7, device=device)
    arguments = (running_mean, running_var, weight, bias, True)
    if with_residual == "normalized":
        other = torch.tensor(3, device=device)
        batch_norm = functional.BatchNorm(running_mean, running_var, weight, bias, num_batches_tracked=counter)
        residual = functional.BatchNorm(None, None, weight, num_batches_tracked=other)
        output = functional.batch_norm_add_batch_norm_relu(x, x.detach(), batch_norm, residual, True)
        assert other.item() == 4
    elif with_residual:
        output = functional.batch_norm_add_relu(x, x.detach(), *arguments, num_batches_tracked=counter)
    else:
        output = functional.batch_norm_relu(x, *arguments, num_batches_tracked=counter)
    output.sum().backward()
    assert output.shape == x.grad.shape == shape
    assert torch.equal(running_mean, statistics[0]) and torch.equal(running_var, statistics[1])
    assert counter.item() == 8
    assert torch.count_nonzero(weight.grad) == torch.count_nonzero(bias.grad) == 0


def test_one_value_per_channel_is_fine_in_eval(backend, device, with_residual):
    vectors = [torch.zeros(6, dtype=torch.float64, device=device), torch.ones(6, dtype=torch.float64, device=device)]
    Problem.random((1, 6, 1, 1), torch.float64, device=device, residual=with_residual).with_(
        **dict(zip(Problem.RUNNING, 2 * vectors, strict=True)), options={"training": False}
    ).check(clipped=None)


# Re-entrance ----------------------------------------------------------------------------------------------------------


def test_two_calls_before_one_backward_keep_their_own_statistics(backend, device, with_residual):
    first = Problem.random((4, 3, 5, 5), torch.float64, device=device, residual=with_residual)
    second = Problem.random((4, 3, 5, 5), torch.float64, device=device, residual=with_residual)
    weight = first.weight.clone().requires_grad_()
    outputs = []
    for problem in (first, second):
        arguments = {name: getattr(problem, name) for name in (*Problem.DIFFERENTIABLE, *Problem.RUNNING)}
        arguments |= {
            "weight": weight,
            "bias": first.bias,
            "running_mean": first.running_mean.clone(),
            "training": True,
        }
        outputs.append(problem.call(functional, arguments))
    (actual,) = torch.autograd.grad(outputs, weight, [first.grad_output, second.grad_output])
    separate = [problem.with_(weight=first.weight, bias=first.bias).run()["grad_weight"] for problem in (first, second)]
    torch.testing.assert_close(actual, sum(separate))


# Bad input ------------------------------------------------------------------------------------------------------------


def _arguments(device, **changes):
    x = torch.randn(4, 3, 5, 5, device=device)
    arguments = {
        "input": x,
        "residual": torch.randn_like(x),
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
        "training": True,
    }
    return {**arguments, **changes}


BAD = {
    "one dimension": ({"input": torch.randn(3)}, ValueError, r"input: .*2 dimensions.*\(3,\)"),
    "no channels": ({"input": torch.randn(4, 0, 5, 5)}, ValueError, r"input: .*channel.*\(4, 0, 5, 5\)"),
    "integer input": ({"input": torch.ones(4, 3, 5, 5, dtype=torch.int64)}, TypeError, "input: .*int64"),
    "complex input": ({"input": torch.ones(4, 3, 5, 5, dtype=torch.complex64)}, TypeError, "input: .*complex64"),
    "complex residual": ({"residual": torch.ones(4, 3, 5, 5, dtype=torch.complex64)}, TypeError, "residual: .*complex"),
    "a larger residual": (
        {"residual": torch.randn(4, 3, 5, 6)},
        ValueError,
        r"residual: .*\(4, 3, 5, 5\).*\(4, 3, 5, 6\)",
    ),
    "a smaller residual": ({"residual": torch.randn(4, 3, 4, 5)}, ValueError, "residual: .*broadcast"),
    "a residual of more dimensions": ({"residual": torch.randn(1, 4, 3, 5, 5)}, ValueError, "residual: .*broadcast"),
    "one value per channel": ({"input": torch.randn(1, 3, 1, 1), "residual": None}, ValueError, "more than 1 value"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps: .*-1e-05"),
    "negative eps in eval": ({"eps": -1e-5, "training": False}, ValueError, "eps: .*-1e-05"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps: .*nan"),
    "eps 0 in training": ({"eps": 0.0}, ValueError, r"eps: .*> 0.*0\.0"),
    "only running_mean": ({"running_var": None}, ValueError, "both or neither, got only running_mean"),
    "only running_var": ({"running_mean": None}, ValueError, "both or neither, got only running_var"),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        "running_mean, running_var: .*training=False",
    ),
    "momentum None without counter": ({"momentum": None}, ValueError, "momentum: .*num_batches_tracked"),
    "a float counter": ({"num_batches_tracked": torch.zeros(())}, ValueError, "num_batches_tracked: .*float32"),
    "two counters": (
        {"num_batches_tracked": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"num_batches_tracked: .*\(2,\)",
    ),
    "float64 input, float32 vectors": (
        {"input": torch.randn(4, 3, 5, 5).double()},
        TypeError,
        "weight: .*float64.*float32",
    ),
    "another device": ({"residual": torch.randn(4, 3, 5, 5, device="meta")}, ValueError, "residual: .*device.*meta"),
}
for _name in ("weight", "bias", "running_mean", "running_var", "input_bias"):
    BAD[f"short {_name}"] = ({_name: torch.ones(2)}, ValueError, rf"{_name}: expected shape \(3,\).*got \(2,\)")
    BAD[f"2-D {_name}"] = ({_name: torch.ones(1, 3)}, ValueError, rf"{_name}: expected shape \(3,\).*got \(1, 3\)")
    BAD[f"bfloat16 {_name}"] = (
        {_name: torch.ones(3, dtype=torch.bfloat16)},
        TypeError,
        f"{_name}: .*float32.*bfloat16",
    )
    BAD[f"{_name} on another device"] = ({_name: torch.ones(3, device="meta")}, ValueError, f"{_name}: .*cpu.*meta")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_changes(backend, device, case):
    changes, error, text = BAD[case]
    arguments = _arguments(device, **{"num_batches_tracked": torch.tensor(3), **changes})
    if case == "momentum None without counter":
        del arguments["num_batches_tracked"]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: value.clone() for name, value in tensors.items()}
    with pytest.raises(error, match=text):
        functional.batch_norm_add_relu(**arguments)
    if "residual" not in changes or changes["residual"] is None:
        del arguments["residual"]
        with pytest.raises(error, match=text):
            functional.batch_norm_relu(**arguments)
    for name, value in tensors.items():
        if value.device.type != "meta":
            assert torch.equal(value, before[name]), name


OF_RESIDUAL = {
    "another dtype": ({"residual": torch.randn(4, 3, 5, 5).double()}, TypeError, "residual: .*float32.*float64"),
    "one that would broadcast": ({"residual": torch.randn(1, 3, 5, 5)}, ValueError, r"residual: .*\(1, 3, 5, 5\)"),
    "on another device": ({"residual": torch.randn(4, 3, 5, 5, device="meta")}, ValueError, "residual: .*cpu.*meta"),
}
IN_BATCH_NORM = [name for name, (changes, _, _) in BAD.items() if not changes.keys() & {"input", "residual"}]
IN_BATCH_NORM.remove("momentum None without counter")


@pytest.mark.parametrize("prefix", ["", "residual_"], ids=["input", "residual"])
@pytest.mark.parametrize("case", [*IN_BATCH_NORM, *OF_RESIDUAL, "no counter", "shared statistics", "shared counter"])
def test_bad_input_of_two_batch_norms_is_refused_before_anything_changes(backend, device, prefix, case):
    problem = Problem.random((4, 3, 5, 5), device=device, residual="normalized")
    arguments = {name: getattr(problem, name) for name in (*Problem.DIFFERENTIABLE, *Problem.RUNNING)}
    arguments |= {"training": True, "residual_num_batches_tracked": torch.tensor(5, device=device)}
    arguments["num_batches_tracked"] = torch.tensor(3, device=device)
    if case in BAD:
        changes, error, text = BAD[case]
        arguments |= {name if name == "training" else prefix + name: value for name, value in changes.items()}
        text = re.sub(r"\w+(?=:)|(?<=only )\w+|running_mean(?=,)", rf"{prefix}\g<0>", text)
    elif case in OF_RESIDUAL:
        changes, error, text = OF_RESIDUAL[case]
        arguments |= changes
    elif case == "no counter":
        arguments |= {f"{prefix}num_batches_tracked": None, f"{prefix}momentum": None}
        error, text = ValueError, f"{prefix}momentum: .*num_batches_tracked"
    else:
        name = "running_var" if case == "shared statistics" else "num_batches_tracked"
        arguments[f"residual_{name}"] = arguments[name]
        error, text = ValueError, f"residual_{name}: expected one of its own"
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=text):
        problem.call(functional, arguments)
    for name, value in before.items():
        assert value.device.type == "meta" or torch.equal(value, arguments[name]), name


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="the reference, torch's own batch norm, refuses eps=0")
def test_eps_zero_is_fine_with_running_statistics(backend, device):
    Problem.random((4, 3, 5, 5), torch.float64, device=device, training=False, eps=0.0).check()


def test_the_raw_ops_refuse_what_they_would_read_out_of_bounds(backend, device, with_residual):
    """Each tensor in turn with its last channel, its last column or its last bytes left out."""
    ops = get(backend).ops
    problem = Problem.random((4, 3, 5, 5), device=device, residual=with_residual).with_input_bias()
    outputs = raw_ops.forward(ops, problem)()
    for call in (
        raw_ops.forward(ops, problem),
        raw_ops.recompute(ops, problem, outputs),
        raw_ops.backward(ops, problem, outputs),
    ):
        call()
        for name, tensor in call.arguments.items():
            if name != "input" and isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                with pytest.raises((RuntimeError, ValueError), match=name):
                    call(**{name: tensor[..., :-1].contiguous()})


def test_the_recomputing_op_refuses_rounded_statistics(backend, device):
    ops, problem = get(backend).ops, Problem.random((4, 3, 5, 5), device=device, residual=False)
    recompute = raw_ops.recompute(ops, problem, raw_ops.forward(ops, problem)())
    with pytest.raises((RuntimeError, ValueError), match="float64"):
        recompute(statistics=recompute.arguments["statistics"].float())


# Large ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend, device, layout):
    """All rows of an image are alike, so that one row of each has the same statistics and gradients. Takes 17 GB."""
    shape = (2, 8, 11600, 11600)
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format)
    assert x.numel() > 2**31
    for n, c in itertools.product(range(2), range(8)):
        x[n, c] = torch.arange(11600, device=device).remainder(251).sub(125).div(60).add(c / 8 + n / 4)
    row = Problem.random((2, 8, 1, 11600), torch.bfloat16, device=device)
    residual = torch.randn(8, 1, 1, device=device)
    row = row.with_(input=x[:, :, :1], residual=residual, grad_output=row.grad_output[:1, :1])
    large = row.with_(input=x, residual=residual.expand(shape))
    some_rows = (slice(None), slice(None), slice(0, None, 1657))  # the first and the last among them

    def check(name, row, large, needs_grad):
        actual, expected = large.run(needs_grad=needs_grad)[name], row.reference(needs_grad=needs_grad)[name]
        assert_close(actual[some_rows], expected.expand(shape)[some_rows], torch.bfloat16, name=name)

    check("output", row, large, ())
    row, large = (p.with_(residual=None, grad_output=row.grad_output.expand(p.input.shape)) for p in (row, large))
    check("output", row, large, ())
    check("grad_input", row, large, ("input",))
