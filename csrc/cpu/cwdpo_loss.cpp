// cwdpo_loss on the CPU: sums, means and counts of 2P sequences, cooling weights, loss, metrics and the gradient of
// every token in one call. cwdpo_kernels/portable/cwdpo_loss.py states the formulas. All intermediate results but the
// sums and means are float64. Bytes moved: 16 per token.

#include <cmath>

#include "../check.h"
#include "../ops.h"
#include "tensors.h"

namespace cwdpo {
namespace {

constexpr const char* kOp = "cwdpo_loss";

struct Sequences {
  std::vector<double> sum_logp, mean;
  std::vector<int64_t> count;
};

// The tokens of sequence s are [offsets[s], offsets[s + 1]), except those whose label is `ignore_index`. Without
// labels, each entry is already the sum over a sequence, of `count` tokens.
struct Tokens {
  const int64_t* offsets;
  const int64_t* labels;  // or null
  const int64_t* count;   // or null
  int64_t ignore_index;

  template <class F>
  void for_each(int64_t sequence, const F& f) const {
    for (int64_t i = offsets[sequence]; i < offsets[sequence + 1]; ++i) {
      if (labels == nullptr || labels[i] != ignore_index) f(i);
    }
  }
};

void check_offsets(const Tensor& cu_seqlens, int64_t tokens) {
  const int64_t* offsets = data<int64_t>(cu_seqlens);
  const int64_t last = cu_seqlens.numel() - 1;
  expect(last >= 0 && offsets[0] == 0, kOp, "cu_seqlens", "first value", 0, last < 0 ? -1 : offsets[0]);
  expect(last % 2 == 0, kOp, "cu_seqlens", "number of sequences", "even (chosen first, rejected second)", last);
  for (int64_t s = 0; s < last; ++s) {
    expect(offsets[s] <= offsets[s + 1], kOp, "cu_seqlens", "values at least", offsets[s], offsets[s + 1]);
  }
  expect(offsets[last] == tokens, kOp, "cu_seqlens", "last value", tokens, offsets[last]);
}

template <class T>
Sequences sum_sequences(const T* logp, const Tokens& tokens, int64_t sequences) {
  Sequences out{std::vector<double>(sequences), std::vector<double>(sequences), std::vector<int64_t>(sequences)};
  for (int64_t s = 0; s < sequences; ++s) {
    double sum_logp = 0;
    int64_t count = 0;
    tokens.for_each(s, [&](int64_t i) { sum_logp += logp[i], ++count; });
    out.count[s] = tokens.count == nullptr ? count : tokens.count[s];
    // Rounded to T like the returned values. A reference with the same log-probs then gives a reward of exactly 0, and
    // `drop_below` is compared with the value that the caller sees.
    out.sum_logp[s] = static_cast<T>(sum_logp);
    out.mean[s] = static_cast<T>(static_cast<T>(sum_logp) / static_cast<T>(std::max<int64_t>(out.count[s], 1)));
  }
  return out;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
// w_c * ratio. A weight of 0 leaves out a ratio of +-inf, but not NaN.
double weighted(double w_c, double ratio) { return w_c == 0 && std::isinf(ratio) ? 0 : w_c * ratio; }
double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

struct Options {
  double beta, logp_floor, temperature;
  std::optional<double> constant, drop_below;
  bool per_token;
};

template <class T>
CWDPOLoss compute(
    const Tensor& logp, const Tokens& tokens, const Tensor& ref_chosen, const Tensor& ref_rejected,
    const Options& options) {
  const int64_t pairs = ref_chosen.numel();
  const auto per_pair = [&] { return empty<T>({pairs}); };
  CWDPOLoss out{zeros({}, dtype_of<T>()), per_pair(), per_pair(), per_pair(), per_pair(), per_pair(),
                empty({pairs}, ScalarType::Bool), empty<T>({2 * pairs}), empty<T>({2 * pairs}),
                empty<int64_t>({2 * pairs}), zeros({logp.numel()}, dtype_of<T>())};
  auto& [loss, chosen_reward, rejected_reward, margin, accuracy, cooling_weight, kept, sum_logp, mean, count,
         grad_logp] = out;

  const Sequences sums = sum_sequences(data<T>(logp), tokens, 2 * pairs);
  std::copy(sums.sum_logp.begin(), sums.sum_logp.end(), data<T>(sum_logp));
  std::copy(sums.mean.begin(), sums.mean.end(), data<T>(mean));
  std::copy(sums.count.begin(), sums.count.end(), data<int64_t>(count));

  int64_t kept_pairs = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const bool keep = sums.count[p] > 0 && sums.count[pairs + p] > 0 &&
                      !(options.drop_below && sums.mean[pairs + p] < *options.drop_below);  // keeps NaN
    data<bool>(kept)[p] = keep;
    kept_pairs += keep;
  }
  const double share = 1.0 / std::max<int64_t>(kept_pairs, 1);

  double loss_sum = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const auto length = [&](int64_t s) { return options.per_token ? std::max<int64_t>(sums.count[s], 1) : 1; };
    const double ratio_chosen = (sums.sum_logp[p] - data<T>(ref_chosen)[p]) / length(p);
    const double ratio_rejected = (sums.sum_logp[pairs + p] - data<T>(ref_rejected)[p]) / length(pairs + p);
    const double w_c = options.constant
                           ? *options.constant
                           : sigmoid((sums.mean[pairs + p] - options.logp_floor) / options.temperature);
    const double logit = options.beta * (ratio_chosen - weighted(w_c, ratio_rejected));
    const double reward_margin = options.beta * (ratio_chosen - ratio_rejected);
    data<T>(chosen_reward)[p] = options.beta * ratio_chosen;
    data<T>(rejected_reward)[p] = options.beta * ratio_rejected;
    data<T>(margin)[p] = reward_margin;
    data<T>(accuracy)[p] = reward_margin > 0;
    data<T>(cooling_weight)[p] = w_c;
    if (!data<bool>(kept)[p]) continue;

    loss_sum += softplus(-logit) * share;
    const double coeff = options.beta * sigmoid(-logit) * share;
    const auto broadcast = [&](int64_t s, double grad_sum_logp) {
      tokens.for_each(s, [&](int64_t i) { data<T>(grad_logp)[i] = grad_sum_logp / length(s); });
    };
    broadcast(p, -coeff);
    broadcast(pairs + p, coeff * w_c);
  }
  *data<T>(loss) = loss_sum;
  return out;
}

}  // namespace

