// How the CPU kernels walk a tensor: pure geometry, the same for every type, layout and pass.
//
// A contiguous (N, C, *) tensor is (outer = N, channels = C, inner = prod(*)); a channels_last one is
// (outer = N * prod(*), channels = C, inner = 1). The kernels take *rows* of up to kMaxWidth adjacent elements, with
// one mean, scale, ... and one accumulator per *column*: the same elements of several channels, of every outer entry,
// or of several entries where these are short; or, where not even one channel fits, a part of its *run* of inner
// elements. A *block* is `group` channels: what a thread can take through both passes while it is in its cache. A
// *chunk* is a part of the outer (and inner) extent: what is summed before it is added up in double. Which elements
// meet in which order depends on the shape alone, never on the number of threads: results are bit-equal for any number
// of them.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int64_t kMaxWidth = 1152;  // columns, whose coefficients stay in half an L1 cache: 2 * 24 * 24, 32 * 6 * 6
constexpr int64_t kMinWidth = 64;    // less, and several outer entries make a row
constexpr int64_t kRunWidth = 64;    // of a part of a run, at most: sums take four vectors, which registers hold
constexpr int64_t kChunks = 64;      // enough to share among threads
constexpr int64_t kMinChunk = 64;    // rows; with 32, adding up chunks took a third of the moments of 32x512x3x3
constexpr int64_t kMaxChunk = 256;   // rows: their sums are kept in the accumulation type
constexpr int64_t kCacheBytes = 1 << 24;  // a tensor of this size does not outlive a pass in the shared cache

struct Plan {
  int64_t outer, channels, inner;
  bool runs;                         // rows are parts of one channel's run, and a block is a channel
  bool streams;                      // outputs past the caches
  int64_t group;                     // channels of a block
  int64_t row_outer, row_inner;      // extent of a row; of several outer entries only where all channels fit
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

  void count_chunks() {
    inner_chunks = (inner + chunk_inner - 1) / chunk_inner;
    chunks = (outer + chunk_outer - 1) / chunk_outer * inner_chunks;
  }

  // Channels [block_begin, block_end) of a block.
  int64_t block_begin(int64_t block) const { return block * group; }
  int64_t block_end(int64_t block) const {
    const int64_t end = (block + 1) * group;
    return end < channels ? end : channels;
  }
  int64_t width(int64_t block) const { return (block_end(block) - block_begin(block)) * row_inner * row_outer; }
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
  const auto round_up = [&](int64_t a, int64_t b) { return ceil_div(a, b) * b; };
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
  // How many `parts` are a multiple of elements.
  const auto whole = [](int64_t parts, int64_t multiple) {
    int64_t count = multiple;
    while (count > 1 && parts * count / 2 % multiple == 0) count /= 2;
    return count;
  };
  Plan plan{};
  plan.outer = outer, plan.channels = channels, plan.inner = inner;
  plan.row_outer = 1, plan.row_inner = inner, plan.chunk_inner = inner;
  const int64_t bytes = whole(inner, 8), entry = channels * inner;  // channels whose bits are whole bytes of the mask
  plan.runs = inner * bytes > kMaxWidth;
  int64_t rows = outer;
  if (plan.runs) {
    plan.group = 1;
    plan.row_inner = kRunWidth;
    rows = outer * ceil_div(inner, kMinWidth);
  } else if (entry <= kMaxWidth) {
    plan.group = channels;
    // Of several entries where these then are whole vectors, or at least whole bytes of the mask.
    for (int64_t multiple = 16; multiple >= 8 && plan.row_outer == 1; multiple /= 2) {
      const int64_t several = round_up(ceil_div(kMinWidth, entry), whole(entry, multiple));
      if (several * entry <= kMaxWidth) plan.row_outer = at_most(several, outer);
    }
    rows = ceil_div(outer, plan.row_outer);
  } else {
    // Whole vectors, too, where they fit: the last, partial one of a row takes as long as ten.
    const int64_t vectors = whole(inner, 16), multiple = inner * vectors <= kMaxWidth ? vectors : bytes;
    const int64_t blocks = round_up(ceil_div(entry, kMaxWidth), threads);
    plan.group = at_most(round_up(ceil_div(channels, blocks), multiple), kMaxWidth / inner / multiple * multiple);
  }
  // Whole vectors alone: where the rest of a row was stored beside streams in one line, 14x104x52x58 took twice as long
  // as by eager.
  plan.streams = outer * entry * element_size >= kCacheBytes &&
                 (plan.runs || (plan.width(0) % 16 == 0 && entry * plan.row_outer % 16 == 0));
  // Many: a multiple of 64, few: of four, for threads to share evenly. Of 5 one of two threads would wait for a third.
  const bool many = rows >= kChunks * kMinChunk;
  const int64_t chunks = many ? round_up(ceil_div(rows, kMaxChunk), kChunks) : round_up(ceil_div(rows, kMinChunk), 4);
  const int64_t chunk = ceil_div(rows, rows > kMinChunk ? chunks : 1), of_run = ceil_div(inner, kMinWidth);
  plan.chunk_outer = plan.row_outer * (plan.runs ? ceil_div(chunk, of_run) : chunk);
  if (plan.runs && chunk < of_run) plan.chunk_inner = chunk * kMinWidth;
  plan.blocks = ceil_div(channels, plan.group);
  plan.count_chunks();
  return plan;
}

// The same, of chunks that in memory are whole rows of an image, with nothing between them.
inline Plan of_whole_rows(Plan plan, int64_t width, bool channels_last) {
  const auto rows = [&](int64_t elements) { return elements < width ? width : elements / width * width; };
  plan.row_outer = 1;
  plan.chunk_outer = channels_last ? rows(kMaxChunk) : 1;
  if (plan.runs) plan.chunk_inner = rows(kMaxChunk * kMinWidth) < plan.inner ? rows(kMaxChunk * kMinWidth) : plan.inner;
  plan.count_chunks();
  return plan;
}

}  // namespace resnet_fused
