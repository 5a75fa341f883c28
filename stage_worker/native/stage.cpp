// The layers of one stage on one rank. ops.py calls these plain C functions. The caller owns all memory but workspaces.
#include <cstdlib>
#include <memory>

#include "attention.h"
#include "exchange.h"
#include "gemm.h"
#include "rows.h"
#include "team.h"

using namespace stagemesh;

extern "C" {

struct Shape {
  int32_t is_bf16, hidden, heads, kv_heads, head_dim, intermediate, page_size;
  float eps, scale;
  const float* inverse_frequencies;  // [head_dim / 2]
  int32_t threads, tp_rank, tp_size;
  const int32_t* idle_cores;  // Cores of other ranks, used by steps with `alone`.
  int32_t idle_count;
};

struct Layer {
  const void *norm1, *norm2, *q_norm, *k_norm;  // [hidden], [head_dim]; null for none.
  Linear qkv, o, gate_up, down;                 // gate_up: panels of 16 gates and their 16 ups.
  void *k_pages, *v_pages;
  int32_t window;
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
  virtual int layer(const Layer& layer, void* x) = 0;
  virtual int head(const void* norm, const Linear& w, const void* x, const int32_t* rows, int count, float* logits,
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
    const int half = shape.head_dim / 2;
    const size_t heads = shape.heads + 2 * shape.kv_heads, tokens = s.tokens;
    normed = (E*)normed_room.get(tokens * shape.hidden * sizeof(E));
    qkv = (E*)qkv_room.get(tokens * heads * shape.head_dim * sizeof(E));
    queries = (E*)queries_room.get(tokens * shape.heads * shape.head_dim * sizeof(E));
    attended = (E*)attended_room.get(tokens * shape.heads * shape.head_dim * sizeof(E));
    gated = (E*)gated_room.get(tokens * shape.intermediate * sizeof(E));
    cosines = (float*)cosines_room.get(tokens * half * sizeof(float));
    sines = (float*)sines_room.get(tokens * half * sizeof(float));
    row_of = (int32_t*)row_room.get(tokens * sizeof(int32_t));
    first_token = (int32_t*)first_room.get(s.rows * sizeof(int32_t));
    if (!normed || !qkv || !queries || !attended || !gated || !cosines || !sines || !row_of || !first_token) return 1;
    int longest = 0;
    for (int r = 0, t = 0; r < s.rows; r++) {
      first_token[r] = t;
      longest = std::max(longest, s.starts[r] + s.counts[r]);
      for (int i = 0; i < s.counts[r]; i++, t++) {
        row_of[t] = r;
        const float position = (float)(s.starts[r] + i);
        for (int f = 0; f < half; f++) {
          const float angle = position * shape.inverse_frequencies[f];
          cosines[(size_t)t * half + f] = cosf(angle);
          sines[(size_t)t * half + f] = sinf(angle);
        }
      }
    }
    const size_t padded = (longest + 31) / 32 * 32 + shape.page_size + 32;
    for (int i = 0; i < team->size(); i++)
      if (!scores[i].get(kQueries * padded * sizeof(float))) return 1;
    return 0;
  }

  int layer(const Layer& w, void* hidden) override {
    E* x = (E*)hidden;
    const int tokens = step.tokens;
    const int qkv_width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    norm_rows(x, (const E*)w.norm1);
    team->run(w.qkv.panels(), [&](int first, int last, int) {
      linear<T>(normed, tokens, w.qkv, first, last, [&](int row, int panel, __m512 a, __m512 b) {
        E* to = qkv + (size_t)row * qkv_width + panel * kPanel;
        T::store(to, a, columns_left(qkv_width, panel * kPanel));
        T::store(to + 16, b, columns_left(qkv_width, panel * kPanel + 16));
      });
    });
    const HeadShape heads{shape.kv_heads, shape.heads / shape.kv_heads, shape.head_dim, shape.page_size};
    const Pages<T> keys{(E*)w.k_pages, heads}, values{(E*)w.v_pages, heads};
    team->run(shape.kv_heads, [&](int first, int last, int) {
      for (int t = 0; t < tokens; t++) place_token(w, keys, values, t, first, last);
    });
    team->run(step.rows * shape.kv_heads, [&](int first, int last, int thread) {
      const RowAttention<T> attention{keys, values, shape.scale, w.window, (float*)scores[thread].get(0)};
      for (int task = first; task < last; task++) {
        const int row = task / shape.kv_heads, head = task % shape.kv_heads, at = first_token[row];
        const E* of_head = queries + ((size_t)head * tokens + at) * heads.groups * heads.dim;
        E* out = attended + ((size_t)at * shape.heads + head * heads.groups) * heads.dim;
        attention.run(of_head, step.starts[row], step.counts[row], step.tables + step.offsets[row], head, out,
                      (size_t)shape.heads * heads.dim);
      }
    });
    if (add_linear(attended, w.o, x)) return 2;
    norm_rows(x, (const E*)w.norm2);
    team->run(w.gate_up.panels(), [&](int first, int last, int) {
      linear<T>(normed, tokens, w.gate_up, first, last, [&](int row, int panel, __m512 gate, __m512 up) {
        E* to = gated + (size_t)row * shape.intermediate + panel * 16;
        const __m512 open = T::round(silu16(T::round(gate)));
        T::store(to, _mm512_mul_ps(open, T::round(up)), columns_left(shape.intermediate, panel * 16));
      });
    });
    return add_linear(gated, w.down, x) ? 2 : 0;
  }

  int head(const void* norm, const Linear& w, const void* x, const int32_t* rows, int count, float* logits,
           int vocab) override {
    const size_t width = shape.hidden;
    E* picked = (E*)normed_room.get(count * width * sizeof(E));
    if (!picked) return 1;
    for (int r = 0; r < count; r++)
      rms_norm<T>((const E*)x + rows[r] * width, (const E*)norm, shape.hidden, shape.eps, picked + r * width);
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
  void norm_rows(const E* x, const E* weight) {
    const int width = shape.hidden;
    auto part = [&](int first, int last, int) {
      for (int t = first; t < last; t++)
        rms_norm<T>(x + (size_t)t * width, weight, width, shape.eps, normed + (size_t)t * width);
    };
    step.tokens > 16 ? team->run(step.tokens, part) : part(0, step.tokens, 0);
  }

  // Rotates queries and stores them head by head. Rotates keys. Writes keys and values to their page.
  void place_token(const Layer& w, const Pages<T>& keys, const Pages<T>& values, int t, int first, int last) {
    const int dim = shape.head_dim, half = shape.head_dim / 2, groups = shape.heads / shape.kv_heads;
    const float *c = cosines + (size_t)t * half, *s = sines + (size_t)t * half;
    const int row = row_of[t], position = step.starts[row] + t - first_token[row];
    const int page = step.tables[step.offsets[row] + position / shape.page_size], offset = position % shape.page_size;
    E* token = qkv + (size_t)t * (shape.heads + 2 * shape.kv_heads) * dim;
    for (int head = first; head < last; head++) {
      for (int g = 0; g < groups; g++) {
        E* query = token + (head * groups + g) * dim;
        if (w.q_norm) rms_norm<T>(query, (const E*)w.q_norm, dim, shape.eps, query);
        rotate<T>(query, c, s, half);
        memcpy(queries + (((size_t)head * step.tokens + t) * groups + g) * dim, query, dim * sizeof(E));
      }
      E* key = token + (shape.heads + head) * dim;
      if (w.k_norm) rms_norm<T>(key, (const E*)w.k_norm, dim, shape.eps, key);
      rotate<T>(key, c, s, half);
      write_key<T>(keys, page, offset, head, key);
      write_value<T>(values, page, offset, head, token + (shape.heads + shape.kv_heads + head) * dim);
    }
  }

  // Computes x += w * from, summed over all ranks.
  int add_linear(const E* from, const Linear& w, E* x) {
    const int width = shape.hidden;
    if (shape.tp_size == 1) {
      team->run(w.panels(), [&](int first, int last, int) {
        linear<T>(from, step.tokens, w, first, last, [&](int row, int panel, __m512 a, __m512 b) {
          E* to = x + (size_t)row * width + panel * kPanel;
          T::store(to, _mm512_add_ps(T::load(to), T::round(a)));
          if (panel * kPanel + 16 < width) T::store(to + 16, _mm512_add_ps(T::load(to + 16), T::round(b)));
        });
      });
      return 0;
    }
    const int most = (int)(exchange->room_floats() / width);
    for (int at = 0; at < step.tokens; at += most) {
      const int m = std::min(most, step.tokens - at);
      float* mine = exchange->mine();
      team->run(w.panels(), [&](int first, int last, int) {
        linear<T>(from + (size_t)at * w.k, m, w, first, last, [&](int row, int panel, __m512 a, __m512 b) {
          float* to = mine + (size_t)row * width + panel * kPanel;
          _mm512_storeu_ps(to, a);
          if (panel * kPanel + 16 < width) _mm512_storeu_ps(to + 16, b);
        });
      });
      if (!exchange->meet()) return 2;
      E* to = x + (size_t)at * width;
      for (size_t i = 0; i < (size_t)m * width; i += 16) {
        __m512 sum = _mm512_loadu_ps(exchange->of(0) + i);
        for (int rank = 1; rank < shape.tp_size; rank++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(exchange->of(rank) + i));
        T::store(to + i, _mm512_add_ps(T::load(to + i), T::round(sum)));
      }
      exchange->leave();
    }
    return 0;
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
  Room normed_room, qkv_room, queries_room, attended_room, gated_room, cosines_room, sines_room, row_room, first_room;
  E *normed, *qkv, *queries, *attended, *gated;
  float *cosines, *sines;
  int32_t *row_of, *first_token;
};

}  // namespace

extern "C" {

// Whether this processor has the instructions that the kernels use.
int stagemesh_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
}

// Whether bf16 linears use tiles on this processor.
int stagemesh_has_tiles() { return has_tiles(); }

void stagemesh_pack(int is_bf16, const void* from, int n, int k, void* to) {
  is_bf16 ? pack<Bf16>(from, n, k, to) : pack<F32>(from, n, k, to);
}

void* stagemesh_open(const Shape* shape, void* exchange) {
  if (shape->is_bf16) return new EngineOf<Bf16>(*shape, (Exchange*)exchange);
  return new EngineOf<F32>(*shape, (Exchange*)exchange);
}

void stagemesh_close(void* engine) { delete (Engine*)engine; }

// The exchange lives as long as the process: all engines share the ranks' counters.
void* stagemesh_exchange_open(void* memory, int rank, int size, size_t room_bytes, double timeout_s) {
  return new Exchange(memory, rank, size, room_bytes, timeout_s);
}

// Returns 0: done; 1: no memory; 2: another rank is lost or late.
int stagemesh_begin(void* engine, const Step* step) { return ((Engine*)engine)->begin(*step); }

int stagemesh_layer(void* engine, const Layer* layer, void* x) { return ((Engine*)engine)->layer(*layer, x); }

int stagemesh_head(void* engine, const void* norm, const Linear* w, const void* x, const int32_t* rows, int count,
                   float* logits, int vocab) {
  return ((Engine*)engine)->head(norm, *w, x, rows, count, logits, vocab);
}
}
