// Small kernels, each with a fault and mended: `faults NAME [seed]` runs the faulty one, `faults NAME-mended [seed]`
// the other. Prints "ok" and the counters, or the error. test_cuda_on_cpu.py says which error is expected.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "launch.cuh"
#include "memory.cuh"

namespace {

using namespace resnet_fused::cuda;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 72;  // two warps and a quarter
constexpr int kBlocks = 5;
constexpr int kGroup = 8;  // lanes of a sub-warp group

__device__ unsigned group_mask(int lanes) {
  const unsigned first = threadIdx.x % 32 / lanes * lanes;
  return (lanes == 32 ? kAll : (1u << lanes) - 1) << first;
}

template <typename T>
struct Allocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(emulation::allocate(n * sizeof(T), emulation::lane_of(nullptr))); }
  void deallocate(T* elements, size_t) { emulation::release(elements); }
};

template <typename T>
struct Buffer {
  explicit Buffer(int64_t count, T value = {}) : elements(count, value) {}
  Global<const T> in() const { return {elements.data(), static_cast<int64_t>(elements.size())}; }
  Global<T> out() { return {elements.data(), static_cast<int64_t>(elements.size())}; }
  std::vector<T, Allocator<T>> elements;
};

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("wrong result: ") + what);
}

// ---- Meeting points ----

template <bool faulty>
__global__ void barrier_and_return() {
  if (faulty && threadIdx.x == 70) return;
  __syncthreads();
  if (threadIdx.x == 70) return;
}

template <bool faulty>
__global__ void barrier_and_shuffle() {
  if (faulty && threadIdx.x == 3) __syncthreads();
  __shfl_xor_sync(group_mask(kGroup), 1, 1);
  if (!faulty || threadIdx.x != 3) __syncthreads();
}

template <bool faulty>
__global__ void shuffle_and_return() {
  if (faulty && threadIdx.x == 5) return;
  __shfl_down_sync(group_mask(kGroup), 1.0, 1, kGroup);
}

template <bool faulty>
__global__ void missing_lanes() {
  __syncwarp(faulty || threadIdx.x < 64 ? kAll : 0xff);
}

template <bool faulty>
__global__ void different_operations() {
  if (faulty && threadIdx.x % 2 == 0) __syncwarp(group_mask(kGroup));
  __ballot_sync(group_mask(kGroup), 1);
  if (!faulty || threadIdx.x % 2 == 1) __syncwarp(group_mask(kGroup));
}

template <bool faulty>
__global__ void different_masks() {
  __ballot_sync(faulty && threadIdx.x == 0 ? 0xf : group_mask(kGroup), 1);
}

template <bool faulty>
__global__ void caller_outside_mask() {
  __syncwarp(faulty ? 0xff : group_mask(kGroup));
}

template <bool faulty>
__global__ void source_outside_mask() {
  __shfl_down_sync(group_mask(kGroup), 1.0f, 4, faulty ? 32 : kGroup);
}

template <bool faulty>
__global__ void odd_width() {
  __shfl_sync(group_mask(kGroup), 1.0f, 0, faulty ? 6 : kGroup);
}

template <void (*kernel)()>
void run() {
  launch(kernel, kBlocks, kThreads, nullptr);
}

// ---- Bounds ----

__global__ void load_at(Global<const float> data, int64_t i) { data.load(i); }
__global__ void store_at(Global<double> data, int64_t i) { data.store(i, 1); }
__global__ void load_vector_at(Global<const __half> data, int64_t i) { data.load_vector<8>(i); }
__global__ void store_vector_at(Global<float> data, int64_t i) { data.store_vector<4>(i, {{1, 2, 3, 4}}); }
__global__ void count_at(Global<unsigned> data, int64_t i) { data.atomic_inc(i, 7); }
__global__ void shared_at(int i) {
  __shared__ Shared<float, kThreads> data;
  data.store(i, 1);
}

template <typename T, typename Kernel>
void one_access(Kernel kernel, int64_t i) {
  Buffer<T> data(16);  // aligned to 16 bytes, as the allocator does
  launch(kernel, 1, 1, nullptr, data.out(), i);
}

