"""The graph of a module's forward, and all that the graph takes for granted. What a graph cannot say is refused."""

import operator
import sys
import threading
from functools import partialmethod

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..calls import is_plain
from .lookups import Guard, is_constant, plain_class

_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
_NEVER_GUARDED = _OWN_ATTRIBUTES - {"training", "_modules"}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LOCK = threading.RLock()  # for plan: torch.fx patches nn.Module while it traces


def is_plain_sequential(module):
    """Whether the module's call is nn.Sequential's forward and no more, whatever its class."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and is_plain(module)


def _layers(module):
    """The layers of a plain Sequential, those of its Sequentials among them, without nn.Identity; else the module."""
    if is_plain_sequential(module):
        return [layer for child in module._modules.values() for layer in _layers(child)]
    return [] if isinstance(module, nn.Identity) else [module]


def trace(module, training, scanner, argument_class):
    """The graph of the module's forward in one mode, the names of the Sequentials whose steps are in it, and whether
    the forward asks for the class of an argument, which then is ``argument_class``.

    The placeholders are the arguments without a default. What the graph takes for granted is added to the scanner's
    guards. Raises whatever the forward raises, and RuntimeError where the graph is not all that the forward does.
    """
    shells = {}
    shell = _shell(module, training, "", shells)
    tracer = _Tracer(scanner, argument_class)
    state = [
        (shell._shell_of[0], attributes, dict(attributes))
        for shell in shells.values()
        for attributes in (shell.__dict__, shell._parameters, shell._buffers, shell._modules)
    ]
    scanner.look_up("", type(module), "forward")

    def __getattribute__(module, name):
        tracer.record(module, name, sys._getframe(1).f_globals.get("__name__", ""))
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = __getattribute__
    try:  # a grad mode that the forward sets differs from one of the two
        with torch.set_grad_enabled(training), _NoTensors():
            graph = tracer.trace(shell)
    finally:
        del nn.Module.__getattribute__
        tracer.root = None  # no cycle is to hold the module's tensors
    for (path, name), child in tracer.children.items():
        found = f"{{module}}._modules[{name!r}]"
        is_falsy = f"{found} is {'None' if child is None else f'not None and not {found}'}"
        scanner.add(Guard(path, found if child else is_falsy))
        if scanner.asks & {"isinstance", "issubclass"}:
            scanner.add(Guard(path, f"{{0}}({found}) is {{1}}", (plain_class, plain_class(child))))
    for path, now, before in state:
        for name in [name for name, value in now.items() if before.get(name, shell) is not value]:
            raise RuntimeError(f"it assigns to {f'{path}.{name}'.lstrip('.')}")
    return graph, tracer.inlined, tracer.asked


def _shell(module, training, path, shells):
    """A stand-in for tracing: of the module's class, sharing its tensors, without what a trace could change in it."""
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) in shells:
        return shells[id(module)]
    shell = shells[id(module)] = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if name in _OWN_ATTRIBUTES or is_constant(value):
            shell.__dict__[name] = value.copy() if hasattr(value, "copy") else value
    shell.__dict__ |= {"training": training, "_shell_of": (path, module)}
    for name, child in module._modules.items():
        shell._modules[name] = _shell(child, training, f"{path}.{name}".lstrip("."), shells)
    return shell


