// The three products of a head's tiles on gemm.h, for operands of type E (float or bfloat16). Legend: head.h.
//
// With bfloat16 the logits lose nothing, because both operands are bfloat16 already. The two gradient products round
// the tile to bfloat16, with a relative error of up to 2^-9 per entry. The errors of the many competitors average
// out. After fine-tuning the label's entry is half of the gradient, so its rounding error is added back in
// float32.
#pragma once

#include <optional>
#include <vector>

#include "bf16.h"
#include "gemm.h"
#include "tiles.h"

namespace cwdpo {

template <class E>
class PackedHead {
 public:
  // hidden [N, D] of the labeled rows: contiguous, of type E. weight [V, D]: any layout, any floating-point dtype.
  PackedHead(const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan);

  // tile [B, R] = W H^T
  void logits(const Matrix<float>& tile, Span columns, Span block);
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);

 private:
  const E* hidden_row(int64_t row) const { return data<E>(hidden_) + row * dim_; }
  // The weight rows of a tile, contiguous and of type E.
  const E* weight_rows(Span columns);
  // The tile, or its transpose, as the operand A.
  OperandA<E> as_operand(const Matrix<float>& tile, bool transposed);
  // Calls add(row, label, rounding_error) for every label in the tile.
  template <class F>
  void for_label_errors(const Matrix<float>& tile, Span columns, Span block, const F& add) const;

  const Tensor hidden_, weight_;
  const std::vector<int64_t>& labels_;
  const TilePlan plan_;
  const int64_t dim_;
  // The operands B. H^T (for the logits) and H (for the weight's gradient) are packed once per block of rows, W (for
  // the gradient of hidden) once per tile.
  std::vector<std::optional<PackedB<E>>> packed_hidden_t_, packed_hidden_;
  std::optional<PackedB<E>> packed_weight_;
  std::optional<Bf16Tile> rounded_tile_;
  std::optional<Tensor> weight_buffer_;
  Tensor weight_tile_;
  int64_t weight_start_ = -1, packed_start_ = -1;  // the tiles in weight_tile_ and packed_weight_; -1: none
};

}  // namespace cwdpo
