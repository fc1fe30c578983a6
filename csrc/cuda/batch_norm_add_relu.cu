// relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on a GPU: device code, then launchers.
//
// Forward: `statistics` sums, and the last block to arrive at a channel finishes it; `normalize` does the rest.
// Backward: `gradient_sums`, finished likewise; `input_gradient`. All four walk the matrix that plan.h describes; the
// second of each pair backwards, as the first one leaves its end in L2. Every sum has one order, so that reruns are
// bit-equal.
//
// Of two batch norms all but `normalize` take one a block, neighbouring blocks the same part of both, so that the
// second one finds in L2 what they share, the output's gradient and the mask. A thread of `input_gradient` that took
// both would need eight coefficients a column: 64 of its 80 registers in half types.

#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

// ---- Element types ----

template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulation<T>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(acc_t<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// Calls f(T{}) with the element type, on the host or on the device as f is.
#pragma nv_exec_check_disable
template <typename F>
__host__ __device__ __forceinline__ void with_type(ElementType type, F f) {
  switch (type) {
    case ElementType::float32:
      return f(float{});
    case ElementType::float64:
      return f(double{});
    case ElementType::bfloat16:
      return f(__nv_bfloat16{});
    default:
      return f(__half{});
  }
}

// ---- Per-channel vectors ----

__device__ __forceinline__ double load(const ChannelVector& vector, int64_t channels, int64_t c, double otherwise) {
  double value = otherwise;
  if (vector.data != nullptr) {
    with_type(vector.type, [&](auto element) {
      using T = decltype(element);
      const Global<const T> elements(static_cast<const T*>(vector.data), (channels - 1) * vector.stride + 1);
      value = static_cast<double>(widen(elements.load(c * vector.stride)));
    });
  }
  return value;
}

__device__ __forceinline__ void store(const ChannelVector& vector, int64_t channels, int64_t c, double value) {
  if (vector.data == nullptr) return;
  with_type(vector.type, [&](auto element) {
    using T = decltype(element);
    const Global<T> elements(static_cast<T*>(vector.data), (channels - 1) * vector.stride + 1);
    elements.store(c * vector.stride, narrow<T>(static_cast<acc_t<T>>(value)));
  });
}

// The output is (input - mean) * scale + shift, the mean rounded to A, and what that dropped made up for in the shift:
// at mean 1e4 and std 1e-2 it is 5 % of the std.
template <typename A>
struct Coefficients {
  A mean, scale, shift;

  __device__ __forceinline__ Coefficients(A mean, A scale, A shift) : mean(mean), scale(scale), shift(shift) {}
  __device__ __forceinline__ Coefficients(double exact_mean, double invstd, double weight, double bias)
      : mean(static_cast<A>(exact_mean)), scale(static_cast<A>(invstd * weight)) {
    const double dropped = exact_mean - static_cast<double>(mean);
    const bool exact = dropped == 0 || dropped != dropped;
    shift = static_cast<A>(exact ? bias : bias - dropped * static_cast<double>(scale));
  }
};

// A channel's, each of (C,), that the last block to arrive at it leaves behind the partial sums.
template <typename A>
__device__ __forceinline__ Global<A> coefficients_of(const Plan& plan, const Scratch& scratch) {
  return {static_cast<A*>(scratch.partials) + 2 * plan.partials() * plan.channels, kCoefficients * plan.channels};
}

// ---- Where a block and a thread stand ----

template <int kWidth>
struct Position {
  const Plan& plan;
  int64_t tile, split, tile_begin, row_begin, row_end, first_channel;
  int tile_channels, thread;
  int turns, left;  // rows of each thread, and how many rows of threads have one more
  int64_t column;   // the thread's first
  bool inside;      // whether it has columns

  // count: of blocks that take the same part of the matrix, 1 or 2.
  __device__ __forceinline__ Position(const Plan& plan, bool reverse, unsigned count = 1) : plan(plan) {
    const unsigned block = (reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x) >> (count - 1);
    split = block / plan.tiles, tile = block - split * plan.tiles;
    tile_begin = tile * plan.tile_columns;
    row_begin = split * plan.split_rows;
    row_end = smaller(row_begin + plan.split_rows, plan.rows);
    const int64_t rows = row_end - row_begin;
    turns = static_cast<int>(rows / plan.threads_y);
    left = static_cast<int>(rows - turns * plan.threads_y);
    first_channel = tile_begin / plan.inner;
    tile_channels = static_cast<int>((tile_end() - 1) / plan.inner - first_channel) + 1;
    thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    column = tile_begin + threadIdx.x * kWidth;
    inside = column < plan.columns;
  }

  static __device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static __device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  __device__ __forceinline__ int64_t tile_end() const { return smaller(tile_begin + plan.tile_columns, plan.columns); }
  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x * blockDim.y); }

  // Calls f(c, channel) for the thread's share of the tile's channels; c counts from the tile's first.
  template <typename F>
  __device__ __forceinline__ void for_each_tile_channel(F f) const {
    for (int c = thread; c < tile_channels; c += threads()) f(c, first_channel + c);
  }

  // Calls f(k, channel) for the thread's columns; the channel counts from the tile's first.
  template <typename F>
  __device__ __forceinline__ void for_each_column(F f) const {
    int64_t channel = column / plan.inner, within = column - channel * plan.inner;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      f(k, static_cast<int>(channel - first_channel));
      if (++within == plan.inner) ++channel, within = 0;
    }
  }

  // Calls f(channel, begin, end) for the tile's channels and their columns in it, both counted from the tile's first,
  // a group of lanes each.
  template <typename F>
  __device__ __forceinline__ void for_each_channel(const Group& group, F f) const {
    for (int c = thread / group.lanes; c < tile_channels; c += threads() / group.lanes) {
      const int64_t begin = larger((first_channel + c) * plan.inner, tile_begin);
      const int64_t end = smaller((first_channel + c + 1) * plan.inner, tile_end());
      f(c, static_cast<int>(begin - tile_begin), static_cast<int>(end - tile_begin));
    }
  }

  // Calls f(at, y) for a lane's share of the columns from `begin` to `end` in each row of threads, y: at, where a
  // matrix in shared memory has them.
  template <typename F>
  __device__ __forceinline__ void for_each_value(const Group& group, int begin, int end, F f) const {
    const int stride = static_cast<int>(blockDim.x) * kWidth, rows = static_cast<int>(blockDim.y);
    for (Walk walk(group, end - begin); walk.row < rows; walk.step()) {
      f(walk.row * stride + begin + walk.column, walk.row);
    }
  }

  // As many lanes to a channel as there are, up to a warp.
  __device__ __forceinline__ Group group() const {
    int lanes = 1;
    while (lanes < 32 && 2 * lanes * tile_channels <= threads()) lanes *= 2;
    return Group(lanes, thread);
  }
};

