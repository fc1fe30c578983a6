"""What a fused forward takes for granted: where it changes after fuse, the numbers are the plain model's."""
# ruff: noqa: E501  one line a change

import abc
import copy
import enum
import gc
import linecache
import random
import threading
import types
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import FusedResidual, Residual, fuse, unfuse, use_backend
from resnet_fused.rewriting import rewrite

from .test_convert import make_input
from .test_rewrite import make_block, prepared, twins

SETTINGS = types.ModuleType("settings")  # stands for a module of the user's
SETTINGS.scale = 2.0
NEGATE = False
KINDS = enum.Enum("Kinds", ["PLAIN", "NEGATED"])


def negated_if_asked(Y):
    return -Y if NEGATE else Y


def scaled_by_the_settings(Y):
    return Y * SETTINGS.scale


class Base(nn.Module):
    """Layers, and much that a forward may look up."""

    flag = False
    one = 1
    factor = 3
    kind = KINDS.PLAIN
    act = nn.ReLU

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.last = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Identity()
        prepared(self)

    def helper(self, Y):
        return Y * 2

    @staticmethod
    def static_helper(Y):
        return Y * 2

    @classmethod
    def class_helper(cls, Y):
        return Y * cls.factor

    @property
    def a_property(self):
        return self.factor

    def forward(self, X):
        return self.relu(self.bn(self.conv(X)))


def model_with(forward, base=Base, **attributes):
    return type("Model", (base,), {"forward": forward, **attributes})()


def body(self, X):
    return F.relu(self.bn(self.conv(X)))


def closure():
    scale = 2.0

    def forward(self, X):
        return body(self, X) * scale

    def change(model, patch):
        nonlocal scale
        scale = 5.0

    return forward, change


class Extended(Base):
    def forward(self, X):
        return super().forward(X) + 1


class Helping(Base):
    def helper(self, Y):
        return super().helper(Y) + 1

    def forward(self, X):
        return self.helper(body(self, X))


def on_instance(**attributes):
    return lambda model, patch: [setattr(model, name, value) for name, value in attributes.items()]


def on_class(**attributes):
    return lambda model, patch: [patch.setattr(Base, name, value) for name, value in attributes.items()]


def other(self, *args):
    return args[0] * 7


def in_module(name, value):
    return lambda model, patch: patch.setattr(f"{__name__}.{name}", value)


def to_layer(name, **attributes):
    return lambda model, patch: [setattr(model.get_submodule(name), k, value) for k, value in attributes.items()]


def in_the_layers_class(layer_class, **attributes):
    return lambda model, patch: [
        patch.setattr(layer_class, name, value, raising=False) for name, value in attributes.items()
    ]


class OtherIdentity(nn.Identity):
    pass


def new_code(function, like):
    return lambda model, patch: patch.setattr(function, "__code__", like.__code__)


def new_defaults(model, patch):
    patch.setattr(scaled, "__defaults__", (5.0,))


def scaled(Y, factor=2.0):
    return Y * factor


def doubling(Y):
    return Y * 2


FUNCTIONS = (negated_if_asked,)


class Between(Base):
    pass


class HelpingFromAfar(Between):
    def helper(self, Y):
        return super().helper(Y) + 1

    def forward(self, X):
        return self.helper(body(self, X))


class Scaled(Base):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, X):
        Y = body(self, X)
        return Y if self.scale is None else Y * self.scale


def without_the_scale(model, patch):
    del model.scale
    model.scale = None


class Falsy(nn.Identity):
    def __bool__(self):
        return False


def doubled(forward):
    return lambda self, X: 2 * forward(self, X)


def asks_isinstance(self, X):
    return body(self, X) * (2 if isinstance(self.last, OtherIdentity) else 1)


def is_an_identity(self, X):
    return body(self, X) * (2 if isinstance(self.last, nn.Identity) else 1)


def asks_hasattr(self, X):
    return body(self, X) * (2 if hasattr(self.last, "p") else 1)


