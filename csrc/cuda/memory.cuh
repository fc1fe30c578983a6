// The pointers through which the kernels reach memory. On a GPU they are nothing but pointers; on a CPU
// (RESNET_FUSED_CUDA_ON_CPU, tests/cuda_on_cpu) every access is checked, which is why there is no way around them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace resnet_fused::cuda {

// What one access moves: at most 16 bytes, and so aligned.
template <typename T, int n>
struct alignas(n * sizeof(T)) Vector {
  static_assert(n * sizeof(T) <= 16, "the widest access is of 16 bytes");
  T values[n];
  __host__ __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

// A Vector that is loaded ahead, in words: of its elements nvcc would take halves apart, and doubles somewhere else, as
// soon as they are loaded, and so wait for them.
template <typename T, int n>
class Packed {
 public:
  Packed() = default;
  __device__ __forceinline__ Packed(const Vector<T, n>& vector) { memcpy(words_, &vector, sizeof(vector)); }
  __device__ __forceinline__ Vector<T, n> unpacked() const {
    Vector<T, n> vector;
    Packed copy = *this;
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (uint32_t& word : copy.words_) asm volatile("" : "+r"(word));  // not to be a double before it is used
    }
#endif
    memcpy(&vector, copy.words_, sizeof(vector));
    return vector;
  }

 private:
  using Word = std::conditional_t<n * sizeof(T) % 4 == 0, uint32_t, T>;
  Word words_[n * sizeof(T) / sizeof(Word)];
};

}  // namespace resnet_fused::cuda

#ifdef RESNET_FUSED_CUDA_ON_CPU
#include "emulated_memory.h"
#else

namespace resnet_fused::cuda {

// `count` elements of global memory, or null.
template <typename T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  Global() = default;
  __host__ __device__ __forceinline__ Global(T* elements, int64_t /*count*/) : elements_(elements) {}
  __host__ __device__ __forceinline__ explicit operator bool() const { return elements_ != nullptr; }

  __device__ __forceinline__ Value load(int64_t i) const { return elements_[i]; }
  // What other blocks of this launch wrote: past L1, which may hold what was there before.
  __device__ __forceinline__ Value load_fresh(int64_t i) const { return __ldcg(elements_ + i); }
  __device__ __forceinline__ void store(int64_t i, Value value) const { elements_[i] = value; }

  // Elements i to i + n - 1 in one access. They must be aligned as a Vector is, and written by nothing meanwhile.
  template <int n>
  __device__ __forceinline__ Vector<Value, n> load_vector(int64_t i) const {
    const auto* vector = reinterpret_cast<const Vector<Value, n>*>(elements_ + i);
    if constexpr (sizeof(Vector<Value, n>) != sizeof(uint4)) return *vector;
    // Of a plain load nvcc makes four, one of them conditional, where a value may go unused (for sm_100 and sm_120).
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(vector));
    return reinterpret_cast<const Vector<Value, n>&>(bits);
  }
  template <int n>
  __device__ __forceinline__ void store_vector(int64_t i, const Vector<Value, n>& values) const {
    // Of a plain store nvcc may make four, and for sm_120 generic ones.
    if constexpr (sizeof(values) == sizeof(uint4)) {
      const uint4& bits = reinterpret_cast<const uint4&>(values);
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(elements_ + i)),
                   "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                   : "memory");
    } else {
      __builtin_assume(__isGlobal(elements_));  // else sm_120 takes a generic store where a branch picks the pointer
      *reinterpret_cast<Vector<T, n>*>(elements_ + i) = values;
    }
  }

  // Counts 0, 1, ..., last, 0, ...; returns the count before.
  __device__ __forceinline__ unsigned atomic_inc(int64_t i, unsigned last) const {
    return atomicInc(elements_ + i, last);
  }

 private:
  T* elements_ = nullptr;
};

// n elements of shared memory: `__shared__ Shared<float, 32> sums;`.
template <typename T, int n>
class Shared {
 public:
  __device__ __forceinline__ T load(int i) const { return elements_[i]; }
  __device__ __forceinline__ void store(int i, T value) { elements_[i] = value; }

  // Elements i to i + m - 1, i a multiple of m. Of eight floats a thread, one at a time, eight threads' would be in a
  // bank.
  template <int m>
  __device__ __forceinline__ void store_run(int i, const T (&values)[m]) {
    constexpr int kAtOnce = m * sizeof(T) % 16 == 0 ? 16 / sizeof(T) : 1;
#pragma unroll
    for (int k = 0; k < m; k += kAtOnce) {
      if constexpr (kAtOnce == 1) {
        store(i + k, values[k]);
      } else {
        uint4 bits;
        memcpy(&bits, values + k, sizeof(bits));
        const auto at = static_cast<unsigned>(__cvta_generic_to_shared(elements_ + i + k));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                     "r"(bits.w)
                     : "memory");
      }
    }
  }

 private:
  alignas(16) T elements_[n];
};

}  // namespace resnet_fused::cuda

#endif
