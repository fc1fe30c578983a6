"""Plants faults, one at a time, and requires the suite to turn red: ``make mutate``.

``python -m tests.mutate NAME...`` plants some of them. Each is one replacement in one file of a copy of the checkout,
which is then rebuilt. A fault that no test notices is a hole in the suite: mend the suite, not this list.
"""
# ruff: noqa: E501  one line a fault

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    name: str
    file: str
    find: str  # occurs exactly once
    replace: str
    noticed_by: str = "ops"  # the test file to try first; the whole suite follows where it stays green
    command: str = "test"  # that turns red: make test, or only make test-all


SELECTED = {"test": "not slow and not expensive", "test-all": "not slow"}  # by the Makefile's commands

KERNELS = "csrc/cpu/kernels_impl.h"
VECTORS = "csrc/cpu/vectors_impl.h"
ARGUMENTS = "csrc/arguments.h"
GLUE = "csrc/cpu/batch_norm_add_relu.cpp"
PLAN = "csrc/cpu/plan.h"
CUDA = "csrc/cuda/batch_norm_add_relu.cu"
CUDA_GLUE = "csrc/cuda/batch_norm_add_relu.cpp"
CUDA_PLAN = "csrc/cuda/plan.h"
CUDA_POOL = "csrc/cuda/max_pool.h"
DEVICE = "csrc/cuda/device.h"
REDUCE = "csrc/cuda/reduce.cuh"
TRITON = "resnet_fused/triton_kernels/kernels.py"
TRITON_GLUE = "resnet_fused/triton_kernels/batch_norm_add_relu.py"
AUTOGRAD = "resnet_fused/autograd.py"
FUNCTIONAL = "resnet_fused/functional.py"
BACKEND = "resnet_fused/backend.py"
BLOCKS = "resnet_fused/blocks.py"
CALLS = "resnet_fused/calls.py"
DEFERRED = "resnet_fused/deferred.py"
LAYERS = "resnet_fused/layers.py"
FUSING = "resnet_fused/fusing.py"
INFERENCE = "resnet_fused/inference.py"
CONVOLUTIONS = "resnet_fused/convolutions.py"
CONTENTS = "csrc/contents.h"
FOLDING = "resnet_fused/folding.py"
POOLING = "resnet_fused/pooling.py"
OPS = "resnet_fused/ops.py"
MAX_POOL = "csrc/max_pool.h"
CPU_MAX_POOL = "csrc/cpu/max_pool.h"
CPU_MAX_POOL_KERNELS = "csrc/cpu/max_pool_impl.h"
RECOMPUTE = "resnet_fused/recompute.py"
SYNCHRONIZED = "resnet_fused/synchronized.py"