def asks_for_a_method(self, X):
    return body(self, X) * (2 if hasattr(self.last, "extra_repr") and hasattr(self.last, "inverse") else 1)


def asks_truth(self, X):
    return body(self, X) * (2 if self.last else 1)


def matches(self, X):
    match self.last:
        case nn.Identity():
            return body(self, X)
    return body(self, X) * 2


def asks_a_layers_mode(self, X):
    return body(self, X) * (1 if self.last.training == self.training else 2)


def calls_a_layers_forward(self, X):
    return body(self, X) + self.last.forward(X)


CHANGES = {  # the forward (or class), and what changes after fuse
    "flag on the instance": (lambda self, X: body(self, X) * (2 if self.flag else 1), on_instance(flag=True)),
    "flag on the class": (lambda self, X: body(self, X) * (2 if self.flag else 1), on_class(flag=True)),
    "1 in place of True": (lambda self, X: body(self, X) * (2 if self.flag is False else 1), on_class(flag=0)),
    "True in place of 1": (lambda self, X: body(self, X) * (2 if isinstance(self.one, bool) else 1), on_class(one=True)),
    "number": (lambda self, X: body(self, X) * self.factor, on_class(factor=4)),
    "enum": (lambda self, X: body(self, X) * (2 if self.kind is KINDS.PLAIN else 1), on_class(kind=KINDS.NEGATED)),
    "class of a class": (lambda self, X: body(self, X) * (1 if self.act is nn.ReLU else 2), on_class(act=nn.Tanh)),
    "method on the class": (lambda self, X: self.helper(body(self, X)), on_class(helper=other)),
    "method on the instance": (lambda self, X: self.helper(body(self, X)), on_instance(helper=lambda Y: Y * 7)),
    "static method": (lambda self, X: self.static_helper(body(self, X)), on_class(static_helper=staticmethod(torch.neg))),
    "property": (lambda self, X: body(self, X) * self.a_property, on_class(a_property=property(lambda self: 5))),
    "what a property reads": (lambda self, X: body(self, X) * self.a_property, on_instance(factor=5)),
    "forward on the class": (Base, on_class(forward=doubled(Base.forward))),
    "forward of the base": (Extended, on_class(forward=doubled(Base.forward))),
    "method of the base": (Helping, on_class(helper=other)),
    "forward on the instance": (Base, on_instance(forward=torch.neg)),
    "global": (lambda self, X: negated_if_asked(body(self, X)), in_module("NEGATE", True)),
    "function": (lambda self, X: negated_if_asked(body(self, X)), in_module("negated_if_asked", torch.tanh)),
    "function of a function": (lambda self, X: body(self, X), in_module("body", lambda self, X: self.conv(X))),
    "setting of a module": (lambda self, X: scaled_by_the_settings(body(self, X)), in_module("SETTINGS.scale", 4.0)),
    "function of torch": (lambda self, X: torch.tanh(body(self, X)), lambda model, patch: patch.setattr(torch, "tanh", torch.neg)),
    "closure": closure,
    "code of a function": (lambda self, X: negated_if_asked(body(self, X)), new_code(negated_if_asked, doubling)),
    "defaults of a function": (lambda self, X: scaled(body(self, X)), new_defaults),
    "what a function in a tuple reads": (lambda self, X: FUNCTIONS[0](body(self, X)), in_module("NEGATE", True)),
    "method of a base that had none": (HelpingFromAfar, lambda model, patch: patch.setattr(Between, "helper", other, raising=False)),
    "parameter taken away": (Scaled, without_the_scale),
    "class asked for": (asks_isinstance, on_instance(last=OtherIdentity())),
    "class asked for and found": (is_an_identity, on_instance(last=nn.Tanh())),
    "class matched": (matches, on_instance(last=nn.Tanh())),
    "attribute of a layer asked for": (asks_hasattr, on_instance(last=nn.Dropout(0.0))),
    "method of a layer asked for": (asks_for_a_method, in_the_layers_class(nn.Identity, inverse=other)),
    "truth of a layer": (asks_truth, on_instance(last=Falsy())),
    "mode of a layer": (asks_a_layers_mode, lambda model, patch: model.last.eval() if model.training else model.last.train()),
    "forward of a layer": (calls_a_layers_forward, on_instance(last=nn.Tanh())),
    "forward of a layer's class": (calls_a_layers_forward, in_the_layers_class(nn.Identity, forward=other)),
    "forward on a layer": (calls_a_layers_forward, to_layer("last", forward=torch.tanh)),
    "forward of batch norms": (Base, in_the_layers_class(nn.BatchNorm2d, forward=lambda bn, Y: Y * 7)),
    "forward of all batch norms": (Base, in_the_layers_class(nn.modules.batchnorm._BatchNorm, forward=lambda bn, Y: Y * 7)),
    "forward of ReLUs": (Base, in_the_layers_class(nn.ReLU, forward=other)),
    "forward of convolutions": (Base, in_the_layers_class(nn.Conv2d, forward=other)),
    "call of ReLUs": (Base, in_the_layers_class(nn.ReLU, __call__=other)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_forward_looks_up_may_change(change, training, monkeypatch, calls):
    forward, change = closure() if CHANGES[change] is closure else CHANGES[change]
    plain = (forward() if isinstance(forward, type) else model_with(forward)).train(training)
    plain, fused = twins(plain)
    before = fused(make_input())
    torch.testing.assert_close(before, plain(make_input()), rtol=0, atol=1e-12)
    assert len(calls) == 1
    for model in (plain, fused):
        change(model, monkeypatch)
    expected = plain(make_input())
    torch.testing.assert_close(fused(make_input()), expected, rtol=0, atol=1e-12)
    assert not torch.equal(before, expected)  # it did make a difference
    assert len(calls) == 1


@pytest.mark.parametrize("layer_class", [nn.ReLU, nn.BatchNorm2d, nn.Conv2d])
def test_a_class_of_layers_that_was_patched_before_is_not_taken_for_torchs(layer_class, monkeypatch):
    plain = Base()
    monkeypatch.setattr(layer_class, "forward", other)
    fused = copy.deepcopy(plain)
    assert "patched class" in fuse(fused).left[0].reason
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_an_equal_value_is_no_change(calls):
    _, fused = twins(
        model_with(lambda self, X: body(self, X) * self.scale * self.sizes[0], scale=0.0, sizes=(1.0, (2,)))
    )
    type(fused).__mro__[2].scale, fused.sizes = float("0"), (float("1"), (int("2"),))
    fused(make_input())
    assert len(calls) == 1


def reads_a_list(self, X):
    self.log.append("called")
    return body(self, X)


def asks_grad_mode(self, X):
    return body(self, X) if torch.is_grad_enabled() or self.training else X


def asks_autocast(self, X):
    return body(self, X) if not torch.is_autocast_enabled() else X


def asks_default_dtype(self, X):
    return body(self, X).to(torch.get_default_dtype())


def asks_type(self, X):
    return body(self, X) if type(X) is torch.Tensor else X


def asks_own_class(self, X):
    return body(self, X) if self.__class__ is Base else X


def assigns_a_global(self, X):
    global NEGATE
    NEGATE = False
    return body(self, X)


def draws_on_a_gpu(self, X):  # the generators of GPUs are like this one
    return body(self, X) if torch.rand((), generator=GENERATOR) < 2 else X


def draws_by_a_function(self, X):
    return body(self, X) if random.random() < 2 else X


def reads_a_global_dict(self, X):
    return body(self, X) * CONFIGURATION["scale"]


def reads_the_list_of_a_class(self, X):
    return body(self, X) * len(Holder.items)


def reads_a_list_in_a_tuple(self, X):
    return body(self, X) * len(self.lists[0])


def calls_a_class_method(self, X):
    return self.class_helper(body(self, X))


def sets_the_grad_mode(self, X):
    with torch.set_grad_enabled(self.training):
        return body(self, X)


def seeds(self, X):
    torch.manual_seed(0)
    return body(self, X)


def catches_what_layers_raise(self, X):
    try:
        return F.relu(self.bn(X))
    except ValueError:
        return X


def assigns_to_a_class(self, X):
    Holder.last = X
    return body(self, X)


def counts_in_a_class(self, X):
    Holder.count += 1
    return body(self, X)


def assigns_to_a_tensor(self, X):
    Y = body(self, X)
    Y.data = Y.data * 2
    return Y


def appends_by_a_method_of_a_list(self, X):
    APPEND(1)
    return body(self, X)


def appends_to_a_default(self, X):
    return appending(body(self, X))


def appending(Y, log=[]):  # noqa: B006
    log.append(1)
    return Y


def looks_a_type_up(self, X):
    return body(self, {}.get(X, X))


def writes_a_tensor_down(self, X):
    return body(self, X) if f"{X}" else X


def reads_what_getattr_makes_up(self, X):
    return body(self, X) * self.made_up


class Holder:
    items = []
    count = 0


APPEND = [].append


CONFIGURATION = {"scale": 1.0}
GENERATOR = torch.Generator()
REFUSED = {
    reads_a_list: "it reads log, a list",
    asks_grad_mode: "it asks or sets a mode of torch by torch.is_grad_enabled",
    asks_autocast: "it asks or sets a mode of torch by torch.is_autocast_enabled",
    asks_default_dtype: "it asks or sets a mode of torch by torch.get_default_dtype",
    asks_type: "it calls type()",
    asks_own_class: "it asks for its own class",
    assigns_a_global: "it assigns to NEGATE",
    draws_on_a_gpu: "it reads GENERATOR, a Generator",
    draws_by_a_function: "it reads random.random, a builtin_function_or_method",
    reads_a_global_dict: "it reads CONFIGURATION, a dict",
    reads_the_list_of_a_class: "it reads Holder.items, a list",
    reads_a_list_in_a_tuple: "it reads lists, a tuple",
    sets_the_grad_mode: "it asks or sets a mode of torch by torch.set_grad_enabled",
    seeds: "it asks or sets a mode of torch by torch.manual_seed",
    catches_what_layers_raise: "it catches exceptions",
    assigns_to_a_class: "it assigns to Holder.last",
    counts_in_a_class: "it assigns to count of a class or module",
    assigns_to_a_tensor: "it assigns to data of a tensor",
    appends_by_a_method_of_a_list: "it reads APPEND, a builtin_function_or_method",
    appends_to_a_default: "it reads a default of appending, a list",
    looks_a_type_up: "it looks a tensor up",
    writes_a_tensor_down: "it writes a tensor down",
    calls_a_class_method: "it reads class_helper, a classmethod",
    reads_what_getattr_makes_up: "it reads made_up, which Model.__getattr__ makes up",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_what_cannot_be_compared_is_refused_before_it_runs(forward):
    def __getattr__(self, name):
        return 2 if name == "made_up" else nn.Module.__getattr__(self, name)

    more = {"__getattr__": __getattr__} if forward is reads_what_getattr_makes_up else {}
    model = model_with(forward, log=[], lists=([1],), **more)
    (left,) = fuse(model).left
    assert left.reason == f"bn: in a forward that cannot be traced in training: RuntimeError: {REFUSED[forward]}"
    assert model.log == [] and Holder.count == 0


def test_a_number_of_numpys_is_no_plain_number():
    model = model_with(lambda self, X: body(self, X) * self.scale)
    model.scale = numpy.float64(0.5)
    assert "it reads scale, a float64" in fuse(model).left[0].reason


def test_reentrant_checkpointing_is_refused_and_crashes_nothing():
    model = model_with(lambda self, X: checkpoint(lambda X: body(self, X), X, use_reentrant=True))
    assert "in a forward that cannot be traced" in fuse(model).left[0].reason


def test_what_is_done_in_place_stays_in_place():
    def forward(self, X):
        Y, Z = body(self, X), X
        X *= 2
        X -= 1
        X /= 3
        return Y + Z

    plain, fused = twins(model_with(forward))
    X, other_X = make_input(), make_input()
    torch.testing.assert_close(fused(X), plain(other_X), rtol=0, atol=1e-12)
    torch.testing.assert_close(X, other_X, rtol=0, atol=1e-12)


def test_a_draw_for_no_input_is_refused_and_not_made():
    model = model_with(lambda self, X: body(self, X) if torch.rand(()) < 2 else X)
    state = torch.get_rng_state()
    (left,) = fuse(model).left
    assert "it runs rand() on no input" in left.reason
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attribute_of_an_argument_that_tensors_have_not_is_asked_for():
    def forward(self, X):
        return body(self, X.tensors if hasattr(X, "tensors") else X)

    plain, fused = twins(model_with(forward))
    X = make_input()
    torch.testing.assert_close(fused(X), plain(X), rtol=0, atol=1e-12)
    nested = types.SimpleNamespace(tensors=X)
    torch.testing.assert_close(fused(nested), plain(nested), rtol=0, atol=1e-12)


# Never raises


class Stem(nn.Module):
    """Four steps, and none of the names of a block."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool, self.head = (
            nn.Conv2d(6, 6, 1),
            nn.BatchNorm2d(6),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(6, 6, 1),
        )
        prepared(self)

    def forward(self, X):
        return self.head(self.pool(F.relu(self.norm(self.conv(X)))))


def test_a_stem_of_four_steps_is_fused(calls):
    plain, fused = twins(nn.Sequential(Stem()))
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)
    assert calls == ["batch_norm_relu"]


@pytest.mark.parametrize("function", ["_check", "Tails", "_written", "_fused_class"])
def test_an_error_in_planning_leaves_that_module_and_goes_on(function, monkeypatch):
    own_class = type("Own", (Stem,), {})
    original, model = getattr(rewrite, function), nn.Sequential(*(own_class() for _ in range(3)))
    plain, count = copy.deepcopy(model), iter(range(100))

    def raises_once(*args):
        if next(count) == 0:
            raise LookupError("what nobody thought of")
        return original(*args)

    monkeypatch.setattr(rewrite, function, raises_once)
    report = fuse(model)
    assert len(report.fused) == 2
    ((_, _, reason),) = report.left
    assert reason.startswith("norm: in a ") and reason.endswith("LookupError: what nobody thought of")
    torch.testing.assert_close(model.eval()(make_input()), plain.eval()(make_input()), rtol=0, atol=1e-12)


# Classes


def asks_super_of_its_class(self, mode=True):
    return super(self.__class__, self).train(mode)


def asks_super_of_its_type(self, mode=True):
    return super(type(self), self).train(mode)


@pytest.mark.parametrize("train", [asks_super_of_its_class, asks_super_of_its_type])
def test_super_of_the_instances_class_is_refused(train):
    model = model_with(Base.forward, train=train)
    (left,) = fuse(model).left
    assert left.reason == f"bn: in a module whose {train.__name__} calls super() of its instance's class"
    model.train()


class Registered(type):
    classes = []

    def __new__(metaclass, name, bases, namespace):
        cls = super().__new__(metaclass, name, bases, namespace)
        metaclass.classes.append(cls)
        return cls

    def __init__(cls, *args):
        Registered.classes.append(cls)


def test_registers_of_classes_see_no_fused_class(calls):
    seen = []

    class Known(Base, metaclass=Registered):
        def __init_subclass__(cls):
            seen.append(cls)

    Registered.classes.clear()
    _, fused = twins(Known())
    fused(make_input())
    assert calls == ["batch_norm_relu"]
    assert type(fused) is not Known and type(type(fused)) is Registered
    assert seen == Registered.classes == []
    own = type("Own", (type(fused),), {})
    assert own in seen and own in Registered.classes


def test_an_abstract_class_keeps_its_register():
    class Abstract(Base, abc.ABC):
        pass

    plain, fused = twins(Abstract())
    assert isinstance(fused, Abstract) and isinstance(plain, Abstract)
    assert isinstance(fused, type(fused)) and not isinstance(plain, type(fused))


def test_fused_classes_go_with_the_last_model():
    def cell():
        class Notebook(Base):
            pass

        model = Notebook()
        fuse(model)
        model(make_input())
        return weakref.ref(Notebook), weakref.ref(type(model))

    files = len(linecache.cache)
    references = [reference for _ in range(3) for reference in cell()]
    gc.collect()
    assert [reference() for reference in references] == [None] * 6
    assert len(linecache.cache) <= files


def test_each_fused_class_has_code_of_its_own():
    torch._dynamo.reset()
    models = [model_with(lambda self, X, i=i: body(self, X) + i * 0) for i in range(12)]
    for i, model in enumerate(models):
        type(model).factor = i
        fuse(model)
    assert len({id(type(model).forward.__code__) for model in models}) == 12
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for model in models:
            torch.compile(model, backend="eager", fullgraph=True)(make_input())


# Blocks of one's own


class OwnResidual(nn.Module):
    """As in many a notebook, with a hook, a method and a flag of its own."""

    expansion = 4

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.conv3, self.relu = nn.Conv2d(6, 6, 1), nn.ReLU()
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        prepared(self)

    def zero_init(self):
        nn.init.zeros_(self.bn2.weight)

    def forward(self, X):
        Y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(X)))))
        return self.relu(Y + self.conv3(X))


def test_a_block_of_ones_own_keeps_its_class_and_all_it_has(calls):
    plain, fused = twins(OwnResidual())
    assert isinstance(fused, OwnResidual) and not isinstance(fused, FusedResidual)
    assert fused.expansion == 4
    fused(X=make_input())
    assert calls == ["batch_norm_relu", "batch_norm_add_relu"]
    seen = []
    fused.relu.register_forward_hook(lambda *args: seen.append("relu"))
    fused(make_input())
    assert seen == ["relu"] * 2
    fused.zero_init()
    assert not fused.bn2.weight.any()
    unfuse(fused)
    assert type(fused) is OwnResidual and set(vars(fused)) == set(vars(plain))


def test_a_patched_residual_is_not_taken_for_the_packages_own(monkeypatch):
    def forward(self, X):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X) * 2

    monkeypatch.setattr(Residual, "forward", forward)
    plain, fused = twins(prepared(Residual(6, 6)))
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_autocast_promotes_as_in_the_plain_block():
    plain, fused = twins(OwnResidual().float())
    plain.conv3, fused.conv3 = nn.Identity(), nn.Identity()
    with torch.autocast("cpu", torch.bfloat16):
        Y, other_Y = fused(make_input().float()), plain(make_input().float())
    assert Y.dtype == other_Y.dtype == torch.float32
    torch.testing.assert_close(Y, other_Y, rtol=0, atol=2**-5)  # bfloat16's, of a convolution without its bias


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_leave_their_bias_to_the_batch_norm(training, calls):
    plain, fused = twins(OwnResidual().train(training))
    convolved = []
    for name in ("conv1", "conv2", "conv3"):
        conv = fused.get_submodule(name)
        conv.__dict__["_conv_forward"] = lambda X, weight, bias, conv=conv: (
            convolved.append(bias) or type(conv)._conv_forward(conv, X, weight, bias)
        )
    X, other_X = (make_input().requires_grad_() for _ in range(2))
    Y, other_Y = fused(X), plain(other_X)
    assert convolved == [None] * 3
    torch.testing.assert_close(Y, other_Y, rtol=0, atol=1e-12)
    grad_output = torch.randn_like(Y)
    Y.backward(grad_output)
    other_Y.backward(grad_output)
    for (name, value), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, value), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)
    if training:
        assert not fused.conv1.bias.grad.any()


# No stricter than eager


def in_float(model):
    for bn in (model.bn1, model.bn2, model.downsample[1]):
        bn.num_batches_tracked = bn.num_batches_tracked.float()


def in_int32(model):
    for bn in (model.bn1, model.bn2, model.downsample[1]):
        bn.num_batches_tracked = bn.num_batches_tracked.int()


def shared_statistics(model):
    model.bn2.running_mean = model.downsample[1].running_mean
    model.bn2.running_var = model.downsample[1].running_var


def shared_counter(model):
    model.downsample[1].num_batches_tracked = model.bn2.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", [in_float, in_int32, shared_statistics, shared_counter])
def test_what_the_operator_refuses_and_eager_takes_runs_unfused(change, before, momentum):
    plain = make_block()
    for bn in (plain.bn1, plain.bn2, plain.downsample[1]):
        bn.momentum = momentum
    if before:
        change(plain)
    plain, fused = twins(plain)
    if not before:
        for model in (plain, fused):
            change(model)
    for _ in range(2):
        torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)
    for (name, value), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_the_biases_that_convolutions_left_out_are_added_where_a_tail_runs_unfused(training):
    plain, fused = twins(OwnResidual().train(training))
    for model in (plain, fused):
        for bn in (model.bn1, model.bn2):
            bn.num_batches_tracked = bn.num_batches_tracked.float()
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)
    for (name, value), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


class OneAfterTheOther(nn.Module):
    """Whose batch norms share statistics, and run in this order."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        prepared(self)
        self.other.running_mean = self.bn.running_mean

    def forward(self, X):
        Y = self.bn(self.conv(X))
        Z = self.other(X)
        return F.relu(Y + Z * 2) + Z


def test_a_batch_norm_whose_statistics_another_updates_before_the_add_is_left():
    plain = OneAfterTheOther()
    model = copy.deepcopy(plain)
    assert "bn: what runs between it and the add updates the same statistics" in fuse(model).left[0].reason
    torch.testing.assert_close(model(make_input()), plain(make_input()), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.bn.running_mean, plain.bn.running_mean, rtol=0, atol=1e-12)


def test_a_convolution_whose_output_others_take_keeps_its_bias():
    def forward(self, X):
        Y = self.conv(X)
        return F.relu(self.bn(Y)) + Y

    plain, fused = twins(model_with(forward))
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_a_backend_asked_for_by_name_still_refuses_another_device():
    model = model_with(Base.forward).to("meta")
    fuse(model)
    with use_backend("cpu"), pytest.raises(ValueError, match="serves inputs on cpu, got one on meta"):
        model(make_input().to("meta"))


# Threads, and other tracers


def test_a_model_serves_in_another_thread_while_others_are_fused():
    served, errors, stop = make_block().eval(), [], threading.Event()
    expected, X = served(make_input()), make_input()

    def serve():
        while not stop.is_set():
            try:
                assert torch.equal(served(X), expected)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    reports = [fuse(make_block()) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [report.left for report in reports] == [[]] * 10


def test_threads_that_fuse_wait_for_each_other():
    plain = make_block().eval()
    models, reports = [copy.deepcopy(plain) for _ in range(12)], []
    threads = [threading.Thread(target=lambda i=i: reports.extend(map(fuse, models[i::4]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(len(report.fused), report.left) for report in reports] == [(1, [])] * 12
    assert "__getattribute__" not in vars(nn.Module)
    for model in models:
        torch.testing.assert_close(model(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_the_model_goes_when_it_is_deleted():
    gc.collect()
    gc.disable()
    try:
        model = Base()
        fuse(model)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("training", [True, False])
def test_an_input_without_a_batch_gets_the_convolutions_bias_where_eager_adds_it(training):
    plain, fused = twins(prepared(nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.ReLU())).train(training))
    X = torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(X), plain(X), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "error::torch.jit.TracerWarning")
def test_another_tracer_finds_the_plain_layers():
    plain, fused = twins(make_block().eval())
    for trace in (fx.symbolic_trace, lambda model: torch.jit.trace(model, make_input())):
        traced = trace(fused)
        torch.testing.assert_close(traced(make_input(1)), plain(make_input(1)), rtol=0, atol=1e-12)
