// The CPU kernels, compiled once per instruction set: CPU_CAPABILITY is the namespace, CPU_VECTOR_BYTES the size of a
// register. Everything compiled wide is in this file and its parts, *_impl.h, and includes nothing else: a header's
// inline function compiled with AVX-512 may be the copy that the linker keeps for the whole process, and then crashes
// CPUs without it.

namespace resnet_fused::CPU_CAPABILITY {
namespace {

#include "vectors_impl.h"

// ---- Coefficients ----

// A value for each column of a row.
template <typename T>
class Columns {
 public:
  ALWAYS_INLINE vector_t<T>& at(int64_t j) { return *reinterpret_cast<vector_t<T>*>(values_ + j); }
  ALWAYS_INLINE vector_t<T> at(int64_t j) const { return *reinterpret_cast<const vector_t<T>*>(values_ + j); }
  ALWAYS_INLINE acc_t<T>& operator[](int64_t j) { return values_[j]; }
  ALWAYS_INLINE acc_t<T> operator[](int64_t j) const { return values_[j]; }

  void clear(int64_t width) {
    for (int64_t j = 0; j < width; j += kLanes<T>) at(j) = vector_t<T>{};
  }

  // Each column gets its channel's value.
  void fill(const Plan& plan, int64_t block, const double* per_channel) {
    const int64_t begin = plan.block_begin(block), end = plan.block_end(block);
    int64_t j = 0;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.row_inner == 1) {
        for (int64_t c = begin; c < end; ++c) values_[j + c - begin] = static_cast<acc_t<T>>(per_channel[c]);
        j += end - begin;
      } else {
        for (int64_t c = begin; c < end; ++c) {
          const acc_t<T> value = static_cast<acc_t<T>>(per_channel[c]);
          for (int64_t k = 0; k < plan.row_inner; ++k) values_[j++] = value;
        }
      }
    }
    for (; j % kLanes<T> != 0; ++j) values_[j] = 0;
  }

  // Of columns [begin, end).
  ALWAYS_INLINE double sum(int64_t begin, int64_t end) const {
    if (end - begin == 1) return static_cast<double>(values_[begin]);
    double result = 0;
    int64_t j = begin;
    if (j + kLanes<T> <= end) {
      vector_t<T> total{};
      for (; j + kLanes<T> <= end; j += kLanes<T>) total += load(values_ + j, Whole<kLanes<T>>{});
      acc_t<T> lanes[kLanes<T>];
      __builtin_memcpy(lanes, &total, sizeof(total));
      for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {  // one after the other they took 64 cycles
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      }
      result = static_cast<double>(lanes[0]);
    }
    for (; j < end; ++j) result += static_cast<double>(values_[j]);
    return result;
  }

 private:
  // A cache line more than a power of two: at distances of a page arrays would push each other out of the cache.
  alignas(64) acc_t<T> values_[kMaxWidth + 64 / sizeof(acc_t<T>)];
};

template <typename T>
struct Values {
  Columns<T> mean, scale, shift, slope, offset;
};

template <typename T>
void fill(Values<T>& values, const Plan& plan, int64_t block, const Coefficients& coefficients) {
  const auto fill = [&](Columns<T>& columns, const double* v) {
    if (v != nullptr) columns.fill(plan, block, v);
  };
  fill(values.mean, coefficients.mean), fill(values.scale, coefficients.scale), fill(values.shift, coefficients.shift);
  fill(values.slope, coefficients.slope), fill(values.offset, coefficients.offset);
}

// ---- Walks ----

constexpr int kVectors = 4;  // adjacent ones, at a time
constexpr int kRows = 4;     // for which accumulators are loaded once

template <int n>
struct Number {
  static constexpr int value = n;
};

// Vectors that a kernel takes at a time: where the first one is, and how far apart they, or rows, are.
struct Place {
  int64_t column, at, mask;  // of the first: within its row, in the tensor, and its byte of the mask
  int64_t columns, stride, mask_stride;

  ALWAYS_INLINE int64_t column_of(int i) const { return column + i * columns; }
  ALWAYS_INLINE int64_t element(int i) const { return at + i * stride; }
  ALWAYS_INLINE int64_t byte(int i) const { return mask + i * mask_stride; }
};

