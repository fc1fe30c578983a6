// What the ops get, what it must be, and the tensors they make: the part that every backend shares, on PyTorch's stable
// ABI.
//
// Everything is checked here, before any memory is touched; what a refusal means to the user is said in Python, with
// ValueError and TypeError (resnet_fused/checks.py), but only then: checking there first cost 8 us a call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "element_type.h"
#include "max_pool.h"

namespace resnet_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxDim = 64;  // of a PyTorch tensor

// ---- Layout ----

// Whether the strides order the dimensions as channels_last (or channels_last_3d) does; what
// Tensor::suggest_memory_format says, which the stable ABI lacks.
inline bool has_channels_last_strides(const Tensor& tensor) {
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

inline MemoryFormat memory_format(const Tensor& tensor) {
  if (tensor.is_contiguous() || !has_channels_last_strides(tensor)) return MemoryFormat::Contiguous;
  return tensor.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// The tensor itself where it is dense in that format, else a copy that is.
inline Tensor as_format(const Tensor& tensor, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return torch::stable::contiguous(tensor, format);
}

// A dense tensor as the kernels see it: outer * channels * inner elements, in that order.
struct Extents {
  int64_t outer, channels, inner;
};

inline Extents extents_of(const Tensor& input, MemoryFormat format) {
  const int64_t batch = input.size(0), channels = input.size(1), inner = input.numel() / (batch * channels);
  if (format == MemoryFormat::Contiguous) return {batch, channels, inner};
  return {batch * inner, channels, 1};
}

// ---- Types and devices ----

inline ElementType element_type(const Tensor& tensor) {
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

inline int32_t type_code(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

inline bool on_one_device(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cpu() ? other.is_cpu() : tensor.device() == other.device();
}

// ---- New tensors ----

// torch::stable::empty boxes, some 1.3 us a call and 5 of a backward's 18; this shim does not.
inline Tensor empty_strided(const Tensor& beside, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            int32_t type) {
  int32_t device_type = aoti_torch_device_type_cpu(), device_index = 0;
  if (!beside.is_cpu()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &device_index));
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type, device_type, device_index, &handle));
  return Tensor(handle);
}

// Of the output, and of its gradient: the input's, but where that is pooled.
inline std::array<int64_t, kMaxDim> output_sizes(const Tensor& input, const MaxPool* max_pool) {
  std::array<int64_t, kMaxDim> sizes;
  std::copy_n(input.sizes().begin(), input.dim(), sizes.begin());
  if (max_pool != nullptr) std::copy_n(max_pool->output, 2, sizes.begin() + 2);
  return sizes;
}

inline Tensor empty_like(const Tensor& input, MemoryFormat format, const MaxPool* max_pool = nullptr) {
  const int64_t dim = input.dim();
  const std::array<int64_t, kMaxDim> sizes = output_sizes(input, max_pool);
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
  return empty_strided(input, dim, sizes.data(), strides.data(), type_code(input));
}

// Dense.
inline Tensor empty_tensor(const Tensor& beside, std::initializer_list<int64_t> sizes, int32_t type) {
  std::array<int64_t, 3> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = stride, stride *= sizes.begin()[d];
  return empty_strided(beside, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), type);
}

// ---- Checks ----

inline void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2 && input.dim() <= kMaxDim && input.size(1) >= 1,
                  "input: expected (N, C, *) of 2 to ", kMaxDim, " dimensions with at least one channel");
  element_type(input);
}

// (C,), of the input's type, or float32 where that is a half type.
inline void check_vector(const OptionalTensor& vector, const char* prefix, const char* name, const Tensor& input) {
  if (!vector) return;
  const ScalarType type = vector->scalar_type(), expected = input.scalar_type();
  const bool half = expected == ScalarType::Half || expected == ScalarType::BFloat16;
  STD_TORCH_CHECK(type == expected || (half && type == ScalarType::Float), prefix, name,
                  ": expected the input's type, or float32 beside a half type");
  STD_TORCH_CHECK(on_one_device(*vector, input) && vector->dim() == 1 && vector->size(0) == input.size(1), prefix, name,
                  ": expected a tensor of shape (", input.size(1), ",) on the input's device");
}

