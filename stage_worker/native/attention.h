// Causal attention over pages, for decode rows and prompt chunks alike.
//
// Pages have the layout of right-hand sides (simd.h): keys of one head and page as [d / group][positions][group],
// values as [positions / group][d][group]. So scores and the weighted sum of values are the same product that linears
// use. A query's softmax is over its whole context in one pass, and every sum runs over positions in order. So the
// result of a query depends only on its own context, not on the chunks of its prompt or on other rows.
#pragma once

#include <cmath>

#include "simd.h"

namespace stagemesh {

constexpr int kQueries = 12;

struct HeadShape {
  int kv_heads;
  int groups;  // Query heads per KV head.
  int dim;
  int page_size;
};

template <class T>
struct Pages {
  typename T::Element* base;
  HeadShape shape;

  typename T::Element* of(int page, int head) const {
    return base + ((size_t)page * shape.kv_heads + head) * shape.page_size * shape.dim;
  }
};

// `clears`: the key is the value, too. When a page begins, its old content may be infinite, and must not be multiplied by
// a weight of zero.
template <class T>
inline void write_key(const Pages<T>& pages, int page, int offset, int head, const typename T::Element* key,
                      bool clears) {
  if (clears && offset == 0)
    memset(pages.of(page, head), 0, sizeof(*key) * pages.shape.page_size * pages.shape.dim);
  uint32_t* to = (uint32_t*)pages.of(page, head) + offset;
  const uint32_t* from = (const uint32_t*)key;
  for (int g = 0; g < pages.shape.dim / T::kGroup; g++) to[(size_t)g * pages.shape.page_size] = from[g];
}

template <class T>
inline void write_value(const Pages<T>& pages, int page, int offset, int head, const typename T::Element* value,
                        int count) {
  const int dim = pages.shape.dim;
  typename T::Element* at = pages.of(page, head);
  if (offset == 0) memset(at, 0, sizeof(*at) * pages.shape.page_size * dim);
  typename T::Element* to = at + (size_t)(offset / T::kGroup) * dim * T::kGroup + offset % T::kGroup;
  for (int d = 0; d < count; d++) to[d * T::kGroup] = value[d];  // The rest stays zero.
}

// Computes scores[q][0..31] = scale * q . k for two blocks of 16 positions, limited softly to `softcap` unless it is 0.
template <class T, int M>
inline void score_blocks(const uint32_t* queries, int dim, const char* left, const char* right, int page_size,
                         float scale, float softcap, float* scores, size_t stride) {
  __m512 sums[M][2];
  for (int r = 0; r < M; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  const int groups = dim / T::kGroup;
  for (int g = 0; g < groups; g++, left += (size_t)page_size * 4, right += (size_t)page_size * 4) {
    const __m512i a = _mm512_loadu_si512(left), b = _mm512_loadu_si512(right);
#pragma GCC unroll 12
    for (int r = 0; r < M; r++) {
      sums[r][0] = T::dot(sums[r][0], queries[r * groups + g], a);
      sums[r][1] = T::dot(sums[r][1], queries[r * groups + g], b);
    }
  }
  const __m512 by = _mm512_set1_ps(scale);
  for (int r = 0; r < M; r++) {
    for (int c = 0; c < 2; c++) {
      __m512 score = _mm512_mul_ps(sums[r][c], by);
      if (softcap) score = capped16(score, softcap);
      _mm512_storeu_ps(scores + r * stride + c * 16, score);
    }
  }
}

// Replaces scores by their softmax over [low, high], as T numbers up to `length`. Weights outside are 0. `sink`, unless
// null, is one more logit, whose weight is dropped.
template <class T>
inline void weigh(float* scores, int low, int high, int length, const float* sink) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lowest = _mm512_set1_epi32(low), highest = _mm512_set1_epi32(high);
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 most = none;
  for (int at = 0; at < length; at += 16) {
    const __m512i position = _mm512_add_epi32(lanes, _mm512_set1_epi32(at));
    const __mmask16 seen = _mm512_cmple_epi32_mask(position, highest) & _mm512_cmpge_epi32_mask(position, lowest);
    const __m512 value = _mm512_mask_blend_ps(seen, none, _mm512_loadu_ps(scores + at));
    _mm512_storeu_ps(scores + at, value);
    // This argument order keeps a NaN. It reaches the logits, where its row fails.
    most = _mm512_max_ps(most, value);
  }
  if (sink) most = _mm512_max_ps(_mm512_set1_ps(*sink), most);
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (int at = 0; at < length; at += 16) {
    const __m512 value = _mm512_loadu_ps(scores + at);
    // exp16 clamps and would lose a NaN, so the mask keeps it.
    const __m512 difference = _mm512_sub_ps(value, top);
    const __mmask16 bad = _mm512_cmp_ps_mask(difference, difference, _CMP_UNORD_Q);
    const __m512 weight = _mm512_mask_mov_ps(exp16(difference), bad, difference);
    _mm512_storeu_ps(scores + at, weight);
    total = _mm512_add_ps(total, weight);
  }
  float sum = _mm512_reduce_add_ps(total);
  if (sink) sum += _mm512_cvtss_f32(exp16(_mm512_sub_ps(_mm512_set1_ps(*sink), top)));
  const __m512 by = _mm512_set1_ps(1.0f / sum);
  typename T::Element* weights = (typename T::Element*)scores;
  for (int at = 0; at < length; at += 16)
    T::store(weights + at, _mm512_mul_ps(_mm512_loadu_ps(scores + at), by));
}

// Attention of one row and one KV head: `count` tokens from `start`, at most kQueries (token, head) pairs at a time.
template <class T>
struct RowAttention {
  Pages<T> keys, values;
  float scale;
  int window;         // Positions that a query sees; 0 for all.
  float softcap;      // 0 for none.
  const float* sinks;  // [heads]; null for none.
  int value_dim;      // A value's numbers; its columns in a page are a multiple of 16.
  int value_in_key;   // First column of the value in the key; -1: values have pages of their own.
  float* scores;      // [kQueries][length rounded up to 32]. Each thread has its own.

