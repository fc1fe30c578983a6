// relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on a GPU: tensors in, kernels launched, tensors out;
// the three ops share all of it.
#include <array>
#include <initializer_list>
#include <string>

#include "../arguments.h"
#include "device.h"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

struct Cuda {
  static ForwardResults forward(const ForwardArguments&);
  static BackwardResults backward(const BackwardArguments&);
  static Tensor recompute(const NormBackwardArguments&);
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

void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// In the accumulation type.
Tensor scratch(const Tensor& input, int64_t rows, int64_t columns) {
  const bool is_double = input.scalar_type() == ScalarType::Double;
  return empty_matrix(input, rows, columns, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// Batch norm `i`'s, of `count` in one launch.
Scratch scratch_of(const Tensor& partials, Device& device, int64_t channels, int i, int count) {
  return {partials.data_ptr(), device.zeros(count * channels) + i * channels};
}

std::string op_name(int count, bool adds) {
  return count == 2 ? "batch_norm_add_batch_norm_relu" : adds ? "batch_norm_add_relu" : "batch_norm_relu";
}

[[noreturn]] void explain(const Error& error, const std::string& op, const Tensor& input) {
  std::string shape, hint;
  for (const int64_t size : input.sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  if (error.code == cudaErrorNoKernelImageForDevice) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, input.get_device_index());
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, input.get_device_index());
    const std::string capability = std::to_string(major) + "." + std::to_string(minor);
    hint = ". This GPU's compute capability is " + capability +
           ", the CUDA extension was built for " RESNET_FUSED_CUDA_ARCHITECTURES
           ": build it anew with TORCH_CUDA_ARCH_LIST=" +
           capability;
  }
  throw std::runtime_error("resnet_fused: " + op + " of an input of shape (" + shape + "): " + error.what() + hint);
}

ForwardResults Cuda::forward(const ForwardArguments& a) try {
  a.check();
  const Tensor& input = a.input();
  Device device(input);
  const MemoryFormat format = memory_format(input);
  ForwardResults results{empty_like(input, format), Tensor(), {}};
  const bool is_empty = a.values() == 0, masks = a.training && (a.residual != nullptr || a.count == 2);
  std::array<Tensor, 2> dense, partials;
  for (int i = 0; i < a.count; ++i) dense[i] = as_format(a.norms[i].input, format);
  if (a.residual != nullptr) dense[1] = as_format(*a.residual, format);

  Forward f{};
  f.type = element_type(input), f.training = a.training, f.count = static_cast<unsigned>(a.count);
  f.residual = pointer(dense[1]), f.output = results.output.data_ptr();
  if (!is_empty) {
    f.plan = plan_of(extents_of(input, format), static_cast<int>(input.element_size()),
                     is_aligned({dense[0].data_ptr(), f.residual, f.output}), device.multiprocessors());
  }
  if (masks) {
    results.mask = empty_matrix(input, f.plan.rows, f.plan.mask_stride(), aoti_torch_dtype_uint8());
    f.mask = static_cast<uint8_t*>(results.mask.data_ptr());
  }
  for (int i = 0; i < a.count; ++i) {
    const NormArguments& norm = a.norms[i];
    NormForward& n = f.norms[i];
    Tensor& statistics = results.statistics[i];
    statistics = empty_matrix(input, 2, a.channels(), aoti_torch_dtype_float64());
    if (is_empty) device.zero(statistics);  // nothing to normalise: those that come back are never used
    n.input = dense[i].data_ptr(), n.statistics = static_cast<double*>(statistics.data_ptr());
    n.weight = channel_vector(norm.weight), n.bias = channel_vector(norm.bias);
    n.input_bias = channel_vector(norm.input_bias);
    n.running_mean = channel_vector(norm.running_mean), n.running_var = channel_vector(norm.running_var);
    if (norm.num_batches_tracked) n.num_batches_tracked = static_cast<int64_t*>(norm.num_batches_tracked->data_ptr());
    n.cumulative = !norm.momentum, n.momentum = norm.momentum.value_or(0), n.eps = norm.eps;
    if (a.training && !is_empty) {
      partials[i] = scratch(input, 2 * f.plan.partials(), a.channels());
      n.scratch = scratch_of(partials[i], device, a.channels(), i, a.count);
    }
  }
  cuda::forward(f, device.stream());
  return results;
} catch (const Error& error) {
  explain(error, op_name(a.count, a.residual != nullptr), a.input());
}

Tensor Cuda::recompute(const NormBackwardArguments& a) try {
  const Device device(a.input);
  const MemoryFormat format = memory_format(a.input);
  const Tensor output = empty_like(a.input, format);
  if (a.input.numel() == 0) return output;
  const Tensor dense = as_format(a.input, format);

  Forward f{};
  f.type = element_type(a.input), f.count = 1, f.output = output.data_ptr();
  f.training = true;  // where normalize takes the statistics that are there, of a frozen batch norm, too
  f.plan = plan_of(extents_of(a.input, format), static_cast<int>(a.input.element_size()),
                   is_aligned({dense.data_ptr(), f.output}), device.multiprocessors());
  f.norms[0].input = dense.data_ptr(), f.norms[0].statistics = static_cast<double*>(a.statistics.data_ptr());
  f.norms[0].weight = channel_vector(a.weight), f.norms[0].bias = channel_vector(a.bias);
  cuda::recompute(f, device.stream());
  return output;
} catch (const Error& error) {
  explain(error, "batch_norm_relu_recompute", a.input);
}

BackwardResults Cuda::backward(const BackwardArguments& a) try {
  a.check();
  const Tensor& input = a.input();
  Device device(input);
  const MemoryFormat format = memory_format(input);
  BackwardResults grad(a, format);
  if (a.values() == 0) {
    for (const NormGradients& of_norm : grad.norms) {
      for (const Tensor& vector : {of_norm.weight, of_norm.bias, of_norm.input_bias}) {
        if (vector.defined()) device.zero(vector);
      }
    }
    return grad;
  }
  const bool bits = a.mask != nullptr && a.mask->scalar_type() == ScalarType::Byte;
  if (a.mask != nullptr && !bits) check_like_input(*a.mask, "mask", input);
  const Tensor dy = as_format(a.grad_output, format);
  const Tensor y = a.mask != nullptr && !bits ? as_format(*a.mask, format) : Tensor();
  std::array<Tensor, 2> dense, projections, partials;
  for (int i = 0; i < a.count; ++i) dense[i] = as_format(a.norms[i].input, format);

  Backward b{};
  b.type = element_type(input), b.training = a.training, b.count = static_cast<unsigned>(a.count);
  b.grad_output = dy.data_ptr(), b.output = pointer(y), b.grad_residual = pointer(grad.residual);
  b.plan = plan_of(extents_of(input, format), static_cast<int>(input.element_size()),
                   is_aligned({b.grad_output, b.output, b.grad_residual, pointer(dense[0]), pointer(dense[1]),
                               pointer(grad.norms[0].input), pointer(grad.norms[1].input)}),
                   device.multiprocessors());
  if (bits) {
    const int64_t rows = b.plan.rows, bytes = b.plan.mask_stride();
    STD_TORCH_CHECK(on_one_device(*a.mask, input) && a.mask->is_contiguous() && a.mask->numel() == rows * bytes,
                    "mask: expected a contiguous tensor of shape (", rows, ", ", bytes, ") on the input's device");
    b.mask = static_cast<const uint8_t*>(a.mask->data_ptr());
  }
  for (int i = 0; i < a.count; ++i) {
    const NormBackwardArguments& norm = a.norms[i];
    const NormGradients& gradients = grad.norms[i];
    NormBackward& n = b.norms[i];
    n.input = dense[i].data_ptr(), n.statistics = static_cast<const double*>(norm.statistics.data_ptr());
    n.weight = channel_vector(norm.weight), n.bias = channel_vector(norm.bias);
    n.grad_weight = channel_vector(gradients.weight), n.grad_bias = channel_vector(gradients.bias);
    n.grad_input_bias = channel_vector(gradients.input_bias), n.grad_input = pointer(gradients.input);
    const bool projects = a.training && norm.needed.input;
    if (projects) {
      projections[i] = scratch(input, 2, a.channels());
      n.projection = projections[i].data_ptr();
    }
    if (projects || norm.needed.sums()) {
      partials[i] = scratch(input, 2 * b.plan.partials(), a.channels());
      n.scratch = scratch_of(partials[i], device, a.channels(), i, a.count);
    }
  }
  cuda::backward(b, device.stream());
  return grad;
} catch (const Error& error) {
  explain(error, op_name(a.count, a.mask != nullptr) + "_backward", a.input());
}

}  // namespace
}  // namespace resnet_fused::cuda

#ifndef RESNET_FUSED_CUDA_ON_CPU  // there, tests/cuda_on_cpu/glue.cpp does
RESNET_FUSED_REGISTER(resnet_fused, CUDA, resnet_fused::cuda::Cuda)
#endif
