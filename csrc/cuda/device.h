// The device that a call runs on, and the stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "../arguments.h"
#include "error.h"
#include "kernels.h"

namespace resnet_fused::cuda {

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
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "cudaDeviceGetAttribute");
    return count;
  }

  void zero(const Tensor& tensor) const {
    const size_t bytes = tensor.numel() * tensor.element_size();
    check(cudaMemsetAsync(tensor.data_ptr(), 0, bytes, stream_), "cudaMemsetAsync");
  }

  // `count` zeros for a launch, which leaves them as zeros; the same at every call. A stream has some of its own, as
  // its launches run one after another. Those of a graph may be replayed beside any: there, and where the stream's do
  // not suffice, a tensor is zeroed, by a launch more, that lives as long as this object.
  unsigned* zeros(int64_t count) {
    cudaStreamCaptureStatus capture;
    check(cudaStreamIsCapturing(stream_, &capture), "cudaStreamIsCapturing");
    if (count <= kSemaphores && capture == cudaStreamCaptureStatusNone) {
      if (unsigned* const of_stream = semaphores_of_stream()) return of_stream;
    }
    if (!zeros_.defined()) {
      zeros_ = empty_tensor(input_, {count}, aoti_torch_dtype_int32());
      zero(zeros_);
    }
    return static_cast<unsigned*>(zeros_.data_ptr());
  }

 private:
  // Or nullptr where earlier streams have taken all. By the stream's id: another one gets its handle once it is
  // destroyed, and per-thread default streams have the same.
  unsigned* semaphores_of_stream() const {
    static std::mutex mutex;
    static auto* const devices = new std::map<int32_t, std::map<unsigned long long, unsigned*>>;  // never destroyed
    unsigned long long id;
    check(cudaStreamGetId(stream_, &id), "cudaStreamGetId");
    const std::lock_guard<std::mutex> lock(mutex);
    auto& streams = (*devices)[index_];
    const auto found = streams.find(id);
    if (found != streams.end()) return found->second;
    if (streams.size() == kStreams) return nullptr;
    return streams.emplace(id, semaphores(streams.size())).first->second;
  }

  const Tensor& input_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  Tensor zeros_;
};

}  // namespace resnet_fused::cuda
