#include "rows.h"

#include <array>
#include <bit>
#include <cmath>
#include <limits>

// One body per function, compiled for AVX-512, AVX2 and the base processor; the loader picks. Elsewhere (clang, ARM)
// the base version is what the compiler vectorises.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CWDPO_FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CWDPO_FOR_EACH_PROCESSOR
#endif
#define CWDPO_INLINE inline __attribute__((always_inline))

namespace cwdpo {
namespace {

// exp by x = n ln 2 + r, |r| <= ln 2 / 2: a Taylor polynomial in r, then n added to the exponent's bits. Adding
// `magic` leaves n in the low bits of the sum, so that no conversion instruction is needed.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  using Bits = uint32_t;
  static constexpr int kDegree = 7, kMantissa = 23;
  static constexpr float kLow = -87.0f, kHigh = 88.0f, kMagic = 12582912.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13, kMantissa = 52;
  static constexpr double kLow = -708.0, kHigh = 709.0, kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
};

template <class T>
constexpr auto kInverseFactorials = [] {
  std::array<T, Exp<T>::kDegree + 1> values{};
  double factorial = 1;
  for (int k = 0; k <= Exp<T>::kDegree; ++k, factorial *= k) values[k] = static_cast<T>(1 / factorial);
  return values;
}();

// Within 1e-7 (float), 2e-16 (double) relative; 0 below Exp::kLow, NaN for NaN.
template <class T>
CWDPO_INLINE T fast_exp(T x) {
  using E = Exp<T>;
  T clamped = x < E::kLow ? E::kLow : x;
  clamped = clamped > E::kHigh ? E::kHigh : clamped;
  const T shifted = clamped * T(1.44269504088896340736) + E::kMagic;
  const T n = shifted - E::kMagic;
  const T r = (clamped - n * E::kLn2High) - n * E::kLn2Low;
  T p = kInverseFactorials<T>[E::kDegree];
  for (int k = E::kDegree - 1; k >= 0; --k) p = p * r + kInverseFactorials<T>[k];
  const auto bits = std::bit_cast<typename E::Bits>(p) + (std::bit_cast<typename E::Bits>(shifted) << E::kMantissa);
  return x < E::kLow ? T(0) : std::bit_cast<T>(bits);
}

// Odd, branch-free: a polynomial near 0 where 1 - exp(-2 |x|) would cancel, else by the exponential.
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
CWDPO_INLINE void transform(T* z, const T* bias, int64_t n, T scale, T cap) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
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
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

template <class T>
CWDPO_INLINE T exp_sum(const T* z, int64_t n, T peak) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += fast_exp(z[i] - peak);
  return total;
}

template <class T>
CWDPO_INLINE ExpSums<T> exp_sums(const T* z, int64_t n, T peak) {
  T total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
  for (int64_t i = 0; i < n; ++i) {
    const T x = z[i] - peak, weight = fast_exp(x);
    total += weight;
    moment += weight * x;
  }
  return {total, moment};
}

template <class T>
CWDPO_INLINE T exponentiate(const T* z, T* out, int64_t n, T peak, T factor, T inverse_cap) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const T weight = fast_exp(z[i] - peak), bend = z[i] * inverse_cap;
    total += weight;
    out[i] = weight * factor * (T(1) - bend * bend);
  }
  return total;
}

template <class T>
CWDPO_INLINE double dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

#define CWDPO_DEFINE(T)                                                                                   \
  CWDPO_FOR_EACH_PROCESSOR void transform_row(T* z, const T* bias, int64_t n, T scale, T cap) {           \
    transform(z, bias, n, scale, cap);                                                                    \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR T max_of_row(const T* z, int64_t n) { return max_of(z, n); }                   \
  CWDPO_FOR_EACH_PROCESSOR T exp_sum_of_row(const T* z, int64_t n, T peak) { return exp_sum(z, n, peak); } \
  CWDPO_FOR_EACH_PROCESSOR ExpSums<T> exp_sums_of_row(const T* z, int64_t n, T peak) {                    \
    return exp_sums(z, n, peak);                                                                          \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR T exp_row(const T* z, T* out, int64_t n, T peak, T factor, T inverse_cap) {    \
    return exponentiate(z, out, n, peak, factor, inverse_cap);                                            \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR double dot_row(const T* a, const T* b, int64_t n) { return dot(a, b, n); }     \
  CWDPO_FOR_EACH_PROCESSOR void pull_row(T* y, const T* x, int64_t n, T slope, T scale) {                 \
    for (int64_t i = 0; i < n; ++i) y[i] = (slope * x[i] - y[i]) * scale;                                 \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR void scale_row(T* y, int64_t n, T factor) {                                    \
    for (int64_t i = 0; i < n; ++i) y[i] *= factor;                                                       \
  }                                                                                                       \
  CWDPO_FOR_EACH_PROCESSOR void add_row(T* y, const T* x, int64_t n) {                                    \
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];                                                         \
  }

CWDPO_DEFINE(float)
CWDPO_DEFINE(double)

}  // namespace cwdpo
