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

LinearLogprob linear_logprob(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool with_direction, bool sparse_grad,
    int64_t workspace_bytes, int64_t kept_bytes);

LinearLogprobGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& peak, const Tensor& total, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool sparse_grad, int64_t workspace_bytes);

}  // namespace cwdpo