template <bool faulty>
void load_past_the_end() {
  Buffer<float> data(16);
  launch(load_at, 1, 1, nullptr, data.in(), faulty ? 16 : 15);
}
template <bool faulty>
void store_before_the_begin() {
  one_access<double>(store_at, faulty ? -1 : 0);
}
template <bool faulty>
void vector_past_the_end() {
  Buffer<float> data(18);
  launch(store_vector_at, 1, 1, nullptr, data.out(), faulty ? 16 : 12);
}
template <bool faulty>
void vector_misaligned() {
  Buffer<__half> data(16);
  launch(load_vector_at, 1, 1, nullptr, data.in(), faulty ? 4 : 8);
}
template <bool faulty>
void atomic_past_the_end() {
  one_access<unsigned>(count_at, faulty ? 16 : 15);
}
template <bool faulty>
void load_null() {
  Buffer<float> data(1);
  require(data.in() && !Global<float>(), "operator bool");
  launch(load_at, 1, 1, nullptr, faulty ? Global<const float>() : data.in(), 0);
}
template <bool faulty>
void shared_past_the_end() {
  launch(shared_at, 1, 1, nullptr, faulty ? kThreads : kThreads - 1);
}

// ---- Shared memory ----

template <bool faulty>
__global__ void shared_not_written() {  // but by the block before
  __shared__ Shared<int, kThreads> data;
  if (!faulty || blockIdx.x == 0 || threadIdx.x != 7) data.store(threadIdx.x, 1);
  __syncthreads();
  data.load((threadIdx.x + 1) % kThreads);
}

template <bool faulty>
__global__ void read_after_write() {
  __shared__ Shared<float, kThreads> data;
  data.store(threadIdx.x, 1);
  if (!faulty) __syncthreads();
  data.load((threadIdx.x + 40) % kThreads);
}

template <bool faulty>
__global__ void write_after_read() {
  __shared__ Shared<double, kThreads> data;
  data.store(threadIdx.x, 1);
  __syncthreads();
  data.load((threadIdx.x + 40) % kThreads);
  if (!faulty) __syncthreads();
  data.store(threadIdx.x, 2);
}

template <bool faulty>
__global__ void write_after_two_reads() {
  __shared__ Shared<int, 1> data;
  if (threadIdx.x == 64) data.store(0, 1);
  __syncthreads();
  if (threadIdx.x == 0 || threadIdx.x == 64) data.load(0);
  if (!faulty) __syncthreads();
  if (threadIdx.x == 64) data.store(0, 2);
}

template <bool faulty>
__global__ void write_after_write() {
  __shared__ Shared<int, 1> data;
  if (threadIdx.x == 0) data.store(0, 1);
  if (!faulty) __syncthreads();
  if (threadIdx.x == 64) data.store(0, 2);
}

template <bool faulty>
__global__ void read_in_warp() {
  __shared__ Shared<float, kThreads> data;
  data.store(threadIdx.x, 1);
  const unsigned mask = group_mask(kGroup);
  faulty ? void(__ballot_sync(mask, 1)) : __syncwarp(mask);  // a vote orders no memory
  data.load(threadIdx.x ^ 5);
}

template <bool faulty>
__global__ void read_in_another_group() {
  __shared__ Shared<float, kThreads> data;
  data.store(threadIdx.x, 1);
  __syncwarp(group_mask(faulty ? 4 : kGroup));
  data.load(threadIdx.x ^ 5);
}

// ---- Global memory within a block, and between blocks ----

template <bool faulty>
__global__ void exchange(Global<float> data) {
  const int first = blockIdx.x * kThreads;
  data.store(first + threadIdx.x, 1);
  if (!faulty) __syncthreads();
  data.load(first + (threadIdx.x + 40) % kThreads);
}
template <bool faulty>
void global_race() {
  Buffer<float> data(kBlocks * kThreads);
  launch(exchange<faulty>, kBlocks, kThreads, nullptr, data.out());
}

template <bool faulty>
__global__ void exchange_in_warp(Global<double> data) {
  data.store(blockIdx.x * kThreads + threadIdx.x, 1);
  if (!faulty) __syncwarp(group_mask(kGroup));
  data.load(blockIdx.x * kThreads + (threadIdx.x ^ 5));
}
template <bool faulty>
void global_race_in_warp() {
  Buffer<double> data(kBlocks * kThreads);
  launch(exchange_in_warp<faulty>, kBlocks, kThreads, nullptr, data.out());
}

