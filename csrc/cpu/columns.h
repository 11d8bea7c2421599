// What is done to a few columns of a tile of logits that lie next to each other: a tile is [B, R], vocabulary first, so
// that a column is one token's logits and the loop over columns is the one that is vectorised. Column n starts at
// z + n; its entries are `stride` apart; `size` of them. Each function exists for float and double.
#pragma once

#include <cstdint>

namespace cwdpo {

constexpr int64_t kMaxColumns = 64;  // sums of so many stay in the first-level cache

template <class T>
struct Columns {
  T* z;
  int64_t size, stride, count;  // count <= kMaxColumns
};

// top[n] = max z
void max_of_columns(Columns<float> tile, float* top);
void max_of_columns(Columns<double> tile, double* top);

// total[n] = sum exp(z - peak[n])
void exp_sum_of_columns(Columns<float> tile, const float* peak, float* total);
void exp_sum_of_columns(Columns<double> tile, const double* peak, double* total);

// The same, and moment[n] = sum exp(z - peak[n]) (z - peak[n]).
void exp_sums_of_columns(Columns<float> tile, const float* peak, float* total, float* moment);
void exp_sums_of_columns(Columns<double> tile, const double* peak, double* total, double* moment);

// z <- exp(z - peak[n]) * (1 - (z / cap)^2), the slope of the soft cap (inverse_cap 0: none), and
// total[n] = sum exp(z - peak[n]).
void exp_columns(Columns<float> tile, const float* peak, float inverse_cap, float* total);
void exp_columns(Columns<double> tile, const double* peak, double inverse_cap, double* total);

// One row of the tile across its columns (out may be z):
// out[n] = factor[n] * exp(z[n] - peak[n]) * (1 - (z[n] / cap)^2)
void exp_across(
    const float* z, float* out, int64_t n, const float* peak, const float* factor, float inverse_cap);
void exp_across(
    const double* z, double* out, int64_t n, const double* peak, const double* factor, double inverse_cap);

}  // namespace cwdpo