// Where a thread's columns of a row begin: the row, an element, and a byte of the mask.
struct Place {
  int64_t row, element, byte;
};

// The thread's rows, every `blockDim.y`th of the split's: load(place) of the first kAhead by begin(), while
// coefficients are waited for, and of the others that many rows ahead of their use.
template <int kWidth, bool kReverse, int kAhead, typename F>
class Rows {
 public:
  __device__ __forceinline__ Rows(const Position<kWidth>& position, F load) : load_(load), plan_(position.plan) {
    const Plan& plan = position.plan;
    const int64_t row = kReverse ? position.row_end - 1 - threadIdx.y : position.row_begin + threadIdx.y;
    turns_ = position.turns + (position.left > 0);
    own_ = position.inside ? position.turns + (static_cast<int>(threadIdx.y) < position.left) : 0;
    place_ = {row, row * plan.columns + position.column, row * plan.mask_stride() + position.column / 8};
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < own_) loaded_[i] = load_(ahead(i));
    }
  }

  // Calls f(place, is_own, loaded); where lanes may share a byte of the mask, as often in every thread of the block,
  // where others have more rows, not of its own.
  template <typename G>
  __device__ __forceinline__ void for_each(G f) {
#pragma unroll 1
    for (; (kWidth < 8 ? turns_ : own_) > 0; turns_ -= kAhead, own_ -= kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        f(place_, i < own_, loaded_[i]);
        if (i + kAhead < own_) loaded_[i] = load_(ahead(kAhead));
        place_ = ahead(1);
      }
    }
  }

 private:
  __device__ __forceinline__ Place ahead(int rows) const {
    const int64_t step = (kReverse ? -rows : rows) * static_cast<int64_t>(blockDim.y);
    return {place_.row + step, place_.element + step * plan_.columns, place_.byte + step * plan_.mask_stride()};
  }

  F load_;
  int turns_, own_;  // rows that are left to any thread of the block, and to this one
  Place place_;
  const Plan& plan_;
  decltype(std::declval<F>()(Place{})) loaded_[kAhead];
};

template <int kAhead, bool kReverse, int kWidth, typename F>
__device__ __forceinline__ Rows<kWidth, kReverse, kAhead, F> rows_of(const Position<kWidth>& position, F load) {
  return {position, load};
}

// The block's, of the one or two batch norms in a Forward or Backward. (A division would spill on sm_120.)
template <typename P>
__device__ __forceinline__ const auto& norm_of(const P& parameters) {
  return parameters.norms[parameters.count == 2 ? blockIdx.x % 2 : 0];
}

// ---- Sums across blocks ----

__device__ unsigned all_semaphores[kStreams * kSemaphores];  // 1 MiB

// The blocks that sum parts of a channel: a range of tiles, in each of them every split.
struct Parts {
  const Plan& plan;
  int64_t channel, first_tile, last_tile, count;

  __device__ __forceinline__ Parts(const Plan& plan, int64_t channel)
      : plan(plan),
        channel(channel),
        first_tile(channel * plan.inner / plan.tile_columns),
        last_tile(((channel + 1) * plan.inner - 1) / plan.tile_columns),
        count((last_tile - first_tile + 1) * plan.splits) {}

  __device__ __forceinline__ int64_t index(int64_t tile, int64_t split) const {
    return (tile - first_tile) * plan.splits + split;
  }

  // The channel's, in a tile.
  __device__ __forceinline__ int columns(int64_t tile) const {
    const int64_t begin = tile * plan.tile_columns, end = begin + plan.tile_columns;
    const int64_t channel_begin = channel * plan.inner, channel_end = channel_begin + plan.inner;
    return static_cast<int>((end < channel_end ? end : channel_end) - (begin > channel_begin ? begin : channel_begin));
  }
};

// Two sums for each part of each channel, between blocks.
template <typename A>
class Partials {
 public:
  __device__ __forceinline__ Partials(const Plan& plan, const Scratch& scratch)
      : plan_(plan),
        sums_(static_cast<A*>(scratch.partials), 2 * plan.partials() * plan.channels),
        arrived_(scratch.arrived, plan.channels) {}

  // Hands part `part` of a channel over. Whether it was the last: then, and only then, all of them can be loaded.
  __device__ __forceinline__ bool hand_over(const Group& group, const Parts& parts, int64_t part, A first,
                                            A second) const {
    bool last = false;
    if (group.lane == 0) {
      sums_.store(at(0, part, parts.channel), first);
      sums_.store(at(1, part, parts.channel), second);
      __threadfence();  // before the arrival is seen, the sums are
      const unsigned all = static_cast<unsigned>(parts.count - 1);
      last = arrived_.atomic_inc(parts.channel, all) == all;  // the last one resets the count
    }
    last = group.any_from_first(last);
    if (last) {
      __threadfence();
      __syncwarp(group.mask);
    }
    return last;
  }

