"""The graph of a module's forward, and all that the graph takes for granted. What a graph cannot say is refused."""

import contextlib
import copy
import operator
import random
import sys
import types
from typing import NamedTuple

import torch
from torch import fx, nn

# Attributes of a module that its forward cannot change other than by assignment.
_CONSTANTS = (bool, int, float, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)

_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
_NEVER_RECORDED = (_OWN_ATTRIBUTES | {"forward"}) - {"_modules"}  # both modes are traced, and fx looks at each forward


class Attribute(NamedTuple):
    """An attribute that the forward has read, the module by its path, and what it was."""

    path: str
    name: str
    kind: type  # beside the value, as True == 1 == 1.0
    value: object

    @classmethod
    def of(cls, path, name, value):
        value = _seen(value)
        return cls(path, name, type(value), value)

    @property
    def full_name(self):
        return _join(self.path, self.name)

    def holds_in(self, module):
        value = _seen(getattr(module, self.name, _Absent))
        return type(value) is self.kind and value == self.value


class _Absent:
    """What an attribute is that the module has not."""


def _seen(value):
    """Of the value, what a graph depends on: layers and tensors it takes as they are, by their names."""
    if isinstance(value, nn.Module):
        return nn.Module
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    return tuple(value) if isinstance(value, dict) else value  # a dict: _modules


class Trace(NamedTuple):
    """A graph, true as long as the attributes are what they were, and the arguments are of the class, if there is one.

    Its placeholders are the arguments without a default; those with one have it.
    """

    graph: fx.Graph
    attributes: frozenset[Attribute]
    argument_class: type | None


def is_sequential(module):
    """Whether the module's forward is nn.Sequential's, whatever its class."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def trace(module, training, inlined=lambda path: False, argument_class=torch.Tensor):
    """The :class:`Trace` of the module's forward in one mode, with the steps of Sequentials where ``inlined(path)``.

    Every other module is one step. Where the forward asks for the class of an argument, it is ``argument_class``.

    Raises whatever the forward raises, and RuntimeError where the graph is not all that the forward does.
    """
    shells = {}
    shell = _shell(module, training, "", shells)
    origins = {id(shell): (path, original) for original, (path, shell) in shells.items()}
    tracer = _Tracer(origins, inlined, argument_class)
    state, random_states = _state(shells), _random_states()
    # A grad mode that the forward sets differs from one of the two.
    with torch.set_grad_enabled(training), _recording(tracer.record):
        graph = tracer.trace(shell)
    if _random_states() != random_states:
        raise RuntimeError("it draws random numbers")
    if assigned := [name for name, value in _state(shells).items() if state.get(name, shell) is not value]:
        raise RuntimeError(f"it assigns to {', '.join(assigned)}")
    if asked := [node.name for node in tracer.asked if node.op != "placeholder"]:
        raise RuntimeError(f"it asks for the class of {', '.join(asked)}")
    return Trace(graph, frozenset(tracer.attributes), argument_class if tracer.asked else None)


def _shell(module, training, path, shells):
    """A stand-in for tracing: of the module's class, sharing its tensors, without what a trace could change in it."""
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return module
    if module in shells:
        return shells[module][1]
    shell = object.__new__(type(module))
    shells[module] = path, shell
    for name, value in module.__dict__.items():
        if name in _OWN_ATTRIBUTES or isinstance(value, _CONSTANTS):
            shell.__dict__[name] = copy.copy(value)
    shell.__dict__["training"] = training
    for name, child in module._modules.items():
        shell._modules[name] = _shell(child, training, _join(path, name), shells)
    return shell


def _state(shells):
    """Every attribute that a forward could assign to."""
    return {
        _join(path, name): value
        for path, shell in shells.values()
        for attributes in (shell.__dict__, shell._parameters, shell._buffers, shell._modules)
        for name, value in attributes.items()
    }


def _join(path, name):
    return f"{path}.{name}" if path else name


@contextlib.contextmanager
def _recording(record):
    """Show every attribute that a module is asked for to ``record``. Process-wide, as fx's own patches are."""

    def __getattribute__(module, name):
        record(module, name)
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = __getattribute__
    try:
        yield
    finally:
        del nn.Module.__getattribute__


class _Proxy(fx.Proxy):
    """fx records ``Y += X`` as ``Y + X``, but ``X += Y`` on a module's input is not ``X + Y``."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    @property
    def __class__(self):  # what isinstance looks at
        return self.tracer.class_of(self.node)


class _Tracer(fx.Tracer):
    """What changes how steps run, and is no step itself, is refused."""

    proxy_buffer_attributes = True  # else a forward that counts its calls would count in the real buffer

    def __init__(self, origins, inlined, argument_class):
        super().__init__()
        self.origins = origins  # id of a shell -> its path and module
        self.inlined = inlined
        self.argument_class = argument_class
        self.asked = set()
        self.attributes = set()

    def record(self, shell, name):
        if id(shell) not in self.origins or name in _NEVER_RECORDED:
            return
        path, module = self.origins[id(shell)]
        own = object.__getattribute__(shell, "__dict__")
        for attributes in (own, own["_parameters"], own["_buffers"], own["_modules"]):
            if name in attributes:
                self.attributes.add(Attribute.of(path, name, attributes[name]))
                return
        if name in module.__dict__:
            raise RuntimeError(f"it reads {_join(path, name)}, a {type(module.__dict__[name]).__name__}")
        if not hasattr(type(module), name):
            self.attributes.add(Attribute.of(path, name, _Absent))
        elif path and not hasattr(nn.Module, name):  # a method of a layer's class
            self.attributes.add(Attribute(path, "__class__", type, type(module)))

    def class_of(self, node):
        self.asked.add(node)
        return self.argument_class if node.op == "placeholder" else _Proxy

    def trace(self, root):
        self._modes = _modes()
        return super().trace(root)

    def create_args_for_root(self, *args, **kwargs):
        prepared = super().create_args_for_root(*args, **kwargs)
        self.attributes.clear()  # so far it was fx that read
        return prepared

    def create_proxy(self, kind, target, args, kwargs, *names, **options):
        if kind != "placeholder":
            return super().create_proxy(kind, target, args, kwargs, *names, **options)
        if target.startswith("*"):
            raise RuntimeError("it takes any number of arguments")
        for default in args:
            if not isinstance(default, (bool, int, float, str, type(None))):
                raise RuntimeError(f"its argument {target} is {default!r} by default")
            return default
        return super().create_proxy(kind, target, (), kwargs, *names)

    def create_node(self, *args, **kwargs):
        if _modes() != self._modes:
            raise RuntimeError("it runs steps under no_grad, autocast, checkpointing or the like")
        return super().create_node(*args, **kwargs)

    def create_arg(self, value):
        return value.node if type(value) is _Proxy else super().create_arg(value)  # fx would ask for its class

    def is_leaf_module(self, module, module_qualified_name):
        return not (is_sequential(module) and self.inlined(module_qualified_name))

    def proxy(self, node):
        return _Proxy(node, self)


def _modes():
    torch.autocast_increment_nesting()
    autocast_depth = torch.autocast_decrement_nesting()  # counts autocast(enabled=False), too
    saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_depth, saved_tensors_hooks


def _random_states():
    """Where the generators stand that a forward may draw from: a trace shows one draw's branch, and not the draw."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state().tolist(), numpy and numpy.random.get_state()[2]
