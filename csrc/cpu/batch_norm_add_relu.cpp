// relu(batch_norm(input) [+ residual, or + batch_norm(residual)]) on the CPU: tensors in, kernels called, tensors out.
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
  static Tensor statistics(const NormArguments&);
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

// Calls f(Work) for every chunk, of so many, of every block, shared among the threads.
template <typename F>
void for_each_chunk(const Plan& plan, int64_t chunks, const F& f) {
  const int64_t total = plan.blocks * chunks;
  torch::stable::parallel_for(0, total, is_small(plan) ? total : 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // a block's part of the range at a time
      const int64_t block = begin / chunks, first = begin % chunks;
      const int64_t last = std::min(chunks, first + end - begin);
      f(Work{block, first, last});
      begin += last - first;
    }
  });
}

// Runs reduce over every chunk of a channel, then finish for the channel, then apply over its `applied` chunks, which
// may be others. With a block or more per thread a thread takes its blocks through all three, one by one, while they
// are in its cache; else the threads share the chunks, and meet in between.
template <typename Reduce, typename Finish, typename Apply>
void for_each_chunk_twice(const Plan& plan, int64_t applied, const Reduce& reduce, const Finish& finish,
                          const Apply& apply) {
  if (is_small(plan) || plan.blocks >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, plan.blocks, is_small(plan) ? plan.blocks : 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        reduce(Work{block, 0, plan.chunks});
        finish(plan.block_begin(block), plan.block_end(block));
        apply(Work{block, 0, applied});
      }
    });
  } else {
    for_each_chunk(plan, plan.chunks, reduce);
    finish(0, plan.channels);
    for_each_chunk(plan, applied, apply);
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
  double* slope() { return values_.get() + 3 * channels_; }
  double* offset() { return values_.get() + 4 * channels_; }
  double* scratch() { return values_.get() + 5 * channels_; }
  Coefficients get() { return {mean(), scale(), shift(), slope(), offset()}; }

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

// ---- Max pooling ----

PooledRows pooled_rows(const MaxPool& windows, const Tensor& input, MemoryFormat format) {
  return {windows, input.size(1), input.size(2), input.size(3), format != MemoryFormat::Contiguous};
}

// Of a pixel, in the kernels.
int64_t values_of(const PooledRows& rows, const Plan& plan) { return rows.channels_last ? plan.group : 1; }

// The gradient of what was pooled, a chunk at a time, made when it is asked for: its pass over memory costs more.
class Unpooled {
 public:
  Unpooled(const Plan& plan, const PooledRows& rows, const Tensor& grad_output, const uint8_t* winners)
      : plan_(plan),
        rows_(rows),
        grad_output_(grad_output),
        winners_(winners),
        size_(static_cast<int64_t>(grad_output.element_size())),
        scratch_(uninitialised<char>(rows.backward_scratch(values_of(rows, plan), size_))) {}

  // In a tensor and a mask of which only the chunk is there.
  Gradient of_chunk(int64_t block, int64_t index) {
    const Plan::Chunk chunk = plan_.chunk(index);
    const int64_t channel = plan_.block_begin(block), last_channel = plan_.block_end(block) - 1;
    const int64_t outer = chunk.outer_begin, last_outer = chunk.outer_end - 1;
    const int64_t inner = chunk.inner_begin, last_inner = chunk.inner_end - 1;
    const int64_t first = plan_.offset(outer, channel, inner);
    const int64_t first_byte = plan_.mask_offset(outer, channel, inner);
    const auto grow = [](auto& buffer, int64_t size, auto value) {
      if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size, value);
    };
    grow(gradient_, (plan_.offset(last_outer, last_channel, last_inner) + 1 - first) * size_, '\0');
    grow(passes_, plan_.mask_offset(last_outer, last_channel, last_inner) + 8 - first_byte, uint8_t{0xff});
    char* const gradient = gradient_.data() - first * size_;
    kernels(element_type(grad_output_))
        .max_unpool(plan_, rows_, block, (outer * plan_.inner + inner) / rows_.width,
                    (last_outer * plan_.inner + last_inner + 1) / rows_.width, grad_output_.data_ptr(), winners_,
                    gradient, scratch_.get());
    return {gradient, passes_.data() - first_byte};
  }

 private:
  const Plan& plan_;
  const PooledRows& rows_;
  const Tensor& grad_output_;
  const uint8_t* winners_;
  int64_t size_;
  std::unique_ptr<char[]> scratch_;
  std::vector<char> gradient_;
  std::vector<uint8_t> passes_;
};

