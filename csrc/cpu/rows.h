// What is done to one row of a matrix, n contiguous entries, vectorised for the processor that is found at run time.
// Each function exists for float and double.
#pragma once

#include <cstdint>

namespace cwdpo {

// z <- cap * tanh(scale * (z + bias) / cap); cap 0 means none.
void transform_row(float* z, int64_t n, float bias, float scale, float cap);
void transform_row(double* z, int64_t n, double bias, double scale, double cap);

float max_of_row(const float* z, int64_t n);
double max_of_row(const double* z, int64_t n);

// sum exp(z - peak)
float exp_sum_of_row(const float* z, int64_t n, float peak);
double exp_sum_of_row(const double* z, int64_t n, double peak);

// out = factor * exp(z - peak); out may be z.
void exp_row(const float* z, float* out, int64_t n, float peak, float factor);
void exp_row(const double* z, double* out, int64_t n, double peak, double factor);

// sum a_i b_i, in double: a label's logit is worth it.
double dot_row(const float* a, const float* b, int64_t n);
double dot_row(const double* a, const double* b, int64_t n);

// y <- (slope * x - y) * scale
void pull_row(float* y, const float* x, int64_t n, float slope, float scale);
void pull_row(double* y, const double* x, int64_t n, double slope, double scale);

// y <- factor * y
void scale_row(float* y, int64_t n, float factor);
void scale_row(double* y, int64_t n, double factor);

float sum_of_row(const float* x, int64_t n);
double sum_of_row(const double* x, int64_t n);

}  // namespace cwdpo
