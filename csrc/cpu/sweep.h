// What a tile of logits adds to the competitors of its rows, all threads.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "columns.h"
#include "competitors.h"
#include "head.h"

namespace cwdpo {

// What a sweep does with a tile once the tokens' competitors in it are counted.
enum class Sweep {
  kTotals,        // nothing: the tile keeps its logits
  kMoments,       // the same, with moments
  kExponentials,  // the tile becomes exp(z - peak) * slope, 0 at the labels
};

// The competitors of rows [block.start + part.start, + part.size) take in those columns of a tile [B, R].
// decayed(row, decay) hears of every row whose earlier sums shrank.
template <class T, class F>
void add_columns(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Span part, Sweep kind,
    std::vector<Competitors<T>>& others, const F& decayed) {
  std::array<T, kMaxColumns> top, peak, total, moment, own;
  const Columns<T> view{tile.data + part.start, columns.size, tile.row_stride, part.size};
  const int64_t first = block.start + part.start;
  const auto label_entry = [&](int64_t n) {
    const int64_t label = head.label(first + n);
    return columns.contains(label) ? &view.z[(label - columns.start) * view.stride + n] : nullptr;
  };
  for (int64_t n = 0; n < part.size; ++n) {
    T* entry = label_entry(n);
    if (entry == nullptr) continue;
    own[n] = *entry;
    *entry = -std::numeric_limits<T>::infinity();  // a label is no competitor of itself
  }
  max_of_columns(view, top.data());
  for (int64_t n = 0; n < part.size; ++n) {
    const T decay = others[first + n].raise(top[n]);
    peak[n] = others[first + n].peak;
    if (decay != T(1)) decayed(first + n, decay);
  }
  if (kind == Sweep::kTotals) exp_sum_of_columns(view, peak.data(), total.data());
  if (kind == Sweep::kMoments) exp_sums_of_columns(view, peak.data(), total.data(), moment.data());
  if (kind == Sweep::kExponentials) exp_columns(view, peak.data(), head.inverse_cap(), total.data());
  for (int64_t n = 0; n < part.size; ++n) {
    others[first + n].total += total[n];
    if (kind == Sweep::kMoments) others[first + n].moment += moment[n];
    if (T* entry = label_entry(n)) *entry = kind == Sweep::kExponentials ? T(0) : own[n];
  }
}

// A whole tile of logits, before the head's transform, on all threads.
template <class T, class F>
void add_tile(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Sweep kind,
    std::vector<Competitors<T>>& others, const F& decayed) {
  head.transform(tile, columns);
  const int64_t parts = (block.size + kMaxColumns - 1) / kMaxColumns;
  for_rows(parts, columns.size * kMaxColumns, [&](int64_t i) {
    const int64_t start = i * kMaxColumns;
    const Span part{start, std::min(kMaxColumns, block.size - start)};
    add_columns(head, tile, columns, block, part, kind, others, decayed);
  });
}

}  // namespace cwdpo
