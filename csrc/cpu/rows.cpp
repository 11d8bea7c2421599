#include "rows.h"

#include <cmath>
#include <limits>

#include "vector.h"

namespace cwdpo {
namespace {

// Branch-free and odd. Uses a polynomial near 0, where 1 - exp(-2 |x|) would cancel, and the exponential elsewhere.
CWDPO_INLINE float fast_tanh(float x) {
  const float size = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = x + x * square * p;
  const float decay = fast_exp(-2.0f * size);
  const float large = std::copysign((1.0f - decay) / (1.0f + decay), x);
  return size < 0.625f ? small : large;
}

CWDPO_INLINE double fast_tanh(double x) { return std::tanh(x); }

template <class T>
CWDPO_INLINE void transform(T* z, int64_t n, T bias, T scale, T cap) {
  if (bias != T(0)) {
    for (int64_t i = 0; i < n; ++i) z[i] += bias;
  }
  if (scale != T(1)) {
    for (int64_t i = 0; i < n; ++i) z[i] *= scale;
  }
  if (cap != T(0)) {
    for (int64_t i = 0; i < n; ++i) z[i] = cap * fast_tanh(z[i] / cap);
  }
}

template <class T>
CWDPO_INLINE T max_of(const T* z, int64_t n) {
  T max = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

template <class T>
CWDPO_INLINE T exp_sum(const T* z, int64_t n, T max_logit) {
  T sum_exp = 0;
#pragma omp simd reduction(+ : sum_exp)
  for (int64_t i = 0; i < n; ++i) sum_exp += fast_exp(z[i] - max_logit);
  return sum_exp;
}

template <class T>
CWDPO_INLINE T sum(const T* x, int64_t n) {
  T result = 0;
#pragma omp simd reduction(+ : result)
  for (int64_t i = 0; i < n; ++i) result += x[i];
  return result;
}

template <class T>
CWDPO_INLINE void exponentiate(const T* z, T* out, int64_t n, T max_logit, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fast_exp(z[i] - max_logit) * factor;
}

template <class T>
CWDPO_INLINE double dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

#define CWDPO_DEFINE(T)                                                                                              \
  CWDPO_FOR_EACH_PROCESSOR void transform_row(T* z, int64_t n, T bias, T scale, T cap) {                             \
    transform(z, n, bias, scale, cap);                                                                               \
  }                                                                                                                  \
  CWDPO_FOR_EACH_PROCESSOR T max_of_row(const T* z, int64_t n) { return max_of(z, n); }                              \
  CWDPO_FOR_EACH_PROCESSOR T exp_sum_of_row(const T* z, int64_t n, T max_logit) { return exp_sum(z, n, max_logit); } \
  CWDPO_FOR_EACH_PROCESSOR T sum_of_row(const T* x, int64_t n) { return sum(x, n); }                                 \
  CWDPO_FOR_EACH_PROCESSOR void exp_row(const T* z, T* out, int64_t n, T max_logit, T factor) {                      \
    exponentiate(z, out, n, max_logit, factor);                                                                      \
  }                                                                                                                  \
  CWDPO_FOR_EACH_PROCESSOR double dot_row(const T* a, const T* b, int64_t n) { return dot(a, b, n); }                \
  CWDPO_FOR_EACH_PROCESSOR void subtract_from_row(T* y, const T* x, int64_t n, T slope, T scale) {                   \
    for (int64_t i = 0; i < n; ++i) y[i] = (slope * x[i] - y[i]) * scale;                                            \
  }                                                                                                                  \
  CWDPO_FOR_EACH_PROCESSOR void add_rows(T* y, const T* x, int64_t n, T factor, T x_factor) {                        \
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] * factor + x[i] * x_factor;                                          \
  }                                                                                                                  \
  CWDPO_FOR_EACH_PROCESSOR void scale_row(T* y, int64_t n, T factor) {                                               \
    for (int64_t i = 0; i < n; ++i) y[i] *= factor;                                                                  \
  }

CWDPO_DEFINE(float)
CWDPO_DEFINE(double)

}  // namespace cwdpo
