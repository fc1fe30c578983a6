// How the CUDA kernels pool: pure geometry, the same for every pass, layout and type.
#pragma once

#include "../max_pool.h"
#include "plan.h"

namespace resnet_fused::cuda {

// A dense tensor as images: of (N, C) where it is contiguous, whose pixels are one value each, or of (N,) in
// channels_last, of C adjacent ones. Rows and columns are counted in 32 bits, as MaxPool::fits lets them.
struct Images {
  Divisor image, row, pixel;  // elements of one

  Images() = default;
  Images(int64_t height, int64_t width, int64_t values)
      : image(height * width * values), row(width * values), pixel(values) {}

  struct Place {
    int64_t image, value;
    unsigned row, column;
  };
  constexpr Place place_of(int64_t element) const {
    const int64_t of_image = element / image, in_image = element - of_image * image;
    const int64_t of_row = in_image / row, in_row = in_image - of_row * row, column = in_row / pixel;
    return {of_image, in_row - column * pixel, static_cast<unsigned>(of_row), static_cast<unsigned>(column)};
  }
  constexpr int64_t element_of(const Place& place) const {
    return place.image * image + place.value + place.row * row + place.column * pixel;
  }
};

// The windows along H, or W. Unsigned, so that what is before the first pixel is beyond the last one.
struct Windows {
  unsigned pixels, count, kernel, stride, padding, dilation;
  Divisor by_stride, by_dilation;

  Windows() = default;
  Windows(const MaxPool& max_pool, int axis, int64_t pixels)
      : pixels(static_cast<unsigned>(pixels)),
        count(static_cast<unsigned>(max_pool.output[axis])),
        kernel(static_cast<unsigned>(max_pool.kernel[axis])),
        stride(static_cast<unsigned>(max_pool.stride[axis])),
        padding(static_cast<unsigned>(max_pool.padding[axis])),
        dilation(static_cast<unsigned>(max_pool.dilation[axis])),
        by_stride(stride),
        by_dilation(dilation) {}

  // Where position k of a window is.
  constexpr unsigned pixel(unsigned window, unsigned k) const { return window * stride - padding + k * dilation; }

  // Those that may reach a pixel: [begin(pixel), end(pixel)).
  constexpr unsigned begin(unsigned pixel) const {
    const unsigned reach = (kernel - 1) * dilation, padded = pixel + padding;
    return padded > reach ? static_cast<unsigned>((padded - reach - 1) / by_stride) + 1 : 0;
  }
  constexpr unsigned end(unsigned pixel) const {
    const unsigned last = static_cast<unsigned>((pixel + padding) / by_stride);
    return last < count ? last + 1 : count;
  }
};

struct Pooling {
  Images input, output;
  Windows rows, columns;
};

}  // namespace resnet_fused::cuda
