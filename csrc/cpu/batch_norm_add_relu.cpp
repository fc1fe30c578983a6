// relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on the CPU: tensors in, kernels called, tensors out;
// the three ops share all of it.
#include <algorithm>
#include <array>
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
  static Tensor recompute(const NormBackwardArguments&);
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

int64_t* counter_of(const NormArguments& a) { return static_cast<int64_t*>(a.num_batches_tracked->data_ptr()); }

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

// One batch norm of a forward.
class NormForward {
 public:
  NormForward(const NormArguments& a, const Tensor& input, const Tensor& statistics, bool training, const Plan& plan)
      : a_(a),
        input_(input),
        plan_(plan),
        kernel_(kernels(element_type(input))),
        means_(static_cast<double*>(statistics.data_ptr())),
        invstds_(means_ + plan.channels),
        running_means_(a.running_mean, 0),
        running_vars_(a.running_var, 1),
        dropped_bias_(a.input_bias, 0),
        coefficients_(plan.channels, element_type(input), PerChannel(a.weight, 1), PerChannel(a.bias, 0)),
        partial_(uninitialised<Moments>(training ? plan.chunks * plan.channels : 0)) {}

  Coefficients coefficients() { return coefficients_.forward(); }

  void take_running_statistics() {
    double* dropped = coefficients_.scratch();
    dropped_bias_.read(0, plan_.channels, dropped);
    running_means_.read(0, plan_.channels, means_);
    running_vars_.read(0, plan_.channels, invstds_);
    for (int64_t c = 0; c < plan_.channels; ++c) means_[c] -= dropped[c];
    set_coefficients(0, plan_.channels, invstds_);
  }

  void reduce(Work work) const { kernel_.moments(plan_, work, input_.data_ptr(), partial_.get()); }

  void finish(int64_t begin, int64_t end) {
    const double n = static_cast<double>(a_.input.numel() / plan_.channels);
    const double factor = a_.momentum ? *a_.momentum : 1 / static_cast<double>(*counter_of(a_));
    double *variances = invstds_, *batch = coefficients_.offset(), *running = coefficients_.slope();
    join_moments(plan_, partial_.get(), begin, end, means_, variances);
    dropped_bias_.read(begin, end, batch);
    for (int64_t c = begin; c < end; ++c) batch[c] += means_[c];
    const auto update = [&](const PerChannel& statistic) {  // by the batch's
      statistic.read(begin, end, running);
      for (int64_t c = begin; c < end; ++c) running[c] = factor * batch[c] + (1 - factor) * running[c];
      statistic.write(begin, end, running);
    };
    update(running_means_);
    for (int64_t c = begin; c < end; ++c) {
      const double m2 = variances[c] < 0 ? 0 : variances[c];  // below 0 by rounding; NaN stays
      batch[c] = m2 * (1 / (n - 1));
      variances[c] = m2 * (1 / n);
    }
    update(running_vars_);
    set_coefficients(begin, end, variances);
  }

 private:
  void set_coefficients(int64_t begin, int64_t end, const double* variances) {
    for (int64_t c = begin; c < end; ++c) invstds_[c] = 1 / std::sqrt(variances[c] + a_.eps);
    coefficients_.set(begin, end, means_, invstds_);
  }

  const NormArguments& a_;
  const Tensor& input_;
  const Plan& plan_;
  const Kernels& kernel_;
  double *means_, *invstds_;
  PerChannel running_means_, running_vars_, dropped_bias_;
  CoefficientBuffer coefficients_;
  std::unique_ptr<Moments[]> partial_;
};

