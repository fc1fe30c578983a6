"""A batch norm's output, put off: a tensor without data, which a sum joins and a ReLU turns into one operator's call;
or a ReLU and a max pooling, if nobody else was seen to take what is rectified.

Whoever else touches it gets what the plain layer gives, made under what the layer was called under.
"""

import contextlib
from threading import get_ident
from typing import NamedTuple
from weakref import WeakValueDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass, _current_graph_task_id
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from . import autograd
from .ops import MaxPool

RELUS_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}
RELUS = {F.relu, torch.relu, Tensor.relu} | RELUS_IN_PLACE
ADDS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__} | ADDS_IN_PLACE
MAX_POOLS = {F.max_pool2d, torch.max_pool2d}
_METHODS = (
    "size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex is_inference get_device "
    "storage_offset"
)
_ATTRIBUTES = (
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized requires_grad is_nested _version"
)
# What asks for no value.
GEOMETRY = {getattr(Tensor, name) for name in _METHODS.split()}
GEOMETRY |= {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()} | {Tensor.__len__}
DROPOUTS = {F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout}  # others raise by dimensions

# On a CPU. Below, what the host does for a layer that is put off takes longer than it saves.
LEAST_ELEMENTS = 2**17


def is_small(tensor, elements):
    """Whether a layer on the tensor's device had better not be put off, if it normalises so many elements."""
    return tensor.is_cpu and elements < LEAST_ELEMENTS


def under(input):
    """What a layer is called under, and its ReLU must be, too: grad mode, hooks on saved tensors, a GPU's stream."""
    stream = torch.cuda.current_stream(input.device) if input.is_cuda else None
    return torch.is_grad_enabled(), _top_saved_tensors_default_hooks(False), stream


def is_relu(function, args):
    return function in RELUS or (function is F.threshold and args[1:] == (0, 0))  # of which it is a case


def adds(function, args, kwargs):
    """Whether the call adds two tensors, and no more."""
    return function in ADDS and len(args) == 2 and (not kwargs or kwargs == {"alpha": 1})


def max_pool_of(input, kernel_size, *options, return_indices=False, **others):
    """The windows of a call of max_pool2d, or None where the operators have none. Raises what that does. With indices
    it would be another function."""
    return MaxPool.of(input, kernel_size, *options, **others)


