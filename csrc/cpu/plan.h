// How the CPU kernels walk a tensor: pure geometry, the same for every type, layout and pass.
//
// A contiguous (N, C, *) tensor is (outer = N, channels = C, inner = prod(*)); a channels_last one is
// (outer = N * prod(*), channels = C, inner = 1). The kernels see *rows* of up to kMaxWidth adjacent elements, and keep
// one accumulator per *column*, so that every inner loop is a plain loop over adjacent elements with no dependence
// between them, however short `inner` is (9 elements at the end of a ResNet-18). A row is
//   - `inner` elements of each of `group` channels, of `row_outer` outer entries where all channels fit, or,
//   - where inner is long, `row_inner` of its elements (the image folded into rows).
// A *block* is `group` channels; a *chunk*, kChunkRows rows or less of a block, is the unit that is summed in the
// accumulation type before it is added up in double. Which elements meet in which order depends on the shape alone,
// never on the number of threads: that is why results are bit-equal for any number of them.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int64_t kMaxWidth = 1024;  // columns: three accumulator arrays of float fit in half an L1 cache
constexpr int64_t kChunkRows = 32;

struct Plan {
  int64_t outer, channels, inner;
  int64_t group;                     // channels of a block
  int64_t row_outer, row_inner;      // outer entries of a row, and elements of each of its channels
  int64_t chunk_outer, chunk_inner;  // extent of a chunk
  int64_t inner_chunks;              // chunks along inner
  int64_t blocks, chunks;

  int64_t count() const { return outer * inner; }  // values per channel

  // Extent of a chunk: outer entries [outer_begin, outer_end) and elements [inner_begin, inner_end) of each.
  struct Chunk {
    int64_t outer_begin, outer_end, inner_begin, inner_end;
    int64_t count() const { return (outer_end - outer_begin) * (inner_end - inner_begin); }
  };
  Chunk chunk(int64_t index) const {
    const int64_t outer_begin = index / inner_chunks * chunk_outer, inner_begin = index % inner_chunks * chunk_inner;
    const int64_t outer_end = outer_begin + chunk_outer, inner_end = inner_begin + chunk_inner;
    return {outer_begin, outer_end < outer ? outer_end : outer, inner_begin, inner_end < inner ? inner_end : inner};
  }

  // Channels [block_begin, block_end) of a block.
  int64_t block_begin(int64_t block) const { return block * group; }
  int64_t block_end(int64_t block) const {
    const int64_t end = (block + 1) * group;
    return end < channels ? end : channels;
  }
};

// outer, channels, inner >= 1. `threads` only evens out the blocks: the blocks share no sums.
inline Plan make_plan(int64_t outer, int64_t channels, int64_t inner, int64_t threads) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Plan plan{};
  plan.outer = outer, plan.channels = channels, plan.inner = inner;
  plan.group = plan.row_outer = 1;
  plan.row_inner = plan.chunk_inner = inner;
  if (inner > kMaxWidth) {
    // Fold into a multiple of four rows (they are summed four at a time) of at most 512 columns.
    plan.row_inner = ceil_div(ceil_div(inner, 4 * ceil_div(inner, 2048)), 8) * 8;
    const int64_t chunk_elements = kChunkRows * plan.row_inner;
    plan.chunk_inner = inner < chunk_elements ? inner : chunk_elements;
    plan.chunk_outer = inner < chunk_elements ? chunk_elements / inner : 1;
  } else if (channels * inner <= kMaxWidth) {
    plan.group = channels;
    plan.row_outer = kMaxWidth / (channels * inner);
    if (plan.row_outer > outer) plan.row_outer = outer;
    plan.chunk_outer = kChunkRows * plan.row_outer;
  } else {
    const int64_t blocks = ceil_div(channels, kMaxWidth / inner);  // of as many channels as fit
    plan.group = ceil_div(channels, ceil_div(blocks, threads) * threads);
    plan.chunk_outer = kChunkRows;
  }
  plan.blocks = ceil_div(channels, plan.group);
  plan.inner_chunks = ceil_div(inner, plan.chunk_inner);
  plan.chunks = ceil_div(outer, plan.chunk_outer) * plan.inner_chunks;
  return plan;
}

}  // namespace resnet_fused