ForwardResults Cpu::forward(const ForwardArguments& a) {
  a.check();
  const Tensor& input = a.input();
  STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  const MemoryFormat format = memory_format(input);
  ForwardResults results{empty_like(input, format), Tensor(), {}};
  std::array<Tensor, 2> dense;
  for (int i = 0; i < a.count; ++i) {
    dense[i] = as_format(a.norms[i].input, format);
    results.statistics[i] = empty_matrix(input, 2, a.channels(), aoti_torch_dtype_float64());
    if (a.training && a.norms[i].num_batches_tracked) ++*counter_of(a.norms[i]);
  }
  if (a.values() == 0) {  // nothing to normalise: the statistics that come back are never used
    for (int i = 0; i < a.count; ++i) {
      std::fill_n(static_cast<double*>(results.statistics[i].data_ptr()), 2 * a.channels(), 0);
    }
    return results;
  }
  if (a.residual != nullptr) dense[1] = as_format(*a.residual, format);
  const Plan plan = plan_of(input, format);
  const Kernels& kernel = kernels(element_type(input));
  std::vector<NormForward> norms;
  norms.reserve(a.count);
  for (int i = 0; i < a.count; ++i) {
    norms.emplace_back(a.norms[i], dense[i], results.statistics[i], a.training, plan);
  }

  const auto normalize = [&](Work work) {
    const bool has_residual = dense[1].defined();
    const Coefficients of_residual = norms.back().coefficients();
    kernel.normalize(plan, work, norms[0].coefficients(), dense[0].data_ptr(),
                     has_residual ? dense[1].data_ptr() : nullptr, a.count == 2 ? &of_residual : nullptr,
                     results.output.data_ptr());
  };
  if (!a.training) {
    for (NormForward& norm : norms) norm.take_running_statistics();
    for_each_chunk(plan, normalize);
    return results;
  }
  const auto reduce = [&](Work work) {
    for (const NormForward& norm : norms) norm.reduce(work);
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    for (NormForward& norm : norms) norm.finish(begin, end);
  };
  for_each_chunk_twice(plan, reduce, finish, normalize);
  return results;
}

Tensor Cpu::recompute(const NormBackwardArguments& a) {
  STD_TORCH_CHECK(a.input.is_cpu(), "input: expected a CPU tensor");
  const MemoryFormat format = memory_format(a.input);
  const Tensor output = empty_like(a.input, format);
  if (a.input.numel() == 0) return output;
  const Tensor dense = as_format(a.input, format);
  const Plan plan = plan_of(a.input, format);
  const ElementType type = element_type(a.input);
  const auto* means = static_cast<const double*>(a.statistics.data_ptr());
  CoefficientBuffer coefficients(plan.channels, type, PerChannel(a.weight, 1), PerChannel(a.bias, 0));
  coefficients.set(0, plan.channels, means, means + plan.channels);
  for_each_chunk(plan, [&](Work work) {
    kernels(type).normalize(plan, work, coefficients.forward(), dense.data_ptr(), nullptr, nullptr, output.data_ptr());
  });
  return output;
}

// ---- Backward ----

// One batch norm of a backward.
class NormBackward {
 public:
  NormBackward(const NormBackwardArguments& a, const NormGradients& grad, bool training, const Plan& plan,
               MemoryFormat format)
      : plan_(plan),
        kernel_(kernels(element_type(a.input))),
        training_(training),
        input_(as_format(a.input, format)),
        grad_input_(grad.input),
        grad_gamma_(grad.weight),
        grad_beta_(grad.bias),
        grad_dropped_(grad.input_bias),
        means_(static_cast<const double*>(a.statistics.data_ptr())),
        invstds_(means_ + plan.channels),
        coefficients_(plan.channels, element_type(a.input), PerChannel(a.weight, 1), PerChannel(a.bias, 0)),
        partial_(uninitialised<GradientSums>(plan.chunks * plan.channels)) {
    coefficients_.set(0, plan.channels, means_, invstds_);
  }

  // Sums, and writes the masked gradient where that is not nullptr.
  void reduce(Work work, GradientSource source, void* masked) {
    source.input = input_.data_ptr();
    kernel_.gradient_sums(plan_, work, coefficients_.forward(), source, masked, partial_.get());
  }

  void finish(int64_t begin, int64_t end) {
    const double n = static_cast<double>(input_.numel() / plan_.channels);
    double *sums = coefficients_.offset(), *dots = coefficients_.slope(), *gradient = coefficients_.scratch();
    std::fill(sums + begin, sums + end, 0), std::fill(dots + begin, dots + end, 0);
    for (int64_t index = 0; index < plan_.chunks; ++index) {
      const GradientSums* next = partial_.get() + index * plan_.channels;
      for (int64_t c = begin; c < end; ++c) sums[c] += next[c].sum, dots[c] += next[c].dot;
    }
    grad_beta_.write(begin, end, sums);
    // Batch statistics cancel a bias of the input, running ones let it through as they do the input.
    for (int64_t c = begin; c < end; ++c) gradient[c] = training_ ? 0 : sums[c] * coefficients_.scale()[c];
    grad_dropped_.write(begin, end, gradient);
    for (int64_t c = begin; c < end; ++c) {
      const double dropped = means_[c] - coefficients_.mean()[c];  // by the rounding of the mean, see CoefficientBuffer
      const double dot = dots[c] - dropped * sums[c], slope = dot * invstds_[c] * invstds_[c] / n;
      gradient[c] = dot * invstds_[c];
      coefficients_.slope()[c] = slope;
      coefficients_.offset()[c] = sums[c] / n - dropped * slope;
    }
    grad_gamma_.write(begin, end, gradient);
  }

