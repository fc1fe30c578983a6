#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_runtime.h"

struct CUstream_st {
  emulation::Lane lane;
  emulation::Graph* graph = nullptr;  // that it is captured for
};

namespace emulation {
namespace {

// ---- Streams ----

constexpr uint64_t kNone = 0, kLegacy = 1;  // ids; a legacy default stream has the same on every device

uint64_t new_id() {
  static uint64_t last = kLegacy;
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  return ++last;
}

CUstream_st& stream_of(cudaStream_t handle) {
  const int device = current_device();
  if (handle == nullptr) {
    static std::map<int, CUstream_st> legacy;
    const std::lock_guard<std::recursive_mutex> lock(mutex());
    return legacy.try_emplace(device, CUstream_st{{device, kLegacy, 0}}).first->second;
  }
  if (handle != cudaStreamPerThread) return *handle;
  thread_local std::map<int, CUstream_st> per_thread;
  return per_thread.try_emplace(device, CUstream_st{{device, new_id(), 0}}).first->second;
}

std::vector<cudaStream_t> destroyed;  // handles, which new streams get

// ---- Errors ----

thread_local cudaError_t last_error = cudaSuccess, next_error = cudaSuccess;
thread_local int before_error = 0;  // launches
std::function<void()> meanwhile;

// ---- Memory ----

auto& memory = *new std::map<const char*, Allocation>;  // by its end; tensors may be freed while the process exits
auto& released = *new std::deque<char*>;                // the last ones, whose memory is kept
constexpr size_t kKept = 64;

void keep(Allocation& allocation) {
  std::memset(allocation.data, 0xff, allocation.size);
  released.push_back(allocation.data);
  if (released.size() <= kKept) return;
  const auto oldest = memory.upper_bound(released.front());
  ::operator delete(oldest->second.data, std::align_val_t{64});
  memory.erase(oldest);
  released.pop_front();
}

thread_local uint64_t call = 0;

template <typename F>
void for_each_allocation(F f) {
  for (auto& [end, allocation] : memory) f(allocation);
}

}  // namespace

std::recursive_mutex& mutex() {
  static auto* mutex = new std::recursive_mutex;
  return *mutex;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

cudaStream_t& current_stream(int device) {
  thread_local std::map<int, cudaStream_t> streams;
  return streams[device];
}

cudaStream_t create_stream() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (destroyed.empty()) destroyed.push_back(new CUstream_st);
  const cudaStream_t stream = destroyed.back();
  destroyed.pop_back();
  *stream = {{current_device(), new_id(), 0}};
  return stream;
}

void destroy_stream(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  destroyed.push_back(stream);
}

Lane lane_of(cudaStream_t stream) { return stream_of(stream).lane; }

void enqueue(cudaStream_t handle, std::function<void(const Lane&)> work) {
  std::unique_lock<std::recursive_mutex> lock(mutex());
  const auto others = std::exchange(meanwhile, nullptr);
  lock.unlock();
  if (others) others();
  CUstream_st& stream = stream_of(handle);
  if (next_error != cudaSuccess && before_error-- == 0) last_error = std::exchange(next_error, cudaSuccess);
  if (stream.lane.device != current_device()) last_error = cudaErrorInvalidResourceHandle;
  if (last_error != cudaSuccess) return;
  if (stream.graph != nullptr) {
    stream.graph->work_.push_back([work = std::move(work), lane = stream.lane] { work(lane); });
  } else {
    lock.lock();
    work(stream.lane);
  }
}

const char* name_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    default:
      return "cudaErrorInvalidResourceHandle";
  }
}

cudaError_t take_last_error() { return std::exchange(last_error, cudaSuccess); }
void fail_launch(cudaError_t error, int after) {
  next_error = error;
  before_error = after;
}
void before_next_launch(std::function<void()> others) { meanwhile = std::move(others); }

// ---- Graphs ----

Graph::Graph(cudaStream_t stream) : id_(new_id()), stream_(stream) {
  stream->graph = this;
  stream->lane.graph = id_;
}

void Graph::end() {
  stream_->graph = nullptr;
  stream_->lane.graph = 0;
}

void Graph::replay() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  for_each_allocation([&](Allocation& allocation) {
    if (allocation.lane.graph == id_) expect_written(allocation.data);
  });
  for (const auto& work : work_) work();
  for_each_allocation([&](Allocation& allocation) {
    if (allocation.lane.graph == id_ && allocation.is_result) check_written(allocation.data);
  });
}

Graph::~Graph() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  std::vector<Allocation*> freed;  // not kept at once: that erases others
  for_each_allocation([&](Allocation& allocation) {
    if (allocation.lane.graph != id_) return;
    allocation.lane.graph = 0;
    if (allocation.is_freed) freed.push_back(&allocation);
  });
  for (Allocation* allocation : freed) keep(*allocation);
}

// ---- Memory ----

void* allocate(size_t bytes, const Lane& lane) {
  char* const data = static_cast<char*>(::operator new(bytes, std::align_val_t{64}));
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  memory[data + std::max<size_t>(bytes, 1)] = {data, bytes, lane, call};
  return data;
}

void release(void* data) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  Allocation& allocation = *find(data);
  allocation.is_freed = true;
  allocation.users.clear();
  if (allocation.lane.graph == 0) keep(allocation);
}

Allocation* find(const void* address) {
  const auto found = memory.upper_bound(static_cast<const char*>(address));
  return found == memory.end() || address < found->second.data ? nullptr : &found->second;
}

size_t allocations() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  size_t count = 0;
  for_each_allocation([&](const Allocation& a) { count += !a.is_freed && a.lane.stream != kNone; });
  return count;
}

void* symbol_on_device(const void* symbol, size_t bytes, int device) {
  static std::map<std::pair<const void*, int>, void*> copies;
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  void*& copy = copies[{symbol, device}];
  if (copy != nullptr) return copy;
  copy = std::memset(allocate(bytes, {device, kNone, 0}), 0, bytes);
  find(copy)->call = 0;
  return copy;
}

void expect_written(void* data) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  Allocation& allocation = *find(data);
  std::memset(allocation.data, 0xff, allocation.size);
  allocation.written.assign(allocation.size, false);
}

void check_written(void* data) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  const std::vector<char> written = std::exchange(find(data)->written, {});
  const auto missing = std::count(written.begin(), written.end(), false);
  if (missing == 0) return;
  const auto first = std::find(written.begin(), written.end(), false) - written.begin();
  throw std::runtime_error(std::to_string(missing) + " of " + std::to_string(written.size()) +
                           " bytes of an output were not written, the first at byte " + std::to_string(first));
}

Call::Call() { call = new_id(); }
Call::~Call() { call = 0; }

void Call::check_results() const {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  for_each_allocation([&](Allocation& allocation) {
    if (allocation.call != call || allocation.is_freed) return;
    allocation.is_result = true;
    if (allocation.lane.graph == 0) check_written(allocation.data);
  });
}

uint64_t current_call() { return call; }

}  // namespace emulation

// ---- CUDA's names ----

using namespace emulation;

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? 7
                                                            : 5;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = lane_of(stream).graph == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = lane_of(stream).stream;
  return cudaSuccess;
}
