// token_stats on the CPU: log-prob of the label, entropy, top-1 probability and top-1 correctness in one sweep over the
// vocabulary. cwdpo_kernels/portable/token_stats.py states the formulas. Bytes moved: the weight, once.

#include "../ops.h"
#include "head.h"
#include "sweep.h"

namespace cwdpo {
namespace {

template <class T>
struct Stats {
  T logp, entropy, top1_prob;
  bool is_top1;
};

template <class T>
Stats<T> stats_of(T target, const OnlineSoftmax<T>& others) {
  // Exponentials are taken relative to m = max(max_logit, target), the largest logit of the whole vocabulary.
  const T max_minus_target = others.max_logit - target, m_minus_target = std::max(max_minus_target, T(0));
  const T max_minus_m = std::min(max_minus_target, T(0));
  const T scale = std::exp(max_minus_m), exp_target = std::exp(-m_minus_target);
  // Z - 1 is computed directly: it leaves the top token out, so log Z keeps its digits when Z is close to 1.
  const T z_minus_1 =
      max_minus_target > T(0) ? (others.sum_exp - T(1)) + exp_target : scale * others.sum_exp;
  // A label at -inf (probability 0) adds nothing to the moment. Without a competitor there is no moment either.
  const T moment_target = exp_target == T(0) ? T(0) : exp_target * m_minus_target;
  const T moment_others = scale == T(0) ? T(0) : scale * (others.moment + max_minus_m * others.sum_exp);
  const T entropy = std::log1p(z_minus_1) - (moment_others - moment_target) / (T(1) + z_minus_1);
  const T logp = logp_of(target, others);
  if (std::isnan(logp)) return {logp, logp, logp, false};
  return {logp, entropy < T(0) ? T(0) : entropy, T(1) / (T(1) + z_minus_1), max_minus_target <= T(0)};
}

}  // namespace

TokenStats token_stats(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("token_stats", arguments, labels);
  const LabelledRows rows = labelled_rows("token_stats", labels, ignore_index, weight.size(0));
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const std::vector<int64_t> tokens{labels.numel()};
    TokenStats out{zeros(tokens, dtype_of<T>()), zeros(tokens, dtype_of<T>()), zeros(tokens, dtype_of<T>()),
                   zeros(tokens, ScalarType::Bool)};
    if (rows.size() == 0) return out;
    const TiledHead<T> head(arguments, rows, Pass::kSums);
    const std::vector<T> target = head.target_logits();
    const std::vector<OnlineSoftmax<T>> softmax = sweep(head, Sweep::kMoments).softmax;
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t token = rows.tokens[i];
      const Stats<T> stats = stats_of(target[i], softmax[i]);
      data<T>(std::get<0>(out))[token] = stats.logp;
      data<T>(std::get<1>(out))[token] = stats.entropy;
      data<T>(std::get<2>(out))[token] = stats.top1_prob;
      data<bool>(std::get<3>(out))[token] = stats.is_top1;
    }
    return out;
  });
}

}  // namespace cwdpo
