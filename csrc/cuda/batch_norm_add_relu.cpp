// relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on a GPU: tensors in, kernels launched, tensors out.
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
  static Tensor statistics(const NormArguments&);
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

Pooling pooling_of(const MaxPool& max_pool, const Tensor& input, MemoryFormat format) {
  const int64_t values = format == MemoryFormat::Contiguous ? 1 : input.size(1);
  const Images images(input.size(2), input.size(3), values);
  return {images, Images(max_pool.output[0], max_pool.output[1], values),
          Windows(max_pool, 0, input.size(2), images.row), Windows(max_pool, 1, input.size(3), images.pixel)};
}

void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// Partial sums and coefficients, in the accumulation type.
Tensor scratch(const Tensor& input, const Plan& plan) {
  const bool is_double = input.scalar_type() == ScalarType::Double;
  return empty_tensor(input, {2 * plan.partials() + kCoefficients, plan.channels},
                      is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// Batch norm `i`'s, of `count` in one launch.
Scratch scratch_of(const Tensor& partials, Device& device, int64_t channels, int i, int count) {
  return {partials.data_ptr(), device.zeros(count * channels) + i * channels};
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
  ForwardResults results(a, format);
  const bool is_empty = a.values() == 0;
  std::array<Tensor, 2> dense, partials;
  dense[0] = as_format(input, format);
  if (a.residual) dense[1] = as_format(*a.residual, format);

  Forward f{};
  f.type = element_type(input), f.count = static_cast<unsigned>(a.count);
  f.given = a.statistics.has_value(), f.training = a.training || f.given;
  f.residual = pointer(dense[1]), f.output = results.output.data_ptr();
  if (!is_empty) {
    const bool aligned = is_aligned({dense[0].data_ptr(), f.residual, f.output});
    const auto plan = [&](const Tensor& tensor, bool in_vectors) {
      return plan_of(extents_of(tensor, format), static_cast<int>(input.element_size()), in_vectors,
                     device.multiprocessors());
    };
    f.plan = f.output_plan = plan(input, aligned);
    if (a.max_pool != nullptr) {  // neighbours' windows are next to each other only in channels_last
      f.pools = true, f.pooling = pooling_of(*a.max_pool, input, format);
      f.output_plan = plan(results.output, aligned && format != MemoryFormat::Contiguous);
    }
  } else if (!f.given) {
    device.zero(results.statistics);  // nothing to normalise: those that come back are never used
  }
  if (a.need_mask) {
    const int64_t rows = f.pools ? input.size(0) : f.plan.rows;
    const int64_t bytes = f.pools ? results.output.numel() / rows : f.plan.mask_stride();
    results.mask = empty_tensor(input, {rows, bytes}, aoti_torch_dtype_uint8());
    f.mask = static_cast<uint8_t*>(results.mask.data_ptr());
  }
  for (int i = 0; i < a.count; ++i) {
    const NormArguments& norm = a.norms[i];
    NormForward& n = f.norms[i];
    n.input = dense[i].data_ptr(), n.statistics = statistics_of(results.statistics, i, a.channels());
    n.weight = channel_vector(norm.weight), n.bias = channel_vector(norm.bias);
    n.input_bias = channel_vector(norm.input_bias);
    n.running_mean = channel_vector(norm.running_mean), n.running_var = channel_vector(norm.running_var);
    if (norm.num_batches_tracked && !f.given) {
      n.num_batches_tracked = static_cast<int64_t*>(norm.num_batches_tracked->data_ptr());
    }
    n.cumulative = !norm.momentum, n.momentum = norm.momentum.value_or(0), n.eps = norm.eps;
    if (a.takes_batch() && !is_empty) {
      partials[i] = scratch(input, f.plan);
      n.scratch = scratch_of(partials[i], device, a.channels(), i, a.count);
    }
  }
  cuda::forward(f, device.stream());
  return results;
} catch (const Error& error) {
  explain(error, "batch_norm_add_relu", a.input());
}

Tensor Cuda::statistics(const NormArguments& a) try {
  const int64_t channels = a.input.size(1);
  Device device(a.input);
  const Tensor statistics = empty_tensor(a.input, {2, channels}, aoti_torch_dtype_float64());
  if (a.input.numel() == 0) {
    device.zero(statistics);
    return statistics;
  }
  const MemoryFormat format = memory_format(a.input);
  const Tensor dense = as_format(a.input, format);
  Forward f{};
  f.type = element_type(a.input), f.count = 1, f.training = true;
  f.plan = plan_of(extents_of(a.input, format), static_cast<int>(a.input.element_size()),
                   is_aligned({dense.data_ptr()}), device.multiprocessors());
  const Tensor partials = scratch(a.input, f.plan);
  NormForward& n = f.norms[0];
  n.input = dense.data_ptr(), n.statistics = statistics_of(statistics, 0, channels), n.eps = a.eps;
  n.scratch = scratch_of(partials, device, channels, 0, 1);
  cuda::forward(f, device.stream());
  return statistics;
} catch (const Error& error) {
  explain(error, "batch_norm_statistics", a.input);
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
  const Tensor dy = as_format(a.grad_output, format);
  std::array<Tensor, 2> dense, partials;
  for (int i = 0; i < a.count; ++i) dense[i] = as_format(a.norms[i].input, format);

  Backward b{};
  b.type = element_type(input), b.training = a.training, b.count = static_cast<unsigned>(a.count);
  b.grad_output = dy.data_ptr(), b.grad_residual = pointer(grad.residual);
  bool aligned = is_aligned({b.grad_output, b.grad_residual, pointer(dense[0]), pointer(dense[1]),
                             pointer(grad.norms[0].input), pointer(grad.norms[1].input)});
  if (a.max_pool != nullptr) {
    b.pools = true, b.pooling = pooling_of(*a.max_pool, input, format);
    b.mask = check_mask(a, input.size(0), dy.numel() / input.size(0));
    // A vector is of one row, or of one pixel, whose winners are one, too.
    aligned &=
        format == MemoryFormat::Contiguous ? input.size(3) * input.element_size() % 16 == 0 : is_aligned({b.mask});
  }
  b.plan =
      plan_of(extents_of(input, format), static_cast<int>(input.element_size()), aligned, device.multiprocessors());
  if (!b.pools) b.mask = check_mask(a, b.plan.rows, b.plan.mask_stride());
  for (int i = 0; i < a.count; ++i) {
    const NormBackwardArguments& norm = a.norms[i];
    const NormGradients& gradients = grad.norms[i];
    NormBackward& n = b.norms[i];
    n.input = dense[i].data_ptr(), n.statistics = statistics_of(a.statistics, i, a.channels());
    n.weight = channel_vector(norm.weight), n.bias = channel_vector(norm.bias);
    n.grad_weight = channel_vector(gradients.weight), n.grad_bias = channel_vector(gradients.bias);
    n.grad_input_bias = channel_vector(gradients.input_bias), n.grad_input = pointer(gradients.input);
    if (a.training && norm.needed.input && a.grad_means) {
      n.grad_means = statistics_of(*a.grad_means, i, a.channels());
    }
    if (a.takes_sums(i)) {
      partials[i] = scratch(input, b.plan);
      n.scratch = scratch_of(partials[i], device, a.channels(), i, a.count);
    }
  }
  cuda::backward(b, device.stream());
  return grad;
} catch (const Error& error) {
  explain(error, "batch_norm_add_relu_backward", a.input());
}

}  // namespace
}  // namespace resnet_fused::cuda

#ifndef RESNET_FUSED_CUDA_ON_CPU  // there, tests/cuda_on_cpu/glue.cpp does
RESNET_FUSED_REGISTER(resnet_fused, CUDA, resnet_fused::cuda::Cuda)
#endif
