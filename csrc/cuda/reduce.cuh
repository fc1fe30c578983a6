// Sums across the lanes of a warp, each of its share.
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

// Walks a matrix row by row, a lane's share of it, every `lanes`th element: no division a step.
struct Walk {
  int columns, step_row, step_column, row, column;

  __device__ __forceinline__ Walk(const Group& group, int columns)
      : columns(columns),
        step_row(group.lanes / columns),
        step_column(group.lanes - step_row * columns),
        row(group.lane / columns),
        column(group.lane - row * columns) {}

  __device__ __forceinline__ void step() {
    row += step_row, column += step_column;
    if (column >= columns) column -= columns, ++row;
  }
};

}  // namespace resnet_fused::cuda
