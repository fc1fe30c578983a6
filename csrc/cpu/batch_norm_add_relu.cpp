// relu(batch_norm(input) [+ residual]) on the CPU: tensors in, kernels called, tensors out; both ops share all of it.
//
// Everything is checked here, before any memory is touched; what a refusal means to the user is said in Python, with
// ValueError and TypeError (resnet_fused/checks.py), but only then: checking there first cost 8 us a call.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "capability.h"

namespace resnet_fused {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxDim = 64;  // of a PyTorch tensor

// ---- Layout ----

// Whether the strides order the dimensions as channels_last (or channels_last_3d) does; what
// Tensor::suggest_memory_format says, which the stable ABI lacks.
bool has_channels_last_strides(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim != 4 && dim != 5) return false;
  int64_t smallest = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t d = i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;  // C, W, H, [D,] N
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0 || stride < smallest || (d == 1 && stride == 0)) return false;
    smallest = stride * std::max<int64_t>(size, 1);
  }
  return true;
}

MemoryFormat memory_format(const Tensor& tensor) {
  if (tensor.is_contiguous() || !has_channels_last_strides(tensor)) return MemoryFormat::Contiguous;
  return tensor.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// The tensor itself where it is dense in that format, else a copy that is.
Tensor as_format(const Tensor& tensor, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return torch::stable::contiguous(tensor, format);
}

// torch::stable::empty boxes, some 1.3 us a call and 5 of a backward's 18; this shim does not.
Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int32_t type_code(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

Tensor empty_like(const Tensor& input, MemoryFormat format) {
  const auto sizes = input.sizes();
  const int64_t dim = input.dim();
  std::array<int64_t, kMaxDim> strides;
  int64_t stride = 1;
  const auto take = [&](int64_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  if (format != MemoryFormat::Contiguous) take(1);
  for (int64_t d = dim - 1; d > 1; --d) take(d);
  if (format == MemoryFormat::Contiguous) take(1);
  take(0);
  return empty_strided(dim, sizes.data(), strides.data(), type_code(input));
}

Tensor empty_vector(int64_t size, int32_t type) {
  const int64_t stride = 1;
  return empty_strided(1, &size, &stride, type);
}

Plan plan_of(const Tensor& input, MemoryFormat format) {
  const int64_t batch = input.size(0), channels = input.size(1), inner = input.numel() / (batch * channels);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = static_cast<int64_t>(input.element_size());
  if (format == MemoryFormat::Contiguous) return make_plan(batch, channels, inner, size, threads);
  return make_plan(batch * inner, channels, 1, size, threads);
}

// ---- Types ----

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::float32;
    case ScalarType::Double:
      return ElementType::float64;
    case ScalarType::BFloat16:
      return ElementType::bfloat16;
    case ScalarType::Half:
      return ElementType::float16;
    default:
      STD_TORCH_CHECK(false, "expected float16, bfloat16, float32 or float64");
  }
}

// A value as the kernels will see it after the conversion to their accumulation type.
double rounded(double value, ElementType type) {
  return type == ElementType::float64 ? value : static_cast<double>(static_cast<float>(value));
}

// A per-channel vector of any of the four types, and any stride, read and written as double; absent: one value for all.
// Ranges of channels at a time: one by one, with the type asked each time, 512 took 10 us.
class PerChannel {
 public:
  PerChannel(const OptionalTensor& tensor, const char* name, int64_t channels, double otherwise)
      : otherwise_(otherwise) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == channels, name,
                    ": expected a CPU tensor of shape (", channels, ",)");
    data_ = static_cast<char*>(tensor->data_ptr());
    type_ = tensor->scalar_type();
    element_type(*tensor);
    stride_ = tensor->stride(0);
  }

  explicit operator bool() const { return data_ != nullptr; }

  // values[c] for every channel c in [begin, end).
  void read(int64_t begin, int64_t end, double* values) const {
    if (data_ == nullptr) {
      std::fill(values + begin, values + end, otherwise_);
      return;
    }
    visit([&](const auto* elements) {
      for (int64_t c = begin; c < end; ++c) values[c] = static_cast<double>(elements[c * stride_]);
    });
  }

  void write(int64_t begin, int64_t end, const double* values) const {
    if (data_ == nullptr) return;
    visit([&](auto* elements) {
      using T = std::remove_pointer_t<decltype(elements)>;
      using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
      for (int64_t c = begin; c < end; ++c) elements[c * stride_] = static_cast<T>(static_cast<A>(values[c]));
    });
  }

 private:
  template <typename F>
  void visit(F f) const {
    switch (type_) {
      case ScalarType::Double:
        return f(reinterpret_cast<double*>(data_));
      case ScalarType::Float:
        return f(reinterpret_cast<float*>(data_));
      case ScalarType::BFloat16:
        return f(reinterpret_cast<torch::headeronly::BFloat16*>(data_));
      default:
        return f(reinterpret_cast<torch::headeronly::Half*>(data_));
    }
  }

  char* data_ = nullptr;
  ScalarType type_ = ScalarType::Double;
  int64_t stride_ = 1;
  double otherwise_;
};