template <bool faulty>
__global__ void store_once(Global<int64_t> data) {
  if (threadIdx.x == 0 || (faulty && threadIdx.x == 64)) data.store(blockIdx.x, 1);
}
template <bool faulty>
void two_writers() {
  Buffer<int64_t> data(kBlocks);
  launch(store_once<faulty>, kBlocks, kThreads, nullptr, data.out());
}

// The same memory by words and by bytes: who wrote is known of each byte, and of no byte more.
template <bool faulty>
__global__ void store_bytes(Global<unsigned> words, Global<uint8_t> bytes) {
  words.store(threadIdx.x, 0);
  __syncthreads();
  if (threadIdx.x >= 4) words.load(threadIdx.x);
  if (threadIdx.x < 4) bytes.store(threadIdx.x, 1);
  if (!faulty) __syncthreads();
  if (threadIdx.x == 5) words.load(0);
}
template <bool faulty>
void bytes_of_words() {
  Buffer<unsigned> data(kThreads);
  const Global<uint8_t> bytes(reinterpret_cast<uint8_t*>(data.elements.data()), kThreads * sizeof(unsigned));
  launch(store_bytes<faulty>, 1, kThreads, nullptr, data.out(), bytes);
}

template <bool faulty>
__global__ void store_rows(Global<uint8_t> data) {
  data.store(threadIdx.x + blockIdx.x * (kThreads - faulty), 1);
}
template <bool faulty>
void overlapping_blocks() {
  Buffer<uint8_t> data(kBlocks * kThreads);
  launch(store_rows<faulty>, kBlocks, kThreads, nullptr, data.out());
}

template <bool faulty>
__global__ void store_most(Global<__nv_bfloat16> data) {
  if (!faulty || threadIdx.x != 9) data.store(threadIdx.x, __float2bfloat16_rn(1));
}
template <bool faulty>
void not_written() {
  Buffer<__nv_bfloat16> data(kThreads);
  emulation::expect_written(data.elements.data());
  launch(store_most<faulty>, 1, kThreads, nullptr, data.out());
  emulation::check_written(data.elements.data());
}

// ---- Allocations, and what might run at the same time ----

__global__ void increment(Global<unsigned> data) { data.atomic_inc(0, 9); }
__global__ void add_one(Global<int> data) { data.store(0, data.load(0) + 1); }

// Another stream of the current device.
cudaStream_t another() {
  static const cudaStream_t stream = emulation::create_stream();
  return stream;
}

template <bool faulty>
void shared_atomic() {
  Buffer<unsigned> data(1);
  launch(increment, 1, 1, nullptr, data.out());
  launch(increment, 1, 1, faulty ? another() : nullptr, data.out());
}

template <bool faulty>
void load_not_written() {
  Buffer<int> data(1);
  emulation::expect_written(data.elements.data());
  if (!faulty) emulation::memset(data.elements.data(), 0, sizeof(int), nullptr);
  launch(add_one, 1, 1, nullptr, data.out());
}

template <bool faulty>
void freed() {
  auto data = std::make_unique<Buffer<int>>(1);
  const Global<int> elements = data->out();
  if (faulty) data = nullptr;
  launch(add_one, 1, 1, nullptr, elements);
}

template <bool faulty>
void another_device() {
  Buffer<int> data(1);
  emulation::current_device() = faulty ? 1 : 0;
  launch(add_one, 1, 1, nullptr, data.out());
}

template <bool faulty>
void stream_of_another_device() {
  another();
  emulation::current_device() = faulty ? 1 : 0;
  launch(barrier_and_return<false>, 1, 1, another());
}

template <bool faulty>
void allocated_on_another_stream() {
  const emulation::Call call;
  Buffer<int> data(1);
  launch(add_one, 1, 1, faulty ? another() : nullptr, data.out());
}

// What was allocated while it was captured is the graph's, freed or not; each replay finds it overwritten.
template <bool faulty>
void replayed() {
  emulation::Graph graph(another());
  const emulation::Lane lane = emulation::lane_of(another());
  int* const data = static_cast<int*>(emulation::allocate(sizeof(int), lane));
  if (!faulty) emulation::memset(data, 0, sizeof(int), another());
  launch(add_one, 1, 1, another(), Global<int>(data, 1));
  emulation::release(data);
  graph.end();
  for (int i = 0; i < 2; ++i) graph.replay();
}

