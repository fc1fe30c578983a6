// What the glue (batch_norm_add_relu.cpp) and the kernels (kernels_impl.h, compiled once per instruction set) share.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>  // here, as kernels_impl.h is compiled wide and includes nothing
#endif

#include "../element_type.h"
#include "plan.h"

namespace resnet_fused {

// Of one channel over one chunk: sums of deviations from an origin near the mean, and of their squares.
struct Moments {
  double origin, sum, square;
};

// Of one channel over one chunk: sums of the masked gradient g, and of g * (input - mean).
struct GradientSums {
  double sum, dot;
};

// Per channel, (C,), each value representable in the accumulation type, so that both passes compute the same bits:
//   output = relu((input - mean) * scale + shift + residual), a residual of coefficients of its own taken likewise
//   grad_input = (g - offset - (input - mean) * slope) * scale, or, where the statistics are constants, g * scale
struct Coefficients {
  const double *mean, *scale, *shift;
  const double *offset, *slope;  // nullptr where not needed
};

// The masked gradient g is grad_output where the output is not <= 0. It is read off `masked` where that was written by
// the first pass, else masked by `output`, else by the output as recomputed from input (no residual).
struct GradientSource {
  const void *grad_output, *input, *output, *masked;
};

// Chunks [chunk_begin, chunk_end) of one block.
struct Work {
  int64_t block, chunk_begin, chunk_end;
};

// Tensors are dense and laid out as the plan says; partial sums are [chunks, channels].
struct Kernels {
  void (*moments)(const Plan&, Work, const void* input, Moments* partial);
  // residual and, where it is normalised, too, its coefficients: nullptr for none
  void (*normalize)(const Plan&, Work, const Coefficients&, const void* input, const void* residual,
                    const Coefficients* of_residual, void* output);
  void (*gradient_sums)(const Plan&, Work, const Coefficients&, const GradientSource&, void* grad_residual,
                        GradientSums* partial);
  // grad_input may be where the source's `masked` is; grad_residual: nullptr, or where the masked gradient goes, off an
  // output and by the batch's statistics
  void (*grad_input)(const Plan&, Work, const Coefficients&, const GradientSource&, void* grad_input,
                     void* grad_residual);
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
