#include "strips.h"

#include <algorithm>
#include <array>
#include <limits>

#include "vector.h"

namespace cwdpo {
namespace {

// Sum in parts of this many terms, then sum the parts: the rounding error grows with 32 + B / 32 instead of B.
constexpr int64_t kPart = 32;

template <class T>
CWDPO_INLINE void max_of(Strip<T> strip, T* max_logit) {
  std::fill_n(max_logit, strip.count, -std::numeric_limits<T>::infinity());
  for (int64_t v = 0; v < strip.size; ++v) {
    const T* z = strip.z + v * strip.stride;
#pragma omp simd
    for (int64_t n = 0; n < strip.count; ++n) max_logit[n] = z[n] > max_logit[n] ? z[n] : max_logit[n];
  }
}

// Computes K sums per token. add(z, parts) adds one vocabulary entry of the strip to the K partial sums.
template <class T, size_t K, class F>
CWDPO_INLINE void sum_in_parts(Strip<T> strip, const std::array<T*, K>& sums, const F& add) {
  T parts[K][kStripTokens];
  for (T* sum : sums) std::fill_n(sum, strip.count, T(0));
  for (int64_t start = 0; start < strip.size; start += kPart) {
    for (size_t k = 0; k < K; ++k) std::fill_n(parts[k], strip.count, T(0));
    const int64_t stop = std::min(start + kPart, strip.size);
    for (int64_t v = start; v < stop; ++v) add(strip.z + v * strip.stride, parts);
    for (size_t k = 0; k < K; ++k) {
      T *sum = sums[k], *part = parts[k];
#pragma omp simd
      for (int64_t n = 0; n < strip.count; ++n) sum[n] += part[n];
    }
  }
}

template <class T>
CWDPO_INLINE void exp_sum(Strip<T> strip, const T* max_logit, T* sum_exp) {
  sum_in_parts(strip, std::array{sum_exp}, [&](const T* z, T (*parts)[kStripTokens]) {
    T* part = parts[0];
#pragma omp simd
    for (int64_t n = 0; n < strip.count; ++n) part[n] += fast_exp(z[n] - max_logit[n]);
  });
}

template <class T>
CWDPO_INLINE void sum_of(Strip<T> strip, T* sum) {
  sum_in_parts(strip, std::array{sum}, [&](const T* z, T (*parts)[kStripTokens]) {
    T* part = parts[0];
#pragma omp simd
    for (int64_t n = 0; n < strip.count; ++n) part[n] += z[n];
  });
}

template <class T>
CWDPO_INLINE T at_least_low(T x) {
  return x < Exp<T>::kLow ? Exp<T>::kLow : x;  // exp(x) is 0 there, and 0 * -inf would be NaN
}

template <class T>
CWDPO_INLINE void exp_moments(Strip<T> strip, const T* max_logit, T* sum_exp, T* moment, T* sum_sq) {
  sum_in_parts(strip, std::array{sum_exp, moment, sum_sq}, [&](const T* z, T (*parts)[kStripTokens]) {
    T *sums = parts[0], *moments = parts[1], *squares = parts[2];
#pragma omp simd
    for (int64_t n = 0; n < strip.count; ++n) {
      const T x = z[n] - max_logit[n], exp_x = fast_exp(x);
      sums[n] += exp_x;
      moments[n] += exp_x * at_least_low(x);
      squares[n] += exp_x * exp_x;
    }
  });
}

// The slope of the soft cap at the capped logit z. Without a cap it is 1 and z is not read, because z may be -inf.
template <bool kCapped, class T>
CWDPO_INLINE T slope_at(T z, T cap) {
  if constexpr (!kCapped) return T(1);
  const T ratio = z / cap;
  return T(1) - ratio * ratio;
}

template <bool kCapped, class T>
CWDPO_INLINE void exponentiate(Strip<T> strip, const T* max_logit, T cap, T* sum_exp) {
  sum_in_parts(strip, std::array{sum_exp}, [&](T* z, T (*parts)[kStripTokens]) {
    T* part = parts[0];
#pragma omp simd
    for (int64_t n = 0; n < strip.count; ++n) {
      const T exp_z = fast_exp(z[n] - max_logit[n]);
      part[n] += exp_z;
      z[n] = exp_z * slope_at<kCapped>(z[n], cap);
    }
  });
}

template <bool kCapped, bool kLog, class T>
CWDPO_INLINE void exp_across(
    const T* z, T* out, int64_t size, const T* max_logit, const T* factor, const T* log_factor, T cap) {
#pragma omp simd
  for (int64_t n = 0; n < size; ++n) {
    const T x = z[n] - max_logit[n];
    T total = factor[n];
    if constexpr (kLog) total += log_factor[n] * at_least_low(x);
    out[n] = fast_exp(x) * total * slope_at<kCapped>(z[n], cap);
  }
}

}  // namespace

#define CWDPO_DEFINE(T)                                                                                   \
  CWDPO_FOR_EACH_PROCESSOR void max_of_strip(Strip<T> strip, T* max_logit) { max_of(strip, max_logit); }  \
  CWDPO_FOR_EACH_PROCESSOR void sum_of_strip(Strip<T> strip, T* sum) { sum_of(strip, sum); }              \
  CWDPO_FOR_EACH_PROCESSOR void exp_sum_of_strip(Strip<T> strip, const T* max_logit, T* sum_exp) {        \
    exp_sum(strip, max_logit, sum_exp);                                                                   \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR void exp_moments_of_strip(                                                     \
      Strip<T> strip, const T* max_logit, T* sum_exp, T* moment, T* sum_sq) {                             \
    exp_moments(strip, max_logit, sum_exp, moment, sum_sq);                                               \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR void exp_strip(Strip<T> strip, const T* max_logit, T cap, T* sum_exp) {        \
    cap == T(0) ? exponentiate<false>(strip, max_logit, cap, sum_exp)                                     \
                : exponentiate<true>(strip, max_logit, cap, sum_exp);                                     \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR void exp_across_tokens(                                                        \
      const T* z, T* out, int64_t n, const T* max_logit, const T* factor, const T* log_factor, T cap) {   \
    if (log_factor != nullptr) {                                                                          \
      cap == T(0) ? exp_across<false, true>(z, out, n, max_logit, factor, log_factor, cap)                \
                  : exp_across<true, true>(z, out, n, max_logit, factor, log_factor, cap);                \
    } else {                                                                                              \
      cap == T(0) ? exp_across<false, false>(z, out, n, max_logit, factor, log_factor, cap)               \
                  : exp_across<true, false>(z, out, n, max_logit, factor, log_factor, cap);               \
    }                                                                                                     \
  }

CWDPO_DEFINE(float)
CWDPO_DEFINE(double)

}  // namespace cwdpo
