// The weight of a linear, plain or quantized.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stagemesh {

constexpr int kPanel = 32;  // Outputs that are packed together.
constexpr int kMostRows = 12;  // 24 sums, two columns of weights and a row's number fit in 32 registers.

// What a weight's codes mean; structures.py has the same. kNoCodes: the weight is plain bf16 or fp32.
enum Codes : int32_t { kNoCodes, kInt8, kFp8, kInt4, kFp4, kNf4 };
enum ScaleType : int32_t { kScaleF32, kScaleF16, kScaleBf16 };

struct Linear {
  const char* weights;  // gemm.h (plain) or codes.h (quantized) has the layout; null for none.
  const float* bias;    // [panels * kPanel]; null for none.
  int32_t n, k;

  // Of a quantized weight: value = (code - zero) * scale * row scale.
  int32_t codes, group, scale_type;  // `group` columns share a scale. It divides k.
  int32_t zeros;                     // Whether each scale has a zero. Only for integers.
  int32_t zero;                      // Without `zeros`: the zero of all int4 codes.
  int32_t row_scales, ordered;       // Whether there are row scales; an order of columns.

  int panels() const { return (n + kPanel - 1) / kPanel; }
};

}  // namespace stagemesh
