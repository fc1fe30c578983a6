// Every op's schema, on one screen. csrc/cpu and csrc/cuda register the kernels; resnet_fused/autograd.py has the
// gradients. There are no fake implementations: where somebody traces, PyTorch's own operators run.
//
// The words are the same everywhere: input, residual, output, grad_*: (N, C, *); weight, bias, input_bias,
// running_mean, running_var and their gradients: (C,); num_batches_tracked: one int64. residual_*: of the residual's
// batch norm, which has one where residual_eps is given; in backward, where residual is. statistics: (batch norms, 2,
// C), the mean and the inverse standard deviation that normalised, or, given, are to. What is last has
// defaults: each argument that Python does pass costs 0.1 us. mask: where the ReLU passed, one
// bit an element of the dense input (channels_last or not) as a matrix of as many rows as the backend likes: bit j % 8
// of byte j / 8 of a row, (rows, bytes). What was not asked for comes back undefined, None in Python.
//
// max_pool: of a pooling of what is rectified, without a residual: kernel_size, stride, padding and dilation, of H and
// W each, and the output's H and W. The output and its gradient then are of that size, and in the place of the mask
// there are the winners, (N, the others): one byte for each element of the output, in the order of its memory: the
// position in its window that the gradient goes to, counted row by row, or 255 where it goes nowhere.
//
// Stages, for who normalises tensors of several devices together: batch_norm_statistics, a batch's own, (2, C);
// batch_norm_add_relu by statistics, given; the gradients of weight and bias alone; and the rest by grad_means, given:
// (batch norms, 2, C), the means of g and of g * (input - mean) * invstd, g the gradient where the ReLU passed.

#include <torch/csrc/stable/library.h>

#ifndef RESNET_FUSED_LIBRARY  // the tests register a further one
#define RESNET_FUSED_LIBRARY resnet_fused
#endif

// With its name expanded: torch 2.10's STABLE_TORCH_LIBRARY takes its argument to the letter.
#define NAMED_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

NAMED_LIBRARY(RESNET_FUSED_LIBRARY, m) {
  m.def(
      "batch_norm_add_relu(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
      "Tensor? bias, float? momentum, float eps, Tensor(c!)? num_batches_tracked, Tensor? input_bias, bool training, "
      "bool need_mask, Tensor? residual=None, Tensor(d!)? residual_running_mean=None, "
      "Tensor(e!)? residual_running_var=None, Tensor? residual_weight=None, Tensor? residual_bias=None, "
      "float? residual_momentum=None, float? residual_eps=None, Tensor(f!)? residual_num_batches_tracked=None, "
      "Tensor? residual_input_bias=None, Tensor? statistics=None, int[]? max_pool=None) "
      "-> (Tensor output, Tensor mask, Tensor statistics)");
  m.def(
      "batch_norm_add_relu_backward(Tensor grad_output, Tensor mask, Tensor statistics, bool training, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? input_bias, bool need_input, bool need_weight, bool need_bias, "
      "bool need_input_bias, bool need_residual, Tensor? residual=None, Tensor? residual_weight=None, "
      "Tensor? residual_bias=None, Tensor? residual_input_bias=None, bool need_residual_weight=False, "
      "bool need_residual_bias=False, bool need_residual_input_bias=False, Tensor? grad_means=None, "
      "int[]? max_pool=None) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_input_bias, Tensor grad_residual, "
      "Tensor grad_residual_weight, Tensor grad_residual_bias, Tensor grad_residual_input_bias)");
  m.def("batch_norm_statistics(Tensor input, float eps) -> Tensor");
}
