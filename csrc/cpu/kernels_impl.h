// The CPU kernels: plain loops that the compiler vectorises, compiled once per instruction set, with CPU_CAPABILITY the
// namespace. Everything compiled wide is in this file and includes nothing: a header's inline function compiled with
// AVX-512 may be the copy that the linker keeps for the whole process, and then crashes CPUs without it.
//
// Nothing is contracted to fused multiply-adds (-ffp-contract=off): forward and backward must compute the same bits.

#define INLINED __attribute__((always_inline))  // GCC vectorises no loop with a call left in it, nor some inlined late
#define ALWAYS_INLINE inline INLINED

namespace resnet_fused::CPU_CAPABILITY {
namespace {

// ---- Element types ----

ALWAYS_INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
ALWAYS_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

// Loops step over words of kLanes elements: two of a half type share 32 bits, so that each is shifted or masked into
// place, where widening and narrowing single ones takes shuffles (to normalise bfloat16 with AVX2, 0.34 ns an element
// against 0.22). Sums are kept in acc_t; kVanishing is the largest value that is stored as 0.
template <typename T>
struct Traits {
  using acc_t = T;
  using word_t = T;
  static constexpr int kLanes = 1;
  static constexpr T kVanishing = 0;

  static ALWAYS_INLINE T load(T word, int) { return word; }
  static ALWAYS_INLINE T store(T value, int) { return value; }  // the other lanes are 0
  static ALWAYS_INLINE T only(T word, int) { return word; }     // one lane, in its place
  static ALWAYS_INLINE T join(T, T other) { return other; }     // words of different lanes
};

struct HalfTraits {
  using acc_t = float;
  using word_t = uint32_t;
  static constexpr int kLanes = 2;

  static ALWAYS_INLINE uint32_t only(uint32_t word, int lane) { return word & (lane == 0 ? 0xffffu : 0xffff0000u); }
  static ALWAYS_INLINE uint32_t join(uint32_t word, uint32_t other) { return word | other; }
};

// Both round to nearest, ties to even, as PyTorch does.
template <>
struct Traits<BFloat16> : HalfTraits {
  static constexpr float kVanishing = 0x1p-134f;

  static ALWAYS_INLINE float load(uint32_t word, int lane) {
    return as_float(lane == 0 ? word << 16 : word & 0xffff0000u);
  }
  static ALWAYS_INLINE uint32_t store(float value, int lane) {
    const uint32_t bits = as_bits(value), nan = 0u - static_cast<uint32_t>(value != value);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    const uint32_t result = (rounded & ~nan) | (nan & 0x7fc00000u);  // a conditional is vectorised as several
    return lane == 0 ? result >> 16 : result & 0xffff0000u;
  }
};

template <>
struct Traits<Float16> : HalfTraits {
  static constexpr float kVanishing = 0x1p-25f;

  static ALWAYS_INLINE float load(uint32_t word, int lane) {
    const uint32_t half = lane == 0 ? word : word >> 16, magnitude = (half & 0x7fffu) << 13;
    const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);                    // exact, subnormals included
    const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;  // inf and NaN keep the mantissa
    return as_float(bits | (half & 0x8000u) << 16);
  }
  static ALWAYS_INLINE uint32_t store(float value, int lane) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t rebiased = magnitude - (112u << 23);
    const uint32_t normal = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
    // 0.5 has the spacing of a float16 subnormal, 2^-24: the addition does the rounding.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // < 2^-14
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;            // >= 65520: infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;             // NaN
    return (result | (bits >> 16 & 0x8000u)) << (lane == 0 ? 0 : 16);
  }
};

template <typename T>
using acc_t = typename Traits<T>::acc_t;
template <typename T>
using word_t = typename Traits<T>::word_t;

// The first `lanes` elements of word `k`.
template <int lanes, typename T>
ALWAYS_INLINE word_t<T> read(const T* elements, int64_t k) {
  if constexpr (Traits<T>::kLanes == 1) {
    return elements[k];
  } else {
    word_t<T> word{};
    __builtin_memcpy(&word, elements + k * Traits<T>::kLanes, lanes * sizeof(T));
    return word;
  }
}
template <int lanes, typename T>
ALWAYS_INLINE void write(T* elements, int64_t k, word_t<T> word) {
  if constexpr (Traits<T>::kLanes == 1) {
    elements[k] = word;
  } else {
    __builtin_memcpy(elements + k * Traits<T>::kLanes, &word, lanes * sizeof(T));
  }
}

