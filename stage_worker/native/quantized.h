// Linears over quantized weights (codes.h). Group scales are applied in the product.
//
// Integer codes are multiplied by int16 activations (activations.h) and summed in int32 without rounding, fp8 by bf16
// activations. At the end of each block, its sums are scaled and added to fp32 sums, block by block in order. So a row's
// result does not depend on other rows, on the number of rows that a kernel takes at once, or on the order within a block.
#pragma once

#include <optional>

#include "activations.h"
#include "codes.h"
#include "simd.h"
#include "tiles.h"

namespace stagemesh {

constexpr int kRowsAtOnce = 120;  // These rows of activations stay in a cache while all panels are read.
constexpr int kCodesAhead = 4096;

// 16 sums. GCC copies accumulators back and forth if they are __m512i, which has elements of 64 bits.
typedef int32_t Int32s __attribute__((vector_size(64)));

// Each kind of codes says what a line has: pairs of columns, for 16 outputs to the left and 16 to the right.
struct Int8Codes {
  using Sum = Int32s;
  static constexpr bool kIsInteger = true;
  static constexpr int kPairs = 1;
  explicit Int8Codes(const Linear&) {}
  inline void columns(const char* line, int, __m512i& left, __m512i& right) const {
    left = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)line));
    right = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)(line + 32)));
  }
};

// All kinds of 4 bits are looked up in a table of 16 integers.
struct FourBitCodes {
  using Sum = Int32s;
  static constexpr bool kIsInteger = true;
  static constexpr int kPairs = 2;
  __m512i table;

  explicit FourBitCodes(const Linear& w) {
    static constexpr int16_t kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    static constexpr int16_t kNormal[16] = {-4095, -2851, -2150, -1617, -1165, -757, -373, 0,
                                            326,   659,   1008,  1384,  1805,  2304, 2961, 4095};
    alignas(64) int16_t entries[32];
    for (int i = 0; i < 32; i++) {  // Bit 4 of an index belongs to the next code, so the table is there twice.
      const int code = i % 16, half = kHalves[code % 8];
      entries[i] = w.codes == kInt4 ? code - w.zero : w.codes == kNf4 ? kNormal[code] : code < 8 ? half : -half;
    }
    table = _mm512_load_si512(entries);
  }
  inline void columns(const char* line, int pair, __m512i& left, __m512i& right) const {
    const __m512i codes = _mm512_load_si512(line);
    left = _mm512_permutexvar_epi16(pair ? _mm512_srli_epi16(codes, 8) : codes, table);
    right = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, pair ? 12 : 4), table);
  }
};

// bf16 of e4m3: the exponent is larger by 120. Codes with an exponent of 0 and 1 are looked up: 0 to 15 times 2^-9.
struct Fp8Codes {
  using Sum = __m512;
  static constexpr bool kIsInteger = false;
  static constexpr int kPairs = 1;
  __m512i low_bytes, high_bytes;

  explicit Fp8Codes(const Linear&) {
    alignas(16) uint8_t low[16] = {}, high[16] = {};
    for (int i = 1; i < 16; i++) {
      const float value = (float)i / 512.0f;
      uint32_t bits;
      memcpy(&bits, &value, sizeof bits);
      low[i] = (uint8_t)(bits >> 16), high[i] = (uint8_t)(bits >> 24);
    }
    low_bytes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)low));
    high_bytes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)high));
  }
  inline void columns(const char* line, int, __m512i& left, __m512i& right) const {
    const __m512i codes = _mm512_load_si512(line);
    const __mmask64 small = _mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x70));
    const __m512i index = _mm512_and_si512(codes, _mm512_set1_epi8(0x0f));
    __m512i low = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi8((char)0xf0));
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(0x07));
    high = _mm512_add_epi8(high, _mm512_set1_epi8(60));
    low = _mm512_mask_shuffle_epi8(low, small, low_bytes, index);
    high = _mm512_mask_shuffle_epi8(high, small, high_bytes, index);
    constexpr int kOrAnd = 0xf8;  // high | (codes & sign)
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), kOrAnd);
    left = _mm512_unpacklo_epi8(low, high);
    right = _mm512_unpackhi_epi8(low, high);
  }
};

