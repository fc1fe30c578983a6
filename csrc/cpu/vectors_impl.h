// The kernels' vectors, as kernels_impl.h includes them: all that differs by instruction set. How elements of each type
// are loaded and stored, and the bits of the mask. Vectors are of GCC's and clang's extension.

#define INLINED __attribute__((always_inline))  // a vector that is passed to a call goes through memory
#define ALWAYS_INLINE inline INLINED

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