template <int n>
struct Number {
  static constexpr int value = n;
};

// Two sums over the words of a run or row: calls f(k, Number<lanes>, first, second) for word k, which is to add to
// both.
template <typename T, typename F>
ALWAYS_INLINE void sum_words(int64_t length, acc_t<T>& first, acc_t<T>& second, F f) {
  constexpr int kLanes = Traits<T>::kLanes;
  const int64_t words = length / kLanes;
  acc_t<T> a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t k = 0; k < words; ++k) f(k, Number<kLanes>{}, a, b);
  if (kLanes > 1 && length % kLanes > 0) f(words, Number<1>{}, a, b);
  first = a;
  second = b;
}

template <typename T, typename F>
ALWAYS_INLINE void for_each_word(int64_t length, F f) {
  constexpr int kLanes = Traits<T>::kLanes;
  const int64_t words = length / kLanes;
#pragma omp simd
  for (int64_t k = 0; k < words; ++k) f(k, Number<kLanes>{});
  if (kLanes > 1 && length % kLanes > 0) f(words, Number<1>{});
}

// ---- Coefficients ----

// One value for every element of a run, where a row has an array of columns: both give that of lane `lane` of word `k`.
template <typename A>
struct Constant {
  A value;
  ALWAYS_INLINE A at(int64_t, int) const { return value; }
};

// The coefficients of a run (Constant) or row (Columns).
template <typename V>
struct Values {
  V mean, scale, shift, offset, slope;
};

template <typename A>
inline Values<Constant<A>> values_of(const Coefficients& coefficients, int64_t channel) {
  const auto value = [&](const double* v) { return Constant<A>{v != nullptr ? static_cast<A>(v[channel]) : A{0}}; };
  return {value(coefficients.mean), value(coefficients.scale), value(coefficients.shift), value(coefficients.offset),
          value(coefficients.slope)};
}

// One value per column, lane by lane, so that adjacent words' are adjacent.
template <typename T>
class Columns {
 public:
  ALWAYS_INLINE acc_t<T>& at(int64_t k, int lane) { return values_[lane * kWords + k]; }
  ALWAYS_INLINE acc_t<T> at(int64_t k, int lane) const { return values_[lane * kWords + k]; }

  void clear() { __builtin_memset(values_, 0, sizeof(values_)); }

  // Each column gets its channel's value; per_channel starts at the block's first channel.
  template <typename S>
  void fill(const Plan& plan, int64_t block, const S* per_channel) {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    acc_t<T> row[kMaxWidth];
    acc_t<T>* column = row;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.inner == 1) {
        for (int64_t c = 0; c < group; ++c) column[c] = static_cast<acc_t<T>>(per_channel[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c, column += plan.inner) {
          const auto value = static_cast<acc_t<T>>(per_channel[c]);
          for (int64_t k = 0; k < plan.inner; ++k) column[k] = value;
        }
      }
    }
    for (int64_t k = 0; k * kLanes < column - row; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) at(k, lane) = row[k * kLanes + lane];
    }
  }

  // Adds each channel's columns to sums, in its type; it starts at the block's first channel.
  template <typename S>
  void add_to(const Plan& plan, int64_t block, S* sums) const {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    acc_t<T> row[kMaxWidth];
    for (int64_t k = 0; k * kLanes < plan.row_outer * group * plan.inner; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) row[k * kLanes + lane] = at(k, lane);
    }
    const acc_t<T>* column = row;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.inner == 1) {
#pragma omp simd
        for (int64_t c = 0; c < group; ++c) sums[c] += static_cast<S>(column[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c, column += plan.inner) {
          S sum = 0;
          for (int64_t k = 0; k < plan.inner; ++k) sum += static_cast<S>(column[k]);
          sums[c] += sum;
        }
      }
    }
  }

 private:
  static constexpr int kLanes = Traits<T>::kLanes;
  static constexpr int64_t kWords = kMaxWidth / kLanes;
  alignas(64) acc_t<T> values_[kMaxWidth];
};

template <typename T>
struct CoefficientColumns {
  Columns<T> mean, scale, shift, offset, slope;

  CoefficientColumns(const Plan& plan, int64_t block, const Coefficients& coefficients) {
    const int64_t first = plan.block_begin(block);
    mean.fill(plan, block, coefficients.mean + first);
    scale.fill(plan, block, coefficients.scale + first);
    shift.fill(plan, block, coefficients.shift + first);
    if (coefficients.slope == nullptr) return;
    offset.fill(plan, block, coefficients.offset + first);
    slope.fill(plan, block, coefficients.slope + first);
  }
};

