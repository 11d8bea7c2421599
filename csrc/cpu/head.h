// Computes the logits of a linear head one cache-sized tile at a time, in float32 or float64.
//
// Legend: N labelled tokens (rows), R rows of a block, D hidden, V vocabulary, B vocabulary entries (columns) of a
// tile. A tile is stored [B, R], vocabulary first, because torch.mm computes W H^T 10 to 15 % faster than H W^T.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "packed_head.h"
#include "rows.h"
#include "tensors.h"
#include "tiles.h"

namespace cwdpo {

// The arguments that all ops on a head share.
struct HeadArguments {
  const Tensor& hidden;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  double scale;
  std::optional<double> softcap;
  int64_t workspace_bytes;
};

// Throws if the shapes or dtypes do not match. `op` is the name in the error message.
void check_head(const char* op, const HeadArguments& head, const Tensor& labels);

// The tokens that have a label, and their labels.
struct LabelledRows {
  std::vector<int64_t> tokens, labels;
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};
// All tokens whose label is not `ignore_index`. Throws if a label is outside [0, vocab).
LabelledRows labelled_rows(const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab);

// Chooses as many rows as possible and then few columns, so that a tile, its slice of the weight and its block of
// hidden rows stay in cache together.
TilePlan plan_tiles(const HeadArguments& head, int64_t n_rows, size_t item_size);

template <class T>
class TiledHead {
 public:
  // Keeps a reference to `labelled`.
  TiledHead(const HeadArguments& arguments, const LabelledRows& labelled, TilePlan plan);

  const TilePlan plan;
  const int64_t rows, vocab, dim;
  const T scale, cap;  // cap = 0: no soft cap
  // d softcap(z) / dz at the capped logit; 1 without a cap, also for a logit of -inf.
  T slope(T logit) const { return cap == T(0) ? T(1) : T(1) - (logit / cap) * (logit / cap); }

  Matrix<T> buffer(Span block, Span columns) const {
    return {data<T>(buffer_), columns.size, block.size, padded(block.size)};
  }

  // The three products of a tile [B, R] with W or H, on PackedHead if the processor supports it, else on torch.mm.
  // tile = W H^T: the logits before `transform`
  void logits(const Matrix<T>& tile, Span columns, Span block) const;
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const;
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const;

  int64_t label(int64_t row) const { return labelled_.labels[row]; }
  // z <- softcap(scale * (z + bias)) for every entry of a tile.
  void transform(const Matrix<T>& tile, Span columns) const {
    if (bias_ == nullptr && scale == T(1) && cap == T(0)) return;
    for_rows(columns.size, tile.columns, [&](int64_t v) {
      transform_row(tile.row(v), tile.columns, bias(columns.start + v), scale, cap);
    });
  }
  // The weight row of each token's label, [R, D], for a block of tokens.
  Tensor target_weight(Span block) const {
    return contiguous_as<T>(index_rows(weight_tensor_, labelled_.labels.data() + block.start, block.size));
  }
  // The logit of each token's label, [N]: one dot product per token.
  std::vector<T> target_logits() const;

 private:
  // Avoids rows a power of two apart: reading a column would then map to few cache sets.
  static int64_t padded(int64_t rows) { return rows + 16; }
  T bias(int64_t v) const { return bias_ == nullptr ? T(0) : bias_[v]; }
  Matrix<T> hidden(Span block) const { return matrix<T>(hidden_tensor_).row_block(block.start, block.size); }
  // The weight rows of a tile, converted to T in a buffer if their dtype differs.
  Matrix<T> weight(Span columns) const;

  const LabelledRows& labelled_;
  Tensor hidden_tensor_, weight_tensor_, buffer_;
  std::optional<Tensor> bias_tensor_, weight_buffer_;
  mutable int64_t converted_start_ = -1;  // start of the tile in weight_buffer_; -1: empty
  std::unique_ptr<PackedHead<float>> floats_;
  std::unique_ptr<PackedHead<Bf16>> bf16_;
  const T* bias_;
};

// Kept tiles: logits [B, N] of all labelled rows that forward keeps, so that backward need not recompute them.
//
// As many tiles as fit are stored, filling `storage` from its end. `storage` may be the memory of the gradient of the
// weight. Backward then overwrites it from the start, so a tile is stored only if it lies after the gradients of all
// earlier tiles. With several row blocks it must also lie after its own gradient, because every block reads the tile
// and adds to that gradient.
template <class T>
class KeptTiles {
 public:
  // grad_row_bytes: size of a row of the weight's gradient if `storage` is its memory, else 0.
  KeptTiles(const Tensor& storage, TilePlan plan, int64_t n_labelled, int64_t vocab, int64_t grad_row_bytes)
      : start_(data<char>(storage)), n_labelled_(n_labelled), plan_columns_(plan.columns) {
    bytes_ = storage.numel() * storage.element_size();
    first_ = last_ = bytes_ / sizeof(T) * sizeof(T);
    offsets_.assign((vocab + plan.columns - 1) / plan.columns, -1);
    for (int64_t i = static_cast<int64_t>(offsets_.size()) - 1; i >= 0; --i) {
      const int64_t start = i * plan.columns, stop = std::min(start + plan.columns, vocab);
      const int64_t offset = first_ - (stop - start) * n_labelled * static_cast<int64_t>(sizeof(T));
      const int64_t written = (plan.rows < n_labelled ? stop : start) * grad_row_bytes;
      if (offset >= written) first_ = offsets_[i] = offset;
    }
  }
  void zero_unused() const {
    std::fill_n(start_, first_, char{0});
    std::fill(start_ + last_, start_ + bytes_, char{0});
  }
  bool has(Span columns) const { return offsets_[columns.start / plan_columns_] >= 0; }
  Matrix<T> tile(Span columns) const {
    char* tile = start_ + offsets_[columns.start / plan_columns_];
    return {reinterpret_cast<T*>(tile), columns.size, n_labelled_, n_labelled_};
  }

 private:
  char* start_;
  int64_t n_labelled_, plan_columns_, bytes_, first_, last_;  // kept tiles occupy bytes [first, last)
  std::vector<int64_t> offsets_;                               // in bytes, per tile; -1: not kept
};

}  // namespace cwdpo
