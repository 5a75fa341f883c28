// The layout of a quantized weight: its codes stay in their bits, in the order in which the kernels read them.
//
//   weight:  [order: k int32, if ordered][panels of 32 outputs]
//   panel:   [row scales: 32 fp32, if any][groups]
//   group:   [scales: 32][zeros: 32, if any][blocks]
//   block:   at most kBlock columns of the group, in lines of 64 bytes
//   line:    all 32 outputs of 2 columns (8 bits) or 4 columns (4 bits)
//
// Every part begins at a multiple of 64 bytes. A block's last line is filled with zeros. All parts of a weight are in one
// piece of memory, so that many weights, such as those of experts, can follow each other.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace stagemesh {

constexpr int kBlock = 128;
constexpr int kLine = 64;

// Activations of a block share a scale. Int32 sums over a block cannot overflow: weights have 12 bits for NF4 and at most
// 8 for others, activations 13 and 15 bits (activations.h), both without their sign.
inline int most_columns(int32_t codes) { return codes == kNf4 ? 64 : kBlock; }

struct Layout {
  int bits, columns;       // Of a code; of a line.
  int groups, blocks;      // Of a panel; of a group.
  int most, last;          // Columns of a block; of a group's last one.
  int padded;              // Columns of all blocks of a row, with their padding.
  size_t scale_bytes;      // Of a group's scales.
  size_t order_bytes, row_scale_bytes, group_bytes, panel_bytes;

  explicit Layout(const Linear& w) {
    bits = w.codes == kInt8 || w.codes == kFp8 ? 8 : 4;
    columns = 16 / bits;
    groups = w.k / w.group;
    most = most_columns(w.codes);
    blocks = (w.group + most - 1) / most;
    last = w.group - (blocks - 1) * most;
    const int lines = (blocks - 1) * (most / columns) + lines_of(last);
    padded = groups * lines * columns;
    scale_bytes = kPanel * (w.scale_type == kScaleF32 ? 4 : 2);
    order_bytes = w.ordered ? ((size_t)w.k * 4 + 63) / 64 * 64 : 0;
    row_scale_bytes = w.row_scales ? kPanel * 4 : 0;
    group_bytes = scale_bytes * (w.zeros ? 2 : 1) + (size_t)lines * kLine;
    panel_bytes = row_scale_bytes + groups * group_bytes;
  }

  int lines_of(int width) const { return (width + columns - 1) / columns; }
  int width(int block) const { return block + 1 < blocks ? most : last; }
  const char* panel(const Linear& w, int index) const { return w.weights + order_bytes + index * panel_bytes; }
};

// Rows of a weight as a reader of checkpoints has them, row by row and contiguous.
struct CodeRows {
  const uint8_t* codes;     // [rows][k * bits / 8]. Of two 4-bit codes, the first is in the low half.
  const char* scales;       // [rows][k / group]
  const char* zeros;        // As `scales`; null for none.
  const float* row_scales;  // [rows]; null for none.
};

namespace packing {

// Returns a row's codes of the columns [at, end) that go into one line: two of 8 bits, or four of 4 bits.
inline uint32_t unit(const uint8_t* row, int bits, int at, int end) {
  if (at * bits % 8 == 0 && at + 16 / bits <= end) return row[at * bits / 8] | (uint32_t)row[at * bits / 8 + 1] << 8;
  uint32_t found = 0;
  for (int i = at; i < std::min(end, at + 16 / bits); i++) {
    const uint32_t code = bits == 8 ? row[i] : row[i / 2] >> (i % 2 * 4) & 15;
    found |= code << (i - at) * bits;
  }
  return found;
}

// Fills a line with one unit of each output.
inline void line(int codes, const uint32_t (&units)[kPanel], uint16_t* out) {
  for (int o = 0; o < 16; o++) {
    const uint32_t left = units[o], right = units[o + 16];
    if (codes == kInt8) {
      out[o] = (uint16_t)left;
      out[o + 16] = (uint16_t)right;
    } else if (codes == kFp8) {
      // Four outputs of the left and of the right half in turn, as bytes are interleaved when they are decoded.
      out[o / 4 * 8 + o % 4] = (uint16_t)left;
      out[o / 4 * 8 + 4 + o % 4] = (uint16_t)right;
    } else {
      // The 16 bits of an output and one of two neighbouring columns: left, right, and both of two columns later.
      out[2 * o] = (uint16_t)((left & 0x0f0f) | (right & 0x0f0f) << 4);
      out[2 * o + 1] = (uint16_t)((left >> 4 & 0x0f0f) | (right & 0xf0f0));
    }
  }
}

// Whether one of the fp8 codes is NaN.
inline bool has_nan(const uint8_t* codes, size_t count) {
  bool found = false;
  for (size_t i = 0; i < count; i++) found |= (codes[i] & 0x7f) == 0x7f;
  return found;
}

}  // namespace packing

// Packs `count` rows, from row `first` (a multiple of kPanel) on, into the memory of a whole weight. The rest of the
// last panel is zero. Returns whether all codes are numbers.
inline bool pack_codes(const Linear& w, int first, int count, const CodeRows& from, char* weights) {
  const Layout layout(w);
  const int row_bytes = (w.k * layout.bits + 7) / 8, scale_size = (int)layout.scale_bytes / kPanel;
  if (w.codes == kFp8 && packing::has_nan(from.codes, (size_t)count * row_bytes)) return false;
  for (int start = 0; start < count; start += kPanel) {
    const int rows = std::min(kPanel, count - start);
    char* out = weights + layout.order_bytes + (first + start) / kPanel * layout.panel_bytes;
    if (w.row_scales) {
      memset(out, 0, layout.row_scale_bytes);
      memcpy(out, from.row_scales + start, rows * sizeof(float));
      out += layout.row_scale_bytes;
    }
    for (int g = 0; g < layout.groups; g++) {
      for (const char* scales : {from.scales, from.zeros}) {
        if (!scales) continue;
        for (int c = 0; c < kPanel; c++, out += scale_size)
          c < rows ? memcpy(out, scales + ((size_t)(start + c) * layout.groups + g) * scale_size, scale_size)
                   : memset(out, 0, scale_size);
      }
      const int column = g * w.group;
      for (int at = 0; at < w.group; at += layout.columns, out += kLine) {
        uint32_t units[kPanel];
        for (int c = 0; c < kPanel; c++) {
          const uint8_t* row = from.codes + (size_t)(start + c) * row_bytes;
          units[c] = c < rows ? packing::unit(row, layout.bits, column + at, column + w.group) : 0;
        }
        packing::line(w.codes, units, (uint16_t*)out);
      }
    }
  }
  return true;
}

}  // namespace stagemesh
