// Kept tiles: raw columns of logits, or their exponentials (kept_exponentials.h), that forward keeps, so that backward
// need not recompute them.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "tensors.h"
#include "tiles.h"

namespace cwdpo {

// A value of kept_bytes (cwdpo_kernels/ops/checks.py): as without a value, but unused bytes are not zeroed.
constexpr int64_t kUninitialized = -1;

// Memory for kept tiles: that of the weight's gradient, or as many opaque bytes as `kept_bytes` says.
inline Tensor memory_for_kept(const Tensor& weight, std::optional<int64_t> kept_bytes) {
  const bool opaque = kept_bytes && *kept_bytes >= 0;
  return opaque ? empty({*kept_bytes}, ScalarType::Byte) : torch::stable::empty_like(weight);
}

// The N numbers of type T of one vocabulary entry, one for each labelled row, are one line. In the memory of the
// weight's gradient [V, D], a line lies in the row of its entry, if it fits: backward reads it before it writes that
// row, so that threads work on the vocabulary in any order. In opaque bytes, as many lines as fit are stored, of the
// last entries. Where a line lies depends neither on the tiles nor on the number of threads, which may change between
// forward and backward.
template <class T>
class KeptTiles {
 public:
  KeptTiles(const Tensor& storage, int64_t n_labelled, int64_t vocab)
      : bytes_(storage.numel() * static_cast<int64_t>(storage.element_size())), line_bytes_(n_labelled * sizeof(T)) {
    const bool in_gradient = storage.dim() == 2;
    stride_ = in_gradient ? storage.size(1) * static_cast<int64_t>(storage.element_size()) : line_bytes_;
    start_ = data<char>(storage);
    const bool fits = line_bytes_ > 0 && line_bytes_ <= stride_ && stride_ % static_cast<int64_t>(sizeof(T)) == 0;
    count_ = fits ? std::min(bytes_ / stride_, vocab) : 0;
    first_ = vocab - count_;
  }

  bool has_line(int64_t v) const { return v >= first_ && count_ > 0; }
  bool has(Span columns) const { return has_line(columns.start); }
  // The numbers [B, N] of a tile.
  Matrix<T> tile(Span columns) const {
    return {line(columns.start), columns.size, line_bytes_ / static_cast<int64_t>(sizeof(T)),
            stride_ / static_cast<int64_t>(sizeof(T))};
  }
  // Keeps the lines of a tile [B, R] of the rows in `block` that have a place.
  void store(const Matrix<T>& tile, Span columns, Span block) const {
    for (int64_t v = std::max(first_ - columns.start, int64_t{0}); v < columns.size; ++v) {
      std::memcpy(line(columns.start + v) + block.start, tile.row(v), block.size * sizeof(T));
    }
  }
  void zero_unused() const {
    for (int64_t i = 0; i < count_; ++i) {
      std::fill(start_ + i * stride_ + line_bytes_, start_ + (i + 1) * stride_, char{0});
    }
    std::fill(start_ + count_ * stride_, start_ + bytes_, char{0});
  }

  T* line(int64_t v) const { return reinterpret_cast<T*>(start_ + (v - first_) * stride_); }

 private:
  char* start_;
  int64_t bytes_, line_bytes_, stride_ = 0, count_ = 0, first_ = 0;
};

}  // namespace cwdpo