// Calls f(Number<vectors>, Place, Whole or Part) for the vectors of a row.
template <int64_t lanes, typename F>
ALWAYS_INLINE void for_each_of_row(Place row, int64_t width, F f) {
  const auto place = [&](int64_t j) INLINED {
    return Place{j * row.columns, row.at + j, row.mask + j / 8, lanes * row.columns, lanes, lanes / 8};
  };
  int64_t j = 0;
  for (; j + kVectors * lanes <= width; j += kVectors * lanes) f(Number<kVectors>{}, place(j), Whole<lanes>{});
  for (; j + lanes <= width; j += lanes) f(Number<1>{}, place(j), Whole<lanes>{});
  if (j < width) f(Number<1>{}, place(j), Part{width - j});
}

// Calls f(Place, rows, width) for the rows of a chunk: those of full width, then, if any, the one that is not.
template <typename F>
ALWAYS_INLINE void for_each_slab(const Plan& plan, int64_t block, const Plan::Chunk& chunk, F f) {
  const int64_t first = plan.block_begin(block), entry = (plan.block_end(block) - first) * plan.row_inner;
  const auto slab = [&](int64_t o, int64_t i, int64_t next_o, int64_t next_i, int64_t rows, int64_t width) INLINED {
    const int64_t at = plan.offset(o, first, i), mask = plan.mask_offset(o, first, i);
    const int64_t stride = plan.offset(next_o, first, next_i) - at;
    const int64_t mask_stride = plan.mask_offset(next_o, first, next_i) - mask;
    const Place place{0, at, mask, plan.runs ? 0 : 1, stride, mask_stride};
    if (rows > 0 && width > 0) f(place, rows, width);
  };
  if (plan.runs) {
    const int64_t rows = chunk.run() / plan.row_inner, rest = chunk.inner_begin + rows * plan.row_inner;
    for (int64_t o = chunk.outer_begin; o < chunk.outer_end; ++o) {
      slab(o, chunk.inner_begin, o, chunk.inner_begin + plan.row_inner, rows, entry);
      slab(o, rest, o, rest, 1, chunk.inner_end - rest);
    }
  } else {
    const int64_t rows = (chunk.outer_end - chunk.outer_begin) / plan.row_outer;
    const int64_t rest = chunk.outer_begin + rows * plan.row_outer;
    slab(chunk.outer_begin, 0, chunk.outer_begin + plan.row_outer, 0, rows, plan.row_outer * entry);
    slab(rest, 0, rest, 0, 1, (chunk.outer_end - rest) * entry);
  }
}

// Calls f(Number<vectors>, Place, Whole or Part, values...) for the vectors of the work, with the values of each of the
// coefficients; chunks in reverse: the last one read is still cached.
template <typename T, typename F, typename... C>
ALWAYS_INLINE void for_each_vector(const Plan& plan, Work work, F f, const C&... coefficients) {
  Values<T> values[sizeof...(coefficients)];
  int next = 0;
  (fill(values[next++], plan, work.block, coefficients), ...);
  for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
    for_each_slab(plan, work.block, plan.chunk(index), [&](Place row, int64_t rows, int64_t width) INLINED {
      if (plan.runs) width *= rows, rows = 1;  // adjacent, and every column has the same values
      for (; rows > 0; --rows, row.at += row.stride, row.mask += row.mask_stride) {
        for_each_of_row<kLanes<T>>(row, width, [&](auto n, Place place, auto extent) INLINED {
          if constexpr (sizeof...(coefficients) == 1) f(n, place, extent, values[0]);
          if constexpr (sizeof...(coefficients) == 2) f(n, place, extent, values[0], values[1]);
        });
      }
    });
  }
}

template <typename T>
struct Pair {
  vector_t<T> first, second;
};

// The plan by which columns are summed: a row of a run is kVectors.
template <typename T>
Plan of_vectors(Plan plan) {
  if (plan.runs) plan.row_inner = kVectors * kLanes<T>;
  return plan;
}

