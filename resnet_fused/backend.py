"""Which implementation serves a call: one namespace of ``torch.ops`` a backend.

``RESNET_FUSED_BACKEND=auto|cpu|cuda|triton|eager`` sets the process's choice, :func:`use_backend` that of a block of
code. ``auto`` takes, for the input's device, the first backend that is available, and falls back to ``eager`` with one
warning. Where somebody watches (:func:`is_watched`) it is ``eager``, whatever is chosen.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .ops import Ops


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops. ``ops`` is None for ``eager``, and where it is missing."""

    name: str
    device_types: tuple[str, ...]
    ops: Ops | None = None
    unavailable: str | None = None  # cause and fix, where it cannot be used
    detail: str = ""  # for `python -m resnet_fused`


class UnservedDevice(ValueError):
    """A backend was asked for by name that does not serve the input's device."""


_backends: dict[str, Backend] = {}
_serving: dict[str, dict[str, Backend]] = {"eager": {}}  # choice -> device type -> the backend that it means there

_DEFAULT = os.environ.get("RESNET_FUSED_BACKEND", "auto")
_entered: ContextVar[tuple[list[str], ...]] = ContextVar("resnet_fused.entered", default=())  # the use_backends around
_choice: ContextVar[str] = ContextVar("resnet_fused.choice", default=_DEFAULT)  # by the last of them


def register(
    name: str,
    namespace: str,
    device_types: tuple[str, ...],
    unavailable: str | None = None,
    detail: str = "",
) -> None:
    """Add the backend whose ops are ``torch.ops.<namespace>``.

    The other arguments are those of :class:`Backend`.
    """
    ops = Ops.of(namespace) if unavailable is None else None
    _backends[name] = Backend(name, device_types, ops, unavailable, detail)
    _serving["auto"] = {}
    for backend in _backends.values():
        served = backend.device_types if backend.unavailable is None else ()
        _serving[backend.name] = dict.fromkeys(served, backend)
        _serving["auto"] = _serving[backend.name] | _serving["auto"]


def _register_cpu() -> None:
    unavailable, detail = None, ""
    build = "build it with `pip install .`, or, in a checkout, `pip install -e . --no-build-isolation`"
    try:
        from ._C import cpu_capability  # loading it registers torch.ops.resnet_fused

        detail = f"C++, instruction set {cpu_capability()} (RESNET_FUSED_CPU_CAPABILITY forces another)"
    except ModuleNotFoundError:
        unavailable = f"the C++ extension resnet_fused._C was not built; {build}"
    except ImportError as error:
        unavailable = f"the C++ extension resnet_fused._C does not load ({error}); {build}"
    register("cpu", "resnet_fused", ("cpu",), unavailable, detail=detail)


def _register_cuda() -> None:
    unavailable, detail = None, ""
    rebuild = "`FORCE_CUDA=1 pip install --no-build-isolation .` in a checkout"
    try:
        if _backends["cpu"].unavailable is not None:
            unavailable = f"its ops are declared by the CPU's extension, and {_backends['cpu'].unavailable}"
        else:
            from ._CUDA import arch_list, cuda_version  # loading it registers the ops' CUDA kernels

            detail = f"CUDA C++ for compute capability {arch_list()}, built with CUDA {cuda_version()}"
    except ModuleNotFoundError:
        if torch.version.cuda is None:
            unavailable = f"torch {torch.__version__} is built without CUDA; install a CUDA build of it, then {rebuild}"
        else:
            unavailable = (
                "the CUDA extension resnet_fused._CUDA was not built, for want of nvcc or by FORCE_CUDA=0; install the "
                f"CUDA toolkit {torch.version.cuda}, then {rebuild}"
            )
    except ImportError as error:
        unavailable = (
            f"the CUDA extension resnet_fused._CUDA does not load ({error}); it was built for another CUDA than that "
            f"of torch {torch.__version__}, {torch.version.cuda or 'none'}, or CUDA's libraries are missing: with the "
            f"torch and the CUDA toolkit that you want, {rebuild}"
        )
    register("cuda", "resnet_fused", ("cuda",), unavailable, detail=detail)


