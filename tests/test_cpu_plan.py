"""How evenly the CPU's plan shares work: on paper, for more threads than there are here."""

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
  std::printf("%lld %f", static_cast<long long>(all), static_cast<double>(busiest * threads) / all);
}
"""

# Of a ResNet-50: channels and heights of what its tails and other batch norms normalise, of 224x224 images.
SHAPES = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14)]


@pytest.fixture(scope="module")
def busiest(tmp_path_factory, request):
    program = tmp_path_factory.mktemp("plan") / "plan"
    source = program.with_suffix(".cpp")
    source.write_text(PROGRAM)
    root = str(request.config.rootpath)
    subprocess.run(["g++", "-std=c++17", f"-I{root}", str(source), "-o", str(program)], check=True)

    def call(*arguments):
        output = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
        return int(output.split()[0]), float(output.split()[1])

    return call


@pytest.mark.parametrize("threads", [1, 2, 8, 16, 32, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_busiest_thread_does_little_more_than_the_mean(busiest, layout, threads):
    for channels, height in [*SHAPES, (512, 7), (2048, 7)] if threads <= 32 else SHAPES:
        outer, inner = (32, height**2) if layout == "contiguous" else (32 * height**2, 1)
        elements, ratio = busiest(outer, channels, inner, 4, threads)
        assert elements == 32 * channels * height**2
        assert ratio <= 1.15, (channels, height)
