"""Inference on a CPU: a convolution puts its output off, too, until one call of oneDNN computes
``activation(batch_norm(convolution(x)) + residual)`` on folded weights, packed once.

A step is a batch norm, an addition or an activation. The first call of a convolution gives its real output, and it is
seen which steps that takes, each the only use of what came before. From then on the layer puts its output off, for
these steps and no others. Whoever else touches what is put off gets what has been reached, and the layer goes no
further from then on.

An output that was seen to go to convolutions is handed on to them as what it will be. It is computed when somebody else
asks for something made of it, or for it: the host goes through many layers at once, before kernels sweep its caches.
"""

from functools import cache
from operator import is_, mul
from threading import Lock
from typing import NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_leaves

from .backend import available_backends, is_watched, select
from .calls import is_plain, normalizing
from .convolutions import CHANNELS_LAST, geometry_of, is_channels_last, is_dense, output_shape, strides_of
from .deferred import (
    ADDS_IN_PLACE,
    RELUS,
    RELUS_IN_PLACE,
    Deferred,
    Learned,
    Traced,
    WatchedRectified,
    _made,
    _nobody,
    adds,
)

_ops, _without_data = torch.ops.mkldnn, Tensor._make_wrapper_subclass
_TENSORS = (Tensor, nn.Parameter)
NORMALIZED, ADDED = "batch norm", "add"
# In multiplications, of which a core does some 2^16 a us. Below, what the host does for a layer that is put off, 50 to
# 100 us in a network, takes longer than it saves: of each output a batch norm's and an activation's passes over memory,
# and of each value of the weight the packing, which the plain layer does at each call.
LEAST_WORK = 2**24
WORK_OF_OUTPUT, WORK_OF_PACKING = 64, 32
TOO_LITTLE_WORK = "too little work"
NO_ACTIVATION = "none", (), ""
MOST_PENDING = 64  # layers that wait for one another, two or three Python frames each


# Steps


class Step(NamedTuple):
    name: str  # NORMALIZED, ADDED, or what oneDNN calls the activation
    input: Tensor
    operand: object  # a BatchNorm, what is added, or the activation's scalars and algorithm
    is_in_place: bool = False


def _activation(name, *scalars):
    return lambda input, inplace=False: Step(name, input, (list(scalars), ""), inplace)


def _relu_in_place(input):
    return Step("relu", input, ([], ""), True)


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    return Step("hardtanh", input, ([min_val, max_val], ""), inplace) if min_val <= max_val else None


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return Step("leaky_relu", input, ([negative_slope], ""), inplace)


def _gelu(input, *, approximate="none"):
    return Step("gelu", input, ([], approximate))


def _batch_norm(input, *args, **kwargs):
    norm, training = normalizing(input, *args, **kwargs) or (None, True)
    return None if training else Step(NORMALIZED, input, norm)


_STEPS = dict.fromkeys(RELUS - RELUS_IN_PLACE, _activation("relu")) | dict.fromkeys(RELUS_IN_PLACE, _relu_in_place)
_STEPS |= dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _activation("sigmoid"))
_STEPS |= dict.fromkeys((torch.tanh, Tensor.tanh), _activation("tanh"))
_STEPS |= {F.silu: _activation("swish"), F.hardswish: _activation("hardswish")}
_STEPS |= {F.hardsigmoid: _activation("hardsigmoid"), F.relu6: _activation("hardtanh", 0.0, 6.0)}
_STEPS |= {F.hardtanh: _hardtanh, F.leaky_relu: _leaky_relu, F.gelu: _gelu, F.batch_norm: _batch_norm}


def step_of(kind, function, args, kwargs):
    """The call as a step of a tensor of that kind; None where it is none."""
    make = _STEPS.get(function)
    if make is not None:
        try:
            step = make(*args, **kwargs)
        except TypeError:  # ``out=`` and the like
            return None
        return step if step is not None and type(step.input) is kind else None
    if not adds(function, args, kwargs):
        return None
    a, b = args if type(args[0]) is kind else args[::-1]
    is_in_place = function in ADDS_IN_PLACE
    return Step(ADDED, a, b, is_in_place) if type(a) is kind and (a is args[0] or not is_in_place) else None


