// How the CPU kernels pool: pure geometry, the same for every type, layout and pass.
//
// A row has W pixels of `values` adjacent values: one in contiguous tensors, those of a block's channels in
// channels_last. What windows are taken of is copied, with room beside it for what they take there, in *phases*, of
// every stride-th pixel each: so what all windows of a row have at one of their positions is adjacent.
#pragma once

#include "../max_pool.h"

namespace resnet_fused {

constexpr int64_t kSlack = 64;  // elements after an array that whole vectors may read, or write

struct PhasedRow {
  int64_t phases, values, before, pixels;  // of a phase: the pixels beside the row, before it, and all

  static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

  // Where pixel w is, in the row or beside it.
  int64_t at(int64_t w) const {
    const int64_t within = floor_div(w, phases);
    return ((w - within * phases) * pixels + before + within) * values;
  }
  int64_t size() const { return phases * pixels * values; }
};

struct PooledRows {
  MaxPool windows;
  int64_t channels, height, width;
  bool channels_last;

  // Of a tensor of so many rows and columns.
  int64_t offset(int64_t n, int64_t channel, int64_t row, int64_t rows, int64_t columns) const {
    return channels_last ? (n * rows + row) * columns * channels + channel
                         : ((n * channels + channel) * rows + row) * columns;
  }
  int64_t pixel_stride() const { return channels_last ? channels : 1; }

  int64_t reach(int axis) const { return (windows.kernel[axis] - 1) * windows.dilation[axis]; }
  int64_t phase_pixels() const { return (width + windows.stride[1] - 1) / windows.stride[1]; }

  PhasedRow input_row(int64_t values) const {
    const int64_t before = (windows.padding[1] + windows.stride[1] - 1) / windows.stride[1];
    const int64_t taken = windows.output[1] + PhasedRow::floor_div(reach(1) - windows.padding[1], windows.stride[1]);
    return {windows.stride[1], values, before, before + larger(phase_pixels(), taken)};
  }
  PhasedRow window_row(int64_t values) const {
    const int64_t after = (windows.padding[1] + windows.stride[1] - 1) / windows.stride[1];
    const int64_t before = larger(0, PhasedRow::floor_div(reach(1) - windows.padding[1], windows.stride[1]));
    return {1, values, before, before + larger(windows.output[1], phase_pixels() + after)};
  }

  // Rows that are needed at a time, and as many more as make a power of two: row h is kept at h & (rows - 1).
  int64_t input_rows() const { return power_of_two(reach(0) + 1); }
  int64_t window_rows() const { return power_of_two(reach(0) / windows.stride[0] + 1); }
  // A row of the gradient in phases, of contiguous tensors.
  int64_t gradient_phase() const { return phase_pixels() + kSlack; }
  int64_t gradient_row() const { return smaller(windows.stride[1], width) * gradient_phase(); }

  // In bytes; the scratch memory of the kernels.
  int64_t forward_scratch(int64_t values, int64_t element_size) const {
    return (input_rows() * input_row(values).size() + width + 2 * kSlack) * element_size;
  }
  int64_t backward_scratch(int64_t values, int64_t element_size) const {
    return (window_rows() * window_row(values).size() + kSlack) * (element_size + 1) + gradient_row() * element_size;
  }

  static int64_t power_of_two(int64_t least) {
    int64_t power = 1;
    while (power < least) power *= 2;
    return power;
  }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

}  // namespace resnet_fused