FAULTS = [
    Fault("forward drops NaN", KERNELS, "V{} > value ? V{} : value", "value > V{} ? value : V{}", "edges"),
    Fault("mask passes ties", KERNELS, "passed(value, Traits<T>::kVanishing)", "passed(value, static_cast<acc_t<T>>(-1e-30))", "edges"),
    Fault("mask blocks NaN", KERNELS, "passed(value, Traits<T>::kVanishing)", "passed(value == value ? value : V{}, Traits<T>::kVanishing)", "edges"),
    Fault("mask multiplies", KERNELS, "return select(load_bits(gradient.mask + mask, extent), load(grad_output + at, extent));", "return load(grad_output + at, extent) * select(load_bits(gradient.mask + mask, extent), vector_t<T>{} + 1);", "edges"),
    Fault("mask not of y as stored", KERNELS, "passed(value, Traits<T>::kVanishing)", "passed(value, acc_t<T>{0})", "edges"),
    Fault("bfloat16 rounds ties away", VECTORS, "0x7fffu + (bits >> 16 & 1u)", "0x8000u", "edges"),
    Fault("float16 overflows early", VECTORS, "0x477ff000u", "0x477fe000u", "properties"),
    Fault("float16 subnormals", VECTORS, "magnitude < 0x38800000u", "magnitude < 0x38000000u", "properties"),
    Fault("float16 infinity read as number", VECTORS, "magnitude >= 0x0f800000u", "magnitude > 0x0f800000u", "properties"),
    Fault("float16 subnormals flushed", VECTORS, "(words)((vector)((half & 0x3ffu) | 0x3f000000u) - 0.5f)", "(words)((vector)magnitude * 0x1p112f)", "properties"),
    Fault("infinite origin", KERNELS, "origin - origin == 0 ? origin : vector_t<T>{}", "origin", "edges"),
    Fault("raw second moments", KERNELS, "Pair<T>{load(x + at, extent) * share, {}}", "Pair<T>{}", "edges"),
    Fault("last row dropped", KERNELS, "rows < at_a_time ? rows : at_a_time;", "rows < at_a_time ? rows - 1 : at_a_time;"),
    Fault("narrow row dropped", KERNELS, "slab(rest, 0, rest, 0, 1, (chunk.outer_end - rest) * entry);", ""),
    Fault("end of a run dropped", KERNELS, "slab(o, rest, o, rest, 1, chunk.inner_end - rest);", ""),
    Fault("odd columns left out", KERNELS, "if (j < width) f(Number<1>{}, place(j), Part{width - j});", ""),
    Fault("columns of a run summed as one", KERNELS, "    row.columns = 1;  // of a run, too, whose columns are summed apart\n", ""),
    Fault("sums by the mask of the first of several rows", KERNELS, "place.at += stride, place.mask += mask_stride", "place.at += stride"),
    Fault("sums by the mask of the first vector of several", KERNELS, "f(place.element(i), place.byte(i), extent,", "f(place.element(i), place.mask, extent,"),
    Fault("sums of all columns about the first vector's", KERNELS, "of_column[i] = of_columns.at(place.column_of(i))", "of_column[i] = of_columns.at(place.column)"),
    Fault("lanes past the end summed", VECTORS, "for (int64_t i = part.count; i < static_cast<int64_t>(sizeof(V) / sizeof(value[0])); ++i) value[i] = 0;", ""),
    Fault("unaligned address streamed", VECTORS, "if (address % 16 == 0) {", "if (true) {"),
    Fault("mask of the first vector of several", KERNELS, " << (i * kLanes<T>)", ""),
    Fault("columns' origins not joined", KERNELS, "sums[j] = sum + count * by;", "sums[j] = sum;"),
    Fault("columns of a narrow row counted alike", KERNELS, "outer * (rows + 1)", "outer * rows"),
    Fault("rows of the mask share bytes", PLAN, "if (mask_line() % 8 == 0 || row_outer > 1) return 1;", "return 1;"),
    Fault("blocks share a byte of the mask", PLAN, "multiple = inner * vectors <= kMaxWidth ? vectors : bytes;", "multiple = 1;"),
    Fault("second pass leaves the residual's gradient out", KERNELS, "if (dr != nullptr) store(dr + at, g[i], extent, streams);", ""),
    Fault("last block of channels dropped", PLAN, "plan.blocks = ceil_div(channels, plan.group)", "plan.blocks = channels / plan.group"),
    Fault("sign of the projection", KERNELS, "value += centered[i] * values.slope.at(j) + values.offset.at(j);", "value += values.offset.at(j) - centered[i] * values.slope.at(j);"),
    Fault("sign of the mean gradient", KERNELS, "value += centered[i] * values.slope.at(j) + values.offset.at(j);", "value += centered[i] * values.slope.at(j) - values.offset.at(j);"),
    Fault("residual not added", KERNELS, "if constexpr (kResidual == Residual::as_it_is) value += residual[i];", ""),
    Fault("chunks depend on threads", PLAN, "ceil_div(chunk, of_run) : chunk);", "ceil_div(chunk, of_run * threads) : ceil_div(chunk, threads));", "properties"),
    Fault("threads share chunks unevenly", PLAN, "many ? round_up(ceil_div(rows, kMaxChunk), kChunks)", "many ? ceil_div(rows, kMaxChunk)", "cpu_plan"),
    Fault("rows of parts of vectors streamed", PLAN, "(plan.runs || (plan.width(0) % 16 == 0 && entry * plan.row_outer % 16 == 0))", "true", "cpu_plan"),
    Fault("rows of parts of vectors", PLAN, "int64_t multiple = 16; multiple >= 8", "int64_t multiple = 8; multiple >= 8", "cpu_plan"),
    Fault("rows of parts of a byte of the mask", PLAN, "int64_t multiple = 16; multiple >= 8", "int64_t multiple = 16; multiple >= 4"),
    Fault("chunk end", PLAN, "inner_end < inner ? inner_end : inner", "inner_end < inner ? inner_end - 1 : inner"),
    Fault("biased running variance", GLUE, "m2 * (1 / (n - 1))", "m2 * (1 / n)"),
    Fault("unbiased normalisation", GLUE, "variances[c] = m2 * (1 / n)", "variances[c] = m2 * (1 / (n - 1))"),
    Fault("momentum the wrong way round", GLUE, "factor * batch[c] + (1 - factor) * running[c]", "(1 - factor) * batch[c] + factor * running[c]"),
    Fault("stale running variance", GLUE, "update(running_vars_);", ""),
    Fault("cumulative average off by one", GLUE, "static_cast<double>(*counter_of(a_))", "static_cast<double>(*counter_of(a_) + 1)"),
    Fault("eval counts", GLUE, "if (a.takes_batch() && a.norms[i].num_batches_tracked)", "if (a.norms[i].num_batches_tracked)"),
    Fault("given statistics not taken", GLUE, "a.statistics ? norm.take_given_statistics() : norm.take_running_statistics()", "norm.take_running_statistics()", "recompute"),
    Fault("input bias subtracted in eval", GLUE, "means_[c] -= dropped[c]", "means_[c] += dropped[c]"),
    Fault("input bias not in running mean", GLUE, "batch[c] += means_[c]", "batch[c] = means_[c]"),
    Fault("chunks' means not joined", GLUE, "shift * (2 * next[c].sum + count * shift)", "0"),
    Fault("rounded mean in forward", GLUE, "bias - dropped * scaled", "bias", "edges"),
    Fault("rounded mean in backward", GLUE, "(dots[c] - dropped(c) * sums[c])", "dots[c]", "edges"),
    Fault("frozen statistics treated as the batch's", GLUE, "if (!training_) coefficients.slope = coefficients.offset = nullptr;", ""),
    Fault("ambiguous layout", ARGUMENTS, "tensor.is_contiguous() || !has_channels_last_strides(tensor)", "!has_channels_last_strides(tensor)", "edges"),
    Fault("weight left out of the scale", GLUE, "rounded(invstds[c] * scale()[c], type_)", "rounded(invstds[c], type_)"),
    Fault("eps added to the deviation", GLUE, "1 / std::sqrt(variances[c] + a_.eps)", "1 / (std::sqrt(variances[c]) + a_.eps)"),
    Fault("gradient for a bias that statistics cancel", GLUE, "training_ ? 0 : sums[c] *", "sums[c] *"),
    Fault("dropped bias's gradient unscaled", GLUE, "sums[c] * coefficients_.scale()[c]", "sums[c]"),
    Fault("barrier before the reduction dropped", CUDA, "m2s.store_run(position.thread * kWidth, m2);\n  __syncthreads();", "m2s.store_run(position.thread * kWidth, m2);", "cuda_traffic"),
    Fault("barrier after the coefficients dropped", CUDA, "__syncthreads();\n  A mean[kNorms]", "A mean[kNorms]", "cuda_traffic"),
    Fault("no fence before the hand-over", CUDA, "__threadfence();  // before the arrival is seen, the sums are", "", "cuda_traffic"),
    Fault("no fence after the hand-over", CUDA, "    if (last) {\n      __threadfence();", "    if (last) {", "cuda_traffic"),
    Fault("partial sums through L1", CUDA, "first[i] = sums_.load_fresh(", "first[i] = sums_.load(", "cuda_traffic"),
    Fault("partial sums of a channel's first tile counted as of a whole one", CUDA, "walk.row == 0 ? first_columns : walk", "walk", "cuda_traffic"),
    Fault("a lane's share of a matrix over the end of its rows", REDUCE, "if (column >= columns)", "if (column > columns)", "cuda_traffic"),
    Fault("quotients one too small", CUDA_PLAN, "return quotient + (n - quotient * by.value_ >= by.value_);", "return quotient;", "cuda_plan"),
    Fault("small quotients one too small", CUDA_PLAN, "static_cast<uint32_t>(n) + 1, low", "static_cast<uint32_t>(n), low", "cuda_plan"),
    Fault("small quotients of large numbers", CUDA_PLAN, "static_cast<uint64_t>(n) >> 31 == 0)", "static_cast<uint64_t>(n) >> 33 == 0)", "cuda_plan"),
    Fault("divisions of 64 bits", CUDA_PLAN, "sizeof(N) <= 4 || static_cast<uint64_t>(n) >> 31 == 0", "sizeof(N) < 2", "cuda_static"),
    Fault("rows that are left to the first threads dropped", CUDA, "position.turns + (static_cast<int>(threadIdx.y) < position.left)", "position.turns", "cuda_traffic"),
    Fault("stale semaphore", CUDA, "arrived_.atomic_inc(parts.channel, all)", "arrived_.atomic_inc(parts.channel, all + 1)", "cuda_traffic"),
    Fault("row past the end", CUDA, "smaller(row_begin + plan.split_rows, plan.rows)", "smaller(row_begin + plan.split_rows, plan.rows + 1)", "cuda_traffic"),
    Fault("mask's bits the wrong way round", CUDA, "<= 0)) << k;", "<= 0)) << (kWidth - 1 - k);", "cuda_traffic"),
    Fault("mask's lanes the wrong way round", CUDA, "bits / kWidth) << bits;", "bits / kWidth) | passed << bits;", "cuda_traffic"),
    Fault("index of 32 bits", CUDA, "  int64_t row, element, byte;", "  int64_t row; int element; int64_t byte;", "cuda_traffic"),
    Fault("rows loaded ahead one too near", CUDA, "loaded_[i] = load_(ahead(kAhead));", "loaded_[i] = load_(ahead(1));", "cuda_traffic"),
    Fault("one row under way", CUDA, "rows_of<3, false>", "rows_of<1, false>", "cuda_static"),
    Fault("halves taken apart as they are loaded", "csrc/cuda/memory.cuh", "std::conditional_t<n * sizeof(T) % 4 == 0, uint32_t, T>", "std::conditional_t<sizeof(T) == 8, uint32_t, T>", "cuda_static"),
    Fault("a division a value in the joins", REDUCE, "if (column >= columns) column -= columns, ++row;", "row += column / columns, column %= columns;", "cuda_static"),
    Fault("partial sums loaded one by one", CUDA, "constexpr int kAtOnce = 4;", "constexpr int kAtOnce = 1;", "cuda_static"),
    Fault("the mean for the shift that is left ready", CUDA, "ready.store(2 * plan.channels + c, coefficients.shift);", "ready.store(2 * plan.channels + c, coefficients.mean);", "cuda_traffic"),
    Fault("tile's channels of 32 bits", CUDA, "tile, split, tile_begin, row_begin, row_end, first_channel;", "tile, split, tile_begin, row_begin, row_end; int first_channel;", "cuda_traffic"),
    Fault("origin left out", CUDA, "widen(x[k]) - origin[k], deviation", "widen(x[k]), deviation", "edges"),
    Fault("mean by Welford alone", CUDA, "sum[k] += value;", "sum[k] = mean[k] * static_cast<A>(count);", "edges"),
    Fault("origin of one value", CUDA, "c < smaller ? smaller : c > larger ? larger : c;", "a;", "edges"),
    Fault("every block counts the batch", CUDA, "blockIdx.x == 0 && position.thread == 0", "position.thread == 0", "ops"),
    Fault("cumulative average before the count", CUDA, "(f.num_batches_tracked, 1).load(0) + 1)", "(f.num_batches_tracked, 1).load(0))", "ops"),
    Fault("eval's statistics unwritten", CUDA, "position.split == 0 &&", "position.split == 1 &&", "ops"),
    Fault("CUDA: mask not of y as stored", CUDA, "!(widen(y[k]) <= 0)", "!(value <= 0)", "edges"),
    Fault("CUDA: sign of the projection", CUDA, "g - offset[k] - centered", "g - offset[k] + centered", "ops"),
    Fault("CUDA: rounded mean in backward", CUDA, "dot -= dropped * sum;", "", "edges"),
    Fault("CUDA: frozen statistics projected", "csrc/cuda/kernels.h", "return training && grad_input", "return grad_input", "ops"),
    Fault("CUDA: of equal values the last wins", CUDA, "value > best[k] ||", "value >= best[k] ||", "max_pool"),
    Fault("CUDA: what is beside a row is pooled", CUDA_POOL, "pixel(window, k - 1) >= pixels", "pixel(window, k - 1) > pixels", "max_pool"),
    Fault("CUDA: what is before a row is pooled", CUDA_POOL, "while (k < kernel && pixel(window, k) >= pixels) ++k;", "", "max_pool"),
    Fault("CUDA: the first image's windows in all", CUDA, "is_in_images ? place.row * f.plan.columns : 0", "0", "max_pool"),
    Fault("CUDA: the first image's gradients in all", CUDA, "is_in_images ? place.row * row_outputs : 0", "0", "max_pool"),
    Fault("CUDA: what is dilated is taken as it is", CUDA, "rows.dilation == 1 ? below", "true ? below", "max_pool"),
    Fault("CUDA: a window without a value is 0", CUDA, " && window.rows > 0 ? 0", " ? 0", "max_pool"),
    Fault("CUDA: a window's values loaded one by one", CUDA, "constexpr unsigned kAtOnce = 3;", "constexpr unsigned kAtOnce = 1;", "cuda_static"),
    Fault("CUDA: what was clipped wins", CUDA, "best[k] <= 0 ? kNoWinner", "best[k] < 0 ? kNoWinner", "max_pool"),
    Fault("CUDA: winners of another row of a window", CUDA, "kw < columns.kernel && kw *", "kw *", "max_pool"),
    Fault("CUDA: a vector's columns win alike", CUDA, "beside + (kWindow == 1 ? k : 0)", "beside", "max_pool"),
    Fault("CUDA: coefficients by the output's plan", CUDA, "coefficients_of<A>(f.plan, norm.scratch)", "coefficients_of<A>(plan, norm.scratch)", "max_pool"),
    Fault("CUDA: last window dropped", CUDA_POOL, "return last < count ? last + 1 : count;", "return last < count ? last : count;", "max_pool"),
    Fault("CUDA: pooled vectors across rows", CUDA_GLUE, "input.size(3) * input.element_size() % 16 == 0", "true", "max_pool"),
    Fault("CUDA: unaligned winners", CUDA_GLUE, "is_aligned({b.mask})", "true", "cuda_traffic"),
    Fault("semaphores by the stream's handle", DEVICE, 'check(cudaStreamGetId(stream_, &id), "cudaStreamGetId");', "id = reinterpret_cast<uintptr_t>(stream_);", "cuda_glue"),
    Fault("a graph takes its stream's semaphores", DEVICE, " && capture == cudaStreamCaptureStatusNone", "", "cuda_glue"),
    Fault("more semaphores than a stream has", DEVICE, "count <= kSemaphores && ", "", "cuda_glue"),
    Fault("later streams share semaphores", DEVICE, "if (streams.size() == kStreams) return nullptr;", "if (streams.size() == kStreams) return streams.begin()->second;", "cuda_glue"),
    Fault("semaphores of one device for all", DEVICE, "(*devices)[index_]", "(*devices)[0]", "cuda_glue"),
    Fault("a call's semaphores not zeroed", DEVICE, "      zero(zeros_);\n", "", "cuda_glue"),
    Fault("a call's semaphores freed before the launch", DEVICE, "return static_cast<unsigned*>(zeros_.data_ptr());", "return static_cast<unsigned*>(Tensor(std::move(zeros_)).data_ptr());", "cuda_glue"),
    Fault("a call's semaphores outlive it", DEVICE, "zeros_ = empty_tensor(input_, {count}, aoti_torch_dtype_int32());", "zeros_ = *new Tensor(empty_tensor(input_, {count}, aoti_torch_dtype_int32()));", "cuda_glue"),
    Fault("device not made the current one", DEVICE, "guard_(index_)", "guard_(0)", "cuda_glue"),
    Fault("device 0's stream", DEVICE, "aoti_torch_get_current_cuda_stream(index_,", "aoti_torch_get_current_cuda_stream(0,", "cuda_glue"),
    Fault("launched on the default stream", CUDA_GLUE, "cuda::backward(b, device.stream());", "cuda::backward(b, nullptr);", "cuda_glue"),
    Fault("failed launch unnoticed", "csrc/cuda/launch.cuh", "if (error != cudaSuccess) {", "if (false) {", "cuda_glue"),
    Fault("failed backward under another op's name", CUDA_GLUE, '"batch_norm_add_relu_backward", a.input()', '"batch_norm_add_relu", a.input()', "cuda_glue"),
    Fault("older GPU told nothing", CUDA_GLUE, "error.code == cudaErrorNoKernelImageForDevice", "error.code == cudaErrorInvalidConfiguration", "cuda_glue"),
    Fault("unaligned tensors in vectors", CUDA_PLAN, "if (!aligned || base", "if (base", "cuda_traffic"),
    Fault("group's mask of the whole warp", REDUCE, "(1u << lanes) - 1", "0xffffffffu", "cuda_traffic"),
    Fault("Triton: mask not of y as stored", TRITON, "stored = y.to(matrix.ACC)", "stored = value", "edges"),
    Fault("Triton: mask's bits the wrong way round", TRITON, "bits << tl.arange(0, 8)", "bits << 7 - tl.arange(0, 8)", "gradients"),
    Fault("Triton: rows past the end summed", TRITON, "total = tl.where(left[:, None], new_total, total)", "total = new_total"),
    Fault("Triton: columns past the end stored", TRITON, "tl.store(output + at, y, mask=valid)", "tl.store(output + at, y, mask=(row < row_end)[:, None])"),
    Fault("Triton: stale partial sums", TRITON, "* matrix.splits + split\n", "* matrix.splits\n"),
    Fault("Triton: last split as long as the others", TRITON, "columns * tl.minimum(matrix.rows - row, matrix.split_rows)", "columns * matrix.split_rows"),
    Fault("Triton: only the first partial sums", TRITON, "total += _load_parts(matrix, partials, 0, channel, part, parts)", "total = _load_parts(matrix, partials, 0, channel, part, parts)", "triton_traffic"),
    Fault("Triton: NaN in all channels of a tile", TRITON, "return tl.sum(tl.where(of_channel, values[None, :], 0), axis=1)", "return tl.sum(of_channel * values[None, :], axis=1)", "edges"),
    Fault("Triton: origin left out", TRITON, "_welford(x - origin, 1 / count, mean", "_welford(x, 1 / count, mean", "edges"),
    Fault("Triton: infinite origin", TRITON, "tl.where(median - median == 0, median, 0)", "median", "edges"),
    Fault("Triton: rounded mean in forward", TRITON, "tl.fma(-dropped, scale.to(tl.float64), bias)", "bias", "edges"),
    Fault("Triton: rounded mean in backward", TRITON, "tl.sum(dot, axis=0) - dropped * grad", "tl.sum(dot, axis=0)", "edges"),
    Fault("Triton: every program counts the batch", TRITON, "if tl.program_id(0) == 0:", "if tl.program_id(0) >= 0:"),
    Fault("Triton: cumulative average before the count", TRITON, "(tl.load(norm.num_batches_tracked) + 1).to(tl.float64)", "tl.load(norm.num_batches_tracked).to(tl.float64)"),
    Fault("Triton: eval's statistics unwritten", TRITON, "if split == 0:", "if split == 1:"),
    Fault("Triton: sign of the projection", TRITON, "tl.fma(-centered, slope[None, :]", "tl.fma(centered, slope[None, :]"),
    Fault("Triton: frozen statistics projected", TRITON_GLUE, "            if training and need_input:\n", "            if need_input:\n"),
    Fault("Triton: strided statistics not written back", TRITON_GLUE, "vector.copy_(written)", "pass", "edges"),
    Fault("Triton: offsets of 32 bits", TRITON, "row[:, None] * _columns(matrix) + column", "row[:, None].to(tl.int32) * _columns(matrix) + column", "triton_static"),
    Fault("Triton: four warps for windows", TRITON_GLUE, "plan.warps(8 if windows and", "plan.warps(4 if windows and", "triton_static", "test-all"),
    Fault("Triton: fewer programs than an H100 has room for", "resnet_fused/triton_kernels/plan.py", "range(64, 256)", "range(0)", "triton_static"),
    Fault("Triton: narrow accesses", "resnet_fused/triton_kernels/plan.py", "width = 16 // element_size", "width = 1", "triton_static"),
    Fault("Triton: of equal values the last wins", TRITON, "(value > best) |", "(value >= best) |", "max_pool"),
    Fault("Triton: what is beside a row is pooled", TRITON, "(pixel < axis.size)", "(pixel <= axis.size)", "max_pool"),
    Fault("Triton: what was clipped wins", TRITON, "best <= 0, NO_WINNER", "best < 0, NO_WINNER", "max_pool"),
    Fault("Triton: compared before it is rounded", TRITON, "value = _rectified(value, output).to(matrix.ACC)", "value = tl.where(value < 0, 0, value)", "max_pool"),
    Fault("Triton: winners of another row of a window", TRITON, " & (k < axis.KERNEL)", "", "max_pool"),
    Fault("Triton: first window dropped", TRITON_GLUE, "min(reach // stride + 1, windows)", "min(max(reach // stride, 1), windows)", "max_pool"),
    Fault("Triton: wide accesses to pixels that are apart", TRITON_GLUE, "1 if is_pooled and plan.inner > 1 else plan.width", "plan.width", "triton_static"),
    Fault("double backward takes statistics as constants", AUTOGRAD, "correction=0)\n", "correction=0)\n        mean = mean.detach()\n", "gradients"),
    Fault("residual normalised as the input is", KERNELS, "normalized(residual[i], of_residual..., j)", "normalized(residual[i], values, j)"),
    Fault("one momentum for both batch norms", ARGUMENTS, "residual_momentum, residual_eps.value_or(0)", "momentum, residual_eps.value_or(0)"),
    Fault("statistics shared by both batch norms", ARGUMENTS, "!share(norms[0].running_var, norms[1].running_var) &&", "", "edges"),
    Fault("CUDA: residual's shift in the place of both", CUDA, "sum_of_shifts += coefficients.shift", "sum_of_shifts = coefficients.shift"),
    Fault("CUDA: every block of the first batch norm", CUDA, "parameters.count == 2 ? blockIdx.x % 2 : 0", "0"),
    Fault("CUDA: batch norms share semaphores", CUDA_GLUE, "device.zeros(count * channels) + i * channels", "device.zeros(count * channels)", "cuda_traffic"),
    Fault("double backward through one of two batch norms", AUTOGRAD, "residual = _batch_norm(statistics[1], training, residual_eps, residual, *of_residual)", "pass", "gradients"),
    Fault("second derivative not masked", AUTOGRAD, "passed = unpack_mask(mask, tensors[0])", "passed = torch.ones_like(tensors[0], dtype=torch.bool)", "gradients"),
    Fault("double backward by the unbiased variance", AUTOGRAD, "correction=0", "correction=1", "gradients"),
    Fault("second gradient for what is no tensor", AUTOGRAD, "grad if is_needed else None for grad", "grad for grad", "gradients"),
    Fault("second gradient of a bias left out", AUTOGRAD, "grad if is_needed else None for grad", "grad if is_needed and grad.any() else None for grad", "gradients"),
    Fault("second gradient of an input bias left out", AUTOGRAD, "mean = mean - (input_bias - input_bias.detach())", "pass", "gradients"),
    Fault("edited output recomputed", RECOMPUTE, "        or output._version != 0\n", "", "recompute"),
    Fault("edits unnoticed beside a recomputed output", RECOMPUTE, "if tensor._version != version:", "if False:", "recompute"),
    Fault("hooks around bypassed", RECOMPUTE, "_top_saved_tensors_default_hooks(False) or (_watch, _unchanged)", "_watch, _unchanged", "recompute"),
    Fault("view of the output taken for it", RECOMPUTE, ".as_strided(*geometry)", "", "recompute"),
    Fault("refusal not explained", FUNCTIONAL, "    check(*arguments, is_whole_batch=group is None)\n", "", "edges"),
    Fault("refused input counted", AUTOGRAD, "        try:\n            check(", "        if batch_norm.num_batches_tracked is not None:\n            batch_norm.num_batches_tracked.add_(1)\n        try:\n            check(", "edges"),
    Fault("Triton's refusals raised", AUTOGRAD, "    except (RuntimeError, TypeError, ValueError):", "    except RuntimeError:", "backend"),
    Fault("refused, and no layers run", AUTOGRAD, "except (TypeError, ValueError):\n            return None", "except KeyError:\n            return None", "fuse_changes"),
    Fault("saved tensors taken as hooks return them", AUTOGRAD, "if _top_saved_tensors_default_hooks(False) is not None:", "if False:", "recompute"),
    Fault("saved tensors unpacked twice", AUTOGRAD, "saved, ctx.unpacked = ctx.unpacked or _saved(ctx), None", "saved = _saved(ctx)", "recompute"),
    Fault("untracked batch norm counts", CALLS, 'buffers["num_batches_tracked"] if is_tracking else None', 'buffers["num_batches_tracked"]', "blocks"),
    Fault("untracked batch norm updates", CALLS, "    if training and not is_tracking:", "    if False:", "blocks"),
    Fault("conv3's bias lost", CALLS, "norm._replace(bias=residual_bias if norm.bias is None else norm.bias + residual_bias)", "norm", "blocks"),
    Fault("bias lost where a tail runs unfused", CALLS, "output = bn(add_bias(*convolved))", "output = bn(convolved.output)", "blocks"),
    Fault("residual that eager refuses", CALLS, "except (TypeError, ValueError):", "except KeyError:", "blocks"),
    Fault("convolution's bias kept", CALLS, "return Convolved(conv._conv_forward(input, conv.weight, None), conv.bias)", "return Convolved(conv(input))", "blocks"),
    Fault("bypassed convolution's hooks", CALLS, "if is_batched and is_plain(conv):", "if is_batched:", "blocks"),
    Fault("forward of an instance bypassed", CALLS, '        and "forward" not in layer.__dict__\n', "", "blocks"),
    Fault("global hooks bypassed", CALLS, "        and not _has_any_global_hook()\n", "", "blocks"),
    Fault("hooks bypassed", CALLS, "and not layer._forward_hooks", "", "blocks"),
    Fault("subclass bypassed", CALLS, "layer.__class__ in classes", "isinstance(layer, classes)", "blocks"),
    Fault("deferred unwatched", DEFERRED, "self.rectified is not None and self.reason is None", "self.reason is None", "fusing"),
    Fault("other uses forgotten", DEFERRED, '(tail if type(tail) is Rectified else tail.learned).refuse(f"its output went to {name}")', "pass", "fuse"),
    Fault("watched output that is kept", DEFERRED, "if not self.defers and self.rectified and any(", "if False and any(", "fuse"),
    Fault("watched output used twice", DEFERRED, "not any(tensor.is_used for tensor in tensors) and", "", "fuse"),
    Fault("watched under another mode", DEFERRED, "return versions_hold and under(self.versions[0][0]) == self.under", "return versions_hold", "fuse"),
    Fault("input changed in the watched call", DEFERRED, "all(tensor._version == version for tensor, version in self.versions)", "True", "fuse"),
    Fault("user's tensor watched", DEFERRED, "is_add = is_add and (", "is_add = is_add or False and (", "fusing"),
    Fault("watched class pickled", DEFERRED, "self.__class__ = Tensor\n", "pass\n", "fusing"),
    Fault("learnt while a call may be repeated", DEFERRED, "if not self.outstanding and not is_in_backward():", "if not is_in_backward():", "fuse"),
    Fault("a sum with alpha", DEFERRED, 'kwargs == {"alpha": 1}', "True", "fuse"),
    Fault("residual of other strides joined", DEFERRED, " or b.stride() != x.stride()", "", "fuse"),
    Fault("residual of another shape joined", DEFERRED, "b.shape != x.shape or ", "", "fuse"),
    Fault("residual of another type joined", DEFERRED, "b.dtype != x.dtype or ", "", "fuse"),
    Fault("sum with itself", DEFERRED, " or residual.learned is call.learned", "", "fuse"),
    Fault("relu under another mode", DEFERRED, " and under(self.input) == self.under", "", "fuse_changes"),
    Fault("made under the mode of the use", DEFERRED, "            contexts.enter_context(torch.set_grad_enabled(grad_mode))\n", "", "fuse_changes"),
    Fault("made under the hooks of the use", DEFERRED, "if hooks != _top_saved_tensors_default_hooks(False):", "if False:", "fuse_changes"),
    Fault("made on another stream", DEFERRED, "            if stream is not None:\n", "            if False:\n", "fuse"),
    Fault("input changed before it is used", DEFERRED, "        if self._version() != self.version:", "        if False:", "fuse_changes"),
    Fault("residual changed before it is used", DEFERRED, "elif residual._version != self.version:", "elif False:", "fuse_changes"),
    Fault("gradient of a shortcut counted twice", DEFERRED, "tensor.view_as(tensor)", "tensor", "fuse_changes"),
    Fault("gradient of what was changed in place", DEFERRED, "        if tail.is_stale:", "        if False:", "fuse_changes"),
    Fault("statistics updated at every use", DEFERRED, "if self.training and not self.pay():", "if self.training and not self.pay() and False:", "fuse_changes"),
    Fault("second use of a rectified output fused", DEFERRED, "is_as_called and not self.is_used and", "is_as_called and", "fuse_changes"),
    Fault("called twice before the first is used", DEFERRED, "settle(self.statistics)  # called twice", "pass  # called twice", "fuse"),
    Fault("output that nobody uses", DEFERRED, "        if self.owes:\n", "        if False:\n", "fuse"),
    Fault("statistics twice where a hook raises", DEFERRED, "owed = [call.pay() for call in calls]", "owed = [call.owes for call in calls]", "recompute"),
    Fault("output changed after its sum", DEFERRED, "self.output._version != self.output_version", "False", "fuse_changes"),
    Fault("batch norms in modes of their own", DEFERRED, "residual.training != call.training or", "", "fuse"),
    Fault("alias of what a sum changed in place", DEFERRED, "tensor.tail.is_stale, tensor.tail = True, tail", "tensor.tail.is_stale = True", "fuse"),
    Fault("alias of what a ReLU changed in place", DEFERRED, "tail.output, tail.is_stale = output, True", "tail.is_stale = True", "fuse_changes"),
    Fault("watched for ever", DEFERRED, "        if self.calls > 2:\n", "        if False:\n", "fuse"),
    Fault("sum with a tensor of somebody's class watched", DEFERRED, "is_alone = {*types} == {cls}", "is_alone = Deferred not in types", "fuse"),
    Fault("watched tensor in a compiled function", DEFERRED, "if function in GEOMETRY or (cls.has_data and torch.compiler.is_compiling()):", "if function in GEOMETRY:", "watchers"),
    Fault("residual of inference mode watched", DEFERRED, "any(isinstance(arg, Tensor) and arg.is_inference() for arg in args)", "False", "fuse"),
    Fault("residual of inference mode joined", DEFERRED, "        if b.is_inference():", "        if False:", "fuse"),
    Fault("residual of somebody's class joined", DEFERRED, "elif type(b) is not Tensor and type(b) is not nn.Parameter:", "elif not isinstance(b, Tensor):", "fuse"),
    Fault("sum into a plain tensor put off", DEFERRED, "        if is_in_place:  # by what", "        if False:  # by what", "fuse_changes"),
    Fault("sum under another mode", DEFERRED, "type(call) is not Call or not call.is_open()", "type(call) is not Call", "fuse_changes"),
    Fault("output that was made fused, too", DEFERRED, " and not self.is_used and self.output is None", " and not self.is_used", "fuse_changes"),
    Fault("residual changed before the ReLU of its sum", DEFERRED, "else residual._version == self.version\n", "else True\n", "fuse_changes"),
    Fault("second batch norm's output changed after its sum", DEFERRED, "(residual.value() if", "(residual.make() if", "fuse_changes"),
    Fault("bias changed before it is used", DEFERRED, "version += bias._version", "pass", "fuse_changes"),
    Fault("running variance changed before it is used", DEFERRED, "version + running_mean._version + running_var._version", "version + running_mean._version", "fuse_changes"),
    Fault("no gradient for who never asks", DEFERRED, "return Promise.apply(kind, tail, *tail.tensors()) if torch.is_grad_enabled() else kind(tail)", "return kind(tail)", "fuse_changes"),
    Fault("no second gradient for who never asks", DEFERRED, "create_graph=torch.is_grad_enabled()", "create_graph=False", "fuse_changes"),
    Fault("learnt in the midst of a backward", DEFERRED, "if not self.outstanding and not is_in_backward():", "if not self.outstanding:", "fuse"),
    Fault("refused while a call may be repeated", DEFERRED, "self.token = learned.token()", "self.token = None", "fuse"),
    Fault("refused by the operator, and never counted", DEFERRED, "owed if output is None else [False, False]", "[False, False]", "fuse_changes"),
    Fault("replica writes to its model's buffers", LAYERS, '        vars(self)["_buffers"], self._own_buffers = buffers, OwnBuffers(buffers)\n', "        pass\n", "fusing"),
    Fault("copied plain", LAYERS, "type(self).__new__(type(self))", "self.plain_class.__new__(self.plain_class)", "fusing"),
    Fault("convolutions keep what could be recomputed", LAYERS, "dict.fromkeys(CONVOLUTIONS, RecomputingConvolution)", "{}", "recompute"),
    Fault("inference-mode input watched", LAYERS, "            and not input.is_inference()\n", "", "fuse"),
    Fault("recomputed under refused hooks", RECOMPUTE, " or not _saved_tensors_hooks_is_enabled()", "", "recompute"),
    Fault("recomputed under a watcher", RECOMPUTE, "        or is_watched()\n", "", "recompute"),
    Fault("pre-hooks bypassed", CALLS, "        and not layer._forward_pre_hooks\n", "", "blocks"),
    Fault("backward hooks bypassed", CALLS, "        and not layer._backward_hooks\n", "", "blocks"),
    Fault("backward pre-hooks bypassed", CALLS, "        and not layer._backward_pre_hooks\n", "", "blocks"),
    Fault("operators under a function mode", BACKEND, "or (_len_torch_function_stack() and", "or (False and", "watchers"),
    Fault("residual of a subclass taken for a tensor", BACKEND, "        if type(tensor) not in _PLAIN_TYPES:\n", "        if False:\n", "watchers"),
    Fault("graph broken by the report's note", DEFERRED, "_dynamo_marked_constant = True", "_dynamo_marked_constant = False", "watchers"),
    Fault("learnt left behind by unfuse", FUSING, "        del vars(module)[name]\n", "        pass\n", "fusing"),
    Fault("statistics read too early", LAYERS, "settle((attributes[name],))", "pass", "fuse"),
    Fault("statistics used too early in eval", LAYERS, "        settle((norm.running_mean, norm.running_var, norm.num_batches_tracked))\n", "", "fuse"),
    Fault("state_dict read too early", LAYERS, "settle(buffers.values())", "pass", "fuse"),
    Fault("hooks on a swapped layer", LAYERS, "            and is_plain(self)\n", "", "fuse_changes"),
    Fault("class of batch norms patched", LAYERS, "self.plain_class.forward in _FORWARDS and F.batch_norm", "F.batch_norm", "fuse_changes"),
    Fault("F.batch_norm patched", LAYERS, " and F.batch_norm is _BATCH_NORM", "", "fuse_changes"),
    Fault("tensors without versions put off", DEFERRED, "            except RuntimeError:  # of", "            except KeyError:  # of", "fuse"),
    Fault("fused in eval on a CPU", LAYERS, "            if is_done and input.is_cpu and", "            if False and", "models"),
    Fault("batch norm of something else than the input", LAYERS, "        if not offered.is_normalized:\n", "        if False:\n", "reach"),
    Fault("what holds a batch norm taken for one", LAYERS, "in name and not any(isinstance(layer, _BATCH_NORM_CLASS) for layer in module.modules())", "in name", "reach"),
    Fault("property of a statistic's name", LAYERS, "return getattr(super(Deferring, self), name)", "raise AttributeError(name)", "reach"),
    Fault("PyTorch's error of dimensions lost", LAYERS, "            and input.dim() > 1\n", "", "reach"),
    Fault("arguments beside the input", LAYERS, "if args or kwargs or input is _ABSENT:", "if input is _ABSENT:", "reach"),
    Fault("any product taken for a batch norm", LAYERS, "    if not is_per_channel(scale, input):\n", "    if False:\n", "reach"),
    Fault("frozen batch norm known by its name", LAYERS, " and is_plain(layer) and _computes_batch_norm(layer)", "", "inference"),
    Fault("frozen batch norm that promotes", LAYERS, " and self.weight.dtype is input.dtype:", ":", "inference"),
    Fault("vector added to a batch's statistics", DEFERRED, "is_bias = not call.training and", "is_bias =", "reach"),
    Fault("vector added in place of a bias", DEFERRED, " and call.norm.bias is None and", " and", "reach"),
    Fault("dropout lost", DEFERRED, '(kwargs["p"] == 0 or (0 < kwargs["p"] <= 1 and not kwargs["training"]))', "True", "reach"),
    Fault("winner: the last of equals", CPU_MAX_POOL_KERNELS, "(value > best) |", "(value >= best) |", "max_pool"),
    Fault("winner: no NaN", CPU_MAX_POOL_KERNELS, "(value > best) | (value != value)", "value > best", "max_pool"),
    Fault("winner: of what is clipped, too", CPU_MAX_POOL_KERNELS, "    winner = best <= 0 ? lanes_t<T>{} + kNoWinner : winner;\n", "", "max_pool"),
    Fault("winner: of the first window alone", CPU_MAX_POOL_KERNELS, "sum += select(won", "if (t == 0) sum += select(won", "max_pool"),
    Fault("windows: rows above the image", CPU_MAX_POOL_KERNELS, "if (h < 0 || h >= rows.height)", "if (h >= rows.height)", "max_pool"),
    Fault("windows: no padding before a row", CPU_MAX_POOL, "return {windows.stride[1], values, before, before +", "return {windows.stride[1], values, 0, before +", "max_pool"),
    Fault("windows: a row too few kept", CPU_MAX_POOL, "power_of_two(reach(0) + 1)", "power_of_two(reach(0))", "max_pool"),
    Fault("windows: a row of theirs too few kept", CPU_MAX_POOL, "power_of_two(reach(0) / windows.stride[0] + 1)", "power_of_two(reach(0) / windows.stride[0])", "max_pool"),
    Fault("windows: the next row copied too early", CPU_MAX_POOL_KERNELS, "(in_phase.row < of_rows[0].phase ? 1 : 0)", "0", "max_pool"),
    Fault("windows: of another image", CPU_MAX_POOL_KERNELS, "next = index == begin || window.row == 0 ? top :", "next = index == begin ? top :", "max_pool"),
    Fault("windows: rows split where chunks end", PLAN, "return elements < width ? width : elements / width * width;", "return elements;", "max_pool"),
    Fault("windows: beyond the input", MAX_POOL, "if ((output[axis] - 1) * stride[axis] >= size + padding[axis]) return false;", "", "max_pool"),
    Fault("windows: of 256 positions", OPS, "kernel_size[1] > 255", "kernel_size[1] > 256", "max_pool"),
    Fault("windows: sources in another order", OPS, "position // self.kernel_size[1], position % self.kernel_size[1]", "position % self.kernel_size[0], position // self.kernel_size[0]", "max_pool"),
    Fault("pooled without its input's shape", AUTOGRAD, "if max_pool is not None and input is None:", "if False:", "max_pool"),
    Fault("pooled output recomputed", AUTOGRAD, "residual is None and max_pool is None and", "residual is None and", "max_pool"),
    Fault("ReLU put off for a pooling of another mode", DEFERRED, "not first.is_used and first.call.holds():", "not first.is_used:", "max_pool"),
    Fault("ReLU put off, not latched", DEFERRED, "tail.learned.defers_relu:", "tail.learned.pools:", "max_pool"),
    Fault("ReLU put off for others, too", DEFERRED, "self.call.learned.pools, self.__class__ = False, Tensor", "self.__class__ = Tensor", "max_pool"),
    Fault("ReLU put off though its output is kept", DEFERRED, "                self.pools = False  # that is kept\n", "                pass\n", "max_pool"),
    Fault("ReLU put off again for who asked once", DEFERRED, "    def refuse(self, reason):\n        self.learned.pools = False", "    def refuse(self, reason):\n        pass", "max_pool"),
    Fault("ReLU put off, and not made", DEFERRED, "self.output = F.relu(self.call.value()) if output is None else output", "self.output = self.call.value() if output is None else output", "max_pool"),
    Fault("ReLU put off, and no gradient of it", DEFERRED, "return F.relu(self.call.of(*tensors))", "return self.call.of(*tensors)", "max_pool"),
    Fault("ReLU in place leaves the old name behind", DEFERRED, "return _replaced(tensor, Rectified(tail)) if is_in_place else defer(Rectified(tail))", "return defer(Rectified(tail))", "max_pool"),
    Fault("a stem in eval on CPUs plain", LAYERS, "(learned.rectified and not learned.pools)", "learned.rectified", "max_pool"),
    Fault("a block takes a watched input for a subclass", BLOCKS, "        if type(X) is WatchedRectified:\n            X.let_go()\n", "", "synchronized"),
    Fault("pooling: ceil_mode forgotten", LAYERS, "self.dilation, self.ceil_mode", "self.dilation, False", "pooling"),
    Fault("pooling: positions as asked for", LAYERS, "not self.return_indices and", "", "pooling"),
    Fault("pooling: gradient of another layout", POOLING, "dtype=grad_output.dtype, memory_format=ctx.memory_format", "dtype=grad_output.dtype", "pooling"),
    Fault("pooling: hooks", LAYERS, "is_worth(input) and is_plain(self) and", "is_worth(input) and", "pooling"),
    Fault("pooling: F.max_pool2d patched", LAYERS, " and F.max_pool2d is _MAX_POOL2D", "", "pooling"),
    Fault("pooling: positions in the order of channels_last", POOLING, "return [tensor.contiguous(memory_format=memory_format_of(input)) for tensor in both]", "return both[0].contiguous(), both[1].permute(0, 2, 3, 1).contiguous().view_as(both[0])", "pooling"),
    Fault("any threshold taken for a ReLU", DEFERRED, "args[1:] == (0, 0)", "True", "reach"),
    Fault("sum of three given up", DEFERRED, "if len({tensor.is_sum for tensor in tensors}) == 2 and", "if False and", "fuse"),
    Fault("strides of a sliced input", LAYERS, "            and has_strides_of_output(input)\n", "", "fuse"),
    Fault("one value a channel put off", LAYERS, "            and not (self.training and input.numel() == input.shape[1] and group_of(self) is None)\n", "", "fuse"),
    Fault("pickle names a class of ours", LAYERS, "return make, (self.plain_class, *arguments), plain_state(self)", "return make, (type(self), *arguments), plain_state(self)", "fusing"),
    Fault("pickle holds what was learnt", LAYERS, "if name not in _OWN}", "}", "fusing"),
    Fault("swapped class shows", LAYERS, "property(lambda self: self.plain_class, set_class)", "property(lambda self: type(self), set_class)", "fusing"),
    Fault("a copy shares what was learnt", DEFERRED, "        return type(self)(self.name)\n", "        return self\n", "fusing"),
    Fault("Residual's patched forward lost", FUSING, "and Residual.forward is _FORWARD_OF_RESIDUAL", "", "fusing"),
    Fault("plain after unfused", FUSING, "set_class(module, swapped_class)\n", "pass\n", "fusing"),
    Fault("class given inside unfused lost", FUSING, "if type(module) is plain[module] is not swapped_class:", "if plain[module] is not swapped_class:", "fusing"),
    Fault("learnt forgotten by unfused", FUSING, "                vars(module).update(state)\n", "", "fusing"),
    Fault("swapped before filter_fn has agreed to all", FUSING, "            swaps[module] = name, swapped\n", "            swaps[module] = name, swapped\n            set_class(module, swapped)\n", "fusing"),
    Fault("outputs without versions watched", DEFERRED, " or output.is_inference():", ":", "fuse"),
    Fault("example inputs in training", FUSING, "model.eval()(*(inputs", "model(*(inputs", "fusing"),
    Fault("modes lost by example inputs", FUSING, "                module.training = training\n", "                pass\n", "fusing"),
    Fault("inference: changed before it is used", INFERENCE, "            if tensor._version != version:", "            if False:", "inference"),
    Fault("inference: residual changed before it is used", INFERENCE, "versions = *versions, (residual, residual._version)", "pass", "inference"),
    Fault("inference: changed in the watched call", INFERENCE, "for tensor in (input, *parameters)", "for tensor in ()", "inference"),
    Fault("inference: activations kept by the watched call", INFERENCE, "        self.versions.clear()  # which", "        pass  # which", "inference"),
    Fault("inference: output that is kept", INFERENCE, "self.steps[: min(kept, default=None)]", "self.steps", "inference"),
    Fault("inference: other uses forgotten", INFERENCE, "            self.learned.cut(len(self.steps))\n", "            pass\n", "inference"),
    Fault("handed on: what others write to is what convolutions read", INFERENCE, "output.clone() if self.is_read else output", "output", "inference"),
    Fault("handed on: sums with what anybody may change", INFERENCE, "(residual.output is not None or residual._is_of_chains())", "True", "inference"),
    Fault("handed on: a shortcut that somebody has overwritten", INFERENCE, "return self.residual, chain() is None", "return self.residual, True", "inference"),
    Fault("handed on: parameters that must not change until it is computed", INFERENCE, "        self.versions = ()\n", "", "inference"),
    Fault("handed on: any number of layers", INFERENCE, "MOST_PENDING = 64", "MOST_PENDING = 10**9", "inference"),
    Fault("handed on: what is kept", INFERENCE, "return self.hands_on and all(output() is None for output in self.outputs)", "return self.hands_on", "inference"),
    Fault("handed on: what was seen to go elsewhere", INFERENCE, "            self.learned.hands_on = False\n", "", "inference"),
    Fault("handed on: computed by each thread", INFERENCE, "        with self.lock:", "        if True:", "inference"),
    Fault("handed on: inputs kept", INFERENCE, "                self.input = self.residual = None\n", "", "inference"),
    Fault("inference: gradients from a later step on", INFERENCE, "or known[count] != name or torch.is_grad_enabled():", "or known[count] != name:", "inference"),
    Fault("inference: another step than seen", INFERENCE, "or known[count] != name or", "or", "inference"),
    Fault("inference: old name of what a step changed in place", INFERENCE, "            input.tail = chain\n", "            pass\n", "inference"),
    Fault("inference: residual's tensor overwritten", INFERENCE, "_ops._convolution_pointwise.binary(input, residual, *arguments)", "_ops._convolution_pointwise_.binary(residual, input, *arguments)", "inference"),
    Fault("inference: a shortcut's output overwritten that is used again", INFERENCE, "return self.residual._run(), True", "return self.residual.value(), True", "inference"),
    Fault("inference: stale address", INFERENCE, "            and [tensor.data_ptr() for tensor in sources if tensor is not None] == self.addresses\n", "", "inference"),
    Fault("inference: stale vectors", INFERENCE, "compared = _sample(layer, tensors[0]), *tensors[1:]", "compared = (_sample(layer, tensors[0]),)", "inference"),
    Fault("inference: stale weight", INFERENCE, "compared = _sample(layer, tensors[0]), *tensors[1:]", "compared = tensors[1:]", "inference"),
    Fault("inference: the first value of a vector looked at", CONTENTS, "memcmp(run, copy, bytes)", "memcmp(run, copy, bytes > 4 ? 4 : bytes)", "inference"),
    Fault("inference: outputs not weighed", INFERENCE, "work + WORK_OF_OUTPUT * shape.numel() + ", "work + ", "inference"),
    Fault("inference: packing not weighed", INFERENCE, " + WORK_OF_PACKING * layer.weight.numel() <", " <", "inference"),
    Fault("inference: a bias that is no parameter left out", INFERENCE, "if are_there else (None, None)", 'if are_there else (parameters.get("weight"), None)', "inference"),
    Fault("inference: a weight that is no parameter of a plain layer", LAYERS, "            if weight is not None and self.plain_class", "            if self.plain_class", "inference"),
    Fault("inference: stale version", INFERENCE, "            and sources[0]._version == self.version\n", "", "inference"),
    Fault("inference: stale eps", INFERENCE, "            and (norm is None or norm.eps == self.eps)\n", "", "inference"),
    Fault("inference: stale geometry", INFERENCE, "            and geometry == self.geometry\n", "", "inference"),
    Fault("inference: one channel looked at", INFERENCE, "outputs = [(sizes[0], strides[0])]", "outputs = [(1, strides[0])]", "inference"),
    Fault("inference: packed weights kept in training", LAYERS, "        if mode:\n            self._learned.packed.clear()\n", "", "inference"),
    Fault("inference: packed weights kept by casts", LAYERS, "# moves and casts\n        self._learned.packed.clear()\n", "# moves and casts\n", "inference"),
    Fault("inference: packed weights pile up", INFERENCE, "            if len(self.packed) > 3:", "            if False:", "inference"),
    Fault("inference: residual of another shape", INFERENCE, "is_tensor and residual.shape == tail.shape and", "is_tensor and", "inference"),
    Fault("inference: residual of another type", INFERENCE, " and residual.dtype is tail.dtype", "", "inference"),
    Fault("inference: any activation after a sum", INFERENCE, 'step.name == "relu" or ADDED not in tail.steps', "True", "inference"),
    Fault("inference: tensors without versions", INFERENCE, "    if not tensor.is_inference():\n        return tensor\n", "    return tensor\n", "inference"),
    Fault("inference: autocast", INFERENCE, '        and not torch.is_autocast_enabled("cpu")\n', "", "inference"),
    Fault("inference: oneDNN switched off", INFERENCE, "        and torch._C._get_mkldnn_enabled()\n", "", "inference"),
    Fault("inference: a convolution's hooks", INFERENCE, "        and is_plain(layer)\n", "", "inference"),
    Fault("inference: a batch norm's hooks", LAYERS, "if type(input) is Chained and not is_plain(self):", "if False:", "inference"),
    Fault("inference: contiguous models converted", INFERENCE, "if not (is_channels_last(input, format) or is_channels_last(layer.weight, format)):", "if False:", "inference"),
    Fault("inference: uneven padding", CONVOLUTIONS, "        if padding != tuple(sides[::-2]):", "        if False:", "inference"),
    Fault("small inputs put off", LAYERS, "        if learned.is_small or (", "        if (", "fusing"),
    Fault("small inputs of several processes run plain", LAYERS, "is_small(input, input.numel()) and group_of(self) is None", "is_small(input, input.numel())", "synchronized"),
    Fault("folding: eps left out", FOLDING, "(var + eps).rsqrt() * weight", "var.rsqrt() * weight", "folding"),
    Fault("folding: scaled by a constant", FOLDING, "(var + eps).rsqrt() * weight", "(var + eps).rsqrt() * weight.detach()", "folding"),
    Fault("folding: mean left out", FOLDING, "(-mean if layer.bias is None else layer.bias - mean)", "(-mean if layer.bias is None else layer.bias)", "folding"),
    Fault("folding: convolution's bias left out", FOLDING, "(-mean if layer.bias is None else layer.bias - mean)", "-mean", "folding"),
    Fault("folding: bias left out", FOLDING, "shift if bias is None else shift + bias)", "shift)", "folding"),
    Fault("folding: batch statistics", FOLDING, "output = None if training else args[0].tail.normalized(norm)", "output = args[0].tail.normalized(norm)", "folding"),
    Fault("folding: in training", FOLDING, "return not layer.training and weight", "return weight", "folding"),
    Fault("folding: of a weight that does not learn", FOLDING, "weight is not None and weight.requires_grad", "weight is not None", "folding"),
    Fault("folding: of a convolution that does not learn", FOLDING, "        or not layer.weight.requires_grad\n", "", "folding"),
    Fault("folding: of other types", FOLDING, "vector is None or vector.dtype is not layer.weight.dtype", "vector is None", "folding"),
    Fault("folding: of float16", FOLDING, "        or input.dtype not in _DTYPES\n", "", "folding"),
    Fault("folding: autocast", FOLDING, "        or _is_cast(input)\n", "", "blocks"),
    Fault("folding: autocast since begun", FOLDING, "return super().is_open() and not _is_cast(self.input)", "return super().is_open()", "folding"),
    Fault("folding: made under an autocast that has begun since", FOLDING, "with super().as_called(), torch.autocast(device_type_of(self.input), enabled=False):", "with super().as_called():", "folding"),
    Fault("folding: hooks, subclasses", FOLDING, "        or not is_plain(layer, *CONVOLUTIONS)\n", "", "blocks"),
    Fault("folding: the eager backend", FOLDING, "        or ops_for(input) is None\n", "", "folding"),
    Fault("folding: of few outputs", FOLDING, " or elements < LEAST_OUTPUT * layer.weight.numel()", "", "folding"),
    Fault("folding: of small outputs", FOLDING, "is_small(input, elements) or ", "", "folding"),
    Fault("folding: what is watched kept", FOLDING, "        self.under = None  # whose", "        pass  # whose", "folding"),
    Fault("folding: changed since", FOLDING, "output = _scaled(self.layer, self.input, norm) if self.is_open() else None", "output = _scaled(self.layer, self.input, norm)", "folding"),
    Fault("folding: unseen strides", FOLDING, "            self.refuse(\"its output has another layout", "            str(\"its output has another layout", "folding"),
    Fault("folding: watched under other hooks", FOLDING, " and follower.under == under(input)", "", "folding"),
    Fault("folding: of what is pooled", FOLDING, " and not layer._learned.pools", "", "folding"),
    Fault("folding: a patched convolution", LAYERS, "is_patched = self.plain_class.forward not in _CONVOLVING", "is_patched = False", "folding"),
    Fault("folding: a folded sum ends fusion", DEFERRED, "            return a.add_(b.tail.make()) if is_folded else None\n", "            return None\n", "folding"),
    Fault("folding: put off for a batch norm in training", LAYERS, "            if not self.training:\n                return super().forward(input)\n            input = input.tail.make()\n", "            return super().forward(input)\n", "folding"),
    Fault("folding: left out of blocks", BLOCKS, "    output = folded(conv, bn, input)\n", "    output = None\n", "folding"),
    Fault("folding: no gradient for who never asks", FOLDING, "        return self.input, self.weight, self.bias\n", "        return self.input.detach(), self.weight, self.bias\n", "folding"),
    Fault("folding: state that is told", DEFERRED, "if follower is not None and follower.folds:", "if False:", "folding"),
    Fault("inference: blocks bypassed", BLOCKS, " or self._infers(X):", ":", "inference"),
    Fault("hooks on a block's batch norms bypassed", BLOCKS, "return is_plain(self.bn1, *_BATCH_NORMS) and is_plain(self.bn2, *_BATCH_NORMS)", "return True", "blocks"),
    Fault("operators in a compiled graph", BACKEND, "        is_compiling()\n", "        False\n", "watchers"),
    Fault("operators under a dispatch mode", BACKEND, "        or _len_torch_dispatch_stack()\n", "", "watchers"),
    Fault("operators under a transform", BACKEND, "        or _are_functorch_transforms_active()\n", "", "watchers"),
    Fault("operators in a trace of TorchScript", BACKEND, "        or _get_tracing_state() is not None\n", "", "watchers"),
    Fault("operators under forward-mode AD", BACKEND, "        or forward_ad._current_level >= 0\n", "", "watchers"),
    Fault("default device taken for a watcher", BACKEND, "and {*map(type, _get_current_function_mode_stack())} != {DeviceContext}", "", "watchers"),
    Fault("subclasses of Tensor taken for tensors", BACKEND, " or type(input) not in _PLAIN_TYPES", "", "watchers"),
    Fault("CUDA: recomputed by running statistics", CUDA_GLUE, "f.training = a.training || f.given", "f.training = a.training", "recompute"),
    Fault("CUDA: given statistics computed anew", CUDA, "if (f.training && !f.given) {\n    with_type_and_width(", "if (f.training) {\n    with_type_and_width(", "cuda_traffic"),
    Fault("eps 0 in training", ARGUMENTS, "training ? eps > 0 : eps >= 0", "eps >= 0", "edges"),
    Fault("one value per channel", ARGUMENTS, "!training || values() != 1", "true", "edges"),
    Fault("half vectors for float32", ARGUMENTS, "(half && type == ScalarType::Float)", "(!half || type == ScalarType::Float)", "edges"),
    Fault("Triton: residual's mean left out", TRITON, "_centered(matrix, residual_norm, at, valid, residual_mean)\n                value", "_centered(matrix, residual_norm, at, valid, mean)\n                value"),
    Fault("Triton: residual's shift left out", TRITON, "shift += residual_shift", "pass"),
    Fault("Triton: statistics of the input for both", TRITON, "input = input if which == 0 else residual", "input = input"),
    Fault("Triton: sums of the input for both", TRITON, "_finish_gradients(matrix, residual_norm, residual_gradients, TRAINING, partials, 2)", "_finish_gradients(matrix, residual_norm, residual_gradients, TRAINING, partials, 1)"),
    Fault("Triton: residual's dot about the input's mean", TRITON, "_offsets(matrix, row, column), valid, residual_mean)", "_offsets(matrix, row, column), valid, mean)"),
    Fault("Triton: residual's projection by the input", TRITON, "residual_norm,\n                residual_gradients,", "norm,\n                residual_gradients,"),
    Fault("backend forgotten", BACKEND, "if other is not entry", "if True", "backend"),
    Fault("blocks of one backend left together", BACKEND, "other is not entry", "other != entry", "backend"),
    Fault("unserved device refused as any argument", BACKEND, "raise UnservedDevice(", "raise ValueError(", "backend"),
    Fault("nvcc's wrapper taken for the toolkit", "setup.py", "if top else", "if False else", "build"),
    Fault("another CUDA's nvcc, unless forced", "setup.py", "if version and version[1] !=", "if version and FORCE_CUDA and version[1] !=", "build"),
    Fault("nvcc's answers read as text", "setup.py", "stderr=subprocess.STDOUT).stdout", "stderr=subprocess.STDOUT).stdout.decode('ascii')", "build"),
    Fault("torch 2.10's pybind11 closed", "csrc/module.cpp", "#undef TORCH_TARGET_VERSION", "", "build"),
    Fault("torch 2.10 names the library to the letter", "csrc/ops.cpp", "NAMED_LIBRARY(RESNET_FUSED_LIBRARY, m) {", "STABLE_TORCH_LIBRARY(RESNET_FUSED_LIBRARY, m) {", "build"),
    Fault("fast math in CFLAGS", "setup.py", 'strict = ["-fno-fast-math"]', "strict = []", "build"),
    Fault("debug information shipped", "setup.py", ', "-Wl,--strip-debug"]', "]", "build"),
    Fault("builder's path in errors", "setup.py", 'f"-ffile-prefix-map={Path.cwd()}/="', '"-g0"', "build"),
    Fault("second import refused", "resnet_fused/triton_kernels/__init__.py", "    if not hasattr(getattr(torch.ops, NAMESPACE), _name):", "    if True:", "backend"),
    Fault("an allocation after a running statistic is written", GLUE, "    update(running_means_);", "    update(running_means_);\n    std::vector<double> more(plan_.channels);", "adversaries"),
    Fault("what is saved for backward kept", AUTOGRAD, "    ctx.save_for_backward(*tensors)\n    ctx.saved_as", "    ctx.save_for_backward(*tensors), globals().setdefault('kept', []).append(tensors[0])\n    ctx.saved_as", "adversaries", "test-all"),
    Fault("threads share the means", GLUE, "double* mean() { return values_.get(); }", "double* mean() { static double shared[4096]; return shared; }", "adversaries"),
    Fault("an argument without a type", BACKEND, "def use_backend(name: str)", "def use_backend(name)", "types"),
    Fault("an old setuptools let through", "setup.py", "< MINIMUM_SETUPTOOLS", "< 0", "build"),
    Fault("a container's memory limit disregarded", "setup.py", ", *memory_limits(root)]", "]", "build"),
    Fault("the limit of an outer control group disregarded", "setup.py", "(folder, *folder.parents)", "(folder,)", "build"),
    Fault("cores that the process may not use counted", "setup.py", "len(os.sched_getaffinity(0))", "os.cpu_count()", "build"),
    Fault("an editable install that a folder hides", "pyproject.toml", 'package-dir = { "" = "." }', "", "build"),
    Fault("Triton: strides of an ambiguous layout", "resnet_fused/ops.py", "input.is_contiguous() else suggest_memory_format(input)", "True else None", "edges"),
    Fault("a frozen batch norm's input kept", AUTOGRAD, "        if not training and not needs_weight:\n", "        if False:\n", "gradients"),
    Fault("a frozen batch norm's gradient in another layout", AUTOGRAD, "grad_output.contiguous(memory_format=ctx.memory_format)", "grad_output.contiguous()", "gradients"),
    Fault("given means ignored", GLUE, "    if (a.grad_means) norms.back()", "    if (false) norms.back()", "synchronized"),
    Fault("given means beside a rounded mean", GLUE, "(dropped(c) * slope - mean) * scale", "-mean * scale", "edges"),
    Fault("CUDA: given means ignored", CUDA, "    if (grad_means) {\n", "    if (false) {\n", "synchronized"),
    Fault("Triton: given means ignored", TRITON_GLUE, "torch.stack((grad - dropped * slope, slope))", "torch.zeros_like(projection)", "synchronized"),
    Fault("counts of batches not weighed", SYNCHRONIZED, "weights = counts / count\n", "weights = 1 / len(counts)\n", "synchronized"),
    Fault("variance between batches dropped", SYNCHRONIZED, "(variances + (means - mean).square())", "variances", "synchronized"),
    Fault("an empty batch's statistics", SYNCHRONIZED, "    if input.numel() == 0:  # it has no weight\n", "    if False:\n", "synchronized"),
    Fault("sums of the gradients of one process", SYNCHRONIZED, "of_all.sum(0) / counts.sum()", "of_all[0] / counts.sum()", "synchronized"),
    Fault("all processes in the place of a group's", SYNCHRONIZED, "layer.process_group or dist.group.WORLD", "dist.group.WORLD", "synchronized"),
    Fault("biased running variance over processes", SYNCHRONIZED, "variance[i] * (count / (count - 1))", "variance[i]", "synchronized"),
    Fault("a collective for each of two batch norms", SYNCHRONIZED, "        if type(other) is not Synchronized or (other.ops", "        if other is not self or (other.ops", "synchronized"),
    Fault("refused after the statistics are written", SYNCHRONIZED, "            check(input, residual, batch_norm, residual_batch_norm, training, is_whole_batch=False)\n", "", "synchronized"),
    Fault("no handshake", SYNCHRONIZED, "_HANDSHAKES = 256", "_HANDSHAKES = 0", "synchronized"),
    Fault("another's call taken for one's own", SYNCHRONIZED, "        _check_same(rows[:, 0] == own[0], call, self.group)\n", "", "synchronized"),
    Fault("deferred against the will of another process", DEFERRED, "self.wants() and self.agreed is not False", "self.wants()", "synchronized"),
    Fault("second derivative of a part of the batch", AUTOGRAD, "        if training and ops.spans_processes:\n", "        if False:\n", "synchronized"),
    Fault("SyncBatchNorm left plain", LAYERS, "        if is_watched():\n            return super().forward(input)\n        self._check_input_dim", "        return super().forward(input)\n        self._check_input_dim", "synchronized"),
    Fault("bench: an option that the benchmark lacks", "Makefile", "--epochs 1\n", "--epoch-count 1\n", "benchmarks"),
    Fault("bench: slower within noise", "benchmarks/compare.py", 'if row["largest"] < 1', 'if row["ratio"] < 1', "benchmarks"),
    Fault("bench: another machine's eager", "benchmarks/compare.py", "if to_eager else 1", "if False else 1", "benchmarks"),
    Fault("bench: pictures of forty bars", "benchmarks/harness.py", "len(of_label) > MOST_BARS", "len(of_label) > 2 * MOST_BARS", "benchmarks"),
    Fault("bench: a busy machine is not told", "benchmarks/harness.py", "> MOST_BUSY_PERCENT:", "> 100:", "benchmarks"),
    Fault("bench: the profiler talks", "benchmarks/__init__.py", '"KINETO_LOG_LEVEL", "6"', '"KINETO_LOG_LEVEL", "5"', "benchmarks"),
    Fault("docs: the ratio upside down", "benchmarks/docs.py", 'eager["median_ms"] / row["median_ms"]', 'row["median_ms"] / eager["median_ms"]', "docs"),
    Fault("docs: a table without results goes", "benchmarks/docs.py", 'error.filename}")\n            return match[0]', 'error.filename}")\n            return ""', "docs"),
    Fault("a chunk computed by two threads", GLUE, "f(Work{block, first, last});", "f(Work{block, 0, last});", "sanitisers", "test-all"),
    Fault("scratch memory an element short", GLUE, "new T[size]", "new T[size - 1]", "sanitisers", "test-all"),
]  # fmt: skip


