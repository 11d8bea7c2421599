// The three products of a head's tiles on gemm.h, for operands of type E (float or bfloat16). Legend: head.h.
//
// With bfloat16 the logits lose nothing, because both operands are bfloat16 already. The two gradient products round
// the tile to bfloat16, with a relative error of up to 2^-9 per entry. The errors of the many competitors average
// out. After fine-tuning the label's entry is half of the gradient, so its rounding error is added back in
// float32.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "bf16.h"
#include "convert.h"
#include "gemm.h"
#include "tiles.h"

namespace cwdpo {

// Rows of the weight as contiguous numbers of type E: in place if they are that already, else converted tile by tile.
template <class E>
class WeightRows {
 public:
  WeightRows(const Tensor& weight, ScalarType type, int64_t max_rows) : weight_(weight) {
    const bool in_place = weight.scalar_type() == type && weight.is_contiguous();
    if (!in_place) buffer_ = empty({max_rows, weight.size(1)}, type);
  }
  const E* rows(Span columns) {
    if (!buffer_) return reinterpret_cast<const E*>(weight_.entry(columns.start, 0));
    if (converted_ != columns.start) load_rows(weight_, columns, data<E>(*buffer_));
    converted_ = columns.start;
    return data<E>(*buffer_);
  }

 private:
  const RawMatrix weight_;
  std::optional<Tensor> buffer_;
  int64_t converted_ = -1;  // start of the tile in the buffer; -1: none
};

// The labeled rows of hidden as operands B, packed once per block of rows: H^T for the logits and, if needed, H for the
// weight's gradient. All threads read them.
template <class E>
class PackedHidden {
 public:
  // hidden [N, D]: contiguous, of type E. Keeps a reference to `labels`.
  PackedHidden(const Tensor& hidden, const std::vector<int64_t>& labels, int64_t block_rows, bool needs_weight);

  const PackedB<E>& transposed(Span block) const { return *transposed_[block.start / block_rows_]; }
  const PackedB<E>& plain(Span block) const { return *plain_[block.start / block_rows_]; }
  const E* row(int64_t i) const { return data<E>(hidden_) + i * hidden_.size(1); }
  int64_t label(int64_t row) const { return labels_[row]; }

 private:
  const Tensor hidden_;
  const std::vector<int64_t>& labels_;
  const int64_t block_rows_;
  std::vector<std::unique_ptr<PackedB<E>>> transposed_, plain_;
};

// The products of one thread's tiles, and their buffers.
template <class E>
class PackedHead {
 public:
  PackedHead(const PackedHidden<E>& hidden, const Tensor& weight, TilePlan plan, bool needs_gradients);

  // tile [B, R] = W H^T
  void logits(const Matrix<float>& tile, Span columns, Span block);
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);

 private:
  // The tile, or its transpose, as the operand A.
  OperandA<E> as_operand(const Matrix<float>& tile, bool transposed);
  // Calls add(row, label, rounding_error) for every label in the tile.
  template <class F>
  void for_label_errors(const Matrix<float>& tile, Span columns, Span block, const F& add) const;

  const PackedHidden<E>& hidden_;
  WeightRows<E> weight_;
  const int64_t dim_;
  std::optional<PackedB<E>> packed_weight_;  // the operand B of the gradient of hidden, packed once per tile
  std::optional<Bf16Tile> rounded_tile_;
  int64_t packed_start_ = -1;  // the tile in packed_weight_; -1: none
};

}  // namespace cwdpo
