// Runs CUDA kernels on the CPU, and fails loudly where a GPU would give wrong results now and then.
//
// Every CUDA thread is a fiber; blocks run one after another. A launch with a fault is abandoned and throws a
// std::runtime_error that names the block, the thread and the fault. What is checked is said where it is: barriers and
// warp operations in "Meeting points" of emulator.cpp, races in "Order", accesses in "Memory".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "runtime.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// ---- For tests ----

// In which order blocks, and the threads inside them, run; 0 is the natural one.
void set_seed(unsigned seed);

// Of one launch, or of several. Bytes are of global memory; atomics are apart. bytes_loaded: of sectors, what moves
// into the L2 cache, each counted once in a launch, however often it is read.
struct Counters {
  int64_t launches, threads, bytes_read, bytes_written, atomics, bytes_loaded;
};
Counters counters();               // since reset_counters()
std::vector<Counters> launches();  // likewise, launch by launch
void reset_counters();

// ---- For launch.cuh ----

void launch(unsigned blocks, dim3 block, cudaStream_t stream, std::function<void()> kernel);

// ---- For cuda_runtime.h ----

void memset(void* data, int value, size_t bytes, cudaStream_t stream);  // counts as a launch

enum class Operation { none, returned, syncthreads, syncwarp, ballot, shuffle, shuffle_down, shuffle_xor };

void syncthreads();
void threadfence();
void syncwarp(unsigned mask);
unsigned ballot(unsigned mask, bool predicate);
uint64_t shuffle(Operation, unsigned mask, uint64_t value, int size, int operand, int width);

template <typename T>
T shuffle(Operation operation, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(operation, mask, bits, sizeof(T), operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- For emulated_memory.h ----

// To elements i to i + n - 1, of `size` bytes each, of the `count` that a Global has. Each check comes first, then the
// access itself.
struct Access {
  const void* elements;
  int64_t count, i;
  int n, size;
};
void check_load(const Access&, bool fresh);
void check_store(const Access&);
void check_atomic(const Access&);

// When and by which thread an element was accessed last (see Event in emulator.cpp); all zeros: never.
struct History {
  uint64_t written, read, read_by_another;
};
void check_shared_load(History* history, int i, int n);
void check_shared_store(History* history, int i, int n);

}  // namespace emulation
