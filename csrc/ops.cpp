// Every op's schema, on one screen. csrc/cpu and csrc/cuda register the kernels; resnet_fused/autograd.py has the
// gradients. There are no fake implementations: where somebody traces, PyTorch's own operators run.
//
// The words are the same everywhere: input, residual, output, grad_*: (N, C, *); weight, bias, input_bias,
// running_mean, running_var and their gradients: (C,); num_batches_tracked: one int64; statistics: (2, C), the mean and
// the inverse standard deviation that normalised. mask: where the ReLU passed, one bit an element of the dense input as
// a matrix, (N, C * prod(*)) or, in channels_last, (N * prod(*), C): bit j % 8 of byte j / 8 of a row, (rows, bytes);
// or an empty vector, and then the output serves in its place (auto-functionalisation takes no op that mutates and
// returns None). residual_*: of the residual's own batch norm. A gradient that was not asked for comes back
// undefined, None in Python.

#include <torch/csrc/stable/library.h>

#ifndef RESNET_FUSED_LIBRARY  // the tests register a further one
#define RESNET_FUSED_LIBRARY resnet_fused
#endif

// With its name expanded: torch 2.10's STABLE_TORCH_LIBRARY takes its argument to the letter.
#define NAMED_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

NAMED_LIBRARY(RESNET_FUSED_LIBRARY, m) {
  m.def(
      "batch_norm_add_relu(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? input_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
      "float? momentum, float eps) -> (Tensor output, Tensor statistics, Tensor mask)");
  m.def(
      "batch_norm_add_relu_backward(Tensor grad_output, Tensor input, Tensor mask, Tensor? weight, Tensor? bias, "
      "Tensor? input_bias, Tensor statistics, bool training, bool need_input, bool need_residual, bool need_weight, "
      "bool need_bias, bool need_input_bias) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, "
      "Tensor grad_bias, Tensor grad_input_bias)");
  m.def(
      "batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? input_bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps) "
      "-> (Tensor output, Tensor statistics)");
  m.def(
      "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? input_bias, "
      "Tensor statistics, bool training, bool need_input, bool need_weight, bool need_bias, bool need_input_bias) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_input_bias)");
  m.def("batch_norm_relu_recompute(Tensor input, Tensor? weight, Tensor? bias, Tensor statistics) -> Tensor output");
  m.def(
      "batch_norm_add_batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? input_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_input_bias, "
      "Tensor(d!)? residual_running_mean, Tensor(e!)? residual_running_var, Tensor(f!)? residual_num_batches_tracked, "
      "float? residual_momentum, float residual_eps, bool training) "
      "-> (Tensor output, Tensor statistics, Tensor residual_statistics, Tensor mask)");
  m.def(
      "batch_norm_add_batch_norm_relu_backward(Tensor grad_output, Tensor mask, Tensor input, Tensor? weight, "
      "Tensor? bias, Tensor? input_bias, Tensor statistics, Tensor residual, Tensor? residual_weight, "
      "Tensor? residual_bias, Tensor? residual_input_bias, Tensor residual_statistics, bool training, bool need_input, "
      "bool need_weight, bool need_bias, bool need_input_bias, bool need_residual, bool need_residual_weight, "
      "bool need_residual_bias, bool need_residual_input_bias) -> (Tensor grad_input, Tensor grad_weight, "
      "Tensor grad_bias, Tensor grad_input_bias, Tensor grad_residual, Tensor grad_residual_weight, "
      "Tensor grad_residual_bias, Tensor grad_residual_input_bias)");
}
