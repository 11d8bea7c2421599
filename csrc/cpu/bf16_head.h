// The three products of a head's tiles on bfloat16 operands with float32 sums. Legend: see head.h.
//
// Logits are exact: both factors are bfloat16 already. The gradient products round the tile to bfloat16, each entry by
// 2^-9 of itself; what the labels' entries lose is added back in float32, since after fine-tuning they are half of the
// gradient, and the errors of the many competitors average out.
#pragma once

#include <optional>
#include <vector>

#include "bf16_gemm.h"
#include "tiles.h"

namespace cwdpo {

class Bf16Head {
 public:
  // hidden [N, D] contiguous, of the live rows; weight [V, D] in any layout.
  Bf16Head(const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan);

  // tile [B, R] = W H^T
  void logits(const Matrix<float>& tile, Span columns, Span block);
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate);

 private:
  const Bf16* hidden_row(int64_t row) const { return data<Bf16>(hidden_) + row * dim_; }
  // The tile's first row of the weight, contiguous.
  const Bf16* weight_rows(Span columns);
  template <class F>
  void for_lost_at_labels(const Matrix<float>& tile, Span columns, Span block, const F& add) const;

  const Tensor hidden_, weight_;
  const std::vector<int64_t>& labels_;
  const TilePlan plan_;
  const int64_t dim_;
  // The right factors: hidden rows packed once a block for the logits and for the weight's gradient, the weight once a
  // tile. A start of -1: nothing yet.
  std::vector<std::optional<Bf16Right>> hidden_columns_, hidden_rows_;
  std::optional<Bf16Right> weight_right_;
  std::optional<Bf16Rounded> rounded_;
  Tensor weight_tile_;
  int64_t weight_start_ = -1, packed_start_ = -1;
};

}  // namespace cwdpo
