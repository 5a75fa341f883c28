// Rows of activations as the kernels of quantized weights read them.
//
// For integer codes, each block of at most kBlock numbers becomes int16 with a scale that is a power of two. Numbers of
// bf16 down to 2^-7 of the block's largest one stay exact; smaller ones are off by at most 2^-15 of it. For fp8, bf16
// numbers stay as they are, and others become the sum of two bf16 numbers. A row depends on no other row.
#pragma once

#include <vector>

#include "codes.h"
#include "simd.h"

namespace stagemesh {

struct Factor {
  float scale;  // Of a block's numbers.
  float sum;    // Of a block's numbers, before they are scaled. Only for weights with zeros.
};

class Activations {
 public:
  // Takes `count` rows. Row r begins at x + r * stride.
  template <class T>
  void take(const typename T::Element* x, int count, size_t stride, const Linear& w, const Layout& layout) {
    planes = w.codes == kFp8 && !std::is_same<T, Bf16>::value ? 2 : 1;
    blocks = layout.groups * layout.blocks;
    words = (size_t)layout.padded / 2;
    grow(numbers_, (size_t)count * planes * layout.padded + 16);  // The last store may go beyond.
    grow(factors_, (size_t)count * blocks);
    for (int r = 0; r < count; r++) take_row<T>(x + r * stride, r, w, layout);
  }

  // Row r, plane by plane, in words of two numbers.
  const uint32_t* row(int r) const { return (const uint32_t*)numbers_.data() + r * planes * words; }
  const Factor* factors(int r) const { return factors_.data() + (size_t)r * blocks; }

  int planes = 1, blocks = 0;
  size_t words = 0;  // Of a plane of a row.

 private:
  template <class Item>
  static void grow(std::vector<Item>& items, size_t count) {
    if (items.size() < count) items.resize(count);
  }

  template <class T>
  void take_row(const typename T::Element* x, int r, const Linear& w, const Layout& layout) {
    if (w.ordered) {
      grow(ordered_, (size_t)w.k * sizeof *x);
      auto* to = (typename T::Element*)ordered_.data();
      const int32_t* order = (const int32_t*)w.weights;
      for (int i = 0; i < w.k; i++) to[i] = x[order[i]];
      x = to;
    }
    uint16_t* to = numbers_.data() + (size_t)r * planes * layout.padded;
    Factor* factor = factors_.data() + (size_t)r * blocks;
    for (int g = 0; g < layout.groups; g++)
      for (int b = 0; b < layout.blocks; b++, factor++) {
        const int width = layout.width(b), padded = layout.lines_of(width) * layout.columns;
        w.codes == kFp8 ? copy<T>(x, width, padded, to, factor) : quantize<T>(x, width, padded, w, to, factor);
        x += width, to += padded;
      }
  }

  template <class T>
  static __m512 load(const typename T::Element* x, int left) {
    if (left >= 16) return T::load(x);
    typename T::Element rest[16] = {};
    memcpy(rest, x, left * sizeof *x);
    return T::load(rest);
  }

  template <class T>
  void copy(const typename T::Element* x, int width, int padded, uint16_t* to, Factor* factor) const {
    const size_t plane = words * 2;
    for (int i = 0; i < padded; i += 16) {
      const __m512 value = load<T>(x + i, width - i);
      Bf16::store(to + i, value, columns_left(padded, i));
      if (planes == 2) Bf16::store(to + plane + i, _mm512_sub_ps(value, Bf16::round(value)), columns_left(padded, i));
    }
    *factor = {1.0f, 0.0f};
  }

  // Returns 2^(exponent - 127).
  static float power(int exponent) {
    const uint32_t bits = (uint32_t)exponent << 23;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
  }

  template <class T>
  static void quantize(const typename T::Element* x, int width, int padded, const Linear& w, uint16_t* to,
                       Factor* factor) {
    __m512 values[kBlock / 16];
    // Compared as integers, infinities and NaN are larger than all numbers.
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < width; i += 16) {
      values[i / 16] = load<T>(x + i, width - i);
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(values[i / 16]), _mm512_set1_epi32(0x7fffffff));
      largest = _mm512_max_epi32(largest, bits);
    }
    // Products of NF4's 12 bits need numbers of 13 bits, so that 64 of them do not overflow.
    const int bits = w.codes == kNf4 ? 13 : 15, exponent = _mm512_reduce_max_epi32(largest) >> 23;
    const float unit = w.codes == kFp4 ? 0.5f : w.codes == kNf4 ? 1.0f / 4095.0f : 1.0f;
    // Below 2^-97, everything counts as zero.
    float by = 0.0f, scale = 0.0f;
    if (exponent == 255) scale = NAN;
    if (exponent > 30 && exponent < 255) {
      by = power(254 + (bits - 1) - exponent);
      scale = power(exponent - (bits - 1)) * unit;
    }
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < width; i += 16) {
      const __m256i codes = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(values[i / 16], _mm512_set1_ps(by))));
      _mm256_storeu_si256((__m256i*)(to + i), codes);
      if (w.zeros) sum = _mm512_add_epi32(sum, _mm512_cvtepi16_epi32(codes));
    }
    for (int i = (width + 15) / 16 * 16; i < padded; i++) to[i] = 0;
    *factor = {scale, w.zeros ? (float)_mm512_reduce_add_epi32(sum) : 0.0f};
  }

  std::vector<uint16_t> numbers_;
  std::vector<Factor> factors_;
  std::vector<uint8_t> ordered_;
};

// This thread's. Their memory is kept, as for each step's workspaces.
inline Activations& own_activations() {
  static thread_local Activations own;
  return own;
}

}  // namespace stagemesh
