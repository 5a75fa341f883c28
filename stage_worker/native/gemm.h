// Linears over packed weights: y[m, n] = sum over k of x[m, k] * w[n, k]. quantized.h has those of few bits.
//
// Weights are packed once at load into panels of 32 outputs, group by group (simd.h). Few rows read each panel once,
// front to back, at the speed of memory. For many rows, a panel stays in the second-level cache. Every sum runs over k
// in order for any number of rows, so a row's result does not depend on other rows.
#pragma once

#include <algorithm>

#include "linear.h"
#include "quantized.h"
#include "simd.h"
#include "tiles.h"

namespace stagemesh {

constexpr int kAheadBytes = 2048;

template <class T, int M>
inline void tile(const uint32_t* rows, size_t stride, const char* columns, int groups, __m512 (&sums)[M][2]) {
  for (int r = 0; r < M; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; g++, columns += 128) {
    _mm_prefetch(columns + kAheadBytes, _MM_HINT_T0);
    _mm_prefetch(columns + kAheadBytes + 64, _MM_HINT_T0);
    const __m512i left = _mm512_load_si512(columns), right = _mm512_load_si512(columns + 64);
#pragma GCC unroll 12
    for (int r = 0; r < M; r++) {
      sums[r][0] = T::dot(sums[r][0], rows[r * stride + g], left);
      sums[r][1] = T::dot(sums[r][1], rows[r * stride + g], right);
    }
  }
}

// Calls done(row, panel, left, right) with the fp32 sums of `panel`'s 32 outputs for each row.
template <class T, int M, class Done>
inline void rows_of_panel(const uint32_t* x, size_t stride, int first, const Linear& w, int panel, Done& done) {
  const int groups = w.k / T::kGroup;
  __m512 sums[M][2];
  tile<T, M>(x + first * stride, stride, w.weights + (size_t)panel * groups * 128, groups, sums);
  __m512 left = _mm512_setzero_ps(), right = left;
  if (w.bias) {
    left = _mm512_loadu_ps(w.bias + panel * kPanel);
    right = _mm512_loadu_ps(w.bias + panel * kPanel + 16);
  }
  for (int r = 0; r < M; r++)
    done(first + r, panel, _mm512_add_ps(sums[r][0], left), _mm512_add_ps(sums[r][1], right));
}

// Row r of x begins at x + r * row_elements; 0 for rows without gaps.
template <class T, class Done>
inline void linear(const void* x, int m, const Linear& w, int first_panel, int last_panel, Done done,
                   size_t row_elements = 0) {
  if (!row_elements) row_elements = w.k;
  if (w.codes) return quantized_linear<T>((const typename T::Element*)x, m, w, first_panel, last_panel, done, row_elements);
  if (std::is_same<T, Bf16>::value && w.k % kTileK == 0 && has_tiles()) {
    linear_by_tiles(x, m, w, first_panel, last_panel, done, row_elements * sizeof(typename T::Element));
    return;
  }
  const size_t stride = row_elements / T::kGroup;
  const uint32_t* rows = (const uint32_t*)x;
  const int tiles = (m + kMostRows - 1) / kMostRows;
  for (int panel = first_panel; panel < last_panel; panel++) {
    for (int t = 0, first = 0; t < tiles; t++) {
      const int count = m / tiles + (t < m % tiles);
      with_constant<kMostRows>(count, [&](auto M) { rows_of_panel<T, M>(rows, stride, first, w, panel, done); });
      first += count;
    }
  }
}

// Packs w [n, k] into panels [panels][k / group][kPanel] of groups. The rest of the last panel is zero.
template <class T>
inline void pack(const void* from, int n, int k, void* to) {
  const int groups = k / T::kGroup;
  const uint32_t* source = (const uint32_t*)from;
  uint32_t* out = (uint32_t*)to;
  for (int panel = 0; panel < (n + kPanel - 1) / kPanel; panel++)
    for (int g = 0; g < groups; g++)
      for (int c = 0; c < kPanel; c++) {
        const int row = panel * kPanel + c;
        *out++ = row < n ? source[(size_t)row * groups + g] : 0;
      }
}

}  // namespace stagemesh
