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

// Part `i` of `parts` of [0, total), of sizes in the ratio 2 parts - 1 : ... : 3 : 1.
inline Span shrinking_part_of(int64_t total, int64_t parts, int64_t i) {
  const auto start = [&](int64_t k) { return total * (k * (2 * parts - k)) / (parts * parts); };
  return {start(i), start(i + 1) - start(i)};
}

// A part of the tokens and of the vocabulary, in blocks of rows and tiles of columns.
struct Shard {
  Span rows, columns;
  int64_t column_shard, block_rows, tile_columns;

  // Calls f(columns) for every tile's columns, in order.
  template <class F>
  void for_tiles(const F& f) const {
    for_spans(columns, tile_columns, f);
  }
  // Calls f(block) for every block of the rows.
  template <class F>
  void for_blocks(const F& f) const {
    for_spans(rows, block_rows, f);
  }
};

// The size of a tile: `rows` tokens and `columns` vocabulary entries. A pass is split into shards of whole tiles:
// `row_shards` parts of the tokens times `column_shards` parts of the vocabulary, each part of the vocabulary with
// partial sums of its own. `workers` threads, each with its own buffers, take one shard after another. A single shard
// uses all threads within its tiles.
//
// The system may run one thread less than another, so there are more shards than threads where memory allows. Those of
// the vocabulary shrink linearly: the last ones are small, so that threads finish at nearly the same time, and threads
// of the same speed still get equal parts if there is an even number of shards for each.
struct TilePlan {
  int64_t rows, columns;
  int64_t row_shards = 1, column_shards = 1, workers = 1;

  int64_t shards() const { return row_shards * column_shards; }
  Span shard_columns(int64_t column_shard, int64_t vocab) const {
    if (column_shards > workers) return shrinking_part_of(vocab, column_shards, column_shard);
    return part_of(vocab, 1, column_shards, column_shard);
  }
  Shard shard(int64_t i, int64_t n_rows, int64_t vocab) const {
    const int64_t column_shard = i % column_shards;
    return {
        part_of(n_rows, rows, row_shards, i / column_shards), shard_columns(column_shard, vocab), column_shard, rows,
        columns};
  }
};

}  // namespace cwdpo
