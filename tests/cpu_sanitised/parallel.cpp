// torch's parallel_for by threads of our own: a sanitiser that does not know OpenMP's barriers calls everything a race.
// Compiled, as the sources are, with torch's names defined as others.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <exception>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func,
                                             void* context) {
  const int64_t share = std::max<int64_t>({grain_size, (end - begin + kThreads - 1) / kThreads, 1});
  std::array<std::exception_ptr, kThreads> errors;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    std::exception_ptr& error = errors[threads.size()];
    threads.emplace_back([=, &error] {
      try {
        func(first, std::min(first + share, end), context);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const bool failed = std::any_of(errors.begin(), errors.end(), [](const auto& error) { return error != nullptr; });
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
