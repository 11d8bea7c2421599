// Rounds float32 tiles to bfloat16 for use as the A operand of a product, and computes the rounding errors.
#pragma once

#include "gemm.h"

namespace cwdpo {

// A buffer that holds one rounded tile [B, R] at a time.
class Bf16Tile {
 public:
  Bf16Tile(int64_t max_rows, int64_t max_columns);
  OperandA<Bf16> round(const Matrix<float>& tile) const;             // A = tile [B, R]
  OperandA<Bf16> round_transposed(const Matrix<float>& tile) const;  // A = tile^T [R, B]

 private:
  Tensor buffer_;
};

// x minus x rounded to bfloat16.
float bf16_rounding_error(float x);

// y += factor * x
void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor);

}  // namespace cwdpo
