// What the glue (batch_norm_add_relu.cpp) and the kernels (kernels_impl.h, compiled once per instruction set) share.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>  // here, as kernels_impl.h is compiled wide and includes nothing
#endif

#include "../element_type.h"
#include "max_pool.h"
#include "plan.h"

namespace resnet_fused {

// Of one channel over one chunk: sums of deviations from an origin near the mean, and of their squares.
struct Moments {
  double origin, sum, square;
};

// Of one channel over one chunk: sums of the masked gradient g, and of g * (input - mean).
struct Sums {
  double first, second;
};

// Per channel, (C,), each value representable in the accumulation type:
//   output = relu((input - mean) * scale + shift + residual), a residual of coefficients of its own taken likewise
//   grad_input = g * scale + (input - mean) * slope + offset, or, where the statistics are constants, g * scale
struct Coefficients {
  const double *mean, *scale, *shift;
  const double *slope, *offset;  // nullptr where not needed
};

// Of the output, and the bits of the mask. The masked gradient g is the gradient where the ReLU passed, elsewhere 0.
struct Gradient {
  const void* grad_output;
  const uint8_t* mask;
};

// Chunks [chunk_begin, chunk_end) of one block.
struct Work {
  int64_t block, chunk_begin, chunk_end;
};

// Tensors are dense and laid out as the plan says; partial sums are [chunks, channels].
struct Kernels {
  void (*moments)(const Plan&, Work, const void* input, Moments* partial);
  // residual, its coefficients where it is normalised, too, and mask: nullptr for none
  void (*normalize)(const Plan&, Work, const Coefficients&, const void* input, const void* residual,
                    const Coefficients* of_residual, void* output, uint8_t* mask);
  void (*gradient_sums)(const Plan&, Work, const Coefficients&, const Gradient&, const void* input, Sums* partial);
  // grad_input, and grad_residual, where g goes: nullptr where not needed
  void (*input_gradient)(const Plan&, Work, const Coefficients&, const Gradient&, const void* input, void* grad_input,
                         void* grad_residual);
  // Of the block, rows [begin, end) of windows, counted through the batch. winners: nullptr where not needed
  void (*normalize_max_pool)(const Plan&, const PooledRows&, int64_t block, int64_t begin, int64_t end,
                             const Coefficients&, const void* input, void* output, uint8_t* winners, void* scratch);
  // Of the block, rows [begin, end) of the input's gradient, to where they are in a tensor that begins at grad.
  void (*max_unpool)(const Plan&, const PooledRows&, int64_t block, int64_t begin, int64_t end, const void* grad_output,
                     const uint8_t* winners, void* grad, void* scratch);
};

namespace baseline {
const Kernels& kernels(ElementType);
}
namespace avx2 {
const Kernels& kernels(ElementType);
}
namespace avx512 {
const Kernels& kernels(ElementType);
}

}  // namespace resnet_fused
