// The gradient of the logits of a token, reduced to two numbers per token.
#pragma once

#include "../check.h"
#include "../ops.h"
#include "head.h"

namespace cwdpo {

// The labelled rows whose logits have a gradient. With y the label of a row, the gradient of its unscaled logits is
//
//   grad_target                                                                   at v = y
//   exp(z_v - max_logit) * (exp_factor + log_factor * (z_v - max_logit))          elsewhere
//
// log_factor is empty where it is 0 for all tokens.
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

  // From the numbers of each token, of unscaled logits.
  LogitGrads(
      const LabelledRows& labelled, const Tensor& target, const Tensor& exponential, const Tensor& logarithmic,
      const Tensor& max_logit) {
    const Tensor target_N = contiguous_as<T>(target), exp_N = contiguous_as<T>(exponential),
                 log_N = contiguous_as<T>(logarithmic), max_logit_N = contiguous_as<T>(max_logit);
    for (int64_t i = 0; i < labelled.size(); ++i) {
      const int64_t token = labelled.tokens[i];
      const T at_target = data<T>(target_N)[token], exp_part = data<T>(exp_N)[token], log_part = data<T>(log_N)[token];
      if (at_target == T(0) && exp_part == T(0) && log_part == T(0)) continue;
      rows.tokens.push_back(token);
      rows.labels.push_back(labelled.labels[i]);
      index_among_labelled.push_back(i);
      grad_target.push_back(at_target);
      exp_factor.push_back(exp_part);
      log_factor.push_back(log_part);
      max_logits.push_back(data<T>(max_logit_N)[token]);
    }
  }

  LabelledRows rows;
  std::vector<int64_t> index_among_labelled;
  std::vector<T> grad_target, exp_factor, log_factor, max_logits;
};

// Zeros the gradient of hidden, whose rows are written only where the logits have a gradient. Zeros the others too if no
// row has one, and returns false; otherwise they are written whole.
template <class T>
bool begin_gradients(const LogitGrads<T>& grads, const HeadGrads& out) {
  auto [grad_hidden, grad_weight, grad_bias] = out;
  zero(grad_hidden);
  if (grads.rows.size() > 0) return true;
  torch::stable::zero_(grad_weight);
  torch::stable::zero_(grad_bias);
  return false;
}

// grad_hidden[token of row i] = the sum of row i over the parts, in order, times factor[i] if that is given. Uses the first
// part as workspace.
template <class T>
void store_hidden_gradient(
    const Tensor& grad_hidden, const LabelledRows& rows, const std::vector<Tensor>& parts,
    const std::vector<T>* factor = nullptr) {
  const Matrix<T> sums = matrix<T>(parts[0]);
  const RawMatrix out(grad_hidden);
  for_rows_once(sums.rows, static_cast<int64_t>(parts.size()) * sums.columns, [&](int64_t i) {
    for (size_t part = 1; part < parts.size(); ++part) {
      add_rows(sums.row(i), matrix<T>(parts[part]).row(i), sums.columns, T(1), T(1));
    }
    if (factor != nullptr) scale_row(sums.row(i), sums.columns, (*factor)[i]);
    store_rows(sums.row(i), out, {rows.tokens[i], 1});
  });
}

inline void check_per_token(
    const char* op, const Tensor& labels, const Tensor& grad_logp, const Tensor& logp, const Tensor& max_logit,
    const Tensor& sum_exp) {
  expect_vector(op, "grad_logp", grad_logp, labels.numel());
  expect_vector(op, "logp", logp, labels.numel());
  expect_vector(op, "anchor", max_logit, labels.numel());
  expect_vector(op, "sum_exp", sum_exp, labels.numel());
}

}  // namespace cwdpo
