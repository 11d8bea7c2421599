// The CPU ops that registration.cpp binds to the schemas of cwdpo_kernels/ops: one function per schema, with the
// arguments in the schema's order. cwdpo_kernels/portable explains what each op computes.
//
// Forward saves max_logit and sum_exp per token for backward (see cpu/online_softmax.h). In the schemas max_logit is
// called anchor: each backend has its own kind of anchor, and nothing above the backends interprets it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace cwdpo {

using torch::stable::Tensor;

using LinearLogprob = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // logp, max_logit, sum_exp, direction, kept
using HeadGrads = std::tuple<Tensor, Tensor, Tensor>;  // grad_hidden, grad_weight, grad_bias; empty if not needed
using HiddenAndBias = std::tuple<Tensor, Tensor>;                          // grad_hidden, grad_bias
using LogitsLogprob = std::tuple<Tensor, Tensor, Tensor>;                  // logp, max_logit, sum_exp
using SoftmaxSums = std::tuple<Tensor, Tensor, Tensor>;                    // sums, direction, kept
// loss, chosen_reward, rejected_reward, margin, accuracy, cooling_weight, kept, sum_logp, mean, count, grad_logp
using CWDPOLoss =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LinearLogprob linear_logprob(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool with_direction, bool sparse_grad,
    int64_t workspace_bytes, std::optional<int64_t> kept_bytes);

HeadGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool sparse_grad, int64_t workspace_bytes);

// Writes the gradient of the weight into `kept`, over the tiles that forward left there.
HiddenAndBias linear_logprob_backward_(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_bias,
    bool sparse_grad, int64_t workspace_bytes);

LogitsLogprob logits_logprob(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool reuse_logits);

Tensor logits_logprob_backward(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& max_logit,
    const Tensor& sum_exp, int64_t ignore_index);

// Writes the gradient over the logits.
void logits_logprob_backward_(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& max_logit,
    const Tensor& sum_exp, int64_t ignore_index);

SoftmaxSums softmax_sums(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool partial, bool with_direction, int64_t workspace_bytes,
    std::optional<int64_t> kept_bytes);

HeadGrads softmax_sums_backward(
    const Tensor& grad_target, const Tensor& exp_factor, const Tensor& log_factor, const Tensor& hidden,
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& max_logit,
    const Tensor& kept, double scale, std::optional<double> softcap, int64_t ignore_index, bool partial,
    bool needs_hidden, bool needs_weight, bool needs_bias, int64_t workspace_bytes);

// Writes the gradient of the weight into `kept`, over the tiles that forward left there.
HiddenAndBias softmax_sums_backward_(
    const Tensor& grad_target, const Tensor& exp_factor, const Tensor& log_factor, const Tensor& hidden,
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& max_logit,
    const Tensor& kept, double scale, std::optional<double> softcap, int64_t ignore_index, bool partial,
    bool needs_hidden, bool needs_bias, int64_t workspace_bytes);

CWDPOLoss cwdpo_loss(
    const Tensor& logp, const std::optional<Tensor>& labels, const std::optional<Tensor>& count,
    const Tensor& cu_seqlens, const Tensor& ref_chosen, const Tensor& ref_rejected, double beta, double logp_floor,
    double temperature, std::optional<double> constant, std::optional<double> drop_below, bool per_token,
    int64_t ignore_index);

}  // namespace cwdpo
