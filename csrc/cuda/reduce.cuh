// Sums across the lanes of a warp.
#pragma once

#include <cuda_runtime.h>

namespace resnet_fused::cuda {

// `lanes` adjacent lanes of a warp, a power of two, that work on one channel; the warp's other groups need not be
// there.
struct Group {
  int lanes;
  int lane;  // of this thread
  unsigned mask;

  __device__ __forceinline__ Group(int lanes, int thread) : lanes(lanes), lane(thread % lanes) {
    const int first = thread % 32 - lane;
    mask = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << first;
  }

  // The same bits in every lane, and in every run: the order of the additions is that of the butterfly.
  template <typename A>
  __device__ __forceinline__ A sum(A value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(mask, value, distance, lanes);
    }
    return value;
  }

  __device__ __forceinline__ bool any_from_first(bool value) const {
    return __shfl_sync(mask, static_cast<int>(value), 0, lanes) != 0;
  }
};

}  // namespace resnet_fused::cuda
