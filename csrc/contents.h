// What memory held, to see whether somebody has written to it since: NumPy, .data and other processes count no version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace resnet_fused {

class Contents {
 public:
  // Address, sizes, strides and bytes of an element; in the last dimension elements are adjacent. The memory must
  // outlive the object.
  using Tensor = std::tuple<std::uintptr_t, std::vector<std::int64_t>, std::vector<std::int64_t>, std::int64_t>;

  explicit Contents(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    for_each_run([&](const char* run, std::size_t bytes) {
      copy_.insert(copy_.end(), run, run + bytes);
      return true;
    });
  }

  bool holds() const {
    const char* copy = copy_.data();
    return for_each_run([&](const char* run, std::size_t bytes) {
      const bool is_equal = std::memcmp(run, copy, bytes) == 0;
      copy += bytes;
      return is_equal;
    });
  }

  std::size_t nbytes() const { return copy_.size(); }

 private:
  // Until `f` of a run says no; returns whether none did.
  template <typename F>
  bool for_each_run(const F& f) const {
    for (const Tensor& tensor : tensors_) {
      if (!for_each_run(tensor, 0, std::get<0>(tensor), f)) return false;
    }
    return true;
  }

  template <typename F>
  static bool for_each_run(const Tensor& tensor, std::size_t dimension, std::uintptr_t address, const F& f) {
    const auto& [_, sizes, strides, element] = tensor;
    if (dimension + 1 == sizes.size()) return f(reinterpret_cast<const char*>(address), sizes.back() * element);
    for (std::int64_t i = 0; i < sizes[dimension]; ++i) {
      if (!for_each_run(tensor, dimension + 1, address + i * strides[dimension] * element, f)) return false;
    }
    return true;
  }

  std::vector<Tensor> tensors_;
  std::vector<char> copy_;
};

}  // namespace resnet_fused
