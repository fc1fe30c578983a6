"""How evenly the CPU's plan shares work, for more threads than there are here, and what it streams: on paper."""

import json
import subprocess

import pytest

PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include "csrc/cpu/plan.h"

// The elements of the busiest thread over the mean, where a call shares blocks, or else chunks, as parallel_for does.
int main(int, char** arguments) {
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const int64_t outer = number(1), channels = number(2), inner = number(3), threads = number(5);
  const auto plan = resnet_fused::make_plan(outer, channels, inner, number(4), threads);
  const bool by_block = plan.blocks >= threads;
  const int64_t units = by_block ? plan.blocks : plan.blocks * plan.chunks, share = (units + threads - 1) / threads;
  int64_t busiest = 0, all = 0;
  for (int64_t begin = 0; begin < units; begin += share) {
    int64_t elements = 0;
    for (int64_t unit = begin; unit < std::min(units, begin + share); ++unit) {
      const int64_t block = by_block ? unit : unit / plan.chunks;
      const int64_t values = by_block ? outer * inner : plan.chunk(unit % plan.chunks).count();
      elements += values * (plan.block_end(block) - plan.block_begin(block));
    }
    busiest = std::max(busiest, elements), all += elements;
  }
  const int64_t row = plan.runs ? 0 : plan.width(0), next_row = plan.runs ? 0 : channels * inner * plan.row_outer;
  std::printf("[%lld, %f, %d, %lld, %lld]", static_cast<long long>(all), static_cast<double>(busiest * threads) / all,
              plan.streams, static_cast<long long>(row), static_cast<long long>(next_row));
}
"""

# Of a ResNet-50: channels and heights of what its tails and other batch norms normalise, of 224x224 images.
SHAPES = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory, request):
    program = tmp_path_factory.mktemp("plan") / "plan"
    source = program.with_suffix(".cpp")
    source.write_text(PROGRAM)
    root = str(request.config.rootpath)
    subprocess.run(["g++", "-std=c++17", f"-I{root}", str(source), "-o", str(program)], check=True)

    def call(*arguments):
        output = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
        return json.loads(output)

    return call


@pytest.mark.parametrize("threads", [1, 2, 8, 16, 32, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_busiest_thread_does_little_more_than_the_mean(plan, layout, threads):
    for channels, height in [*SHAPES, (512, 7), (2048, 7)] if threads <= 32 else SHAPES:
        outer, inner = (32, height**2) if layout == "contiguous" else (32 * height**2, 1)
        elements, ratio, *_ = plan(outer, channels, inner, 4, threads)
        assert elements == 32 * channels * height**2
        assert ratio <= 1.15, (channels, height)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("channels", "streams"), [(64, True), (72, True), (100, True), (104, True), (888, False)])
def test_rows_of_whole_vectors_alone_are_streamed(plan, channels, streams, size):
    """Of channels_last tensors of 16 MiB and more: several pixels make a row of whole vectors, where they fit."""
    *_, streamed, row, next_row = plan(-(-(2**24) // (channels * size)), channels, 1, size, 2)
    assert streamed == streams == (row % 16 == 0 and next_row % 16 == 0)
