// The CPU kernels, compiled once per instruction set: CPU_CAPABILITY is the namespace, CPU_VECTOR_BYTES the size of a
// register. Loops over vectors of GCC's and clang's vector extension. Everything compiled wide is in this file and
// includes nothing: a header's inline function compiled with AVX-512 may be the copy that the linker keeps for the
// whole process, and then crashes CPUs without it.

#define INLINED __attribute__((always_inline))  // a vector that is passed to a call goes through memory
#define ALWAYS_INLINE inline INLINED

namespace resnet_fused::CPU_CAPABILITY {
namespace {

// ---- Vectors ----

enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

// Arithmetic is in the accumulation type, A. A vector has at least eight lanes, a byte of the mask: several registers
// where these are narrow.
template <typename A>
struct Lanes {
  static constexpr int kCount = CPU_VECTOR_BYTES / sizeof(A) < 8 ? 8 : CPU_VECTOR_BYTES / sizeof(A);
  typedef A vector __attribute__((vector_size(kCount * sizeof(A)), may_alias));
};

template <int count>
struct Words {  // of as many lanes
  typedef uint32_t vector __attribute__((vector_size(count * 4)));
  typedef uint16_t halves __attribute__((vector_size(count * 2)));
  typedef uint8_t bytes __attribute__((vector_size(count)));
};

// How elements are stored, and the largest value that is stored as 0.
template <typename T>
struct Traits {
  using A = T;
  using stored = typename Lanes<A>::vector;
  static constexpr A kVanishing = 0;
  static ALWAYS_INLINE stored widen(stored value) { return value; }
  static ALWAYS_INLINE stored narrow(stored value) { return value; }
};

struct HalfTraits {
  using A = float;
  using vector = Lanes<A>::vector;
  using words = Words<Lanes<A>::kCount>::vector;
  using stored = Words<Lanes<A>::kCount>::halves;

  // GCC 12 takes up to eight instructions for each of them.
#if CPU_VECTOR_BYTES == 64
  static ALWAYS_INLINE words to_words(stored value) { return (words)_mm512_cvtepu16_epi32((__m256i)value); }
  static ALWAYS_INLINE stored to_halves(words value) { return (stored)_mm512_cvtepi32_epi16((__m512i)value); }
#elif CPU_VECTOR_BYTES == 32
  static ALWAYS_INLINE words to_words(stored value) { return (words)_mm256_cvtepu16_epi32((__m128i)value); }
  static ALWAYS_INLINE stored to_halves(words value) {
    const __m256i packed = _mm256_packus_epi32((__m256i)value, (__m256i)value);
    return (stored)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
  }
#else
  static ALWAYS_INLINE words to_words(stored value) { return __builtin_convertvector(value, words); }
  static ALWAYS_INLINE stored to_halves(words value) { return __builtin_convertvector(value, stored); }
#endif
};

// Both round to nearest, ties to even, as PyTorch does.
template <>
struct Traits<BFloat16> : HalfTraits {
  static constexpr float kVanishing = 0x1p-134f;
  static ALWAYS_INLINE vector widen(stored value) { return (vector)(to_words(value) << 16); }
  static ALWAYS_INLINE stored narrow(vector value) {
    const words bits = (words)value, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return to_halves(rounded | ((words)(value != value) >> 16));  // any NaN, of ones
  }
};

template <>
struct Traits<Float16> : HalfTraits {
  static constexpr float kVanishing = 0x1p-25f;
#if CPU_VECTOR_BYTES == 64
  static ALWAYS_INLINE vector widen(stored value) { return (vector)_mm512_cvtph_ps((__m256i)value); }
  static ALWAYS_INLINE stored narrow(vector value) { return (stored)_mm512_cvtps_ph((__m512)value, 0); }
#elif CPU_VECTOR_BYTES == 32
  static ALWAYS_INLINE vector widen(stored value) { return (vector)_mm256_cvtph_ps((__m128i)value); }
  static ALWAYS_INLINE stored narrow(vector value) { return (stored)_mm256_cvtps_ph((__m256)value, 0); }
#else
  static ALWAYS_INLINE vector widen(stored value) {
    const words half = to_words(value), magnitude = (half & 0x7fffu) << 13;
    // 0.5 has the spacing of a float16 subnormal, 2^-24. Both operands are normal numbers, as eager keeps subnormals of
    // float16 even where torch.set_flush_denormal takes those of float32 for 0.
    const words subnormal = (words)((vector)((half & 0x3ffu) | 0x3f000000u) - 0.5f);
    words bits = magnitude < 0x00800000u ? subnormal : magnitude + (112u << 23);
    bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;  // inf and NaN keep the mantissa
    return (vector)(bits | (half & 0x8000u) << 16);
  }
  static ALWAYS_INLINE stored narrow(vector value) {
    const words bits = (words)value, magnitude = bits & 0x7fffffffu;
    const words rebiased = magnitude - (112u << 23);
    const words normal = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
    const words subnormal = (words)((vector)magnitude + 0.5f) - 0x3f000000u;  // the addition does the rounding
    words result = magnitude < 0x38800000u ? subnormal : normal;              // < 2^-14
    result = magnitude >= 0x477ff000u ? bits * 0u + 0x7c00u : result;         // >= 65520: infinity
    result = magnitude > 0x7f800000u ? bits * 0u + 0x7e00u : result;          // NaN
    return to_halves(result | (bits >> 16 & 0x8000u));
  }
#endif
};

template <typename T>
using acc_t = typename Traits<T>::A;
template <typename T>
using vector_t = typename Lanes<acc_t<T>>::vector;
template <typename T>
constexpr int64_t kLanes = Lanes<acc_t<T>>::kCount;

// The lanes of a vector that are there: all; or the first ones, at the end of a row.
template <int64_t lanes>
struct Whole {
  static constexpr int64_t count = lanes;
};
struct Part {
  int64_t count;
};

template <typename V, int64_t lanes>
ALWAYS_INLINE V only(V value, Whole<lanes>) {
  return value;
}
template <typename V>
ALWAYS_INLINE V only(V value, Part part) {
  for (int64_t i = part.count; i < static_cast<int64_t>(sizeof(V) / sizeof(value[0])); ++i) value[i] = 0;
  return value;
}

// The other lanes are 0.
template <typename T, typename Extent>
ALWAYS_INLINE vector_t<T> load(const T* elements, Extent extent) {
  typename Traits<T>::stored stored{};
  __builtin_memcpy(&stored, elements, extent.count * sizeof(T));
  return Traits<T>::widen(stored);
}

// Past the caches, where the address allows: lines written whole are not read first.
template <typename S>
ALWAYS_INLINE void stream(void* target, S value) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(target);
#if CPU_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 64) {
    if (address % 64 == 0) return _mm512_stream_si512(static_cast<__m512i*>(target), (__m512i)value);
  }
#endif
#if CPU_VECTOR_BYTES >= 32
  if constexpr (sizeof(S) == 32) {
    if (address % 32 == 0) return _mm256_stream_si256(static_cast<__m256i*>(target), (__m256i)value);
  }
#endif
#if defined(__SSE2__)
  if (address % 16 == 0) {
    __m128i parts[sizeof(S) / 16];
    __builtin_memcpy(parts, &value, sizeof(S));
    for (size_t i = 0; i < sizeof(S) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(target) + i, parts[i]);
    return;
  }
#endif
  __builtin_memcpy(target, &value, sizeof(S));
}