enum class Fault {
  none,
  no_fence,
  early_fence,
  no_syncwarp_before,
  no_atomic,
  no_fence_after,
  no_syncwarp_after,
  stale_load,
  no_barrier,
  fence_before_barrier,
};

// Each group hands over one partial sum a lane; the last group sums them. Groups of a block hand over, too.
template <Fault fault>
__global__ void hand_over_by_groups(Global<float> partials, Global<unsigned> counter, Global<float> sums) {
  const unsigned lane = threadIdx.x % kGroup, groups = gridDim.x * blockDim.x / kGroup;
  const unsigned mask = group_mask(kGroup);
  if (fault == Fault::early_fence) __threadfence();
  partials.store(blockIdx.x * blockDim.x + threadIdx.x, 1);
  if (fault != Fault::no_syncwarp_before) __syncwarp(mask);
  bool last = true;
  if (lane == 0) {
    if (fault != Fault::no_fence && fault != Fault::early_fence) __threadfence();
    if (fault != Fault::no_atomic) last = counter.atomic_inc(0, groups - 1) + 1 == groups;
    if (fault == Fault::no_atomic) last = blockIdx.x == gridDim.x - 1;
    if (last && fault != Fault::no_fence_after) __threadfence();
  }
  last = __shfl_sync(mask, last, 0, kGroup);
  if (!last) return;
  if (fault != Fault::no_syncwarp_after) __syncwarp(mask);
  float sum = 0;
  for (unsigned i = lane; i < groups * kGroup; i += kGroup) {
    sum += fault == Fault::stale_load ? partials.load(i) : partials.load_fresh(i);
  }
  sums.store(lane, sum);
}

// As above, by blocks.
template <Fault fault>
__global__ void hand_over_by_blocks(Global<float> partials, Global<unsigned> counter, Global<float> sums) {
  __shared__ Shared<int, 1> last;
  partials.store(blockIdx.x * blockDim.x + threadIdx.x, 1);
  if (fault == Fault::fence_before_barrier) __threadfence();
  if (fault == Fault::early_fence && threadIdx.x == 0) __threadfence();
  if (fault != Fault::no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (fault != Fault::fence_before_barrier && fault != Fault::early_fence) __threadfence();
    last.store(0, counter.atomic_inc(0, gridDim.x - 1) + 1 == gridDim.x);
    __threadfence();
  }
  __syncthreads();
  if (!last.load(0)) return;
  float sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += partials.load_fresh(i);
  sums.store(threadIdx.x, sum);
}

template <typename Kernel>
void run_hand_over(Kernel kernel, int sums, float expected) {
  Buffer<float> partials(kBlocks * kThreads, -1), result(sums);
  Buffer<unsigned> counter(1);
  emulation::expect_written(result.elements.data());
  for (int repeat = 0; repeat < 2; ++repeat) {  // the counter is back at 0
    launch(kernel, kBlocks, kThreads, nullptr, partials.out(), counter.out(), result.out());
    for (const float sum : result.elements) require(sum == expected, "sum");
  }
  emulation::check_written(result.elements.data());
}
template <Fault fault>
void by_groups() {
  run_hand_over(hand_over_by_groups<fault>, kGroup, kBlocks * kThreads / kGroup);
}
template <Fault fault>
void by_blocks() {
  run_hand_over(hand_over_by_blocks<fault>, kThreads, kBlocks);
}

// The block that happens to run last takes over with no atomic of its own; those before had theirs.
template <bool faulty>
__global__ void read_all_at_last(Global<float> partials, Global<unsigned> counter, int* started) {
  const bool last = ++*started == kBlocks;
  partials.store(blockIdx.x, 1);
  __threadfence();
  if (!faulty || !last) counter.atomic_inc(0, kBlocks - 1);
  __threadfence();
  for (int i = 0; last && i < kBlocks; ++i) partials.load_fresh(i);
}
template <bool faulty>
void no_atomic_at_last() {
  Buffer<float> partials(kBlocks);
  Buffer<unsigned> counter(1);
  int started = 0;
  launch(read_all_at_last<faulty>, kBlocks, 1, nullptr, partials.out(), counter.out(), &started);
}

// ---- What has to work ----