def is_per_channel(tensor, input):
    """Whether it has a value for each channel of ``input``, shaped to broadcast, and counts versions."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    is_alike = is_plain and tensor.dtype == input.dtype and tensor.device == input.device
    shape = (input.shape[1], *[1] * (input.dim() - 2))
    return is_alike and tuple(tensor.shape) in (shape, (1, *shape))


# By the id of a statistic, the call that is yet to update it. Two layers may share one.
_owing: dict[int, ref] = {}


def settle(statistics):
    """Update them now, where a call of this thread has yet to."""
    for tensor in statistics if _owing else ():
        call = _owing.get(id(tensor), _nobody)()
        if call is not None and call.owes and call.thread == get_ident():
            call.learned.refuse("its statistics were read, or it was called again, before its output was used")
            call.make()


class PutOff:
    """``layer(input)``, of which nothing has been computed, and what it was called under."""

    output = None
    is_used = False  # by a ReLU
    is_stale = False  # a sum or a ReLU in place has taken the output's place

    def __init__(self, learned, input):
        self.learned, self.input = learned, input
        self.version = self._version()  # RuntimeError where versions are not counted
        self.under = under(input)
        self.token = learned.token()

    def is_open(self):
        """Whether it may still be fused."""
        is_as_called = self._version() == self.version and under(self.input) == self.under
        return is_as_called and not self.is_used and self.output is None

    def check(self):
        if self._version() != self.version:
            raise self.learned.error("its input or a parameter was changed in place before its output was used")

    @contextlib.contextmanager
    def as_called(self):
        """The context in which what was put off is made."""
        grad_mode, hooks, stream = self.under
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(torch.set_grad_enabled(grad_mode))
            if hooks != _top_saved_tensors_default_hooks(False):
                contexts.enter_context(saved_tensors_hooks(*hooks or (_identity, _identity)))
            if stream is not None:
                contexts.enter_context(torch.cuda.stream(stream))
            yield

    def make(self):
        """What the plain layer gives."""
        if self.output is None:
            with self.as_called():
                self.output = self.of(*self.tensors())
            self.output_version = self.output._version
            self.ends_with(self.output)
        return self.output

    def ends_with(self, output):
        """Keep what has been learnt until backward has been through the output."""
        if self.token is not None and output.requires_grad:
            output.register_hook(self.token)


class Call(PutOff):
    """That of a batch norm, which owes an update of its statistics."""

    def __init__(self, learned, input, norm, training, ops):
        self.norm, self.training, self.ops = norm, training, ops
        self.owes = False
        super().__init__(learned, input)
        self.statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked) if training else ()
        settle(self.statistics)  # called twice before the first output is used: in order
        self.owes, self.thread, reference = training, get_ident(), ref(self)
        for tensor in self.statistics:
            if tensor is not None:
                _owing[id(tensor)] = reference

    def _version(self):
        """Grows where anybody writes to what the output depends on."""
        running_mean, running_var, weight, bias, *_ = self.norm
        version = self.input._version
        if weight is not None:
            version += weight._version
        if bias is not None:
            version += bias._version
        return version if self.training else version + running_mean._version + running_var._version

    def pay(self):
        """Say that the statistics are being updated; returns whether they had not been."""
        owed, self.owes = self.owes, False
        for tensor in self.statistics if owed else ():
            if _owing.get(id(tensor), _nobody)() is self:
                del _owing[id(tensor)]
        return owed

    def __del__(self):  # an output that nobody has used counts, too
        if self.owes:
            with torch.no_grad():
                self.of(*self.tensors())

    def tensors(self):
        return self.input, self.norm.weight, self.norm.bias

    def of(self, input, weight, bias):
        """What the plain layer computes of these; the first time it updates the statistics."""
        self.check()
        norm = self.norm._replace(weight=weight, bias=bias)
        if self.training and not self.pay():
            norm = norm._replace(running_mean=None, running_var=None, momentum=0.0, num_batches_tracked=None)
        return self.ops.batch_norm(input, norm, self.training)

    def value(self):
        """What the plain layer gave, whoever may have written to it since."""
        if self.output is not None and self.output._version != self.output_version:
            with self.as_called():
                return self.of(*self.tensors())
        return self.make()

    def rectify(self, residual=None, max_pool=None):
        """relu of it, or of its sum with the residual, a tensor or a call, or a pooling of that; None where the
        operator refuses."""
        calls = (self, residual) if isinstance(residual, Call) else (self,)
        owed = [call.pay() for call in calls]  # before: a hook on what is saved may raise when the op has written
        ops, residual_norm = self.ops, None
        if isinstance(residual, Call):
            ops, residual, residual_norm = ops.beside(residual.ops), residual.input, residual.norm
        output = autograd.attempt(ops, self.input, residual, self.norm, residual_norm, self.training, max_pool)
        for call, call.owes in zip(calls, owed if output is None else [False, False], strict=False):
            if output is None:
                call.learned.refuse("the operator takes less than eager does")
            else:
                call.is_used = True
                call.ends_with(output)
        return output


class Sum:
    """``call + residual``, the residual a tensor or a call itself."""

    def __init__(self, call, residual):
        self.call, self.learned, self.input, self.residual = call, call.learned, call.input, residual
        self.version = 0 if isinstance(residual, Call) else residual._version
        self.output, self.is_stale = None, False

    def is_open(self):
        residual = self.residual
        is_open = residual.is_open() if isinstance(residual, Call) else residual._version == self.version
        return is_open and self.output is None and self.call.is_open()

    def tensors(self):
        residual = self.residual
        return *self.call.tensors(), *(residual.tensors() if isinstance(residual, Call) else (residual,))

    def of(self, input, weight, bias, *residual):
        residual = self.residual.of(*residual) if isinstance(self.residual, Call) else residual[0]
        return self.call.of(input, weight, bias) + residual

    def make(self):
        if self.output is None:
            residual = self.residual
            if isinstance(residual, Call):
                residual.learned.refuse(self.learned.reason)
            elif residual._version != self.version:
                raise self.learned.error("what was added to its output was changed in place before the sum was used")
            with self.call.as_called():
                self.output = self.call.value() + (residual.value() if isinstance(residual, Call) else residual)
        return self.output

    def rectify(self):
        residual, call = self.residual, self.call
        if isinstance(residual, Call) and (residual.training != call.training or not call.ops.beside(residual.ops)):
            residual = residual.make()
        return call.rectify(residual)


class Rectified:
    """relu of a call, put off for a max pooling."""

    def __init__(self, call):
        self.call, self.learned, self.input = call, call.learned, call.input
        self.output, self.is_stale = None, False

    def is_open(self):
        return self.output is None and self.call.is_open()

    def tensors(self):
        return self.call.tensors()

    def of(self, *tensors):
        return F.relu(self.call.of(*tensors))

    def refuse(self, reason):
        self.learned.pools = False

    def make(self):
        if self.output is None:
            with self.call.as_called():
                output = self.call.rectify() if self.call.is_open() else None
                self.output = F.relu(self.call.value()) if output is None else output
        return self.output


class Promise(torch.autograd.Function):
    """The gradient for who never asks ``__torch_function__``: somebody's Function, a module's backward hook, reentrant
    checkpointing."""

    @staticmethod
    def forward(ctx, kind, tail, *tensors):
        ctx.tail, ctx.tensors = tail, tensors
        return kind(tail)

    @staticmethod
    def backward(ctx, grad):
        tail, (_, _, *needed) = ctx.tail, ctx.needs_input_grad
        if tail.is_stale:
            raise tail.learned.error("its output was changed in place, and used under its old name by what is not seen")
        tail.make()
        # Of aliases: a batch norm's input may depend on the residual, which would be counted twice.
        with torch.enable_grad():
            tensors = [tensor if tensor is None else tensor.view_as(tensor) for tensor in ctx.tensors]
            output = tail.of(*tensors)
        wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=torch.is_grad_enabled()))
        return None, None, *(next(grads) if is_needed else None for is_needed in needed)


def defer(tail, kind=None):
    """Without data, what the tail gives: a :class:`Deferred`, or of that kind."""
    kind = kind or Deferred
    return Promise.apply(kind, tail, *tail.tensors()) if torch.is_grad_enabled() else kind(tail)


class Traced(Tensor):
    """A tensor of which it is seen what is asked of it."""

    has_data = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in GEOMETRY or (cls.has_data and torch.compiler.is_compiling()):
            with DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in DROPOUTS and (kwargs["p"] == 0 or (0 < kwargs["p"] <= 1 and not kwargs["training"])):
            return args[0]
        if WatchedRectified in types and cls is not WatchedRectified:
            WatchedRectified.end(args, kwargs)
            return function(*args, **kwargs)
        return cls.asked(function, types, args, kwargs)


class Deferred(Traced):
    """What a :class:`Call` or a :class:`Sum` gives, without data."""

    has_data = False

    @staticmethod
    def __new__(cls, tail):
        x = tail.input
        self = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        self.tail = tail
        return self

    def __init__(self, *_):  # Tensor's takes no tail
        pass

    @classmethod
    def asked(cls, function, types, args, kwargs):
        output = None
        if is_relu(function, args):
            tensor = args[0] if args else kwargs["input"]
            is_in_place = function in RELUS_IN_PLACE or args[1:] == (True,) or kwargs.get("inplace", False)
            output = _rectified(tensor, is_in_place)
        elif function in MAX_POOLS:
            output = _pooled(*args, **kwargs)
        elif adds(function, args, kwargs):
            output = _added(*map(_unrectified, args), function in ADDS_IN_PLACE)
        if output is None:
            args, kwargs = _made((args, kwargs), getattr(function, "__name__", str(function)))
            output = function(*args, **kwargs)
        return output

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = _made((args, kwargs or {}), str(function))
        return function(*args, **kwargs)


def _rectified(tensor, is_in_place):
    """relu of it, or None where it cannot be fused."""
    tail = tensor.tail
    if type(tail) not in (Call, Sum) or not tail.is_open():
        return None
    if type(tail) is Call and tail.learned.defers_relu:
        return _replaced(tensor, Rectified(tail)) if is_in_place else defer(Rectified(tail))
    output = tail.rectify()
    if output is not None and is_in_place:
        tail.output, tail.is_stale = output, True
        if type(tail) is Call:
            tail.output_version = output._version
    return output


def _replaced(tensor, tail):
    """What takes the tensor's place, the output of a call, and what the operator in place returns."""
    tensor.tail.is_stale, tensor.tail = True, tail
    return defer(tail) if torch.is_grad_enabled() else tensor


