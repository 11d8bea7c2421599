// The competitors of a label: the logits of every other token, summed as they come. Nothing that exceeds float32's
// range is ever formed, and the label's own logit stays out, so that 1 - p of a confident label keeps its digits.
#pragma once

#include <cmath>
#include <limits>

#include "rows.h"

namespace cwdpo {

template <class T>
struct Competitors {
  T peak = std::numeric_limits<T>::lowest();  // max z
  T total = 0;                                // sum exp(z - peak)
  T moment = 0;                               // sum exp(z - peak) (z - peak), where it is asked for

  // Raises the peak to `candidate` if that is higher; returns the decay of everything summed before.
  T raise(T candidate) {
    if (!(candidate > peak)) return T(1);
    const T shift = peak - candidate, decay = std::exp(shift);
    peak = candidate;
    if (total > T(0)) moment = (moment + shift * total) * decay;  // shift may be -inf before the first competitor
    total *= decay;
    return decay;
  }

  void add(const T* z, int64_t n) {
    raise(max_of_row(z, n));
    total += exp_sum_of_row(z, n, peak);
  }
};

// -log1p(s) = -softplus(log s), s the odds against the label.
template <class T>
T logp_of(T target, const Competitors<T>& others) {
  const T log_odds = (others.peak - target) + std::log(others.total);
  if (std::isnan(log_odds)) return log_odds;
  return -(std::fmax(log_odds, T(0)) + std::log1p(std::exp(-std::fabs(log_odds))));
}

}  // namespace cwdpo
