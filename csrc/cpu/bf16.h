// Tiles of floats rounded to bfloat16 as left factors of products, and what the rounding loses.
#pragma once

#include "gemm.h"

namespace cwdpo {

// A buffer for one rounded tile [B, R] at a time.
class Bf16Rounded {
 public:
  Bf16Rounded(int64_t max_rows, int64_t max_columns);
  LeftFactor<Bf16> rows(const Matrix<float>& tile) const;        // as the left factor [B, R]
  LeftFactor<Bf16> transposed(const Matrix<float>& tile) const;  // as the left factor [R, B]

 private:
  Tensor buffer_;
};

// What rounding to bfloat16 takes from x.
float lost_to_bf16(float x);

// y += factor * x
void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor);

}  // namespace cwdpo
