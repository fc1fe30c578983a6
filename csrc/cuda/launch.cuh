// How kernels are launched, on a GPU and, for the tests, on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <string>

#include "error.h"

namespace resnet_fused::cuda {

// Launches kernel(arguments...) on `blocks` blocks, in one dimension; none where there are none.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 block, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    throw Error(cudaErrorInvalidConfiguration,
                "a launch of " + std::to_string(blocks) + " blocks, of at most 2^31 - 1");
  }
  const unsigned grid = static_cast<unsigned>(blocks);
#ifdef RESNET_FUSED_CUDA_ON_CPU
  emulation::launch(grid, block, stream, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, 0, stream>>>(arguments...);
#endif
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw Error(error, "a launch of " + std::to_string(grid) + " blocks of " + std::to_string(block.x) + " x " +
                           std::to_string(block.y) + " threads");
  }
}

}  // namespace resnet_fused::cuda
