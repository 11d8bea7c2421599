// Logits of a linear head, one cache-sized vocabulary tile at a time, never rounded below float32.
//
// Legend: N live rows (tokens that count), R rows of a block, D hidden, V vocabulary, B columns of a tile. A tile is
// stored [B, R], vocabulary first: torch.mm makes W H^T 10 to 15 % faster than H W^T.
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

// How the op was called: the head, its transform, and what may be used.
struct HeadArguments {
  const Tensor& hidden;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  double scale;
  std::optional<double> softcap;
  int64_t workspace_bytes;
};

// Throws unless the tensors fit together: op names the caller in the message.
void check_head(const char* op, const HeadArguments& head, const Tensor& labels);

// The rows that count: positions among all tokens, and their labels (checked to lie in [0, vocab)).
struct LiveRows {
  std::vector<int64_t> positions, labels;
  int64_t size() const { return static_cast<int64_t>(positions.size()); }
};
LiveRows labelled_rows(const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab);

// Narrow column tiles come first: a tile, its part of the weight and the hidden rows should stay in cache together.
TilePlan plan_tiles(const HeadArguments& head, int64_t live_rows, size_t item_size);

template <class T>
class TiledHead {
 public:
  TiledHead(const HeadArguments& arguments, const LiveRows& live, TilePlan plan);

  const TilePlan plan;
  const int64_t rows, vocab, dim;
  const T scale, cap;  // cap 0: none
  T inverse_cap() const { return cap == T(0) ? T(0) : T(1) / cap; }
  T slope(T logit) const { return T(1) - (logit * inverse_cap()) * (logit * inverse_cap()); }

  Matrix<T> buffer(Span block, Span columns) const {
    return {data<T>(buffer_), columns.size, block.size, padded(block.size)};
  }

  // The three products, of a tile [B, R] with W or H: by PackedHead where the processor can, else by torch.mm.
  // tile = W H^T, the logits before transform
  void logits(const Matrix<T>& tile, Span columns, Span block) const;
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const;
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const;

  int64_t label(int64_t row) const { return live_.labels[row]; }
  // z <- softcap(scale * (z + bias)) of a tile.
  void transform(const Matrix<T>& tile, Span columns) const {
    if (bias_ == nullptr && scale == T(1) && cap == T(0)) return;
    for_rows(columns.size, tile.columns, [&](int64_t v) {
      transform_row(tile.row(v), tile.columns, bias(columns.start + v), scale, cap);
    });
  }
  // Each row's own row of the weight, [R, D], for a block of rows.
  Tensor target_weight(Span block) const {
    return contiguous_as<T>(index_rows(weight_tensor_, live_.labels.data() + block.start, block.size));
  }
  // c [N], each row's logit of its own label: a dot product, no vocabulary work.
  std::vector<T> target_logits() const;

 private:
  // Rows a power of two apart would meet in the same few sets of a cache when a column is read.
  static int64_t padded(int64_t rows) { return rows + 16; }
  T bias(int64_t v) const { return bias_ == nullptr ? T(0) : bias_[v]; }
  Matrix<T> hidden(Span block) const { return matrix<T>(hidden_tensor_).block(block.start, block.size); }
  // The weight's rows of the tile, converted into a buffer where they are of another dtype.
  Matrix<T> weight(Span columns) const;

  const LiveRows& live_;
  Tensor hidden_tensor_, weight_tensor_, buffer_;
  std::optional<Tensor> bias_tensor_, weight_buffer_;
  mutable int64_t converted_start_ = -1;  // the tile that the weight's buffer holds
  std::unique_ptr<PackedHead<float>> floats_;
  std::unique_ptr<PackedHead<Bf16>> bf16_;
  const T* bias_;
};

// The logits of vocabulary tiles [B, N], kept from forward for backward: of all labelled rows, as many tiles as fit.
//
// Their storage is opaque bytes, filled from its end. Where it is the memory of the weight's gradient, backward writes
// over them from the start: a tile lies beyond the gradients of the tiles before it and, where several blocks of rows
// take turns in reading it and adding to its gradient, beyond its own.
template <class T>
class KeptTiles {
 public:
  // gradient_row: the bytes of a row of the gradient whose memory the storage is, or 0.
  KeptTiles(const Tensor& storage, TilePlan plan, int64_t labelled, int64_t vocab, int64_t gradient_row)
      : start_(data<char>(storage)), labelled_(labelled), plan_columns_(plan.columns) {
    bytes_ = storage.numel() * storage.element_size();
    first_ = last_ = bytes_ / sizeof(T) * sizeof(T);
    places_.assign((vocab + plan.columns - 1) / plan.columns, -1);
    for (int64_t i = static_cast<int64_t>(places_.size()) - 1; i >= 0; --i) {
      const int64_t start = i * plan.columns, stop = std::min(start + plan.columns, vocab);
      const int64_t place = first_ - (stop - start) * labelled * static_cast<int64_t>(sizeof(T));
      const int64_t written = (plan.rows < labelled ? stop : start) * gradient_row;
      if (place >= written) first_ = places_[i] = place;
    }
  }
  void zero_the_rest() const {
    std::fill_n(start_, first_, char{0});
    std::fill(start_ + last_, start_ + bytes_, char{0});
  }
  bool has(Span columns) const { return places_[columns.start / plan_columns_] >= 0; }
  Matrix<T> tile(Span columns) const {
    char* tile = start_ + places_[columns.start / plan_columns_];
    return {reinterpret_cast<T*>(tile), columns.size, labelled_, labelled_};
  }

 private:
  char* start_;
  int64_t labelled_, plan_columns_, bytes_, first_, last_;  // kept tiles lie in bytes [first, last)
  std::vector<int64_t> places_;                              // of each tile; -1: not kept
};

}  // namespace cwdpo
