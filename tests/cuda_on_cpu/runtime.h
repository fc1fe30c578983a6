// CUDA's runtime on the CPU: devices, streams, captured graphs, and memory that tells what became of it.
//
// Work runs when it is enqueued, so that its results are there at once. A Lane says beside which other work it might
// have run on a GPU; what goes wrong only then is found by comparing lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_map>
#include <vector>

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
};
const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);

namespace emulation {

// Work of one lane runs one after another: that of a stream, or of a graph and the stream that it was captured on.
struct Lane {
  int device;
  uint64_t stream;  // its id
  uint64_t graph;   // its id, 0 for none
  bool operator==(const Lane& o) const { return device == o.device && stream == o.stream && graph == o.graph; }
};

inline int multiprocessors = 1;  // of every device

// Held while work runs.
std::recursive_mutex& mutex();

// ---- Devices and streams: the current ones are the thread's ----

int& current_device();
cudaStream_t& current_stream(int device);  // nullptr, the legacy default stream, at first
cudaStream_t create_stream();              // on the current device; may get the handle of one that was destroyed
void destroy_stream(cudaStream_t);
Lane lane_of(cudaStream_t);  // of the current device

// ---- Work ----

// Runs `work`, or captures it. What fails is left for cudaGetLastError.
void enqueue(cudaStream_t stream, std::function<void(const Lane&)> work);
cudaError_t take_last_error();
const char* name_of(cudaError_t);
void fail_launch(cudaError_t, int after);        // the one of this thread after so many
void before_next_launch(std::function<void()>);  // of any: what another thread does meanwhile

// What a stream is given between its making and end(). A replay finds what others have left in the graph's memory, and
// must write every result anew.
class Graph {
 public:
  explicit Graph(cudaStream_t);  // begins
  ~Graph();                      // gives its memory back
  void end();
  void replay();

 private:
  uint64_t id_;
  cudaStream_t stream_;
  std::vector<std::function<void()>> work_;
  friend void enqueue(cudaStream_t, std::function<void(const Lane&)>);
};

// ---- Memory ----

struct Allocation {
  char* data;
  size_t size;
  Lane lane;      // that it was allocated for
  uint64_t call;  // that allocated it; 0: none
  bool is_freed = false, is_result = false;
  std::vector<char> written{};                  // by byte, since that is of interest; else empty
  std::unordered_map<uintptr_t, Lane> users{};  // of each word that atomics are of
};

void* allocate(size_t bytes, const Lane&);
// A graph may go on to use what was allocated while it was captured. Else it is kept for some time, but must not be
// used.
void release(void*);
// That holds this address, or nullptr: memory of the tests' own.
Allocation* find(const void*);
size_t allocations();  // that are not released; without variables
// A device's own copy of a __device__ variable, zeros at first.
void* symbol_on_device(const void* symbol, size_t bytes, int device);

// Fills the allocation with 0xff; what a kernel loads must be stored first. check_written() throws unless all of it
// was.
void expect_written(void*);
void check_written(void*);

// A call of an op by this thread: what it allocates and does not release are its results, all of which it must have
// written, or its graph must.
class Call {
 public:
  Call();
  ~Call();
  void check_results() const;
};
uint64_t current_call();

}  // namespace emulation