def _pooled(input, *options, **others):
    """max_pool2d of what was rectified, or None where it cannot be fused."""
    tail = input.tail
    if type(tail) is not Rectified or not tail.is_open():
        return None
    max_pool = max_pool_of(tail.input, *options, **others)
    return None if max_pool is None else tail.call.rectify(max_pool=max_pool)


def _unrectified(tensor):
    """The tensor itself, or what was rectified, if that is what it stands for."""
    return _made(tensor, "a sum") if type(tensor) is Deferred and type(tensor.tail) is Rectified else tensor


def _added(a, b, is_in_place):
    """The sum, put off, or None where it cannot be."""
    if type(a) is not Deferred:
        if type(b) is not Deferred:
            return None
        if is_in_place:  # by what was folded, which says nothing of training
            is_folded = type(b.tail) is Call and not b.tail.training and b.tail.learned.follower
            return a.add_(b.tail.make()) if is_folded else None
        a, b = b, a
    call = a.tail
    if type(call) is not Call or not call.is_open():
        return None
    if type(b) is Watched:
        b.let_go()
    residual, x = b, call.input
    is_bias = not call.training and call.norm.bias is None and is_per_channel(b, x)
    if is_bias:
        tail = Call(call.learned, x, call.norm._replace(bias=b.flatten()), False, call.ops)
    elif type(b) is Deferred:
        residual = b.tail
        if type(residual) is not Call or residual.learned is call.learned or not residual.is_open():
            return None
        b = residual.input  # of the same strides, and no asking of __torch_function__
    elif type(b) is not Tensor and type(b) is not nn.Parameter:
        return None
    if not is_bias:
        if b.shape != x.shape or b.dtype != x.dtype or b.stride() != x.stride() or b.device != x.device:
            return None
        if b.is_inference():  # it counts no versions
            return None
        tail = Sum(call, residual)
    return _replaced(a, tail) if is_in_place else defer(tail)


