#include "gemm_kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace cwdpo {
namespace {

// Entry `term` of a step: a float, or one of a pair of bfloat16.
template <class E>
float entry(uint32_t step, int64_t term) {
  if constexpr (std::is_same_v<E, float>) return std::bit_cast<float>(step);
  return term == 0 ? low_entry(step) : high_entry(step);
}

template <class E>
void multiply_plain(const Block& block) {
  constexpr int64_t kTerms = kTermsPerStep<E>;
  for (int64_t i = 0; i < block.rows; ++i) {
    for (int64_t j = 0; j < block.columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < block.depth; ++k) {
        uint32_t step = 0;
        std::memcpy(
            &step, block.a + i * block.row_stride + k / kTerms * block.step_stride,
            std::min(kTerms, block.depth - k / kTerms * kTerms) * sizeof(E));
        const uint32_t other = block.b[k / kTerms * PackedB<E>::kPanel + j];
        sum += static_cast<double>(entry<E>(step, k % kTerms)) * entry<E>(other, k % kTerms);
      }
      float* out = block.out + i * block.out_stride + j;
      *out = static_cast<float>(block.accumulate ? *out + sum : sum);
    }
  }
}

Bf16 rounded_plain(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<Bf16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

bool is_plain() { return gemm_backend() >= GemmBackend::kPlain; }

}  // namespace
}  // namespace cwdpo

#if CWDPO_HAS_AVX512_GEMM
#include <immintrin.h>
// Functions on floats contain no bfloat16 instructions, so they also run on processors without AVX512-BF16.
#define CWDPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace cwdpo {
namespace {

constexpr int64_t kPanel = PackedB<float>::kPanel;
constexpr int64_t kPart = 512;  // longer sums are split into parts of this many terms, for accuracy

// A mask of the first n lanes of a vector.
CWDPO_AVX512 CWDPO_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : (1u << n) - 1; }

// sums += one step. Reads `bytes` of each row of A and pads them with zeros to 32 bits.
template <class E, int M, int V>
CWDPO_AVX512 CWDPO_INLINE void add_step(
    __m512 (&sums)[M][V], const char* a, int64_t row_stride, size_t bytes, const uint32_t* b) {
  __m512i b_vectors[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) b_vectors[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    int32_t step = 0;
    std::memcpy(&step, a + i * row_stride, bytes);
    const __m512i a_vector = _mm512_set1_epi32(step);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      if constexpr (std::is_same_v<E, Bf16>) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)a_vector, (__m512bh)b_vectors[j]);
      } else {
        sums[i][j] = _mm512_fmadd_ps(_mm512_castsi512_ps(a_vector), _mm512_castsi512_ps(b_vectors[j]), sums[i][j]);
      }
    }
  }
}

// out = sums, or out += sums. The loops are unrolled, or the compiler moves the sums from registers to memory first.
template <int M, int V, bool kFull>
CWDPO_AVX512 CWDPO_INLINE void store(__m512 (&sums)[M][V], const Block& block, bool accumulate) {
  __mmask16 masks[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) masks[j] = kFull ? 0xffff : first_lanes(block.columns - 16 * j);
  if (accumulate) {
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const float* out = block.out + i * block.out_stride;
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += _mm512_maskz_loadu_ps(masks[j], out + 16 * j);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    float* out = block.out + i * block.out_stride;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) _mm512_mask_storeu_ps(out + 16 * j, masks[j], sums[i][j]);
  }
}

template <class E, int M, int V>
CWDPO_AVX512 void multiply_block(const Block& block) {
  const char* a = block.a;
  const uint32_t* b = block.b;
  bool accumulate = block.accumulate;
  for (int64_t rest = block.depth; rest > 0; rest -= kPart, accumulate = true) {
    __m512 sums[M][V] = {};
    for (int64_t k = 0; k < std::min(rest, kPart) / kTermsPerStep<E>; ++k, a += block.step_stride, b += kPanel) {
      add_step<E>(sums, a, block.row_stride, sizeof(int32_t), b);
    }
    if (rest < kPart && rest % kTermsPerStep<E> != 0) add_step<E>(sums, a, block.row_stride, sizeof(E), b);
    const bool is_full = block.columns == 16 * V;
    is_full ? store<M, V, true>(sums, block, accumulate) : store<M, V, false>(sums, block, accumulate);
  }
}

template <class E>
constexpr auto kMicroKernels = []<int... I>(std::integer_sequence<int, I...>) {
  return std::array<MicroKernel, sizeof...(I)>{multiply_block<E, I / 4 + 1, I % 4 + 1>...};
}(std::make_integer_sequence<int, kBlockRows * 4>());

// Rounds the masked floats to bfloat16 and returns their bits in 32-bit lanes; the other lanes are 0.
CWDPO_AVX512 CWDPO_INLINE __m512i rounded(const float* x, __mmask16 mask) {
  return _mm512_maskz_cvtepu16_epi32(mask, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x)));
}

}  // namespace

template <class E>
MicroKernel micro_kernel(int64_t rows, int64_t columns, bool plain) {
  if (plain) return multiply_plain<E>;
  return kMicroKernels<E>[(rows - 1) * 4 + (columns + 15) / 16 - 1];
}

CWDPO_AVX512 static void round_row_avx512(const float* x, Bf16* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    _mm512_mask_cvtepi32_storeu_epi16(out + i, mask, rounded(x + i, mask));
  }
}

CWDPO_AVX512 static void round_pair_avx512(const float* low, const float* high, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    __m512i pair = rounded(low + i, mask);
    if (high != nullptr) pair = _mm512_or_si512(pair, _mm512_maskz_slli_epi32(mask, rounded(high + i, mask), 16));
    _mm512_mask_storeu_epi32(out + i, mask, pair);
  }
}

#else

namespace cwdpo {

[[noreturn]] static void not_compiled() { throw std::logic_error("cwdpo_kernels was compiled without AVX-512 products"); }
template <class E>
MicroKernel micro_kernel(int64_t, int64_t, bool plain) {
  if (plain) return multiply_plain<E>;
  not_compiled();
}
static void round_row_avx512(const float*, Bf16*, int64_t) { not_compiled(); }
static void round_pair_avx512(const float*, const float*, uint32_t*, int64_t) { not_compiled(); }

#endif

void round_row(const float* x, Bf16* out, int64_t n) {
  if (!is_plain()) return round_row_avx512(x, out, n);
  for (int64_t i = 0; i < n; ++i) out[i] = rounded_plain(x[i]);
}

void round_pair(const float* low, const float* high, uint32_t* out, int64_t n) {
  if (!is_plain()) return round_pair_avx512(low, high, out, n);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = rounded_plain(low[i]) | (high == nullptr ? 0u : static_cast<uint32_t>(rounded_plain(high[i])) << 16);
  }
}

template MicroKernel micro_kernel<float>(int64_t, int64_t, bool);
template MicroKernel micro_kernel<Bf16>(int64_t, int64_t, bool);

}  // namespace cwdpo
