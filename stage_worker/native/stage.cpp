// The layers of one stage on one rank. ops.py calls these plain C functions. The caller owns all memory but workspaces.
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "exchange.h"
#include "experts.h"
#include "gemm.h"
#include "rows.h"
#include "team.h"

using namespace stagemesh;

extern "C" {

enum Dtype : int32_t { kF32, kBf16, kF16 };

struct Rotary {
  const float* frequencies;  // [half]: the angle per position of each pair.
  int32_t half;
  float scale;  // Of cosines and sines.
};

struct Shape {
  int32_t dtype, hidden, page_size;  // dtype: kF32, kBf16 or kF16.
  const int32_t* widths;  // Of the buffers. The first is `hidden`.
  int32_t buffers;
  const Rotary* rotaries;
  int32_t rotary_count;
  int32_t threads, tp_rank, tp_size;
  const int32_t* idle_cores;  // Cores of other ranks, used by steps with `alone`.
  int32_t idle_count;
};

// Columns [first, first + width) of a buffer.
struct Place {
  int32_t buffer, first, width;
};

struct Term {
  Place place;
  float factor;
  int32_t first;  // Of a copy: its first column in the target.
};

struct Attention {
  Place query, key, value;
  int32_t heads, kv_heads, dim, value_dim, window, rotary;  // window 0: all positions; rotary -1: none.
  int32_t value_in_key;                                     // First column of the value in the key; -1: apart.
  float scale, softcap;                                     // softcap 0: none.
  const float* sinks;                                       // [heads]; null for none.
  void *k_pages, *v_pages;
};

enum Kind : int32_t { kNormalise, kMultiply, kGather, kCombine, kGate, kAttend, kMix, kMultiplyHeads };

// One operation. ops.py says which kind uses which fields.
struct Operation {
  int32_t kind, activation;
  int32_t centred, rounds, gated, adds, sums;
  Place source, other, to;
  int32_t width, blocks;
  float eps, factor, clip;
  const float *weight, *bias;  // Of a norm: [width], or [blocks * width] if `blocks`.
  Linear linear;
  const Term* terms;
  int32_t term_count;
  Attention attention;
  Mixture mixture;
  int32_t heads, source_step, to_step;  // Of a linear for each head: columns from one head to the next.
  size_t head_bytes;                    // And bytes of weights.
};

// One step. Row i has counts[i] tokens from position starts[i]. Its pages begin at tables[offsets[i]].
struct Step {
  int32_t rows, tokens;
  const int32_t *starts, *counts, *offsets, *tables;
  int32_t alone;  // Nothing else computes during this step, so idle cores may be used.
};
}

namespace {

class Room {
 public:
  // Returns at least `bytes` of aligned memory. Its content is lost when it grows.
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_ = aligned_alloc(4096, size_);
    }
    return memory_;
  }
  Room() = default;
  Room(Room&& other) noexcept : memory_(other.memory_), size_(other.size_) { other.memory_ = nullptr; }
  ~Room() { free(memory_); }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

struct Engine {
  Engine(const Shape& s, Exchange* e)
      : shape(s), own(s.threads, nullptr, 0), wide(s.idle_count ? s.threads : 1, s.idle_cores, s.idle_count),
        scores(new Room[std::max(own.size(), wide.size())]), exchange(e) {}
  virtual ~Engine() = default;
  virtual int begin(const Step& step) = 0;
  virtual int run(const Operation* operations, int count, void* x) = 0;
  virtual int head(const Operation& norm, const Linear& w, const void* x, const int32_t* rows, int count, float* logits,
                   int vocab) = 0;

  Shape shape;
  Team own, wide;     // `wide` has the idle cores. It is a separate team because awake helpers spin.
  Team* team = &own;  // The team of this step.
  std::unique_ptr<Room[]> scores;
  Exchange* exchange;  // Null for one rank.
};

template <class T>
struct EngineOf final : Engine {
  using E = typename T::Element;
  using Engine::Engine;

