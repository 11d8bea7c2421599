// Exponentials that forward of linear_logprob keeps of a head for which uses_bf16_gemm(), so that backward has only two
// products left, whose operands they are. With u_v = exp(z_v - anchor) * slope_v, the gradient of the logits of a token
// is
//
//   factor * u_v for v != y,  factor = -grad_logp (1 - p_y) scale / sum_exp;  grad_logp (1 - p_y) scale slope_y at y
//
// u is rounded to bfloat16 and 0 at the label. Forward returns the anchor, a multiple of ln 2, in place of the maximum.
#pragma once

#include "head.h"
#include "kept.h"

namespace cwdpo {

class KeptExponentials : public KeptTiles<Bf16> {
 public:
  using KeptTiles<Bf16>::KeptTiles;

  // Keeps a tile [B, R] of the rows in `block`.
  void store(const Matrix<float>& tile, Span columns, Span block) const;
  // Multiplies what is kept of a labelled row by `factor`, rounded to a power of two.
  void rescale(Span columns, int64_t row, float factor) const;
};

}  // namespace cwdpo