// ---- The schedule ----

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 32768;

bool is_small(const Plan& plan) { return plan.outer * plan.channels * plan.inner < kParallelElements; }

// Calls f(Work) for every chunk of every block, shared among the threads.
template <typename F>
void for_each_chunk(const Plan& plan, const F& f) {
  const int64_t total = plan.blocks * plan.chunks;
  torch::stable::parallel_for(0, total, is_small(plan) ? total : 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // a block's part of the range at a time
      const int64_t block = begin / plan.chunks, first = begin % plan.chunks;
      const int64_t last = std::min(plan.chunks, first + end - begin);
      f(Work{block, first, last});
      begin += last - first;
    }
  });
}

// Runs reduce over every chunk of a channel, then finish for the channel, then apply over its chunks. With a block or
// more per thread a thread takes its blocks through all three, one by one, while they are in its cache; else the
// threads share the chunks, and meet in between.
template <typename Reduce, typename Finish, typename Apply>
void for_each_chunk_twice(const Plan& plan, const Reduce& reduce, const Finish& finish, const Apply& apply) {
  if (is_small(plan) || plan.blocks >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, plan.blocks, is_small(plan) ? plan.blocks : 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        reduce(Work{block, 0, plan.chunks});
        finish(plan.block_begin(block), plan.block_end(block));
        apply(Work{block, 0, plan.chunks});
      }
    });
  } else {
    for_each_chunk(plan, reduce);
    finish(0, plan.channels);
    for_each_chunk(plan, apply);
  }
}

template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// The per-channel coefficients, and room for as many values more.
class CoefficientBuffer {
 public:
  CoefficientBuffer(int64_t channels, ElementType type, const PerChannel& weight, const PerChannel& bias)
      : values_(uninitialised<double>(6 * channels)), channels_(channels), type_(type) {
    weight.read(0, channels, scale());
    bias.read(0, channels, shift());
  }

  double* mean() { return values_.get(); }
  double* scale() { return values_.get() + channels_; }
  double* shift() { return values_.get() + 2 * channels_; }
  double* offset() { return values_.get() + 3 * channels_; }
  double* slope() { return values_.get() + 4 * channels_; }
  double* scratch() { return values_.get() + 5 * channels_; }
  Coefficients forward() { return {mean(), scale(), shift(), nullptr, nullptr}; }
  Coefficients backward() { return {mean(), scale(), shift(), offset(), slope()}; }

  // Once for each channel: weight and bias become scale and shift, of (input - mean) * invstd * weight + bias with the
  // mean rounded to the accumulation type, and what that dropped made up for in the shift: at mean 1e4 and std 1e-2 it
  // is 5 % of the std.
  void set(int64_t begin, int64_t end, const double* means, const double* invstds) {
    for (int64_t c = begin; c < end; ++c) {
      const double scaled = rounded(invstds[c] * scale()[c], type_), mean_ = rounded(means[c], type_);
      const double dropped = means[c] - mean_, bias = shift()[c];
      mean()[c] = mean_;
      scale()[c] = scaled;
      shift()[c] = rounded(dropped == 0 || dropped != dropped ? bias : bias - dropped * scaled, type_);
    }
  }

 private:
  std::unique_ptr<double[]> values_;
  int64_t channels_;
  ElementType type_;
};

// ---- Forward ----

void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() >= 2 && input.dim() <= kMaxDim && input.size(1) >= 1,
                  "input: expected a CPU tensor (N, C, *) of 2 to ", kMaxDim, " dimensions with at least one channel");
}

// Per-channel vectors have the input's type, or float32 where that is a half type.
void check_vector_type(const OptionalTensor& vector, const char* name, ScalarType input) {
  const bool half = input == ScalarType::Half || input == ScalarType::BFloat16;
  STD_TORCH_CHECK(!vector || vector->scalar_type() == input || (half && vector->scalar_type() == ScalarType::Float),
                  name, ": expected the input's type, or float32 beside a half type");
}

