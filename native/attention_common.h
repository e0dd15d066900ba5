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
// wait for its misses.
struct SpanAhead {
  const uint8_t* part[2 * kAttnKeys / kKvBlock];
  size_t bytes[2 * kAttnKeys / kKvBlock];
  int count = 0, next = 0, each = 0;

  void add(const KvLayer& L, int block, int head) {
    part[count] = key_block(L, block, head), bytes[count++] = L.k_bytes;
    part[count] = value_block(L, block, head), bytes[count++] = L.v_bytes;
  }
  void share(int calls) { each = (count + calls - 1) / calls; }
  void ask() {
    for (int i = 0; i < each && next < count; ++i, ++next)
      for (size_t at = 0; at < bytes[next]; at += 64) prefetch(part[next] + at);
  }
};

inline int clamp_keys(int n, int most) { return n < 0 ? 0 : n < most ? n : most; }

inline void scale_row(float* x, int n, float k) {
  for (int i = 0; i < n; i += 16) vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(k)));
}

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