// ---- Forward ----

// Joins the moments of the chunks, in their order, to the mean and the sum of squared deviations from it, m2, of
// channels [begin, end). Chunk by chunk, so that these loops are over channels.
void join_moments(const Plan& plan, const Moments* partial, int64_t begin, int64_t end, double* mean, double* m2) {
  const double inverse = 1 / static_cast<double>(plan.outer * plan.inner);
  std::fill(mean + begin, mean + end, 0), std::fill(m2 + begin, m2 + end, 0);
  for (int64_t index = 0; index < plan.chunks; ++index) {
    const Moments* next = partial + index * plan.channels;
    const double count = static_cast<double>(plan.chunk(index).count());
    for (int64_t c = begin; c < end; ++c) mean[c] += (next[c].sum + count * next[c].origin) * inverse;
  }
  for (int64_t index = 0; index < plan.chunks; ++index) {
    const Moments* next = partial + index * plan.channels;
    const double count = static_cast<double>(plan.chunk(index).count());
    for (int64_t c = begin; c < end; ++c) {
      const double shift = next[c].origin - mean[c];
      m2[c] += next[c].square + shift * (2 * next[c].sum + count * shift);
    }
  }
}

// One batch norm of a forward.
class NormForward {
 public:
  NormForward(const NormArguments& a, const Tensor& input, double* statistics, bool takes_batch, const Plan& plan)
      : a_(a),
        input_(input),
        plan_(plan),
        kernel_(kernels(element_type(input))),
        means_(statistics),
        invstds_(means_ + plan.channels),
        running_means_(a.running_mean, 0),
        running_vars_(a.running_var, 1),
        dropped_bias_(a.input_bias, 0),
        coefficients_(plan.channels, element_type(input), PerChannel(a.weight, 1), PerChannel(a.bias, 0)),
        partial_(uninitialised<Moments>(takes_batch ? plan.chunks * plan.channels : 0)) {}

  const void* input() const { return input_.data_ptr(); }
  Coefficients coefficients() { return coefficients_.get(); }

  void take_given_statistics() { coefficients_.set(0, plan_.channels, means_, invstds_); }

  void take_running_statistics() {
    double* dropped = coefficients_.scratch();
    dropped_bias_.read(0, plan_.channels, dropped);
    running_means_.read(0, plan_.channels, means_);
    running_vars_.read(0, plan_.channels, invstds_);
    for (int64_t c = 0; c < plan_.channels; ++c) means_[c] -= dropped[c];
    set_coefficients(0, plan_.channels, invstds_);
  }

  void reduce(Work work) const { kernel_.moments(plan_, work, input(), partial_.get()); }

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
  Tensor input_;
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
  ForwardResults results(a, format);
  const auto count_batch = [&] {  // last: no allocation that fails may leave it counted
    for (int i = 0; i < a.count; ++i) {
      if (a.takes_batch() && a.norms[i].num_batches_tracked) ++*counter_of(a.norms[i]);
    }
  };
  if (a.values() == 0) {  // nothing to normalise: the statistics that come back are never used
    if (!a.statistics) std::fill_n(statistics_of(results.statistics, 0, 0), a.count * 2 * a.channels(), 0);
    if (a.need_mask) results.mask = empty_tensor(input, {a.max_pool ? 0 : 1, 0}, aoti_torch_dtype_uint8());
    count_batch();
    return results;
  }
  const Plan plan = plan_of(input, format);
  if (a.need_mask) {
    const int64_t rows = a.max_pool ? input.size(0) : plan.mask_rows();
    const int64_t bytes = a.max_pool ? results.output.numel() / rows : plan.mask_row_bytes();
    results.mask = empty_tensor(input, {rows, bytes}, aoti_torch_dtype_uint8());
  }
  std::vector<NormForward> norms;
  norms.reserve(a.count);
  for (int i = 0; i < a.count; ++i) {
    norms.emplace_back(a.norms[i], as_format(a.norms[i].input, format),
                       statistics_of(results.statistics, i, a.channels()), a.takes_batch(), plan);
  }
  const Tensor added = a.residual && a.count == 1 ? as_format(*a.residual, format) : Tensor();
  const void* residual = a.count == 2 ? norms[1].input() : added.defined() ? added.data_ptr() : nullptr;
  uint8_t* mask = a.need_mask ? static_cast<uint8_t*>(results.mask.data_ptr()) : nullptr;