void check_like_input(const Tensor& tensor, const char* name, const Tensor& input) {
  const auto sizes = tensor.sizes(), expected = input.sizes();
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == input.scalar_type() && sizes.size() == expected.size() &&
                      std::equal(sizes.begin(), sizes.end(), expected.begin()),
                  name, ": expected a CPU tensor of the input's shape and type");
}

// Joins the moments of the chunks, in their order (Chan et al.'s parallel update), to the mean and the sum of squared
// deviations from it, m2, of channels [begin, end). Chunk by chunk, as its divisions then serve every channel: channel
// by channel they took a fifth of a forward of 32x512x3x3.
void join_moments(const Plan& plan, const Moments* partial, int64_t begin, int64_t end, double* mean, double* m2) {
  double count = 0;
  for (int64_t index = 0; index < plan.chunks; ++index, partial += plan.channels) {
    const double next_count = static_cast<double>(plan.chunk(index).count()), inverse = 1 / next_count;
    const double share = next_count / (count + next_count), weight = count * share;
    for (int64_t c = begin; c < end; ++c) {
      const double next_mean = partial[c].origin + partial[c].sum * inverse;
      const double next_m2 = partial[c].square - partial[c].sum * partial[c].sum * inverse;
      const double delta = index == 0 ? 0 : next_mean - mean[c];  // an infinite mean would make it NaN
      mean[c] = index == 0 ? next_mean : mean[c] + delta * share;
      m2[c] = index == 0 ? next_m2 : m2[c] + next_m2 + delta * delta * weight;
    }
    count += next_count;
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& input_bias,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked, bool training,
                                   std::optional<double> momentum, double eps) {
  check_input(input);
  const ElementType type = element_type(input);
  const int64_t channels = input.size(1), count = input.numel() / channels;
  for (const auto& [vector, name] : {std::pair{&weight, "weight"},
                                     {&bias, "bias"},
                                     {&running_mean, "running_mean"},
                                     {&running_var, "running_var"},
                                     {&input_bias, "input_bias"}}) {
    check_vector_type(*vector, name, input.scalar_type());
  }
  const PerChannel gamma(weight, "weight", channels, 1), beta(bias, "bias", channels, 0);
  const PerChannel running_means(running_mean, "running_mean", channels, 0);
  const PerChannel running_vars(running_var, "running_var", channels, 1);
  const PerChannel dropped_bias(input_bias, "input_bias", channels, 0);
  STD_TORCH_CHECK(static_cast<bool>(running_means) == static_cast<bool>(running_vars),
                  "running_mean, running_var: expected both or neither");
  STD_TORCH_CHECK(training ? count != 1 : static_cast<bool>(running_means),
                  "expected more than one value per channel in training, and running statistics otherwise");
  STD_TORCH_CHECK(training ? eps > 0 : eps >= 0, "eps: expected more than 0 in training, and not less otherwise");
  STD_TORCH_CHECK(momentum || num_batches_tracked, "momentum: None needs num_batches_tracked");
  int64_t* counter = nullptr;
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->is_cpu() && num_batches_tracked->numel() == 1 &&
                        num_batches_tracked->scalar_type() == ScalarType::Long,
                    "num_batches_tracked: expected one int64 on the CPU");
    counter = static_cast<int64_t*>(num_batches_tracked->data_ptr());
  }
  if (residual) check_like_input(*residual, "residual", input);

  const MemoryFormat format = memory_format(input);
  const Tensor x = as_format(input, format), output = empty_like(input, format);
  const void* r = nullptr;
  OptionalTensor dense_residual;
  if (residual) r = dense_residual.emplace(as_format(*residual, format)).data_ptr();
  const std::array<int64_t, 2> statistics_sizes{2, channels}, statistics_strides{channels, 1};
  const Tensor statistics =
      empty_strided(2, statistics_sizes.data(), statistics_strides.data(), aoti_torch_dtype_float64());
  double* means = static_cast<double*>(statistics.data_ptr());
  double* invstds = means + channels;

  if (training && counter != nullptr) ++*counter;
  if (count == 0) {  // nothing to normalise: the statistics that come back are never used
    std::fill(means, means + 2 * channels, 0);
    return {output, statistics};
  }
  CoefficientBuffer coefficients(channels, type, gamma, beta);
  const auto set_coefficients = [&](int64_t begin, int64_t end, const double* variances) {
    for (int64_t c = begin; c < end; ++c) invstds[c] = 1 / std::sqrt(variances[c] + eps);
    coefficients.set(begin, end, means, invstds);
  };

  const Plan plan = plan_of(input, format);
  const Kernels& kernel = kernels(type);
  const auto normalize = [&](Work work) {
    kernel.normalize(plan, work, coefficients.forward(), x.data_ptr(), r, output.data_ptr());
  };
  if (!training) {
    double* dropped = coefficients.scratch();
    dropped_bias.read(0, channels, dropped);
    running_means.read(0, channels, means);
    running_vars.read(0, channels, invstds);
    for (int64_t c = 0; c < channels; ++c) means[c] -= dropped[c];
    set_coefficients(0, channels, invstds);
    for_each_chunk(plan, normalize);
    return {output, statistics};
  }

  const double n = static_cast<double>(count);
  const double factor = momentum ? *momentum : 1 / static_cast<double>(*counter);
  const auto partial = uninitialised<Moments>(plan.chunks * channels);
  const auto moments = [&](Work work) { kernel.moments(plan, work, x.data_ptr(), partial.get()); };
  const auto finish = [&](int64_t begin, int64_t end) {
    double *variances = invstds, *batch = coefficients.offset(), *running = coefficients.slope();
    join_moments(plan, partial.get(), begin, end, means, variances);
    dropped_bias.read(begin, end, batch);
    for (int64_t c = begin; c < end; ++c) batch[c] += means[c];
    const auto update = [&](const PerChannel& statistic) {  // by the batch's
      statistic.read(begin, end, running);
      for (int64_t c = begin; c < end; ++c) running[c] = factor * batch[c] + (1 - factor) * running[c];
      statistic.write(begin, end, running);
    };
    update(running_means);
    for (int64_t c = begin; c < end; ++c) {
      const double m2 = variances[c] < 0 ? 0 : variances[c];  // below 0 by rounding; NaN stays
      batch[c] = m2 * (1 / (n - 1));
      variances[c] = m2 * (1 / n);
    }
    update(running_vars);
    set_coefficients(begin, end, variances);
  };
  for_each_chunk_twice(plan, moments, finish, normalize);
  return {output, statistics};
}

