// The windows of a max pooling over (N, C, H, W): the same for every backend.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace resnet_fused {

constexpr int64_t kNoWinner = 255;  // positions of a window are counted row by row: at most so many

// Of each, H's and W's.
struct MaxPool {
  int64_t kernel[2], stride[2], padding[2], dilation[2], output[2];

  // Where position k of a window is: in the input where this is in [0, size).
  int64_t input(int axis, int64_t window, int64_t k) const {
    return window * stride[axis] - padding[axis] + k * dilation[axis];
  }

  // Whether these may be windows over an input of that size, by PyTorch's rules, and none is larger than with padding.
  bool fits(int64_t height, int64_t width) const {
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = axis == 0 ? height : width;
      for (const int64_t value : {kernel[axis], stride[axis], dilation[axis], output[axis], size}) {
        if (value < 1 || value > INT32_MAX) return false;
      }
      const int64_t reach = (kernel[axis] - 1) * dilation[axis];
      if (padding[axis] < 0 || padding[axis] > (reach + 1) / 2) return false;
      if ((output[axis] - 1) * stride[axis] >= size + padding[axis]) return false;
      if (reach >= size + 2 * padding[axis]) return false;
      if (size + 2 * padding[axis] + reach > INT32_MAX) return false;  // GPUs count in 32 bits
    }
    return kernel[0] <= kNoWinner && kernel[1] <= kNoWinner && kernel[0] * kernel[1] <= kNoWinner;
  }
};

}  // namespace resnet_fused