template <typename T, int n>
__global__ void copy(Global<const T> from, Global<T> to) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if constexpr (n == 1) {
    to.store(i, from.load(i));
  } else {
    to.store_vector(i * n, from.template load_vector<n>(i * n));
  }
}
template <typename T, int n>
void run_copy() {
  Buffer<T> from(kBlocks * kThreads * n), to(kBlocks * kThreads * n);
  for (size_t i = 0; i < from.elements.size(); ++i) std::memset(&from.elements[i], i % 120 + 1, sizeof(T));
  const size_t bytes = from.elements.size() * sizeof(T);
  launch(copy<T, n>, kBlocks, kThreads, nullptr, from.in(), to.out());
  emulation::reset_counters();
  emulation::expect_written(to.elements.data());
  launch(copy<T, n>, kBlocks, kThreads, nullptr, from.in(), to.out());
  emulation::check_written(to.elements.data());
  require(emulation::launches().size() == 1, "counters of each launch");
  require(std::memcmp(from.elements.data(), to.elements.data(), bytes) == 0, "copy");
}

// A group per row: groups of a warp take different numbers of steps.
__global__ void sum_rows(Global<const int64_t> begins, Global<const double> values, Global<double> sums, int rows,
                         int lanes) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, lane = threadIdx.x % lanes;
  const unsigned mask = group_mask(lanes);
  if (row >= rows) return;
  double sum = 0;
  for (int64_t first = begins.load(row), end = begins.load(row + 1); first < end; first += lanes) {
    double value = first + lane < end ? values.load(first + lane) : 0;
    const unsigned inside = __ballot_sync(mask, first + lane < end);
    for (int i = lanes / 2; i > 0; i /= 2) {
      value += i % 2 ? __shfl_xor_sync(mask, value, i, lanes) : __shfl_down_sync(mask, value, i, lanes);
    }
    sum += __shfl_sync(mask, inside != 0 ? value : NAN, 0, lanes);
  }
  if (lane == 0) sums.store(row, sum);
}
void groups() {
  constexpr int kRows = 50;
  Buffer<int64_t> begins(kRows + 1);
  Buffer<double> values(kRows * kRows), sums(kRows);
  for (int row = 0; row < kRows; ++row) begins.elements[row + 1] = begins.elements[row] + row * 7 % kRows;
  for (size_t i = 0; i < values.elements.size(); ++i) values.elements[i] = static_cast<double>(i);
  for (const int lanes : {1, 2, 4, 8, 16, 32}) {
    const int threads = lanes == 32 ? 96 : kThreads / lanes * lanes, blocks = (kRows * lanes + threads - 1) / threads;
    launch(sum_rows, blocks, threads, nullptr, begins.in(), values.in(), sums.out(), kRows, lanes);
    for (int row = 0; row < kRows; ++row) {
      double expected = 0;
      for (int64_t i = begins.elements[row]; i < begins.elements[row + 1]; ++i) expected += values.elements[i];
      require(sums.elements[row] == expected, "sum of a row");
    }
  }
}

// Blocks of two and three dimensions; a block sees its index, every thread another.
__global__ void number_threads(Global<int> numbers) {
  const dim3 size = blockDim;
  const int thread = (threadIdx.z * size.y + threadIdx.y) * size.x + threadIdx.x;
  numbers.store(static_cast<int64_t>(blockIdx.x) * size.x * size.y * size.z + thread, thread);
}
void dimensions() {
  Buffer<int> numbers(3 * 60);
  launch(number_threads, 3, dim3(5, 4, 3), nullptr, numbers.out());
  for (int i = 0; i < 3 * 60; ++i) require(numbers.elements[i] == i % 60, "threadIdx");
  launch(number_threads, 0, dim3(5, 4, 3), nullptr, numbers.out());  // does nothing
}

// A launch that was abandoned leaves nothing behind.
void after_a_fault() {
  for (int repeat = 0; repeat < 3; ++repeat) {
    bool thrown = false;
    try {
      run<barrier_and_return<true>>();
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    require(thrown, "no error");
    try {
      not_written<true>();
    } catch (const std::runtime_error&) {
    }
    by_groups<Fault::none>();
  }
}

void host_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(groups);
  for (std::thread& thread : threads) thread.join();
}

void too_many_blocks() { launch(barrier_and_return<false>, int64_t{1} << 31, 1, nullptr); }