  int begin(const Step& s) override {
    step = s;
    team = step.alone && wide.size() > 1 ? &wide : &own;
    const size_t tokens = s.tokens;
    rooms.resize(shape.buffers);
    buffers.resize(shape.buffers);
    strides.resize(shape.buffers);
    for (int i = 0; i < shape.buffers; i++) {
      strides[i] = i ? (shape.widths[i] + 31) / 32 * 32 : shape.hidden;
      // A load of the last columns may go beyond them.
      if (i && !(buffers[i] = (E*)rooms[i].get((tokens * strides[i] + 32) * sizeof(E)))) return 1;
    }
    cosines.resize(shape.rotary_count);
    sines.resize(shape.rotary_count);
    row_of = (int32_t*)row_room.get(tokens * sizeof(int32_t));
    first_token = (int32_t*)first_room.get(s.rows * sizeof(int32_t));
    if (!row_of || !first_token) return 1;
    int longest = 0;
    for (int r = 0, t = 0; r < s.rows; r++) {
      first_token[r] = t;
      longest = std::max(longest, s.starts[r] + s.counts[r]);
      for (int i = 0; i < s.counts[r]; i++, t++) row_of[t] = r;
    }
    for (int i = 0; i < shape.rotary_count; i++) turn(shape.rotaries[i], cosines[i], sines[i]);
    const size_t padded = (longest + 31) / 32 * 32 + shape.page_size + 32;
    for (int i = 0; i < team->size(); i++)
      if (!scores[i].get(kQueries * padded * sizeof(float))) return 1;
    return 0;
  }

  int run(const Operation* operations, int count, void* x) override {
    buffers[0] = (E*)x;
    for (int i = 0; i < count; i++) {
      const Operation& o = operations[i];
      switch (o.kind) {
        case kNormalise: each_token([&](int t) { normalise(o, t); }); break;
        case kMultiply:
          if (int failed = multiply(o)) return failed;
          break;
        case kGather: each_token([&](int t) { gather(o, t); }); break;
        case kCombine: each_token([&](int t) { combine(o, t); }); break;
        case kGate: each_token([&](int t) { gate(o, t); }); break;
        case kAttend:
          if (int failed = attend(o)) return failed;
          break;
        case kMultiplyHeads: multiply_heads(o); break;
        case kMix:
          if (int failed = mix(o)) return failed;
          break;
      }
    }
    return 0;
  }

  int head(const Operation& norm, const Linear& w, const void* x, const int32_t* rows, int count, float* logits,
           int vocab) override {
    const size_t width = shape.hidden;
    E* picked = (E*)picked_room.get((count * width + 32) * sizeof(E));
    if (!picked) return 1;
    for (int r = 0; r < count; r++) normalise_row(norm, (const E*)x + rows[r] * width, picked + r * width, width);
    if (shape.tp_size == 1) {
      head_part(picked, w, count, logits, vocab);
      return 0;
    }
    // Each rank has a range of the vocabulary. Rank 0 joins the ranges, as many rows per round as fit.
    const int widest = (vocab + shape.tp_size - 1) / shape.tp_size;
    const int most = (int)std::max<size_t>(1, exchange->room_floats() / widest);
    for (int at = 0; at < count; at += most) {
      const int m = std::min(most, count - at);
      head_part(picked + at * width, w, m, exchange->mine(), w.n);
      if (!exchange->meet()) return 2;
      for (int rank = 0, column = 0; shape.tp_rank == 0 && rank < shape.tp_size; rank++) {
        const int columns = (int)((int64_t)vocab * (rank + 1) / shape.tp_size - (int64_t)vocab * rank / shape.tp_size);
        for (int r = 0; r < m; r++)
          memcpy(logits + (size_t)(at + r) * vocab + column, exchange->of(rank) + (size_t)r * columns,
                 columns * sizeof(float));
        column += columns;
      }
      exchange->leave();
    }
    return 0;
  }

