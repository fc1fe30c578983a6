"""A fused model computes what the plain one does, however it is written; and its batch norms run fused."""

import functools
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.densenet import _DenseLayer
from torchvision.models.resnet import Bottleneck

from resnet_fused import FusedResidual, Residual, deferred, resnet18, use_backend

from .models import (
    Layers,
    assert_equal,
    assert_same_buffers,
    assert_same_numbers,
    assert_same_outputs,
    make_block,
    make_input,
    prepared,
    residual_block,
    states_of,
    twins,
)
from .problem import in_layout

# Spellings

ADDS = {
    "Y += X": lambda Y, X: functools.reduce(lambda a, b: a.__iadd__(b), [X], Y),
    "Y + X": lambda Y, X: Y + X,
    "X + Y": lambda Y, X: X + Y,
    "torch.add": lambda Y, X: torch.add(Y, X),
    "torch.add, alpha=1": lambda Y, X: torch.add(Y, X, alpha=1),
    "add": lambda Y, X: X.add(Y),
    "add_": lambda Y, X: Y.add_(X),
}
RELUS = {
    "F.relu": lambda self, Y: F.relu(Y),
    "F.relu, in place": lambda self, Y: F.relu(Y, inplace=True),
    "F.relu, in place by position": lambda self, Y: F.relu(Y, True),
    "F.relu, by name": lambda self, Y: F.relu(input=Y),
    "F.relu_": lambda self, Y: F.relu_(Y),
    "torch.relu": lambda self, Y: torch.relu(Y),
    "torch.relu, by name": lambda self, Y: torch.relu(input=Y),
    "torch.relu_": lambda self, Y: torch.relu_(Y),
    "relu": lambda self, Y: Y.relu(),
    "relu_": lambda self, Y: Y.relu_(),
    "nn.ReLU": lambda self, Y: self.relu(Y),
    "nn.ReLU, in place": lambda self, Y: self.relu_in_place(Y),
}


def spelled(relu=RELUS["F.relu"], add=ADDS["Y + X"]):
    def forward(self, X):
        identity = X if self.conv3 is None else self.conv3(X)
        Y = self.bn2(self.conv2(relu(self, self.bn1(self.conv1(X)))))
        return relu(self, add(Y, identity))

    return forward


SPELLINGS = {f"add as {name}": spelled(add=add) for name, add in ADDS.items()}
SPELLINGS |= {f"relu as {name}": spelled(relu=relu) for name, relu in RELUS.items()}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_of_add_and_relu_is_fused(forward, calls):
    plain, fused = twins(Layers(forward))
    calls.clear()
    assert_same_numbers(fused, plain)
    assert calls == ["batch_norm_relu", "batch_norm_add_relu"] * (len(calls) // 2)
    assert len(calls) >= 4
    assert states_of(fused) == {"bn1": "relu", "bn2": "add+relu", "bn3": "may fuse"}


# Forwards, and what the batch norms of each do


def no_last_relu(self, X):
    return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X


def no_first_relu(self, X):
    return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(X)))) + X)


def pre_activation(self, X):
    return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(X)))))) + X


def one_batch_norm_twice(self, X):
    return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X)


def called_twice_before_either_is_used(self, X):
    Y, Z = self.bn1(self.conv1(X)), self.bn1(self.conv2(X))
    return F.relu(Y) + F.relu(Z)


def called_in_eval_before_it_is_used(self, X):
    Y = self.bn1(self.conv1(X))
    training = self.bn1.training
    with torch.no_grad():
        Z = F.relu(self.bn1.eval()(X))
    self.bn1.train(training)
    return F.relu(Y) + Z


def used_in_another_order_than_called(self, X):
    Y, Z = self.bn1(self.conv1(X)), self.bn2(self.conv2(X))
    return F.relu(Z + X) + F.relu(Y)


def three_inputs_to_the_add(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X + X)


def scalar_added(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + 1)


def twice_the_residual(self, X):
    return F.relu(torch.add(self.bn1(X), X, alpha=2))


def added_to_itself(self, X):
    Y = self.bn1(X)
    return F.relu(Y + Y)