def _made(tree, name):
    """With what the plain layers give in the place of deferred tensors, which ``name`` asks for."""

    def make(tensor):
        tail = tensor.tail
        (tail if type(tail) is Rectified else tail.learned).refuse(f"its output went to {name}")
        return tail.make()

    return tree_map_only(Deferred, make, tree)


class Seen(NamedTuple):
    """A call of a layer that is watched."""

    learned: "Learned"
    under: tuple
    versions: tuple  # of the tensors that are to be as they are now when the ReLU comes

    def holds(self):
        versions_hold = all(tensor._version == version for tensor, version in self.versions)
        return versions_hold and under(self.versions[0][0]) == self.under


class Watched(Traced):
    """A layer's real output, and what it was added to. What becomes of it tells whether the next one may be put off."""

    @staticmethod
    def of(tensor, seen, is_sum=False):
        tensor.__class__ = Watched  # not an alias of it, which an in-place sum would take for a view
        tensor.seen, tensor.is_sum, tensor.is_used = seen, is_sum, False
        for call in seen:
            call.learned.watched.append(ref(tensor))
        return tensor

    def let_go(self):
        for call in self.seen:
            call.learned.watched.clear()
        self.__class__ = Tensor
        del self.seen, self.is_sum, self.is_used

    def end(self, function):
        for call in self.seen:
            call.learned.refuse(f"its output went to {getattr(function, '__name__', function)}")
        self.let_go()

    @classmethod
    def asked(cls, function, types, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        tensors = list({id(leaf): leaf for leaf in leaves if type(leaf) is Watched}.values())
        if len({tensor.is_sum for tensor in tensors}) == 2 and adds(function, args, kwargs):  # of three: one tail
            sums, tensors = ([tensor for tensor in tensors if tensor.is_sum is is_sum] for is_sum in (True, False))
            for tensor in sums:
                tensor.end(function)
        seen, is_sum = [call for tensor in tensors for call in tensor.seen], any(tensor.is_sum for tensor in tensors)
        is_first_use = not any(tensor.is_used for tensor in tensors) and all(call.holds() for call in seen)
        is_alone = {*types} == {cls}  # else another class has its own way with tensors, Deferred's among them
        rectifies, is_add = is_relu(function, args), not is_sum and adds(function, args, kwargs)
        is_add = is_add and (function not in ADDS_IN_PLACE or type(args[0]) is cls)  # else it is the user's tensor
        is_add = is_add and not any(isinstance(arg, Tensor) and arg.is_inference() for arg in args)  # without versions
        if not (is_alone and is_first_use and (rectifies or is_add)):
            for tensor in tensors:
                tensor.let_go() if Deferred in types else tensor.end(function)
            return function(*args, **kwargs)
        with DisableTorchFunctionSubclass():
            output = function(*args, **kwargs)
            versions = tuple((arg, arg._version) for arg in args if isinstance(arg, Tensor) and arg is not output)
            is_bias = is_add and any(is_per_channel(arg, output) for arg in args)
        for tensor in tensors:
            tensor.is_used = True
        if rectifies:
            for call in seen:
                call.learned.rectified = "add+relu" if is_sum else "relu"
            if type(output) is cls:
                output.let_go()
            return output if is_sum or output.dim() != 4 else WatchedRectified.of(output, seen[0])
        return cls.of(output, [call._replace(versions=call.versions + versions) for call in seen], is_sum=not is_bias)


class WatchedRectified(Traced):
    """What a ReLU gave of a batch norm's real output, as long as nobody but one max pooling asks for it."""

    @staticmethod
    def of(tensor, call):
        tensor.__class__ = WatchedRectified
        tensor.call, tensor.is_used = call, False
        call.learned.watched_rectified.append(ref(tensor))
        return tensor

    def let_go(self):
        self.call.learned.pools, self.__class__ = False, Tensor
        del self.call, self.is_used

    @staticmethod
    def end(args, kwargs):
        for tensor in tree_leaves((args, kwargs)):
            if type(tensor) is WatchedRectified:
                tensor.let_go()

    @classmethod
    def asked(cls, function, types, args, kwargs):
        first = args[0] if args else None
        if function in MAX_POOLS and type(first) is cls and not first.is_used and first.call.holds():
            with DisableTorchFunctionSubclass():
                if max_pool_of(*args, **kwargs) is not None:
                    learned, first.is_used = first.call.learned, True
                    learned.pools = learned.pools is not False
                    return function(*args, **kwargs)
        cls.end(args, kwargs)
        return function(*args, **kwargs)


class Learned:
    """What the calls of a layer have shown of what becomes of its output; it holds for the layer's replicas, too."""

    kind = "a batch norm"

    def __init__(self, name):
        self.name = name
        self.rectified = None  # "relu" or "add+relu", which a watched output went to
        self.pools = None  # whether what was rectified went to a max pooling, and nowhere else
        self.defers_relu = False  # for one, now
        self.reason = None  # why the layer is to be plain
        self.defers = False  # what it does now
        self.calls = 0  # that were watched
        self.watched = []  # their outputs, referenced weakly
        self.watched_rectified = []  # what a ReLU gave of them, likewise
        self.outstanding = 0  # calls that a backward may run again
        self.is_compiled = self.is_small = False  # the latest call
        self.agreed = None  # whether all processes that normalise together want to defer; None: it is alone
        self.frozen = {}  # by its class's forward, whether it is a batch norm of constant statistics
        self.follower = None  # what the convolution before it has learnt, referenced weakly
        self.number = id(self)  # what stands for it in a graph
        _learned[self.number] = self

    def __deepcopy__(self, memo):  # a copy learns for itself
        return type(self)(self.name)

    def refuse(self, reason):
        self.reason = self.reason or reason

    def error(self, what):
        return RuntimeError(f"{self.name}, {self.kind} that fuse put off: {what}; leave it out by filter_fn, or unfuse")

    def call(self, input, ops, plain, batch_norm):
        """``plain(input)``, watched, or put off. ``batch_norm()``: what it is of the input, and by which statistics."""
        if self.decide():
            try:
                call = Call(self, input, *batch_norm(), ops)
            except RuntimeError:  # of tensors made in inference mode, which count no versions
                return plain(input)
            return defer(call)
        token, output = self.token(), plain(input)
        if token is not None and output.requires_grad:
            output.register_hook(token)
        if self.rectified or self.reason or output.is_inference():  # which counts no versions
            return output
        self.calls += 1
        if self.calls > 2:
            self.refuse("its output was not seen to go to a ReLU")
        return Watched.of(output, [Seen(self, under(input), ((input, input._version),))])

    def wants(self):
        """Whether the layer may defer, as far as this process has seen."""
        return self.rectified is not None and self.reason is None

    def hear(self, wants, of_all):
        """What the layer wanted in a call, and in every process: deferred, two batch norms share a collective."""
        if of_all.is_cpu or (wants and not self.agreed):  # a GPU is not waited for again
            self.agreed = bool(of_all.all())

    def state(self):
        follower = self.follower and self.follower()
        if follower is not None and follower.folds:
            return "folded into its convolution"
        if self.reason is not None:
            return f"plain: {self.reason}"
        if self.is_small:
            return "plain: a small input"
        unknown = "watched" if self.calls else "plain: under torch.compile" if self.is_compiled else "may fuse"
        return f"{self.rectified}{'+max_pool2d' * self.defers_relu}" if self.defers else unknown

    def token(self):
        """What is to live as long as a backward may run a call again: checkpointing counts what is saved."""
        is_repeatable = torch.is_grad_enabled() and _top_saved_tensors_default_hooks(False) and not is_in_backward()
        return _Token(self) if is_repeatable else None

    def decide(self):
        """Whether the layer, which is called, defers. What was learnt counts where no call waits to be repeated."""
        if not self.outstanding and not is_in_backward():
            if not self.defers and self.rectified and any(tensor() is not None for tensor in self.watched):
                self.refuse("its output is kept")
            if (
                self.watched_rectified
                and not self.defers
                and any(tensor() is not None for tensor in self.watched_rectified)
            ):
                self.pools = False  # that is kept
            self.defers = self.wants() and self.agreed is not False
            self.defers_relu = self.defers and bool(self.pools)
        return self.defers


_learned: WeakValueDictionary[int, Learned] = WeakValueDictionary()


def note_compiled(number):
    """A graph is being made of a call of the layer, for the report. Run when it is traced, and no part of it."""
    _learned[number].is_compiled = True


note_compiled._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which would import dynamo


def is_in_backward():
    return _current_graph_task_id() != -1


class _Token:
    def __init__(self, learned):
        self.learned = learned
        learned.outstanding += 1

    def __call__(self, grad):  # as a hook on the output
        self.__del__()

    def __del__(self):
        learned, self.learned = self.learned, None
        if learned is not None:
            learned.outstanding -= 1


def _identity(tensor):
    return tensor


def _nobody():
    return None
