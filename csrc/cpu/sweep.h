// One sweep over the vocabulary: the online softmax of every token and, optionally, a sum of weight rows.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "head.h"
#include "kept.h"
#include "kept_exponentials.h"
#include "online_softmax.h"
#include "strips.h"

namespace cwdpo {

// What a sweep over the vocabulary computes, and what it leaves in each tile.
enum class Sweep {
  kSumExp,        // max_logit and sum_exp; the tile keeps its logits
  kMoments,       // the same, moment, sum_sq and sum_logit
  kExponentials,  // max_logit and sum_exp; the tile becomes exp(z - max_logit) * slope, with 0 at the labels
  kMomentsAndExponentials,  // the sums of kMoments and the tile of kExponentials
};
inline bool has_moments(Sweep kind) { return kind == Sweep::kMoments || kind == Sweep::kMomentsAndExponentials; }
inline bool has_exponentials(Sweep kind) { return kind >= Sweep::kExponentials; }

// Where a sweep of anchors (OnlineSoftmax::move_anchor) starts: at the target logits, so that few anchors move.
template <class T>
std::vector<T> first_anchors(const std::vector<T>& target_logits) {
  std::vector<T> anchors;
  for (const T logit : target_logits) {
    anchors.push_back(
        std::isfinite(logit) ? OnlineSoftmax<T>::anchor_near(logit) : std::numeric_limits<T>::lowest());
  }
  return anchors;
}

// Adds the logits of rows [block.start + part.start, + part.size) in a tile [B, R] to `softmax`. Calls
// rescaled(row, factor) for every row whose maximum rose, so that the caller can scale what it has accumulated.
template <class T, class F>
void add_strip(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Span part, Sweep kind, bool anchored,
    std::vector<OnlineSoftmax<T>>& softmax, const F& rescaled) {
  std::array<T, kStripTokens> strip_max, max_logit, sum_exp, moment, sum_sq, sum_logit, target;
  const Strip<T> strip{tile.data + part.start, columns.size, tile.row_stride, part.size};
  const int64_t first = block.start + part.start;
  const auto target_entry = [&](int64_t n) {
    const int64_t label = head.label(first + n);
    return columns.contains(label) ? &strip.z[(label - columns.start) * strip.stride + n] : nullptr;
  };
  if (has_moments(kind)) sum_of_strip(strip, sum_logit.data());
  for (int64_t n = 0; n < part.size; ++n) {
    T* entry = target_entry(n);
    if (entry == nullptr) continue;
    target[n] = *entry;
    *entry = -std::numeric_limits<T>::infinity();  // leaves the target logit out of the sums
  }
  max_of_strip(strip, strip_max.data());
  for (int64_t n = 0; n < part.size; ++n) {
    OnlineSoftmax<T>& sums = softmax[first + n];
    const T rescale = anchored ? sums.move_anchor(strip_max[n]) : sums.raise_max(strip_max[n]);
    max_logit[n] = sums.max_logit;
    if (rescale != T(1)) rescaled(first + n, rescale);
  }
  if (kind == Sweep::kSumExp) exp_sum_of_strip(strip, max_logit.data(), sum_exp.data());
  if (has_moments(kind)) {
    exp_moments_of_strip(strip, max_logit.data(), sum_exp.data(), moment.data(), sum_sq.data());
  }
  if (has_exponentials(kind)) exp_strip(strip, max_logit.data(), head.cap, sum_exp.data());
  for (int64_t n = 0; n < part.size; ++n) {
    OnlineSoftmax<T>& sums = softmax[first + n];
    sums.sum_exp += sum_exp[n];
    if (has_moments(kind)) {
      sums.moment += moment[n];
      sums.sum_sq += sum_sq[n];
      sums.sum_logit += sum_logit[n];
    }
    if (T* entry = target_entry(n)) *entry = has_exponentials(kind) ? T(0) : target[n];
  }
}

// Applies the head's transform to a tile of raw logits W H^T, then adds the tile to `softmax`.
template <class T, class F>
void add_tile(
    const TiledHead<T>& head, const Matrix<T>& tile, Span columns, Span block, Sweep kind, bool anchored,
    std::vector<OnlineSoftmax<T>>& softmax, const F& rescaled) {
  const int64_t strips = (block.size + kStripTokens - 1) / kStripTokens;
  for_rows(strips, columns.size * kStripTokens, [&](int64_t i) {
    const int64_t start = i * kStripTokens;
    const Span part{start, std::min(kStripTokens, block.size - start)};
    add_strip(head, tile, columns, block, part, kind, anchored, softmax, rescaled);
  });
}

// The results of a sweep for the N labelled rows.
template <class T>
struct SweepResult {
  std::vector<OnlineSoftmax<T>> softmax;
  Tensor sum_exp_weight;  // of Pass::kHidden: sum_v exp(z_v - max_logit) slope_v W_v [N, D]; else undefined
};

// Merges the results of the parts of the vocabulary into those of the first one, in order.
template <class T>
void merge_shards(
    const TiledHead<T>& head, std::vector<SweepResult<T>>& parts, const KeptExponentials* exponentials) {
  if (parts.size() == 1) return;
  const bool with_sums = head.pass == Pass::kHidden;
  const int64_t entries = static_cast<int64_t>(parts.size()) * (with_sums ? head.dim : 16);
  for_rows_once(head.rows, entries, [&](int64_t row) {
    for (size_t i = 1; i < parts.size(); ++i) {
      const auto [factor, other_factor] = parts[0].softmax[row].merge(parts[i].softmax[row]);
      if (exponentials != nullptr) {
        const Span others = head.shard_columns(i);
        exponentials->rescale({0, others.start}, row, factor);
        exponentials->rescale(others, row, other_factor);
      }
      if (!with_sums) continue;
      const Matrix<T> sums = matrix<T>(parts[0].sum_exp_weight), others = matrix<T>(parts[i].sum_exp_weight);
      add_rows(sums.row(row), others.row(row), head.dim, factor, other_factor);
    }
  });
}

// Sweeps over the vocabulary. Logits that have a place in `kept` are stored there, exponentials in `exponentials`.
// `anchors`: those to start with; if empty, every anchor is the maximum.
template <class T>
SweepResult<T> sweep(
    const TiledHead<T>& head, Sweep kind, const std::vector<T>& anchors = {}, const KeptTiles<T>* kept = nullptr,
    const KeptExponentials* exponentials = nullptr) {
  const bool with_sums = head.pass == Pass::kHidden, anchored = !anchors.empty();
  std::vector<SweepResult<T>> parts(head.plan.column_shards);
  for (SweepResult<T>& part : parts) {
    part.softmax.resize(head.rows);
    for (size_t row = 0; row < anchors.size(); ++row) part.softmax[row].max_logit = anchors[row];
    if (with_sums) part.sum_exp_weight = empty<T>({head.rows, head.dim});
  }
  for_shards(head, [&](TileWorker<T>& worker, const Shard& shard) {
    SweepResult<T>& part = parts[shard.column_shard];
    const Matrix<T> sums = with_sums ? matrix<T>(part.sum_exp_weight) : Matrix<T>{};
    shard.for_tiles([&](Span columns) {
      const bool is_first = columns.start == shard.columns.start;
      shard.for_blocks([&](Span block) {
        const Matrix<T> tile = worker.buffer(block, columns);
        worker.logits(tile, columns, block);
        head.transform(tile, columns);
        if (kept != nullptr) kept->store(tile, columns, block);
        add_tile(head, tile, columns, block, kind, anchored, part.softmax, [&](int64_t row, T rescale) {
          if (with_sums && !is_first) scale_row(sums.row(row), head.dim, rescale);
          if (exponentials != nullptr) {
            exponentials->rescale({shard.columns.start, columns.start - shard.columns.start}, row, rescale);
          }
        });
        if constexpr (std::is_same_v<T, float>) {
          if (exponentials != nullptr) exponentials->store(tile, columns, block);
        }
        if (with_sums) worker.add_to_hidden(sums.row_block(block.start, block.size), tile, columns, block, !is_first);
      });
    });
  });
  merge_shards(head, parts, exponentials);
  return std::move(parts[0]);
}

}  // namespace cwdpo