  // `queries` is [count * groups][dim]. Token t's head g is written at out + t * out_stride + g * value_dim. Computes
  // part `part` of `parts`.
  void run(const typename T::Element* queries, int start, int count, const int* table, int head,
           typename T::Element* out, size_t out_stride, int part, int parts) const {
    const HeadShape& s = keys.shape;
    const int rows = count * s.groups;
    const int tiles = (rows + kQueries - 1) / kQueries;
    for (int t = 0, first = 0; t < tiles; t++) {
      const int m = rows / tiles + (t < rows % tiles);
      if (t * parts / tiles == part) one_tile(queries + (size_t)first * s.dim, first, m, start, table, head, out, out_stride);
      first += m;
    }
  }

 private:
  void one_tile(const typename T::Element* queries, int first, int m, int start, const int* table, int head,
                typename T::Element* out, size_t out_stride) const {
    const HeadShape& s = keys.shape;
    const int last_position = start + (first + m - 1) / s.groups;
    const int first_position = start + first / s.groups;
    const int lowest = window ? std::max(0, first_position + 1 - window) : 0;
    const int skipped = lowest / s.page_size;
    const int origin = skipped * s.page_size;
    table += skipped;
    const int length = (last_position - origin) / 16 * 16 + 16;
    const size_t stride = (length + 31) / 32 * 32;
    with_constant<kQueries>(m, [&](auto M) {
      for (int at = 0; at < length; at += 32) {
        const char* left = block(table, head, at);
        const char* right = at + 16 < length ? block(table, head, at + 16) : left;
        score_blocks<T, M>((const uint32_t*)queries, s.dim, left, right, s.page_size, scale, softcap, scores + at, stride);
      }
    });
    for (int r = 0; r < m; r++) {
      const int position = start + (first + r) / s.groups - origin;
      const float* sink = sinks ? sinks + head * s.groups + (first + r) % s.groups : nullptr;
      weigh<T>(scores + r * stride, window ? std::max(0, position + 1 - window) : 0, position, length, sink);
    }
    if (value_in_key >= 0) {
      with_constant<kQueries>(m, [&](auto M) { sum_keys<M>(stride, table, head, length, first, out, out_stride); });
      return;
    }
    for (int r = 0; r < m; r += 6)
      with_constant<6>(std::min(6, m - r), [&](auto M) {
        const uint32_t* weights = (const uint32_t*)(scores + r * stride);
        int column = 0;
        for (; column + 4 <= values.shape.dim / 16; column += 4)
          sum_values<M, 4>(weights, stride, table, head, length, first + r, column, out, out_stride);
        for (; column < values.shape.dim / 16; column++)
          sum_values<M, 1>(weights, stride, table, head, length, first + r, column, out, out_stride);
      });
  }

