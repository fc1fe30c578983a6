// The part of CUDA that the kernels use, on the CPU.
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

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
