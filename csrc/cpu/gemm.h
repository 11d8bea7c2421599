// Products of matrices of floats, or of bfloat16, with float32 sums and results, where the processor has AVX-512.
//
// torch.mm is 10 to 15 % slower on tiles of a head (see CONTRIBUTING.md), and has no product of bfloat16 with a float32
// result: it rounds, and operands converted to float32 multiply at half the rate of AVX512-BF16's dot products of
// pairs. A product of two bfloat16 is exact in float32, so only sums are rounded, as in float32; the instruction takes
// subnormal numbers (below 1.2e-38) for zero.
//
// A step of a sum multiplies what fits 32 bits: one float, or a pair of bfloat16. The right factor [K, N] is stored in
// steps: of bfloat16, rows 2k and 2k + 1 side by side, 0 after an odd last row.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace cwdpo {

using Bf16 = uint16_t;  // its bits

template <class E>
constexpr int64_t kTerms = sizeof(float) / sizeof(E);  // of a step

template <class E>
constexpr ScalarType kElementType = ScalarType::Float;
template <>
inline constexpr ScalarType kElementType<Bf16> = ScalarType::BFloat16;

// What products of E run on: ours where the compiler and the processor have the instructions, else torch's.
enum class Products { kTorch, kAvx512, kAvx512Bf16 };
Products products();
template <class E>
bool multiplies() {
  return products() >= (sizeof(E) == sizeof(float) ? Products::kAvx512 : Products::kAvx512Bf16);
}

// The left factor [M, K]: step k of row i lies at start + i * row_stride + k * step_stride (bytes).
template <class E>
struct LeftFactor {
  const char* start;
  int64_t rows, depth, row_stride, step_stride;
};

// Rows as they lie in memory.
template <class E>
LeftFactor<E> left_factor(const E* rows, int64_t count, int64_t depth) {
  const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(E));
  return {reinterpret_cast<const char*>(rows), count, depth, row_bytes, sizeof(float)};
}

inline LeftFactor<float> left_factor(const Matrix<float>& matrix) {
  const int64_t bytes = sizeof(float);
  return {
      reinterpret_cast<const char*>(matrix.data), matrix.rows, matrix.columns, matrix.row_stride * bytes,
      matrix.column_stride * bytes};
}

// The right factor [K, N], in panels of 64 columns: steps [N / 64, K / kTerms, 64], 0 where K or N ends.
template <class E>
class RightFactor {
 public:
  RightFactor(int64_t max_depth, int64_t columns);
  void pack(const E* rows, int64_t depth);             // from [K, N]
  void pack_transposed(const E* rows, int64_t depth);  // from [N, K]
  const uint32_t* panel(int64_t i) const { return data<uint32_t>(panels_) + i * steps() * kPanel; }
  int64_t steps() const { return (depth_ + kTerms<E> - 1) / kTerms<E>; }

  static constexpr int64_t kPanel = 64;
  const int64_t columns;

 private:
  Tensor panels_;
  int64_t depth_ = 0;
};

// out = left right, or out += left right.
template <class E>
void multiply(const Matrix<float>& out, const LeftFactor<E>& left, const RightFactor<E>& right, bool accumulate);

}  // namespace cwdpo
