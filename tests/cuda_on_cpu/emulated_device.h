// Of csrc/cuda/device.h, for tensors on a CPU.
#pragma once

#include <mutex>
#include <vector>

#include "emulator.h"

namespace resnet_fused::cuda {

inline int multiprocessors_of_emulation = 1;

class Device {
 public:
  explicit Device(const Tensor& input) : lock_(mutex()) {
    STD_TORCH_CHECK(input.is_cpu(), "input: expected a CPU tensor");
  }
  ~Device() { emulation::forget(); }  // after an error

  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return multiprocessors_of_emulation; }

  unsigned* zeros(int64_t count) const {
    static std::vector<unsigned> buffer;
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
    return buffer.data();
  }

  void expect_written(const Tensor& tensor) const {
    emulation::expect_written(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  }
  void check_written() const { emulation::check_written(); }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }

  std::lock_guard<std::mutex> lock_;  // one call at a time: the buffers are nobody's stream's
};

}  // namespace resnet_fused::cuda