// Reads floats; writes each as a float16 and as a bfloat16, and the float that each of these is.
void convert() {
  float value;
  while (std::fread(&value, sizeof(value), 1, stdin) == 1) {
    const __half half = __float2half_rn(value);
    const __nv_bfloat16 bfloat = __float2bfloat16_rn(value);
    const float results[] = {__half2float(half), __bfloat162float(bfloat)};
    std::fwrite(results, sizeof(results), 1, stdout);
  }
}

struct Case {
  std::string name;
  void (*run)();
};

#define BOTH_KERNELS(name) \
  {#name, run<name<true>>}, { #name "-mended", run<name<false>> }
#define BOTH(name) \
  {#name, name<true>}, { #name "-mended", name<false> }
#define HAND_OVER(how, fault) {#how "-" #fault, how<Fault::fault>}

const Case kCases[] = {
    BOTH_KERNELS(barrier_and_return),
    BOTH_KERNELS(barrier_and_shuffle),
    BOTH_KERNELS(shuffle_and_return),
    BOTH_KERNELS(missing_lanes),
    BOTH_KERNELS(different_operations),
    BOTH_KERNELS(different_masks),
    BOTH_KERNELS(caller_outside_mask),
    BOTH_KERNELS(source_outside_mask),
    BOTH_KERNELS(odd_width),
    BOTH(load_past_the_end),
    BOTH(store_before_the_begin),
    BOTH(vector_past_the_end),
    BOTH(vector_misaligned),
    BOTH(atomic_past_the_end),
    BOTH(load_null),
    BOTH(shared_past_the_end),
    BOTH_KERNELS(shared_not_written),
    BOTH_KERNELS(read_after_write),
    BOTH_KERNELS(write_after_read),
    BOTH_KERNELS(write_after_two_reads),
    BOTH_KERNELS(write_after_write),
    BOTH_KERNELS(read_in_warp),
    BOTH_KERNELS(read_in_another_group),
    BOTH(global_race),
    BOTH(global_race_in_warp),
    BOTH(two_writers),
    BOTH(bytes_of_words),
    BOTH(overlapping_blocks),
    BOTH(not_written),
    BOTH(shared_atomic),
    BOTH(load_not_written),
    BOTH(freed),
    BOTH(another_device),
    BOTH(stream_of_another_device),
    BOTH(allocated_on_another_stream),
    BOTH(replayed),
    BOTH(no_atomic_at_last),
    HAND_OVER(by_groups, none),
    HAND_OVER(by_groups, no_fence),
    HAND_OVER(by_groups, early_fence),
    HAND_OVER(by_groups, no_syncwarp_before),
    HAND_OVER(by_groups, no_atomic),
    HAND_OVER(by_groups, no_fence_after),
    HAND_OVER(by_groups, no_syncwarp_after),
    HAND_OVER(by_groups, stale_load),
    HAND_OVER(by_blocks, none),
    HAND_OVER(by_blocks, fence_before_barrier),
    HAND_OVER(by_blocks, no_barrier),
    HAND_OVER(by_blocks, early_fence),
    {"copy_bytes", run_copy<uint8_t, 1>},
    {"copy_floats", run_copy<float, 1>},
    {"copy_float_vectors", run_copy<float, 4>},
    {"copy_half_vectors", run_copy<__half, 8>},
    {"copy_half_pairs", run_copy<__nv_bfloat16, 2>},
    {"groups", groups},
    {"dimensions", dimensions},
    {"after_a_fault", after_a_fault},
    {"host_threads", host_threads},
    {"too_many_blocks", too_many_blocks},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "convert") return convert(), 0;
  emulation::set_seed(argc > 2 ? std::atoi(argv[2]) : 0);
  for (const Case& one : kCases) {
    if (one.name != name) continue;
    try {
      one.run();
      const emulation::Counters all = emulation::counters();
      std::printf("ok: %lld launches, %lld threads, %lld bytes read, %lld bytes written, %lld atomics\n",
                  static_cast<long long>(all.launches), static_cast<long long>(all.threads),
                  static_cast<long long>(all.bytes_read), static_cast<long long>(all.bytes_written),
                  static_cast<long long>(all.atomics));
      return 0;
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  std::printf("no kernel of that name: %s\n", name.c_str());
  return 2;
}
