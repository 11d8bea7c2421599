#include "amx.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "gemm_kernels.h"
#include "vector.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if CWDPO_HAS_AVX512_GEMM && defined(__linux__)
#define CWDPO_HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define CWDPO_HAS_AMX 0
#endif

namespace cwdpo {
namespace {

// A tile has 16 rows of 16 numbers of 32 bits: float sums, or steps of A or B. A block of the output is 2 x 2 tiles.
constexpr int64_t kTile = 16, kBlock = 2 * kTile, kPanel = PackedB<Bf16>::kPanel;
constexpr int64_t kPartSteps = 256;  // of a sum of 512 terms; longer ones are split, as in gemm_kernels.cpp
static_assert(kTile == PackedB<Bf16>::kStepsOfTile);

// The sums [32, 32] of a block, and what AMX does with them.
struct PlainTiles {
  float sums[kBlock][kBlock];

  void zero() { std::memset(sums, 0, sizeof(sums)); }
  // sums += A B for A [tiles, 32, 16] and the first 32 columns of B [tiles, 16, 64].
  void add(const uint32_t* a, const uint32_t* b, int64_t tiles) {
    for (int64_t k = 0; k < tiles * kTile; ++k) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint32_t step = a[(k / kTile * kBlock + i) * kTile + k % kTile];
        for (int64_t j = 0; j < kBlock; ++j) {
          sums[i][j] += low_entry(step) * low_entry(b[k * kPanel + j]);
          sums[i][j] += high_entry(step) * high_entry(b[k * kPanel + j]);
        }
      }
    }
  }
  void store(float* out) const { std::memcpy(out, sums, sizeof(sums)); }
};

#if CWDPO_HAS_AMX
#define CWDPO_AMX __attribute__((target("amx-tile,amx-bf16")))

// What `ldtilecfg` reads: all tiles have 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTileConfig;

// The same in the tile registers of this thread: sums in 0 to 3, A in 4 and 5, B in 6 and 7. Released at the end, so
// that the system need not save them when it switches to another thread.
struct AmxTiles {
  CWDPO_AMX AmxTiles() { _tile_loadconfig(&kTileConfig); }
  CWDPO_AMX ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  CWDPO_AMX void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  CWDPO_AMX void add(const uint32_t* a, const uint32_t* b, int64_t tiles) {
    __asm__ volatile("" ::: "memory");  // GCC does not know that the loads below read memory
    for (; tiles > 0; --tiles, a += kBlock * kTile, b += kTile * kPanel) {
      _tile_loadd(6, b, kPanel * sizeof(*b));
      _tile_loadd(4, a, kTile * sizeof(*a));
      _tile_loadd(7, b + kTile, kPanel * sizeof(*b));
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + kTile * kTile, kTile * sizeof(*a));
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  CWDPO_AMX void store(float* out) const {
    _tile_stored(0, out, kBlock * sizeof(*out));
    _tile_stored(1, out + kTile, kBlock * sizeof(*out));
    _tile_stored(2, out + kTile * kBlock, kBlock * sizeof(*out));
    _tile_stored(3, out + kTile * kBlock + kTile, kBlock * sizeof(*out));
  }
};
#endif

// Copies steps [start, start + 16 tiles) of `rows` rows of A, from `row` on, as [tiles, 32, 16]. The rest is zeros.
CWDPO_FOR_EACH_PROCESSOR void pack_part(
    const OperandA<Bf16>& a, int64_t row, int64_t rows, int64_t start, int64_t tiles, uint32_t* out) {
  const char* first = a.start + row * a.row_stride + start * a.step_stride;
  const int64_t terms = a.depth - 2 * start;  // of them; in strided rows, of a transposed tile, an even number
  if (rows < kBlock || terms < 2 * tiles * kTile) std::memset(out, 0, tiles * kBlock * kTile * sizeof(*out));
  for (int64_t t = 0; t < tiles; ++t, out += kBlock * kTile) {
    const int64_t tile_terms = std::min(terms - 2 * t * kTile, 2 * kTile);
    const char* tile = first + t * kTile * a.step_stride;
    if (a.step_stride == sizeof(*out)) {  // contiguous rows
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(out + i * kTile, tile + i * a.row_stride, tile_terms * sizeof(Bf16));
      }
    } else {
      for (int64_t k = 0; k < tile_terms / 2; ++k) {
        for (int64_t i = 0; i < rows; ++i) {
          std::memcpy(out + i * kTile + k, tile + i * a.row_stride + k * a.step_stride, sizeof(*out));
        }
      }
    }
  }
}

