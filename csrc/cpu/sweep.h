// Adds a tile of logits to the online softmax of its tokens, on all threads.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "head.h"
#include "online_softmax.h"
#include "strips.h"

namespace cwdpo {

// What a sweep over the vocabulary computes, and what it leaves in each tile.
enum class Sweep {
  kSumExp,        // max_logit and sum_exp; the tile keeps its logits
  kMoments,       // the same, and moments
  kExponentials,  // max_logit and sum_exp; the tile becomes exp(z - max_logit) * slope, with 0 at the labels
};

// Adds the logits of rows [block.start + part.start, + part.size) in a tile [B, R] to `softmax`. Calls
// rescaled(row, factor) for every row whose maximum rose, so that the caller can scale what it has accumulated.
template <class T, class F>
void add_strip(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Span part, Sweep kind,
    std::vector<OnlineSoftmax<T>>& softmax, const F& rescaled) {
  std::array<T, kStripTokens> strip_max, max_logit, sum_exp, moment, target;
  const Strip<T> strip{tile.data + part.start, columns.size, tile.row_stride, part.size};
  const int64_t first = block.start + part.start;
  const auto target_entry = [&](int64_t n) {
    const int64_t label = head.label(first + n);
    return columns.contains(label) ? &strip.z[(label - columns.start) * strip.stride + n] : nullptr;
  };
  for (int64_t n = 0; n < part.size; ++n) {
    T* entry = target_entry(n);
    if (entry == nullptr) continue;
    target[n] = *entry;
    *entry = -std::numeric_limits<T>::infinity();  // leaves the target logit out of the sums
  }
  max_of_strip(strip, strip_max.data());
  for (int64_t n = 0; n < part.size; ++n) {
    const T rescale = softmax[first + n].raise_max(strip_max[n]);
    max_logit[n] = softmax[first + n].max_logit;
    if (rescale != T(1)) rescaled(first + n, rescale);
  }
  if (kind == Sweep::kSumExp) exp_sum_of_strip(strip, max_logit.data(), sum_exp.data());
  if (kind == Sweep::kMoments) exp_moment_of_strip(strip, max_logit.data(), sum_exp.data(), moment.data());
  if (kind == Sweep::kExponentials) exp_strip(strip, max_logit.data(), head.cap, sum_exp.data());
  for (int64_t n = 0; n < part.size; ++n) {
    softmax[first + n].sum_exp += sum_exp[n];
    if (kind == Sweep::kMoments) softmax[first + n].moment += moment[n];
    if (T* entry = target_entry(n)) *entry = kind == Sweep::kExponentials ? T(0) : target[n];
  }
}

// Applies the head's transform to a tile of raw logits W H^T, then adds the tile to `softmax`.
template <class T, class F>
void add_tile(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Sweep kind,
    std::vector<OnlineSoftmax<T>>& softmax, const F& rescaled) {
  head.transform(tile, columns);
  const int64_t strips = (block.size + kStripTokens - 1) / kStripTokens;
  for_rows(strips, columns.size * kStripTokens, [&](int64_t i) {
    const int64_t start = i * kStripTokens;
    const Span part{start, std::min(kStripTokens, block.size - start)};
    add_strip(head, tile, columns, block, part, kind, softmax, rescaled);
  });
}

}  // namespace cwdpo
