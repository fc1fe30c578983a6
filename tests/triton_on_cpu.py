"""Triton's interpreter, made to convert as GPUs do, and to count what the kernels launch and move."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SECTOR_BYTES = 32


def convert_as_gpus_do():
    """float32 to bfloat16 to the nearest, ties to even, and back. The interpreter cuts off, and misreads subnormals."""
    convert = InterpreterBuilder.cast_impl

    def cast_impl(self, source, type):
        types = source.dtype.scalar, type.scalar
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return convert(self, source, type)

    InterpreterBuilder.cast_impl = cast_impl


@pytest.fixture
def counters(monkeypatch):
    """launches, bytes_read, bytes_written and bytes_loaded, to be reset by whoever reads them.

    An access of a tile counts an address once, as the GPU fetches it once: a channel's scale for all of its columns.
    bytes_loaded: of sectors, each counted once in a launch, however often it is read.
    """
    from resnet_fused.triton_kernels import batch_norm_add_relu

    counters, sectors = SimpleNamespace(launches=0, bytes_read=0, bytes_written=0, bytes_loaded=0), set()
    load, store, launch = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        batch_norm_add_relu.launch,
    )

    def addresses_of(pointers, mask):
        return np.unique(np.broadcast_to(pointers.data, mask.data.shape)[mask.data])

    def bytes_of(pointers, mask):
        return addresses_of(pointers, mask).size * pointers.get_element_ty().primitive_bitwidth // 8

    def count_load(self, pointers, mask, *arguments):
        counters.bytes_read += bytes_of(pointers, mask)
        loaded = set((addresses_of(pointers, mask) // SECTOR_BYTES).tolist()) - sectors
        counters.bytes_loaded += len(loaded) * SECTOR_BYTES
        sectors.update(loaded)
        return load(self, pointers, mask, *arguments)

    def count_store(self, pointers, value, mask, *arguments):
        counters.bytes_written += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    def count_launch(*arguments):
        counters.launches += 1
        sectors.clear()
        launch(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", count_store)
    monkeypatch.setattr(batch_norm_add_relu, "launch", count_launch)
    return counters
