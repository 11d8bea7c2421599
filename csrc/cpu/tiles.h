// How the logits [tokens, vocabulary] of a head are split into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cwdpo {

// The indices [start, start + size).
struct Span {
  int64_t start, size;
  int64_t stop() const { return start + size; }
  bool contains(int64_t i) const { return start <= i && i < stop(); }
};

// Calls f(span) for consecutive spans of at most `size` that cover [0, total).
template <class F>
void for_spans(int64_t total, int64_t size, const F& f) {
  for (int64_t start = 0; start < total; start += size) f(Span{start, std::min(size, total - start)});
}

// The size of a tile: rows are tokens, columns are vocabulary entries.
struct TilePlan {
  int64_t rows, columns;
};

}  // namespace cwdpo
