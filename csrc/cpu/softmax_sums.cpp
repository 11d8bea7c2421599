// softmax_sums and its backward on the CPU: what token_stats needs of each token, in one sweep over the vocabulary.
// cwdpo_kernels/portable/softmax_sums.py defines the sums. Bytes moved: the weight once in forward and once in backward,
// its gradient once, kept tiles twice.

#include "../check.h"
#include "../ops.h"
#include "direction.h"
#include "head_gradients.h"
#include "sweep.h"

namespace cwdpo {
namespace {

constexpr int64_t kSums = 6;  // target, max_logit, sum_exp, moment, sum_sq, sum_logit

void check_arguments(const char* op, const HeadArguments& head, const Tensor& labels) {
  check_head(op, head, labels);
  expect(head.weight.size(0) >= 1, op, "weight", "V", ">= 1", head.weight.size(0));
}

template <class T>
SoftmaxSums forward(
    const HeadArguments& arguments, const Tensor& labels, const LabelledRows& labelled, bool with_direction,
    std::optional<int64_t> kept_bytes) {
  const int64_t tokens = labels.numel();
  const SoftmaxSums out{
      zeros({kSums, tokens}, dtype_of<T>()), direction_of_zeros(arguments.hidden, with_direction),
      memory_for_kept(arguments.weight, kept_bytes)};
  const auto& [sums, direction, kept] = out;
  const KeptTiles<T> kept_logits(kept, labelled.size(), arguments.weight.size(0));
  // kUninitialized: the caller is autograd, which overwrites all of the weight's gradient. Zeroing is wasted work.
  if (kept_bytes != kUninitialized) kept_logits.zero_unused();
  if (labelled.size() == 0) return out;

  const TiledHead<T> head(arguments, labelled, with_direction ? Pass::kHidden : Pass::kSums);
  const std::vector<T> target = head.target_logits();
  const Sweep kind = with_direction ? Sweep::kMomentsAndExponentials : Sweep::kMoments;
  const SweepResult<T> result = sweep(head, kind, {}, &kept_logits);
  for (int64_t i = 0; i < labelled.size(); ++i) {
    const OnlineSoftmax<T>& x = result.softmax[i];
    const T values[kSums] = {target[i], x.max_logit, x.sum_exp, x.moment, x.sum_sq, x.sum_logit};
    for (int64_t k = 0; k < kSums; ++k) data<T>(sums)[k * tokens + labelled.tokens[i]] = values[k];
  }
  if (with_direction) write_direction(head, labelled.tokens, target, result, direction);
  return out;
}

void write_gradients(
    const char* op, const HeadArguments& arguments, const Tensor& grad_target, const Tensor& exp_factor,
    const Tensor& log_factor, const Tensor& labels, const Tensor& max_logit, const Tensor& kept, int64_t ignore_index,
    bool partial, const HeadGrads& out) {
  const auto check = [&](const char* name, const Tensor& tensor, auto type) {
    expect_vector(op, name, tensor, labels.numel());
    expect_dtype(op, name, tensor, dtype_of<decltype(type)>());
  };
  check_kept(op, kept);
  const LabelledRows labelled = labelled_rows(op, labels, ignore_index, arguments.weight.size(0), partial);
  with_compute_type(arguments.hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    check("grad_target", grad_target, type);
    check("exp_factor", exp_factor, type);
    check("log_factor", log_factor, type);
    check("max_logit", max_logit, type);
    const LogitGrads<T> grads(labelled, grad_target, exp_factor, log_factor, max_logit);
    head_gradients<T>(arguments, labelled, grads, kept, out);
  });
}

}  // namespace

SoftmaxSums softmax_sums(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool partial, bool with_direction,
    int64_t workspace_bytes, std::optional<int64_t> kept_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_arguments("softmax_sums", arguments, labels);
  expect(!(partial && with_direction), "softmax_sums", "with_direction", "value", "False with partial", "True");
  if (kept_bytes) expect_at_least("softmax_sums", "kept_bytes", *kept_bytes, kUninitialized);
  const LabelledRows labelled = labelled_rows("softmax_sums", labels, ignore_index, weight.size(0), partial);
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(arguments, labels, labelled, with_direction, kept_bytes);
  });
}

HeadGrads softmax_sums_backward(
    const Tensor& grad_target, const Tensor& exp_factor, const Tensor& log_factor, const Tensor& hidden,
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& max_logit,
    const Tensor& kept, double scale, std::optional<double> softcap, int64_t ignore_index, bool partial,
    bool needs_hidden, bool needs_weight, bool needs_bias, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const char* op = "softmax_sums_backward";
  check_arguments(op, arguments, labels);
  const HeadGrads out = allocate_gradients(
      arguments, needs_hidden, needs_bias,
      needs_weight ? torch::stable::empty_like(weight) : empty({0}, weight.scalar_type()));
  write_gradients(
      op, arguments, grad_target, exp_factor, log_factor, labels, max_logit, kept, ignore_index, partial, out);
  return out;
}

HiddenAndBias softmax_sums_backward_(
    const Tensor& grad_target, const Tensor& exp_factor, const Tensor& log_factor, const Tensor& hidden,
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& max_logit,
    const Tensor& kept, double scale, std::optional<double> softcap, int64_t ignore_index, bool partial,
    bool needs_hidden, bool needs_bias, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const char* op = "softmax_sums_backward_";
  check_arguments(op, arguments, labels);
  check_kept_as_gradient(op, kept, weight);
  const HeadGrads out = allocate_gradients(arguments, needs_hidden, needs_bias, kept);
  write_gradients(
      op, arguments, grad_target, exp_factor, log_factor, labels, max_logit, kept, ignore_index, partial, out);
  return {std::get<0>(out), std::get<2>(out)};
}

}  // namespace cwdpo
