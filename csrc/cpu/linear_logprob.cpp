// linear_logprob and its backward on the CPU. The algorithm is that of cwdpo_kernels/portable/linear_logprob.py. All
// passes over a tile of logits (transform, maximum, exponential, sum, gradient) run while it is in cache, and kept
// tiles are read and written in place.
//
// Bytes moved: the weight once in forward and once in backward, its gradient once, kept tiles twice. Everything else is
// N x D or stays in cache. Legend: head.h.

#include <utility>

#include "../check.h"
#include "../ops.h"
#include "direction.h"
#include "exponential_gradients.h"
#include "head_gradients.h"
#include "sweep.h"

namespace cwdpo {
namespace {

template <class T>
LinearLogprob forward(
    const HeadArguments& arguments, const Tensor& labels, const LabelledRows& labelled, bool with_direction,
    std::optional<int64_t> kept_bytes) {
  const int64_t tokens = labels.numel();
  LinearLogprob out{
      zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()),
      direction_of_zeros(arguments.hidden, with_direction),
      memory_for_kept(arguments.weight, kept_bytes)};
  auto& [logp, max_logit, sum_exp, direction, kept] = out;

  const bool bf16 = uses_bf16_gemm(arguments), keeps_exponentials = bf16 && !with_direction;
  const KeptTiles<T> kept_logits(kept, labelled.size(), arguments.weight.size(0));
  const KeptExponentials exponentials(kept, labelled.size(), arguments.weight.size(0));
  // kUninitialized: the caller is autograd, which overwrites all of the weight's gradient. Zeroing is wasted work.
  if (kept_bytes != kUninitialized) keeps_exponentials ? exponentials.zero_unused() : kept_logits.zero_unused();
  if (labelled.size() == 0) return out;

  const TiledHead<T> head(arguments, labelled, with_direction ? Pass::kHidden : Pass::kSums);
  const std::vector<T> target = head.target_logits();
  // Whatever is kept, so that log-probs do not depend on it.
  const std::vector<T> anchors = bf16 ? first_anchors(target) : std::vector<T>();
  const Sweep kind = with_direction || keeps_exponentials ? Sweep::kExponentials : Sweep::kSumExp;
  const SweepResult<T> result = sweep(
      head, kind, anchors, kind == Sweep::kSumExp ? &kept_logits : nullptr,
      keeps_exponentials ? &exponentials : nullptr);
  for (int64_t i = 0; i < labelled.size(); ++i) {
    const int64_t token = labelled.tokens[i];
    data<T>(max_logit)[token] = result.softmax[i].max_logit;
    data<T>(sum_exp)[token] = result.softmax[i].sum_exp;
    data<T>(logp)[token] = logp_of(target[i], result.softmax[i]);
  }
  if (with_direction) write_direction(head, labelled.tokens, target, result, direction);
  return out;
}

void write_gradients(
    const char* op, const HeadArguments& arguments, const Tensor& grad_logp, const Tensor& labels, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept, int64_t ignore_index, const HeadGrads& out) {
  check_per_token(op, labels, grad_logp, logp, max_logit, sum_exp);
  check_kept(op, kept);
  const LabelledRows labelled = labelled_rows(op, labels, ignore_index, arguments.weight.size(0));
  with_compute_type(arguments.hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const LogitGrads<T> grads(labelled, grad_logp, logp, max_logit, sum_exp, arguments.scale);
    if constexpr (std::is_same_v<T, float>) {
      if (uses_bf16_gemm(arguments)) return exponential_gradients(arguments, labelled, grads, kept, out);
    }
    head_gradients<T>(arguments, labelled, grads, kept, out);
  });
}

}  // namespace

LinearLogprob linear_logprob(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool with_direction, bool /*sparse_grad*/,
    int64_t workspace_bytes, std::optional<int64_t> kept_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("linear_logprob", arguments, labels);
  if (kept_bytes) expect_at_least("linear_logprob", "kept_bytes", *kept_bytes, kUninitialized);
  const LabelledRows labelled = labelled_rows("linear_logprob", labels, ignore_index, weight.size(0));
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(arguments, labels, labelled, with_direction, kept_bytes);
  });
}

HeadGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("linear_logprob_backward", arguments, labels);
  const HeadGrads out = allocate_gradients(
      arguments, needs_hidden, needs_bias,
      needs_weight ? torch::stable::empty_like(weight) : empty({0}, weight.scalar_type()));
  write_gradients(
      "linear_logprob_backward", arguments, grad_logp, labels, logp, max_logit, sum_exp, kept, ignore_index, out);
  return out;
}

HiddenAndBias linear_logprob_backward_(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_bias,
    bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const char* op = "linear_logprob_backward_";
  check_head(op, arguments, labels);
  check_kept_as_gradient(op, kept, weight);
  const HeadGrads out = allocate_gradients(arguments, needs_hidden, needs_bias, kept);
  write_gradients(op, arguments, grad_logp, labels, logp, max_logit, sum_exp, kept, ignore_index, out);
  return {std::get<0>(out), std::get<2>(out)};
}

}  // namespace cwdpo