inline void check_like_input(const Tensor& tensor, const char* name, const Tensor& input,
                             const MaxPool* max_pool = nullptr) {
  const auto sizes = tensor.sizes();
  const std::array<int64_t, kMaxDim> expected = output_sizes(input, max_pool);
  STD_TORCH_CHECK(
      on_one_device(tensor, input) && tensor.scalar_type() == input.scalar_type() && tensor.dim() == input.dim() &&
          std::equal(sizes.begin(), sizes.end(), expected.begin()),
      name, ": expected a tensor of the ",
      max_pool != nullptr ? "output's shape, and of the input's type and device" : "input's shape, type and device");
}

// ---- Arguments: those of csrc/ops.cpp, in its order ----

inline void check_statistics(const Tensor& statistics, const char* name, int64_t norms, const Tensor& input) {
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(on_one_device(statistics, input) && statistics.scalar_type() == ScalarType::Double &&
                      statistics.is_contiguous() && statistics.numel() == norms * 2 * channels,
                  name, ": expected a contiguous float64 tensor of shape (", norms, ", 2, ", channels,
                  ") on the input's device");
}

inline double* statistics_of(const Tensor& statistics, int norm, int64_t channels) {
  return static_cast<double*>(statistics.data_ptr()) + norm * 2 * channels;
}

// The pooling of what was rectified, of the numbers in MaxPool's order, that an op gets, if any.
inline std::optional<MaxPool> max_pool_of(const std::optional<std::vector<int64_t>>& numbers, const Tensor& input) {
  if (!numbers) return std::nullopt;
  STD_TORCH_CHECK(numbers->size() == 10 && input.dim() == 4, "max_pool: expected 10 numbers, and a 4d input");
  MaxPool max_pool;
  int64_t* of_axis[] = {max_pool.kernel, max_pool.stride, max_pool.padding, max_pool.dilation, max_pool.output};
  for (int i = 0; i < 10; ++i) of_axis[i / 2][i % 2] = (*numbers)[i];
  STD_TORCH_CHECK(max_pool.fits(input.size(2), input.size(3)), "max_pool: expected windows over the input, of at most ",
                  kNoWinner, " positions");
  for (int axis = 0; axis < 2; ++axis) {  // a single window's is no matter, and may be more than memory has room for
    if (max_pool.output[axis] == 1) max_pool.stride[axis] = 1;
  }
  return max_pool;
}

// One batch norm of a forward, of the input or of the residual.
struct NormArguments {
  const Tensor& input;
  const OptionalTensor &running_mean, &running_var, &weight, &bias;
  std::optional<double> momentum;
  double eps;
  const OptionalTensor &num_batches_tracked, &input_bias;

  // Refusals name the arguments with `prefix`. given: statistics are, and no others asked for.
  void check(bool training, bool given, const char* prefix) const {
    for (const auto& [vector, name] : {std::pair{&weight, "weight"},
                                       {&bias, "bias"},
                                       {&running_mean, "running_mean"},
                                       {&running_var, "running_var"},
                                       {&input_bias, "input_bias"}}) {
      check_vector(*vector, prefix, name, input);
    }
    STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), prefix, "running_mean, ", prefix,
                    "running_var: expected both or neither");
    STD_TORCH_CHECK(training || given || running_mean, prefix,
                    "running_mean: expected running statistics outside training");
    STD_TORCH_CHECK(training ? eps > 0 : eps >= 0, prefix,
                    "eps: expected more than 0 in training, and not less otherwise");
    STD_TORCH_CHECK(momentum || num_batches_tracked, prefix, "momentum: None needs num_batches_tracked");
    if (num_batches_tracked) {
      STD_TORCH_CHECK(on_one_device(*num_batches_tracked, input) && num_batches_tracked->numel() == 1 &&
                          num_batches_tracked->scalar_type() == ScalarType::Long,
                      prefix, "num_batches_tracked: expected one int64 on the input's device");
    }
  }
};

constexpr const char* kPrefixes[] = {"", "residual_"};  // of a first and a second batch norm's arguments

struct ForwardArguments {
  const NormArguments* norms;  // of the input and, in a second one, of the residual
  int count;                   // of norms
  const OptionalTensor& residual;
  bool training, need_mask;
  const OptionalTensor& statistics;  // given, to normalise by
  const MaxPool* max_pool;           // of what is rectified, or nullptr

  const Tensor& input() const { return norms[0].input; }
  int64_t channels() const { return input().size(1); }
  int64_t values() const { return input().numel() / channels(); }  // per channel
  bool takes_batch() const { return training && !statistics; }     // its statistics, to normalise by and to keep

