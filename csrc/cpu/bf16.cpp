#include "bf16.h"

#include <bit>

#include "gemm_kernels.h"
#include "vector.h"

namespace cwdpo {
namespace {

// Avoids rows a power of two apart, which would map to the same few cache sets.
constexpr int64_t kPadding = 32;

CWDPO_INLINE float rounding_error(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x - std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

}  // namespace

Bf16Tile::Bf16Tile(int64_t max_rows, int64_t max_columns)
    : buffer_(empty({(max_rows + 1) * (max_columns + kPadding)}, ScalarType::BFloat16)) {}

OperandA<Bf16> Bf16Tile::round(const Matrix<float>& tile) const {
  const int64_t stride = tile.columns + kPadding;
  Bf16* out = data<Bf16>(buffer_);
  for_rows(tile.rows, tile.columns, [&](int64_t v) { round_row(tile.row(v), out + v * stride, tile.columns); });
  OperandA<Bf16> a = operand_a<Bf16>(out, tile.rows, tile.columns);
  a.row_stride = stride * sizeof(Bf16);
  return a;
}

template <class E, class F>
OperandA<Bf16> Bf16Tile::pair_rows(const Matrix<E>& tile, const F& pair) const {
  const int64_t stride = tile.columns + kPadding;
  uint32_t* out = data<uint32_t>(buffer_);
  for_rows((tile.rows + 1) / 2, 2 * tile.columns, [&](int64_t k) {
    const E* high = 2 * k + 1 < tile.rows ? tile.row(2 * k + 1) : nullptr;
    pair(tile.row(2 * k), high, out + k * stride, tile.columns);
  });
  // An odd last row is paired with zeros.
  const int64_t bytes = sizeof(uint32_t);
  return {data<char>(buffer_), tile.columns, (tile.rows + 1) / 2 * 2, bytes, stride * bytes};
}

OperandA<Bf16> Bf16Tile::round_transposed(const Matrix<float>& tile) const {
  return pair_rows(tile, [](const float* low, const float* high, uint32_t* out, int64_t n) {
    round_pair(low, high, out, n);
  });
}

OperandA<Bf16> Bf16Tile::transposed(const Matrix<Bf16>& tile) const {
  return pair_rows(tile, [](const Bf16* low, const Bf16* high, uint32_t* out, int64_t n) {
    interleave(low, high, out, n);
  });
}

float bf16_rounding_error(float x) { return rounding_error(x); }

CWDPO_FOR_EACH_PROCESSOR void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * widened(x[i]);
}

CWDPO_FOR_EACH_PROCESSOR void scaled_row(float* y, const Bf16* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * widened(x[i]);
}

CWDPO_FOR_EACH_PROCESSOR void add_rounding_errors(float* y, const Bf16* x, int64_t n, float factor, float times) {
  for (int64_t i = 0; i < n; ++i) y[i] += times * rounding_error(factor * widened(x[i]));
}

CWDPO_FOR_EACH_PROCESSOR bool any_at_least(const Bf16* x, const Bf16* y, int64_t n) {
  uint16_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < n; ++i) any |= static_cast<uint16_t>(x[i] >= y[i] ? 1 : 0);
  return any != 0;
}

CWDPO_FOR_EACH_PROCESSOR float dot_bf16(const Bf16* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += widened(x[i]) * y[i];
  return sum;
}

}  // namespace cwdpo