def joins(tail, step):
    """Whether oneDNN takes the step after those that ``tail``, a :class:`Chain` or :class:`Trail`, has taken."""
    if step.name == NORMALIZED:
        mean, var, weight, bias, *_ = step.operand
        vectors = [mean, var, *(vector for vector in (weight, bias) if vector is not None)]
        return not tail.steps and all(_is_vector(vector, tail) for vector in vectors)
    if step.name == ADDED:
        residual, layer = step.operand, tail.layer
        if type(residual) is Chained:
            residual = residual.tail
        is_tensor = type(residual) in (*_TENSORS, Chain, Followed) and residual.is_cpu
        is_alike = is_tensor and residual.shape == tail.shape and residual.dtype is tail.dtype
        return is_alike and ADDED not in tail.steps and layer.groups == 1 and not layer.transposed
    return step.name == "relu" or ADDED not in tail.steps


def _is_vector(tensor, tail):
    """Whether it has a value for each channel, and counts versions."""
    is_plain_tensor = type(tensor) in _TENSORS and tensor.is_cpu and not tensor.is_inference()
    is_dense = is_plain_tensor and tensor.is_contiguous() and tensor.shape == tail.shape[1:2]
    return is_dense and tensor.dtype in (torch.float32, tail.dtype)


# What is put off


class Chain:
    """What a convolution's output, of a tensor or of another chain, is to be after some steps."""

    __slots__ = (
        *("layer", "learned", "layout", "input", "versions", "steps", "packed", "residual", "activation"),
        *("output", "exposed", "is_read", "depth", "lock", "__weakref__"),
    )
    is_cpu = True

    def __init__(self, layer, learned, layout, input, versions, steps=(), packed=None, residual=None):
        self.layer, self.learned, self.layout, self.input, self.versions = layer, learned, layout, input, versions
        self.steps, self.packed, self.residual, self.activation = steps, packed, residual, NO_ACTIVATION
        self.output = self.exposed = None  # for other chains, and for everybody else
        self.is_read, self.depth = False, 0  # by other chains; how many may wait for one another
        self.lock = Lock()

    shape = property(lambda self: self.layout.shape)
    dtype = property(lambda self: self.layout.options["dtype"])

    def stride(self):
        return self.layout.options["strides"]

    def take(self, step):
        """The tensor after the step, or None where that is not what was seen."""
        name, input, operand, is_in_place = step
        if type(operand) is Chained:  # first: this chain may have to be computed for that
            tail = operand.tail
            operand = tail.read() if tail.is_residual() or tail.is_handed_on() else tail.make()
        learned, steps, packed, residual, versions = self.learned, self.steps, self.packed, self.residual, self.versions
        known, count = learned.steps, len(steps)
        if self.output is not None or count >= len(known) or known[count] != name or torch.is_grad_enabled():
            return None
        if name == NORMALIZED:
            packed = learned.packed_for(self, operand)
            if packed is None:
                return None
        elif not joins(self, step):
            return None
        elif name == ADDED:
            residual = operand
            if type(residual) is not Chain:
                residual = _counting_versions(residual)
                versions = *versions, (residual, residual._version)
        chain = Chain(self.layer, learned, self.layout, self.input, versions, (*steps, name), packed, residual)
        if name not in (NORMALIZED, ADDED):
            chain.activation = name, *operand
        if is_in_place:
            input.tail = chain
        if count + 1 == len(known):
            return chain.end(input if is_in_place else None)
        return input if is_in_place else _chained(chain)

    def is_residual(self):
        """Whether it goes to an addition, and nowhere else."""
        return self.output is None and self.learned.steps == (*self.steps, ADDED)

    def is_handed_on(self):
        """Whether a convolution may take it as it is."""
        return self.learned.hands_on and self.exposed is None and len(self.steps) == len(self.learned.steps)

    def read(self):
        """The chain itself, for another one."""
        self.is_read = True
        return self

    def end(self, tensor=None):
        """The output, when the last step has been taken; ``tensor``: what stands for it."""
        if not self.learned.hands_on:
            return self.make()
        self.check()
        if self._is_of_chains():
            self.depth = 1 + max(self.input.depth, 0 if self.residual is None else self.residual.depth)
        if not 0 < self.depth < MOST_PENDING:
            self.value()
        return _chained(self) if tensor is None else tensor

    def _is_of_chains(self):
        """Whether nobody can change what it is of, and not be seen."""
        input, residual = self.input, self.residual
        is_added = type(residual) is Chain and (residual.output is not None or residual._is_of_chains())
        return type(input) is Chain and (residual is None or is_added)

    def make(self):
        """What the plain layers give, for others than convolutions."""
        if self.exposed is None:
            self.learned.hands_on = False
            if self.output is None:
                self.learned.cut(len(self.steps))
                self.check()
            output = self.value()
            self.exposed = output.clone() if self.is_read else output  # which may be written to
        return self.exposed

    def check(self):
        """Take the parameters as they are now; an error where they, or what is read, are not what they were."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise self.learned.error("its input or a parameter was changed in place before its output was used")
        self.versions = ()
        if self.packed is None:
            self.packed = self.learned.packed_for(self, None)
        residual = self.residual  # which another thread may let go of
        if type(residual) is Chain:
            residual.check()

    def value(self):
        """The output, for other chains."""
        with self.lock:  # of this call: another thread may ask for the same
            if self.output is None:
                if torch.is_grad_enabled() or torch.is_inference_mode_enabled():  # whose results count no versions
                    with torch.inference_mode(False), torch.no_grad():
                        self.output = self._run()
                else:
                    self.output = self._run()
                self.input = self.residual = None
                self.depth = 0
        return self.output

    def _run(self):
        packed, activation, input = self.packed, self.activation, self.input
        if type(input) is Chain:
            input = input.value()
        arguments = packed.weight, packed.bias, *packed.geometry
        if self.residual is None:
            return packed.op(input, *arguments, *activation)
        residual, is_own = self._take_residual()
        if self.shape.numel() == self.shape[0] * self.shape[1]:  # one value a channel, which torch 2.10 refuses
            output = packed.op(input, *arguments, *NO_ACTIVATION)
            output += residual
            return output if activation is NO_ACTIVATION else output.relu_()
        arguments += "add", 1.0, None if activation is NO_ACTIVATION else activation[0], [], ""
        if is_own:
            return _ops._convolution_pointwise_.binary(residual, input, *arguments)
        return _ops._convolution_pointwise.binary(input, residual, *arguments)

    def _take_residual(self):
        """What is added, and whether nobody else has it, nor will, so that it may be written to."""
        if type(self.residual) is not Chain:
            return self.residual, False
        if self.residual.is_residual():
            return self.residual._run(), True
        chain = ref(self.residual)
        self.residual = self.residual.value()
        return self.residual, chain() is None


def _counting_versions(tensor):
    """The tensor, or, of one made in inference mode, which counts no versions, a copy that nobody else can change."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class Chained(Deferred):
    """What a :class:`Chain` gives, without data."""

    @classmethod
    def asked(cls, function, types, args, kwargs):
        step = step_of(cls, function, args, kwargs)
        output = None if step is None else step.input.tail.take(step)
        if output is None:
            args, kwargs = _made((args, kwargs), getattr(function, "__name__", str(function)))
            output = function(*args, **kwargs)
        return output


