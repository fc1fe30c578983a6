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
  int64_t step;  // elements of the input from one position to the next

  Windows() = default;
  Windows(const MaxPool& max_pool, int axis, int64_t pixels, int64_t pixel)
      : pixels(static_cast<unsigned>(pixels)),
        count(static_cast<unsigned>(max_pool.output[axis])),
        kernel(static_cast<unsigned>(max_pool.kernel[axis])),
        stride(static_cast<unsigned>(max_pool.stride[axis])),
        padding(static_cast<unsigned>(max_pool.padding[axis])),
        dilation(static_cast<unsigned>(max_pool.dilation[axis])),
        by_stride(stride),
        by_dilation(dilation),
        step(dilation * pixel) {}

  // Where position k of a window is.
  constexpr unsigned pixel(unsigned window, unsigned k) const { return window * stride - padding + k * dilation; }

  // The positions of a window that are in the input: [first_inside(window), end_inside(window, that)).
  constexpr unsigned first_inside(unsigned window) const {
    unsigned k = 0;
    while (k < kernel && pixel(window, k) >= pixels) ++k;
    return k;
  }
  constexpr unsigned end_inside(unsigned window, unsigned first) const {
    unsigned k = kernel;
    while (k > first && pixel(window, k - 1) >= pixels) --k;
    return k;
  }

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

// What of a window is in the input: the first element, its position, how many rows and columns; no rows, if nothing.
struct Window {
  int64_t element;
  unsigned position, rows, columns;
};

// The windows that adjacent pixels may be in: the first one, how many rows and columns of them there are, and where in
// the first one the first pixel is.
struct Cover {
  int64_t window;  // an element of the output
  unsigned rows, columns, below, beside;
};

struct Pooling {
  Images input, output;
  Windows rows, columns;

  // Of an element of the output.
  constexpr Window window_of(int64_t element) const {
    const Images::Place place = output.place_of(element);
    const unsigned top = rows.first_inside(place.row), bottom = rows.end_inside(place.row, top);
    const unsigned left = columns.first_inside(place.column), right = columns.end_inside(place.column, left);
    return {input.element_of({place.image, place.value, rows.pixel(place.row, top), columns.pixel(place.column, left)}),
            top * columns.kernel + left, left < right ? bottom - top : 0, right - left};
  }

  // Of an element of the input, and the pixels beside it.
  constexpr Cover cover_of(int64_t element, unsigned pixels) const {
    const Images::Place place = input.place_of(element);
    const unsigned top = rows.begin(place.row), bottom = rows.end(place.row);
    const unsigned left = columns.begin(place.column), right = columns.end(place.column + pixels - 1);
    return {output.element_of({place.image, place.value, top, left}), top < bottom ? bottom - top : 0,
            left < right ? right - left : 0, place.row - rows.pixel(top, 0), place.column - columns.pixel(left, 0)};
  }
};

}  // namespace resnet_fused::cuda
