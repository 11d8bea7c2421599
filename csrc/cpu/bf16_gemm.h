// Products of bfloat16 matrices with float32 sums and results, by AVX512-BF16's dot products of pairs. torch.mm has
// none: it rounds its result to bfloat16, and operands converted to float32 multiply at half the rate.
//
// A product of two bfloat16 is exact in float32, so only sums are rounded, as in float32; the instruction takes
// subnormal numbers (below 1.2e-38) for zero.
//
// A matrix [K, N] is stored as pairs: rows 2k and 2k + 1 side by side in 32 bits, 0 after an odd last row.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace cwdpo {

using Bf16 = uint16_t;  // its bits

// Whether products run on these instructions: where the compiler and the processor have them, unless switched off.
bool multiplies_bf16();

// The left factor [M, K]: pair k of row i lies at start + i * row_stride + k * pair_stride (bytes).
struct Bf16Left {
  const char* start;
  int64_t rows, depth, row_stride, pair_stride;
};

// Rows as they lie in memory.
Bf16Left left_factor(const Bf16* rows, int64_t count, int64_t depth);

// The right factor [K, N], in panels of 64 columns: pairs [N / 64, K / 2, 64], 0 where K or N ends.
class Bf16Right {
 public:
  Bf16Right(int64_t max_depth, int64_t columns);
  void pack(const Bf16* rows, int64_t depth);             // from [K, N]
  void pack_transposed(const Bf16* rows, int64_t depth);  // from [N, K]
  const uint32_t* panel(int64_t i) const { return data<uint32_t>(pairs_) + i * pairs() * kPanel; }
  int64_t pairs() const { return (depth_ + 1) / 2; }

  static constexpr int64_t kPanel = 64;
  const int64_t columns;

 private:
  Tensor pairs_;
  int64_t depth_ = 0;
};

// A tile of floats [B, R], rounded to bfloat16.
class Bf16Rounded {
 public:
  Bf16Rounded(int64_t max_rows, int64_t max_columns);
  Bf16Left rows(const Matrix<float>& tile) const;        // as the left factor [B, R]
  Bf16Left transposed(const Matrix<float>& tile) const;  // as the left factor [R, B]

 private:
  Tensor buffer_;
};

// out = left right, or out += left right.
void multiply(const Matrix<float>& out, const Bf16Left& left, const Bf16Right& right, bool accumulate);

// What rounding to bfloat16 takes from x.
float lost_to_bf16(float x);

// y += factor * x
void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor);

}  // namespace cwdpo
