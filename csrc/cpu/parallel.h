// Parallel loops on torch's threads. Threads that wait at the end of a parallel region spin for a while. On a busy
// machine, where two threads may share a core, each region then costs two time slices (8 ms), and the spinning slows
// every other process. So a pass over a head opens a handful of regions, whatever its vocabulary, and none for a short
// loop beside its tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace cwdpo {

inline thread_local bool in_parallel_region = false;
inline std::atomic<int64_t> parallel_regions = 0;  // how many were opened so far; for tests

// Calls f(begin, end) for ranges that cover [0, total), on all threads. Each thread gets at least `grain` indices. A
// nested loop runs on the calling thread.
template <class F>
void for_ranges(int64_t total, int64_t grain, const F& f) {
  if (in_parallel_region) {
    if (total > 0) f(int64_t{0}, total);
    return;
  }
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    if (begin == 0 && end == total) return f(begin, end);  // too small to be split
    if (begin == 0) ++parallel_regions;
    struct Region {
      Region() { in_parallel_region = true; }
      ~Region() { in_parallel_region = false; }
    } region;
    f(begin, end);
  });
}

// Calls f(row) for every row of a tile, on all threads. Each thread gets at least about 16 K entries.
template <class F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kEntries = 16384;
  const int64_t grain = std::max<int64_t>(kEntries / std::max<int64_t>(columns, 1), 1);
  for_ranges(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

// The same for a loop that a pass runs once, beside its tiles. On one thread, unless the other threads would wait for
// it longer than it takes to start them.
template <class F>
void for_rows_once(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kEntries = 1 << 21;
  const int64_t threads = torch::stable::get_num_threads();
  for_ranges(rows, rows * columns * threads < kEntries ? rows : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

}  // namespace cwdpo