def into_a_plain_tensor(self, X):
    Z = self.conv1(X)
    Z += self.bn1(X)
    return F.relu(Z)


def dropout_in_training_only(self, X):
    Y = self.bn1(self.conv1(X))
    if self.training:
        Y = Y * 2
    return F.relu(self.bn2(Y) + X)


def residual_in_training_only(self, X):
    Y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))
    return F.relu(Y + X if self.training else Y)


def relu6_at_the_end(self, X):
    return F.relu6(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X)


def counts_twice(self, X):
    Y = self.conv1(X)
    self.bn1(Y)
    return F.relu(self.bn1(Y))


def never_used(self, X):
    self.bn1(self.conv1(X))
    return F.relu(self.bn2(X))


def assigns_to_a_buffer(self, X):
    self.buffer += 1
    return residual_block(self, X)


def keeps_its_output(self, X):
    self.kept = self.bn1(X)
    return F.relu(self.kept)


def rectified_and_returned(self, X):
    Y = self.bn1(X)
    return F.relu(Y), Y


def rectified_twice(self, X):
    Y = self.bn1(X)
    return F.relu(Y) + F.relu(Y)


def rectified_twice_with_another_sum(self, X):
    Y = self.bn1(X)
    return F.relu(Y) + F.relu(Y + X)


def used_by_something_else_too(self, X):
    Y = self.bn1(X)
    return F.relu(Y) * Y.sigmoid()


def sum_used_twice(self, X):
    Y = self.bn1(X) + X
    return F.relu(Y) + Y


def batch_norm_used_after_its_sum(self, X):
    Y = self.bn1(X)
    Z = F.relu(Y + X)
    return Z + Y


def returns_what_the_relu_changed(self, X):
    Y = self.bn1(X)
    F.relu_(Y)
    return Y


def returns_what_the_sum_changed(self, X):
    Y = self.bn1(X)
    Z = Y
    Y += X
    return F.relu(Y) + Z


def returned(self, X):
    return self.bn1(X)


def view_between(self, X):
    return F.relu(self.bn1(X).flatten(1))


def indexed(self, X):
    Y = self.bn1(X)
    Y[:, 0] = 0
    return F.relu(Y)


def depends_on_values(self, X):
    Y = self.bn1(X)
    return F.relu(Y) if Y.sum() > 0 else F.relu(Y + X)


def depends_on_shapes(self, X):
    Y = self.bn1(X)
    return F.relu(Y + X) if Y.shape == X.shape and Y.stride() == X.stride() and Y.dtype == X.dtype else X


def without_gradients(self, X):
    with torch.no_grad():
        Y = F.relu(self.bn1(X))
    return F.relu(self.bn2(X) + Y)


def relu_under_another_mode(self, X):
    Y = self.bn1(X)
    with torch.no_grad():
        Z = F.relu(Y)
    return Z + X


def checkpointed(self, X):
    return checkpoint(functools.partial(residual_block, self), X, use_reentrant=False)


def checkpointed_reentrantly(self, X):
    return checkpoint(functools.partial(residual_block, self), X, use_reentrant=True)


def relu_checkpointed_alone(self, X):
    return checkpoint(F.relu, self.bn1(X), use_reentrant=False)


def relu_checkpointed_alone_reentrantly(self, X):
    return checkpoint(F.relu, self.bn1(X), use_reentrant=True)


def relu_checkpointed_alone_within_a_checkpoint(self, X):
    return checkpoint(functools.partial(relu_checkpointed_alone, self), X, use_reentrant=False)


def sum_checkpointed_alone(self, X):
    return checkpoint(lambda Y: F.relu(Y + X), self.bn1(self.conv1(X)), use_reentrant=False)


def two_batch_norms(self, X):
    return F.relu(self.bn1(self.conv1(X)) + self.bn2(X))


def two_batch_norms_second_first(self, X):
    Y = self.bn2(X)
    Z = self.bn1(self.conv1(X))
    Z += Y
    return Z.relu_()


