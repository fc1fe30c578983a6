// The CPU kernels: plain loops that the compiler vectorises, compiled once per instruction set, with CPU_CAPABILITY the
// namespace. Everything compiled wide is in this file and includes nothing: a header's inline function compiled with
// AVX-512 may be the copy that the linker keeps for the whole process, and then crashes CPUs without it.
//
// No loop carries a float sum, so the same operations run in the same order at every width, and nothing is contracted
// to fused multiply-adds (-ffp-contract=off): all instruction sets give the same bits.

#define ALWAYS_INLINE inline __attribute__((always_inline))  // GCC vectorises no loop with a call left in it

namespace resnet_fused::CPU_CAPABILITY {
namespace {

// Element types
// --------------------------------------------------------------------------------------------------------

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

// Rows and columns
// -----------------------------------------------------------------------------------------------------

// Calls f(offset, rows, stride, width) for the rows of a chunk: those of full width, then, if any, the one that is not.
template <typename F>
inline void for_each_slab(const Plan& plan, int64_t block, const Plan::Chunk& chunk, F f) {
  const auto slabs = [&](int64_t offset, int64_t length, int64_t row_length, int64_t stride, int64_t width) {
    const int64_t rows = length / row_length, rest = length % row_length;
    if (rows > 0) f(offset, rows, stride, width);
    if (rest > 0) f(offset + rows * stride, int64_t{1}, stride, width / row_length * rest);
  };
  const int64_t outer_stride = plan.channels * plan.inner;
  const int64_t offset = chunk.outer_begin * outer_stride + plan.block_begin(block) * plan.inner + chunk.inner_begin;
  if (plan.row_inner < plan.inner) {  // folded
    for (int64_t o = 0; o < chunk.outer_end - chunk.outer_begin; ++o) {
      slabs(offset + o * outer_stride, chunk.inner_end - chunk.inner_begin, plan.row_inner, plan.row_inner,
            plan.row_inner);
    }
  } else {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    slabs(offset, chunk.outer_end - chunk.outer_begin, plan.row_outer, plan.row_outer * outer_stride,
          plan.row_outer * group * plan.inner);
  }
}

inline int64_t width_of(const Plan& plan, int64_t block) {
  return plan.row_outer * (plan.block_end(block) - plan.block_begin(block)) * plan.row_inner;
}

template <typename A>
inline void clear(A* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

template <typename A>
struct Columns {
  alignas(64) A values[kMaxWidth];

  // Each column gets its channel's value; per_channel starts at the block's first channel.
  void fill(const Plan& plan, int64_t block, const double* per_channel) {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    A* column = values;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.row_inner == 1) {
        for (int64_t c = 0; c < group; ++c) column[c] = static_cast<A>(per_channel[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c) {
          const A value = static_cast<A>(per_channel[c]);
          for (int64_t k = 0; k < plan.row_inner; ++k) column[k] = value;
          column += plan.row_inner;
        }
      }
    }
  }

  // Adds, in double, each channel's columns to sums, which starts at the block's first channel.
  void add_to(const Plan& plan, int64_t block, double* sums) const {
    const int64_t group = plan.block_end(block) - plan.block_begin(block);
    const A* column = values;
    for (int64_t o = 0; o < plan.row_outer; ++o) {
      if (plan.row_inner == 1) {
#pragma omp simd
        for (int64_t c = 0; c < group; ++c) sums[c] += static_cast<double>(column[c]);
        column += group;
      } else {
        for (int64_t c = 0; c < group; ++c) {
          double sum = 0;
          for (int64_t k = 0; k < plan.row_inner; ++k) sum += static_cast<double>(column[k]);
          sums[c] += sum;
          column += plan.row_inner;
        }
      }
    }
  }
};

template <typename T>
struct AffineColumns {
  Columns<acc_t<T>> mean, scale, shift;

