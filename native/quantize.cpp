// Grids by least squares over a few starts; plain loops over 16 or 32 floats that every compiler vectorizes.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace autoglm {

namespace {

constexpr float kQ4KStarts[] = {13.2f, 13.8f, 14.4f, 15.0f, 15.6f, 16.2f, 16.8f, 17.4f, 18.0f};
constexpr float kQ5_0Starts[] = {-16.0f, -15.5f, -16.6f, -17.2f, -17.8f, 15.0f, 15.6f, 16.2f};
constexpr float kQ6KStarts[] = {-32.0f, -31.4f, -32.6f, -33.2f, 31.0f, 31.6f};
constexpr int kRefits = 2;
constexpr int kSteps[] = {0, -1, 1};
constexpr float kMaxHalf = 65504.0f;
constexpr float kTiny = 7.8886090522101181e-31f;  // 2^-100: below it an inverse would overflow

// Halves are added to halves: one order of rounding for every vector width. Destroys v.
template <int N>
float sum(float* v) {
  for (int half = N / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

float inverse(float x) { return std::fabs(x) < kTiny ? 0.0f : 1.0f / x; }

// Adding and taking off 1.5 * 2^23 rounds to the nearest whole number, ties to even.
float code(float x, float low, float high) {
  const float clipped = x > low ? (x < high ? x : high) : low;
  return (clipped + 12582912.0f) - 12582912.0f;
}

uint16_t nearest_half(float x) { return float_to_half(std::min(std::max(x, -kMaxHalf), kMaxHalf)); }

// The least half not below x >= 0: what is counted in units of it never exceeds the code it must fit.
uint16_t half_above(float x) {
  const uint16_t h = nearest_half(x);
  const float value = half_to_float(h);
  return value < x && value < kMaxHalf ? (uint16_t)(h + 1) : h;
}

template <int N, int S>
float fit_symmetric(const float* x, const float (&starts)[S], float low, float high) {
  float extreme = x[0];
  for (int i = 1; i < N; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  const float inv = inverse(extreme);
  float best = 0, scale = 0, qx[N], qq[N];
  for (const float start : starts) {
    const float by = start * inv;
    for (int i = 0; i < N; ++i) {
      const float q = code(x[i] * by, low, high);
      qx[i] = q * x[i];
      qq[i] = q * q;
    }
    const float sum_qx = sum<N>(qx), solved = sum_qx * inverse(sum<N>(qq)), explained = solved * sum_qx;
    if (explained > best) {
      best = explained;
      scale = solved;
    }
  }
  return scale;
}

struct Affine {
  float scale = 0, minimum = 0;
};

// Both >= 0.
template <int N, int S>
Affine fit_affine(const float* x, const float (&starts)[S], float high) {
  float bottom = 0, top = 0, v[N];
  for (int i = 0; i < N; ++i) {
    bottom = x[i] < bottom ? x[i] : bottom;
    top = x[i] > top ? x[i] : top;
    v[i] = x[i];
  }
  const float sum_x = sum<N>(v), inv = inverse(top - bottom);
  float best = 0;
  Affine fit;
  const auto solve = [&](float by, float low) {
    float q[N], qq[N], qx[N];
    for (int i = 0; i < N; ++i) {
      q[i] = code((x[i] + low) * by, 0.0f, high);
      qq[i] = q[i] * q[i];
      qx[i] = q[i] * x[i];
    }
    const float sum_q = sum<N>(q), sum_qq = sum<N>(qq), sum_qx = sum<N>(qx);
    float scale = ((float)N * sum_qx - sum_q * sum_x) * inverse((float)N * sum_qq - sum_q * sum_q);
    float minimum = (scale * sum_q - sum_x) / (float)N;
    if (!(minimum > 0)) {  // the format knows no negative one
      minimum = 0;
      scale = sum_qx * inverse(sum_qq);
    }
    const float explained = scale * sum_qx - minimum * sum_x;
    if (scale >= 0 && explained > best) {
      best = explained;
      fit = {scale, minimum};
    }
  };
  for (const float start : starts) solve(start * inv, -bottom);
  for (int i = 0; i < kRefits; ++i) solve(inverse(fit.scale), fit.minimum);
  return fit;
}

// The squared error of one group on the grid step * code - low; codes may be null.
template <int N>
float squared_error(const float* x, float step, float low, float bottom, float top, float* codes) {
  const float inv = inverse(step);
  float off[N];
  for (int i = 0; i < N; ++i) {
    const float q = code((x[i] + low) * inv, bottom, top);
    if (codes) codes[i] = q;
    off[i] = step * q - low - x[i];
    off[i] *= off[i];
  }
  return sum<N>(off);
}

void quantize_q8_0(const float* x, BlockQ8_0* b) {
  float top = 0;
  for (int i = 0; i < 32; ++i) top = std::max(top, std::fabs(x[i]));
  const float step = top / 127.0f, inv = inverse(step);
  b->d = nearest_half(step);
  for (int i = 0; i < 32; ++i) {
    const float scaled = x[i] * inv;
    const int whole = (int)scaled;  // ties go away from zero, as in the format's reference
    const int away = std::fabs(scaled - (float)whole) >= 0.5f ? (scaled < 0 ? -1 : 1) : 0;
    b->qs[i] = (int8_t)(whole + away);
  }
}

void quantize_q5_0(const float* x, BlockQ5_0* b) {
  b->d = nearest_half(fit_symmetric<32>(x, kQ5_0Starts, -16.0f, 15.0f));
  const float inv = inverse(half_to_float(b->d));
  uint8_t u[32];
  for (int i = 0; i < 32; ++i) u[i] = (uint8_t)(code(x[i] * inv, -16.0f, 15.0f) + 16.0f);
  std::memset(b->qh, 0, sizeof b->qh);
  for (int i = 0; i < 32; ++i) b->qh[i / 8] |= (uint8_t)((u[i] >> 4) << (i % 8));
  for (int i = 0; i < 16; ++i) b->qs[i] = (uint8_t)((u[i] & 15) | (u[i + 16] & 15) << 4);
}

void quantize_q4_k(const float* x, BlockQ4_K* b) {
  Affine fits[8];
  float scale = 0, minimum = 0;
  for (int j = 0; j < 8; ++j) {
    fits[j] = fit_affine<32>(x + 32 * j, kQ4KStarts, 15.0f);
    scale = std::max(scale, fits[j].scale);
    minimum = std::max(minimum, fits[j].minimum);
  }
  b->d = half_above(scale / 63.0f);
  b->dmin = half_above(minimum / 63.0f);
  const float d = half_to_float(b->d), dmin = half_to_float(b->dmin), inv = inverse(d), inv_min = inverse(dmin);
  uint8_t sc[8], m[8];
  for (int j = 0; j < 8; ++j) {
    const float* group = x + 32 * j;
    const float wanted = code(fits[j].scale * inv, 0, 63), wanted_m = code(fits[j].minimum * inv_min, 0, 63);
    float best = INFINITY;
    sc[j] = (uint8_t)wanted;
    m[j] = (uint8_t)wanted_m;
    for (const int step : kSteps) {
      for (const int step_m : kSteps) {
        const float s = std::min(std::max(wanted + (float)step, 0.0f), 63.0f);
        const float t = std::min(std::max(wanted_m + (float)step_m, 0.0f), 63.0f);
        const float error = squared_error<32>(group, d * s, dmin * t, 0, 15, nullptr);
        if (error < best) {
          best = error;
          sc[j] = (uint8_t)s;
          m[j] = (uint8_t)t;
        }
      }
    }
    float q[32];
    squared_error<32>(group, d * (float)sc[j], dmin * (float)m[j], 0, 15, q);
    uint8_t* qs = b->qs + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) qs[i] = j % 2 ? (uint8_t)(qs[i] | (uint8_t)q[i] << 4) : (uint8_t)q[i];
  }
  for (int j = 0; j < 4; ++j) {
    b->scales[j] = (uint8_t)(sc[j] | (sc[j + 4] >> 4) << 6);
    b->scales[j + 4] = (uint8_t)(m[j] | (m[j + 4] >> 4) << 6);
    b->scales[j + 8] = (uint8_t)((sc[j + 4] & 15) | (m[j + 4] & 15) << 4);
  }
}

void quantize_q6_k(const float* x, BlockQ6_K* b) {
  float scales[16], top = 0;
  for (int j = 0; j < 16; ++j) {
    scales[j] = fit_symmetric<16>(x + 16 * j, kQ6KStarts, -32.0f, 31.0f);
    top = std::max(top, std::fabs(scales[j]));
  }
  b->d = half_above(top / 127.0f);
  const float d = half_to_float(b->d), inv = inverse(d);
  uint8_t u[256];
  for (int j = 0; j < 16; ++j) {
    const float* group = x + 16 * j;
    const float wanted = code(scales[j] * inv, -127, 127);
    float best = INFINITY, sc = wanted, q[16];
    for (const int step : kSteps) {
      const float s = std::min(std::max(wanted + (float)step, -128.0f), 127.0f);
      const float error = squared_error<16>(group, d * s, 0, -32, 31, nullptr);
      if (error < best) {
        best = error;
        sc = s;
      }
    }
    squared_error<16>(group, d * sc, 0, -32, 31, q);
    b->scales[j] = (int8_t)sc;
    for (int i = 0; i < 16; ++i) u[16 * j + i] = (uint8_t)(q[i] + 32.0f);
  }
  for (int h = 0; h < 2; ++h) {  // halves of four rows of 32
    const uint8_t* row = u + 128 * h;
    for (int i = 0; i < 32; ++i) {
      b->ql[64 * h + i] = (uint8_t)((row[i] & 15) | (row[i + 64] & 15) << 4);
      b->ql[64 * h + 32 + i] = (uint8_t)((row[i + 32] & 15) | (row[i + 96] & 15) << 4);
      b->qh[32 * h + i] =
          (uint8_t)(row[i] >> 4 | (row[i + 32] >> 4) << 2 | (row[i + 64] >> 4) << 4 | (row[i + 96] >> 4) << 6);
    }
  }
}

template <int N, class B>
void each_block(const float* src, size_t num_elements, uint8_t* dst, void (*one)(const float*, B*)) {
  for (size_t i = 0; i < num_elements / N; ++i) {
    B block;
    one(src + i * N, &block);
    std::memcpy(dst + i * sizeof(B), &block, sizeof(B));
  }
}

}  // namespace

bool has_quantizer(QuantType type) {
  return type == QuantType::Q8_0 || type == QuantType::Q5_0 || type == QuantType::Q4_K || type == QuantType::Q6_K;
}

void quantize(QuantType type, const float* src, size_t num_elements, uint8_t* dst) {
  switch (type) {
    case QuantType::Q8_0: each_block<32>(src, num_elements, dst, quantize_q8_0); break;
    case QuantType::Q5_0: each_block<32>(src, num_elements, dst, quantize_q5_0); break;
    case QuantType::Q4_K: each_block<256>(src, num_elements, dst, quantize_q4_k); break;
    case QuantType::Q6_K: each_block<256>(src, num_elements, dst, quantize_q6_k); break;
    default: break;
  }
}

}  // namespace autoglm