// Two sums of each column of a chunk, of the pairs that f(element, byte of the mask, Whole or Part, of_column) gives.
// Of rows of kVectors all are taken at once, in the order of memory: in channels_last a fifth less time than by kRows.
template <typename T, typename F>
ALWAYS_INLINE void sum_columns(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const Columns<T>& of_columns,
                               Columns<T>& first, Columns<T>& second, F f) {
  constexpr int64_t lanes = kLanes<T>;
  first.clear(plan.width(block)), second.clear(plan.width(block));
  for_each_slab(plan, block, chunk, [&](Place row, int64_t rows, int64_t width) INLINED {
    const int64_t stride = row.stride, mask_stride = row.mask_stride;
    const int64_t at_a_time = width == kVectors * lanes ? rows : kRows;
    row.columns = 1;  // of a run, too, whose columns are summed apart
    for (; rows > 0; rows -= at_a_time, row.at += at_a_time * stride, row.mask += at_a_time * mask_stride) {
      const int64_t count = rows < at_a_time ? rows : at_a_time;
      for_each_of_row<lanes>(row, width, [&](auto n, Place place, auto extent) INLINED {
        vector_t<T> of_column[n.value], firsts[n.value]{}, seconds[n.value]{};
        for (int i = 0; i < n.value; ++i) of_column[i] = of_columns.at(place.column_of(i));
        for (int64_t k = 0; k < count; ++k, place.at += stride, place.mask += mask_stride) {
          for (int i = 0; i < n.value; ++i) {
            const Pair<T> pair = f(place.element(i), place.byte(i), extent, of_column[i]);
            firsts[i] += pair.first, seconds[i] += pair.second;
          }
        }
        for (int i = 0; i < n.value; ++i) {
          first.at(place.column_of(i)) += firsts[i], second.at(place.column_of(i)) += seconds[i];
        }
      });
    }
  });
}

// Calls f(channel, begin, end) for the columns of each channel of a block, those of one outer entry.
template <typename F>
ALWAYS_INLINE void for_each_channel(const Plan& plan, int64_t block, F f) {
  int64_t j = 0;
  for (int64_t o = 0; o < plan.row_outer; ++o) {
    for (int64_t c = plan.block_begin(block); c < plan.block_end(block); ++c, j += plan.row_inner) {
      f(c, j, j + plan.row_inner);
    }
  }
}

// ---- Forward ----

// Deviations are from an origin near the mean: sum(x^2) - sum(x)^2 / n on raw values would lose everything at mean 1e4,
// std 1e-2. The origin of a column is the mean of a 64th of its values or more; the mean of a part p of the values is
// at most std * sqrt((1 - p) / p) off, so that even adversarial data cost at most 6 bits.
template <typename T>
void moments_of_chunk(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const T* x, Moments* result) {
  Columns<T> origins, sums, squares;
  Plan::Chunk sample = chunk;
  const auto part = [](int64_t extent, int64_t of_row) {  // a 64th, in rows
    const int64_t rows = (extent + 64 * of_row - 1) / (64 * of_row);
    return rows * of_row < extent ? rows * of_row : extent;
  };
  sample.outer_end = chunk.outer_begin + part(chunk.outer_end - chunk.outer_begin, plan.row_outer);
  const int64_t sampled = (sample.outer_end - sample.outer_begin + plan.row_outer - 1) / plan.row_outer;
  if (plan.runs) sample.inner_end = chunk.inner_begin + part(chunk.run(), plan.row_inner);
  const acc_t<T> share = 1 / static_cast<acc_t<T>>(sampled * ((sample.run() + plan.row_inner - 1) / plan.row_inner));
  const auto shares = [=](int64_t at, int64_t, auto extent, vector_t<T>)
                          INLINED { return Pair<T>{load(x + at, extent) * share, {}}; };
  sum_columns<T>(plan, block, sample, origins, origins, sums, shares);
  for (int64_t j = 0; j < plan.width(block); j += kLanes<T>) {  // an infinite origin would turn infinities into NaNs
    const vector_t<T> origin = origins.at(j);
    origins.at(j) = origin - origin == 0 ? origin : vector_t<T>{};
  }
  const auto deviations = [=](int64_t at, int64_t, auto extent, vector_t<T> origin) INLINED {
    const vector_t<T> deviation = only(load(x + at, extent) - origin, extent);
    return Pair<T>{deviation, deviation * deviation};
  };
  sum_columns<T>(plan, block, chunk, origins, sums, squares, deviations);

  const int64_t first = plan.block_begin(block), width = plan.width(block);
  if (plan.row_inner == 1 && plan.row_outer == 1) {
    for (int64_t j = 0; j < width; ++j) {
      result[first + j] = {static_cast<double>(origins[j]), static_cast<double>(sums[j]),
                           static_cast<double>(squares[j])};
    }
    return;
  }
  // The sums of a channel's columns are shifted to one origin: their mean, as any one of them may be an outlier.
  for (int64_t c = first, j = 0; c < plan.block_end(block); ++c, j += plan.row_inner) {
    const double mean = origins.sum(j, j + plan.row_inner) / static_cast<double>(plan.row_inner);
    result[c] = {static_cast<double>(static_cast<acc_t<T>>(mean)), 0, 0};
  }
  const int64_t outer = chunk.outer_end - chunk.outer_begin, rows = chunk.run() / plan.row_inner;
  const int64_t rest = chunk.run() % plan.row_inner;
  const int64_t entry = width / plan.row_outer;
  for_each_channel(plan, block, [&](int64_t c, int64_t begin, int64_t end) {
    Moments& channel = result[c];
    const acc_t<T> origin = static_cast<acc_t<T>>(channel.origin);
    const auto shift = [&](int64_t from, int64_t to, int64_t values) {
      const acc_t<T> count = static_cast<acc_t<T>>(values);
      for (int64_t j = from; j < to; ++j) {
        const acc_t<T> by = origins[j] - origin, sum = sums[j];
        sums[j] = sum + count * by;
        squares[j] += by * (2 * sum + count * by);
      }
    };
    if (plan.runs) {
      shift(begin, begin + rest, outer * (rows + 1)), shift(begin + rest, end, outer * rows);
    } else {
      shift(begin, end, (outer - begin / entry + plan.row_outer - 1) / plan.row_outer);
    }
    channel.sum += sums.sum(begin, end), channel.square += squares.sum(begin, end);
  });
}