  // Calls f(values, first, second) for a lane's share of a channel's parts: the values that the part is of, and its
  // sums. The second is loaded where it is needed. A load takes some 300 cycles, from L2: several are on their way.
  template <typename F>
  __device__ __forceinline__ void for_each_part(const Group& group, const Parts& parts, bool needs_second, F f) const {
    constexpr int kAtOnce = 4;
    const int64_t step = group.lanes * plan_.channels, others = at(1, 0, 0);
    int64_t next = at(0, group.lane, parts.channel);
    const int last_tile = static_cast<int>(parts.last_tile - parts.first_tile);
    const int last_split = static_cast<int>(plan_.splits) - 1;
    const A columns = static_cast<A>(plan_.tile_columns),
            first_columns = static_cast<A>(parts.columns(parts.first_tile)),
            last_columns = static_cast<A>(parts.columns(parts.last_tile)), rows = static_cast<A>(plan_.split_rows),
            last_rows = static_cast<A>(plan_.rows - last_split * plan_.split_rows);
    Walk walk(group, last_split + 1);
    for (int begin = group.lane; begin < parts.count; begin += kAtOnce * group.lanes) {
      A first[kAtOnce], second[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, next += step) {
        if (begin + i * group.lanes < parts.count) {
          first[i] = sums_.load_fresh(next);
          if (needs_second) second[i] = sums_.load_fresh(others + next);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i * group.lanes < parts.count) {
          const A of_tile = walk.row == 0 ? first_columns : walk.row == last_tile ? last_columns : columns;
          f(of_tile * (walk.column == last_split ? last_rows : rows), first[i], second[i]);
          walk.step();
        }
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t at(int which, int64_t part, int64_t channel) const {
    return (which * plan_.partials() + part) * plan_.channels + channel;
  }

  const Plan& plan_;
  Global<A> sums_;
  Global<unsigned> arrived_;
};

// ---- Forward ----

// Mean and m2, the sum of squared deviations from it.
template <typename A>
struct Moments {
  A mean, m2;
};

// Of n values, from those of parts, which for_each(needs_m2, f) calls f(values, mean, m2) with. Twice through the
// parts, rather than part by part: there is no division, and no chain of dependent steps.
template <typename A, typename F>
__device__ __forceinline__ Moments<A> join(const Group& group, A n, F for_each) {
  A sum = 0, m2 = 0;
  for_each(false, [&](A values, A part_mean, A) { sum += values * part_mean; });
  const A mean = group.sum(sum) / n;
  for_each(true, [&](A values, A part_mean, A part_m2) {
    const A deviation = part_mean - mean;
    m2 += part_m2 + values * deviation * deviation;
  });
  return {mean, group.sum(m2)};
}

// Means are taken of deviations from an origin near them, as float holds no mean of 1e4 to a hundredth of a std of
// 1e-2: the median of a channel's first, middle and last value, which one outlier does not move.
template <typename T>
__device__ __forceinline__ acc_t<T> origin_of(const Global<const T>& input, const Plan& plan, int64_t channel) {
  const auto value = [&](int64_t row, int64_t i) {
    return widen(input.load(row * plan.columns + channel * plan.inner + i));
  };
  const auto a = value(0, 0), b = value(plan.rows / 2, plan.inner / 2), c = value(plan.rows - 1, plan.inner - 1);
  const auto smaller = a < b ? a : b, larger = a < b ? b : a;
  const auto median = c < smaller ? smaller : c > larger ? larger : c;
  return median - median == 0 ? median : 0;  // an infinite origin would turn infinities into NaNs
}

// A channel's last group: statistics, and the running ones. Not inlined: statistics<double> would spill on sm_120.
template <typename T>
__device__ __attribute__((noinline)) void finish_statistics(const Forward& forward, int64_t c, acc_t<T> from_origin,
                                                            double m2) {
  const Plan& plan = forward.plan;
  const NormForward& f = norm_of(forward);
  const Global<const T> input(static_cast<const T*>(f.input), plan.rows * plan.columns);
  const double mean = static_cast<double>(origin_of(input, plan, c)) + static_cast<double>(from_origin);
  const double n = static_cast<double>(plan.rows) * static_cast<double>(plan.inner);
  m2 = m2 < 0 ? 0 : m2;  // by rounding; NaN stays
  const Global<double> statistics(f.statistics, 2 * plan.channels);
  const double invstd = 1 / sqrt(m2 / n + f.eps);
  statistics.store(c, mean);
  statistics.store(plan.channels + c, invstd);
  const Coefficients<acc_t<T>> coefficients(mean, invstd, load(f.weight, plan.channels, c, 1),
                                            load(f.bias, plan.channels, c, 0));
  const Global<acc_t<T>> ready = coefficients_of<acc_t<T>>(plan, f.scratch);
  ready.store(c, coefficients.mean);
  ready.store(plan.channels + c, coefficients.scale);
  ready.store(2 * plan.channels + c, coefficients.shift);
  double factor = f.momentum;
  // `normalize` will count this batch.
  if (f.cumulative) factor = 1 / static_cast<double>(Global<const int64_t>(f.num_batches_tracked, 1).load(0) + 1);
  const auto update = [&](const ChannelVector& running, double batch) {
    if (running.data == nullptr) return;
    store(running, plan.channels, c, factor * batch + (1 - factor) * load(running, plan.channels, c, 0));
  };
  update(f.running_mean, mean + load(f.input_bias, plan.channels, c, 0));
  update(f.running_var, m2 / (n - 1));
}

__device__ __forceinline__ void count_batch(int64_t* num_batches_tracked) {
  const Global<int64_t> counter(num_batches_tracked, 1);
  if (counter) counter.store(0, counter.load(0) + 1);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kResidentThreads / kMaxThreads)
    statistics(const __grid_constant__ Forward f) {
  using A = acc_t<T>;
  const Plan& plan = f.plan;
  const NormForward& norm = norm_of(f);
  const Position<kWidth> position(plan, false, f.count);
  const Global<const T> input(static_cast<const T*>(norm.input), plan.rows * plan.columns);

  auto rows = rows_of<3, false>(
      position, [&](Place place) { return Packed<T, kWidth>(input.template load_vector<kWidth>(place.element)); });
  rows.begin();
  __shared__ Shared<A, kMaxTileX * kWidth> origins;
  position.for_each_tile_channel([&](int c, int64_t channel) { origins.store(c, origin_of(input, plan, channel)); });
  __syncthreads();

  // Each column by itself: Welford's update for m2, which no origin can spoil, and a plain sum, which an infinity does
  // not turn into a NaN.
  A origin[kWidth], mean[kWidth], m2[kWidth], sum[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) origin[k] = mean[k] = m2[k] = sum[k] = 0;
  if (position.inside) position.for_each_column([&](int k, int channel) { origin[k] = origins.load(channel); });
  int count = 0;
  A share = 0;
  rows.for_each([&](Place, bool is_own, const Packed<T, kWidth>& loaded) {
    if (!is_own) return;
    const auto x = loaded.unpacked();
    share = 1 / static_cast<A>(++count);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const A value = widen(x[k]) - origin[k], deviation = value - mean[k];
      mean[k] += deviation * share;
      m2[k] += deviation * (value - mean[k]);
      sum[k] += value;
    }
  });
#pragma unroll
  for (int k = 0; k < kWidth; ++k) mean[k] = sum[k] * share;

  __shared__ Shared<A, kMaxThreads * kWidth> means, m2s;
  means.store_run(position.thread * kWidth, mean);
  m2s.store_run(position.thread * kWidth, m2);
  __syncthreads();

  const A size = static_cast<A>(position.row_end - position.row_begin), fewest = static_cast<A>(position.turns);
  const Group group = position.group();
  const Partials<A> partials(plan, norm.scratch);
  position.for_each_channel(group, [&](int channel, int begin, int end) {
    const int64_t c = position.first_channel + channel;
    const Parts parts(plan, c);
    const Moments<A> of_block = join(group, static_cast<A>(end - begin) * size, [&](bool, auto f) {
      position.for_each_value(group, begin, end, [&](int at, int y) {
        f(y < position.left ? fewest + 1 : fewest, means.load(at), m2s.load(at));
      });
    });
    const int64_t part = parts.index(position.tile, position.split);
    if (!partials.hand_over(group, parts, part, of_block.mean, of_block.m2)) return;

    const A values = static_cast<A>(plan.rows) * static_cast<A>(plan.inner);
    const Moments<A> of_channel =
        join(group, values, [&](bool needs_m2, auto f) { partials.for_each_part(group, parts, needs_m2, f); });
    if (group.lane == 0) finish_statistics<T>(f, c, of_channel.mean, static_cast<double>(of_channel.m2));
  });
}

// Coefficients of a channel, and in eval its statistics, which nobody else has written.
template <typename T, int kWidth>
__device__ __forceinline__ Coefficients<acc_t<T>> forward_coefficients(const NormForward& f, bool training,
                                                                       const Position<kWidth>& position, int64_t c) {
  using A = acc_t<T>;
  const int64_t channels = position.plan.channels;
  const Global<double> statistics(f.statistics, 2 * channels);
  double mean, invstd;
  if (training) {
    mean = statistics.load(c), invstd = statistics.load(channels + c);
  } else {
    mean = load(f.running_mean, channels, c, 0) - load(f.input_bias, channels, c, 0);
    const A variance = static_cast<A>(load(f.running_var, channels, c, 1));
    invstd = static_cast<double>(1 / sqrt(variance + static_cast<A>(f.eps)));
    if (position.split == 0 && c * position.plan.inner >= position.tile_begin) {
      statistics.store(c, mean);
      statistics.store(channels + c, invstd);
    }
  }
  return {mean, invstd, load(f.weight, channels, c, 1), load(f.bias, channels, c, 0)};
}

// The maxima of the window that is `offset` elements from this one, and their positions, of what normalized(k, x) makes
// of the input: of equal values the first wins, of NaNs the last; -infinity where there are none. What is clipped may
// as well be clipped afterwards.
template <typename T, int kWidth, typename F>
__device__ __forceinline__ void max_pool(const Pooling& pooling, const Global<const T>& input, const Window& window,
                                         int64_t offset, F normalized, acc_t<T> (&best)[kWidth],
                                         unsigned (&winner)[kWidth]) {
  constexpr unsigned kAtOnce = 3;  // loads on their way
#pragma unroll
  for (int k = 0; k < kWidth; ++k) best[k] = -INFINITY, winner[k] = 0;
  const unsigned last = window.columns - 1;
  unsigned position = window.position;
  int64_t row = window.element + offset;
#pragma unroll 1
  for (unsigned h = 0; h < window.rows; ++h, row += pooling.rows.step, position += pooling.columns.kernel) {
    unsigned w = 0;
#pragma unroll 1
    do {
      Packed<T, kWidth> loaded[kAtOnce];
      unsigned at[kAtOnce];
#pragma unroll
      for (unsigned i = 0; i < kAtOnce; ++i) {
        at[i] = i == 0 || w + i < last ? w + i : last;  // the last once more: it wins nothing
        loaded[i] = input.template load_vector<kWidth>(row + at[i] * pooling.columns.step);
      }
#pragma unroll
      for (unsigned i = 0; i < kAtOnce; ++i) {
        const auto x = loaded[i].unpacked();
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const acc_t<T> value = widen(narrow<T>(normalized(k, x[k])));
          if (value > best[k] || value != value) best[k] = value, winner[k] = position + at[i];
        }
      }
    } while ((w += kAtOnce) <= last);
  }
}

enum class Residual { none, as_it_is, normalized };

template <typename T, int kWidth, Residual kResidual, bool kPools>
__global__ void __launch_bounds__(kMaxThreads, kResidentThreads / kMaxThreads)
    normalize(const __grid_constant__ Forward f) {
  using A = acc_t<T>;
  const Plan& plan = f.output_plan;
  const Position<kWidth> position(plan, f.training);
  if (f.training && blockIdx.x == 0 && position.thread == 0) {
    for (const NormForward& norm : f.norms) count_batch(norm.num_batches_tracked);
  }

  const int64_t size = f.plan.rows * f.plan.columns;
  const Global<const T> input(static_cast<const T*>(f.norms[0].input), size);
  const Global<const T> residual(static_cast<const T*>(f.residual), size);
  struct Loaded {
    Packed<T, kWidth> x, r;
  };
  // As registers allow, without a spill.
  constexpr int kAhead = kPools                                                ? 1
                         : kResidual == Residual::none                         ? 3
                         : kResidual == Residual::normalized && sizeof(T) == 2 ? 1
                                                                               : 2;
  auto rows = rows_of<kAhead, true>(position, [&](Place place) {
    Loaded loaded;
    if (!kPools) loaded.x = input.template load_vector<kWidth>(place.element);
    if (kResidual != Residual::none) loaded.r = residual.template load_vector<kWidth>(place.element);
    return loaded;
  });

  constexpr int kNorms = kResidual == Residual::normalized ? 2 : 1;
  __shared__ Shared<A, kMaxTileX * kWidth> means[kNorms], scales[kNorms], shifts;
  const auto store_coefficients = [&](auto of_norm) {
    position.for_each_tile_channel([&](int c, int64_t channel) {
      A sum_of_shifts = 0;
#pragma unroll 1  // unrolled, it would spill on sm_120
      for (int i = 0; i < kNorms; ++i) {
        const Coefficients<A> coefficients = of_norm(f.norms[i], channel);
        means[i].store(c, coefficients.mean);
        scales[i].store(c, coefficients.scale);
        sum_of_shifts += coefficients.shift;
      }
      shifts.store(c, sum_of_shifts);
    });
  };
  if (f.training && !f.given) {
    rows.begin();
    store_coefficients([&](const NormForward& norm, int64_t channel) {
      const Global<A> ready = coefficients_of<A>(f.plan, norm.scratch);
      return Coefficients<A>{ready.load(channel), ready.load(plan.channels + channel),
                             ready.load(2 * plan.channels + channel)};
    });
  } else {
    store_coefficients([&](const NormForward& norm, int64_t channel) {
      return forward_coefficients<T>(norm, f.training, position, channel);
    });
    rows.begin();  // after them, as registers do not hold both
  }
  __syncthreads();
  A mean[kNorms][kWidth], scale[kNorms][kWidth], shift[kWidth];
  if (position.inside) {
    position.for_each_column([&](int k, int channel) {
#pragma unroll
      for (int i = 0; i < kNorms; ++i) mean[i][k] = means[i].load(channel), scale[i][k] = scales[i].load(channel);
      shift[k] = shifts.load(channel);
    });
  }

  const auto normalized = [&](int k, T x) { return (widen(x) - mean[0][k]) * scale[0][k] + shift[k]; };
  const auto rectified = [&](int k, T x, T r) {
    A value = normalized(k, x);
    if constexpr (kResidual == Residual::as_it_is) value += widen(r);
    if constexpr (kResidual == Residual::normalized) value += (widen(r) - mean[1][k]) * scale[1][k];
    return narrow<T>(0 > value ? 0 : value);  // NaN passes
  };

  // A row is an image: in all of them the thread's window is the same.
  const bool is_in_images = plan.inner > 1;
  Window window{};
  if (kPools && is_in_images) window = f.pooling.window_of(position.column);
  const Global<T> output(static_cast<T*>(f.output), plan.rows * plan.columns);
  const Global<uint8_t> mask(f.mask, plan.rows * (kPools ? plan.columns : plan.mask_stride()));
  rows.for_each([&](Place place, bool is_own, const Loaded& loaded) {
    if constexpr (kPools) {
      if (!is_own) return;
      A best[kWidth];
      unsigned winner[kWidth];
      if (!is_in_images) window = f.pooling.window_of(place.element);
      max_pool(f.pooling, input, window, is_in_images ? place.row * f.plan.columns : 0, normalized, best, winner);
      Vector<T, kWidth> y;
      Vector<uint8_t, kWidth> winners;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        y[k] = narrow<T>(0 > best[k] && window.rows > 0 ? 0 : best[k]);
        winners[k] = static_cast<uint8_t>(best[k] <= 0 ? kNoWinner : winner[k]);
      }
      output.template store_vector<kWidth>(place.element, y);
      if (mask) mask.template store_vector<kWidth>(place.element, winners);
      return;
    }
    unsigned passed = 0;
    if (is_own) {
      const auto x = loaded.x.unpacked(), r = loaded.r.unpacked();
      Vector<T, kWidth> y;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        y[k] = rectified(k, x[k], r[k]);
        passed |= static_cast<unsigned>(!(widen(y[k]) <= 0)) << k;
      }
      output.template store_vector<kWidth>(place.element, y);
    }
    if (!mask) return;
    // A byte of the mask is 8 columns, those of 8 / kWidth adjacent lanes.
    if constexpr (kWidth < 8) {
#pragma unroll
      for (int bits = kWidth; bits < 8; bits *= 2) {
        passed |= __shfl_down_sync(0xffffffffu, passed, bits / kWidth) << bits;
      }
    }
    if (is_own && threadIdx.x % (8 / kWidth) == 0) mask.store(place.byte, static_cast<uint8_t>(passed));
  });
}

