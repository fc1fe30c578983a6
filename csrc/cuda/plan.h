// How the CUDA kernels share a tensor among blocks: pure geometry, the same for every pass, layout and type.
//
// A dense tensor is a matrix: contiguous (N, C, *) of N rows and C * prod(*) columns, channels_last of N * prod(*) rows
// and C columns; the channel of a column is column / inner, inner = prod(*) or 1. A thread owns `width` adjacent
// columns, what one 16-byte access holds, and walks down rows: it keeps its columns' sums, means and scales in
// registers, whatever the layout, and accesses are adjacent and aligned however short the runs of a channel are.
//
// A block is threads_x * threads_y threads on a *tile* of adjacent columns and one of `splits` ranges of rows.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace resnet_fused::cuda {

constexpr int kMaxThreads = 384;       // of a block
constexpr int kResidentThreads = 768;  // of a multiprocessor: what 80 registers a thread leave room for
constexpr int kMaxTileX = 128;         // threads of a block along columns: their coefficients are in shared memory
constexpr int kWaves = 5;              // from here on, how full the last one is matters little

// What a GPU divides by often, without a division, which takes it some 100 instructions: by the reciprocal's first 64
// bits. Of n < 2^31 they are taken n + 1 times: what is added makes up for what they lack, and is too little for the
// next quotient. Of more they make the quotient right or one too small, by some 35 instructions in the place of 10.
class Divisor {
 public:
  Divisor() = default;
  constexpr explicit Divisor(int64_t value) : value_(value), reciprocal_(UINT64_MAX / static_cast<uint64_t>(value)) {}
  constexpr operator int64_t() const { return value_; }

  // Of any integer, >= 0 (else the one built in, of the value, would be as good a match), one of 32 bits below 2^31.
  template <typename N>
  friend constexpr int64_t operator/(N n, const Divisor& by) {
    if (sizeof(N) <= 4 || static_cast<uint64_t>(n) >> 31 == 0) {
      const uint64_t next = static_cast<uint32_t>(n) + 1, low = next * static_cast<uint32_t>(by.reciprocal_);
      return static_cast<int64_t>((next * (by.reciprocal_ >> 32) + (low >> 32)) >> 32);
    }
    const auto quotient = static_cast<int64_t>(static_cast<unsigned __int128>(n) * by.reciprocal_ >> 64);
    return quotient + (n - quotient * by.value_ >= by.value_);
  }

 private:
  int64_t value_;
  uint64_t reciprocal_;
};

struct Plan {
  int64_t rows, columns, channels;
  int width;      // columns of a thread
  int threads_x;  // along columns, a multiple of 8 (a byte of the mask)
  int64_t splits, split_rows;
  Divisor inner, tiles, tile_columns, threads_y;  // threads along rows
  double waves, last_wave;                        // of blocks, and how full the last one is

  constexpr int threads() const { return threads_x * static_cast<int>(threads_y); }
  constexpr int64_t blocks() const { return tiles * splits; }
  // Blocks that a channel's columns, at most, are spread over.
  constexpr int64_t partials() const {
    const int64_t across = (inner + tile_columns - 2) / tile_columns + 1;
    return splits * (across < tiles ? across : int64_t{tiles});
  }
  constexpr int64_t mask_stride() const { return (columns + 7) / 8; }  // bytes of a row of the mask
};

// outer, channels, inner >= 1: the tensor's elements in that order. aligned: every tensor starts at 16 bytes.
inline Plan make_plan(int64_t outer, int64_t channels, int64_t inner, int element_size, bool aligned,
                      int multiprocessors) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto round_up = [&](int64_t a, int64_t b) { return ceil_div(a, b) * b; };
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };

  Plan base{};
  base.rows = outer, base.columns = channels * inner, base.inner = Divisor(inner), base.channels = channels;
  base.width = 16 / element_size;
  if (!aligned || base.columns % base.width != 0) base.width = 1;
  const int64_t vectors = ceil_div(base.columns, base.width);

  // The candidate that is soonest done, if every row takes as long, a block besides as long as two, and reading eight
  // partial sums as long as one. By cycles, not measured: of both kernels that sum, a row of 768 threads reads 36 KiB,
  // 2500 at an H100's 14.5 bytes a cycle and multiprocessor; a block of each waits for memory before its first row, and
  // joins its sums, 2500 each; of partial sums four or more, doubles or floats, are on their way at once, 300 from L2,
  // twice in `statistics`. Several sizes of blocks, as a batch of one leaves no rows to split: 200704 threads are 1.5
  // waves of 256, but two of 384.
  Plan best{};
  double least = 0;
  for (const int threads : {256, 384, 192}) {
    for (const int64_t most_x : {8, 16, 32, 64, kMaxTileX}) {
      Plan plan = base;
      // Whole warps: 4 rows of threads, or a multiple, make them of any multiple of 8, where there is room for 4.
      const int64_t threads_x = at_most(round_up(vectors, vectors > kMaxThreads / 4 ? 32 : 8), most_x);
      int64_t threads_y = at_most(threads / threads_x, outer);
      if (threads_x * threads_y % 32 != 0) threads_y = round_up(threads_y, 4);
      if (threads_x * threads_y > kMaxThreads) threads_y -= 4;
      plan.threads_x = static_cast<int>(threads_x), plan.threads_y = Divisor(threads_y);
      plan.tile_columns = Divisor(threads_x * plan.width), plan.tiles = Divisor(ceil_div(vectors, threads_x));
      if (plan.tiles > INT32_MAX && most_x < kMaxTileX) continue;  // a grid has no more blocks
      plan.splits = 1;
      // Partial sums that a thread of the last block of a tile reads, for each split.
      const int64_t tile_channels = at_most((plan.tile_columns + inner - 2) / inner + 1, channels);
      const double finish = static_cast<double>(plan.partials() * tile_channels) / plan.threads();

      const int resident = kResidentThreads / plan.threads();  // blocks of a multiprocessor
      for (int level = 1; level <= resident * kWaves; level += level < resident ? 1 : resident) {
        const int64_t wanted = int64_t{level} * multiprocessors / plan.tiles;
        const int64_t most = ceil_div(outer, plan.threads_y);
        plan.splits = wanted < 1 ? 1 : at_most(wanted, most);
        plan.split_rows = ceil_div(outer, plan.splits);
        plan.splits = ceil_div(outer, plan.split_rows);
        const int64_t per_multiprocessor = ceil_div(plan.blocks(), multiprocessors);
        const int64_t wave = multiprocessors * at_most(per_multiprocessor, resident);
        plan.waves = static_cast<double>(plan.blocks()) / static_cast<double>(wave);
        const int64_t waves = ceil_div(plan.blocks(), wave);
        plan.last_wave = plan.waves - static_cast<double>(waves - 1);

        const double turns = static_cast<double>(ceil_div(plan.split_rows, plan.threads_y)) + 2;
        const double busy = static_cast<double>(at_most(per_multiprocessor, resident) * plan.threads());
        const double finishing = static_cast<double>(plan.splits) * finish / 8;
        // Half the threads keep the memory busy.
        double cost = (static_cast<double>(waves) * turns + finishing) * (busy < 512 ? 512 : busy);
        if (plan.blocks() < multiprocessors) cost *= 4;
        if (plan.last_wave < 0.8 && plan.waves < kWaves) cost *= 2;
        if (least == 0 || cost < least) least = cost, best = plan;
      }
    }
  }
  return best;
}

}  // namespace resnet_fused::cuda
