// logits_logprob on the CPU, forward and backward: the algebra of linear_logprob on logits that exist already.
// Bytes moved: forward reads the logits once; backward reads them once and writes the gradient once. Logits of half
// precision pass through a block of float32 rows.

#include "../check.h"
#include "../ops.h"
#include "competitors.h"
#include "head.h"
#include "upstream.h"

namespace cwdpo {
namespace {

constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kChunk = 8192;  // entries of a row that stay in the first-level cache between two passes

// f(start, size) for the entries of a row of n without the one at `label`, which may lie outside.
template <class F>
void without_label(int64_t n, int64_t label, const F& f) {
  if (label < 0 || label >= n) return f(int64_t{0}, n);
  if (label > 0) f(int64_t{0}, label);
  if (label + 1 < n) f(label + 1, n - label - 1);
}

void check_logits(const char* op, const Tensor& logits, const Tensor& labels) {
  expect_dims(op, "logits", logits, 2);
  expect_dims(op, "labels", labels, 1);
  expect_size(op, "labels", labels, 0, logits.size(0));
}

// f(i, z, out) for the rows `rows` of `logits`, all threads: z is row rows[i] in T, and `out` is where its results go:
// the same row of `results` (of the logits' dtype; undefined where there are none). z and out may be the same memory.
template <class T, class F>
void for_logit_rows(
    const Tensor& logits, const std::vector<int64_t>& rows, const std::optional<Tensor>& results, const F& f) {
  const int64_t vocab = logits.size(1), count = rows.size();
  const bool in_place = logits.scalar_type() == dtype_of<T>() && logits.stride(1) == 1 &&
                        (!results || results->stride(1) == 1);
  if (in_place) {
    const Matrix<T> from = matrix<T>(logits), to = matrix<T>(results ? *results : logits);
    return for_rows(count, vocab, [&](int64_t i) { f(i, from.row(rows[i]), to.row(rows[i])); });
  }
  const int64_t block_rows = std::max<int64_t>(kBlockBytes / (vocab * static_cast<int64_t>(sizeof(T))), 1);
  const Tensor buffer = empty<T>({std::min(block_rows, count), vocab});
  const Matrix<T> block = matrix<T>(buffer);
  for_spans(count, block_rows, [&](Span span) {
    for (int64_t i = 0; i < span.size; ++i) {
      Tensor row = slice_rows(buffer, i, 1);
      torch::stable::copy_(row, slice_rows(logits, rows[span.start + i], 1));
    }
    for_rows(span.size, vocab, [&](int64_t i) { f(span.start + i, block.row(i), block.row(i)); });
    for (int64_t i = 0; results && i < span.size; ++i) {
      Tensor row = slice_rows(*results, rows[span.start + i], 1);
      torch::stable::copy_(row, slice_rows(buffer, i, 1));
    }
  });
}

template <class T>
LogitsLogprob forward(const Tensor& logits, const LiveRows& live, int64_t tokens) {
  LogitsLogprob out{
      zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>())};
  auto& [logp, peak, total] = out;
  const int64_t vocab = logits.size(1);
  for_logit_rows<T>(logits, live.positions, std::nullopt, [&](int64_t i, const T* z, T*) {
    Competitors<T> others;
    without_label(vocab, live.labels[i], [&](int64_t start, int64_t n) {
      for_spans(n, kChunk, [&](Span chunk) { others.add(z + start + chunk.start, chunk.size); });
    });
    const int64_t token = live.positions[i];
    data<T>(peak)[token] = others.peak;
    data<T>(total)[token] = others.total;
    data<T>(logp)[token] = logp_of(z[live.labels[i]], others);
  });
  return out;
}

// d logp / d z_v = (1 - p_y) * (1 if v == y else -q_v), into `out`; rows without a gradient become 0.
template <class T>
void write_gradient(
    const Tensor& grad_logp, const Tensor& logits, const LiveRows& labelled, const Tensor& logp, const Tensor& peak,
    const Tensor& total, const Tensor& out) {
  const Upstream<T> up(labelled, grad_logp, logp, peak, total, /*scale=*/1.0);
  const int64_t vocab = logits.size(1);
  for_logit_rows<T>(logits, up.live.positions, out, [&](int64_t i, const T* z, T* grad) {
    exp_row(z, grad, vocab, up.peak[i], up.push[i]);
    grad[up.live.labels[i]] = up.pull[i];  // over exp(c - peak), which may overflow
  });
  int64_t next = 0;
  for (int64_t token = 0; token < logits.size(0); ++token) {
    if (next < up.live.size() && up.live.positions[next] == token) {
      ++next;
      continue;
    }
    Tensor row = slice_rows(out, token, 1);
    torch::stable::zero_(row);
  }
}

void checked_gradient(
    const char* op, const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp,
    const Tensor& peak, const Tensor& total, int64_t ignore_index, const Tensor& out) {
  check_logits(op, logits, labels);
  check_per_token(op, labels, grad_logp, logp, peak, total);
  const LiveRows labelled = labelled_rows(op, labels, ignore_index, logits.size(1));
  with_compute_type(logits.scalar_type(), [&](auto type) {
    write_gradient<decltype(type)>(grad_logp, logits, labelled, logp, peak, total, out);
  });
}

}  // namespace

LogitsLogprob logits_logprob(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool /*reuse_logits*/) {
  check_logits("logits_logprob", logits, labels);
  const LiveRows live = labelled_rows("logits_logprob", labels, ignore_index, logits.size(1));
  return with_compute_type(logits.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(logits, live, labels.numel());
  });
}

void logits_logprob_backward_(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& peak,
    const Tensor& total, int64_t ignore_index) {
  checked_gradient("logits_logprob_backward_", grad_logp, logits, labels, logp, peak, total, ignore_index, logits);
}

Tensor logits_logprob_backward(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& peak,
    const Tensor& total, int64_t ignore_index) {
  const Tensor out = torch::stable::empty_like(logits);
  checked_gradient("logits_logprob_backward", grad_logp, logits, labels, logp, peak, total, ignore_index, out);
  return out;
}

}  // namespace cwdpo
