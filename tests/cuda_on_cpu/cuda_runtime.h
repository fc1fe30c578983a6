// The part of CUDA that the kernels and the glue use, on the CPU.
#pragma once

#include <math.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // launches take turns
#define __grid_constant__

inline void __syncthreads() { emulation::syncthreads(); }
inline void __threadfence() { emulation::threadfence(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::syncwarp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate != 0); }

// As in CUDA, where the overloads begin at int, a bool or a short is promoted.
template <typename T, typename Promoted = decltype(+T())>
Promoted __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulation::shuffle<Promoted>(emulation::Operation::shuffle, mask, value, lane, width);
}
template <typename T, typename Promoted = decltype(+T())>
Promoted __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle<Promoted>(emulation::Operation::shuffle_down, mask, value, static_cast<int>(delta), width);
}
template <typename T, typename Promoted = decltype(+T())>
Promoted __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulation::shuffle<Promoted>(emulation::Operation::shuffle_xor, mask, value, lane_mask, width);
}

inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline double rsqrt(double value) { return 1 / sqrt(value); }

inline cudaError_t cudaGetLastError() { return emulation::take_last_error(); }
inline const char* cudaGetErrorName(cudaError_t error) { return emulation::name_of(error); }
inline const char* cudaGetErrorString(cudaError_t) { return "as the emulation was told"; }

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id);

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  emulation::memset(data, value, bytes, stream);
  return cudaGetLastError();
}
template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, const T& symbol) {
  *address = emulation::symbol_on_device(&symbol, sizeof(symbol), emulation::current_device());
  return cudaSuccess;
}
