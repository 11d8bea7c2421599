// Shared by the vectorised loops: compilation for several instruction sets, and a fast exp.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

// Compiles a function for AVX-512, AVX2 and the baseline; the dynamic loader selects one. With other compilers or
// processors (clang, ARM) there is only the baseline version.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define CWDPO_FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CWDPO_HAS_CLONES 1
#else
#define CWDPO_FOR_EACH_PROCESSOR
#define CWDPO_HAS_CLONES 0
#endif
#define CWDPO_INLINE inline __attribute__((always_inline))

namespace cwdpo {

// The version that the loader selects.
inline const char* loop_instructions() {
#if CWDPO_HAS_CLONES
  if (__builtin_cpu_supports("avx512vl")) return "AVX-512";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
#endif
  return "those that the compiler was told to use";
}

// exp(x) = 2^n exp(r) with x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) is a Taylor polynomial. Adding kMagic leaves n plus
// the exponent's bias in the low bits of the sum; shifted up, they are the number 2^n. A multiplication by it keeps NaN,
// where adding n to the exponent bits of a NaN would make it a finite number.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  using Bits = uint32_t;
  static constexpr int kDegree = 7, kMantissa = 23;
  static constexpr float kLow = -87.0f, kHigh = 88.0f, kMagic = 12582912.0f + 127;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13, kMantissa = 52;
  static constexpr double kLow = -708.0, kHigh = 709.0, kMagic = 6755399441055744.0 + 1023;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
};

template <class T>
constexpr auto kInverseFactorials = [] {
  std::array<T, Exp<T>::kDegree + 1> values{};
  double factorial = 1;
  for (int k = 0; k <= Exp<T>::kDegree; ++k, factorial *= k) values[k] = static_cast<T>(1 / factorial);
  return values;
}();

// Relative error below 1e-7 (float) or 2e-16 (double). Returns 0 below Exp::kLow, NaN for any NaN, exp(kHigh) above it.
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
  const T power = std::bit_cast<T>(std::bit_cast<typename E::Bits>(shifted) << E::kMantissa);
  return x < E::kLow ? T(0) : p * power;
}

}  // namespace cwdpo