  const Kernels& kernel = kernels(element_type(input));
  void* output = results.output.data_ptr();
  const PooledRows rows = a.max_pool ? pooled_rows(*a.max_pool, input, format) : PooledRows{};
  const int64_t chunks = a.max_pool ? a.max_pool->output[0] * input.size(0) : plan.chunks;  // rows of windows
  const auto normalize = [&](Work work) {
    const Coefficients of_residual = norms.back().coefficients();
    if (a.max_pool == nullptr) {
      kernel.normalize(plan, work, norms[0].coefficients(), norms[0].input(), residual,
                       a.count == 2 ? &of_residual : nullptr, output, mask);
    } else {
      const auto scratch = uninitialised<char>(rows.forward_scratch(values_of(rows, plan), input.element_size()));
      kernel.normalize_max_pool(plan, rows, work.block, work.chunk_begin, work.chunk_end, norms[0].coefficients(),
                                norms[0].input(), output, mask, scratch.get());
    }
  };
  if (!a.takes_batch()) {
    for (NormForward& norm : norms) a.statistics ? norm.take_given_statistics() : norm.take_running_statistics();
    for_each_chunk(plan, chunks, normalize);
    return results;
  }
  const auto reduce = [&](Work work) {
    for (const NormForward& norm : norms) norm.reduce(work);
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    for (NormForward& norm : norms) norm.finish(begin, end);
  };
  count_batch();
  for_each_chunk_twice(plan, chunks, reduce, finish, normalize);
  return results;
}

Tensor Cpu::statistics(const NormArguments& a) {
  STD_TORCH_CHECK(a.input.is_cpu(), "input: expected a CPU tensor");
  const int64_t channels = a.input.size(1);
  const Tensor statistics = empty_tensor(a.input, {2, channels}, aoti_torch_dtype_float64());
  if (a.input.numel() == 0) {
    std::fill_n(statistics_of(statistics, 0, channels), 2 * channels, 0);
    return statistics;
  }
  const MemoryFormat format = memory_format(a.input);
  const Plan plan = plan_of(a.input, format);
  NormForward norm(a, as_format(a.input, format), statistics_of(statistics, 0, channels), true, plan);
  for_each_chunk(plan, plan.chunks, [&](Work work) { norm.reduce(work); });
  norm.finish(0, channels);
  return statistics;
}

// ---- Backward ----

// One batch norm of a backward.
class NormBackward {
 public:
  // grad_residual: of one that was added as it is, or nullptr.
  NormBackward(const NormBackwardArguments& a, const double* statistics, const NormGradients& grad, void* grad_residual,
               bool training, const Plan& plan, MemoryFormat format)
      : plan_(plan),
        kernel_(kernels(element_type(a.input))),
        training_(training),
        input_(as_format(a.input, format)),
        grad_input_(grad.input.defined() ? grad.input.data_ptr() : nullptr),
        grad_residual_(grad_residual),
        grad_gamma_(grad.weight),
        grad_beta_(grad.bias),
        grad_dropped_(grad.input_bias),
        means_(statistics),
        invstds_(means_ + plan.channels),
        coefficients_(plan.channels, element_type(a.input), PerChannel(a.weight, 1), PerChannel(a.bias, 0)),
        partial_(uninitialised<Sums>(plan.chunks * plan.channels)) {
    coefficients_.set(0, plan.channels, means_, invstds_);
  }

  void reduce(Work work, const Gradient& gradient) {
    kernel_.gradient_sums(plan_, work, coefficients_.get(), gradient, input_.data_ptr(), partial_.get());
  }

  void finish(int64_t begin, int64_t end) {
    const double n = static_cast<double>(input_.numel() / plan_.channels);
    double *sums = coefficients_.offset(), *dots = coefficients_.slope(), *gradient = coefficients_.scratch();
    std::fill(sums + begin, sums + end, 0), std::fill(dots + begin, dots + end, 0);
    for (int64_t index = 0; index < plan_.chunks; ++index) {
      const Sums* next = partial_.get() + index * plan_.channels;
      for (int64_t c = begin; c < end; ++c) sums[c] += next[c].first, dots[c] += next[c].second;
    }
    grad_beta_.write(begin, end, sums);
    // Batch statistics cancel a bias of the input, running ones let it through as they do the input.
    for (int64_t c = begin; c < end; ++c) gradient[c] = training_ ? 0 : sums[c] * coefficients_.scale()[c];
    grad_dropped_.write(begin, end, gradient);
    for (int64_t c = begin; c < end; ++c) {
      gradient[c] = (dots[c] - dropped(c) * sums[c]) * invstds_[c];
      project(c, sums[c] / n, gradient[c] / n);
    }
    grad_gamma_.write(begin, end, gradient);
  }

