// The ops that registration.cpp binds to the schemas of cwdpo_kernels/ops: one function each, arguments in the
// schema's order. What they compute is written in cwdpo_kernels/portable.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace cwdpo {

using torch::stable::Tensor;

using LinearLogprob = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // logp, peak, total, direction, kept
using LinearLogprobGrads = std::tuple<Tensor, Tensor, Tensor>;             // hidden, weight, bias
using HiddenAndBias = std::tuple<Tensor, Tensor>;                          // gradients
using LogitsLogprob = std::tuple<Tensor, Tensor, Tensor>;                  // logp, peak, total
using TokenStats = std::tuple<Tensor, Tensor, Tensor, Tensor>;             // logp, entropy, top1_prob, is_top1
using CWDPOLoss = std::tuple<  // loss, chosen_reward, rejected_reward, margin, accuracy, weight, kept, total, mean,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // count, grad_logp

LinearLogprob linear_logprob(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool with_direction, bool sparse_grad,
    int64_t workspace_bytes, std::optional<int64_t> kept_bytes);

LinearLogprobGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& peak, const Tensor& total, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool sparse_grad, int64_t workspace_bytes);

// Over `kept`, the memory of the weight's gradient.
HiddenAndBias linear_logprob_backward_(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& peak, const Tensor& total, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_bias,
    bool sparse_grad, int64_t workspace_bytes);

LogitsLogprob logits_logprob(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool reuse_logits);

Tensor logits_logprob_backward(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& peak,
    const Tensor& total, int64_t ignore_index);

// Over the logits' own memory.
void logits_logprob_backward_(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& peak,
    const Tensor& total, int64_t ignore_index);

TokenStats token_stats(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, int64_t workspace_bytes);

CWDPOLoss cwdpo_loss(
    const Tensor& logp, const std::optional<Tensor>& labels, const std::optional<Tensor>& count,
    const Tensor& cu_seqlens, const Tensor& ref_chosen, const Tensor& ref_rejected, double beta, double logp_floor,
    double temperature, std::optional<double> constant, std::optional<double> drop_below, bool per_token,
    int64_t ignore_index);

}  // namespace cwdpo
