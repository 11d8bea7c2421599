// The gradient that comes from above, one number a token, and what it makes of exp(z - peak).
#pragma once

#include "../check.h"
#include "head.h"

namespace cwdpo {

// The rows with a label and an upstream gradient, where they stand among the labelled rows, and the two numbers that
// turn exp(z - peak) into the gradient of z: `pull` at the label, `push` elsewhere.
template <class T>
struct Upstream {
  Upstream(
      const LiveRows& labelled, const Tensor& grad_logp, const Tensor& logp, const Tensor& peaks,
      const Tensor& totals, double scale) {
    const Tensor grads = contiguous_as<T>(grad_logp), logps = contiguous_as<T>(logp),
                 peak_N = contiguous_as<T>(peaks), total_N = contiguous_as<T>(totals);
    for (int64_t i = 0; i < labelled.size(); ++i) {
      const int64_t token = labelled.positions[i];
      const T grad = data<T>(grads)[token];
      if (grad == T(0)) continue;
      live.positions.push_back(token);
      live.labels.push_back(labelled.labels[i]);
      among_labelled.push_back(i);
      pull.push_back(grad * -std::expm1(data<T>(logps)[token]) * static_cast<T>(scale));  // 1 - p_y = -expm1(logp)
      push.push_back(-pull.back() / data<T>(total_N)[token]);
      peak.push_back(data<T>(peak_N)[token]);
    }
  }

  LiveRows live;
  std::vector<int64_t> among_labelled;
  std::vector<T> pull, push, peak;
};

inline void check_per_token(
    const char* op, const Tensor& labels, const Tensor& grad_logp, const Tensor& logp, const Tensor& peak,
    const Tensor& total) {
  expect_size(op, "grad_logp", grad_logp, 0, labels.numel());
  expect_size(op, "logp", logp, 0, labels.numel());
  expect_size(op, "peak", peak, 0, labels.numel());
  expect_size(op, "total", total, 0, labels.numel());
}

}  // namespace cwdpo
