// relu(batch_norm(input) [+ residual]) on a GPU: tensors in, kernels launched, tensors out; both ops share all of it.
#include <array>
#include <initializer_list>

#include "../arguments.h"
#include "device.h"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

struct Cuda {
  static ForwardResults forward(const ForwardArguments&);
  static BackwardResults backward(const BackwardArguments&);
};

bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// The same as make_plan, but for shapes met before: to choose one takes 3 us.
Plan plan_of(const Extents& e, int element_size, bool aligned, int multiprocessors) {
  struct Entry {
    std::array<int64_t, 6> key;
    Plan plan;
  };
  thread_local std::array<Entry, 64> entries{};
  const std::array<int64_t, 6> key{e.outer, e.channels, e.inner, element_size, aligned, multiprocessors};
  uint64_t hash = 0;
  for (const int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
  Entry& entry = entries[hash >> 58];
  if (entry.key != key) entry = {key, make_plan(e.outer, e.channels, e.inner, element_size, aligned, multiprocessors)};
  return entry.plan;
}

ChannelVector channel_vector(const Tensor& tensor) {
  if (!tensor.defined()) return {nullptr, ElementType::float64, 1};
  return {tensor.data_ptr(), element_type(tensor), tensor.stride(0)};
}
ChannelVector channel_vector(const OptionalTensor& tensor) { return channel_vector(tensor ? *tensor : Tensor()); }

// In the accumulation type.
Tensor scratch(const Tensor& input, int64_t rows, int64_t columns) {
  const bool is_double = input.scalar_type() == ScalarType::Double;
  return empty_matrix(input, rows, columns, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

ForwardResults Cuda::forward(const ForwardArguments& a) {
  a.check();
  const Tensor& input = a.input;
  const Device device(input);
  const MemoryFormat format = memory_format(input);
  const Tensor x = as_format(input, format), output = empty_like(input, format);
  const Tensor r = a.residual ? as_format(*a.residual, format) : Tensor();
  Tensor statistics = empty_matrix(input, 2, a.channels(), aoti_torch_dtype_float64());
  Forward f{};
  Tensor mask, partials;
  if (a.count() == 0) {  // nothing to normalise: the statistics that come back are never used
    torch::stable::zero_(statistics);
    if (a.training && a.residual) mask = empty_matrix(input, 0, 0, aoti_torch_dtype_uint8());
  } else {
    f.input = x.data_ptr(), f.output = output.data_ptr();
    f.residual = r.defined() ? r.data_ptr() : nullptr;
    f.plan = plan_of(extents_of(input, format), static_cast<int>(input.element_size()),
                     is_aligned({f.input, f.residual, f.output}), device.multiprocessors());
    if (a.training && a.residual) {
      mask = empty_matrix(input, f.plan.rows, f.plan.mask_stride(), aoti_torch_dtype_uint8());
      f.mask = static_cast<uint8_t*>(mask.data_ptr());
      device.expect_written(mask);
    }
    if (a.training) {
      partials = scratch(input, 2 * f.plan.partials(), a.channels());
      f.scratch = {partials.data_ptr(), device.zeros(a.channels())};
    }
    device.expect_written(output);
    device.expect_written(statistics);
  }
  f.type = element_type(input);
  f.statistics = static_cast<double*>(statistics.data_ptr());
  f.weight = channel_vector(a.weight), f.bias = channel_vector(a.bias), f.input_bias = channel_vector(a.input_bias);
  f.running_mean = channel_vector(a.running_mean), f.running_var = channel_vector(a.running_var);
  if (a.num_batches_tracked) f.num_batches_tracked = static_cast<int64_t*>(a.num_batches_tracked->data_ptr());
  f.training = a.training, f.cumulative = !a.momentum, f.momentum = a.momentum.value_or(0), f.eps = a.eps;
  cuda::forward(f, device.stream());
  device.check_written();
  return {output, statistics, mask};
}

BackwardResults Cuda::backward(const BackwardArguments& a) {
  a.check();
  const Tensor& input = a.input;
  const Device device(input);
  const MemoryFormat format = memory_format(input);
  const BackwardResults grad = empty_gradients(a, format);
  if (a.count() == 0) {
    for (Tensor vector : {grad.weight, grad.bias, grad.input_bias}) {
      if (vector.defined()) torch::stable::zero_(vector);
    }
    return grad;
  }
  const Extents extents = extents_of(input, format);
  const bool bits = a.mask && a.mask->scalar_type() == ScalarType::Byte;
  if (a.mask && !bits) check_like_input(*a.mask, "mask", input);
  const Tensor dy = as_format(a.grad_output, format), x = as_format(input, format);
  const Tensor y = a.mask && !bits ? as_format(*a.mask, format) : Tensor();
  const auto pointer = [](const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; };

  Backward b{};
  b.grad_output = dy.data_ptr(), b.input = x.data_ptr(), b.output = pointer(y);
  b.grad_input = pointer(grad.input), b.grad_residual = pointer(grad.residual);
  b.plan =
      plan_of(extents, static_cast<int>(input.element_size()),
              is_aligned({b.grad_output, b.input, b.output, b.grad_input, b.grad_residual}), device.multiprocessors());
  if (bits) {
    const int64_t rows = b.plan.rows, bytes = b.plan.mask_stride();
    STD_TORCH_CHECK(on_one_device(*a.mask, input) && a.mask->is_contiguous() && a.mask->numel() == rows * bytes,
                    "mask: expected a contiguous tensor of shape (", rows, ", ", bytes, ") on the input's device");
    b.mask = static_cast<const uint8_t*>(a.mask->data_ptr());
  }
  b.type = element_type(input);
  b.statistics = static_cast<const double*>(a.statistics.data_ptr());
  b.training = a.training;
  b.weight = channel_vector(a.weight), b.bias = channel_vector(a.bias);
  b.grad_weight = channel_vector(grad.weight), b.grad_bias = channel_vector(grad.bias);
  b.grad_input_bias = channel_vector(grad.input_bias);
  Tensor projection, partials;
  const bool projects = a.training && a.needed.input;
  if (projects) {
    projection = scratch(input, 2, a.channels());
    b.projection = projection.data_ptr();
  }
  if (projects || a.needed.weight || a.needed.bias || a.needed.input_bias) {
    partials = scratch(input, 2 * b.plan.partials(), a.channels());
    b.scratch = {partials.data_ptr(), device.zeros(a.channels())};
  }
  for (const Tensor& tensor : {grad.input, grad.residual, grad.weight, grad.bias, grad.input_bias}) {
    if (tensor.defined()) device.expect_written(tensor);
  }
  cuda::backward(b, device.stream());
  device.check_written();
  return grad;
}

}  // namespace
}  // namespace resnet_fused::cuda

#ifdef RESNET_FUSED_CUDA_ON_CPU
RESNET_FUSED_REGISTER(RESNET_FUSED_LIBRARY, CPU, resnet_fused::cuda::Cuda)
#else
RESNET_FUSED_REGISTER(resnet_fused, CUDA, resnet_fused::cuda::Cuda)
#endif
