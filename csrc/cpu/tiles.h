// How a head's logits are cut: columns of the vocabulary by rows (tokens).
#pragma once

#include <algorithm>
#include <cstdint>

namespace cwdpo {

struct Span {
  int64_t start, size;
  int64_t stop() const { return start + size; }
  bool contains(int64_t i) const { return start <= i && i < stop(); }
};

// f(span) for [0, total) in spans of at most `size`.
template <class F>
void for_spans(int64_t total, int64_t size, const F& f) {
  for (int64_t start = 0; start < total; start += size) f(Span{start, std::min(size, total - start)});
}

struct TilePlan {
  int64_t rows, columns;
};

}  // namespace cwdpo