 private:
  E* at(const Place& place, int t) const { return buffers[place.buffer] + (size_t)t * strides[place.buffer] + place.first; }

  template <class Work>
  void each_token(Work work) {
    auto part = [&](int first, int last, int) {
      for (int t = first; t < last; t++) work(t);
    };
    step.tokens > 16 ? team->run(step.tokens, part) : part(0, step.tokens, 0);
  }

  // Computes cosines and sines of all tokens, [tokens][half].
  void turn(const Rotary& rotary, std::vector<float>& cosine, std::vector<float>& sine) {
    cosine.resize((size_t)step.tokens * rotary.half);
    sine.resize((size_t)step.tokens * rotary.half);
    for (int t = 0; t < step.tokens; t++) {
      const float position = (float)(step.starts[row_of[t]] + t - first_token[row_of[t]]);
      for (int f = 0; f < rotary.half; f++) {
        const float angle = position * rotary.frequencies[f];
        cosine[(size_t)t * rotary.half + f] = rotary.scale * cosf(angle);
        sine[(size_t)t * rotary.half + f] = rotary.scale * sinf(angle);
      }
    }
  }

  void normalise(const Operation& o, int t) const { normalise_row(o, at(o.source, t), at(o.to, t), o.to.width); }

  void normalise_row(const Operation& o, const E* from, E* to, int columns) const {
    for (int block = 0; block * o.width < columns; block++) {
      const size_t skip = o.blocks ? (size_t)block * o.width : 0;
      norm<T>(from + block * o.width, o.weight ? o.weight + skip : nullptr, o.bias ? o.bias + skip : nullptr, o.width,
              o.eps, o.centred, o.rounds, to + block * o.width);
    }
  }

  void gather(const Operation& o, int t) const {
    E* to = at(o.to, t);
    for (int i = 0; i < o.term_count; i++)
      memcpy(to + o.terms[i].first, at(o.terms[i].place, t), o.terms[i].place.width * sizeof(E));
    if (!o.clip) return;
    const __m512 most = _mm512_set1_ps(o.clip), least = _mm512_set1_ps(-o.clip);
    for (int c = 0; c < o.to.width; c += 16)
      T::store(to + c, _mm512_max_ps(least, _mm512_min_ps(most, T::load(to + c))), columns_left(o.to.width, c));
  }

  void combine(const Operation& o, int t) const {
    E* to = at(o.to, t);
    for (int c = 0; c < o.to.width; c += 16) {
      __m512 sum = o.adds ? T::load(to + c) : _mm512_setzero_ps();
      for (int i = 0; i < o.term_count; i++) {
        const __m512 value = T::load(at(o.terms[i].place, t) + c);
        sum = T::round(_mm512_add_ps(sum, scaled(value, o.terms[i].factor)));
      }
      T::store(to + c, sum, columns_left(o.to.width, c));
    }
  }

  static __m512 scaled(__m512 value, float factor) {
    return factor == 1.0f ? value : T::round(_mm512_mul_ps(value, _mm512_set1_ps(factor)));
  }

  // One number of the gate is for `width` columns.
  void gate(const Operation& o, int t) const {
    const E *gates = at(o.source, t), *up = o.other.width ? at(o.other, t) : nullptr;
    E* to = at(o.to, t);
    for (int c = 0; c < o.to.width; c += 16) {
      __m512 opened;
      if (o.width == 1) {
        opened = T::load(gates + c);
      } else {
        alignas(64) float lanes[16];
        for (int lane = 0; lane < 16; lane++)
          lanes[lane] = T::number(gates[std::min(c + lane, o.to.width - 1) / o.width]);
        opened = _mm512_load_ps(lanes);
      }
      opened = T::round(activate16(o.activation, opened));
      if (up) opened = T::round(_mm512_mul_ps(opened, T::load(up + c)));
      opened = scaled(opened, o.factor);
      if (o.adds) opened = _mm512_add_ps(T::load(to + c), opened);
      T::store(to + c, opened, columns_left(o.to.width, c));
    }
  }