template <typename T>
void moments(const Plan& of_tensor, Work work, const void* input, Moments* partial) {
  const Plan plan = of_vectors<T>(of_tensor);
  const T* x = static_cast<const T*>(input);
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    moments_of_chunk(plan, work.block, plan.chunk(index), x, partial + index * plan.channels);
  }
}

enum class Residual { none, as_it_is, normalized };

template <typename V, typename A>
ALWAYS_INLINE A normalized(A input, const V& values, int64_t column) {
  return (input - values.mean.at(column)) * values.scale.at(column) + values.shift.at(column);
}

template <typename T, Residual kResidual, typename... C>
void normalize_with(const Plan& plan, Work work, const T* x, const T* r, T* y, uint8_t* mask,
                    const C&... coefficients) {
  using V = vector_t<T>;
  const bool streams = plan.streams;
  const auto body = [=](auto n, Place place, auto extent, const auto& values, const auto&... of_residual) INLINED {
    V input[n.value], residual[n.value];
    for (int i = 0; i < n.value; ++i) {
      input[i] = load(x + place.element(i), extent);
      if (kResidual != Residual::none) residual[i] = load(r + place.element(i), extent);
    }
    uint64_t bits = 0;
    for (int i = 0; i < n.value; ++i) {
      const int64_t j = place.column_of(i);
      V value = normalized(input[i], values, j);
      if constexpr (kResidual == Residual::as_it_is) value += residual[i];
      if constexpr (kResidual == Residual::normalized) value += normalized(residual[i], of_residual..., j);
      store(y + place.element(i), V{} > value ? V{} : value, extent, streams);  // NaN passes
      bits |= static_cast<uint64_t>(passed(value, Traits<T>::kVanishing)) << (i * kLanes<T>);
    }
    // In one: beside stores of vectors, twice as many, they took a fifth of the time.
    if (mask != nullptr) __builtin_memcpy(mask + place.mask, &bits, (n.value * extent.count + 7) / 8);
  };
  for_each_vector<T>(plan, work, body, coefficients...);
  if (streams) end_streams();
}