  // By the means of g and of g * (input - mean) * invstd of all channels.
  void take_given_means(const double* means) {
    for (int64_t c = 0; c < plan_.channels; ++c) project(c, means[c], means[plan_.channels + c]);
  }

  void apply(Work work, const Gradient& gradient) {
    if (grad_input_ == nullptr && grad_residual_ == nullptr) return;
    Coefficients coefficients = coefficients_.get();
    if (!training_) coefficients.slope = coefficients.offset = nullptr;
    kernel_.input_gradient(plan_, work, coefficients, gradient, input_.data_ptr(), grad_input_, grad_residual_);
  }

 private:
  // What rounding takes from the mean, see CoefficientBuffer.
  double dropped(int64_t c) { return means_[c] - coefficients_.mean()[c]; }

  // What batch statistics take from the input's gradient.
  void project(int64_t c, double mean, double dot) {
    const double slope = dot * invstds_[c], scale = coefficients_.scale()[c];
    coefficients_.slope()[c] = -slope * scale;
    coefficients_.offset()[c] = (dropped(c) * slope - mean) * scale;
  }

  const Plan& plan_;
  const Kernels& kernel_;
  bool training_;
  Tensor input_;
  void *grad_input_, *grad_residual_;
  PerChannel grad_gamma_, grad_beta_, grad_dropped_;
  const double *means_, *invstds_;
  CoefficientBuffer coefficients_;
  std::unique_ptr<Sums[]> partial_;
};

BackwardResults Cpu::backward(const BackwardArguments& a) {
  a.check();
  const Tensor& input = a.input();
  STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  const MemoryFormat format = memory_format(input);
  if (a.values() == 0) {
    const BackwardResults grad(a, format);
    const std::vector<double> zeros(a.channels());
    for (const NormGradients& of_norm : grad.norms) {
      for (const Tensor& vector : {of_norm.weight, of_norm.bias, of_norm.input_bias}) {
        PerChannel(vector).write(0, a.channels(), zeros.data());
      }
    }
    return grad;
  }
  Plan plan = plan_of(input, format);
  const uint8_t* mask = a.max_pool ? check_mask(a, input.size(0), a.grad_output.numel() / input.size(0))
                                   : check_mask(a, plan.mask_rows(), plan.mask_row_bytes());
  const PooledRows rows = a.max_pool ? pooled_rows(*a.max_pool, input, format) : PooledRows{};
  if (a.max_pool) plan = of_whole_rows(plan, rows.width, rows.channels_last);
  const BackwardResults grad(a, format);
  std::vector<NormBackward> norms;
  norms.reserve(a.count);
  bool sums = false;
  for (int i = 0; i < a.count; ++i) {
    const Needed& needed = a.norms[i].needed;
    void* residual = i == 0 && a.need_residual ? grad.residual.data_ptr() : nullptr;
    if (!needed.any() && residual == nullptr) continue;
    sums |= a.takes_sums(i);
    norms.emplace_back(a.norms[i], statistics_of(a.statistics, i, a.channels()), grad.norms[i], residual, a.training,
                       plan, format);
    if (a.grad_means) norms.back().take_given_means(statistics_of(*a.grad_means, i, a.channels()));
  }

  const Tensor dy = as_format(a.grad_output, format);
  const auto with_gradient = [&](Work work, const auto& f) {  // f(Work, Gradient)
    if (a.max_pool == nullptr) return f(work, Gradient{dy.data_ptr(), mask});
    Unpooled unpooled(plan, rows, dy, mask);
    for (int64_t index = work.chunk_begin; index < work.chunk_end; ++index) {
      f(Work{work.block, index, index + 1}, unpooled.of_chunk(work.block, index));
    }
  };
  const auto reduce = [&](Work work) {
    with_gradient(work, [&](Work part, const Gradient& gradient) {
      for (NormBackward& norm : norms) norm.reduce(part, gradient);
    });
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    for (NormBackward& norm : norms) norm.finish(begin, end);
  };
  const auto apply = [&](Work work) {
    with_gradient(work, [&](Work part, const Gradient& gradient) {
      for (NormBackward& norm : norms) norm.apply(part, gradient);
    });
  };
  if (sums) {
    for_each_chunk_twice(plan, plan.chunks, reduce, finish, apply);
  } else {
    for_each_chunk(plan, plan.chunks, apply);
  }
  return grad;
}

}  // namespace
}  // namespace resnet_fused

RESNET_FUSED_REGISTER(resnet_fused, CPU, resnet_fused::Cpu)
