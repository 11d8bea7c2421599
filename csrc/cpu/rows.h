// Functions over one row of a matrix: n contiguous entries. They are vectorized for several instruction sets, one of
// which is selected at run time (vector.h). Every function exists for float and double.
#pragma once

#include <cstdint>

namespace cwdpo {

// z <- cap * tanh(scale * (z + bias) / cap); cap = 0 means no cap.
void transform_row(float* z, int64_t n, float bias, float scale, float cap);
void transform_row(double* z, int64_t n, double bias, double scale, double cap);

float max_of_row(const float* z, int64_t n);
double max_of_row(const double* z, int64_t n);

// sum exp(z - max_logit)
float exp_sum_of_row(const float* z, int64_t n, float max_logit);
double exp_sum_of_row(const double* z, int64_t n, double max_logit);

// out = factor * exp(z - max_logit); out may be z.
void exp_row(const float* z, float* out, int64_t n, float max_logit, float factor);
void exp_row(const double* z, double* out, int64_t n, double max_logit, double factor);

// sum a_i b_i, accumulated in double, because the target logit enters every log-prob directly.
double dot_row(const float* a, const float* b, int64_t n);
double dot_row(const double* a, const double* b, int64_t n);

// y <- (slope * x - y) * scale
void subtract_from_row(float* y, const float* x, int64_t n, float slope, float scale);
void subtract_from_row(double* y, const double* x, int64_t n, double slope, double scale);

// y <- factor * y
void scale_row(float* y, int64_t n, float factor);
void scale_row(double* y, int64_t n, double factor);

// y <- factor * y + x_factor * x
void add_rows(float* y, const float* x, int64_t n, float factor, float x_factor);
void add_rows(double* y, const double* x, int64_t n, double factor, double x_factor);

float sum_of_row(const float* x, int64_t n);
double sum_of_row(const double* x, int64_t n);

}  // namespace cwdpo
