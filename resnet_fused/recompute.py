"""Keep no output of batch_norm_relu for backward: what consumes it saves how to compute it again."""

from contextlib import nullcontext
from functools import partial

from torch import Tensor
from torch._C._autograd import _saved_tensors_hooks_is_enabled, _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks

from .autograd import is_recomputable, recompute
from .backend import is_watched


def recomputing(output):
    """A context for the call that consumes ``output``: of what it saves for backward, ``output`` is recomputed there.

    Where ``output`` does not come from a fused ``batch_norm_relu`` that autograd records, or has been edited since, the
    context does nothing; nor where somebody watches, or hooks on saved tensors are refused.
    """
    if (
        type(output) is not Tensor
        or is_watched()
        or not _saved_tensors_hooks_is_enabled()
        or not is_recomputable(output)
        or output._version != 0
    ):
        return nullcontext()
    node = output.grad_fn
    # Only the innermost hooks are called: those around (checkpointing's, an offload's) get all other tensors from here.
    pack_other, unpack_other = _top_saved_tensors_default_hooks(False) or (_watch, _unchanged)
    storage = output.untyped_storage()._cdata  # a number: a reference would keep the output

    def pack(tensor):
        if tensor.untyped_storage()._cdata == storage:
            return partial(_recomputed, node, tensor.size(), tensor.stride(), tensor.storage_offset())
        return partial(unpack_other, pack_other(tensor))

    return saved_tensors_hooks(pack, _call)


def _call(function):
    return function()


def _recomputed(node, *geometry):
    return recompute(node).as_strided(*geometry)


def _watch(tensor):
    return tensor, tensor._version


def _unchanged(packed):
    """The tensor, if nobody has edited it: under hooks autograd looks no longer."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version}"
        )
    return tensor
