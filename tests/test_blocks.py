"""FusedResidual is Residual: the same parameters, numbers, modes, hooks and copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from resnet_fused import FusedResidual, Residual

from .problem import in_layout
from .tolerances import assert_close

# 8 channels: with fewer than 6, oneDNN's gradient of a strided 1x1 convolution in channels_last is garbage.
STRUCTURES = {
    "identity": {"input_channels": 8, "num_channels": 8},
    "conv3": {"input_channels": 8, "num_channels": 8, "use_1x1conv": True},
    "conv3-strides=2": {"input_channels": 8, "num_channels": 16, "use_1x1conv": True, "strides": 2},
    "conv3-strides=3": {"input_channels": 8, "num_channels": 5, "use_1x1conv": True, "strides": 3},
    "one-channel-broadcast": {"input_channels": 1, "num_channels": 8},
}
LAYERS = ("conv1", "conv2", "conv3", "bn1", "bn2")
PARAMETERS = [f"{layer}.{name}" for layer in LAYERS for name in ("weight", "bias")]


def _randomise(block):
    """Other values for everything that starts as 0 or 1."""
    for layer in block.modules():
        if isinstance(layer, _BatchNorm):
            for name, tensor in layer.state_dict().items():
                if name == "running_var":
                    tensor.uniform_(0.5, 4)
                elif name == "num_batches_tracked":
                    tensor.fill_(3)
                else:
                    tensor.normal_()


def _pair(device, structure="conv3", change=None, dtype=torch.float64, layout="contiguous", training=True):
    """(a plain block, a fused one of the same state), after ``change(block)`` of both."""
    blocks = Residual(**STRUCTURES[structure]), FusedResidual(**STRUCTURES[structure])
    for block in blocks:
        if change is not None:
            change(block)
        block.train(training).to(device, dtype)
        if layout == "channels_last":
            block.to(memory_format=torch.channels_last)
    plain, fused = blocks
    _randomise(plain)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)
    return plain, fused


def _problem(block, layout="contiguous", size=7):
    """(X, the output's gradient), for the block."""
    conv, like = block.conv1, next(block.parameters())
    x = torch.randn(6, conv.in_channels, size, size)
    grad_output = torch.randn(6, conv.out_channels, *2 * [-(-size // conv.stride[0])])
    return tuple(in_layout(tensor.to(like), layout) for tensor in (x, grad_output))


def _run(block, x, grad_output, x_needs_grad=True, call=None):
    """Output, gradients (None where there is none) and buffers by name."""
    block.zero_grad()
    x = x.detach().requires_grad_(x_needs_grad)
    y = (call or block)(x)
    y.backward(grad_output)
    grads = {f"grad {name}": parameter.grad for name, parameter in block.named_parameters()}
    return {"output": y, "grad X": x.grad, **grads, **dict(block.named_buffers())}


def _assert_equal(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if expected[name] is None:
            assert value is None, name
        else:
            torch.testing.assert_close(
                value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def _assert_equal_blocks(plain, fused, **kwargs):
    """Both give the same results, which are returned."""
    problem = _problem(plain)
    expected, actual = _run(plain, *problem, **kwargs), _run(fused, *problem, **kwargs)
    _assert_equal(actual, expected)
    return actual


# Numbers


def all_in_training(block):
    block.train()


def all_in_eval(block):
    block.eval()


def frozen_bn1(block):
    block.bn1.eval()


def frozen_bn2(block):
    block.bn2.eval()


def frozen_both_under_a_training_block(block):
    block.bn1.eval()
    block.bn2.eval()


def training_bn1_under_an_eval_block(block):
    block.eval()
    block.bn1.train()


MODES = [
    all_in_training,
    all_in_eval,
    frozen_bn1,
    frozen_bn2,
    frozen_both_under_a_training_block,
    training_bn1_under_an_eval_block,
]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_outputs_gradients_and_statistics_equal_the_plain_blocks(device, layout, structure, mode):
    plain, fused = _pair(device, structure, layout=layout)
    mode(plain), mode(fused)
    problem = _problem(plain, layout)
    expected, actual = _run(plain, *problem), _run(fused, *problem)
    _assert_equal(actual, expected)
    assert actual["output"].stride() == expected["output"].stride()
    assert 0.3 <= (expected["output"] == 0).double().mean() <= 0.7
    for layer in ("1", "2"):  # batch statistics cancel a bias, running ones do not
        trains = getattr(fused, f"bn{layer}").training
        assert bool(actual[f"grad conv{layer}.bias"].any()) is not trains
        assert bool(expected[f"grad conv{layer}.bias"].abs().max() > 1e-9) is not trains


@pytest.mark.parametrize("structure", ["identity", "conv3-strides=2"])
def test_float32_equals_float64_within_rounding(device, layout, training, structure):
    plain, fused = _pair(device, structure, dtype=torch.float32, layout=layout, training=training)
    problem = _problem(plain, layout)
    actual = _run(fused, *problem)
    expected = _run(plain.double(), *(tensor.double() for tensor in problem))
    for name, value in actual.items():
        if training and name in ("grad conv1.bias", "grad conv2.bias"):
            assert torch.equal(value, torch.zeros_like(value))  # a tensor of zeros: weight decay and DDP need one
        else:
            assert_close(value, expected[name], torch.float32, 5, name)


def without_affine(block):
    block.bn1 = nn.BatchNorm2d(8, affine=False)
    block.bn2 = nn.BatchNorm2d(8, affine=False)


def weight_without_bias(block):
    block.bn1.bias = block.bn2.bias = None


def convolutions_without_bias(block):
    block.conv1.bias = block.conv2.bias = block.conv3.bias = None


def only_conv3_has_a_bias(block):
    without_affine(block)
    block.conv1.bias = block.conv2.bias = None


def without_statistics(block):
    block.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    block.bn2 = nn.BatchNorm2d(8, track_running_stats=False)


def tracking_switched_off(block):
    block.bn1.track_running_stats = block.bn2.track_running_stats = False


def without_counters(block):
    block.bn1.num_batches_tracked = block.bn2.num_batches_tracked = None


def counters_that_the_operator_refuses(block):
    for bn in (block.bn1, block.bn2):
        bn.num_batches_tracked = bn.num_batches_tracked.float()


def cumulative_average(block):
    block.bn1.momentum = block.bn2.momentum = None


def cumulative_average_without_counters(block):
    cumulative_average(block)
    without_counters(block)


def cumulative_average_untracked(block):
    cumulative_average(block)
    tracking_switched_off(block)


def other_momenta_and_eps(block):
    block.bn1.momentum, block.bn2.momentum = 1.5, 0.0
    block.bn1.eps, block.bn2.eps = 0.3, 2.0


def other_convolutions(block):
    block.conv1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
    block.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")


def weight_norm(block):
    for conv in (block.conv1, block.conv2, block.conv3):
        parametrizations.weight_norm(conv)


def pruned(block):
    for layer, name in ((block.conv1, "weight"), (block.conv2, "bias"), (block.conv3, "weight"), (block.bn2, "weight")):
        prune.random_unstructured(layer, name, amount=0.5)


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 0.5


class DoubledConv2d(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def a_subclass_as_bn1(block):
    block.bn1 = ShiftedBatchNorm2d(8)


def a_subclass_as_bn2(block):
    block.bn2 = ShiftedBatchNorm2d(8)


def subclasses_of_the_convolution(block):
    block.conv1, block.conv2 = DoubledConv2d(8, 8, 3, padding=1), DoubledConv2d(8, 8, 3, padding=1)
    block.conv3 = DoubledConv2d(8, 8, 1)


def a_forward_on_each_instance(block):
    for name in LAYERS:
        layer = getattr(block, name)
        layer.forward = lambda X, forward=layer.forward: 1.5 * forward(X)


def layers_of_other_kinds(block):
    block.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
    block.bn1, block.bn2 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
    block.conv3 = nn.AvgPool2d(3, 1, 1)


CHANGES = [
    without_affine,
    weight_without_bias,
    convolutions_without_bias,
    only_conv3_has_a_bias,
    without_statistics,
    tracking_switched_off,
    without_counters,
    counters_that_the_operator_refuses,
    cumulative_average,
    cumulative_average_without_counters,
    cumulative_average_untracked,
    other_momenta_and_eps,
    other_convolutions,
    weight_norm,
    pruned,
    a_subclass_as_bn1,
    a_subclass_as_bn2,
    subclasses_of_the_convolution,
    a_forward_on_each_instance,
    layers_of_other_kinds,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_block_equals_the_plain_one_with_that_change(device, training, change):
    _assert_equal_blocks(*_pair(device, change=change, training=training))


def test_a_converted_sync_batch_norm_is_called_as_a_module(device):
    blocks = _pair(device, training=False)
    _assert_equal_blocks(*(nn.SyncBatchNorm.convert_sync_batchnorm(block) for block in blocks))


def test_tracking_switched_off_leaves_the_buffers_bit_identical(device, training):
    _, fused = _pair(device, training=training)
    tracking_switched_off(fused)
    before = copy.deepcopy(dict(fused.named_buffers()))
    _run(fused, *_problem(fused))
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("frozen", [*PARAMETERS, "X", "all"])
def test_what_needs_no_gradient_gets_none_and_the_rest_the_plain_blocks(device, training, frozen):
    def freeze(block):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(frozen not in (name, "all"))

    blocks = _pair(device, change=freeze, training=training)
    results = _assert_equal_blocks(*blocks, x_needs_grad=frozen != "X")
    for name, value in results.items():
        if name.startswith("grad "):
            assert (value is None) is (name == f"grad {frozen}" or (frozen == "all" and name != "grad X")), name


def test_an_empty_batch_counts_and_gives_zero_gradients(device, layout):
    _, fused = _pair(device, layout=layout)
    before = copy.deepcopy(dict(fused.named_buffers()))
    results = _run(fused, *(tensor[:0] for tensor in _problem(fused, layout)))
    assert results["output"].shape == (0, 8, 7, 7)
    for name, value in results.items():
        if name.startswith("grad "):
            assert value is not None and not value.any(), name
        elif name in before:
            assert torch.equal(value, before[name] + ("num_batches_tracked" in name)), name


@pytest.mark.parametrize("shape", [(8, 7, 7), (2, 8, 7, 7, 7), (2, 8)], ids=str)
def test_an_input_that_is_not_4d_is_refused_as_the_plain_block_refuses_it(device, shape):
    messages = []
    for block in _pair(device):
        with pytest.raises((ValueError, RuntimeError)) as error:
            block(torch.randn(shape, dtype=torch.float64, device=device))
        messages.append(str(error.value))
        assert block.bn1.num_batches_tracked == 3
    assert messages[0] == messages[1]


@pytest.mark.parametrize("hooked", [False, True])
def test_an_input_that_cannot_be_added_to_the_output_is_refused(device, hooked):
    for block in _pair(device, change=lambda block: setattr(block, "conv3", None)):
        block.conv1.stride = (7, 7)  # (6, 8, 1, 1) += (6, 8, 7, 7)
        if hooked:
            block.bn2.register_forward_hook(lambda layer, args, output: None)
        with pytest.raises(RuntimeError, match="shape|size"):
            block(_problem(block)[0])


# Half precision: no further from float64 than the plain block


def _clip_whole_channels(bn):
    """So that no ReLU lies so near to 0 that rounding switches it: a few of those would decide the errors."""
    bn.weight.data.clamp_(-1, 1)
    bn.bias.data.copy_(10 * (-1.0) ** torch.arange(len(bn.bias)))


def _assert_no_worse(plain, fused, layout, half, call=lambda block: block):
    for block in (plain, fused):
        _clip_whole_channels(block.bn1), _clip_whole_channels(block.bn2)
    x, grad_output = _problem(plain, layout, size=14)
    reference = _run(copy.deepcopy(plain).double(), x.double(), grad_output.double())
    expected, actual = (_run(block, x, grad_output.to(half), call=call(block)) for block in (plain, fused))
    assert torch.equal(expected["output"] > 0, reference["output"] > 0)

    def error(results, name):
        return (results[name].double() - reference[name]).square().mean().sqrt()

    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        if plain.training and name in ("grad conv1.bias", "grad conv2.bias"):
            assert not value.any()  # exactly 0
        elif value.is_floating_point():
            # A channel's sum, unlike a mean over many values, may by chance be nearly exact in the plain block.
            times, rounding = (3, half) if value.dim() == 1 else (1.3, value.dtype)
            allowed = times * error(expected, name) + torch.finfo(rounding).eps * reference[name].square().mean().sqrt()
            assert error(actual, name) <= allowed, name


@pytest.mark.parametrize("structure", ["identity", "conv3-strides=2"])
def test_under_autocast_it_is_as_exact_as_the_plain_block(device, layout, training, structure):
    def under_autocast(block):
        return torch.autocast(torch.device(device).type, torch.bfloat16)(block.__call__)

    blocks = _pair(device, structure, dtype=torch.float32, layout=layout, training=training)
    _assert_no_worse(*blocks, layout, torch.bfloat16, under_autocast)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_norm_dtype", [None, torch.float32], ids=["all-half", "float32-batch-norms"])
def test_a_half_block_is_as_exact_as_the_plain_one(device, layout, training, half, batch_norm_dtype):
    blocks = _pair(device, dtype=half, layout=layout, training=training)
    for block in blocks:
        block.bn1.to(batch_norm_dtype), block.bn2.to(batch_norm_dtype)
    _assert_no_worse(*blocks, layout, half)


# Copies


def through_pickle(block):
    return pickle.loads(pickle.dumps(block))


def through_torch_save(block, weights_only=False):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("structure", ["identity", "conv3"])
def test_a_copy_is_a_fused_block_of_its_own(device, structure, copy_of):
    _, fused = _pair(device, structure)
    fused.bn1.eval()
    copied = copy_of(fused)
    assert type(copied) is FusedResidual and not copied.bn1.training
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in fused.parameters()}
    _assert_equal_blocks(fused, copied)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_checkpoint_on_disk_loads_strictly_both_ways(structure):
    for saved, loaded in ((Residual, FusedResidual), (FusedResidual, Residual)):
        source, target = saved(**STRUCTURES[structure]), loaded(**STRUCTURES[structure])
        _randomise(source)
        target.load_state_dict(through_torch_save(source.state_dict(), weights_only=True), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name


def test_one_seed_initialises_both_alike():
    blocks = []
    for block_class in (Residual, FusedResidual):
        torch.manual_seed(1)
        blocks.append(block_class(**STRUCTURES["conv3"]))
    for parameter, other in zip(*(block.parameters() for block in blocks), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("structure", ["identity", "conv3"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_from_residual_shares_the_layers_and_keeps_their_modes(device, structure, mode):
    plain, _ = _pair(device, structure)
    mode(plain)
    before = copy.deepcopy(plain)
    fused = FusedResidual.from_residual(plain)
    assert type(fused) is FusedResidual
    assert dict(fused.named_children()) == dict(plain.named_children())  # modules are equal if they are the same
    assert [layer.training for layer in fused.modules()] == [layer.training for layer in before.modules()]
    _assert_equal_blocks(before, fused)


# Hooks


def _values(tensors):
    return [tensor.detach().clone() for tensor in tensors if tensor is not None]


HOOKS = {
    "forward_pre": lambda layer, record: layer.register_forward_pre_hook(lambda _, args: record(*args)),
    "forward": lambda layer, record: layer.register_forward_hook(lambda _, args, output: record(*args, output)),
    "full_backward_pre": lambda layer, record: layer.register_full_backward_pre_hook(lambda _, grads: record(*grads)),
    "full_backward": lambda layer, record: layer.register_full_backward_hook(
        lambda _, grads_in, grads_out: record(*grads_in, *grads_out)
    ),
}


@pytest.mark.parametrize(
    ("layer", "hook"),
    [(layer, hook) for layer in LAYERS for hook in HOOKS if (layer, hook[:4]) != ("bn2", "full")],
)
def test_a_hook_on_a_layer_sees_what_the_plain_blocks_sees_and_changes_nothing(device, training, layer, hook):
    seen = [], []
    blocks = _pair(device, training=training)
    for block, calls in zip(blocks, seen, strict=True):
        HOOKS[hook](getattr(block, layer), lambda *tensors, calls=calls: calls.append(_values(tensors)))
    _assert_equal_blocks(*blocks)
    ((expected,), (actual,)) = seen
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_hook_may_change_what_a_layer_returns(device, training):
    blocks = _pair(device, training=training)
    for block in blocks:
        for layer in LAYERS:
            getattr(block, layer).register_forward_hook(lambda layer, args, output: 1.5 * output)
    _assert_equal_blocks(*blocks)


@pytest.mark.parametrize("removed", [False, True])
def test_a_global_hook_sees_every_layer(device, removed):
    """And, once it is removed, the block runs fused again."""
    calls = [], []
    for block, names in zip(_pair(device), calls, strict=True):
        handle = register_module_forward_hook(lambda layer, args, output, names=names: names.append(type(layer)))
        if removed:
            handle.remove()
        block(_problem(block)[0])
        handle.remove()
    plain, fused = calls
    assert fused[:-1] == plain[:-1]  # the last is the block itself
    assert len(fused) == (0 if removed else 6)


# More than one call


def test_two_calls_before_one_backward_keep_their_own_statistics(device):
    plain, fused = _pair(device)
    (x, grad_output), (other, _) = _problem(plain), _problem(plain)
    expected, actual = (_run(b, x, grad_output, call=lambda x, b=b: b(x) * b(x - other)) for b in (plain, fused))
    _assert_equal(actual, expected)
    assert actual["bn1.num_batches_tracked"] == 5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_and_counts_as_the_plain_block(device, use_reentrant):
    plain, fused = _pair(device)
    problem = _problem(plain)
    expected, actual = (
        _run(block, *problem, call=lambda x, block=block: checkpoint(block, x, use_reentrant=use_reentrant))
        for block in (plain, fused)
    )
    _assert_equal(actual, expected)
    assert actual["bn1.num_batches_tracked"] == 5


EDITS = {
    "X": lambda block, x, y: x,
    "output": lambda block, x, y: y,
    "bn1.weight": lambda block, x, y: block.bn1.weight,
    "bn2.weight": lambda block, x, y: block.bn2.weight,
    "conv2.weight": lambda block, x, y: block.conv2.weight,
}


@pytest.mark.parametrize("edited", EDITS)
def test_an_in_place_edit_of_what_backward_needs_is_autograds_error(backend, device, edited):
    for block in _pair(device):
        if edited == "output" and isinstance(block, FusedResidual):
            continue  # its backward needs the mask in its place
        x, grad_output = _problem(block)
        y = block(x)
        with torch.no_grad():
            EDITS[edited](block, x, y).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad_output)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_values_and_statistics_are_the_same(device, training, mode):
    plain, fused = _pair(device, training=training)
    x, _ = _problem(plain)
    expected = plain(x)
    with mode():
        actual = fused(x)
    assert not actual.requires_grad
    _assert_equal(
        {"output": actual, **dict(fused.named_buffers())}, {"output": expected, **dict(plain.named_buffers())}
    )