def _chained(chain):
    tensor = _without_data(Chained, chain.layout.shape, **chain.layout.options)
    tensor.tail = chain
    return tensor


# What is seen


class Trail:
    """The steps that the output of one watched call has taken."""

    def __init__(self, layer, input, output):
        self.layer, self.learned = layer, layer._learned
        self.dtype, self.shape = output.dtype, output.shape
        self.steps, self.is_over, self.hands_on = (), False, False
        self.outputs = []  # after so many steps, referenced weakly
        parameters = (parameter for parameter in (layer.weight, layer.bias) if parameter is not None)
        self.versions = [(tensor, tensor._version) for tensor in (input, *parameters) if not tensor.is_inference()]

    def takes(self, step):
        holds = not torch.is_grad_enabled() and all(tensor._version == version for tensor, version in self.versions)
        return holds and not self.is_over and joins(self, step)

    def end(self):
        self.is_over = True
        self.versions.clear()  # which keeps tensors

    def cut(self, count):
        """No more than ``count`` steps may be put off."""
        self.steps = self.steps[:count]
        self.learned.cut(count)
        self.end()

    def learnt(self):
        """The steps before the first whose input somebody keeps."""
        kept = [count for count, output in enumerate(self.outputs[: len(self.steps)]) if output() is not None]
        return self.steps[: min(kept, default=None)]

    def learns_to_hand_on(self):
        return self.hands_on and all(output() is None for output in self.outputs)


