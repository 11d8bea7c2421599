// torch's parallel_for with threads that ThreadSanitizer can see, for `make sanitize-threads`.
//
// The C++ backend has no thread pool of its own: its parallel loops are torch::stable::parallel_for, which ends in
// OpenMP inside libtorch. Neither is compiled with ThreadSanitizer, so it would not see their barriers. Preloaded, this
// function takes the place of libtorch's. It splits every loop over four threads, however small: two chunks that touch
// the same memory are then a race, even if a real run would put them on one thread.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;
thread_local bool in_parallel_region = false;

}  // namespace

// The signature of torch/csrc/stable/c/shim.h. Returns 0 for success.
extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*function)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return 0;
  if (in_parallel_region) {  // at::parallel_for runs a nested loop on the calling thread
    function(begin, end, context);
    return 0;
  }
  const int64_t chunk = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += chunk) {
    threads.emplace_back([=] {
      in_parallel_region = true;
      function(first, std::min(first + chunk, end), context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