// Without a batch there is nothing to normalise, but the batch counts.
__global__ void count_batches(const __grid_constant__ Forward f) {
  for (const NormForward& norm : f.norms) count_batch(norm.num_batches_tracked);
}

// ---- Backward ----

// The masked gradient g, grad_output where the ReLU passed. kOfWindow: of a pooling's, values that a load takes, of as
// many channels, or of one, whose windows then are of several of a thread's columns; 0 where nothing was pooled.
template <typename T, int kWidth, int kOfWindow>
struct Gradient {
  using A = acc_t<T>;
  const Pooling& pooling;
  Global<const T> grad_output, input;
  Global<const uint8_t> mask;
  // Of what was pooled, whether a row is an image: in all of them the thread's windows are the same, but for an offset.
  bool is_in_images;
  int64_t row_outputs;
  Cover of_image;

  __device__ __forceinline__ Gradient(const Backward& b, const NormBackward& norm, int64_t column)
      : pooling(b.pooling),
        grad_output(static_cast<const T*>(b.grad_output), kOfWindow ? outputs(b) : b.plan.rows * b.plan.columns),
        input(static_cast<const T*>(norm.input), b.plan.rows * b.plan.columns),
        mask(b.mask, kOfWindow ? outputs(b) : b.plan.rows * b.plan.mask_stride()),
        is_in_images(kOfWindow == 1 && b.plan.inner > 1),
        row_outputs(b.plan.channels * b.pooling.output.image),
        of_image() {
    if (is_in_images) of_image = pooling.cover_of(column, kWidth);
  }