  int multiply(const Operation& o) {
    const size_t stride = strides[o.source.buffer];
    if (o.gated) {
      team->run(o.linear.panels(), [&](int first, int last, int) {
        linear<T>(at(o.source, 0), step.tokens, o.linear, first, last, [&](int row, int panel, __m512 gate, __m512 up) {
          const __m512 open = T::round(activate16(o.activation, T::round(gate)));
          T::store(at(o.to, row) + panel * 16, _mm512_mul_ps(open, T::round(up)), columns_left(o.to.width, panel * 16));
        }, stride);
      });
      return 0;
    }
    if (o.sums && shape.tp_size > 1) return multiply_and_sum(o);
    team->run(o.linear.panels(), [&](int first, int last, int) {
      linear<T>(at(o.source, 0), step.tokens, o.linear, first, last, [&](int row, int panel, __m512 a, __m512 b) {
        finish(o, row, panel * kPanel, a);
        finish(o, row, panel * kPanel + 16, b);
      }, stride);
    });
    return 0;
  }

  // `source` and `to` are those of the first head.
  void multiply_heads(const Operation& o) {
    const int panels = o.linear.panels();
    team->run(o.heads * panels, [&](int first, int last, int) {
      for (int task = first; task < last;) {
        const int head = task / panels, end = std::min(last, (head + 1) * panels);
        Linear w = o.linear;
        w.weights += o.head_bytes * head;
        const int at_head = head * o.to_step;
        linear<T>(at(o.source, 0) + head * o.source_step, step.tokens, w, task - head * panels, end - head * panels,
                  [&](int row, int panel, __m512 a, __m512 b) {
          E* to = at(o.to, row) + at_head + panel * kPanel;
          T::store(to, a, columns_left(o.to.width, panel * kPanel));
          T::store(to + 16, b, columns_left(o.to.width, panel * kPanel + 16));
        }, strides[o.source.buffer]);
        task = end;
      }
    });
  }

  // Writes 16 outputs of a linear, or adds them.
  void finish(const Operation& o, int row, int column, __m512 value) const {
    const __mmask16 mask = columns_left(o.to.width, column);
    if (!mask) return;
    E* to = at(o.to, row) + column;
    value = T::round(value);
    if (o.activation) value = activate16(o.activation, value);
    if (o.adds) value = _mm512_add_ps(T::load(to), scaled(value, o.factor));
    T::store(to, value, mask);
  }

  // Each rank has a part of the inputs. The outputs are summed over all ranks.
  int multiply_and_sum(const Operation& o) {
    const int width = padded(o.to.width);
    auto fill = [&](int start, int rows, float* mine) {
      team->run(o.linear.panels(), [&](int first, int last, int) {
        linear<T>(at(o.source, start), rows, o.linear, first, last, [&](int row, int panel, __m512 a, __m512 b) {
          float* to = mine + (size_t)row * width + panel * kPanel;
          _mm512_storeu_ps(to, a);
          if (panel * kPanel + 16 < width) _mm512_storeu_ps(to + 16, b);
        }, strides[o.source.buffer]);
      });
    };
    return sum_over_ranks(width, fill, [&](int row, int column, __m512 sum) { finish(o, row, column, sum); });
  }

  static int padded(int width) { return (width + 15) / 16 * 16; }

