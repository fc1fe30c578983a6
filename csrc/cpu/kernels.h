// What the glue (batch_norm_add_relu.cpp) and the kernels (kernels_impl.h, compiled once per instruction set) share.
#pragma once

#include "plan.h"

namespace resnet_fused {

enum class ElementType { float32, float64, bfloat16, float16 };

// A channel's mean and sum of squared deviations from it over one chunk.
struct Moments {
  double mean, m2;
};

// A channel's sums over one chunk of the masked gradient g: sum(g) and sum(g * (input - mean)).
struct GradientSums {
  double sum, dot;
};

// Per channel, (C,). The forward is relu((input - mean) * scale + shift + residual). Every value is representable in
// the accumulation type, so that forward and backward compute the same bits.
struct Affine {
  const double *mean, *scale, *shift;
};

// What the batch statistics add to the gradient, per channel, (C,):
// grad_input = (g - offset - (input - mean) * slope) * scale; with constant statistics, slope == nullptr, g * scale.
struct BatchTerms {
  const double *offset, *slope;
};

// The masked gradient g is grad_output where the output is not <= 0. It is read off `masked` where that was written by
// the first pass, else masked by `output`, else by the output as recomputed from input (no residual).
struct GradientSource {
  const void *grad_output, *input, *output, *masked;
  Affine affine;
};

// Chunks [chunk_begin, chunk_end) of one block.
struct Work {
  int64_t block, chunk_begin, chunk_end;
};

// Tensors are dense and laid out as the plan says; partial sums are [chunks, channels].
struct Kernels {
  void (*moments)(const Plan&, Work, const void* input, Moments* partial);
  void (*normalize)(const Plan&, Work, const void* input, const void* residual, const Affine&, void* output);
  void (*gradient_sums)(const Plan&, Work, const GradientSource&, void* grad_residual, GradientSums* partial);
  void (*grad_input)(const Plan&, Work, const GradientSource&, const BatchTerms&, void* grad_input);
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
