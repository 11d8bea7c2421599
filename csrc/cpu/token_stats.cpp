// token_stats on the CPU: entropy, top-1 probability and correctness beside the label's log-prob, in one sweep. The
// formulas are those of cwdpo_kernels/portable/token_stats.py. Bytes moved: the weight once.

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
Stats<T> stats_of(T target, const Competitors<T>& others) {
  const T lead = others.peak - target;          // of the best competitor over the label
  const T top = std::max(lead, T(0));           // of the top token over the label
  const T scale = std::exp(lead - top), label = std::exp(-top);
  // Z - 1, the weight of everything but the top token, so that log Z keeps its digits when Z is close to 1.
  const T rest = lead > T(0) ? (others.total - T(1)) + label : scale * others.total;
  const T shifted = scale * (others.moment + (lead - top) * others.total) - label * top;
  const T entropy = std::log1p(rest) - shifted / (T(1) + rest);
  return {logp_of(target, others), entropy < T(0) ? T(0) : entropy, T(1) / (T(1) + rest), lead <= T(0)};
}

template <class T>
std::vector<Competitors<T>> sweep(const TiledHead<T>& head) {
  std::vector<Competitors<T>> others(head.rows);
  for_spans(head.vocab, head.plan.columns, [&](Span columns) {
    for_spans(head.rows, head.plan.rows, [&](Span block) {
      const Matrix<T> tile = head.buffer(block, columns);
      head.logits(tile, columns, block);
      add_tile(head, tile, columns, block, Sweep::kMoments, others, [](int64_t, T) {});
    });
  });
  return others;
}

}  // namespace

TokenStats token_stats(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("token_stats", arguments, labels);
  const LiveRows live = labelled_rows("token_stats", labels, ignore_index, weight.size(0));
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const std::vector<int64_t> tokens{labels.numel()};
    TokenStats out{zeros(tokens, dtype_of<T>()), zeros(tokens, dtype_of<T>()), zeros(tokens, dtype_of<T>()),
                   zeros(tokens, ScalarType::Bool)};
    if (live.size() == 0) return out;
    const TiledHead<T> head(arguments, live, plan_tiles(arguments, live.size(), sizeof(T)));
    const std::vector<T> target = head.target_logits();
    const std::vector<Competitors<T>> others = sweep(head);
    for (int64_t i = 0; i < live.size(); ++i) {
      const int64_t token = live.positions[i];
      const Stats<T> stats = stats_of(target[i], others[i]);
      data<T>(std::get<0>(out))[token] = stats.logp;
      data<T>(std::get<1>(out))[token] = stats.entropy;
      data<T>(std::get<2>(out))[token] = stats.top1_prob;
      data<bool>(std::get<3>(out))[token] = stats.is_top1;
    }
    return out;
  });
}

}  // namespace cwdpo