def _register_triton() -> None:
    from .triton_kernels import DEVICE_TYPES, IS_INTERPRETED, NAMESPACE

    unavailable, detail = None, ""
    if importlib.util.find_spec("triton") is None:
        unavailable = (
            "the package triton, which CUDA builds of torch bring along, is not installed beside torch "
            f"{torch.__version__}; install a CUDA build of torch, or `pip install triton`"
        )
    else:
        interpreted = ", interpreted (TRITON_INTERPRET=1)" if IS_INTERPRETED else ""
        detail = f"Triton {importlib.metadata.version('triton')}{interpreted}, compiled on first use"
    register("triton", NAMESPACE, DEVICE_TYPES, unavailable, detail=detail)


_register_cpu()
_register_cuda()
_register_triton()
_backends["eager"] = Backend("eager", (), detail="PyTorch's own operators, unfused, on any device")


def all_backends() -> list[Backend]:
    """Every backend this version knows, available or not, in the order in which ``auto`` prefers them."""
    return list(_backends.values())


def available_backends() -> list[str]:
    """Names of the backends that can be used now, in the order in which ``auto`` prefers them."""
    return [name for name, backend in _backends.items() if backend.unavailable is None]


def get(name: str) -> Backend:
    """The backend of that name. ValueError where it is unknown or unavailable, with cause and fix."""
    backend = _backends.get(name)
    if backend is None:
        raise ValueError(f"backend: expected one of {['auto', *_backends]}, got {name!r}")
    if backend.unavailable is not None:
        raise ValueError(f"backend {name!r} is not available: {backend.unavailable}")
    return backend


if _DEFAULT != "auto":
    get(_DEFAULT)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fused operator called inside the ``with`` block on backend ``name``.

    In this thread or asyncio task, and the tasks made in the block; a new thread begins with the process's choice. A
    backward runs on its forward's backend, wherever it is called. ValueError where the backend is unknown or
    unavailable, and, at the call, :class:`UnservedDevice` where it cannot serve the input's device.
    """
    if name != "auto":
        get(name)
    entry = [name]  # a list, to tell it from another of the same name
    _enter((*_entered.get(), entry))
    try:
        yield
    finally:  # in whatever order blocks are left: the last that is still entered holds
        _enter(tuple(other for other in _entered.get() if other is not entry))


def _enter(entries):
    _entered.set(entries)
    _choice.set(entries[-1][0] if entries else _DEFAULT)


def device_type_of(tensor: torch.Tensor) -> str:
    """``tensor.device.type``, which writes a string through a C++ stream: 6 us of 125 at 8 elements."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def is_watched() -> bool:
    """Whether somebody follows PyTorch's own operators, and would not see through ours: a compiler, an exporter, a
    tracer, a transform, forward-mode AD, a mode."""
    return bool(
        is_compiling()
        # torch.set_default_device is a mode, too
        or (_len_torch_function_stack() and {*map(type, _get_current_function_mode_stack())} != {DeviceContext})
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}


def ops_for(input: torch.Tensor, *others: torch.Tensor | None) -> Ops | None:
    """The ops that serve a call with these tensors. None: PyTorch's own operators do, on the backend ``eager``, for
    subclasses of Tensor, and where somebody watches."""
    if is_watched() or type(input) not in _PLAIN_TYPES:
        return None
    for tensor in others:  # issuperset(map(...)) would take 0.2 us of 12 more
        if type(tensor) not in _PLAIN_TYPES:
            return None
    return select(device_type_of(input)).ops


def select(device_type: str) -> Backend:
    """The backend for an input on ``device_type``."""
    choice = _choice.get()
    return _serving[choice].get(device_type) or _select_unserved(choice, device_type)


def _select_unserved(choice: str, device_type: str) -> Backend:
    if choice not in ("auto", "eager"):
        served = " or ".join(_backends[choice].device_types)
        raise UnservedDevice(f"backend {choice!r} serves inputs on {served}, got one on {device_type}")
    if choice == "auto":
        _warn_of_fallback(device_type)
    return _backends["eager"]


_warned: set[str] = set()


def _warn_of_fallback(device_type: str) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    missing = [f"{b.name}: {b.unavailable}" for b in _backends.values() if device_type in b.device_types]
    cause = "; ".join(missing) or "there is none for it"
    warnings.warn(
        f"resnet_fused has no fused backend for {device_type} tensors and runs plain PyTorch operators ({cause}). "
        "`python -m resnet_fused` lists the backends; RESNET_FUSED_BACKEND=eager silences this warning.",
        stacklevel=5,
    )
