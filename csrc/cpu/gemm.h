// Matrix products of float32 or bfloat16 operands with float32 accumulation and output, for processors with AVX-512 and,
// in bfloat16, AMX (amx.h).
//
// They exist because torch.mm is 10 to 15 % slower on the tiles of a head, and because it has no bfloat16 product with
// a float32 result: it rounds the result, and operands converted to float32 run at half the rate of AVX512-BF16's
// pairwise dot products. The product of two bfloat16 numbers is exact in float32, so only the sums are rounded, as in
// float32. The instruction flushes subnormal numbers (below 1.2e-38) to zero.
//
// Notation: out [M, N] = A [M, K] B [K, N]. One step along K consumes 32 bits of each operand: one float, or a pair of
// bfloat16. B is packed by steps: for bfloat16, rows 2k and 2k + 1 are interleaved, and an odd last row is paired with
// zeros.
#pragma once

#include <cstdint>
#include <type_traits>

#include "parallel.h"
#include "tensors.h"

namespace cwdpo {

using Bf16 = uint16_t;  // the bits of a bfloat16

template <class E>
constexpr int64_t kTermsPerStep = sizeof(float) / sizeof(E);

template <class E>
constexpr ScalarType kElementType = ScalarType::Float;
template <>
inline constexpr ScalarType kElementType<Bf16> = ScalarType::BFloat16;

// The best instructions that both the compiler and the processor support. kTorch: use torch.mm. kPlain, kPlainTiles: the
// loops for AVX-512 and for AMX in plain C++, so that tests can run them on any processor; never chosen otherwise.
enum class GemmBackend { kTorch, kAvx512, kAvx512Bf16, kAmx, kPlain, kPlainTiles };
GemmBackend gemm_backend();
// Whether `multiply` below supports operands of type E.
template <class E>
bool has_gemm() {
  return gemm_backend() >= (sizeof(E) == sizeof(float) ? GemmBackend::kAvx512 : GemmBackend::kAvx512Bf16);
}

// The operand A [M, K]. Step k of row i lies at start + i * row_stride + k * step_stride, in bytes.
template <class E>
struct OperandA {
  const char* start;
  int64_t rows, depth, row_stride, step_stride;
};

// Contiguous rows.
template <class E>
OperandA<E> operand_a(const E* rows, int64_t count, int64_t depth) {
  const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(E));
  return {reinterpret_cast<const char*>(rows), count, depth, row_bytes, sizeof(float)};
}

inline OperandA<float> operand_a(const Matrix<float>& matrix) {
  const int64_t bytes = sizeof(float);
  return {
      reinterpret_cast<const char*>(matrix.data), matrix.rows, matrix.columns, matrix.row_stride * bytes,
      matrix.column_stride * bytes};
}

// The operand B [K, N], packed in panels of 64 columns: [N / 64, K / kTermsPerStep, 64] steps, padded with zeros. AMX
// reads 16 steps of bfloat16 at a time, so their number is a multiple of that.
template <class E>
class PackedB {
 public:
  PackedB(int64_t max_depth, int64_t columns);
  void pack(const E* rows, int64_t depth, bool once = false);  // from [K, N]; `once`: as in for_rows_once
  void pack_transposed(const E* rows, int64_t depth);          // from [N, K], once in a pass
  const uint32_t* panel(int64_t i) const { return data<uint32_t>(panels_) + i * steps() * kPanel; }
  int64_t steps() const { return steps(depth_); }

  static constexpr int64_t kPanel = 64;  // columns of a panel
  static constexpr int64_t kStepsOfTile = std::is_same_v<E, Bf16> ? 16 : 1;  // of AMX
  const int64_t columns;

 private:
  static int64_t steps(int64_t depth) {
    const int64_t tile = kTermsPerStep<E> * kStepsOfTile;
    return (depth + tile - 1) / tile * kStepsOfTile;
  }

  Tensor panels_;
  int64_t depth_ = 0;
};

// out[j] = a step of low[j] and high[j]; high = nullptr stands for zeros.
void interleave(const Bf16* low, const Bf16* high, uint32_t* out, int64_t n);

// out = a b, or out += a b.
template <class E>
void multiply(const Matrix<float>& out, const OperandA<E>& a, const PackedB<E>& b, bool accumulate);

}  // namespace cwdpo