class Followed(Traced):
    """A convolution's real output, or what has become of it, on its trail."""

    @staticmethod
    def of(tensor, trail):
        tensor.__class__ = Followed
        tensor.trail, tensor.count, tensor.is_used = trail, len(trail.steps), False
        trail.outputs.append(ref(tensor))
        return tensor

    def let_go(self):
        self.trail.cut(self.count)
        self.__class__ = Tensor
        del self.trail, self.count, self.is_used

    def hand_on(self):
        """To a convolution, which may have others beside it."""
        self.trail.hands_on = True
        self.let_go()

    @classmethod
    def asked(cls, function, types, args, kwargs):
        for leaf in tree_leaves((args, kwargs)):
            if type(leaf) is cls and leaf.trail.is_over and not leaf.is_used:  # after its last step
                leaf.let_go()
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is cls}.values()
        step = step_of(cls, function, args, kwargs)
        is_first_use = step is not None and step.operand is not step.input and not any(t.is_used for t in tensors)
        if not is_first_use or not step.input.trail.takes(step):
            for tensor in tensors:
                tensor.let_go()
            return function(*args, **kwargs)
        with DisableTorchFunctionSubclass():
            output = function(*args, **kwargs)
        trail = step.input.trail
        if step.is_in_place:
            trail.outputs[-1] = _nobody
        for tensor in tensors:
            tensor.is_used = True
            tensor.trail.steps += (step.name,)
            if tensor is not step.input:  # what is added to it
                tensor.trail.end()
        if step.name == ADDED and type(step.operand) is not cls and not step.operand.is_inference():
            trail.versions.append((step.operand, step.operand._version))
        if step.name not in (NORMALIZED, ADDED):
            trail.end()
        return cls.of(output, trail)


# What is known of a layer


class Layout(NamedTuple):
    """Of a convolution's output, and what oneDNN takes beside tensors."""

    shape: torch.Size
    options: dict  # the others of a tensor's
    converts: bool  # the input, to channels_last
    geometry: tuple


class Route(Learned):
    """The steps for which a convolution puts its output off, and its packed weights."""

    kind = "a convolution"

    def __init__(self, name):
        super().__init__(name)
        self.steps = self.trail = None
        self.hands_on = False  # the output after these steps, which was seen to go to convolutions alone
        self.refusal = None  # why the last layout that was asked for is none
        self.too_small = None  # the shape of an input of which there is too little to compute; to be asked about first
        self.packed, self.layouts = {}, {}

    def cut(self, count):
        if self.steps is not None:
            self.steps = self.steps[:count]

    def is_watching(self):
        trail = self.trail
        if trail is not None and (trail.is_over or trail.outputs[-1]() is None or self.calls > 2):
            self.steps, self.hands_on, self.trail = trail.learnt(), trail.learns_to_hand_on(), None
        return self.steps is None

    def watch(self, layer, input, output):
        self.calls += 1
        self.trail = Trail(layer, input, output)
        return Followed.of(output, self.trail)

    def put_off(self, layer, input, layout):
        """The layer's output, put off where a step may follow."""
        weight, bias = parameters_of(layer)
        versions = ((weight, weight._version),)
        if bias is not None:
            versions += ((bias, bias._version),)
        if type(input) is Chain:
            input.read()
        else:
            input = _counting_versions(input)
            versions += ((input, input._version),)
        chain = Chain(layer, self, layout, input, versions)
        return _chained(chain) if self.steps else chain.end()

    def layout(self, layer, input):
        """None where oneDNN does not take the convolution."""
        weight, _ = parameters_of(layer)
        of_tensors = input.shape, input.stride(), input.dtype, weight.shape, weight.stride()
        of_layer = layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode, layer.output_padding
        key = of_tensors, of_layer
        layout = self.layouts.get(key, self)
        if layout is self:  # not asked for before
            layout = _layout(layer, _chained(input) if type(input) is Chain else input)
            self.refusal, layout = (layout, None) if isinstance(layout, str) else (None, layout)
            if self.refusal == TOO_LITTLE_WORK:
                self.too_small = input.shape
            if len(self.layouts) > 99:
                self.layouts.clear()
            self.layouts[key] = layout
        return layout

    def packed_for(self, chain, norm):
        """The weights, packed; anew where they are not what they were. None where oneDNN takes no such batch norm."""
        # No lock: one that another thread holds in a fork is never released in the child.
        layer, input, geometry = chain.layer, chain.input, chain.layout.geometry
        key = norm and id(norm.running_mean), input.dtype
        packed = self.packed.get(key)
        if packed is None or not packed.holds(layer, norm, geometry):
            if norm is not None and not joins(chain, Step(NORMALIZED, None, norm)):
                return None
            if len(self.packed) > 3:  # a batch norm that is another one at each call
                self.packed.clear()
            packed = self.packed[key] = Packed(layer, norm, input, geometry)
        return packed

    def state(self, layer):
        """For the report."""
        reason = why_not(layer)
        if reason is not None:
            return f"plain: {reason}"
        if self.steps is None and self.refusal is not None:
            return f"plain: {self.refusal}"
        if self.steps is None:
            return "watched" if self.calls else "may fuse"
        return "+".join(("convolution", *self.steps))

    def bytes(self):
        return sum(packed.bytes() for packed in self.packed.values())

    def converts(self):
        """Whether an input was converted to channels_last."""
        return any(layout is not None and layout.converts for layout in self.layouts.values())