def _run(command, cwd, **environment):
    # The CUDA faults are for the emulation to find: nvcc would take a minute for each.
    environment = {**os.environ, "PYTHONPATH": str(cwd), "FORCE_CUDA": "0", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _build(copy):
    done = _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], copy)
    if done.returncode != 0:
        sys.exit(f"the copy does not build:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _first_failure(copy, tests, command, *options, interpreted=False):
    """The name of a test that fails in the copy, or None. ``interpreted``: of those of the interpreted backend triton."""
    options = ["-x", "-q", "-m", SELECTED[command], "-p", "no:cacheprovider", *options]
    environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
    done = _run([sys.executable, "-m", "pytest", *options, tests], copy, **environment)
    if done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or "crashed" in line]
    return failed[0][:150] if failed else f"pytest exited with {done.returncode}"


def _first_failure_of_suite(copy, command):
    suite = copy, "tests", command, "-n", "2"
    return _first_failure(*suite) or _first_failure(*suite, interpreted=True)


def _failure_caused_by(fault, copy):
    """Plant the fault, run the suite, take the fault out again."""
    file = copy / fault.file
    original = file.read_text()
    try:
        file.write_text(original.replace(fault.find, fault.replace))
        _build(copy)
        interpreted = fault.name.startswith("Triton: ") and fault.noticed_by != "triton_static"
        first = _first_failure(copy, f"tests/test_{fault.noticed_by}.py", fault.command, interpreted=interpreted)
        return first or _first_failure_of_suite(copy, fault.command)
    finally:
        file.write_text(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant, all by default")
    parser.add_argument("--check", action="store_true", help="only whether each could be planted")
    options = parser.parse_args()
    names = options.names
    for fault in FAULTS:
        if (count := (ROOT / fault.file).read_text().count(fault.find)) != 1:
            sys.exit(f"{fault.name}: {fault.find!r} occurs {count} times in {fault.file}, not once")
    if options.check:
        return
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        sys.exit(f"no such faults: {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "resnet_fused"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "results"))
        _build(copy)
        if failure := _first_failure_of_suite(copy, "test-all"):
            sys.exit(f"the suite fails without a fault: {failure}")
        for fault in tqdm(faults, unit="fault"):
            start = time.monotonic()
            failure = _failure_caused_by(fault, copy)
            tqdm.write(f"{fault.name}: {failure or 'SURVIVED'} ({time.monotonic() - start:.0f} s)")
            if failure is None:
                survivors.append(fault.name)
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults caught")
    if survivors:
        sys.exit(f"survived: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
