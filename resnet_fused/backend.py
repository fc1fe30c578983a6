"""Which implementation serves a call: one namespace of ``torch.ops`` a backend.

``RESNET_FUSED_BACKEND=auto|cpu|eager`` sets the process's choice, :func:`use_backend` that of a block of code. ``auto``
takes, for the input's device, the first backend that is available, and falls back to ``eager`` with one warning.
"""

import contextlib
import os
import warnings
from dataclasses import dataclass

import torch

from .ops import register_fakes


@dataclass(frozen=True)
class Backend:
    """One implementation of the four ops. ``ops`` is None for ``eager``, and where it is missing."""

    name: str
    device_types: tuple[str, ...]
    ops: object | None = None
    unavailable: str | None = None  # cause and fix, where it cannot be used
    detail: str = ""  # for `python -m resnet_fused`


_backends: dict[str, Backend] = {}


def register(
    name: str, namespace: str, device_types: tuple[str, ...], unavailable: str | None = None, detail: str = ""
) -> None:
    """Add the backend whose ops are ``torch.ops.<namespace>``; ``unavailable``: why they aren't, and the fix."""
    ops = None
    if unavailable is None:
        register_fakes(namespace)
        ops = getattr(torch.ops, namespace)
    _backends[name] = Backend(name, device_types, ops, unavailable, detail)


def _register_cpu() -> None:
    unavailable, detail = None, ""
    try:
        from . import _C  # loading it registers torch.ops.resnet_fused

        detail = f"C++, instruction set {_C.cpu_capability()} (RESNET_FUSED_CPU_CAPABILITY forces another)"
    except ImportError as error:
        unavailable = (
            f"the C++ extension resnet_fused._C does not load ({error}); build it with `pip install .`, or, in a "
            "checkout, `pip install -e . --no-build-isolation`"
        )
    register("cpu", "resnet_fused", ("cpu",), unavailable, detail)


_register_cpu()
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


_chosen = os.environ.get("RESNET_FUSED_BACKEND", "auto")
if _chosen != "auto":
    get(_chosen)


@contextlib.contextmanager
def use_backend(name: str):
    """Run every fused operator called inside the ``with`` block on backend ``name`` (process-wide, not per thread).

    A backward runs on its forward's backend, wherever it is called. ValueError where the backend is unknown or
    unavailable, and, at the call, where it cannot serve the input's device.
    """
    global _chosen
    if name != "auto":
        get(name)
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def select(device_type: str) -> Backend:
    """The backend for an input on ``device_type``."""
    if _chosen != "auto":
        backend = _backends[_chosen]
        if backend.device_types and device_type not in backend.device_types:
            raise ValueError(
                f"backend {_chosen!r} serves inputs on {' or '.join(backend.device_types)}, got one on {device_type}"
            )
        return backend
    missing = None
    for backend in _backends.values():
        if device_type in backend.device_types:
            if backend.unavailable is None:
                return backend
            missing = missing or backend
    _warn_of_fallback(device_type, missing)
    return _backends["eager"]


_warned: set[str] = set()


def _warn_of_fallback(device_type: str, missing: Backend | None) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    cause = "there is none for it" if missing is None else f"{missing.name}: {missing.unavailable}"
    warnings.warn(
        f"resnet_fused has no fused backend for {device_type} tensors and runs plain PyTorch operators ({cause}). "
        "`python -m resnet_fused` lists the backends; RESNET_FUSED_BACKEND=eager silences this warning.",
        stacklevel=4,
    )
