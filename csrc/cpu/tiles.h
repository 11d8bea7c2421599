// How the logits [tokens, vocabulary] of a head are split into tiles and into shards.
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

// Calls f(span) for consecutive spans of at most `size` that cover `whole`.
template <class F>
void for_spans(Span whole, int64_t size, const F& f) {
  for (int64_t start = whole.start; start < whole.stop(); start += size) {
    f(Span{start, std::min(size, whole.stop() - start)});
  }
}

// Part `i` of `parts` nearly equal ones of [0, total), in whole blocks of `block` indices.
inline Span part_of(int64_t total, int64_t block, int64_t parts, int64_t i) {
  const int64_t blocks = (total + block - 1) / block;
  const int64_t start = std::min(blocks * i / parts * block, total);
  return {start, std::min(blocks * (i + 1) / parts * block, total) - start};
}

// The size of a tile: `rows` tokens and `columns` vocabulary entries. A pass is split into shards of whole tiles, each
// with its own buffers and partial sums: `row_shards` parts of the tokens times `column_shards` parts of the
// vocabulary. The shards of a pass run in parallel, each on one thread; a single one uses all threads within its tiles.
struct TilePlan {
  int64_t rows, columns;
  int64_t row_shards = 1, column_shards = 1;
  int64_t shards() const { return row_shards * column_shards; }
};

}  // namespace cwdpo