  static __device__ __forceinline__ int64_t outputs(const Backward& b) {
    return b.plan.rows * b.plan.columns / b.pooling.input.image * b.pooling.output.image;
  }

  struct Loaded {
    Packed<T, kWidth> g, x;
    unsigned bits;
  };
  __device__ __forceinline__ Loaded load(Place place, bool needs_input) const {
    Loaded loaded;
    if constexpr (kOfWindow == 0) loaded.g = grad_output.template load_vector<kWidth>(place.element);
    if (needs_input) loaded.x = input.template load_vector<kWidth>(place.element);
    if constexpr (kOfWindow == 0) loaded.bits = mask.load(place.byte);
    if constexpr (kOfWindow != 0) loaded.g = won(place);
    return loaded;
  }

  // The sums, in the windows' order, of the gradients of those that the columns of a place have won.
  __device__ __forceinline__ Vector<T, kWidth> won(const Place& place) const {
    constexpr int kWindow = kOfWindow == 0 ? 1 : kOfWindow;
    const Windows &rows = pooling.rows, &columns = pooling.columns;
    const Cover cover = is_in_images ? of_image : pooling.cover_of(place.element, kWidth / kWindow);
    int64_t first = cover.window + (is_in_images ? place.row * row_outputs : 0);
    unsigned below = cover.below;
    A sum[kWidth] = {};
#pragma unroll 1
    for (unsigned h = 0; h < cover.rows; ++h, first += pooling.output.row, below -= rows.stride) {
      const auto kh = rows.dilation == 1 ? below : static_cast<unsigned>(below / rows.by_dilation);
      if (kh * rows.dilation != below) continue;
      int64_t window = first;
      unsigned beside = cover.beside;
#pragma unroll 1
      for (unsigned w = 0; w < cover.columns; ++w, window += pooling.output.pixel, beside -= columns.stride) {
        const auto winners = mask.template load_vector<kWindow>(window);
        const auto g = grad_output.template load_vector<kWindow>(window);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const unsigned kw = winners[k % kWindow] - kh * columns.kernel;  // kNoWinner is beyond every row of positions
          const bool is_won = kw < columns.kernel && kw * columns.dilation == beside + (kWindow == 1 ? k : 0);
          if (is_won) sum[k] += widen(g[k % kWindow]);
        }
      }
    }
    Vector<T, kWidth> rounded;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) rounded[k] = narrow<T>(sum[k]);
    return rounded;
  }

  // Calls f(k, g, centered) for the columns of a row; g as stored, centered = input - mean. A select, not a product,
  // so that a NaN gradient where the output is <= 0 gives 0.
  template <typename F>
  __device__ __forceinline__ void for_each(const Loaded& loaded, bool needs_input, const A* mean, F f) const {
    const auto g = loaded.g.unpacked(), x = loaded.x.unpacked();
    const unsigned bits = loaded.bits >> (threadIdx.x * kWidth % 8);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      f(k, kOfWindow != 0 || bits >> k & 1 ? g[k] : narrow<T>(0), needs_input ? widen(x[k]) - mean[k] : 0);
    }
  }
};