// ---- Walks ----

// Calls f(channel, at, length) for each run of a chunk, in the order of memory.
template <typename F>
inline void for_each_run(const Plan& plan, int64_t block, const Plan::Chunk& chunk, F f) {
  for (int64_t o = chunk.outer_begin; o < chunk.outer_end; ++o) {
    for (int64_t c = plan.block_begin(block); c < plan.block_end(block); ++c) {
      f(c, plan.offset(o, c, chunk.inner_begin), chunk.run());
    }
  }
}

// Calls f(at, rows, stride, width) for the rows of a chunk: those of full width, then, if any, the one that is not.
template <typename F>
inline void for_each_slab(const Plan& plan, int64_t block, const Plan::Chunk& chunk, F f) {
  const int64_t length = chunk.outer_end - chunk.outer_begin;
  const int64_t rows = length / plan.row_outer, rest = length % plan.row_outer;
  const int64_t stride = plan.row_outer * plan.channels * plan.inner;
  const int64_t entry = (plan.block_end(block) - plan.block_begin(block)) * plan.inner;
  const int64_t at = plan.offset(chunk.outer_begin, plan.block_begin(block), 0);
  if (rows > 0) f(at, rows, stride, plan.row_outer * entry);
  if (rest > 0) f(at + rows * stride, int64_t{1}, stride, rest * entry);
}

// Calls f(at, length, values...) for each run or row of the work, with the values of each of the coefficients; chunks
// in reverse: the last one read is still cached.
template <typename T, typename F, typename... C>
inline void for_each_row(const Plan& plan, Work work, F f, const C&... coefficients) {
  if (plan.runs) {
    for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
      for_each_run(plan, work.block, plan.chunk(index), [&](int64_t channel, int64_t at, int64_t length) {
        f(at, length, values_of<acc_t<T>>(coefficients, channel)...);
      });
    }
  } else {
    const auto with_columns = [&](const auto&... columns) {
      for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
        for_each_slab(plan, work.block, plan.chunk(index),
                      [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
                        for (int64_t row = 0; row < rows; ++row) f(at + row * stride, width, columns...);
                      });
      }
    };
    with_columns(CoefficientColumns<T>(plan, work.block, coefficients)...);
  }
}

// Calls f(at, length) for the pieces of a run whose sums may be kept in the accumulation type.
constexpr int64_t kPiece = 2048;
template <typename F>
inline void for_each_piece(int64_t at, int64_t length, F f) {
  for (int64_t begin = 0; begin < length; begin += kPiece) {
    f(at + begin, length - begin < kPiece ? length - begin : kPiece);
  }
}

// Copies past the caches: lines written whole are not read first.
template <typename T>
inline void stream(T* target, const T* from, int64_t length) {
#if defined(__SSE2__)
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t aligned = (-reinterpret_cast<intptr_t>(target) & 15) / static_cast<int64_t>(sizeof(T));
  const int64_t head = aligned < length ? aligned : length, vectors = (length - head) / kVector;
  __builtin_memcpy(target, from, head * sizeof(T));
  target += head, from += head, length -= head;
  for (int64_t k = 0; k < vectors; ++k, target += kVector, from += kVector, length -= kVector) {
    _mm_stream_ps(reinterpret_cast<float*>(target), _mm_loadu_ps(reinterpret_cast<const float*>(from)));
  }
#endif
  __builtin_memcpy(target, from, length * sizeof(T));
}

// For other threads, orders what was streamed before what follows.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls f(at, length, target) for the pieces of a run or row, to write their outputs from target on.
template <typename T, typename F>
inline void write_pieces(bool streams, T* output, int64_t at, int64_t length, F f) {
  if (!streams) return f(at, length, output + at);
  alignas(64) T buffer[kPiece];
  for_each_piece(at, length, [&](int64_t begin, int64_t count) {
    f(begin, count, buffer);
    stream(output + begin, buffer, count);
  });
}

// ---- Forward ----

