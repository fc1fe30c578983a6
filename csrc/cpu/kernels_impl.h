// The CPU kernels: plain loops that the compiler vectorises, compiled once per instruction set, with CPU_CAPABILITY the
// namespace. Everything compiled wide is in this file and includes nothing: a header's inline function compiled with
// AVX-512 may be the copy that the linker keeps for the whole process, and then crashes CPUs without it.
//
// Nothing is contracted to fused multiply-adds (-ffp-contract=off): forward and backward must compute the same bits.

#define ALWAYS_INLINE inline __attribute__((always_inline))  // GCC vectorises no loop with a call left in it

namespace resnet_fused::CPU_CAPABILITY {
namespace {

// ---- Element types ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

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

ALWAYS_INLINE float load(float value) { return value; }
ALWAYS_INLINE double load(double value) { return value; }
ALWAYS_INLINE float load(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
ALWAYS_INLINE float load(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);                    // exact, subnormals included
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;  // inf and NaN keep their mantissa
  return as_float(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even, as PyTorch does.
template <typename T>
ALWAYS_INLINE T store(acc_t<T> value) {
  return value;
}
template <>
ALWAYS_INLINE BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}
template <>
ALWAYS_INLINE Float16 store<Float16>(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
  // 0.5 has the spacing of a float16 subnormal, 2^-24: the addition does the rounding.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // < 2^-14
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;            // >= 65520: infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;             // NaN
  return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
}

// ---- Coefficients ----

// One value for every element of a run, where a row has an array of columns.
template <typename A>
struct Constant {
  A value;
  A operator[](int64_t) const { return value; }
};

// The coefficients of a run (Constant) or row (pointer), indexed alike.
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

template <typename A>
struct Columns {
  alignas(64) A values[kMaxWidth];

  void clear(int64_t width) {
    for (int64_t k = 0; k < width; ++k) values[k] = 0;
  }

  // Each column gets its channel's value; per_channel starts at the block's first channel.
  void fill(const Plan& plan, int64_t block, const double* per_channel) {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    A* column = values;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.inner == 1) {
        for (int64_t c = 0; c < group; ++c) column[c] = static_cast<A>(per_channel[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c, column += plan.inner) {
          const A value = static_cast<A>(per_channel[c]);
          for (int64_t k = 0; k < plan.inner; ++k) column[k] = value;
        }
      }
    }
  }

  // Adds, in double, each channel's columns to sums, which starts at the block's first channel.
  void add_to(const Plan& plan, int64_t block, double* sums) const {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    const A* column = values;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.inner == 1) {
#pragma omp simd
        for (int64_t c = 0; c < group; ++c) sums[c] += static_cast<double>(column[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c, column += plan.inner) {
          double sum = 0;
          for (int64_t k = 0; k < plan.inner; ++k) sum += static_cast<double>(column[k]);
          sums[c] += sum;
        }
      }
    }
  }
};

template <typename A>
struct CoefficientColumns {
  Columns<A> mean, scale, shift, offset, slope;

  CoefficientColumns(const Plan& plan, int64_t block, const Coefficients& coefficients) {
    const int64_t first = plan.block_begin(block);
    mean.fill(plan, block, coefficients.mean + first);
    scale.fill(plan, block, coefficients.scale + first);
    shift.fill(plan, block, coefficients.shift + first);
    if (coefficients.slope == nullptr) return;
    offset.fill(plan, block, coefficients.offset + first);
    slope.fill(plan, block, coefficients.slope + first);
  }
  Values<const A*> values() const { return {mean.values, scale.values, shift.values, offset.values, slope.values}; }
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

// Calls f(at, length, values) for each run or row of the work, chunks in reverse: the last one read is still cached.
template <typename T, typename F>
inline void for_each_row(const Plan& plan, Work work, const Coefficients& coefficients, F f) {
  if (plan.runs) {
    for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
      for_each_run(plan, work.block, plan.chunk(index), [&](int64_t channel, int64_t at, int64_t length) {
        f(at, length, values_of<acc_t<T>>(coefficients, channel));
      });
    }
  } else {
    const CoefficientColumns<acc_t<T>> columns(plan, work.block, coefficients);
    for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
      for_each_slab(plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
        for (int64_t row = 0; row < rows; ++row) f(at + row * stride, width, columns.values());
      });
    }
  }
}

// Calls f(at, length) for the pieces of a run whose sums may be kept in the accumulation type.
template <typename F>
inline void for_each_piece(int64_t at, int64_t length, F f) {
  constexpr int64_t kPiece = 2048;
  for (int64_t begin = 0; begin < length; begin += kPiece) {
    f(at + begin, length - begin < kPiece ? length - begin : kPiece);
  }
}

// ---- Forward ----

// Deviations are from an origin near the mean: sum(x^2) - sum(x)^2 / n on raw values would lose everything at mean 1e4,
// std 1e-2. The origin is the mean of 1/32 of the chunk or more; the mean of a part p of the values is at most
// std * sqrt((1 - p) / p) off, so that even adversarial data cost at most 5 bits.
template <typename A>
inline A origin_of(double sum, int64_t count) {
  const A mean = static_cast<A>(sum / static_cast<double>(count));
  return mean - mean == 0 ? mean : 0;  // an infinite origin would turn infinities into NaNs
}