CWDPOLoss cwdpo_loss(
    const Tensor& logp, const std::optional<Tensor>& labels, const std::optional<Tensor>& count,
    const Tensor& cu_seqlens, const Tensor& ref_chosen, const Tensor& ref_rejected, double beta, double logp_floor,
    double temperature, std::optional<double> constant, std::optional<double> drop_below, bool per_token,
    int64_t ignore_index) {
  expect_dims(kOp, "logp", logp, 1);
  expect_float(kOp, "logp", logp);
  expect_dims(kOp, "cu_seqlens", cu_seqlens, 1);
  expect_index(kOp, "cu_seqlens", cu_seqlens);
  const Tensor offsets = contiguous_as<int64_t>(cu_seqlens);
  check_offsets(offsets, logp.numel());
  const int64_t pairs = (offsets.numel() - 1) / 2;
  expect_vector(kOp, "ref_chosen", ref_chosen, pairs);
  expect_vector(kOp, "ref_rejected", ref_rejected, pairs);
  if (labels) {
    expect_vector(kOp, "labels", *labels, logp.numel());
    expect_index(kOp, "labels", *labels);
  }
  if (count) {
    expect_vector(kOp, "count", *count, 2 * pairs);
    expect_index(kOp, "count", *count);
  }
  const auto as_int64 = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(contiguous_as<int64_t>(*tensor)) : std::nullopt;
  };
  const std::optional<Tensor> labels_N = as_int64(labels), count_S = as_int64(count);
  const Tokens tokens{data<int64_t>(offsets), labels_N ? data<int64_t>(*labels_N) : nullptr,
                      count_S ? data<int64_t>(*count_S) : nullptr, ignore_index};
  const Options options{beta, logp_floor, temperature, constant, drop_below, per_token};
  return with_compute_type(logp.scalar_type(), [&](auto type) {
    using T = decltype(type);
    return compute<T>(contiguous_as<T>(logp), tokens, contiguous_as<T>(ref_chosen), contiguous_as<T>(ref_rejected),
                      options);
  });
}

}  // namespace cwdpo
