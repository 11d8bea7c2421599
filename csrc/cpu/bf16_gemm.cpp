#include "bf16_gemm.h"

#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "vector.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define CWDPO_HAS_BF16 1
#include <immintrin.h>
#define CWDPO_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#else
#define CWDPO_HAS_BF16 0
#endif

namespace cwdpo {
namespace {

std::atomic<bool> switched_off = false;

bool processor_has_bf16() {
#if CWDPO_HAS_BF16
  static const bool found = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
  return found;
#else
  return false;
#endif
}

constexpr int64_t kPanel = Bf16Right::kPanel;
constexpr int64_t kPart = 512;  // terms of a sum; sums of longer products are added up from such parts
constexpr int64_t kBlock = 6;  // rows of a block of the result: 6 x 4 sums, 4 operands and a pair fill the 32 registers

// A block of the result: up to 6 rows by up to 4 vectors, the last of them masked.
struct Block {
  const char* left;
  int64_t row_stride, pair_stride, depth;
  const uint32_t* right;
  float* out;
  int64_t out_stride;
  uint16_t last;
  bool accumulate;
};

// What the rest of the file does with vectors.
using MultiplyBlock = void (*)(const Block&);
MultiplyBlock block_function(int64_t rows, int64_t vectors);
void round_row(const float* x, Bf16* out, int64_t n);
void round_pair(const float* low, const float* high, uint32_t* out, int64_t n);  // high: null for zeros

#if CWDPO_HAS_BF16

template <int M, int V>
CWDPO_BF16 CWDPO_INLINE void add_pair(
    __m512 (&sums)[M][V], const char* left, int64_t row_stride, size_t bytes, const uint32_t* right) {
  __m512bh operands[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) operands[j] = (__m512bh)_mm512_loadu_si512(right + 16 * j);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    int32_t pair = 0;
    std::memcpy(&pair, left + i * row_stride, bytes);
    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, operands[j]);
  }
}

template <int M, int V>
CWDPO_BF16 void multiply_block(const Block& block) {
  const auto mask = [&](int j) -> __mmask16 { return j == V - 1 ? block.last : 0xffff; };
  const char* left = block.left;
  const uint32_t* right = block.right;
  bool accumulate = block.accumulate;
  for (int64_t rest = block.depth; rest > 0; rest -= kPart, accumulate = true) {
    __m512 sums[M][V] = {};
    for (int64_t k = 0; k < std::min(rest, kPart) / 2; ++k, left += block.pair_stride, right += kPanel) {
      add_pair(sums, left, block.row_stride, sizeof(int32_t), right);
    }
    if (rest < kPart && rest % 2) add_pair(sums, left, block.row_stride, sizeof(Bf16), right);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < V; ++j) {
        float* out = block.out + i * block.out_stride + 16 * j;
        if (accumulate) sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(mask(j), out));
        _mm512_mask_storeu_ps(out, mask(j), sums[i][j]);
      }
    }
  }
}

constexpr auto kBlockFunctions = []<int... I>(std::integer_sequence<int, I...>) {
  return std::array<MultiplyBlock, sizeof...(I)>{multiply_block<I / 4 + 1, I % 4 + 1>...};
}(std::make_integer_sequence<int, kBlock * 4>());

MultiplyBlock block_function(int64_t rows, int64_t vectors) { return kBlockFunctions[(rows - 1) * 4 + vectors - 1]; }

// The mask's numbers rounded to bfloat16, their bits in 32-bit integers; 0 for the others.
CWDPO_BF16 CWDPO_INLINE __m512i rounded(const float* x, __mmask16 mask) {
  return _mm512_maskz_cvtepu16_epi32(mask, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x)));
}

CWDPO_BF16 CWDPO_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (1u << n) - 1; }

CWDPO_BF16 void round_row(const float* x, Bf16* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    _mm512_mask_cvtepi32_storeu_epi16(out + i, mask, rounded(x + i, mask));
  }
}

CWDPO_BF16 void round_pair(const float* low, const float* high, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    __m512i pair = rounded(low + i, mask);
    if (high != nullptr) pair = _mm512_or_si512(pair, _mm512_maskz_slli_epi32(mask, rounded(high + i, mask), 16));
    _mm512_mask_storeu_epi32(out + i, mask, pair);
  }
}

#else

[[noreturn]] void missing() { throw std::logic_error("compiled without AVX512-BF16"); }
MultiplyBlock block_function(int64_t, int64_t) { missing(); }
void round_row(const float*, Bf16*, int64_t) { missing(); }
void round_pair(const float*, const float*, uint32_t*, int64_t) { missing(); }

#endif

// out[j] = low[j] and high[j] side by side, 0 from n on; high: null for zeros.
CWDPO_FOR_EACH_PROCESSOR void interleave(const Bf16* low, const Bf16* high, uint32_t* out, int64_t n) {
  if (high == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
  }
  for (int64_t j = n; j < kPanel; ++j) out[j] = 0;
}

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Rows a power of two apart would meet in few sets of a cache.
constexpr int64_t kPadding = 32;

}  // namespace