def layout_for(layer, input):
    """That of the layer's output, where oneDNN is to compute it, else None."""
    weight, bias = parameters_of(layer)
    is_inferred = (
        not torch.is_grad_enabled()
        and not layer.training
        and type(input) in (*_TENSORS, Chain)
        and type(weight) in _TENSORS
        and input.is_cpu
        and input.dtype is weight.dtype
        and not weight.is_inference()
        and (bias is None or (bias.is_contiguous() and bias.dtype is weight.dtype))
        and is_plain(layer)
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
        and select("cpu").ops is not None
    )
    return layer._learned.layout(layer, input) if is_inferred else None


def why_not(layer):
    """Why oneDNN does not take the layer; None where it does."""
    weight = layer._parameters.get("weight")
    if layer.padding_mode != "zeros" or geometry_of(layer) is None:
        return f"padding of {layer.padding!r}, {layer.padding_mode}"
    if not is_plain(layer) or type(weight) not in _TENSORS:
        return "a hook, a forward of its own, or another weight than a tensor"
    return _unavailable(weight.device.type, weight.dtype)


@cache
def _unavailable(device_type, dtype):
    """Why oneDNN serves no such tensors; None where it does. What is private in PyTorch is tried once."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"float32 and bfloat16 on a CPU only, not {str(dtype).removeprefix('torch.')} on {device_type}"
    if "cpu" not in available_backends():
        return "the C++ extension is missing"
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    try:
        if dtype is torch.bfloat16 and not _ops._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this CPU"
        with torch.inference_mode(False), torch.no_grad():
            input = torch.linspace(-1, 1, 128, dtype=dtype).view(1, 4, 4, 8).permute(0, 3, 1, 2)
            weight, geometry = torch.linspace(-1, 1, 64, dtype=dtype).view(8, 8, 1, 1), ((0, 0), (1, 1), (1, 1), 1)
            expected = F.relu(F.conv2d(input, weight) + input)
            packed = _ops._reorder_convolution_weight(weight, *geometry, [1, 8, 4, 4]), None, *geometry
            binary = "add", 1.0, "relu", [], ""
            output = _ops._convolution_pointwise.binary(input, input.clone(), *packed, *binary)
            into = _ops._convolution_pointwise_.binary(input.clone(), input, *packed, *binary)
            torch.testing.assert_close((output, into), (expected, expected), rtol=2e-2, atol=2e-2)
    except (AttributeError, RuntimeError, TypeError, AssertionError) as error:
        return f"oneDNN's operators are not what they were: {error}"
    return None


def source_of(input):
    """What a convolution takes: the tensor itself, or the :class:`Chain` of one that is handed on to it."""
    if type(input) is Followed:
        input.hand_on()
    elif type(input) is WatchedRectified:
        input.let_go()
    elif type(input) is Chained:
        return input.tail if input.tail.is_handed_on() else input.tail.make()
    return input


# Weights


class Packed:
    """A convolution's weight and bias, a batch norm's scale and shift in them, as oneDNN takes them fastest."""

    def __init__(self, layer, norm, input, geometry):
        from ._C import Contents  # which is there, where a layer has a layout: see _unavailable

        self.sources, self.eps, self.geometry = _sources(layer, norm), norm and norm.eps, geometry
        # Aliases, which keep their memory from being freed, and another tensor from being there.
        self.tensors = tensors = [tensor.detach() for tensor in self.sources if tensor is not None]
        self.version, self.addresses = self.sources[0]._version, [tensor.data_ptr() for tensor in tensors]
        # Copied first: what is changed while the weight is being packed is seen at the next call.
        compared = _sample(layer, tensors[0]), *tensors[1:]
        self.contents = Contents([(t.data_ptr(), t.shape, t.stride(), t.element_size()) for t in compared])
        weight, bias = _folded(layer, norm)
        pack = _ops._reorder_convolution_transpose_weight if layer.transposed else _ops._reorder_convolution_weight
        of_kind = _ops._convolution_transpose_pointwise if layer.transposed else _ops._convolution_pointwise
        self.op = of_kind.default
        self.weight = pack(weight.to(input.dtype), *geometry, list(input.shape))
        self.bias = None if bias is None else bias.to(input.dtype)

    def holds(self, layer, norm, geometry):
        """Whether it is of these, and nobody has written to them.

        A counter of versions does not see ``.data``, NumPy, another process or a fused optimizer: contents are
        compared, all of each vector, and of the weight four values of each output channel.
        """
        sources = _sources(layer, norm)
        return (
            all(map(is_, sources, self.sources))
            and sources[0]._version == self.version
            and geometry == self.geometry
            and (norm is None or norm.eps == self.eps)
            and [tensor.data_ptr() for tensor in sources if tensor is not None] == self.addresses
            and self.contents.holds()
        )

    def bytes(self):
        return _ops._nbytes(self.weight) + self.contents.nbytes


def parameters_of(layer):
    """Weight and bias, None for both where one is no parameter. nn.Module looks attributes up three times as long."""
    parameters = layer._parameters
    are_there = "weight" in parameters and "bias" in parameters
    return (parameters["weight"], parameters["bias"]) if are_there else (None, None)


def _sources(layer, norm):
    return parameters_of(layer) if norm is None else (*parameters_of(layer), *norm[:4])


def _sample(layer, weight):
    """Up to four values of each output channel, next to each other: of an input in the middle, from the kernel's."""
    sizes, strides = weight.shape, weight.stride()
    middle = [size // 2 for size in sizes]
    outputs = [(sizes[0], strides[0])]
    if layer.transposed:  # the inputs of each group, with all its outputs
        inputs = sizes[0] // layer.groups
        outputs, middle[0], middle[1] = [(layer.groups, inputs * strides[0]), (sizes[1], strides[1])], inputs // 2, 0
    else:
        middle[0] = 0
    start = sum(map(mul, middle, strides))
    last = start + sum((size - 1) * stride for size, stride in outputs)
    count = min(4, 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) - last)
    return weight.as_strided(*zip(*outputs, (count, 1), strict=True), weight.storage_offset() + start)