template <typename A>
__device__ __forceinline__ Coefficients<A> backward_coefficients(const NormBackward& b, int64_t channels, int64_t c) {
  const Global<const double> statistics(b.statistics, 2 * channels);
  return {statistics.load(c), statistics.load(channels + c), load(b.weight, channels, c, 1), 0};
}

// What batch statistics take from the input's gradient, by the means of g and of g * (input - mean) * invstd.
template <typename A>
struct Projection {
  A offset, slope;

  // dropped: from the mean by its rounding, see Coefficients.
  __device__ __forceinline__ Projection(double dropped, double invstd, double mean, double dot)
      : offset(static_cast<A>(mean - dropped * (dot * invstd))), slope(static_cast<A>(dot * invstd)) {}
};

// A channel's last group: the gradients of the vectors, and the projection.
template <typename A>
__device__ __forceinline__ void finish_gradients(const Plan& plan, const NormBackward& b, bool training, int64_t c,
                                                 double sum, double dot) {
  const Global<const double> statistics(b.statistics, 2 * plan.channels);
  const double mean = statistics.load(c), invstd = statistics.load(plan.channels + c);
  const Coefficients<A> coefficients = backward_coefficients<A>(b, plan.channels, c);
  const double n = static_cast<double>(plan.rows) * static_cast<double>(plan.inner);
  const double dropped = mean - static_cast<double>(coefficients.mean);  // by its rounding, see Coefficients
  dot -= dropped * sum;
  store(b.grad_bias, plan.channels, c, sum);
  store(b.grad_weight, plan.channels, c, dot * invstd);
  // Batch statistics cancel a bias of the input, running ones let it through as they do the input.
  store(b.grad_input_bias, plan.channels, c, training ? 0 : sum * static_cast<double>(coefficients.scale));
  if (!b.projects(training)) return;
  const Projection<A> values(dropped, invstd, sum / n, dot * invstd / n);
  const Global<A> ready = coefficients_of<A>(plan, b.scratch);
  ready.store(c, coefficients.mean);
  ready.store(plan.channels + c, coefficients.scale);
  ready.store(2 * plan.channels + c, values.offset);
  ready.store(3 * plan.channels + c, values.slope);
}

