// The device that a call runs on, and the stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <string>

#include "../arguments.h"

namespace resnet_fused::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "resnet_fused: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// The input's device, made the current one for the object's life.
class Device {
 public:
  explicit Device(const Tensor& input) : input_(input), index_(input.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(input.is_cuda(), "input: expected a CUDA tensor");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  void zero(const Tensor& tensor) const {
    check(cudaMemsetAsync(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size(), stream_));
  }

  // `count` zeros that kernels leave as zeros. One buffer a stream, where kernels run one after another, and one of its
  // own for each capture of a graph, which may be replayed beside anything: zeroed in the graph, where it is first
  // needed, and in the graph's memory pool.
  unsigned* zeros(int64_t count) const {
    struct Buffer {
      Tensor tensor;
      unsigned long long capture;  // 0: none
    };
    static std::mutex mutex;
    static auto* buffers = new std::map<std::pair<int32_t, cudaStream_t>, Buffer>;  // outlives the CUDA context

    cudaStreamCaptureStatus status;
    unsigned long long capture = 0;
    check(cudaStreamGetCaptureInfo(stream_, &status, &capture));
    if (status != cudaStreamCaptureStatusActive) capture = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    Buffer& buffer = (*buffers)[{index_, stream_}];
    if (!buffer.tensor.defined() || buffer.tensor.numel() < count || buffer.capture != capture) {
      constexpr int64_t kLeast = 4096;  // channels of every ResNet
      buffer.tensor = empty_vector(input_, count < kLeast ? kLeast : count, aoti_torch_dtype_int32());
      zero(buffer.tensor);
      buffer.capture = capture;
    }
    return static_cast<unsigned*>(buffer.tensor.data_ptr());
  }

 private:
  const Tensor& input_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace resnet_fused::cuda
