// What is done to one row of logits, n contiguous entries, vectorised for the processor that is found at run time.
// Each function exists for float and double.
#pragma once

#include <cstdint>

namespace cwdpo {

template <class T>
struct ExpSums {
  T total;   // sum exp(z - peak)
  T moment;  // sum exp(z - peak) (z - peak)
};

// z <- cap * tanh(scale * (z + bias) / cap); bias may be null, cap 0 means none.
void transform_row(float* z, const float* bias, int64_t n, float scale, float cap);
void transform_row(double* z, const double* bias, int64_t n, double scale, double cap);

float max_of_row(const float* z, int64_t n);
double max_of_row(const double* z, int64_t n);

// sum exp(z - peak), and the same with the moment.
float exp_sum_of_row(const float* z, int64_t n, float peak);
double exp_sum_of_row(const double* z, int64_t n, double peak);
ExpSums<float> exp_sums_of_row(const float* z, int64_t n, float peak);
ExpSums<double> exp_sums_of_row(const double* z, int64_t n, double peak);

// out = factor * exp(z - peak) * (1 - (z / cap)^2), the slope of the soft cap (inverse_cap 0: none); out may be z.
// Returns sum exp(z - peak).
float exp_row(const float* z, float* out, int64_t n, float peak, float factor, float inverse_cap);
double exp_row(const double* z, double* out, int64_t n, double peak, double factor, double inverse_cap);

// sum a_i b_i, in double: a label's logit is worth it.
double dot_row(const float* a, const float* b, int64_t n);
double dot_row(const double* a, const double* b, int64_t n);

// y <- (slope * x - y) * scale
void pull_row(float* y, const float* x, int64_t n, float slope, float scale);
void pull_row(double* y, const double* x, int64_t n, double slope, double scale);

// y <- factor * y, y <- y + x
void scale_row(float* y, int64_t n, float factor);
void scale_row(double* y, int64_t n, double factor);
void add_row(float* y, const float* x, int64_t n);
void add_row(double* y, const double* x, int64_t n);

}  // namespace cwdpo
