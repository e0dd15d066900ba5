// What attention shares over every type of cache: where blocks lie, what is asked for ahead, masks, running maximum.
#pragma once

namespace {

constexpr int kPair = 2;  // blocks whose scores, and then values, are computed together

// From entry 16 - n on: n lanes that are seen, then those that are not.
alignas(64) const float kValid[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(64) const float kCap[32] = {
    INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY,
    INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f,
    -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f};
alignas(64) const float kSeen[32] = {INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY,
                                     INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY};

inline uint8_t* key_block(const KvLayer& L, int block, int head) {
  return L.k + ((size_t)block * L.num_kv_heads + head) * L.k_bytes;
}
inline uint8_t* value_block(const KvLayer& L, int block, int head) {
  return L.v + ((size_t)block * L.num_kv_heads + head) * L.v_bytes;
}

// Keys and values of the next span, asked for a share at a time while this one is computed: all at once the core would
// wait for its misses. In shares of a quarter of them decode behind 4,096 tokens of the 9B's shape took 185 us a head on
// one core of Zen 5, keys and values in memory; in shares of a few lines, one for every 16 products of a tile, 112. On Zen 4
// a step of SmolLM2 behind 8,192 tokens takes 17 ms where lines went into the first cache and 22 to 31 did.
struct SpanAhead {
  const uint8_t* part[2 * kAttnKeys / kKvBlock];
  size_t bytes[2 * kAttnKeys / kKvBlock];
  int count = 0, next = 0, parts = 0, lines = 0;  // parts or, of one of them, lines each time
  size_t at = 0;

  void add(const KvLayer& L, int block, int head) {
    part[count] = key_block(L, block, head), bytes[count++] = L.k_bytes;
    part[count] = value_block(L, block, head), bytes[count++] = L.v_bytes;
  }
  void share(int calls) {
    if (!count) return;
    const int times = calls > count ? calls / count : 1, all = (int)(std::max(bytes[0], bytes[1]) + 63) / 64;
    parts = divide_up(count, calls);
    lines = divide_up(all, times);
  }
  AUTOGLM_INLINE void ask() {
    for (int i = 0; i < parts && next < count; ++i) {
      for (int j = 0; j < lines; ++j) ask_line(part[next] + at + 64 * j);  // past the end it asks for little
      at += 64 * (size_t)lines;
      if (at >= bytes[next]) at = 0, ++next;
    }
  }
};

struct AttnScratch {
  float* block;  // keys [head_dim][16], then values [16][head_dim], of two blocks
  float* acc;    // [rows][head_dim]
  float* s;      // scores, then weights [rows][kAttnKeys]
  float* sum;    // running sums in 16 lanes [rows][16]
  float* top;    // running maximum [rows]
  // Of a cache of whole numbers: scales of a span's values [kAttnKeys]; queries [rows][head_dim] and weights
  // [rows][kAttnKeys], and what one step of each is [rows].
  float *scale, *q_scale, *step;
  int16_t *q, *p;
};

inline AttnScratch carve_attention(uint8_t* p) {
  AttnScratch x;
  x.block = (float*)p;
  x.acc = x.block + kPair * kKvBlock * kMaxHeadDim;
  x.s = x.acc + kAttnRows * kMaxHeadDim;
  x.sum = x.s + kAttnRows * kAttnKeys;
  x.top = x.sum + kAttnRows * 16;
  x.scale = x.top + kAttnRows;
  x.q_scale = x.scale + kAttnKeys;
  x.step = x.q_scale + kAttnRows;
  x.q = (int16_t*)(x.step + kAttnRows);
  x.p = x.q + kAttnRows * kMaxHeadDim;
  return x;
}

inline int clamp_keys(int n, int most) { return n < 0 ? 0 : n < most ? n : most; }

inline void scale_row(float* x, int n, float k) {
  for (int i = 0; i < n; i += 16) vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(k)));
}

template <int Step, class F>
AUTOGLM_INLINE vf join(vf a, vf b, const F& f) { return f(vf_take<Step>(a, b), vf_swap<Step>(vf_take<Step>(b, a))); }

// What vf_reduce_add or vf_reduce_max gives of each of sixteen vectors v [16][16], one a lane: a quarter of the steps, and
// no row waits for its own.
template <class F>
inline vf reduce_rows(const float* v, const F& f) {
  vf x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = join<8>(vf_load(v + 16 * i), vf_load(v + 16 * (i + 8)), f);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = join<4>(x[i], x[i + 4], f);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) x[i] = join<2>(x[i], x[i + 2], f);
  return join<1>(x[0], x[1], f);
}
inline vf largest_of_rows(const float* v) { return reduce_rows(v, [](vf a, vf b) { return vf_max(a, b); }); }
inline vf sums_of_rows(const float* v) { return reduce_rows(v, [](vf a, vf b) { return vf_add(a, b); }); }

// What was summed follows when a row's maximum rises.
inline void raise_top(float highest, float* top, float* sum, float* acc, int w) {
  if (!(highest > *top)) return;
  if (*top > -INFINITY) {
    float e[16];
    vf_store(e, vf_exp(vf_set1(*top - highest)));
    vf_store(sum, vf_mul(vf_load(sum), vf_set1(e[0])));
    scale_row(acc, w, e[0]);
  }
  *top = highest;
}

}  // namespace