// ---- Backward ----

struct Needed {
  bool input, residual, weight, bias, input_bias;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                            const OptionalTensor& output, const OptionalTensor& weight,
                                                            const OptionalTensor& bias,
                                                            const OptionalTensor& input_bias, const Tensor& statistics,
                                                            bool training, Needed needed) {
  check_input(input);
  check_like_input(grad_output, "grad_output", input);
  if (output) check_like_input(*output, "output", input);
  const ElementType type = element_type(input);
  const int64_t channels = input.size(1), count = input.numel() / channels;
  const PerChannel gamma(weight, "weight", channels, 1), beta(bias, "bias", channels, 0);
  STD_TORCH_CHECK(statistics.is_cpu() && statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() &&
                      statistics.numel() == 2 * channels,
                  "statistics: expected a contiguous float64 CPU tensor of shape (2, ", channels, ")");
  const double* means = static_cast<const double*>(statistics.data_ptr());
  const double* invstds = means + channels;

  const MemoryFormat format = memory_format(input);
  const auto empty_if = [&](bool need) { return need ? empty_like(input, format) : Tensor(); };
  const auto vector_if = [&](bool need, const OptionalTensor& parameter) {
    if (!need) return Tensor();
    return empty_vector(channels, parameter ? type_code(*parameter) : aoti_torch_dtype_float64());
  };
  const Tensor grad_input = empty_if(needed.input), grad_residual = empty_if(needed.residual);
  const Tensor grad_weight = vector_if(needed.weight, weight), grad_bias = vector_if(needed.bias, bias);
  const Tensor grad_input_bias = vector_if(needed.input_bias, input_bias);
  const auto vector_or_nothing = [&](bool need, const Tensor& tensor, const char* name) {
    return PerChannel(need ? OptionalTensor(tensor) : std::nullopt, name, channels, 0);
  };
  const PerChannel grad_gamma = vector_or_nothing(needed.weight, grad_weight, "grad_weight");
  const PerChannel grad_beta = vector_or_nothing(needed.bias, grad_bias, "grad_bias");
  const PerChannel grad_dropped = vector_or_nothing(needed.input_bias, grad_input_bias, "grad_input_bias");
  if (count == 0) {
    const std::vector<double> zeros(channels);
    for (const PerChannel& gradient : {grad_gamma, grad_beta, grad_dropped}) gradient.write(0, channels, zeros.data());
    return {grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias};
  }

  const Tensor dy = as_format(grad_output, format), x = as_format(input, format);
  GradientSource source{dy.data_ptr(), x.data_ptr(), nullptr, nullptr};
  OptionalTensor dense_output;
  if (output) source.output = dense_output.emplace(as_format(*output, format)).data_ptr();
  const Plan plan = plan_of(input, format);
  const Kernels& kernel = kernels(type);

  CoefficientBuffer coefficients(channels, type, gamma, beta);
  coefficients.set(0, channels, means, invstds);
  GradientSource second_pass = source;  // finds the gradient masked, where the first pass had to write it anyway
  if (needed.residual) second_pass.masked = grad_residual.data_ptr();

  const double n = static_cast<double>(count);
  const auto partial = uninitialised<GradientSums>(plan.chunks * channels);
  const auto reduce = [&](Work work) {
    kernel.gradient_sums(plan, work, coefficients.forward(), source,
                         needed.residual ? grad_residual.data_ptr() : nullptr, partial.get());
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    double *sums = coefficients.offset(), *dots = coefficients.slope(), *gradient = coefficients.scratch();
    std::fill(sums + begin, sums + end, 0), std::fill(dots + begin, dots + end, 0);
    for (int64_t index = 0; index < plan.chunks; ++index) {
      const GradientSums* next = partial.get() + index * channels;
      for (int64_t c = begin; c < end; ++c) sums[c] += next[c].sum, dots[c] += next[c].dot;
    }
    grad_beta.write(begin, end, sums);
    // Batch statistics cancel a bias of the input, running ones let it through as they do the input.
    for (int64_t c = begin; c < end; ++c) gradient[c] = training ? 0 : sums[c] * coefficients.scale()[c];
    grad_dropped.write(begin, end, gradient);
    for (int64_t c = begin; c < end; ++c) {
      const double dropped = means[c] - coefficients.mean()[c];  // by the rounding of the mean, see CoefficientBuffer
      const double dot = dots[c] - dropped * sums[c], slope = dot * invstds[c] * invstds[c] / n;
      gradient[c] = dot * invstds[c];
      coefficients.slope()[c] = slope;
      coefficients.offset()[c] = sums[c] / n - dropped * slope;
    }
    grad_gamma.write(begin, end, gradient);
  };
  const Coefficients of_input = training ? coefficients.backward() : coefficients.forward();
  const auto apply = [&](Work work) {
    if (needed.input) kernel.grad_input(plan, work, of_input, second_pass, grad_input.data_ptr());
  };
  if (needed.residual || needed.weight || needed.bias || needed.input_bias || training) {
    for_each_chunk_twice(plan, reduce, finish, apply);
  } else {
    for_each_chunk(plan, apply);
  }
  return {grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias};
}

