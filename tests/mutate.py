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

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    name: str
    file: str
    find: str  # occurs exactly once
    replace: str
    noticed_by: str = "ops"  # the test file to try first; the whole suite follows where it stays green


KERNELS = "csrc/cpu/kernels_impl.h"
GLUE = "csrc/cpu/batch_norm_add_relu.cpp"
PLAN = "csrc/cpu/plan.h"
AUTOGRAD = "resnet_fused/autograd.py"
FUNCTIONAL = "resnet_fused/functional.py"
BLOCKS = "resnet_fused/blocks.py"

FAULTS = [
    Fault("forward drops NaN", KERNELS, "0 > value ? 0 : value", "value > 0 ? value : 0", "edges"),
    Fault("mask passes ties", KERNELS, "return y <= 0 ? 0 : g;", "return y < 0 ? 0 : g;", "edges"),
    Fault("mask blocks NaN", KERNELS, "return y <= 0 ? 0 : g;", "return y > 0 ? g : 0;", "edges"),
    Fault("mask multiplies", KERNELS, "return y <= 0 ? 0 : g;", "return g * (y <= 0 ? 0 : 1);", "edges"),
    Fault("mask not of y as stored", KERNELS, "load(store<T>(centered * values.scale[k] + values.shift[k]))", "centered * values.scale[k] + values.shift[k]", "edges"),
    Fault("bfloat16 rounds ties away", KERNELS, "0x7fffu + (bits >> 16 & 1u)", "0x8000u", "edges"),
    Fault("float16 overflows early", KERNELS, "0x477ff000u", "0x477fe000u", "edges"),
    Fault("float16 subnormals", KERNELS, "magnitude < 0x38800000u", "magnitude < 0x38000000u", "edges"),
    Fault("float16 infinity read as number", KERNELS, "magnitude >= 0x0f800000u", "magnitude > 0x0f800000u", "edges"),
    Fault("infinite origin", KERNELS, "mean - mean == 0 ? mean : 0", "mean", "edges"),
    Fault("raw second moments", KERNELS, "mean - mean == 0 ? mean : 0", "A{0}", "edges"),
    Fault("last row dropped", KERNELS, "for (; row < rows; ++row)", "for (; row + 1 < rows; ++row)"),
    Fault("narrow row dropped", KERNELS, "if (rest > 0)", "if (rest > 1)"),
    Fault("last piece of a run dropped", KERNELS, "begin < length; begin += kPiece", "begin + kPiece <= length; begin += kPiece"),
    Fault("sign of the projection", KERNELS, "- values.offset[k] - centered", "- values.offset[k] + centered"),
    Fault("sign of the mean gradient", KERNELS, "g = g - values.offset[k]", "g = g + values.offset[k]"),
    Fault("residual not added", KERNELS, "if (kResidual) value += load(residual[k]);", ""),
    Fault("chunks depend on threads", PLAN, "plan.chunk_outer = ceil_div(outer, kRunChunks);", "plan.chunk_outer = ceil_div(outer, threads);", "properties"),
    Fault("chunk end", PLAN, "inner_end < inner ? inner_end : inner", "inner_end < inner ? inner_end - 1 : inner"),
    Fault("biased running variance", GLUE, "total.m2 / (n - 1)", "total.m2 / n"),
    Fault("unbiased normalisation", GLUE, "set_channel(c, total.mean, total.m2 / n)", "set_channel(c, total.mean, total.m2 / (n - 1))"),
    Fault("momentum the wrong way round", GLUE, "(1 - factor) * running_means[c]", "factor * running_means[c]"),
    Fault("stale running variance", GLUE, "(1 - factor) * running_vars[c]", "(1 - factor)"),
    Fault("cumulative average off by one", GLUE, "1 / static_cast<double>(*counter)", "1 / static_cast<double>(*counter + 1)"),
    Fault("eval counts", GLUE, "if (training && counter != nullptr)", "if (counter != nullptr)"),
    Fault("input bias subtracted in eval", GLUE, "running_means[c] - dropped_bias[c]", "running_means[c] + dropped_bias[c]"),
    Fault("input bias not in running mean", GLUE, "(total.mean + dropped_bias[c])", "total.mean"),
    Fault("chunks' means not joined", GLUE, "next_m2 + delta * delta * (count * next_count / total)", "next_m2"),
    Fault("rounded mean in forward", GLUE, "bias - dropped * scaled", "bias", "edges"),
    Fault("rounded mean in backward", GLUE, "dot -= dropped * sum;", "", "edges"),
    Fault("frozen statistics treated as the batch's", GLUE, "training ? coefficients.backward() : coefficients.forward()", "coefficients.backward()"),
    Fault("ambiguous layout", GLUE, "tensor.is_contiguous() || !has_channels_last_strides(tensor)", "!has_channels_last_strides(tensor)", "edges"),
    Fault("weight left out of the scale", GLUE, "rounded(invstd * weight, type)", "rounded(invstd, type)"),
    Fault("eps added to the deviation", GLUE, "1 / std::sqrt(variance + eps)", "1 / (std::sqrt(variance) + eps)"),
    Fault("no gradient for a dropped bias", AUTOGRAD, "return torch.zeros_like(input_bias)", "return None"),
    Fault("dropped bias's gradient unscaled", AUTOGRAD, "(grad_bias * scale).to", "grad_bias.to"),
    Fault("double backward takes statistics as constants", AUTOGRAD, "correction=0)\n", "correction=0)\n        mean = mean.detach()\n", "gradients"),
    Fault("double backward counts wrong", AUTOGRAD, "x.numel() // x.shape[1]", "x.numel()", "gradients"),
    Fault("refused input counted", FUNCTIONAL, "    vector_types = _VECTOR", "    if num_batches_tracked is not None:\n        num_batches_tracked += 1\n    vector_types = _VECTOR", "edges"),
    Fault("eps 0 in training", FUNCTIONAL, "if not eps > 0:", "if not eps >= 0:", "edges"),
    Fault("one value per channel", FUNCTIONAL, "input.numel() == channels", "input.numel() < channels", "edges"),
    Fault("half vectors for float32", FUNCTIONAL, "torch.float32: (torch.float32,),", "torch.float32: (torch.float32, torch.bfloat16),", "edges"),
    Fault("other devices", FUNCTIONAL, "if tensor.device != input.device:", "if False:", "edges"),
    Fault("untracked batch norm counts", BLOCKS, "bn.num_batches_tracked if tracks else None", "bn.num_batches_tracked", "blocks"),
    Fault("untracked batch norm updates", BLOCKS, "uses_running = not bn.training or bn.track_running_stats", "uses_running = True", "blocks"),
    Fault("conv3's bias lost", BLOCKS, 'arguments["bias"] = _sum_biases(arguments["bias"], residual_bias)', "", "blocks"),
    Fault("hooks bypassed", BLOCKS, "and not layer._forward_hooks", "", "blocks"),
    Fault("subclass bypassed", BLOCKS, "type(layer) is layer_class", "isinstance(layer, layer_class)", "blocks"),
    Fault("fuse ignores the forward", "resnet_fused/convert.py", "or _reason_of_forward(module)", "", "convert"),
    Fault("backend forgotten", "resnet_fused/backend.py", "        _choose(previous)", "        pass", "backend"),
    Fault("fake strides", "resnet_fused/ops.py", "input.is_contiguous() else suggest_memory_format(input)", "True else None", "compile"),
]  # fmt: skip


def _run(command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _build(copy):
    done = _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], copy)
    if done.returncode != 0:
        sys.exit(f"the copy does not build:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _first_failure(copy, tests="tests", *options):
    """The name of a test that fails in the copy, or None."""
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *options]
    done = _run([sys.executable, "-m", "pytest", *options, tests], copy)
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or "crashed" in line]
    return failed[0][:150] if failed else f"pytest exited with {done.returncode}"


def _failure_caused_by(fault, copy):
    """Plant the fault, run the suite, take the fault out again."""
    file = copy / fault.file
    original = file.read_text()
    if original.count(fault.find) != 1:
        sys.exit(f"{fault.name}: {fault.find!r} occurs {original.count(fault.find)} times in {fault.file}, not once")
    try:
        file.write_text(original.replace(fault.find, fault.replace))
        _build(copy)
        first = f"tests/test_{fault.noticed_by}.py"
        return _first_failure(copy, first) or _first_failure(copy, "tests", "-n", "2")
    finally:
        file.write_text(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant, all by default")
    names = parser.parse_args().names
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        sys.exit(f"no such faults: {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "resnet_fused"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "results"))
        _build(copy)
        if failure := _first_failure(copy, "tests", "-n", "2"):
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