template <typename T, int kWidth, int kOfWindow>
__global__ void __launch_bounds__(kMaxThreads, kResidentThreads / kMaxThreads)
    gradient_sums(const __grid_constant__ Backward b) {
  using A = acc_t<T>;
  const Plan& plan = b.plan;
  const NormBackward& norm = norm_of(b);
  const Position<kWidth> position(plan, false, b.count);

  using Loaded = typename Gradient<T, kWidth, kOfWindow>::Loaded;
  const Gradient<T, kWidth, kOfWindow> gradient(b, norm, position.column);
  constexpr int kAhead = kOfWindow == 0 ? 2 : 1;
  auto rows = rows_of<kAhead, false>(position, [&](Place place) { return gradient.load(place, true); });
  rows.begin();
  __shared__ Shared<A, kMaxTileX * kWidth> means;
  const Global<const double> statistics(norm.statistics, 2 * plan.channels);
  position.for_each_tile_channel(
      [&](int c, int64_t channel) { means.store(c, static_cast<A>(statistics.load(channel))); });
  __syncthreads();
  A mean[kWidth], sum[kWidth], dot[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] = dot[k] = 0;
  if (position.inside) position.for_each_column([&](int k, int channel) { mean[k] = means.load(channel); });
  rows.for_each([&](Place, bool is_own, const Loaded& loaded) {
    if (!is_own) return;
    gradient.for_each(loaded, true, mean, [&](int k, T masked, A centered) {
      const A g = widen(masked);
      sum[k] += g;
      dot[k] += g * centered;
    });
  });

  __shared__ Shared<A, kMaxThreads * kWidth> sums, dots;
  sums.store_run(position.thread * kWidth, sum);
  dots.store_run(position.thread * kWidth, dot);
  __syncthreads();

  const Group group = position.group();
  const Partials<A> partials(plan, norm.scratch);
  position.for_each_channel(group, [&](int channel, int begin, int end) {
    const int64_t c = position.first_channel + channel;
    const Parts parts(plan, c);
    A block_sum = 0, block_dot = 0;
    position.for_each_value(group, begin, end, [&](int at, int) {
      block_sum += sums.load(at);
      block_dot += dots.load(at);
    });
    block_sum = group.sum(block_sum), block_dot = group.sum(block_dot);
    const int64_t part = parts.index(position.tile, position.split);
    if (!partials.hand_over(group, parts, part, block_sum, block_dot)) return;

    A channel_sum = 0, channel_dot = 0;
    partials.for_each_part(group, parts, true, [&](A, A part_sum, A part_dot) {
      channel_sum += part_sum;
      channel_dot += part_dot;
    });
    channel_sum = group.sum(channel_sum), channel_dot = group.sum(channel_dot);
    if (group.lane == 0) {
      finish_gradients<A>(plan, norm, b.training, c, static_cast<double>(channel_sum),
                          static_cast<double>(channel_dot));
    }
  });
}

