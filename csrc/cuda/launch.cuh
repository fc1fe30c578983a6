// How kernels are launched, on a GPU and, for the tests, on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace resnet_fused::cuda {

// Launches kernel(arguments...) on `blocks` blocks, in one dimension; none where there are none.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 block, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("resnet_fused: a CUDA grid has at most 2^31 - 1 blocks, got " + std::to_string(blocks));
  }
  const unsigned grid = static_cast<unsigned>(blocks);
#ifdef RESNET_FUSED_CUDA_ON_CPU
  emulation::launch(grid, block, stream, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, 0, stream>>>(arguments...);
#endif
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("resnet_fused: the launch of a CUDA kernel failed: ") +
                             cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace resnet_fused::cuda