template <typename T>
void moments_of_runs(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const T* input, Moments* result) {
  using A = acc_t<T>;
  const int64_t part = (chunk.count() + 31) / 32, least = part > 16 ? part : 16;
  const int64_t sampled = least < chunk.run() ? least : chunk.run();
  int64_t started = plan.block_begin(block);  // channels whose first run was met
  for_each_run(plan, block, chunk, [&](int64_t channel, int64_t at, int64_t length) {
    Moments& moments = result[channel];
    if (channel == started) {
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < sampled; ++k) sum += load(input[at + k]);
      moments = {origin_of<A>(sum, sampled), 0, 0};
      ++started;
    }
    const A origin = static_cast<A>(moments.origin);
    for_each_piece(at, length, [&](int64_t begin, int64_t count) {
      const T* x = input + begin;
      A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int64_t k = 0; k < count; ++k) {
        const A deviation = load(x[k]) - origin;
        sum += deviation;
        square += deviation * deviation;
      }
      moments.sum += sum;
      moments.square += square;
    });
  });
}

// Four rows at a time, which saves three in four loads and stores of the column arrays, then one at a time.
template <int n>
struct Rows {
  static constexpr int value = n;
};
template <typename F>
inline void for_each_rows(int64_t rows, F body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(row, Rows<4>{});
  for (; row < rows; ++row) body(row, Rows<1>{});
}

template <typename T>
void moments_of_rows(const Plan& plan, int64_t block, const Plan::Chunk& chunk, const T* input, Moments* result) {
  using A = acc_t<T>;
  const int64_t first = plan.block_begin(block), group = plan.block_end(block) - first;
  Columns<A> origin, sums, squares;
  double channel_sums[kMaxWidth], channel_squares[kMaxWidth];
  const auto clear = [&](int64_t width) {
    sums.clear(width), squares.clear(width);
    for (int64_t c = 0; c < group; ++c) channel_sums[c] = channel_squares[c] = 0;
  };
  const int64_t width = plan.row_outer * group * plan.inner;

  clear(width);
  int64_t sampled = 0;  // the first row
  for_each_slab(plan, block, chunk, [&](int64_t at, int64_t, int64_t, int64_t slab_width) {
    if (sampled > 0) return;
    sampled = slab_width / group;
    for (int64_t k = 0; k < slab_width; ++k) sums.values[k] = load(input[at + k]);
  });
  sums.add_to(plan, block, channel_sums);
  for (int64_t c = 0; c < group; ++c)
    channel_sums[c] = result[first + c].origin = origin_of<A>(channel_sums[c], sampled);
  origin.fill(plan, block, channel_sums);

  clear(width);
  for_each_slab(plan, block, chunk, [&](int64_t at, int64_t rows, int64_t stride, int64_t slab_width) {
    for_each_rows(rows, [&](int64_t row, auto n) {
      const T* x = input + at + row * stride;
#pragma omp simd
      for (int64_t k = 0; k < slab_width; ++k) {
        A sum = 0, square = 0;
#pragma GCC unroll 4
        for (int r = 0; r < n.value; ++r) {
          const A deviation = load(x[r * stride + k]) - origin.values[k];
          sum += deviation;
          square += deviation * deviation;
        }
        sums.values[k] += sum;
        squares.values[k] += square;
      }
    });
  });
  sums.add_to(plan, block, channel_sums);
  squares.add_to(plan, block, channel_squares);
  for (int64_t c = 0; c < group; ++c) {
    result[first + c].sum = channel_sums[c];
    result[first + c].square = channel_squares[c];
  }
}

template <typename T>
void moments(const Plan& plan, Work work, const void* input, Moments* partial) {
  const auto of_chunk = plan.runs ? moments_of_runs<T> : moments_of_rows<T>;
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    of_chunk(plan, work.block, plan.chunk(index), static_cast<const T*>(input), partial + index * plan.channels);
  }
}

template <typename T, bool kResidual, typename V>
void normalize_row(int64_t length, V values, const T* input, const T* residual, T* output) {
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) {
    acc_t<T> value = (load(input[k]) - values.mean[k]) * values.scale[k] + values.shift[k];
    if (kResidual) value += load(residual[k]);
    output[k] = store<T>(0 > value ? 0 : value);  // NaN passes
  }
}