  AffineColumns(const Plan& plan, int64_t block, const Affine& affine) {
    const int64_t first = plan.block_begin(block);
    mean.fill(plan, block, affine.mean + first);
    scale.fill(plan, block, affine.scale + first);
    shift.fill(plan, block, affine.shift + first);
  }
};

// Runs body(first_row, std::integral_constant) over rows: kRows at a time, which saves loads and stores of the column
// arrays, then one at a time.
constexpr int kRows = 4;
template <int n>
struct Rows {
  static constexpr int value = n;
};
template <int kAtOnce = kRows, typename F>
inline void for_each_rows(int64_t rows, F body) {
  int64_t row = 0;
  for (; row + kAtOnce <= rows; row += kAtOnce) body(row, Rows<kAtOnce>{});
  for (; row < rows; ++row) body(row, Rows<1>{});
}

// Forward
// --------------------------------------------------------------------------------------------------------------

template <typename T>
void add_moments(const T* input, int64_t rows, int64_t stride, int64_t width, const acc_t<T>* origin, acc_t<T>* sums,
                 acc_t<T>* squares) {
  for_each_rows(rows, [&](int64_t row, auto n) {
    const T* x = input + row * stride;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      acc_t<T> sum = 0, square = 0;
#pragma GCC unroll 4
      for (int r = 0; r < n.value; ++r) {
        const acc_t<T> deviation = load(x[r * stride + k]) - origin[k];
        sum += deviation;
        square += deviation * deviation;
      }
      sums[k] += sum;
      squares[k] += square;
    }
  });
}

// Sums of deviations, and of their squares, from an origin near the mean: sum(x^2) - sum(x)^2 / n on raw values would
// lose everything at mean 1e4, std 1e-2. The origin is the mean of the chunk's first row, 1/32 of it or more; the mean
// of a part p of the values is at most std * sqrt((1 - p) / p) off, so that even adversarial data cost at most 5 bits.
template <typename T>
void moments(const Plan& plan, Work work, const void* input, Moments* partial) {
  const T* x = static_cast<const T*>(input);
  const int64_t first = plan.block_begin(work.block), group = plan.block_end(work.block) - first;
  const int64_t width = width_of(plan, work.block);
  Columns<acc_t<T>> origin, sums, squares;
  double origins[kMaxWidth], channel_sums[kMaxWidth], channel_squares[kMaxWidth];
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    const Plan::Chunk chunk = plan.chunk(index);
    int64_t sampled = 0;  // values per channel in the chunk's first row
    clear(sums.values, width);
    for_each_slab(plan, work.block, chunk, [&](int64_t at, int64_t, int64_t, int64_t slab_width) {
      if (sampled > 0) return;
      sampled = slab_width / group;
      for (int64_t k = 0; k < slab_width; ++k) sums.values[k] = load(x[at + k]);
    });
    clear(origins, group);
    sums.add_to(plan, work.block, origins);
    for (int64_t c = 0; c < group; ++c) {
      const acc_t<T> mean = static_cast<acc_t<T>>(origins[c] / static_cast<double>(sampled));
      origins[c] = mean - mean == 0 ? mean : 0;  // an infinite origin would turn infinities into NaNs
    }
    origin.fill(plan, work.block, origins);

    clear(sums.values, width), clear(squares.values, width);
    for_each_slab(plan, work.block, chunk, [&](int64_t at, int64_t rows, int64_t stride, int64_t slab_width) {
      add_moments(x + at, rows, stride, slab_width, origin.values, sums.values, squares.values);
    });
    clear(channel_sums, group), clear(channel_squares, group);
    sums.add_to(plan, work.block, channel_sums);
    squares.add_to(plan, work.block, channel_squares);
    const double count = static_cast<double>(chunk.count());
    Moments* result = partial + index * plan.channels + first;
    for (int64_t c = 0; c < group; ++c) {
      result[c] = {origins[c] + channel_sums[c] / count,
                   channel_squares[c] - channel_sums[c] * channel_sums[c] / count};
    }
  }
}

template <typename T, bool kResidual>
void normalize_rows(const T* input, const T* residual, int64_t rows, int64_t stride, int64_t width,
                    const AffineColumns<T>& columns, T* output) {
  const acc_t<T>*mean = columns.mean.values, *scale = columns.scale.values, *shift = columns.shift.values;
  for (int64_t row = 0; row < rows; ++row) {
    const T *x = input + row * stride, *r = kResidual ? residual + row * stride : x;
    T* y = output + row * stride;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      acc_t<T> value = (load(x[k]) - mean[k]) * scale[k] + shift[k];
      if (kResidual) value += load(r[k]);
      y[k] = store<T>(value <= 0 ? 0 : value);  // NaN passes
    }
  }
}

template <typename T>
void normalize(const Plan& plan, Work work, const void* input, const void* residual, const Affine& affine,
               void* output) {
  const AffineColumns<T> columns(plan, work.block, affine);
  const T *x = static_cast<const T*>(input), *r = static_cast<const T*>(residual);
  T* y = static_cast<T*>(output);
  for (int64_t index = work.chunk_end;
       index-- > work.chunk_begin;) {  // in reverse: the last chunk read is still cached
    for_each_slab(plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
      if (r != nullptr) {
        normalize_rows<T, true>(x + at, r + at, rows, stride, width, columns, y + at);
      } else {
        normalize_rows<T, false>(x + at, nullptr, rows, stride, width, columns, y + at);
      }
    });
  }
}

// Backward
// -------------------------------------------------------------------------------------------------------------

enum class Mask { output, input, none };

// One element's masked gradient: a select, not a product, so that a NaN gradient where the output is <= 0 gives 0.
template <typename T, Mask kMask>
ALWAYS_INLINE acc_t<T> masked_gradient(T grad_output, T output, acc_t<T> centered, acc_t<T> scale, acc_t<T> shift) {
  const acc_t<T> g = load(grad_output);
  if (kMask == Mask::none) return g;
  const acc_t<T> y = kMask == Mask::output ? load(output) : load(store<T>(centered * scale + shift));
  return y <= 0 ? 0 : g;
}

// The pointers of one slab; with Mask::none, grad_output is masked already.
template <typename T>
struct Slab {
  const T *grad_output, *input, *output;

