// What the softmax of every type of cache shares: masks of the keys a row sees, and its running maximum.
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