  void check() const {
    check_input(input());
    if (residual) check_like_input(*residual, "residual", input());
    STD_TORCH_CHECK(!max_pool || !residual, "residual: expected none before max_pool");
    if (statistics) check_statistics(*statistics, "statistics", count, input());
    for (int i = 0; i < count; ++i) norms[i].check(training, statistics.has_value(), kPrefixes[i]);
    STD_TORCH_CHECK(!training || values() != 1, "input: expected more than one value per channel in training");
    if (!training || count < 2) return;
    const auto share = [](const OptionalTensor& first, const OptionalTensor& second) {
      return first && second && first->data_ptr() == second->data_ptr();
    };
    STD_TORCH_CHECK(!share(norms[0].running_mean, norms[1].running_mean) &&
                        !share(norms[0].running_var, norms[1].running_var) &&
                        !share(norms[0].num_batches_tracked, norms[1].num_batches_tracked),
                    "residual_running_mean: expected running statistics and a counter of its own");
  }
};

struct ForwardResults {
  Tensor output, mask, statistics;

  ForwardResults(const ForwardArguments& a, MemoryFormat format)
      : output(empty_like(a.input(), format, a.max_pool)),
        statistics(a.statistics ? *a.statistics
                                : empty_tensor(a.input(), {a.count, 2, a.channels()}, aoti_torch_dtype_float64())) {}
};

struct Needed {
  bool input, weight, bias, input_bias;

  bool sums() const { return weight || bias || input_bias; }
  bool any() const { return input || sums(); }
};

// One batch norm of a backward.
struct NormBackwardArguments {
  const Tensor& input;
  const OptionalTensor &weight, &bias, &input_bias;
  Needed needed;

  void check(const char* prefix) const {
    check_vector(weight, prefix, "weight", input);
    check_vector(bias, prefix, "bias", input);
    check_vector(input_bias, prefix, "input_bias", input);
  }
};

struct BackwardArguments {
  const Tensor &grad_output, &mask, &statistics;
  const NormBackwardArguments* norms;
  int count;
  bool training, need_residual;      // need_residual: of one that was added as it is
  const OptionalTensor& grad_means;  // given
  const MaxPool* max_pool;           // or nullptr

  const Tensor& input() const { return norms[0].input; }
  int64_t channels() const { return input().size(1); }
  int64_t values() const { return input().numel() / channels(); }
  // Whether the sums of the gradients are to be taken, for batch norm `i`.
  bool takes_sums(int i) const { return norms[i].needed.sums() || (training && norms[i].needed.input && !grad_means); }

  void check() const {
    check_input(input());
    check_like_input(grad_output, "grad_output", input(), max_pool);
    STD_TORCH_CHECK(!max_pool || (count == 1 && !need_residual), "residual: expected none before max_pool");
    check_statistics(statistics, "statistics", count, input());
    if (grad_means) check_statistics(*grad_means, "grad_means", count, input());
    if (count == 2) check_like_input(norms[1].input, "residual", input());
    for (int i = 0; i < count; ++i) {
      norms[i].check(kPrefixes[i]);
      STD_TORCH_CHECK(!grad_means || !norms[i].needed.sums(), "grad_means: the gradients of vectors come without");
    }
  }
};

// Of a shape that depends on the backend: rows of bits, the dense input's as a matrix of so many rows; or the winners.
inline const uint8_t* check_mask(const BackwardArguments& a, int64_t rows, int64_t bytes) {
  STD_TORCH_CHECK(on_one_device(a.mask, a.input()) && a.mask.scalar_type() == ScalarType::Byte &&
                      a.mask.is_contiguous() && a.mask.numel() == rows * bytes,
                  "mask: expected a contiguous uint8 tensor of shape (", rows, ", ", bytes, ") on the input's device");
  return static_cast<const uint8_t*>(a.mask.data_ptr());
}

// The gradients of one batch norm that are asked for, to be written.
struct NormGradients {
  Tensor input, weight, bias, input_bias;

  NormGradients() = default;
  NormGradients(const NormBackwardArguments& a, MemoryFormat format)
      : input(a.needed.input ? empty_like(a.input, format) : Tensor()),
        weight(vector(a, a.needed.weight, a.weight)),
        bias(vector(a, a.needed.bias, a.bias)),
        input_bias(vector(a, a.needed.input_bias, a.input_bias)) {}

