// Reductions over the vocabulary for a strip of adjacent tokens of a logit tile.
//
// A tile is stored [B, R], vocabulary first, so a column holds one token's logits and the loop over tokens is the one
// that is vectorised. Token n of a strip starts at z + n; its `size` logits are `stride` apart. Every function exists
// for float and double.
#pragma once

#include <cstdint>

namespace cwdpo {

constexpr int64_t kStripTokens = 64;  // the sums of one strip fit the L1 cache

template <class T>
struct Strip {
  T* z;
  int64_t size, stride, count;  // count: tokens, at most kStripTokens
};

// max_logit[n] = max_v z
void max_of_strip(Strip<float> strip, float* max_logit);
void max_of_strip(Strip<double> strip, double* max_logit);

// sum_exp[n] = sum_v exp(z - max_logit[n])
void exp_sum_of_strip(Strip<float> strip, const float* max_logit, float* sum_exp);
void exp_sum_of_strip(Strip<double> strip, const double* max_logit, double* sum_exp);

// sum[n] = sum_v z
void sum_of_strip(Strip<float> strip, float* sum);
void sum_of_strip(Strip<double> strip, double* sum);

// With u = exp(z - max_logit[n]): sum_exp[n] = sum_v u, moment[n] = sum_v u log u, sum_sq[n] = sum_v u^2
void exp_moments_of_strip(Strip<float> strip, const float* max_logit, float* sum_exp, float* moment, float* sum_sq);
void exp_moments_of_strip(Strip<double> strip, const double* max_logit, double* sum_exp, double* moment, double* sum_sq);

// sum_exp as above, and z <- exp(z - max_logit[n]) * (1 - (z / cap)^2) in place. The second factor is the slope of the
// soft cap; cap = 0 means no cap and a slope of 1, also for z = -inf.
void exp_strip(Strip<float> strip, const float* max_logit, float cap, float* sum_exp);
void exp_strip(Strip<double> strip, const double* max_logit, double cap, double* sum_exp);

// One vocabulary entry across n tokens (out may be z), with cap as above and x = z[i] - max_logit[i]:
// out[i] = exp(x) * (factor[i] + log_factor[i] * x) * (1 - (z[i] / cap)^2); without log_factor (null) it is 0.
void exp_across_tokens(
    const float* z, float* out, int64_t n, const float* max_logit, const float* factor, const float* log_factor,
    float cap);
void exp_across_tokens(
    const double* z, double* out, int64_t n, const double* max_logit, const double* factor, const double* log_factor,
    double cap);

}  // namespace cwdpo
