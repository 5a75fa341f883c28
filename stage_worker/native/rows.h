// Operations on one row at a time: RMS norm, rotary embedding. They round where transformers' modules round.
#pragma once

#include <cmath>

#include "simd.h"

namespace stagemesh {

// RMS norm of `n` numbers, or layer norm if `centred`; out may be x. Without a weight it is ones, without a bias zeros.
// `rounds`: the normalised numbers are rounded before they are weighed, as most modules do.
template <class T>
inline void norm(const typename T::Element* x, const float* weight, const float* bias, int n, float eps, bool centred,
                 bool rounds, typename T::Element* out) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 mean = zero, squares = zero;
  if (centred) {
    for (int i = 0; i < n; i += 16) mean = _mm512_add_ps(mean, _mm512_maskz_mov_ps(columns_left(n, i), T::load(x + i)));
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / (float)n);
  }
  for (int i = 0; i < n; i += 16) {
    const __m512 value = _mm512_maskz_sub_ps(columns_left(n, i), T::load(x + i), mean);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)n + eps));
  for (int i = 0; i < n; i += 16) {
    const __mmask16 mask = columns_left(n, i);
    __m512 value = _mm512_mul_ps(_mm512_sub_ps(T::load(x + i), mean), by);
    if (rounds) value = T::round(value);
    if (weight) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight + i));
    if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + i));
    T::store(out + i, value, mask);
  }
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
