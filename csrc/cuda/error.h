// Errors of CUDA's runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace resnet_fused::cuda {

struct Error : std::runtime_error {
  Error(cudaError_t code, const std::string& what)
      : std::runtime_error(what + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code)), code(code) {}
  cudaError_t code;
};

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw Error(code, what);
}

}  // namespace resnet_fused::cuda
