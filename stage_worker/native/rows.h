// Operations on one row at a time: RMS norm, rotary embedding. They round where transformers' modules round.
#pragma once

#include <cmath>

#include "simd.h"

namespace stagemesh {

// out = weight * round(x / rms(x)); out may be x. `n` is a multiple of 16.
template <class T>
inline void rms_norm(const typename T::Element* x, const typename T::Element* weight, int n, float eps,
                     typename T::Element* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    const __m512 value = T::load(x + i);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)n + eps));
  for (int i = 0; i < n; i += 16)
    T::store(out + i, _mm512_mul_ps(T::load(weight + i), T::round(_mm512_mul_ps(T::load(x + i), by))));
}

// Rotates the first `2 * half` numbers of a head: pairs (i, i + half), each by its angle.
template <class T>
inline void rotate(typename T::Element* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i += 16) {
    const __mmask16 mask = columns_left(half, i);
    const __m512 a = T::load(head + i), b = T::load(head + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cosines + i), s = _mm512_maskz_loadu_ps(mask, sines + i);
    T::store(head + i, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)), mask);
    T::store(head + half + i, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)), mask);
  }
}

}  // namespace stagemesh