template <typename T, int kWidth, int kOfWindow>
__global__ void __launch_bounds__(kMaxThreads, kResidentThreads / kMaxThreads)
    input_gradient(const __grid_constant__ Backward b) {
  using A = acc_t<T>;
  const Plan& plan = b.plan;
  const NormBackward& norm = norm_of(b);
  const Position<kWidth> position(plan, true, b.count);

  using Loaded = typename Gradient<T, kWidth, kOfWindow>::Loaded;
  const Gradient<T, kWidth, kOfWindow> gradient(b, norm, position.column);
  const bool projects = norm.projects(b.training) || norm.grad_means != nullptr;
  auto rows = rows_of<1, true>(position, [&](Place place) { return gradient.load(place, projects); });
  rows.begin();
  __shared__ Shared<A, kMaxTileX * kWidth> means, scales, offsets, slopes;
  const auto store_coefficients = [&](int c, A mean, A scale, A offset, A slope) {
    means.store(c, mean), scales.store(c, scale), offsets.store(c, offset), slopes.store(c, slope);
  };
  if (norm.projects(b.training)) {
    const Global<A> ready = coefficients_of<A>(plan, norm.scratch);
    position.for_each_tile_channel([&](int c, int64_t channel) {
      store_coefficients(c, ready.load(channel), ready.load(plan.channels + channel),
                         ready.load(2 * plan.channels + channel), ready.load(3 * plan.channels + channel));
    });
  } else {
    const Global<const double> statistics(norm.statistics, 2 * plan.channels),
        grad_means(norm.grad_means, 2 * plan.channels);
    position.for_each_tile_channel([&](int c, int64_t channel) {
      const auto coefficients = backward_coefficients<A>(norm, plan.channels, channel);
      Projection<A> given(0, 0, 0, 0);
      if (grad_means) {
        const double dropped = statistics.load(channel) - static_cast<double>(coefficients.mean);
        given = Projection<A>(dropped, statistics.load(plan.channels + channel), grad_means.load(channel),
                              grad_means.load(plan.channels + channel));
      }
      store_coefficients(c, coefficients.mean, coefficients.scale, given.offset, given.slope);
    });
  }
  __syncthreads();
  A mean[kWidth], scale[kWidth], offset[kWidth], slope[kWidth];
  if (position.inside) {
    position.for_each_column([&](int k, int channel) {
      mean[k] = means.load(channel), scale[k] = scales.load(channel);
      offset[k] = offsets.load(channel), slope[k] = slopes.load(channel);
    });
  }

  const int64_t size = plan.rows * plan.columns;
  const Global<T> grad_input(static_cast<T*>(norm.grad_input), size),
      grad_residual(static_cast<T*>(b.grad_residual), size);
  rows.for_each([&](Place place, bool is_own, const Loaded& loaded) {
    if (!is_own) return;
    Vector<T, kWidth> dx, dr;
    gradient.for_each(loaded, projects, mean, [&](int k, T masked, A centered) {
      A g = widen(masked);
      if (projects) g = g - offset[k] - centered * slope[k];
      dx[k] = narrow<T>(g * scale[k]);
      dr[k] = masked;
    });
    if (grad_input) grad_input.template store_vector<kWidth>(place.element, dx);
    if (kOfWindow == 0 && grad_residual) grad_residual.template store_vector<kWidth>(place.element, dr);
  });
}

// ---- Launchers ----

// Calls f(T{}, std::integral_constant<int, width>) with the type and width of an access.
template <typename F>
void with_type_and_width(ElementType type, int width, F f) {
  with_type(type, [&](auto element) {
    constexpr int kFull = 16 / sizeof(element);
    if (width == kFull) {
      f(element, std::integral_constant<int, kFull>{});
    } else {
      f(element, std::integral_constant<int, 1>{});
    }
  });
}

dim3 block_of(const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
}

// With those of its batch norms only that are needed.
template <typename F>
Backward filtered(const Backward& b, F is_needed) {
  Backward result = b;
  result.count =
      static_cast<unsigned>(std::copy_if(b.norms, b.norms + b.count, result.norms, is_needed) - result.norms);
  return result;
}

}  // namespace

unsigned* semaphores(size_t stream) {
  void* address;
  check(cudaGetSymbolAddress(&address, all_semaphores), "cudaGetSymbolAddress");
  return static_cast<unsigned*>(address) + stream * kSemaphores;
}

void forward(const Forward& f, cudaStream_t stream) {
  if (f.plan.rows == 0 || f.plan.columns == 0) {
    if (f.training) launch(count_batches, 1, dim3(1), stream, f);
    return;
  }
  if (f.training && !f.given) {
    with_type_and_width(f.type, f.plan.width, [&](auto element, auto width) {
      launch(statistics<decltype(element), width.value>, f.count * f.plan.blocks(), block_of(f.plan), stream, f);
    });
  }
  if (f.output == nullptr) return;
  with_type_and_width(f.type, f.output_plan.width, [&](auto element, auto width) {
    using T = decltype(element);
    const auto second = f.pools                 ? normalize<T, width.value, Residual::none, true>
                        : f.residual == nullptr ? normalize<T, width.value, Residual::none, false>
                        : f.count == 1          ? normalize<T, width.value, Residual::as_it_is, false>
                                                : normalize<T, width.value, Residual::normalized, false>;
    launch(second, f.output_plan.blocks(), block_of(f.output_plan), stream, f);
  });
}

void backward(const Backward& b, cudaStream_t stream) {
  const Backward sums = filtered(b, [](const NormBackward& norm) { return norm.scratch.partials != nullptr; });
  const Backward gradients =
      filtered(b, [&](const NormBackward& norm) { return norm.grad_input != nullptr || b.grad_residual != nullptr; });
  with_type_and_width(b.type, b.plan.width, [&](auto element, auto width) {
    using T = decltype(element);
    const auto launch_both = [&](auto of_window) {
      const auto first = gradient_sums<T, width.value, of_window.value>;
      const auto second = input_gradient<T, width.value, of_window.value>;
      launch(first, sums.count * b.plan.blocks(), block_of(b.plan), stream, sums);
      launch(second, gradients.count * b.plan.blocks(), block_of(b.plan), stream, gradients);
    };
    if (!b.pools) {
      launch_both(std::integral_constant<int, 0>{});
    } else if (b.pooling.input.pixel > 1) {
      launch_both(width);
    } else {
      launch_both(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace resnet_fused::cuda