inline Int32s dot(Int32s sum, uint32_t row, __m512i columns) {
  return (Int32s)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32((int)row), columns);
}
inline __m512 dot(__m512 sum, uint32_t row, __m512i columns) { return Bf16::dot(sum, row, columns); }
inline __m512 number(Int32s sum) { return _mm512_cvtepi32_ps((__m512i)sum); }
inline __m512 number(__m512 sum) { return sum; }

inline __m512 load_scales(const char* from, int type, int half) {
  if (type == kScaleF32) return _mm512_loadu_ps((const float*)from + half * 16);
  const __m256i bits = _mm256_load_si256((const __m256i*)from + half);
  if (type == kScaleF16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Computes sums[row][0..31] of M rows and one panel. `panel` begins behind the row scales.
template <class Kind, int M, int Planes>
inline void quantized_tile(const Activations& x, int first, const Linear& w, const Layout& layout, const char* at,
                           float (*sums)[kPanel]) {
  // A few rows have not enough sums to keep the multiplier busy. Integers can have more of them in any order.
  constexpr int kWays = !Kind::kIsInteger ? 1 : M == 1 ? 4 : M <= 4 ? 2 : 1;
  constexpr int kLines = std::max(1, kWays / Kind::kPairs);
  const Kind kind(w);
  const uint32_t* words = x.row(first);
  const Factor* factors = x.factors(first);
  const size_t stride = x.words * Planes, plane = x.words;
  const bool has_zeros = w.zeros;
  const size_t blocks = x.blocks;
  __m512 total[M][2] = {};
  for (int g = 0; g < layout.groups; g++) {
    const __m512 scales[2] = {load_scales(at, w.scale_type, 0), load_scales(at, w.scale_type, 1)};
    at += layout.scale_bytes;
    __m512 zeros[2] = {};
    if (has_zeros) {
      zeros[0] = load_scales(at, w.scale_type, 0), zeros[1] = load_scales(at, w.scale_type, 1);
      at += layout.scale_bytes;
    }
    for (int b = 0; b < layout.blocks; b++, factors++) {
      typename Kind::Sum own[M][2][kWays] = {};
      auto line = [&](int l) {
        _mm_prefetch(at + kCodesAhead, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int pair = 0; pair < Kind::kPairs; pair++, words++) {
          __m512i left, right;
          kind.columns(at, pair, left, right);
          const int way = (l * Kind::kPairs + pair) % kWays;
#pragma GCC unroll 12
          for (int r = 0; r < M; r++)
#pragma GCC unroll 2
            for (int p = 0; p < Planes; p++) {
              const uint32_t row = words[r * stride + p * plane];
              own[r][0][way] = dot(own[r][0][way], row, left);
              own[r][1][way] = dot(own[r][1][way], row, right);
            }
        }
        at += kLine;
      };
      int lines = layout.lines_of(layout.width(b));
      for (; lines >= kLines; lines -= kLines)
#pragma GCC unroll 4
        for (int l = 0; l < kLines; l++) line(l);
      for (; lines > 0; lines--) line(0);
#pragma GCC unroll 12
      for (int r = 0; r < M; r++) {
        const Factor& factor = factors[r * blocks];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
          for (int way = 1; way < kWays; way++) own[r][half][0] += own[r][half][way];
          __m512 sum = number(own[r][half][0]);
          if (has_zeros) sum = _mm512_fnmadd_ps(zeros[half], _mm512_set1_ps(factor.sum), sum);
          const __m512 scale = _mm512_mul_ps(scales[half], _mm512_set1_ps(factor.scale));
          total[r][half] = _mm512_fmadd_ps(sum, scale, total[r][half]);
        }
      }
    }
  }
  for (int r = 0; r < M; r++)
    for (int half = 0; half < 2; half++) _mm512_store_ps(sums[r] + half * 16, total[r][half]);
}

template <int M>
inline void quantized_rows(const Activations& x, int first, const Linear& w, const Layout& layout, const char* at,
                           float (*sums)[kPanel]) {
  switch (w.codes) {
    case kInt8: return quantized_tile<Int8Codes, M, 1>(x, first, w, layout, at, sums);
    case kFp8:
      return x.planes == 2 ? quantized_tile<Fp8Codes, M, 2>(x, first, w, layout, at, sums)
                           : quantized_tile<Fp8Codes, M, 1>(x, first, w, layout, at, sums);
    default: return quantized_tile<FourBitCodes, M, 1>(x, first, w, layout, at, sums);
  }
}

// Computes the sums of at most kMostRows rows. This is no template of `done`, so that all uses share the kernels.
inline void quantized_rows(int count, const Activations& x, int first, const Linear& w, const Layout& layout,
                           const char* at, float (*sums)[kPanel]) {
  with_constant<kMostRows>(count, [&](auto M) { quantized_rows<M>(x, first, w, layout, at, sums); });
}

// fp8 goes by AMX tiles if the processor has them (tiles.h). This depends on the weight alone, not on the rows.
inline bool quantized_by_tiles(const Activations& x, const Linear& w, const Layout& layout) {
  return w.codes == kFp8 && x.planes == 1 && layout.last % kTileK == 0 && has_tiles();
}

// Computes sums[row][0..31] of one panel of fp8 for `count` rows. Each block is decoded once, and has the layout of
// packed bf16 then.
inline void fp8_panel_by_tiles(Tiles& tiles, const Activations& x, int count, const Linear& w, const Layout& layout,
                               const char* at, float (*sums)[kPanel]) {
  alignas(64) char columns[kBlock * kLine];
  alignas(64) float own[2 * kTileRows][kPanel];
  const Fp8Codes codes(w);
  memset(sums, 0, count * sizeof *sums);
  for (int g = 0, column = 0; g < layout.groups; g++) {
    const __m512 scales[2] = {load_scales(at, w.scale_type, 0), load_scales(at, w.scale_type, 1)};
    at += layout.scale_bytes;
    for (int b = 0; b < layout.blocks; b++) {
      const int width = layout.width(b);
      for (int line = 0; line < layout.lines_of(width); line++, at += kLine) {
        _mm_prefetch(at + kCodesAhead, _MM_HINT_T0);
        __m512i left, right;
        codes.columns(at, 0, left, right);
        _mm512_store_si512(columns + line * 2 * kLine, left);
        _mm512_store_si512(columns + line * 2 * kLine + kLine, right);
      }
      for (int first = 0; first < count; first += 2 * kTileRows) {
        const int rows = std::min(count - first, 2 * kTileRows);
        tile_rows(tiles, (const char*)x.row(first) + column * 2, rows, x.words * 4, columns, width, own);
        for (int r = 0; r < rows; r++)
          for (int half = 0; half < 2; half++) {
            float* to = sums[first + r] + half * 16;
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(own[r] + half * 16), scales[half], _mm512_load_ps(to)));
          }
      }
      column += width;
    }
  }
}