class _NoTensors(TorchFunctionMode):
    """Refuses what would run while tracing, and be a constant of the graph: a random draw, say, on any device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_step = any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves((args, kwargs)))
        if not is_step and function.__name__ not in ("__get__", "_set_grad_enabled"):
            raise RuntimeError(f"it runs {function.__name__}() on no input, whose result a graph would keep")
        return function(*args, **kwargs)


class _Proxy(fx.Proxy):
    """fx records ``Y += X`` as ``Y + X``, but ``X += Y`` on a module's input is not ``X + Y``."""

    @property
    def __class__(self):  # what isinstance looks at; torch's own C++ would take the proxy for a tensor
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Proxy
        self.tracer.ask(self.node)
        return self.tracer.argument_class

    def _change(self, operation, other):
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __setattr__(self, name, value):
        if name not in ("tracer", "node"):
            raise RuntimeError(f"it assigns to {name} of a tensor")
        super().__setattr__(name, value)

    def __hash__(self):
        raise RuntimeError("it looks a tensor up")

    def __format__(self, specification):
        raise RuntimeError("it writes a tensor down")

    def __getattr__(self, name):  # fx has any attribute
        if not hasattr(torch.Tensor, name) and self.tracer.scanner.asks & {"hasattr", "getattr"}:
            self.tracer.ask(self.node)
            raise AttributeError(name)
        return super().__getattr__(name)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", partialmethod(_Proxy._change, getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    """What changes how steps run, and is no step itself, is refused."""

    proxy_buffer_attributes = True  # else a forward that counts its calls would count in the real buffer

    def __init__(self, scanner, argument_class):
        super().__init__()
        self.scanner = scanner
        self.argument_class = argument_class
        self.asked = False
        self.inlined = set()
        self.children = {}  # those that the forward looks up, by path and name
        self.thread = threading.get_ident()  # torch.fx's patches act in every one: others are to notice nothing
        self.records = False  # not what fx reads

    def ask(self, node):
        if node.op != "placeholder":
            raise RuntimeError(f"it asks for the class of {node.name}")
        self.asked = True

    def record(self, shell, name, reader):
        own, add = object.__getattribute__(shell, "__dict__"), self.scanner.add
        is_here = threading.get_ident() == self.thread and self.records and "_shell_of" in own
        if not is_here or name in _NEVER_GUARDED or reader.startswith(("torch.fx", __package__)):
            return
        path, module = own["_shell_of"]
        full_name = f"{path}.{name}".lstrip(".")
        if name == "training":
            if path:  # else both modes are traced, all layers in the same
                add(Guard(path, "{module}.training is self.training"))
        elif name == "_modules":
            add(Guard.same(path, "tuple({module}._modules)", tuple(own["_modules"])))
        elif name in own:
            if name not in module.__dict__:
                raise RuntimeError(f"it assigns to {full_name}")
            add(Guard.same(path, f"{{module}}.{name}", own[name]))
            self.scanner.follow(own[name])
        elif name in own["_modules"]:
            self.children[path, name] = module._modules[name]
        elif kind := next((kind for kind in ("_parameters", "_buffers") if name in own[kind]), None):
            add(Guard(path, f"{{module}}.{kind}[{name!r}] is {'' if own[kind][name] is None else 'not '}None"))
        elif name in module.__dict__:
            raise RuntimeError(f"it reads {full_name}, a {type(module.__dict__[name]).__name__}")
        elif name == "__class__" and not reader.startswith(("torch.", "abc")):  # abc: for isinstance, of torch, too
            if not path:
                raise RuntimeError("it asks for its own class")
            add(Guard(path, "{0}({module}) is {1}", (plain_class, plain_class(module))))
        elif not hasattr(type(module), name):
            if type(module).__getattr__ is not nn.Module.__getattr__:
                raise RuntimeError(f"it reads {full_name}, which {type(module).__name__}.__getattr__ makes up")
            add(Guard(path, f"not hasattr({{module}}, {name!r})"))
        elif not reader.startswith("torch.") or not hasattr(nn.Module, name):
            self.scanner.look_up(path, type(module), name)

    def create_args_for_root(self, *args, **kwargs):
        self._modes = _modes()
        prepared = super().create_args_for_root(*args, **kwargs)
        self.records = True
        return prepared

    def create_proxy(self, kind, target, args, *arguments, **options):
        if kind == "placeholder":
            if target.startswith("*"):
                raise RuntimeError("it takes any number of arguments")
            for default in args:
                if not isinstance(default, (bool, int, float, str, type(None))):
                    raise RuntimeError(f"its argument {target} is {default!r} by default")
                return default
        return super().create_proxy(kind, target, args, *arguments, **options)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if _modes() != self._modes:
            raise RuntimeError("it runs steps under no_grad, autocast, checkpointing or the like")
        return super().create_node(kind, target, args, kwargs, name)  # an annotation would have to be imported

    def create_arg(self, value):
        return value.node if type(value) is _Proxy else super().create_arg(value)  # fx would ask for its class

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, name, value, cache):
        if threading.get_ident() != self.thread:
            return value
        self.records = False
        value = super().getattr(name, value, cache)
        self.records = True
        return value

    def is_leaf_module(self, module, path):
        original = module.__dict__.get("_shell_of", ("", module))[1]
        if not is_plain_sequential(original):
            return True
        layers = _layers(original)  # those at its ends tell whether a tail may be in it with some of its steps
        if layers and not isinstance(layers[0], nn.ReLU) and not isinstance(layers[-1], BATCH_NORMS):
            return True
        self.inlined.add(path)
        return False

    def proxy(self, node):
        return _Proxy(node, self)


def _modes():
    torch.autocast_increment_nesting()
    autocast_depth = torch.autocast_decrement_nesting()  # counts autocast(enabled=False), too
    saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_depth, saved_tensors_hooks
