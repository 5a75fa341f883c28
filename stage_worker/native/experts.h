// Mixtures of experts: which experts a token uses, and the products of all experts that a step uses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"

namespace stagemesh {

enum Scores : int32_t { kScoresSoftmax, kScoresSigmoid, kScoresNone };

struct Router {
  Linear logits;  // Over the experts' input; weights null: the logits are in a buffer.
  int32_t experts, used, scores, groups, groups_used, group_top;
  int32_t chosen_by_logits, softmax_of_chosen, normalise;
  float factor;
  const float *bias, *choice_bias;  // [experts]; null for none.
};

// All experts have the same shapes. Their packed weights follow each other.
struct Mixture {
  Router router;
  Linear gate_up, down;  // Of the first expert.
  int32_t width, limited;  // limited: GPT-OSS's gate in place of an activation.
  size_t gate_up_bytes, down_bytes;  // From one expert to the next.

  Linear of(const Linear& first, size_t bytes, int expert) const {
    Linear own = first;
    own.weights += bytes * expert;
    if (own.bias) own.bias += (size_t)expert * first.panels() * kPanel;
    return own;
  }
};

// Replaces `values` [n] by their softmax.
inline void softmax(float* values, int n) {
  const float top = *std::max_element(values, values + n);
  float total = 0;
  for (int i = 0; i < n; i++) total += values[i] = std::exp(values[i] - top);
  for (int i = 0; i < n; i++) values[i] /= total;
}

// Chooses experts for one token and weighs them. Of equal ones, the first is taken. The chosen are in ascending order.
class Chooser {
 public:
  explicit Chooser(const Router& router) : router_(router), scores_(router.experts), choice_(router.experts) {}

  void choose(const float* logits, int32_t* chosen, float* weights) {
    const Router& r = router_;
    for (int e = 0; e < r.experts; e++) scores_[e] = logits[e] + (r.bias ? r.bias[e] : 0.0f);
    choice_ = scores_;
    if (r.scores == kScoresSoftmax) softmax(scores_.data(), r.experts);
    if (r.scores == kScoresSigmoid)
      for (float& score : scores_) score = 1.0f / (1.0f + std::exp(-score));
    if (!r.chosen_by_logits) choice_ = scores_;
    for (int e = 0; r.choice_bias && e < r.experts; e++) choice_[e] += r.choice_bias[e];
    if (r.groups > 1) keep_best_groups();
    for (int i = 0; i < r.used; i++) {
      chosen[i] = (int32_t)(std::max_element(choice_.begin(), choice_.end()) - choice_.begin());
      choice_[chosen[i]] = -INFINITY;
    }
    std::sort(chosen, chosen + r.used);
    float total = 0;
    for (int i = 0; i < r.used; i++) weights[i] = scores_[chosen[i]];
    if (r.softmax_of_chosen) softmax(weights, r.used);
    for (int i = 0; i < r.used; i++) total += weights[i];
    for (int i = 0; i < r.used; i++) weights[i] *= r.normalise ? r.factor / total : r.factor;
  }

 private:
  // Takes all experts but those of the best groups out of the choice.
  void keep_best_groups() {
    const int size = router_.experts / router_.groups;
    std::vector<float> best(router_.groups), sorted(size);
    for (int g = 0; g < router_.groups; g++) {
      std::copy_n(choice_.begin() + g * size, size, sorted.begin());
      std::partial_sort(sorted.begin(), sorted.begin() + router_.group_top, sorted.end(), std::greater<float>());
      for (int i = 0; i < router_.group_top; i++) best[g] += sorted[i];
    }
    for (int out = router_.groups - router_.groups_used; out > 0; out--) {
      // Of equal groups, the last goes.
      int worst = 0;
      for (int g = 1; g < router_.groups; g++)
        if (best[g] <= best[worst]) worst = g;
      best[worst] = INFINITY;
      std::fill_n(choice_.begin() + worst * size, size, -INFINITY);
    }
  }

  const Router& router_;
  std::vector<float> scores_, choice_;
};

// Which tokens each expert gets. Sorted by expert, so an expert's rows are next to each other.
struct Assignment {
  std::vector<int32_t> chosen;   // [tokens][used]
  std::vector<float> weights;    // [tokens][used]
  std::vector<int32_t> experts;  // The experts in use, in ascending order.
  std::vector<int32_t> first;    // [experts in use + 1]: each one's first row.
  std::vector<int32_t> tokens;   // [rows]: each row's token.
  std::vector<int32_t> row_of;   // [tokens][used]: the row of each choice.

  // Sorts what was chosen.
  void sort(int token_count, int used, int count) {
    std::vector<int32_t> next(count + 1, 0);
    for (int32_t expert : chosen) next[expert + 1]++;
    experts.clear();
    first.assign(1, 0);
    for (int e = 0; e < count; e++) {
      if (next[e + 1]) {
        experts.push_back(e);
        first.push_back(first.back() + next[e + 1]);
      }
      next[e + 1] += next[e];
    }
    tokens.resize(chosen.size());
    row_of.resize(chosen.size());
    for (int t = 0; t < token_count; t++)
      for (int i = 0; i < used; i++) {
        const int row = next[chosen[t * used + i]]++;
        tokens[row] = t;
        row_of[t * used + i] = row;
      }
  }
};

// min(gate, 7) * sigmoid(1.702 * gate) * (clamp(up, -7, 7) + 1)
inline __m512 limited16(__m512 gate, __m512 up) {
  const __m512 most = _mm512_set1_ps(7.0f), least = _mm512_set1_ps(-7.0f);
  gate = _mm512_min_ps(gate, most);
  up = _mm512_max_ps(_mm512_min_ps(up, most), least);
  const __m512 open = _mm512_mul_ps(gate, sigmoid16(_mm512_mul_ps(gate, _mm512_set1_ps(1.702f))));
  return _mm512_mul_ps(_mm512_add_ps(up, _mm512_set1_ps(1.0f)), open);
}

}  // namespace stagemesh