// out = sums, or out += sums, for rows x columns of a block.
CWDPO_FOR_EACH_PROCESSOR void add_block(
    const float* sums, float* out, int64_t stride, int64_t rows, int64_t columns, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i, sums += kBlock, out += stride) {
    if (accumulate) {
      for (int64_t j = 0; j < columns; ++j) out[j] += sums[j];
    } else {
      std::memcpy(out, sums, columns * sizeof(*out));
    }
  }
}

// Up to 32 rows of the product, from `row` on.
template <class Tiles>
void multiply_rows(
    const Matrix<float>& out, const OperandA<Bf16>& a, const PackedB<Bf16>& b, int64_t row, bool accumulate) {
  alignas(64) uint32_t a_part[kPartSteps * kBlock];
  alignas(64) float sums[kBlock * kBlock];
  const int64_t rows = std::min(kBlock, a.rows - row);
  Tiles block;
  for (int64_t start = 0; start < b.steps(); start += kPartSteps, accumulate = true) {
    const int64_t tiles = std::min(kPartSteps, b.steps() - start) / kTile;
    pack_part(a, row, rows, start, tiles, a_part);
    for (int64_t column = 0; column < b.columns; column += kBlock) {
      block.zero();
      block.add(a_part, b.panel(column / kPanel) + start * kPanel + column % kPanel, tiles);
      block.store(sums);
      add_block(
          sums, out.row(row) + column, out.row_stride, rows, std::min(kBlock, b.columns - column), accumulate);
    }
  }
}

#if CWDPO_HAS_AMX
// Whether a product of small integers, which is exact, has the right result: a guard against a processor, an emulator or
// a system whose tiles are not what they should be.
bool amx_is_right() {
  constexpr int64_t kRows = kBlock + 1, kColumns = kBlock + 1, kDepth = 2 * kPartSteps + 2 * kTile + 2;
  const auto integers = [](int64_t count) {
    std::vector<Bf16> values(count);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<Bf16>(std::bit_cast<uint32_t>(static_cast<float>(i * i % 17 - 8)) >> 16);
    }
    return values;
  };
  const std::vector<Bf16> rows = integers(kRows * kDepth), columns = integers(kColumns * kDepth);
  PackedB<Bf16> b(kDepth, kColumns);
  b.pack_transposed(columns.data(), kDepth);
  const OperandA<Bf16> a = operand_a(rows.data(), kRows, kDepth);
  std::vector<float> found(kRows * kColumns), expected(kRows * kColumns);
  for (int64_t row = 0; row < kRows; row += kBlock) {
    multiply_rows<AmxTiles>({found.data(), kRows, kColumns, kColumns}, a, b, row, false);
    multiply_rows<PlainTiles>({expected.data(), kRows, kColumns, kColumns}, a, b, row, false);
  }
  return found == expected;
}
#endif

}  // namespace

bool processor_has_amx() {
#if defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 && (edx & kTiles) != 0;
#else
  return false;
#endif
}

bool can_use_amx() {
#if CWDPO_HAS_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of Linux 5.16 and newer
  static const bool usable =
      processor_has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && amx_is_right();
  return usable;
#else
  return false;
#endif
}

void multiply_by_tiles(
    const Matrix<float>& out, const OperandA<Bf16>& a, const PackedB<Bf16>& b, bool accumulate, bool plain) {
  for_rows((a.rows + kBlock - 1) / kBlock, kBlock * b.columns, [&](int64_t i) {
    if (plain) return multiply_rows<PlainTiles>(out, a, b, i * kBlock, accumulate);
#if CWDPO_HAS_AMX
    multiply_rows<AmxTiles>(out, a, b, i * kBlock, accumulate);
#else
    throw std::logic_error("cwdpo_kernels was compiled without AMX products");
#endif
  });
}

}  // namespace cwdpo