  // Calls fill(first token, tokens, mine) for as many tokens at once as fit, which writes rows of `width` fp32. Then
  // calls done(token, column, 16 sums over all ranks).
  template <class Fill, class Done>
  int sum_over_ranks(int width, Fill fill, Done done) {
    const int most = (int)(exchange->room_floats() / width);
    for (int start = 0; start < step.tokens; start += most) {
      const int rows = std::min(most, step.tokens - start);
      fill(start, rows, exchange->mine());
      if (!exchange->meet()) return 2;
      for (int row = 0; row < rows; row++)
        for (int column = 0; column < width; column += 16) {
          const size_t place = (size_t)row * width + column;
          __m512 sum = _mm512_loadu_ps(exchange->of(0) + place);
          for (int rank = 1; rank < shape.tp_size; rank++)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(exchange->of(rank) + place));
          done(start + row, column, sum);
        }
      exchange->leave();
    }
    return 0;
  }

  int mix(const Operation& o) {
    const Mixture& m = o.mixture;
    const int tokens = step.tokens, used = m.router.used, count = m.router.experts, hidden = o.to.width;
    const size_t rows = (size_t)tokens * used;
    float* logits = (float*)logits_room.get((size_t)tokens * (count + 32) * sizeof(float));
    E* inputs = (E*)inputs_room.get((rows * o.source.width + 32) * sizeof(E));
    E* gated = (E*)gated_room.get((rows * m.width + 32) * sizeof(E));
    float* outputs = (float*)outputs_room.get((rows * hidden + 32) * sizeof(float));
    if (!logits || !inputs || !gated || !outputs) return 1;
    route(o, logits);
    Assignment& a = assignment;
    a.chosen.resize(rows);
    a.weights.resize(rows);
    Chooser chooser(m.router);
    for (int t = 0; t < tokens; t++)
      chooser.choose(logits + (size_t)t * count, &a.chosen[(size_t)t * used], &a.weights[(size_t)t * used]);
    a.sort(tokens, used, count);
    for (size_t row = 0; row < rows; row++)
      memcpy(inputs + row * o.source.width, at(o.source, a.tokens[row]), o.source.width * sizeof(E));
    each_panel(m.gate_up, [&](int index, int first, int last) {
      const int row = a.first[index];
      const Linear w = m.of(m.gate_up, m.gate_up_bytes, a.experts[index]);
      linear<T>(inputs + (size_t)row * w.k, a.first[index + 1] - row, w, first, last,
                [&](int r, int panel, __m512 gate, __m512 up) {
        gate = T::round(gate), up = T::round(up);
        const __m512 value = m.limited ? limited16(gate, up)
                                       : _mm512_mul_ps(T::round(activate16(o.activation, gate)), up);
        T::store(gated + (size_t)(row + r) * m.width + panel * 16, value, columns_left(m.width, panel * 16));
      });
    });
    each_panel(m.down, [&](int index, int first, int last) {
      const int row = a.first[index];
      const Linear w = m.of(m.down, m.down_bytes, a.experts[index]);
      linear<T>(gated + (size_t)row * w.k, a.first[index + 1] - row, w, first, last,
                [&](int r, int panel, __m512 left, __m512 right) {
        float* to = outputs + (size_t)(row + r) * hidden + panel * kPanel;
        _mm512_mask_storeu_ps(to, columns_left(hidden, panel * kPanel), T::round(left));
        _mm512_mask_storeu_ps(to + 16, columns_left(hidden, panel * kPanel + 16), T::round(right));
      });
    });
    // The weighted sum of 16 outputs of a token's experts.
    auto mixed = [&](int t, int c) {
      const __mmask16 mask = columns_left(hidden, c);
      __m512 sum = _mm512_setzero_ps();
      for (int i = 0; i < used; i++) {
        const __m512 weight = _mm512_set1_ps(a.weights[(size_t)t * used + i]);
        const float* own = outputs + (size_t)a.row_of[(size_t)t * used + i] * hidden + c;
        sum = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(mask, own), sum);
      }
      return sum;
    };
    auto keep = [&](int t, int c, __m512 sum) { T::store(at(o.to, t) + c, sum, columns_left(hidden, c)); };
    if (o.sums && shape.tp_size > 1) {
      const int width = padded(hidden);
      auto fill = [&](int start, int rows, float* mine) {
        for (int t = start; t < start + rows; t++)
          for (int c = 0; c < width; c += 16) _mm512_storeu_ps(mine + (size_t)(t - start) * width + c, mixed(t, c));
      };
      return sum_over_ranks(width, fill, keep);
    }
    each_token([&](int t) {
      for (int c = 0; c < hidden; c += 16) keep(t, c, mixed(t, c));
    });
    return 0;
  }

  // Computes the router's logits, [tokens][experts] fp32.
  void route(const Operation& o, float* logits) {
    const Router& r = o.mixture.router;
    if (!r.logits.weights) {
      for (int t = 0; t < step.tokens; t++)
        for (int e = 0; e < r.experts; e++) logits[(size_t)t * r.experts + e] = T::number(at(o.other, t)[e]);
      return;
    }
    team->run(r.logits.panels(), [&](int first, int last, int) {
      linear<T>(at(o.source, 0), step.tokens, r.logits, first, last, [&](int row, int panel, __m512 a, __m512 b) {
        const int column = panel * kPanel;
        float* to = logits + (size_t)row * r.experts + column;
        _mm512_mask_storeu_ps(to, columns_left(r.experts, column), a);
        _mm512_mask_storeu_ps(to + 16, columns_left(r.experts, column + 16), b);
      }, strides[o.source.buffer]);
    });
  }

  // Calls work(index of an expert in use, first panel, last panel), so that threads get equal numbers of panels.
  template <class Work>
  void each_panel(const Linear& w, Work work) {
    const int panels = w.panels();
    team->run((int)assignment.experts.size() * panels, [&](int first, int last, int) {
      for (int at = first; at < last;) {
        const int index = at / panels, end = std::min(last, (index + 1) * panels);
        work(index, at - index * panels, end - index * panels);
        at = end;
      }
    });
  }

  int attend(const Operation& o) {
    const Attention& a = o.attention;
    const int groups = a.heads / a.kv_heads, tokens = step.tokens;
    E* queries = (E*)queries_room.get((size_t)tokens * a.heads * a.dim * sizeof(E));
    if (!queries) return 1;
    const HeadShape key_shape{a.kv_heads, groups, a.dim, shape.page_size};
    const HeadShape value_shape{a.kv_heads, groups, (a.value_dim + 15) / 16 * 16, shape.page_size};
    const Pages<T> keys{(E*)a.k_pages, key_shape}, values{(E*)a.v_pages, value_shape};
    team->run(a.kv_heads, [&](int first, int last, int) {
      for (int t = 0; t < tokens; t++) place_token(a, keys, values, queries, t, first, last);
    });
    const size_t stride = strides[o.to.buffer];
    const int parts = step.rows * a.kv_heads < team->size() ? team->size() : 1;
    team->run(step.rows * a.kv_heads * parts, [&](int first, int last, int thread) {
      const RowAttention<T> attention{keys,    values,      a.scale,        a.window, a.softcap,
                                      a.sinks, a.value_dim, a.value_in_key, (float*)scores[thread].get(0)};
      for (int task = first; task < last; task++) {
        const int row = task / parts / a.kv_heads, head = task / parts % a.kv_heads, token = first_token[row];
        const E* of_head = queries + ((size_t)head * tokens + token) * groups * a.dim;
        attention.run(of_head, step.starts[row], step.counts[row], step.tables + step.offsets[row], head,
                      at(o.to, token) + head * groups * a.value_dim, stride, task % parts, parts);
      }
    });
    return 0;
  }

  // Rotates queries and stores them head by head. Rotates keys. Writes keys and values to their page.
  void place_token(const Attention& a, const Pages<T>& keys, const Pages<T>& values, E* queries, int t, int first,
                   int last) {
    const int dim = a.dim, groups = a.heads / a.kv_heads;
    const int half = a.rotary < 0 ? 0 : shape.rotaries[a.rotary].half;
    const float *c = half ? cosines[a.rotary].data() + (size_t)t * half : nullptr;
    const float *s = half ? sines[a.rotary].data() + (size_t)t * half : nullptr;
    const int row = row_of[t], position = step.starts[row] + t - first_token[row];
    const int page = step.tables[step.offsets[row] + position / shape.page_size], offset = position % shape.page_size;
    for (int head = first; head < last; head++) {
      E* query = queries + ((size_t)head * step.tokens + t) * groups * dim;
      memcpy(query, at(a.query, t) + head * groups * dim, groups * dim * sizeof(E));
      for (int g = 0; half && g < groups; g++) rotate<T>(query + g * dim, c, s, half);
      E* key = at(a.key, t) + head * dim;
      if (half) rotate<T>(key, c, s, half);
      write_key<T>(keys, page, offset, head, key, a.value_in_key >= 0);
      if (a.value_in_key < 0)
        write_value<T>(values, page, offset, head, at(a.value, t) + head * a.value_dim, a.value_dim);
    }
  }

  void head_part(const E* picked, const Linear& w, int count, float* logits, int stride) {
    team->run(w.panels(), [&](int first, int last, int) {
      linear<T>(picked, count, w, first, last, [&](int row, int panel, __m512 a, __m512 b) {
        const int at = panel * kPanel;
        _mm512_mask_storeu_ps(logits + (size_t)row * stride + at, columns_left(w.n, at), a);
        _mm512_mask_storeu_ps(logits + (size_t)row * stride + at + 16, columns_left(w.n, at + 16), b);
      });
    });
  }

  Step step{};
  std::vector<Room> rooms;
  std::vector<E*> buffers;  // The first is the caller's hidden states.
  std::vector<size_t> strides;
  std::vector<std::vector<float>> cosines, sines;  // Of each rotary embedding.
  Room queries_room, picked_room, row_room, first_room, logits_room, inputs_room, gated_room, outputs_room;
  Assignment assignment;
  int32_t *row_of, *first_token;
};

}  // namespace