// Deviations are from an origin near the mean: sum(x^2) - sum(x)^2 / n on raw values would lose everything at mean 1e4,
// std 1e-2. The origin is the mean of 1/64 of the chunk or more; the mean of a part p of the values is at most
// std * sqrt((1 - p) / p) off, so that even adversarial data cost at most 6 bits.
template <typename A>
inline A origin_of(A mean) {
  return mean - mean == 0 ? mean : 0;  // an infinite origin would turn infinities into NaNs
}

template <typename T>
void moments_of_runs(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const T* input, Moments* result) {
  using A = acc_t<T>;
  const int64_t part = (chunk.count() + 63) / 64, least = part > 16 ? part : 16;
  const int64_t sampled = least < chunk.run() ? least : chunk.run();
  const A weight = 1 / static_cast<A>(sampled);
  int64_t started = plan.block_begin(block);  // channels whose first run was met
  for_each_run(plan, block, chunk, [&](int64_t channel, int64_t at, int64_t length) {
    Moments& moments = result[channel];
    if (channel == started) {
      A sum, unused;
      sum_words<T>(sampled, sum, unused, [&](int64_t k, auto lanes, A& a, A&) INLINED {
        const auto x = read<lanes.value>(input + at, k);
        for (int lane = 0; lane < lanes.value; ++lane) a += Traits<T>::load(x, lane) * weight;
      });
      moments = {origin_of(sum), 0, 0};
      ++started;
    }
    const A origin = static_cast<A>(moments.origin);
    for_each_piece(at, length, [&](int64_t begin, int64_t count) {
      A sum, square;
      sum_words<T>(count, sum, square, [&](int64_t k, auto lanes, A& a, A& b) INLINED {
        const auto x = read<lanes.value>(input + begin, k);
        for (int lane = 0; lane < lanes.value; ++lane) {
          const A deviation = Traits<T>::load(x, lane) - origin;
          a += deviation;
          b += deviation * deviation;
        }
      });
      moments.sum += sum;
      moments.square += square;
    });
  });
}

// Four rows at a time, which saves three in four loads and stores of the column arrays, then one at a time.
template <typename F>
inline void for_each_rows(int64_t rows, F body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(row, Number<4>{});
  for (; row < rows; ++row) body(row, Number<1>{});
}

template <typename T>
void moments_of_rows(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const T* input, Moments* result) {
  using A = acc_t<T>;
  const int64_t first = plan.block_begin(block), group = plan.block_end(block) - first;
  Columns<T> origin, sums, squares;

  sums.clear();
  bool sampled = false;
  for_each_slab(plan, block, chunk, [&](int64_t at, int64_t, int64_t, int64_t slab_width) {
    if (sampled) return;
    sampled = true;  // the first row
    const A weight = static_cast<A>(group) / static_cast<A>(slab_width);
    for_each_word<T>(slab_width, [&](int64_t k, auto lanes) INLINED {
      const auto x = read<lanes.value>(input + at, k);
      for (int lane = 0; lane < lanes.value; ++lane) sums.at(k, lane) = Traits<T>::load(x, lane) * weight;
    });
  });
  A origins[kMaxWidth];
  for (int64_t c = 0; c < group; ++c) origins[c] = 0;
  sums.add_to(plan, block, origins);
  for (int64_t c = 0; c < group; ++c) origins[c] = origin_of(origins[c]);
  origin.fill(plan, block, origins);

  sums.clear(), squares.clear();
  for_each_slab(plan, block, chunk, [&](int64_t at, int64_t rows, int64_t stride, int64_t slab_width) {
    for_each_rows(rows, [&](int64_t row, auto n) {
      const T* x = input + at + row * stride;
      for_each_word<T>(slab_width, [&](int64_t k, auto lanes) INLINED {
        word_t<T> words[n.value];
#pragma GCC unroll 4
        for (int r = 0; r < n.value; ++r) words[r] = read<lanes.value>(x + r * stride, k);
        for (int lane = 0; lane < lanes.value; ++lane) {
          A sum = 0, square = 0;
#pragma GCC unroll 4
          for (int r = 0; r < n.value; ++r) {
            const A deviation = Traits<T>::load(words[r], lane) - origin.at(k, lane);
            sum += deviation;
            square += deviation * deviation;
          }
          sums.at(k, lane) += sum;
          squares.at(k, lane) += square;
        }
      });
    });
  });
  double channel_sums[kMaxWidth], channel_squares[kMaxWidth];
  for (int64_t c = 0; c < group; ++c) channel_sums[c] = channel_squares[c] = 0;
  sums.add_to(plan, block, channel_sums);
  squares.add_to(plan, block, channel_squares);
  for (int64_t c = 0; c < group; ++c) result[first + c] = {origins[c], channel_sums[c], channel_squares[c]};
}

