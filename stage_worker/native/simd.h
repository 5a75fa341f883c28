// Element types of the kernels: bf16, fp16 or fp32 in memory, fp32 in registers.
//
// All element types share every loop by one convention: a "group" is the 4 bytes of one row that are multiplied at once,
// two numbers of 16 bits or one fp32 number. A right-hand side is stored group by group, 16 columns (64 bytes)
// together. So one load reads 16 columns of a group, and one broadcast reads the row's part.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace stagemesh {

struct Bf16 {
  using Element = uint16_t;
  static constexpr int kGroup = 2;

  static inline __m512 dot(__m512 sum, uint32_t row, __m512i columns) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)row), (__m512bh)columns);
  }
  static inline __m512 load(const Element* from) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static inline void store(Element* to, __m512 value) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
  }
  static inline void store(Element* to, __m512 value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
  }
  // Rounds to the nearest number of this element type.
  static inline __m512 round(__m512 value) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(value);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // Splits 16 groups into the first and the second number of each.
  static inline void split(__m512i groups, __m512 (&parts)[2]) {
    parts[0] = _mm512_castsi512_ps(_mm512_slli_epi32(groups, 16));
    parts[1] = _mm512_castsi512_ps(_mm512_and_si512(groups, _mm512_set1_epi32((int)0xffff0000)));
  }
  static inline float number(Element value) {
    const uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
  }
};

struct F16 {
  using Element = uint16_t;
  static constexpr int kGroup = 2;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static inline __m512 dot(__m512 sum, uint32_t row, __m512i columns) {
    const __m512 first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(columns));
    const __m512 second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(columns, 16)));
    sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm256_set1_epi16((short)row)), first, sum);
    return _mm512_fmadd_ps(_mm512_cvtph_ps(_mm256_set1_epi16((short)(row >> 16))), second, sum);
  }
  static inline __m512 load(const Element* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
  static inline void store(Element* to, __m512 value) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, kNearest));
  }
  static inline void store(Element* to, __m512 value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, kNearest));
  }
  static inline __m512 round(__m512 value) { return _mm512_cvtph_ps(_mm512_cvtps_ph(value, kNearest)); }
  static inline void split(__m512i groups, __m512 (&parts)[2]) {
    parts[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(groups));
    parts[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(groups, 16)));
  }
  static inline float number(Element value) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16((short)value))); }
};

struct F32 {
  using Element = float;
  static constexpr int kGroup = 1;

  static inline __m512 dot(__m512 sum, uint32_t row, __m512i columns) {
    const __m512 value = _mm512_castsi512_ps(_mm512_set1_epi32((int)row));
    return _mm512_fmadd_ps(value, _mm512_castsi512_ps(columns), sum);
  }
  static inline __m512 load(const Element* from) { return _mm512_loadu_ps(from); }
  static inline void store(Element* to, __m512 value) { _mm512_storeu_ps(to, value); }
  static inline void store(Element* to, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, value); }
  static inline __m512 round(__m512 value) { return value; }
  static inline void split(__m512i groups, __m512 (&parts)[1]) { parts[0] = _mm512_castsi512_ps(groups); }
  static inline float number(Element value) { return value; }
};

// Mask of 16 columns from `at` on: the columns before `n`.
inline __mmask16 columns_left(int n, int at) {
  return n - at >= 16 ? (__mmask16)0xffff : n <= at ? (__mmask16)0 : (__mmask16)((1u << (n - at)) - 1);
}

// Calls `work` with `count`, 1 to Most, as a constant, so that this many sums stay in registers.
template <int Most, class Work>
inline void with_constant(int count, Work&& work) {
  if (count == Most) return work(std::integral_constant<int, Most>{});
  if constexpr (Most > 1) with_constant<Most - 1>(count, work);
}

// e^x to about one unit in the last place; 0 for -inf. Range reduction and polynomial as in Cephes' expf.
inline __m512 exp16(__m512 x) {
  // Below 2^-126 the result is set to 0. The clamp also handles -inf, and keeps the result a normal number.
  const __mmask16 gone = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.7f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_mov_ps(_knot_mask16(gone), _mm512_scalef_ps(p, n));
}

// x * sigmoid(x)
inline __m512 silu16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

inline __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline __m512 tanh16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(exp16(_mm512_mul_ps(x, two)), one)));
}

inline __m512 capped16(__m512 x, float cap) {
  return _mm512_mul_ps(_mm512_set1_ps(cap), tanh16(_mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap))));
}

// erf(x) to 1.5e-7: Abramowitz and Stegun, 7.1.26.
inline __m512 erf16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 square = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(size, size));
  const __m512 value = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), exp16(square), one);
  return _mm512_or_ps(value, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

// Numbers of the activations in operations; ops.py has the same.
enum Activation : int32_t { kNone, kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kSigmoid, kSoftplus };

inline __m512 activate16(int32_t activation, __m512 x) {
  const __m512 zero = _mm512_setzero_ps(), half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  switch (activation) {
    case kSilu: return silu16(x);
    case kGelu: {
      const __m512 erf = erf16(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f)));
      return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, erf));
    }
    case kGeluTanh: {
      const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
      const __m512 tanh = tanh16(_mm512_mul_ps(inner, _mm512_set1_ps(0.79788456080286536f)));
      return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, tanh));
    }
    case kQuickGelu: return _mm512_mul_ps(x, sigmoid16(_mm512_mul_ps(x, _mm512_set1_ps(1.702f))));
    case kRelu: return _mm512_max_ps(zero, x);
    case kRelu2: {
      const __m512 positive = _mm512_max_ps(zero, x);
      return _mm512_mul_ps(positive, positive);
    }
    case kSigmoid: return sigmoid16(x);
    case kSoftplus: {
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, x);
      for (float& lane : lanes) lane = lane > 20.0f ? lane : std::log1p(std::exp(lane));
      return _mm512_load_ps(lanes);
    }
    default: return x;
  }
}

}  // namespace stagemesh