def two_batch_norms_without_statistics(self, X):
    self.bn1.track_running_stats = self.bn2.track_running_stats = False
    return F.relu(self.bn1(self.conv1(X)) + self.bn2(X))


def two_batch_norms_in_modes_of_their_own(self, X):
    self.bn2.eval()
    return F.relu(self.bn1(self.conv1(X)) + self.bn2(X))


def second_of_two_used_again(self, X):
    Z = self.bn2(X)
    return F.relu(self.bn1(self.conv1(X)) + Z) * Z


def two_batch_norms_and_a_tensor(self, X):
    return F.relu(self.bn1(self.conv1(X)) + (self.bn2(X) + X))


def in_another_thread(self, X):
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(residual_block(self, X)))
    thread.start()
    thread.join()
    return outputs[0]


RELU, ADD = "relu", "add+relu"
BLOCK = {"bn1": RELU, "bn2": ADD}
FORWARDS = {  # and what the batch norms do afterwards: a state, or the beginning of a reason
    residual_block: BLOCK,
    no_last_relu: {"bn1": RELU, "bn2": "plain: "},
    no_first_relu: {"bn1": "plain: its output went to conv2d", "bn2": ADD},
    pre_activation: {"bn1": RELU, "bn2": RELU},
    one_batch_norm_twice: {"bn1": ""},
    called_twice_before_either_is_used: {"bn1": ""},
    used_in_another_order_than_called: {"bn1": RELU, "bn2": ADD},
    three_inputs_to_the_add: {"bn1": RELU, "bn2": "plain: its output went to add"},
    scalar_added: {"bn1": RELU, "bn2": "plain: its output went to add"},
    twice_the_residual: {"bn1": "plain: its output went to add"},
    added_to_itself: {"bn1": "plain: its output went to add"},
    into_a_plain_tensor: {"bn1": "plain: its output went to "},
    dropout_in_training_only: {"bn1": "plain: its output went to mul", "bn2": ADD},
    residual_in_training_only: {"bn1": RELU, "bn2": ADD},
    relu6_at_the_end: {"bn1": RELU, "bn2": "plain: its output went to relu6"},
    counts_twice: {"bn1": ""},
    never_used: {"bn1": "plain: its output was not seen to go to a ReLU", "bn2": RELU},
    assigns_to_a_buffer: BLOCK,
    keeps_its_output: {"bn1": "plain: its output is kept"},
    rectified_and_returned: {"bn1": "plain: "},
    rectified_twice: {"bn1": "plain: its output went to relu"},
    rectified_twice_with_another_sum: {"bn1": "plain: its output went to add"},
    used_by_something_else_too: {"bn1": "plain: its output went to sigmoid"},
    sum_used_twice: {"bn1": "plain: its output went to add"},
    batch_norm_used_after_its_sum: {"bn1": "plain: its output went to add"},
    returns_what_the_relu_changed: {"bn1": "plain: its output went to "},
    returns_what_the_sum_changed: {"bn1": "plain: its output went to add"},
    returned: {"bn1": "plain: "},
    view_between: {"bn1": "plain: its output went to flatten"},
    indexed: {"bn1": "plain: its output went to __setitem__"},
    depends_on_values: {"bn1": "plain: its output went to sum"},
    depends_on_shapes: {"bn1": ADD},
    without_gradients: {"bn1": RELU, "bn2": ADD},
    relu_under_another_mode: {"bn1": "plain: "},
    checkpointed: BLOCK,
    checkpointed_reentrantly: {"bn1": "", "bn2": ""},
    relu_checkpointed_alone: {"bn1": "plain: "},
    relu_checkpointed_alone_reentrantly: {"bn1": "plain: "},
    relu_checkpointed_alone_within_a_checkpoint: {"bn1": "plain: "},
    sum_checkpointed_alone: {"bn1": "plain: "},
    two_batch_norms: {"bn1": ADD, "bn2": ADD},
    two_batch_norms_second_first: {"bn1": ADD, "bn2": ADD},
    two_batch_norms_without_statistics: {"bn1": ADD, "bn2": ADD},
    two_batch_norms_in_modes_of_their_own: {"bn1": ADD, "bn2": ""},
    second_of_two_used_again: {"bn1": ADD, "bn2": "plain: its output went to mul"},
    called_in_eval_before_it_is_used: {"bn1": "plain: its statistics were read"},
    two_batch_norms_and_a_tensor: {"bn1": "add+relu", "bn2": "plain: "},
    in_another_thread: BLOCK,
}


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:None of the inputs have:UserWarning")
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_a_forward_of_any_kind_keeps_its_numbers(forward):
    plain, fused = twins(Layers(forward))
    for _ in range(2):
        assert_same_numbers(fused, plain, clips=False)
    states = states_of(fused)
    for name, state in FORWARDS[forward].items():
        assert states[name].startswith(state), (name, states[name])