template <typename T>
void moments(const Plan& plan, Work work, const void* input, Moments* partial) {
  const auto of_chunk = plan.runs ? moments_of_runs<T> : moments_of_rows<T>;
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    of_chunk(plan, work.block, plan.chunk(index), static_cast<const T*>(input), partial + index * plan.channels);
  }
}

template <typename T, typename V>
ALWAYS_INLINE acc_t<T> normalized(word_t<T> word, int64_t k, int lane, const V& values) {
  return (Traits<T>::load(word, lane) - values.mean.at(k, lane)) * values.scale.at(k, lane) + values.shift.at(k, lane);
}

enum class Residual { none, as_it_is, normalized };

// residual_values: of a residual that is normalised.
template <typename T, Residual kResidual, typename V>
void normalize_row(int64_t length, const V& values, const T* input, const V& residual_values, const T* residual,
                   T* output) {
  for_each_word<T>(length, [&](int64_t k, auto lanes) INLINED {
    const auto x = read<lanes.value>(input, k);
    const auto r = read<lanes.value>(kResidual == Residual::none ? input : residual, k);
    word_t<T> y{};
    for (int lane = 0; lane < lanes.value; ++lane) {
      acc_t<T> value = normalized<T>(x, k, lane, values);
      if (kResidual == Residual::as_it_is) value += Traits<T>::load(r, lane);
      if (kResidual == Residual::normalized) value += normalized<T>(r, k, lane, residual_values);
      y = Traits<T>::join(y, Traits<T>::store(0 > value ? 0 : value, lane));  // NaN passes
    }
    write<lanes.value>(output, k, y);
  });
}

template <typename T>
void normalize(const Plan& plan, Work work, const Coefficients& coefficients, const void* input, const void* residual,
               const Coefficients* of_residual, void* output) {
  const T *x = static_cast<const T*>(input), *r = static_cast<const T*>(residual);
  T* y = static_cast<T*>(output);
  if (of_residual != nullptr) {
    const auto row = [&](int64_t at, int64_t length, const auto& values, const auto& residual_values) {
      write_pieces(plan.streams, y, at, length, [&](int64_t begin, int64_t count, T* target) {
        normalize_row<T, Residual::normalized>(count, values, x + begin, residual_values, r + begin, target);
      });
    };
    for_each_row<T>(plan, work, row, coefficients, *of_residual);
  } else {
    const auto row = [&](int64_t at, int64_t length, const auto& values) {
      write_pieces(plan.streams, y, at, length, [&](int64_t begin, int64_t count, T* target) {
        if (r != nullptr) {
          normalize_row<T, Residual::as_it_is>(count, values, x + begin, values, r + begin, target);
        } else {
          normalize_row<T, Residual::none>(count, values, x + begin, values, r, target);
        }
      });
    };
    for_each_row<T>(plan, work, row, coefficients);
  }
  end_streams();
}

// ---- Backward ----

enum class Mask { output, input, none };

template <Mask kMask>
struct MaskConstant {
  static constexpr Mask value = kMask;
};

// Calls f(MaskConstant) with the mask that the source's tensors ask for.
template <typename F>
inline void with_mask(const GradientSource& source, F f) {
  if (source.masked != nullptr) {
    f(MaskConstant<Mask::none>{});
  } else if (source.output != nullptr) {
    f(MaskConstant<Mask::output>{});
  } else {
    f(MaskConstant<Mask::input>{});
  }
}

// The pointers of one run or row; with Mask::none, grad_output is masked already, and output is never read.
template <typename T>
struct Gradient {
  const T *grad_output, *input, *output;

  Gradient(const GradientSource& source, int64_t at)
      : grad_output(static_cast<const T*>(source.masked != nullptr ? source.masked : source.grad_output) + at),
        input(static_cast<const T*>(source.input) + at),
        output(source.output != nullptr ? static_cast<const T*>(source.output) + at : input) {}
};

// Word `k` of a run or row. All is read before anything is written, which to the compiler might overlap.
template <typename T, Mask kMask, int lanes>
struct GradientWord {
  word_t<T> grad_output, input, output;

  ALWAYS_INLINE GradientWord(const Gradient<T>& gradient, int64_t k)
      : grad_output(read<lanes>(gradient.grad_output, k)),
        input(read<lanes>(gradient.input, k)),
        output(kMask == Mask::output ? read<lanes>(gradient.output, k) : word_t<T>{}) {}

