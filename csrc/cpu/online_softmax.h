// Online softmax over the competitors of a label: all logits of a token except the target logit, the label's own.
//
// The running maximum keeps every exponential finite for any finite logits. Leaving out the target logit keeps
// 1 - p_y accurate when the label's probability p_y is close to 1.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "rows.h"

namespace cwdpo {

template <class T>
struct OnlineSoftmax {
  T max_logit = std::numeric_limits<T>::lowest();  // max z; stays finite if every z is -inf
  T sum_exp = 0;                                   // sum exp(z - max_logit)
  // Only in sweeps of kMoments:
  T moment = 0;     // sum exp(z - max_logit) (z - max_logit)
  T sum_sq = 0;     // sum exp(z - max_logit)^2
  T sum_logit = 0;  // sum z, the target logit included

  // Raises max_logit to `candidate` if that is larger. Returns the factor by which this scales all earlier sums.
  T raise_max(T candidate) {
    if (!(candidate > max_logit)) return T(1);
    const T shift = max_logit - candidate, rescale = std::exp(shift);
    max_logit = candidate;
    moment = (moment + at_least_negligible(shift) * sum_exp) * rescale;
    sum_exp *= rescale;
    sum_sq *= rescale * rescale;
    return rescale;
  }

  // The same with an anchor in place of the maximum: a multiple of ln 2 that moves only if the maximum is far from it.
  // Then few of the exponentials that were kept before must be scaled, and by a power of two, which rounds nothing.
  T move_anchor(T candidate) {
    constexpr T kFar = 40;  // nats; exp(2 kFar) is in the range of float and bfloat16
    if (sum_exp == T(0) && candidate < max_logit - kFar && std::isfinite(candidate)) max_logit = anchor_near(candidate);
    return candidate > max_logit + kFar ? raise_max(anchor_near(candidate)) : T(1);
  }

  // The multiple of ln 2 next to a logit; the logit itself if it is not finite.
  static T anchor_near(T logit) { return static_cast<T>(std::round(logit / kLn2) * kLn2); }

  // Adds the sums over other competitors. Returns the factors by which this scales the sums of both.
  std::pair<T, T> merge(const OnlineSoftmax& others) {
    const T factor = raise_max(others.max_logit), shift = others.max_logit - max_logit;
    const T other_factor = shift == T(0) ? T(1) : std::exp(shift);
    moment += (others.moment + at_least_negligible(shift) * others.sum_exp) * other_factor;
    sum_exp += others.sum_exp * other_factor;
    sum_sq += others.sum_sq * other_factor * other_factor;
    sum_logit += others.sum_logit;
    return {factor, other_factor};
  }

  // exp(-1000) is 0 in float and double. Larger distances are cut off: they may overflow, and 0 * -inf would be NaN.
  static T at_least_negligible(T shift) { return shift < T(-1000) ? T(-1000) : shift; }

  static constexpr double kLn2 = 0.693147180559945309417;

  void add(const T* z, int64_t n) {
    raise_max(max_of_row(z, n));
    sum_exp += exp_sum_of_row(z, n, max_logit);
  }
};

// logp = -log1p(s) = -softplus(log s), where s = sum exp(z - target) is the odds against the label. NaN if a logit is NaN
// or +inf, or if all are -inf. A competitor of -inf has probability 0; so has the label, with logp = -inf.
template <class T>
T logp_of(T target, const OnlineSoftmax<T>& others) {
  const double distance = static_cast<double>(others.max_logit) - static_cast<double>(target);
  const T log_odds = static_cast<T>(distance + std::log(static_cast<double>(others.sum_exp)));
  if (std::isnan(log_odds)) return log_odds;
  if (target == std::numeric_limits<T>::infinity()) return std::numeric_limits<T>::quiet_NaN();
  return -(std::fmax(log_odds, T(0)) + std::log1p(std::exp(-std::fabs(log_odds))));
}

}  // namespace cwdpo