  // Sums weight * value over positions for M queries, where values are columns of the keys.
  template <int M>
  void sum_keys(size_t stride, const int* table, int head, int length, int first, typename T::Element* out,
                size_t out_stride) const {
    const HeadShape& s = keys.shape;
    const size_t line = (size_t)s.page_size * 4;
    for (int group = 0; group < value_dim / T::kGroup; group++) {
      __m512 sums[M][T::kGroup];
      for (int r = 0; r < M; r++)
        for (int i = 0; i < T::kGroup; i++) sums[r][i] = _mm512_setzero_ps();
      for (int at = 0; at < length; at += 16) {
        const char* page = (const char*)keys.of(table[at / s.page_size], head) + (size_t)(at % s.page_size) * 4;
        __m512 parts[T::kGroup];
        T::split(_mm512_loadu_si512(page + (value_in_key / T::kGroup + group) * line), parts);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) {
          const __m512 weight = T::load((const typename T::Element*)(scores + r * stride) + at);
          for (int i = 0; i < T::kGroup; i++) sums[r][i] = _mm512_fmadd_ps(weight, parts[i], sums[r][i]);
        }
      }
      for (int r = 0; r < M; r++) {
        const int token = (first + r) / s.groups, g = (first + r) % s.groups;
        for (int i = 0; i < T::kGroup; i++)
          T::store(out + token * out_stride + g * value_dim + group * T::kGroup + i,
                   _mm512_set1_ps(_mm512_reduce_add_ps(sums[r][i])), 1);
      }
    }
  }

  const char* block(const int* table, int head, int at) const {
    const int page_size = keys.shape.page_size;
    return (const char*)keys.of(table[at / page_size], head) + (size_t)(at % page_size) * 4;
  }

  // Sums weight * value over positions, for M queries and N * 16 columns.
  template <int M, int N>
  void sum_values(const uint32_t* weights, size_t stride, const int* table, int head, int length, int first, int column,
                  typename T::Element* out, size_t out_stride) const {
    const HeadShape& s = values.shape;
    const size_t line = (size_t)s.dim * 4;
    __m512 sums[M][N];
    for (int r = 0; r < M; r++)
      for (int c = 0; c < N; c++) sums[r][c] = _mm512_setzero_ps();
    for (int at = 0; at < length; at += s.page_size, table++) {
      const char* lines = (const char*)values.of(*table, head) + (size_t)column * 64;
      const int groups = std::min(s.page_size, length - at) / T::kGroup;
      const uint32_t* row = weights + at / T::kGroup;
      for (int g = 0; g < groups; g++, lines += line) {
        __m512i columns[N];
        for (int c = 0; c < N; c++) columns[c] = _mm512_loadu_si512(lines + c * 64);
#pragma GCC unroll 6
        for (int r = 0; r < M; r++)
#pragma GCC unroll 4
          for (int c = 0; c < N; c++) sums[r][c] = T::dot(sums[r][c], row[r * stride + g], columns[c]);
      }
    }
    for (int r = 0; r < M; r++) {
      const int token = (first + r) / s.groups, g = (first + r) % s.groups;
      for (int c = 0; c < N; c++) {
        const int at = (column + c) * 16;
        T::store(out + token * out_stride + g * value_dim + at, sums[r][c], columns_left(value_dim, at));
      }
    }
  }
};

}  // namespace stagemesh