  // g of one lane, in its place. A select, not a product, so that a NaN gradient where the output is <= 0 gives 0.
  // Where the output is recomputed, what vanished when it was stored was blocked, too.
  template <typename V>
  ALWAYS_INLINE word_t<T> masked(int64_t k, int lane, acc_t<T> centered, const V& values) const {
    const word_t<T> g = Traits<T>::only(grad_output, lane);
    if (kMask == Mask::none) return g;
    const bool blocked = kMask == Mask::output
                             ? Traits<T>::load(output, lane) <= 0
                             : centered * values.scale.at(k, lane) + values.shift.at(k, lane) <= Traits<T>::kVanishing;
    return blocked ? 0 : g;
  }
};

// Calls add(lane, g, g * (input - mean)) for the lanes of word `k` of a run or row, and writes the masked gradient.
template <typename T, Mask kMask, bool kStore, int lanes, typename V, typename F>
ALWAYS_INLINE void add_gradient(int64_t k, const V& values, const Gradient<T>& gradient, T* grad_residual, F add) {
  const GradientWord<T, kMask, lanes> word(gradient, k);
  word_t<T> stored{};
  for (int lane = 0; lane < lanes; ++lane) {
    const acc_t<T> centered = Traits<T>::load(word.input, lane) - values.mean.at(k, lane);
    const word_t<T> masked = word.masked(k, lane, centered, values);
    const acc_t<T> g = Traits<T>::load(masked, lane);
    stored = Traits<T>::join(stored, masked);
    add(lane, g, g * centered);
  }
  if (kStore) write<lanes>(grad_residual, k, stored);
}

template <typename T, Mask kMask, bool kStore>
void gradient_sums_of_runs(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                           T* grad_residual, GradientSums* partial) {
  using A = acc_t<T>;
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    GradientSums* result = partial + index * plan.channels;
    for (int64_t c = plan.block_begin(work.block); c < plan.block_end(work.block); ++c) result[c] = {0, 0};
    for_each_run(plan, work.block, plan.chunk(index), [&](int64_t channel, int64_t at, int64_t length) {
      const auto values = values_of<A>(coefficients, channel);
      for_each_piece(at, length, [&](int64_t begin, int64_t count) {
        const Gradient<T> gradient(source, begin);
        T* target = kStore ? grad_residual + begin : nullptr;
        A sum, dot;
        sum_words<T>(count, sum, dot, [&](int64_t k, auto lanes, A& a, A& b) INLINED {
          add_gradient<T, kMask, kStore, lanes.value>(k, values, gradient, target,
                                                      [&](int, A g, A product) INLINED { a += g, b += product; });
        });
        result[channel].sum += sum;
        result[channel].dot += dot;
      });
    });
  }
}

template <typename T, Mask kMask, bool kStore>
void gradient_sums_of_rows(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                           T* grad_residual, GradientSums* partial) {
  using A = acc_t<T>;
  const int64_t first = plan.block_begin(work.block), group = plan.block_end(work.block) - first;
  const CoefficientColumns<T> columns(plan, work.block, coefficients);
  Columns<T> sums, dots;
  const auto add_row = [&](int64_t at, int64_t width, T* target) {
    const Gradient<T> gradient(source, at);
    for_each_word<T>(width, [&](int64_t k, auto lanes) INLINED {
      add_gradient<T, kMask, kStore, lanes.value>(k, columns, gradient, target, [&](int lane, A g, A product) INLINED {
        sums.at(k, lane) += g, dots.at(k, lane) += product;
      });
    });
  };
  double channel_sums[kMaxWidth], channel_dots[kMaxWidth];
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    sums.clear(), dots.clear();
    for_each_slab(plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
      for (int64_t row = 0; row < rows; ++row, at += stride) {
        if (kStore) {
          write_pieces(plan.streams, grad_residual, at, width, add_row);
        } else {
          add_row(at, width, nullptr);
        }
      }
    });
    for (int64_t c = 0; c < group; ++c) channel_sums[c] = channel_dots[c] = 0;
    sums.add_to(plan, work.block, channel_sums);
    dots.add_to(plan, work.block, channel_dots);
    GradientSums* result = partial + index * plan.channels + first;
    for (int64_t c = 0; c < group; ++c) result[c] = {channel_sums[c], channel_dots[c]};
  }
  end_streams();
}