// Calls done(row, panel, left, right) like `linear`.
template <class T, class Done>
inline void quantized_linear(const typename T::Element* x, int m, const Linear& w, int first_panel, int last_panel,
                             Done& done, size_t stride) {
  Activations& activations = own_activations();
  alignas(64) float sums[kRowsAtOnce][kPanel];
  const Layout layout(w);
  std::optional<Tiles> by_tiles;
  for (int chunk = 0; chunk < m; chunk += kRowsAtOnce) {
    const int rows = std::min(kRowsAtOnce, m - chunk), tiles = (rows + kMostRows - 1) / kMostRows;
    activations.take<T>(x + chunk * stride, rows, stride, w, layout);
    if (!by_tiles && quantized_by_tiles(activations, w, layout)) by_tiles.emplace();
    for (int panel = first_panel; panel < last_panel; panel++) {
      const char* row_scales = layout.panel(w, panel);
      const char* at = row_scales + layout.row_scale_bytes;
      if (by_tiles) {
        fp8_panel_by_tiles(*by_tiles, activations, rows, w, layout, at, sums);
      } else {
        for (int t = 0, first = 0; t < tiles; t++) {
          const int count = rows / tiles + (t < rows % tiles);
          quantized_rows(count, activations, first, w, layout, at, sums + first);
          first += count;
        }
      }
      for (int r = 0; r < rows; r++) {
        __m512 halves[2];
        for (int half = 0; half < 2; half++) {
          halves[half] = _mm512_load_ps(sums[r] + half * 16);
          if (w.row_scales) halves[half] = _mm512_mul_ps(halves[half], load_scales(row_scales, kScaleF32, half));
          if (w.bias) halves[half] = _mm512_add_ps(halves[half], _mm512_loadu_ps(w.bias + panel * kPanel + half * 16));
        }
        done(chunk + r, panel, halves[0], halves[1]);
      }
    }
  }
}

}  // namespace stagemesh