  Slab(const GradientSource& source, int64_t at)
      : grad_output(static_cast<const T*>(source.masked != nullptr ? source.masked : source.grad_output) + at),
        input(static_cast<const T*>(source.input) + at),
        output(source.output != nullptr ? static_cast<const T*>(source.output) + at : nullptr) {}
};

template <typename T, Mask kMask, bool kStore>
void add_gradients(const Slab<T>& slab, int64_t rows, int64_t stride, int64_t width, const AffineColumns<T>& columns,
                   T* grad_residual, acc_t<T>* sums, acc_t<T>* dots) {
  const acc_t<T>*mean = columns.mean.values, *scale = columns.scale.values, *shift = columns.shift.values;
  for_each_rows<kStore ? 1 : kRows>(rows, [&](int64_t row, auto n) {
    const T *dy = slab.grad_output + row * stride, *x = slab.input + row * stride;
    const T* y = kMask == Mask::output ? slab.output + row * stride : dy;
    T* g_out = grad_residual + (kStore ? row * stride : 0);
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      acc_t<T> sum = 0, dot = 0;
#pragma GCC unroll 4
      for (int r = 0; r < n.value; ++r) {
        const int64_t i = r * stride + k;
        const acc_t<T> centered = load(x[i]) - mean[k];
        const acc_t<T> g = masked_gradient<T, kMask>(dy[i], y[i], centered, scale[k], shift[k]);
        if (kStore) g_out[i] = store<T>(g);
        sum += g;
        dot += g * centered;
      }
      sums[k] += sum;
      dots[k] += dot;
    }
  });
}

template <typename T, Mask kMask, bool kFrozen>
void grad_input_rows(const Slab<T>& slab, int64_t rows, int64_t stride, int64_t width, const AffineColumns<T>& columns,
                     const acc_t<T>* offset, const acc_t<T>* slope, T* grad_input) {
  const acc_t<T>*mean = columns.mean.values, *scale = columns.scale.values, *shift = columns.shift.values;
  for (int64_t row = 0; row < rows; ++row) {
    const T *dy = slab.grad_output + row * stride, *x = slab.input + row * stride;
    const T* y = kMask == Mask::output ? slab.output + row * stride : dy;
    T* dx = grad_input + row * stride;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      const acc_t<T> centered = load(x[k]) - mean[k];
      acc_t<T> g = masked_gradient<T, kMask>(dy[k], y[k], centered, scale[k], shift[k]);
      if (!kFrozen) g = g - offset[k] - centered * slope[k];
      dx[k] = store<T>(g * scale[k]);
    }
  }
}

// Calls f(Mask constant) with the mask that the source's tensors ask for.
template <Mask kMask>
struct MaskConstant {
  static constexpr Mask value = kMask;
};
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

template <typename T>
void gradient_sums(const Plan& plan, Work work, const GradientSource& source, void* grad_residual,
                   GradientSums* partial) {
  const AffineColumns<T> columns(plan, work.block, source.affine);
  const int64_t first = plan.block_begin(work.block), group = plan.block_end(work.block) - first;
  const int64_t width = width_of(plan, work.block);
  Columns<acc_t<T>> sums, dots;
  double channel_sums[kMaxWidth], channel_dots[kMaxWidth];
  for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
    clear(sums.values, width), clear(dots.values, width);
    for_each_slab(
        plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t slab_width) {
          const Slab<T> slab(source, at);
          if (grad_residual != nullptr) {
            add_gradients<T, Mask::output, true>(slab, rows, stride, slab_width, columns,
                                                 static_cast<T*>(grad_residual) + at, sums.values, dots.values);
          } else {
            with_mask(source, [&](auto mask) {
              add_gradients<T, mask.value, false>(slab, rows, stride, slab_width, columns, nullptr, sums.values,
                                                  dots.values);
            });
          }
        });
    clear(channel_sums, group), clear(channel_dots, group);
    sums.add_to(plan, work.block, channel_sums);
    dots.add_to(plan, work.block, channel_dots);
    GradientSums* result = partial + index * plan.channels + first;
    for (int64_t c = 0; c < group; ++c) result[c] = {channel_sums[c], channel_dots[c]};
  }
}

template <typename T>
void grad_input(const Plan& plan, Work work, const GradientSource& source, const BatchTerms& terms, void* grad_input) {
  const AffineColumns<T> columns(plan, work.block, source.affine);
  const bool frozen = terms.slope == nullptr;
  Columns<acc_t<T>> offset, slope;
  if (!frozen) {
    const int64_t first = plan.block_begin(work.block);
    offset.fill(plan, work.block, terms.offset + first);
    slope.fill(plan, work.block, terms.slope + first);
  }
  T* dx = static_cast<T*>(grad_input);
  for (int64_t index = work.chunk_end; index-- > work.chunk_begin;) {
    for_each_slab(plan, work.block, plan.chunk(index), [&](int64_t at, int64_t rows, int64_t stride, int64_t width) {
      const Slab<T> slab(source, at);
      with_mask(source, [&](auto mask) {
        const auto run = frozen ? grad_input_rows<T, mask.value, true> : grad_input_rows<T, mask.value, false>;
        run(slab, rows, stride, width, columns, offset.values, slope.values, dx + at);
      });
    });
  }
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
