// The gradient of the logits of a token, reduced to two numbers per token.
#pragma once

#include "../check.h"
#include "head.h"

namespace cwdpo {

// The labelled rows whose grad_logp is not zero. With y the label of a row, the gradient of its unscaled logits is
//
//   grad_target                             at v = y
//   exp_factor * exp(z_v - max_logit)       elsewhere
template <class T>
struct LogitGrads {
  LogitGrads(
      const LabelledRows& labelled, const Tensor& grad_logp, const Tensor& logp, const Tensor& max_logit,
      const Tensor& sum_exp, double scale) {
    const Tensor grad_N = contiguous_as<T>(grad_logp), logp_N = contiguous_as<T>(logp),
                 max_logit_N = contiguous_as<T>(max_logit), sum_exp_N = contiguous_as<T>(sum_exp);
    for (int64_t i = 0; i < labelled.size(); ++i) {
      const int64_t token = labelled.tokens[i];
      const T grad = data<T>(grad_N)[token];
      if (grad == T(0)) continue;
      rows.tokens.push_back(token);
      rows.labels.push_back(labelled.labels[i]);
      index_among_labelled.push_back(i);
      grad_target.push_back(
          grad * -std::expm1(data<T>(logp_N)[token]) * static_cast<T>(scale));  // 1 - p_y = -expm1(logp)
      // Without competitors (V = 1, or all of them at -inf) both terms are 0.
      exp_factor.push_back(grad_target.back() == T(0) ? T(0) : -grad_target.back() / data<T>(sum_exp_N)[token]);
      max_logits.push_back(data<T>(max_logit_N)[token]);
    }
  }

  LabelledRows rows;
  std::vector<int64_t> index_among_labelled;
  std::vector<T> grad_target, exp_factor, max_logits;
};

inline void check_per_token(
    const char* op, const Tensor& labels, const Tensor& grad_logp, const Tensor& logp, const Tensor& max_logit,
    const Tensor& sum_exp) {
  expect_vector(op, "grad_logp", grad_logp, labels.numel());
  expect_vector(op, "logp", logp, labels.numel());
  expect_vector(op, "anchor", max_logit, labels.numel());
  expect_vector(op, "sum_exp", sum_exp, labels.numel());
}

}  // namespace cwdpo
