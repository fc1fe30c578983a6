// relu(batch_norm(input) [+ residual]) on the CPU: tensors in, kernels called, tensors out; both ops share all of it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "capability.h"

namespace resnet_fused {
namespace {

struct Cpu {
  static ForwardResults forward(const ForwardArguments&);
  static BackwardResults backward(const BackwardArguments&);
};

Plan plan_of(const Tensor& input, MemoryFormat format) {
  const Extents e = extents_of(input, format);
  return make_plan(e.outer, e.channels, e.inner, static_cast<int64_t>(input.element_size()),
                   torch::stable::get_num_threads());
}

// A value as the kernels will see it after the conversion to their accumulation type.
double rounded(double value, ElementType type) {
  return type == ElementType::float64 ? value : static_cast<double>(static_cast<float>(value));
}

// A per-channel vector of any of the four types, and any stride, read and written as double; absent: one value for all.
// Ranges of channels at a time: one by one, with the type asked each time, 512 took 10 us.
class PerChannel {
 public:
  PerChannel(const OptionalTensor& tensor, double otherwise) : otherwise_(otherwise) {
    if (tensor) *this = PerChannel(*tensor);
  }
  explicit PerChannel(const Tensor& tensor) {
    if (!tensor.defined()) return;
    data_ = static_cast<char*>(tensor.data_ptr());
    type_ = tensor.scalar_type();
    stride_ = tensor.stride(0);
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
  double otherwise_ = 0;
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

ForwardResults Cpu::forward(const ForwardArguments& a) {
  a.check();
  const Tensor& input = a.input;
  STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  const ElementType type = element_type(input);
  const int64_t channels = a.channels(), count = a.count();
  const PerChannel gamma(a.weight, 1), beta(a.bias, 0), running_means(a.running_mean, 0),
      running_vars(a.running_var, 1);
  const PerChannel dropped_bias(a.input_bias, 0);
  int64_t* counter = a.num_batches_tracked ? static_cast<int64_t*>(a.num_batches_tracked->data_ptr()) : nullptr;

  const MemoryFormat format = memory_format(input);
  const Tensor x = as_format(input, format), output = empty_like(input, format);
  const void* r = nullptr;
  OptionalTensor dense_residual;
  if (a.residual) r = dense_residual.emplace(as_format(*a.residual, format)).data_ptr();
  const Tensor statistics = empty_matrix(input, 2, channels, aoti_torch_dtype_float64());
  double* means = static_cast<double*>(statistics.data_ptr());
  double* invstds = means + channels;

  if (a.training && counter != nullptr) ++*counter;
  if (count == 0) {  // nothing to normalise: the statistics that come back are never used
    std::fill(means, means + 2 * channels, 0);
    return {output, statistics, Tensor()};
  }
  CoefficientBuffer coefficients(channels, type, gamma, beta);
  const auto set_coefficients = [&](int64_t begin, int64_t end, const double* variances) {
    for (int64_t c = begin; c < end; ++c) invstds[c] = 1 / std::sqrt(variances[c] + a.eps);
    coefficients.set(begin, end, means, invstds);
  };

  const Plan plan = plan_of(input, format);
  const Kernels& kernel = kernels(type);
  const auto normalize = [&](Work work) {
    kernel.normalize(plan, work, coefficients.forward(), x.data_ptr(), r, output.data_ptr());
  };
  if (!a.training) {
    double* dropped = coefficients.scratch();
    dropped_bias.read(0, channels, dropped);
    running_means.read(0, channels, means);
    running_vars.read(0, channels, invstds);
    for (int64_t c = 0; c < channels; ++c) means[c] -= dropped[c];
    set_coefficients(0, channels, invstds);
    for_each_chunk(plan, normalize);
    return {output, statistics, Tensor()};
  }

  const double n = static_cast<double>(count);
  const double factor = a.momentum ? *a.momentum : 1 / static_cast<double>(*counter);
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
  return {output, statistics, Tensor()};
}

// ---- Backward ----

BackwardResults Cpu::backward(const BackwardArguments& a) {
  a.check();
  const Tensor& input = a.input;
  STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  if (a.mask) check_like_input(*a.mask, "mask", input);  // the output itself: bits would save next to nothing here
  const ElementType type = element_type(input);
  const int64_t channels = a.channels(), count = a.count();
  const PerChannel gamma(a.weight, 1), beta(a.bias, 0);
  const double* means = static_cast<const double*>(a.statistics.data_ptr());
  const double* invstds = means + channels;

  const MemoryFormat format = memory_format(input);
  const BackwardResults grad = empty_gradients(a, format);
  const PerChannel grad_gamma(grad.weight), grad_beta(grad.bias), grad_dropped(grad.input_bias);
  if (count == 0) {
    const std::vector<double> zeros(channels);
    for (const PerChannel& gradient : {grad_gamma, grad_beta, grad_dropped}) gradient.write(0, channels, zeros.data());
    return grad;
  }

  const Tensor dy = as_format(a.grad_output, format), x = as_format(input, format);
  GradientSource source{dy.data_ptr(), x.data_ptr(), nullptr, nullptr};
  OptionalTensor dense_output;
  if (a.mask) source.output = dense_output.emplace(as_format(*a.mask, format)).data_ptr();
  const Plan plan = plan_of(input, format);
  const Kernels& kernel = kernels(type);

  CoefficientBuffer coefficients(channels, type, gamma, beta);
  coefficients.set(0, channels, means, invstds);
  GradientSource second_pass = source;  // finds the gradient masked, where the first pass had to write it anyway
  if (a.needed.residual) second_pass.masked = grad.residual.data_ptr();

  const double n = static_cast<double>(count);
  const auto partial = uninitialised<GradientSums>(plan.chunks * channels);
  const auto reduce = [&](Work work) {
    kernel.gradient_sums(plan, work, coefficients.forward(), source,
                         a.needed.residual ? grad.residual.data_ptr() : nullptr, partial.get());
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
    for (int64_t c = begin; c < end; ++c) gradient[c] = a.training ? 0 : sums[c] * coefficients.scale()[c];
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
  const Coefficients of_input = a.training ? coefficients.backward() : coefficients.forward();
  const auto apply = [&](Work work) {
    if (a.needed.input) kernel.grad_input(plan, work, of_input, second_pass, grad.input.data_ptr());
  };
  if (a.needed.residual || a.needed.weight || a.needed.bias || a.needed.input_bias || a.training) {
    for_each_chunk_twice(plan, reduce, finish, apply);
  } else {
    for_each_chunk(plan, apply);
  }
  return grad;
}

}  // namespace
}  // namespace resnet_fused

RESNET_FUSED_REGISTER(resnet_fused, CPU, resnet_fused::Cpu)
