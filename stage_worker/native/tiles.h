// bf16 linears by AMX tiles, if the processor has them: its vector unit has a tenth of their speed.
//
// Packed weights (gemm.h) already have the layout of a tile's right-hand side: 16 groups of 16 outputs, 128 bytes
// apart. Few and many rows all use tiles, because a tile sums in another order than vector instructions. That order
// over k is always the same, so a row's result does not depend on other rows.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace stagemesh {

constexpr int kTileRows = 16, kTileGroups = 16;
constexpr int kTileK = 2 * kTileGroups;
constexpr int kChunkRows = 256;  // This many rows stay in the second-level cache while all panels are read.

// Whether this process may use tiles. The kernel requires one request for permission.
inline bool has_tiles() {
  static const bool allowed = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums are in tiles 0 to 3 (upper left and right, lower left and right), rows in 4 and 5, columns in 6 and 7.
  TileShapes(int upper, int lower) {
    for (int t = 0; t < 8; t++) bytes[t] = 64;
    rows[0] = rows[1] = rows[4] = (uint8_t)upper;
    rows[2] = rows[3] = rows[5] = (uint8_t)lower;
    rows[6] = rows[7] = kTileGroups;
  }
};

// The tiles' shapes. They are set only when they change, and released at the end.
class Tiles {
 public:
  // Sets them for `count` rows, 1 to 32.
  void shape(int count) {
    const int upper = std::min(count, kTileRows), lower = std::max(1, count - kTileRows);
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper, lower_ = lower;
    const TileShapes shapes(upper, lower);
    // This is not the intrinsic: some compilers assume that it reads eight bytes.
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

 private:
  int upper_ = 0, lower_ = 0;
};

// Computes sums[row][0..31] of up to 32 rows and one panel. `Both`: there are more than 16 rows.
template <bool Both>
inline void tile_panel(const char* x, size_t row_bytes, const char* columns, int k, float (*sums)[32]) {
  const char* below = x + kTileRows * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  if (Both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int at = 0; at < k; at += kTileK, columns += kTileGroups * 128) {
    if (!Both)
      for (int line = 0; line < kTileGroups * 128; line += 64) _mm_prefetch(columns + 8192 + line, _MM_HINT_T0);
    _tile_loadd(4, x + at * 2, row_bytes);
    _tile_loadd(6, columns, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + 64, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (Both) {
      _tile_loadd(5, below + at * 2, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 128);
  _tile_stored(1, sums[0] + 16, 128);
  if (Both) {
    _tile_stored(2, sums[kTileRows], 128);
    _tile_stored(3, sums[kTileRows] + 16, 128);
  }
}

inline void tile_rows(Tiles& tiles, const char* x, int count, size_t row_bytes, const char* columns, int k,
                      float (*sums)[32]) {
  tiles.shape(count);
  count > kTileRows ? tile_panel<true>(x, row_bytes, columns, k, sums)
                    : tile_panel<false>(x, row_bytes, columns, k, sums);
}

// Calls done(row, panel, left, right) like `linear` for w.k divisible by kTileK.
template <class Linear, class Done>
inline void linear_by_tiles(const void* from, int m, const Linear& w, int first_panel, int last_panel, Done& done,
                            size_t row_bytes) {
  alignas(64) float sums[2 * kTileRows][32];
  Tiles tiles;
  for (int chunk = 0; chunk < m; chunk += kChunkRows) {
    const int end = std::min(m, chunk + kChunkRows);
    for (int panel = first_panel; panel < last_panel; panel++) {
      __m512 left = _mm512_setzero_ps(), right = left;
      if (w.bias) {
        left = _mm512_loadu_ps(w.bias + panel * 32);
        right = _mm512_loadu_ps(w.bias + panel * 32 + 16);
      }
      const char* columns = w.weights + (size_t)panel * w.k * 64;
      for (int first = chunk; first < end; first += 2 * kTileRows) {
        const int count = std::min(end - first, 2 * kTileRows);
        tile_rows(tiles, (const char*)from + first * row_bytes, count, row_bytes, columns, w.k, sums);
        for (int r = 0; r < count; r++)
          done(first + r, panel, _mm512_add_ps(_mm512_load_ps(sums[r]), left),
               _mm512_add_ps(_mm512_load_ps(sums[r] + 16), right));
      }
    }
  }
}

}  // namespace stagemesh