# Where a batch norm hides

CONV, BN, RELU_LAYER = lambda: nn.Conv2d(6, 6, 1), lambda: nn.BatchNorm2d(6), nn.ReLU
STEMS = {
    "Sequential": lambda: nn.Sequential(CONV(), BN(), RELU_LAYER()),
    "Sequential before the ReLU": lambda: nn.Sequential(nn.Sequential(CONV(), BN()), RELU_LAYER(inplace=True)),
    "Identity between": lambda: nn.Sequential(BN(), nn.Identity(), nn.Sequential(nn.Identity()), RELU_LAYER()),
    "subclass": lambda: type("Stem", (nn.Sequential,), {})(CONV(), BN(), RELU_LAYER()),
    "BasicBlock": lambda: make_block(downsample=False),
    "BasicBlock that downsamples": make_block,
    "Bottleneck": lambda: Bottleneck(6, 2, downsample=nn.Conv2d(6, 8, 1)),
    "Residual": lambda: Residual(6, 6, use_1x1conv=True),
    "shared ReLU": lambda: nn.Sequential(*[CONV(), BN(), relu := RELU_LAYER(inplace=True)], CONV(), BN(), relu),
    "shared convolutions": lambda: nn.Sequential(conv := CONV(), BN(), RELU_LAYER(), conv, BN(), RELU_LAYER()),
}


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS.keys())
def test_every_batch_norm_of_a_model_is_fused(stem):
    plain, fused = twins(prepared(stem()))
    assert_same_numbers(fused, plain)
    assert_same_numbers(fused, plain, create_graph=True, tolerance=1e-7)
    assert set(states_of(fused).values()) <= {"relu", "add+relu", "folded into its convolution"}  # in eval, the last
    assert type(fused) is (FusedResidual if isinstance(plain, Residual) else type(plain))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))

    def forward(self, X):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            X = bn(conv(X)).relu_()
        return X


def test_layers_in_lists_that_may_grow():
    plain, fused = twins(prepared(Lists()))
    assert set(states_of(fused).values()) == {"relu"}
    for model in (plain, fused):
        model.convs.append(model.convs[0])
        model.bns.append(model.bns[0])
    assert_same_numbers(fused, plain)


def test_a_child_may_return_none_and_arguments_may_be_anything():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.nothing = nn.BatchNorm2d(6), nn.Identity()

        def forward(self, X, skips=(), *, mask=None):
            Y = F.relu(self.bn(X.tensors if hasattr(X, "tensors") else X))
            nothing = self.nothing(mask)
            return sum(skips, Y) if nothing is None else Y * nothing

    plain, fused = twins(prepared(Odd()))
    X = make_input()
    for args, kwargs in (((X, [X, X]), {}), ((X,), {"mask": X}), ((type("Nested", (), {"tensors": X}),), {})):
        assert_equal(fused(*args, **kwargs), plain(*args, **kwargs))
    assert states_of(fused) == {"bn": "relu"}


def test_a_dense_layer_takes_tensors_and_lists():
    plain, fused = twins(prepared(_DenseLayer(6, 4, 2, 0.0)))
    X = make_input()
    for argument in (X, [X], [X[:, :3], X[:, 3:]]):
        assert_equal(fused(argument), plain(argument))
    assert states_of(fused) == {"norm1": "relu", "norm2": "relu"}


