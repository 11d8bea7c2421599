// Rounds float32 tiles to bfloat16 for use as the A operand of a product, and computes the rounding errors.
#pragma once

#include <bit>

#include "gemm.h"

namespace cwdpo {

// A buffer that holds one rounded tile [B, R] at a time.
class Bf16Tile {
 public:
  Bf16Tile(int64_t max_rows, int64_t max_columns);
  OperandA<Bf16> round(const Matrix<float>& tile) const;             // A = tile [B, R]
  OperandA<Bf16> round_transposed(const Matrix<float>& tile) const;  // A = tile^T [R, B]
  OperandA<Bf16> transposed(const Matrix<Bf16>& tile) const;         // the same, of a tile that is rounded already

 private:
  // A = tile^T, of which pair(low, high, out, n) writes a pair of rows.
  template <class E, class F>
  OperandA<Bf16> pair_rows(const Matrix<E>& tile, const F& pair) const;

  Tensor buffer_;
};

inline float widened(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// x minus x rounded to bfloat16.
float bf16_rounding_error(float x);

// y += factor * x
void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor);

// y = factor * x
void scaled_row(float* y, const Bf16* x, int64_t n, float factor);

// y += times * (factor * x minus factor * x rounded to bfloat16)
void add_rounding_errors(float* y, const Bf16* x, int64_t n, float factor, float times);

// Whether x_i >= y_i for any i, of numbers that are not negative.
bool any_at_least(const Bf16* x, const Bf16* y, int64_t n);

// sum x_i y_i
float dot_bf16(const Bf16* x, const float* y, int64_t n);

}  // namespace cwdpo