// ---- The ops ----

std::tuple<Tensor, Tensor> batch_norm_add_relu(Tensor input, Tensor residual, OptionalTensor weight,
                                               OptionalTensor bias, OptionalTensor input_bias,
                                               OptionalTensor running_mean, OptionalTensor running_var,
                                               OptionalTensor num_batches_tracked, bool training,
                                               std::optional<double> momentum, double eps) {
  return forward(input, residual, weight, bias, input_bias, running_mean, running_var, num_batches_tracked, training,
                 momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_relu_backward(
    Tensor grad_output, Tensor input, Tensor output, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor input_bias, Tensor statistics, bool training, bool need_input, bool need_residual, bool need_weight,
    bool need_bias, bool need_input_bias) {
  return backward(grad_output, input, output, weight, bias, input_bias, statistics, training,
                  {need_input, need_residual, need_weight, need_bias, need_input_bias});
}

std::tuple<Tensor, Tensor> batch_norm_relu(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                           OptionalTensor input_bias, OptionalTensor running_mean,
                                           OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                           bool training, std::optional<double> momentum, double eps) {
  return forward(input, std::nullopt, weight, bias, input_bias, running_mean, running_var, num_batches_tracked,
                 training, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(Tensor grad_output, Tensor input,
                                                                    OptionalTensor weight, OptionalTensor bias,
                                                                    OptionalTensor input_bias, Tensor statistics,
                                                                    bool training, bool need_input, bool need_weight,
                                                                    bool need_bias, bool need_input_bias) {
  const auto [grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias] =
      backward(grad_output, input, std::nullopt, weight, bias, input_bias, statistics, training,
               {need_input, false, need_weight, need_bias, need_input_bias});
  return {grad_input, grad_weight, grad_bias, grad_input_bias};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("batch_norm_add_relu", TORCH_BOX(&resnet_fused::batch_norm_add_relu));
  m.impl("batch_norm_add_relu_backward", TORCH_BOX(&resnet_fused::batch_norm_add_relu_backward));
  m.impl("batch_norm_relu", TORCH_BOX(&resnet_fused::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&resnet_fused::batch_norm_relu_backward));
}