BATCHES = {
    "2d": (lambda: nn.BatchNorm1d(6), (8, 6)),
    "2d, transposed": (lambda: nn.BatchNorm1d(6), (6, 8)),
    "3d": (lambda: nn.BatchNorm1d(6), (4, 6, 5)),
    "5d": (lambda: nn.BatchNorm3d(6), (2, 6, 3, 2, 3)),
    "without affine": (lambda: nn.BatchNorm2d(6, affine=False), (3, 6, 5, 7)),
    "without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (3, 6, 5, 7)),
    "momentum None": (lambda: nn.BatchNorm2d(6, momentum=None), (3, 6, 5, 7)),
    "one channel": (lambda: nn.BatchNorm2d(1), (4, 1, 9, 9)),
    "one position": (lambda: nn.BatchNorm2d(6), (8, 6, 1, 1)),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_batch_norms_of_any_kind_and_layout(name, layout):
    make, shape = BATCHES[name]

    def inputs(seed):
        X = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if name == "2d, transposed":
            return (X.t(),)
        if layout == "sliced":
            return (torch.stack([X, X], -1)[..., 0],)
        return (in_layout(X, layout),)

    batch_norm = prepared(make()) if name != "without affine" else make().double()
    plain, fused = twins(nn.Sequential(batch_norm, nn.ReLU()), inputs)
    assert_same_numbers(fused, plain, inputs, clips=False)
    for i in range(2):  # of the batch norm's own output, too
        assert fused[: i + 1](*inputs(1)).stride() == plain[: i + 1](*inputs(1)).stride()


def test_what_eager_refuses_is_refused_in_the_same_words():
    for batch_norm, shapes in (
        (nn.BatchNorm2d(6), [(1, 6, 1, 1), (2, 5, 3, 3), (2, 6, 3)]),
        (nn.BatchNorm1d(6), [(1, 6)]),
    ):
        X = torch.randn(4, 6, *[3] * (2 * isinstance(batch_norm, nn.BatchNorm2d)), dtype=torch.float64)
        plain, fused = twins(nn.Sequential(batch_norm, nn.ReLU()).double(), lambda seed, X=X: (X,))
        for model in (plain, fused):
            with pytest.raises(ValueError, match="more than 1 value per channel"):  # by the batch norm, not its ReLU
                model[0](torch.randn(shapes[0], dtype=torch.float64))
        for shape in shapes:
            errors = []
            for model in (plain, fused):
                with pytest.raises((RuntimeError, ValueError)) as error:
                    model(torch.randn(shape, dtype=torch.float64))
                errors.append((type(error.value), str(error.value)))
            assert errors[0] == errors[1]
        assert_same_buffers(fused, plain)


# The sum


class Doubling(torch.Tensor):
    """Whose sums are twice as large."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs)
        return output * 2 if "add" in function.__name__ and output is not NotImplemented else output


RESIDUALS = {
    "alike": lambda: make_input(2),
    "channels_last": lambda: make_input(2).to(memory_format=torch.channels_last),
    "broadcast": lambda: make_input(2)[:1, :, :1],
    "float32": lambda: make_input(2).float(),
    "wider": lambda: torch.randn(2, 3, 6, 5, 7, dtype=torch.float64),
    "a number": lambda: 0.5,
    "a parameter": lambda: nn.Parameter(make_input(2)),
    "of inference mode": torch.inference_mode()(lambda: make_input(2)),
    "of a class of its own": lambda: make_input(2).as_subclass(Doubling),
}


@pytest.mark.parametrize("add", [ADDS["X + Y"], ADDS["Y += X"]], ids=["X + Y", "Y += X"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_residual_of_any_kind_gives_the_sum_that_eager_gives(add, residual):
    kept = [make_input(2)]
    plain, fused = twins(Layers(lambda self, X: F.relu(add(self.bn1(X), kept[0]))))
    assert states_of(fused)["bn1"] == "add+relu"
    kept[0] = RESIDUALS[residual]()
    _, unlearnt = twins(plain, learns=False)
    if residual == "wider" and add is ADDS["Y += X"]:
        for model in (plain, fused, unlearnt):
            with pytest.raises(RuntimeError, match="broadcast"):
                model(make_input())
        return
    for X in (make_input(), make_input().to(memory_format=torch.channels_last)):
        expected = plain(X)
        for Y in (fused(X), unlearnt(X)):
            assert (Y.stride(), Y.dtype, type(Y)) == (expected.stride(), expected.dtype, type(expected))
            assert_equal(Y, expected)
    assert_same_buffers(fused, plain)
    assert_same_buffers(unlearnt, plain)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_types_promote_as_in_the_plain_block(training):
    plain, fused = twins(Layers(spelled(), use_1x1conv=False))
    plain, fused = plain.float().train(training), fused.float().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        Y, other_Y = fused(make_input().float()), plain(make_input().float())
    assert Y.dtype == other_Y.dtype == torch.float32  # a bfloat16 sum with a float32 input
    torch.testing.assert_close(Y, other_Y, rtol=0, atol=2**-5)
    for dtype in (torch.bfloat16, torch.float16):
        Y, other_Y = fused.to(dtype)(make_input().to(dtype)), plain.to(dtype)(make_input().to(dtype))
        assert Y.dtype == other_Y.dtype == dtype
        torch.testing.assert_close(Y, other_Y, rtol=0, atol=2**-4)


def changes_the_input_before_the_add(self, X):
    Y = self.bn1(X)
    return F.relu(Y + X.mul_(2))


def changes_the_residual_before_the_relu(self, X):
    residual = X * 3
    Y = self.bn1(X) + residual
    residual.mul_(2)
    return F.relu(Y)


def changes_the_output_before_the_add(self, X):
    Y = self.bn1(X)
    Y.mul_(2)
    return F.relu(Y + X)


def changes_the_output_after_the_add(self, X):
    Y = self.bn1(X)
    Z = Y + X
    Y.mul_(2)
    return F.relu(Z)


def changes_the_input_after_the_relu(self, X):
    Y = F.relu(self.bn1(X))
    X.mul_(2)
    return Y + X


def reads_the_statistics_before_the_add(self, X):
    Y = self.bn1(X)
    return F.relu(Y + X * self.bn1.running_mean.view(-1, 1, 1))


def reads_the_state_dict_before_the_relu(self, X):
    Y = self.bn1(X)
    scale = self.state_dict()["bn1.running_mean"].view(-1, 1, 1) + dict(self.named_buffers())["bn1.num_batches_tracked"]
    return F.relu(Y) * scale


def shares_statistics(self, X):
    self.bn2._buffers["running_mean"] = self.bn1._buffers["running_mean"]
    Y, Z = self.bn1(X), self.bn2(self.conv1(X))
    return F.relu(Z) + F.relu(Y)


ORDERS = [
    changes_the_input_before_the_add,
    changes_the_residual_before_the_relu,
    changes_the_output_before_the_add,
    changes_the_output_after_the_add,
    changes_the_input_after_the_relu,
    reads_the_statistics_before_the_add,
    reads_the_state_dict_before_the_relu,
    shares_statistics,
]


@pytest.mark.parametrize("forward", ORDERS, ids=lambda forward: forward.__name__)
def test_the_order_of_changes_is_kept(forward):
    with torch.no_grad():
        plain, fused = twins(Layers(forward))
    for _ in range(3):
        assert_same_outputs(fused, plain)


def test_an_output_that_nobody_uses_counts_when_it_dies():
    plain, fused = twins(Layers(lambda self, X: F.relu(self.bn1(X))))
    for model in (plain, fused):
        model.bn1(make_input(3))
    assert_same_buffers(fused, plain)
    assert vars(fused.bn1)["_learned"].defers


# Backends, threads, networks


def test_a_backend_asked_for_by_name_still_refuses_another_device():
    _, fused = twins(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), learns=False)
    fused.to("meta")
    with use_backend("cpu"), pytest.raises(ValueError, match="serves inputs on cpu, got one on meta"):
        fused(torch.randn(2, 6, 3, 3, device="meta"))


def test_the_eager_backend_runs_the_plain_layers(calls):
    plain, fused = twins(make_block())
    calls.clear()
    with use_backend("eager"):
        assert_same_numbers(fused, plain)
    assert calls == []


def test_what_is_learnt_waits_for_a_checkpointed_call_to_be_repeated():
    """Which is to save what it saved: otherwise PyTorch raises a CheckpointError."""
    plain, fused = twins(Layers(residual_block), learns=False)
    for model in (plain, fused):
        first = checkpoint(model, make_input(1), use_reentrant=False)
        second = model(make_input(2))
        (first + second).square().sum().backward()
    for parameter, other in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) is (other.grad is None)
        assert parameter.grad is None or assert_equal(parameter.grad, other.grad, 1e-9) is None
    assert states_of(fused)["bn1"] == "watched"
    assert_same_numbers(fused, plain)
    assert states_of(fused)["bn1"] == "relu"


def test_what_is_learnt_against_a_layer_waits_too():
    plain, fused = twins(Layers(lambda self, X: F.relu(self.bn1(X))))
    results = []
    for model in (plain, fused):
        X = make_input(1).requires_grad_()
        Y = checkpoint(model, X, use_reentrant=False)
        others = [model.bn1(make_input(seed)).sigmoid() for seed in (2, 3)]
        results.append(torch.autograd.grad((Y + sum(others)).square().sum(), (X, *model.bn1.parameters())))
    for gradient, other in zip(*results, strict=True):
        assert_equal(gradient, other)
    assert states_of(fused)["bn1"] == "plain: its output went to sigmoid"


def test_a_tail_is_made_on_the_stream_of_its_batch_norm(monkeypatch, calls):
    """On a GPU the ReLU may be called on another one, which has not been told of the batch norm's input."""
    plain, fused = twins(Layers(lambda self, X: F.relu(self.bn1(X))))
    calls.clear()
    now, entered, original = ["first"], [], deferred.under
    monkeypatch.setattr(deferred, "under", lambda input: (*original(input)[:2], now[0]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream)))
    Y = fused.bn1(make_input())
    now[0] = "second"
    assert_equal(F.relu(Y), plain(make_input()))
    assert entered == ["first"] and calls == []