def _folded(layer, norm):
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if norm is None:
        return weight, bias
    mean, var, gamma, beta = (None if vector is None else vector.detach().double() for vector in norm[:4])
    scale = (var + norm.eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    groups = layer.groups if layer.transposed else weight.shape[0]  # whose outputs come first are of one group each
    by_group = weight.double().unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return by_group.flatten(0, 1), shift if beta is None else shift + beta


# Convolutions


def _layout(layer, input):
    """The :class:`Layout`, or why oneDNN is not to compute the convolution."""
    geometry, shape, format = geometry_of(layer), input.shape, CHANNELS_LAST.get(input.dim())
    if (reason := why_not(layer)) is not None:
        return reason
    weight = layer.weight.shape
    in_channels = weight[0] if layer.transposed else weight[1] * layer.groups
    if input.dim() != layer.weight.dim() or shape[1] != in_channels or input.numel() == 0:
        return "an input of another shape"
    if not input.is_contiguous() and not is_dense(input, format):
        return "an input with gaps"
    shape = output_shape(layer, shape, geometry[0])
    if min(shape) < 1:
        return "an input smaller than the kernel"
    work = (input if layer.transposed else shape).numel() * layer.weight[0].numel()
    if work + WORK_OF_OUTPUT * shape.numel() + WORK_OF_PACKING * layer.weight.numel() < LEAST_WORK:
        return TOO_LITTLE_WORK
    if not (is_channels_last(input, format) or is_channels_last(layer.weight, format)):
        return "contiguous tensors; it is for model.to(memory_format=torch.channels_last)"  # oneDNN's are
    options = {"strides": strides_of(shape, True), "dtype": input.dtype, "device": input.device}
    return Layout(shape, options, not is_dense(input, format), geometry)