  void apply(Work work, GradientSource source, void* grad_residual) {
    if (!grad_input_.defined()) return;
    source.input = input_.data_ptr();
    const Coefficients coefficients = training_ ? coefficients_.backward() : coefficients_.forward();
    kernel_.grad_input(plan_, work, coefficients, source, grad_input_.data_ptr(), grad_residual);
  }

 private:
  const Plan& plan_;
  const Kernels& kernel_;
  bool training_;
  Tensor input_, grad_input_;
  PerChannel grad_gamma_, grad_beta_, grad_dropped_;
  const double *means_, *invstds_;
  CoefficientBuffer coefficients_;
  std::unique_ptr<GradientSums[]> partial_;
};

BackwardResults Cpu::backward(const BackwardArguments& a) {
  a.check();
  const Tensor& input = a.input();
  STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  // The output itself: bits would save next to nothing here.
  if (a.mask != nullptr) check_like_input(*a.mask, "mask", input);
  const MemoryFormat format = memory_format(input);
  const BackwardResults grad(a, format);
  if (a.values() == 0) {
    const std::vector<double> zeros(a.channels());
    for (const NormGradients& of_norm : grad.norms) {
      for (const Tensor& vector : {of_norm.weight, of_norm.bias, of_norm.input_bias}) {
        PerChannel(vector).write(0, a.channels(), zeros.data());
      }
    }
    return grad;
  }

  const Plan plan = plan_of(input, format);
  std::vector<NormBackward> norms;
  norms.reserve(a.count);
  bool sums = a.training || a.need_residual;
  for (int i = 0; i < a.count; ++i) {
    sums |= a.norms[i].needed.sums();
    if (a.count == 2 && !a.norms[i].needed.any()) continue;
    norms.emplace_back(a.norms[i], grad.norms[i], a.training, plan, format);
  }

  const Tensor dy = as_format(a.grad_output, format), y = a.mask != nullptr ? as_format(*a.mask, format) : Tensor();
  const GradientSource source{dy.data_ptr(), nullptr, y.defined() ? y.data_ptr() : nullptr, nullptr};
  // The first pass leaves the gradient masked where it is the residual's gradient or, at last, that takes its place. Of
  // a block that streams it is the second pass, which finds all that masks it in the cache, and writes past that: the
  // backward of 32x64x56x56 took 7.8 ms in place of 10.6 on one core.
  const Tensor& to_residual = norms.size() == 2 ? grad.norms[1].input : grad.residual;
  const bool in_second =
      plan.streams && plan.group < plan.channels && a.training && norms.size() == 1 && grad.norms[0].input.defined();
  void* residual = sums && to_residual.defined() ? to_residual.data_ptr() : nullptr;
  void *masked = in_second ? nullptr : residual, *grad_residual = in_second ? residual : nullptr;
  GradientSource masked_source = source;
  masked_source.masked = masked;

  const auto reduce = [&](Work work) {
    for (NormBackward& norm : norms) {
      const bool is_first = &norm == &norms.front();
      norm.reduce(work, is_first ? source : masked_source, is_first ? masked : nullptr);
    }
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    for (NormBackward& norm : norms) norm.finish(begin, end);
  };
  const auto apply = [&](Work work) {
    for (NormBackward& norm : norms) norm.apply(work, masked_source, grad_residual);
  };
  if (sums) {
    for_each_chunk_twice(plan, reduce, finish, apply);
  } else {
    for_each_chunk(plan, apply);
  }
  return grad;
}

}  // namespace
}  // namespace resnet_fused

RESNET_FUSED_REGISTER(resnet_fused, CPU, resnet_fused::Cpu)