def test_threads_may_share_a_model():
    plain, fused = twins(make_block())
    plain, fused = plain.eval(), fused.eval()
    expected, errors = plain(make_input()), []

    def serve():
        try:
            for _ in range(50):
                assert_equal(fused(make_input()), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_whole_network_keeps_its_numbers():
    torch.manual_seed(0)
    plain, fused = twins(
        resnet18(6).double(), lambda seed: (torch.randn(4, 6, 32, 32, dtype=torch.float64),), learns=False
    )
    X = torch.randn(4, 6, 32, 32, dtype=torch.float64)
    for training in (True, True, True, False):
        assert_equal(fused.train(training)(X), plain.train(training)(X), 1e-10)
    assert isinstance(fused[1][0], FusedResidual)


def test_a_first_call_in_inference_mode_of_an_input_made_outside():
    plain, fused = twins(prepared(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())), learns=False)
    X = make_input()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for _ in range(2):
                assert_equal(fused.eval()(X), plain.eval()(X))


def test_inference_mode_sees_every_change_in_place():
    def forward(self, X):
        Y = self.conv1(X)
        Z = self.bn1(Y)
        Y.mul_(2)
        return F.relu(Z) + Y

    with torch.no_grad():
        plain, fused = twins(Layers(lambda self, X: F.relu(self.bn1(self.conv1(X)))))
    assert states_of(fused)["bn1"] == "relu"
    _, unlearnt = twins(plain, learns=False)
    with torch.inference_mode():
        expected = plain(make_input())
        assert_equal(fused(make_input()), expected)
        assert_equal(unlearnt(make_input()), expected)
        plain.function = fused.function = forward
        assert_equal(fused(make_input()), plain(make_input()))
        weight = nn.Parameter(torch.rand(6, dtype=torch.float64), requires_grad=False)
    for twin in (plain, fused):
        twin.bn1.weight = weight
    with torch.no_grad():
        assert_equal(fused(make_input()), plain(make_input()))
