// What the glue (batch_norm_add_relu.cpp) and the kernels (batch_norm_add_relu.cu) share. No torch here: the kernels
// also compile for the CPU (tests/cuda_on_cpu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../element_type.h"
#include "max_pool.h"
#include "plan.h"

namespace resnet_fused::cuda {

// A per-channel vector, (C,), of any of the four types and any stride; absent where data is nullptr.
struct ChannelVector {
  void* data;
  ElementType type;
  int64_t stride;
};

// Pointers to device memory. Tensors are dense, as the plan says; scratch vectors are in the accumulation type, double
// where `type` is float64, else float.
constexpr int kCoefficients = 4;  // at most, that one kernel of a pair leaves for the other
struct Scratch {
  void* partials;     // [2, plan.partials(), C], then [kCoefficients, C]
  unsigned* arrived;  // (C,), zeros: blocks that have handed over their partial sums. Left as it was found.
};

// One batch norm of a forward.
struct NormForward {
  const void* input;
  double* statistics;  // [2, C]: mean and invstd
  ChannelVector weight, bias, input_bias, running_mean, running_var;
  int64_t* num_batches_tracked;  // or nullptr
  bool cumulative;               // momentum is 1 / num_batches_tracked
  double momentum, eps;
  Scratch scratch;  // in training
};

struct Forward {
  Plan plan, output_plan;  // the same, but where the output is pooled
  ElementType type;
  bool training, given;  // given: training's statistics are there already, and are not to be kept
  unsigned count;        // of batch norms: the second is the residual's
  NormForward norms[2];
  const void* residual;  // nullptr for none
  void* output;          // nullptr: the statistics alone
  uint8_t* mask;         // [rows, plan.mask_stride()], or of each window the winner; nullptr where not needed
  bool pools;            // by `pooling`
  Pooling pooling;
};

// One batch norm of a backward.
struct NormBackward {
  const void* input;
  const double* statistics;
  ChannelVector weight, bias, grad_weight, grad_bias, grad_input_bias;
  void* grad_input;          // nullptr where not needed
  const double* grad_means;  // [2, C]: given, in the place of sums, or nullptr
  Scratch scratch;           // where anything is summed, else nullptrs

  // Whether batch statistics are differentiated, by sums of its own.
  constexpr bool projects(bool training) const { return training && grad_input != nullptr && grad_means == nullptr; }
};

struct Backward {
  Plan plan;
  ElementType type;
  bool training;
  unsigned count;
  NormBackward norms[2];
  const void* grad_output;
  const uint8_t* mask;
  void* grad_residual;  // of one that was added as it is; nullptr where not needed
  bool pools;           // by `pooling`
  Pooling pooling;
};

constexpr int64_t kSemaphores = 4096;  // of a stream: for both batch norms of any ResNet
constexpr size_t kStreams = 64;        // of a device that have some; torch's pool has 32 of each priority

// Those of the current device's `stream`th stream, zeros where no kernel runs.
unsigned* semaphores(size_t stream);

// Launches on the current device. In training two kernels, in eval, by given statistics, or for these alone, one.
void forward(const Forward&, cudaStream_t);
// Two kernels, or the one that is needed.
void backward(const Backward&, cudaStream_t);

}  // namespace resnet_fused::cuda