template <typename T, Mask kMask, bool kStore>
void gradient_sums_of(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                      T* grad_residual, GradientSums* partial) {
  const auto sums = plan.runs ? gradient_sums_of_runs<T, kMask, kStore> : gradient_sums_of_rows<T, kMask, kStore>;
  sums(plan, work, coefficients, source, grad_residual, partial);
}

template <typename T>
void gradient_sums(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                   void* grad_residual, GradientSums* partial) {
  T* target = static_cast<T*>(grad_residual);
  if (target != nullptr) {  // there is a residual, and so an output
    gradient_sums_of<T, Mask::output, true>(plan, work, coefficients, source, target, partial);
  } else {
    with_mask(source, [&](auto mask) {
      gradient_sums_of<T, mask.value, false>(plan, work, coefficients, source, target, partial);
    });
  }
}

template <typename T, Mask kMask, bool kFrozen, bool kStore, typename V>
void grad_input_row(int64_t length, const V& values, Gradient<T> gradient, T* grad_input, T* grad_residual) {
  for_each_word<T>(length, [&](int64_t k, auto lanes) INLINED {
    const GradientWord<T, kMask, lanes.value> word(gradient, k);
    word_t<T> dx{}, dr{};
    for (int lane = 0; lane < lanes.value; ++lane) {
      const acc_t<T> centered = Traits<T>::load(word.input, lane) - values.mean.at(k, lane);
      const word_t<T> masked = word.masked(k, lane, centered, values);
      acc_t<T> g = Traits<T>::load(masked, lane);
      if (!kFrozen) g = g - values.offset.at(k, lane) - centered * values.slope.at(k, lane);
      dx = Traits<T>::join(dx, Traits<T>::store(g * values.scale.at(k, lane), lane));
      dr = Traits<T>::join(dr, masked);
    }
    write<lanes.value>(grad_input, k, dx);
    if (kStore) write<lanes.value>(grad_residual, k, dr);
  });
}

template <typename T>
void grad_input(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                void* grad_input, void* grad_residual) {
  T *dx = static_cast<T*>(grad_input), *dr = static_cast<T*>(grad_residual);
  if (dr != nullptr) {  // there is an output, and the statistics are the batch's
    const auto row = [&](int64_t at, int64_t length, const auto& values) {
      write_pieces(plan.streams, dx, at, length, [&](int64_t begin, int64_t count, T* target) {
        write_pieces(plan.streams, dr, begin, count, [&](int64_t, int64_t, T* residual_target) {
          grad_input_row<T, Mask::output, false, true>(count, values, {source, begin}, target, residual_target);
        });
      });
    };
    for_each_row<T>(plan, work, row, coefficients);
  } else {
    with_mask(source, [&](auto mask) {
      const auto row = [&](int64_t at, int64_t length, const auto& values) {
        write_pieces(plan.streams, dx, at, length, [&](int64_t begin, int64_t count, T* target) {
          if (coefficients.slope == nullptr) {
            grad_input_row<T, mask.value, true, false>(count, values, {source, begin}, target, dr);
          } else {
            grad_input_row<T, mask.value, false, false>(count, values, {source, begin}, target, dr);
          }
        });
      };
      for_each_row<T>(plan, work, row, coefficients);
    });
  }
  end_streams();
}

template <typename T>
constexpr Kernels kKernels = {moments<T>, normalize<T>, gradient_sums<T>, grad_input<T>};

#if defined(__SSE2__)
// The kernel, with float32 subnormals as operands even where torch.set_flush_denormal takes them for 0: one of float16,
// which eager keeps, is read as one. (Reading it as a difference of normals took 25 % more time forward, 40 %
// backward.)
template <auto kernel>
struct KeepingSubnormals;
template <typename... Args, void (*kernel)(Args...)>
struct KeepingSubnormals<kernel> {
  static void call(Args... args) {
    constexpr unsigned kSubnormalsAreZero = 0x40;
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode & ~kSubnormalsAreZero);
    kernel(args...);
    _mm_setcsr(mode);
  }
};

template <>
constexpr Kernels kKernels<Float16> = {
    KeepingSubnormals<moments<Float16>>::call, KeepingSubnormals<normalize<Float16>>::call,
    KeepingSubnormals<gradient_sums<Float16>>::call, KeepingSubnormals<grad_input<Float16>>::call};
#endif

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
