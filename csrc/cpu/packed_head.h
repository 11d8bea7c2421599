// The three products of a head's tiles by gemm.h, on operands E: float, or bfloat16 with float32 sums. Legend: head.h.
//
// Logits of bfloat16 are exact: both factors are bfloat16 already. The gradient products round the tile to bfloat16,
// each entry by 2^-9 of itself; what the labels' entries lose is added back in float32, since after fine-tuning they
// are half of the gradient, and the errors of the many competitors average out.
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
  // hidden [N, D] contiguous, of E, of the live rows; weight [V, D] in any layout and floating-point type.
  PackedHead(const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan);

  // tile [B, R] = W H^T
  void logits(const Matrix<float>& tile, Span columns, Span block);
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);

 private:
  const E* hidden_row(int64_t row) const { return data<E>(hidden_) + row * dim_; }
  // The tile's rows of the weight, contiguous and of E.
  const E* weight_rows(Span columns);
  LeftFactor<E> left(const Matrix<float>& tile, bool transposed);
  template <class F>
  void for_lost_at_labels(const Matrix<float>& tile, Span columns, Span block, const F& add) const;

  const Tensor hidden_, weight_;
  const std::vector<int64_t>& labels_;
  const TilePlan plan_;
  const int64_t dim_;
  // The right factors: hidden rows packed once a block for the logits and for the weight's gradient, the weight once a
  // tile. A start of -1: nothing yet.
  std::vector<std::optional<RightFactor<E>>> hidden_columns_, hidden_rows_;
  std::optional<RightFactor<E>> weight_right_;
  std::optional<Bf16Rounded> rounded_;
  std::optional<Tensor> weight_buffer_;
  Tensor weight_tile_;
  int64_t weight_start_ = -1, packed_start_ = -1;
};

}  // namespace cwdpo