template <typename T>
void normalize(const Plan& plan, Work work, const Coefficients& coefficients, const void* input, const void* residual,
               const Coefficients* of_residual, void* output, uint8_t* mask) {
  const T *x = static_cast<const T*>(input), *r = static_cast<const T*>(residual);
  T* y = static_cast<T*>(output);
  if (of_residual != nullptr) {
    normalize_with<T, Residual::normalized>(plan, work, x, r, y, mask, coefficients, *of_residual);
  } else if (r != nullptr) {
    normalize_with<T, Residual::as_it_is>(plan, work, x, r, y, mask, coefficients);
  } else {
    normalize_with<T, Residual::none>(plan, work, x, r, y, mask, coefficients);
  }
}

// ---- Backward ----

template <typename T, typename Extent>
ALWAYS_INLINE vector_t<T> masked(const Gradient& gradient, int64_t at, int64_t mask, Extent extent) {
  const T* grad_output = static_cast<const T*>(gradient.grad_output);
  return select(load_bits(gradient.mask + mask, extent), load(grad_output + at, extent));
}

template <typename T>
void gradient_sums(const Plan& of_tensor, Work work, const Coefficients& coefficients, const Gradient& gradient,
                   const void* input, Sums* partial) {
  const Plan plan = of_vectors<T>(of_tensor);
  const T* x = static_cast<const T*>(input);
  Columns<T> means, sums, dots;
  means.fill(plan, work.block, coefficients.mean);
  const auto pairs = [=](int64_t at, int64_t mask, auto extent, vector_t<T> mean) INLINED {
    const vector_t<T> g = masked<T>(gradient, at, mask, extent);
    return Pair<T>{g, g * only(load(x + at, extent) - mean, extent)};
  };
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    sum_columns<T>(plan, work.block, plan.chunk(index), means, sums, dots, pairs);
    Sums* result = partial + index * plan.channels;
    for (int64_t c = plan.block_begin(work.block); c < plan.block_end(work.block); ++c) result[c] = {0, 0};
    for_each_channel(plan, work.block, [&](int64_t c, int64_t begin, int64_t end) {
      result[c].first += sums.sum(begin, end), result[c].second += dots.sum(begin, end);
    });
  }
}

// projects: out of what batch statistics take. A constant, as else not every vector's sum is contracted alike.
template <typename T, bool projects>
void input_gradient_with(const Plan& plan, Work work, const Coefficients& coefficients, const Gradient& gradient,
                         const T* x, T* dx, T* dr) {
  using V = vector_t<T>;
  const bool streams = plan.streams;
  const auto body = [=](auto n, Place place, auto extent, const auto& values) INLINED {
    V g[n.value], centered[n.value];  // all is read before anything is written, which to the compiler might overlap
    for (int i = 0; i < n.value; ++i) {
      if (projects) centered[i] = load(x + place.element(i), extent) - values.mean.at(place.column_of(i));
      g[i] = masked<T>(gradient, place.element(i), place.byte(i), extent);
    }
    for (int i = 0; i < n.value; ++i) {
      const int64_t at = place.element(i), j = place.column_of(i);
      if (dr != nullptr) store(dr + at, g[i], extent, streams);
      if (dx == nullptr) continue;
      V value = g[i] * values.scale.at(j);
      if constexpr (projects) value += centered[i] * values.slope.at(j) + values.offset.at(j);
      store(dx + at, value, extent, streams);
    }
  };
  for_each_vector<T>(plan, work, body, coefficients);
  if (streams) end_streams();
}

template <typename T>
void input_gradient(const Plan& plan, Work work, const Coefficients& coefficients, const Gradient& gradient,
                    const void* input, void* grad_input, void* grad_residual) {
  const auto with = coefficients.slope != nullptr ? input_gradient_with<T, true> : input_gradient_with<T, false>;
  with(plan, work, coefficients, gradient, static_cast<const T*>(input), static_cast<T*>(grad_input),
       static_cast<T*>(grad_residual));
}

#include "max_pool_impl.h"

template <typename T>
constexpr Kernels kKernels = {moments<T>,        normalize<T>,          gradient_sums<T>,
                              input_gradient<T>, normalize_max_pool<T>, max_unpool<T>};

}  // namespace

const Kernels& kernels(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return kKernels<float>;
    case ElementType::float64:
      return kKernels<double>;
    case ElementType::bfloat16:
      return kKernels<BFloat16>;
    default:
      return kKernels<Float16>;
  }
}

}  // namespace resnet_fused::CPU_CAPABILITY
