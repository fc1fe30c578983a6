// How the CPU kernels walk a tensor: pure geometry, the same for every type, layout and pass.
//
// A contiguous (N, C, *) tensor is (outer = N, channels = C, inner = prod(*)); a channels_last one is
// (outer = N * prod(*), channels = C, inner = 1). The kernels take vectors of adjacent elements, several at a time:
//   - of a run, where inner is long: `inner` adjacent elements of one channel, whose mean, scale, ... are scalars;
//   - of rows, where it is short (1 in channels_last, 9 at the end of a ResNet-18): adjacent elements of several
//     channels, with one mean, scale, ... and one accumulator per *column*.
// A *block* is `group` channels: what a thread can take through both passes while it is in its cache. A *chunk* is a
// part of the outer (and inner) extent: what is summed before it is added up in double. Which elements meet in which
// order depends on the shape alone, never on the number of threads: results are bit-equal for any number of them.
#pragma once

#include <cstdint>

namespace resnet_fused {

// Elements of a run: less are taken as columns. Of 144 bfloat16 runs took 1.3 times as long, of 576 0.9 times.
constexpr int64_t kMinRun = 256;
constexpr int64_t kMaxWidth = 1024;        // columns of a block of rows, whose coefficients stay in half an L1 cache
constexpr int64_t kMinWidth = 64;          // less, and several outer entries make a row
constexpr int64_t kChunks = 64;            // enough to share among threads
constexpr int64_t kMinChunk = 64;          // rows; with 32, adding up chunks took a third of the moments of 32x512x3x3
constexpr int64_t kMaxChunk = 256;         // rows: their sums are kept in the accumulation type
constexpr int64_t kMinChunkValues = 2048;  // of a channel in runs
constexpr int64_t kPage = 4096;            // bytes that are adjacent, from which on skipping costs next to nothing
// Of a block in one tensor: the four that a backward's passes share are 1 MiB, half a core's cache. Blocks of 147 KiB
// took the forward of 32x64x24x24 from 0.73 to 0.64 ms on one core, the backward of 32x128x12x12 from 0.73 to 0.66.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kCacheBytes = 1 << 24;  // a tensor of this size does not outlive a pass in the shared cache

struct Plan {
  int64_t outer, channels, inner;
  bool runs;
  bool streams;                      // outputs past the caches
  int64_t group;                     // channels of a block
  int64_t row_outer;                 // outer entries of a row: more than one only where all channels fit
  int64_t chunk_outer, chunk_inner;  // extent of a chunk
  int64_t inner_chunks;              // chunks along inner
  int64_t blocks, chunks;

  // Outer entries [outer_begin, outer_end) and elements [inner_begin, inner_end) of each.
  struct Chunk {
    int64_t outer_begin, outer_end, inner_begin, inner_end;
    int64_t run() const { return inner_end - inner_begin; }
    int64_t count() const { return (outer_end - outer_begin) * run(); }  // values per channel
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
  int64_t width(int64_t block) const { return (block_end(block) - block_begin(block)) * inner * row_outer; }  // of rows
  int64_t offset(int64_t o, int64_t channel, int64_t i) const { return (o * channels + channel) * inner + i; }

  // The mask, see csrc/ops.cpp. No two threads write one byte: a row of it is a channel's run, or an outer entry; or
  // all the tensor, where chunks begin and end with a byte all the same.
  int64_t mask_line() const { return runs ? inner : channels * inner; }
  int64_t mask_rows() const {
    if (mask_line() % 8 == 0 || row_outer > 1) return 1;
    return runs ? outer * channels : outer;
  }
  int64_t mask_row_bytes() const { return (outer * channels * inner / mask_rows() + 7) / 8; }
  int64_t mask_offset(int64_t o, int64_t channel, int64_t i) const {
    const int64_t at = offset(o, channel, i);
    if (mask_rows() == 1) return at / 8;
    return at / mask_line() * mask_row_bytes() + at % mask_line() / 8;
  }
};

// outer, channels, inner >= 1. The number of threads only decides which channels make a block: blocks share no sums.
inline Plan make_plan(int64_t outer, int64_t channels, int64_t inner, int64_t element_size, int64_t threads) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto at_least = [](int64_t a, int64_t b) { return a > b ? a : b; };
  Plan plan{};
  plan.outer = outer, plan.channels = channels, plan.inner = inner;
  int64_t whole = 8;  // channels whose elements are whole bytes of the mask
  while (whole > 1 && inner * whole / 2 % 8 == 0) whole /= 2;
  plan.runs = inner >= kMinRun || inner * whole > kMaxWidth;
  plan.streams = outer * channels * inner * element_size >= kCacheBytes;
  plan.row_outer = 1;
  plan.chunk_inner = inner;
  if (plan.runs) {
    // Blocks of as many channels as make a page of adjacent runs: if these stay in a core's cache from one pass to the
    // next, or if nothing stays in the shared one. Else in the order of memory.
    const int64_t run = inner * element_size, page_blocks = ceil_div(channels, ceil_div(kPage, run));
    const int64_t group = ceil_div(channels, ceil_div(page_blocks, threads) * threads);
    const bool stays = outer * group * run <= kBlockBytes;
    plan.group = (plan.streams ? run >= kPage : stays) ? group : channels;
    const int64_t chunks = at_most(kChunks, ceil_div(outer * inner, kMinChunkValues));
    plan.chunk_outer = ceil_div(outer, chunks);
    plan.chunk_inner = ceil_div(ceil_div(inner, ceil_div(chunks, outer)), 64) * 64;  // whole vectors, and bytes
  } else {
    int64_t blocks = ceil_div(channels * inner, kMaxWidth);
    if (blocks == 1) {
      // Entries of 63 elements, 16 at a time, are 1008: whole vectors, and bytes of the mask.
      int64_t multiple = 16;
      while (multiple > 1 && channels * inner * multiple / 2 % 16 == 0) multiple /= 2;
      const int64_t wanted = ceil_div(ceil_div(kMinWidth, channels * inner), multiple) * multiple;
      plan.row_outer = channels * inner >= kMinWidth ? 1 : at_most(wanted, outer);
    } else {
      blocks = ceil_div(blocks, threads) * threads;
    }
    const int64_t group = ceil_div(ceil_div(channels, blocks), whole) * whole;
    plan.group = blocks == 1 ? channels : at_most(group, kMaxWidth / inner / whole * whole);
    // A multiple of four chunks, for threads to share evenly: of 5, one of two threads would wait for a third.
    const int64_t rows = ceil_div(outer, plan.row_outer);
    const int64_t chunks = ceil_div(rows, at_most(at_least(ceil_div(rows, kChunks), kMinChunk), kMaxChunk));
    plan.chunk_outer = plan.row_outer * ceil_div(rows, chunks > 1 ? ceil_div(chunks, 4) * 4 : 1);
  }
  plan.blocks = ceil_div(channels, plan.group);
  plan.inner_chunks = ceil_div(inner, plan.chunk_inner);
  plan.chunks = ceil_div(outer, plan.chunk_outer) * plan.inner_chunks;
  return plan;
}

}  // namespace resnet_fused
