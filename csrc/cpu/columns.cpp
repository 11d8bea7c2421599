#include "columns.h"

#include <algorithm>
#include <array>
#include <limits>

#include "vector.h"

namespace cwdpo {
namespace {

// Sums of this many terms first, then sums of those: rounding grows with 32 + B / 32 instead of B.
constexpr int64_t kPart = 32;

template <class T>
CWDPO_INLINE void max_of(Columns<T> tile, T* top) {
  std::fill_n(top, tile.count, -std::numeric_limits<T>::infinity());
  for (int64_t v = 0; v < tile.size; ++v) {
    const T* z = tile.z + v * tile.stride;
#pragma omp simd
    for (int64_t n = 0; n < tile.count; ++n) top[n] = z[n] > top[n] ? z[n] : top[n];
  }
}

// K sums a column: add(z, parts) adds one row of the tile to each of the sums of its part.
template <class T, size_t K, class F>
CWDPO_INLINE void sum_in_parts(Columns<T> tile, const std::array<T*, K>& totals, const F& add) {
  T parts[K][kMaxColumns];
  for (T* total : totals) std::fill_n(total, tile.count, T(0));
  for (int64_t start = 0; start < tile.size; start += kPart) {
    for (size_t k = 0; k < K; ++k) std::fill_n(parts[k], tile.count, T(0));
    const int64_t stop = std::min(start + kPart, tile.size);
    for (int64_t v = start; v < stop; ++v) add(tile.z + v * tile.stride, parts);
    for (size_t k = 0; k < K; ++k) {
      T *total = totals[k], *part = parts[k];
#pragma omp simd
      for (int64_t n = 0; n < tile.count; ++n) total[n] += part[n];
    }
  }
}

template <class T>
CWDPO_INLINE void exp_sum(Columns<T> tile, const T* peak, T* total) {
  sum_in_parts(tile, std::array{total}, [&](const T* z, T (*parts)[kMaxColumns]) {
    T* part = parts[0];
#pragma omp simd
    for (int64_t n = 0; n < tile.count; ++n) part[n] += fast_exp(z[n] - peak[n]);
  });
}

template <class T>
CWDPO_INLINE void exp_sums(Columns<T> tile, const T* peak, T* total, T* moment) {
  sum_in_parts(tile, std::array{total, moment}, [&](const T* z, T (*parts)[kMaxColumns]) {
    T *weights = parts[0], *moments = parts[1];
#pragma omp simd
    for (int64_t n = 0; n < tile.count; ++n) {
      const T x = z[n] - peak[n], weight = fast_exp(x);
      weights[n] += weight;
      moments[n] += weight * (x < Exp<T>::kLow ? Exp<T>::kLow : x);  // 0 * -inf is no number
    }
  });
}

template <class T>
CWDPO_INLINE void exponentiate(Columns<T> tile, const T* peak, T inverse_cap, T* total) {
  sum_in_parts(tile, std::array{total}, [&](T* z, T (*parts)[kMaxColumns]) {
    T* part = parts[0];
#pragma omp simd
    for (int64_t n = 0; n < tile.count; ++n) {
      const T weight = fast_exp(z[n] - peak[n]), bend = z[n] * inverse_cap;
      part[n] += weight;
      z[n] = weight * (T(1) - bend * bend);
    }
  });
}

template <class T>
CWDPO_INLINE void across(const T* z, T* out, int64_t size, const T* peak, const T* factor, T inverse_cap) {
#pragma omp simd
  for (int64_t n = 0; n < size; ++n) {
    const T bend = z[n] * inverse_cap;
    out[n] = fast_exp(z[n] - peak[n]) * factor[n] * (T(1) - bend * bend);
  }
}

}  // namespace

#define CWDPO_DEFINE(T)                                                                                          \
  CWDPO_FOR_EACH_PROCESSOR void max_of_columns(Columns<T> tile, T* top) { max_of(tile, top); }                   \
  CWDPO_FOR_EACH_PROCESSOR void exp_sum_of_columns(Columns<T> tile, const T* peak, T* total) {                   \
    exp_sum(tile, peak, total);                                                                                  \
  }                                                                                                              \
  CWDPO_FOR_EACH_PROCESSOR void exp_sums_of_columns(Columns<T> tile, const T* peak, T* total, T* moment) {       \
    exp_sums(tile, peak, total, moment);                                                                         \
  }                                                                                                              \
  CWDPO_FOR_EACH_PROCESSOR void exp_columns(Columns<T> tile, const T* peak, T inverse_cap, T* total) {           \
    exponentiate(tile, peak, inverse_cap, total);                                                                \
  }                                                                                                              \
  CWDPO_FOR_EACH_PROCESSOR void exp_across(                                                                      \
      const T* z, T* out, int64_t n, const T* peak, const T* factor, T inverse_cap) {                            \
    across(z, out, n, peak, factor, inverse_cap);                                                                \
  }

CWDPO_DEFINE(float)
CWDPO_DEFINE(double)

}  // namespace cwdpo
