"""``python -m resnet_fused --check``: what each available backend computes, against eager in float64 on the CPU."""

from itertools import product
from typing import Any

import torch

from . import functional
from .backend import all_backends, use_backend
from .ops import BatchNorm

SHAPE = 4, 16, 9, 7
# The largest error that is rounding, relative to the tensor's largest value.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ADDED = ("nothing", "residual", "batch norm of residual")


def check() -> list[dict[str, Any]]:
    """One entry for each backend, device, dtype and layout: the largest error, and the first mismatch, or None."""
    available = [backend for backend in all_backends() if backend.unavailable is None]
    places = [(backend.name, device) for backend in available for device in backend.device_types]
    places = [(name, device) for name, device in places if device == "cpu" or torch.cuda.is_available()]
    checks = []
    for (backend, device), dtype, layout in product(places, LIMITS, LAYOUTS):
        entry = {"backend": backend, "device": device, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
        entry |= {"error": 0.0, "limit": LIMITS[dtype], "mismatch": None}
        problem = _problem(device, dtype, LAYOUTS[layout])
        try:
            for added, training in product(ADDED, (True, False)):
                for name, error in _errors(backend, problem, added, training):
                    entry["error"] = max(entry["error"], error)
                    if entry["mismatch"] is None and not error <= LIMITS[dtype]:  # NaN, too
                        entry["mismatch"] = f"{name} is off by {error:.1e}; added: {added}; training={training}"
        except Exception as exception:  # of whatever kind: a launch, a compilation, a refusal
            entry["mismatch"] = f"{type(exception).__name__}: {exception}; added: {added}; training={training}"
        checks.append(entry)
    return checks


def _problem(device, dtype, memory_format):
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(SHAPE, generator=random) for name in ("input", "residual", "gradient")}
    tensors = {name: tensor.to(device, dtype, memory_format=memory_format) for name, tensor in tensors.items()}
    names = [of + name for of in ("", "residual_") for name in ("mean", "var", "weight", "bias")]
    vectors = {name: torch.rand(SHAPE[1], generator=random) + 0.5 * name.endswith("var") for name in names}
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors | {name: vector.to(device, dtype) for name, vector in vectors.items()}


def _errors(backend, problem, added, training):
    with use_backend(backend):
        node, actual = _run(problem, added, training)
    if "_Forward" not in type(node).__name__:
        raise RuntimeError("PyTorch's own operators ran")
    with use_backend("eager"):
        _, expected = _run({name: value.to("cpu", torch.float64) for name, value in problem.items()}, added, training)
    for name, value in expected.items():
        yield name, ((actual[name].to(value) - value).abs().max() / value.abs().max()).item()


def _run(problem, added, training):
    """Autograd's node, and output, gradients and running statistics by name."""
    tensors = {name: tensor.clone() for name, tensor in problem.items()}
    statistics = {f"running {name}": tensors[name] for name in tensors if name.endswith(("mean", "var"))}
    leaves = [name for name in tensors if f"running {name}" not in statistics and name != "gradient"]
    x, residual, *_ = (tensors[name].requires_grad_() for name in leaves)
    of = [BatchNorm(*(tensors[of + name] for name in ("mean", "var", "weight", "bias"))) for of in ("", "residual_")]
    if added == "batch norm of residual":
        output = functional.batch_norm_add_batch_norm_relu(x, residual, *of, training)
    else:
        output = functional.batch_norm_add_relu(x, residual if added == "residual" else None, *of[0][:4], training)
    output.backward(tensors["gradient"])
    gradients = {f"gradient of {name}": tensors[name].grad for name in leaves if tensors[name].grad is not None}
    return output.grad_fn, {"output": output.detach(), **gradients, **statistics}