bool multiplies_bf16() { return processor_has_bf16() && !switched_off; }

Bf16Left left_factor(const Bf16* rows, int64_t count, int64_t depth) {
  const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(Bf16));
  return {reinterpret_cast<const char*>(rows), count, depth, row_bytes, 2 * sizeof(Bf16)};
}

Bf16Right::Bf16Right(int64_t max_depth, int64_t n_columns)
    : columns(n_columns), pairs_(empty({panels(n_columns) * ((max_depth + 1) / 2) * kPanel}, ScalarType::Int)) {}

void Bf16Right::pack(const Bf16* rows, int64_t depth) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(pairs_);
  for_rows(pairs(), 2 * columns, [&](int64_t k) {
    const Bf16* low = rows + 2 * k * columns;
    const Bf16* high = 2 * k + 1 < depth ? low + columns : nullptr;
    for (int64_t start = 0; start < columns; start += kPanel) {
      interleave(
          low + start, high == nullptr ? nullptr : high + start, out + start * pairs() + k * kPanel,
          std::min(kPanel, columns - start));
    }
  });
}

void Bf16Right::pack_transposed(const Bf16* rows, int64_t depth) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(pairs_);
  for_rows(panels(columns) * kPanel, depth, [&](int64_t n) {
    uint32_t* column = out + n / kPanel * kPanel * pairs() + n % kPanel;
    for (int64_t k = 0; k < pairs(); ++k) {
      uint32_t pair = 0;
      const size_t bytes = std::min<int64_t>(2, depth - 2 * k) * sizeof(Bf16);
      if (n < columns) std::memcpy(&pair, rows + n * depth + 2 * k, bytes);
      column[k * kPanel] = pair;
    }
  });
}

Bf16Rounded::Bf16Rounded(int64_t max_rows, int64_t max_columns)
    : buffer_(empty({(max_rows + 1) * (max_columns + kPadding)}, ScalarType::BFloat16)) {}

Bf16Left Bf16Rounded::rows(const Matrix<float>& tile) const {
  const int64_t stride = tile.columns + kPadding;
  Bf16* out = data<Bf16>(buffer_);
  for_rows(tile.rows, tile.columns, [&](int64_t v) { round_row(tile.row(v), out + v * stride, tile.columns); });
  Bf16Left left = left_factor(out, tile.rows, tile.columns);
  left.row_stride = stride * sizeof(Bf16);
  return left;
}

Bf16Left Bf16Rounded::transposed(const Matrix<float>& tile) const {
  const int64_t stride = tile.columns + kPadding;
  uint32_t* out = data<uint32_t>(buffer_);
  for_rows((tile.rows + 1) / 2, 2 * tile.columns, [&](int64_t k) {
    const float* high = 2 * k + 1 < tile.rows ? tile.row(2 * k + 1) : nullptr;
    round_pair(tile.row(2 * k), high, out + k * stride, tile.columns);
  });
  // Whole pairs, the last one filled up with 0.
  const int64_t bytes = sizeof(uint32_t);
  return {data<char>(buffer_), tile.columns, (tile.rows + 1) / 2 * 2, bytes, stride * bytes};
}

void multiply(const Matrix<float>& out, const Bf16Left& left, const Bf16Right& right, bool accumulate) {
  const int64_t blocks = (left.rows + kBlock - 1) / kBlock, n_panels = panels(right.columns);
  for_rows(blocks * n_panels, kBlock * kPanel * std::max<int64_t>(left.depth / 32, 1), [&](int64_t i) {
    const int64_t row = i / n_panels * kBlock, panel = i % n_panels;
    const int64_t rows = std::min(kBlock, left.rows - row), columns = std::min(kPanel, right.columns - panel * kPanel);
    const int64_t vectors = (columns + 15) / 16, rest = columns - 16 * (vectors - 1);
    block_function(rows, vectors)(
        {left.start + row * left.row_stride, left.row_stride, left.pair_stride, left.depth, right.panel(panel),
         out.row(row) + panel * kPanel, out.row_stride, static_cast<uint16_t>((1u << rest) - 1), accumulate});
  });
}

float lost_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x - std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

CWDPO_FOR_EACH_PROCESSOR void add_scaled_row(float* y, const Bf16* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * std::bit_cast<float>(static_cast<uint32_t>(x[i]) << 16);
}

}  // namespace cwdpo

// For tests and benchmarks, which measure the processor with and without: returns what is used from now on.
extern "C" __attribute__((visibility("default"))) bool cwdpo_use_bf16_instructions(bool use) {
  cwdpo::switched_off = !use;
  return cwdpo::multiplies_bf16();
}