 private:
  static Tensor vector(const NormBackwardArguments& a, bool need, const OptionalTensor& parameter) {
    if (!need) return Tensor();
    return empty_tensor(a.input, {a.input.size(1)}, parameter ? type_code(*parameter) : aoti_torch_dtype_float64());
  }
};

struct BackwardResults {
  Tensor residual;  // of one that was added as it is
  std::array<NormGradients, 2> norms;

  BackwardResults(const BackwardArguments& a, MemoryFormat format) {
    if (a.need_residual) residual = empty_like(a.input(), format);
    for (int i = 0; i < a.count; ++i) norms[i] = NormGradients(a.norms[i], format);
  }
};

// ---- The ops of a backend, which has forward and backward ----

template <typename Backend>
struct Ops {
  using Momentum = std::optional<double>;

  static std::tuple<Tensor, Tensor, Tensor> forward(
      Tensor input, OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias,
      Momentum momentum, double eps, OptionalTensor num_batches_tracked, OptionalTensor input_bias, bool training,
      bool need_mask, OptionalTensor residual, OptionalTensor residual_running_mean,
      OptionalTensor residual_running_var, OptionalTensor residual_weight, OptionalTensor residual_bias,
      Momentum residual_momentum, std::optional<double> residual_eps, OptionalTensor residual_num_batches_tracked,
      OptionalTensor residual_input_bias, OptionalTensor statistics, std::optional<std::vector<int64_t>> max_pool) {
    STD_TORCH_CHECK(residual || !residual_eps, "residual: expected the tensor that residual_eps is for");
    const NormArguments norms[] = {
        {input, running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked, input_bias},
        {residual ? *residual : input, residual_running_mean, residual_running_var, residual_weight, residual_bias,
         residual_momentum, residual_eps.value_or(0), residual_num_batches_tracked, residual_input_bias}};
    const std::optional<MaxPool> windows = max_pool_of(max_pool, input);
    const ForwardResults results = Backend::forward(
        {norms, residual_eps ? 2 : 1, residual, training, need_mask, statistics, windows ? &*windows : nullptr});
    return {results.output, results.mask, statistics ? Tensor() : results.statistics};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      Tensor grad_output, Tensor mask, Tensor statistics, bool training, Tensor input, OptionalTensor weight,
      OptionalTensor bias, OptionalTensor input_bias, bool need_input, bool need_weight, bool need_bias,
      bool need_input_bias, bool need_residual, OptionalTensor residual, OptionalTensor residual_weight,
      OptionalTensor residual_bias, OptionalTensor residual_input_bias, bool need_residual_weight,
      bool need_residual_bias, bool need_residual_input_bias, OptionalTensor grad_means,
      std::optional<std::vector<int64_t>> max_pool) {
    const NormBackwardArguments norms[] = {
        {input, weight, bias, input_bias, {need_input, need_weight, need_bias, need_input_bias}},
        {residual ? *residual : input,
         residual_weight,
         residual_bias,
         residual_input_bias,
         {need_residual, need_residual_weight, need_residual_bias, need_residual_input_bias}}};
    const std::optional<MaxPool> windows = max_pool_of(max_pool, input);
    const BackwardResults grad =
        Backend::backward({grad_output, mask, statistics, norms, residual ? 2 : 1, training, !residual && need_residual,
                           grad_means, windows ? &*windows : nullptr});
    const auto& [first, second] = grad.norms;
    return {first.input,   first.weight, first.bias,       first.input_bias, residual ? second.input : grad.residual,
            second.weight, second.bias,  second.input_bias};
  }

  static Tensor statistics(Tensor input, double eps) {
    check_input(input);
    const OptionalTensor none;
    return Backend::statistics({input, none, none, none, none, /*momentum=*/0.0, eps, none, none});
  }
};

}  // namespace resnet_fused

// At namespace scope: Backend's ops for one dispatch key of a library.
#define RESNET_FUSED_REGISTER(library, key, Backend)                                          \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                \
    m.impl("batch_norm_add_relu", TORCH_BOX(&resnet_fused::Ops<Backend>::forward));           \
    m.impl("batch_norm_add_relu_backward", TORCH_BOX(&resnet_fused::Ops<Backend>::backward)); \
    m.impl("batch_norm_statistics", TORCH_BOX(&resnet_fused::Ops<Backend>::statistics));      \
  }