extern "C" {

// Whether this processor has the instructions that the kernels use. All that have AVX512-BF16 have AVX512-VNNI.
int stagemesh_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

// Whether bf16 linears use tiles on this processor.
int stagemesh_has_tiles() { return has_tiles(); }

void stagemesh_pack(int dtype, const void* from, int n, int k, void* to) {
  dtype == kF32 ? pack<F32>(from, n, k, to) : pack<Bf16>(from, n, k, to);
}

// Returns the bytes of a quantized weight.
size_t stagemesh_codes_bytes(const Linear* w) {
  const Layout layout(*w);
  return layout.order_bytes + w->panels() * layout.panel_bytes;
}

// Returns 0 if a code is not a number.
int stagemesh_pack_codes(const Linear* w, int first, int count, const CodeRows* rows, char* weights) {
  return pack_codes(*w, first, count, *rows, weights);
}

void* stagemesh_open(const Shape* shape, void* exchange) {
  if (shape->dtype == kBf16) return new EngineOf<Bf16>(*shape, (Exchange*)exchange);
  if (shape->dtype == kF16) return new EngineOf<F16>(*shape, (Exchange*)exchange);
  return new EngineOf<F32>(*shape, (Exchange*)exchange);
}

void stagemesh_close(void* engine) { delete (Engine*)engine; }

// The exchange lives as long as the process: all engines share the ranks' counters.
void* stagemesh_exchange_open(void* memory, int rank, int size, size_t room_bytes, double timeout_s) {
  return new Exchange(memory, rank, size, room_bytes, timeout_s);
}

// Returns 0: done; 1: no memory; 2: another rank is lost or late.
int stagemesh_begin(void* engine, const Step* step) { return ((Engine*)engine)->begin(*step); }

int stagemesh_run(void* engine, const Operation* operations, int count, void* x) {
  return ((Engine*)engine)->run(operations, count, x);
}

int stagemesh_head(void* engine, const Operation* norm, const Linear* w, const void* x, const int32_t* rows, int count,
                   float* logits, int vocab) {
  return ((Engine*)engine)->head(*norm, *w, x, rows, count, logits, vocab);
}
}