template <typename T>
void normalize(const Plan& plan, Work work, const Coefficients& coefficients, const void* input, const void* residual,
               void* output) {
  const T *x = static_cast<const T*>(input), *r = static_cast<const T*>(residual);
  T* y = static_cast<T*>(output);
  for_each_row<T>(plan, work, coefficients, [&](int64_t at, int64_t length, auto values) {
    if (r != nullptr) {
      normalize_row<T, true>(length, values, x + at, r + at, y + at);
    } else {
      normalize_row<T, false>(length, values, x + at, r, y + at);
    }
  });
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

  // One element's: a select, not a product, so that a NaN gradient where the output is <= 0 gives 0. Where the output
  // is recomputed it is rounded as it was stored: a float16 that underflowed to 0 was blocked.
  template <Mask kMask, typename V>
  ALWAYS_INLINE acc_t<T> masked(int64_t k, acc_t<T> centered, V values) const {
    const acc_t<T> g = load(grad_output[k]);
    if (kMask == Mask::none) return g;
    const acc_t<T> y =
        kMask == Mask::output ? load(output[k]) : load(store<T>(centered * values.scale[k] + values.shift[k]));
    return y <= 0 ? 0 : g;
  }
};

// Adds to the sums of a row's columns, and writes the masked gradient where kStore.
template <typename T, Mask kMask, bool kStore>
void add_gradient_row(int64_t width, Values<const acc_t<T>*> values, Gradient<T> gradient, T* grad_residual,
                      acc_t<T>* sums, acc_t<T>* dots) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    const acc_t<T> centered = load(gradient.input[k]) - values.mean[k];
    const acc_t<T> g = gradient.template masked<kMask>(k, centered, values);
    if (kStore) grad_residual[k] = store<T>(g);
    sums[k] += g;
    dots[k] += g * centered;
  }
}

// The same for a run, whose sums go to the channel's.
template <typename T, Mask kMask, bool kStore>
void add_gradient_run(int64_t length, Values<Constant<acc_t<T>>> values, Gradient<T> gradient, T* grad_residual,
                      GradientSums& sums) {
  acc_t<T> sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t k = 0; k < length; ++k) {
    const acc_t<T> centered = load(gradient.input[k]) - values.mean[k];
    const acc_t<T> g = gradient.template masked<kMask>(k, centered, values);
    if (kStore) grad_residual[k] = store<T>(g);
    sum += g;
    dot += g * centered;
  }
  sums.sum += sum;
  sums.dot += dot;
}

template <typename T, Mask kMask, bool kStore>
void gradient_sums_of(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                      T* grad_residual, GradientSums* partial) {
  using A = acc_t<T>;
  const int64_t first = plan.block_begin(work.block), group = plan.block_end(work.block) - first;
  const auto target = [&](int64_t at) { return kStore ? grad_residual + at : nullptr; };
  const auto clear = [&](GradientSums* result) {
    for (int64_t c = first; c < first + group; ++c) result[c] = {0, 0};
  };
  if (plan.runs) {
    for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
      GradientSums* result = partial + index * plan.channels;
      clear(result);
      for_each_run(plan, work.block, plan.chunk(index), [&](int64_t channel, int64_t at, int64_t length) {
        const auto values = values_of<A>(coefficients, channel);
        for_each_piece(at, length, [&](int64_t begin, int64_t count) {
          add_gradient_run<T, kMask, kStore>(count, values, {source, begin}, target(begin), result[channel]);
        });
      });
    }
    return;
  }
  const CoefficientColumns<A> columns(plan, work.block, coefficients);
  Columns<A> sums, dots;
  double channel_sums[kMaxWidth], channel_dots[kMaxWidth];
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    sums.clear(plan.row_outer * group * plan.inner), dots.clear(plan.row_outer * group * plan.inner);
    for_each_slab(plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
      for (int64_t row = 0; row < rows; ++row, at += stride) {
        add_gradient_row<T, kMask, kStore>(width, columns.values(), {source, at}, target(at), sums.values, dots.values);
      }
    });
    for (int64_t c = 0; c < group; ++c) channel_sums[c] = channel_dots[c] = 0;
    sums.add_to(plan, work.block, channel_sums);
    dots.add_to(plan, work.block, channel_dots);
    GradientSums* result = partial + index * plan.channels + first;
    for (int64_t c = 0; c < group; ++c) result[c] = {channel_sums[c], channel_dots[c]};
  }
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

template <typename T, Mask kMask, bool kFrozen, typename V>
void grad_input_row(int64_t length, V values, Gradient<T> gradient, T* grad_input) {
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) {
    const acc_t<T> centered = load(gradient.input[k]) - values.mean[k];
    acc_t<T> g = gradient.template masked<kMask>(k, centered, values);
    if (!kFrozen) g = g - values.offset[k] - centered * values.slope[k];
    grad_input[k] = store<T>(g * values.scale[k]);
  }
}

template <typename T>
void grad_input(const Plan& plan, Work work, const Coefficients& coefficients, const GradientSource& source,
                void* grad_input) {
  T* dx = static_cast<T*>(grad_input);
  with_mask(source, [&](auto mask) {
    for_each_row<T>(plan, work, coefficients, [&](int64_t at, int64_t length, auto values) {
      if (coefficients.slope == nullptr) {
        grad_input_row<T, mask.value, true>(length, values, {source, at}, dx + at);
      } else {
        grad_input_row<T, mask.value, false>(length, values, {source, at}, dx + at);
      }
    });
  });
}

template <typename T>
constexpr Kernels kKernels = {moments<T>, normalize<T>, gradient_sums<T>, grad_input<T>};

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