// For other threads, orders what was streamed before what follows.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T, typename Extent>
ALWAYS_INLINE void store(T* elements, vector_t<T> value, Extent extent, bool streams) {
  const typename Traits<T>::stored stored = Traits<T>::narrow(value);
  if (streams && extent.count == kLanes<T>) {
    stream(elements, stored);
  } else {
    __builtin_memcpy(elements, &stored, extent.count * sizeof(T));
  }
}

// ---- The mask: a bit a lane ----

// Where the ReLU passes a value, once stored: !(value <= largest).
template <typename V, typename A>
ALWAYS_INLINE unsigned passed(V value, A largest) {
#if CPU_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(largest), _CMP_NLE_UQ);
  if constexpr (sizeof(A) == 8) return _mm512_cmp_pd_mask((__m512d)value, _mm512_set1_pd(largest), _CMP_NLE_UQ);
#elif CPU_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_set1_ps(largest), _CMP_NLE_UQ));
  }
#endif
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(A); ++i) bits |= static_cast<unsigned>(!(value[i] <= largest)) << i;
  return bits;
}

template <typename Extent>
ALWAYS_INLINE unsigned load_bits(const uint8_t* mask, Extent extent) {
  unsigned bits = 0;
  __builtin_memcpy(&bits, mask, (extent.count + 7) / 8);
  return bits;
}

// A select, not a product, so that a NaN gradient where the output is <= 0 gives 0.
template <typename V>
ALWAYS_INLINE V select(unsigned bits, V value) {
#if CPU_VECTOR_BYTES == 64
  if constexpr (sizeof(value[0]) == 4) return (V)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)value);
  if constexpr (sizeof(value[0]) == 8) return (V)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)value);
#else
  using comparison = decltype(value < value);
  comparison lane{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(value[0]); ++i) lane[i] = 1 << i;
  return ((lane * 0 + static_cast<int>(bits)) & lane) != 0 ? value : V{};
#endif
}

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
