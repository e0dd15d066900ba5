// Row operations between products: quantization, norm, gate, exponential, argmax.
#pragma once

namespace {

inline vf load_tail(const float* p, int n) {
  float x[16] = {};
  memcpy(x, p, sizeof(float) * (size_t)n);
  return vf_load(x);
}

// The largest magnitude of n floats, n a multiple of 16; NaN if one of them is NaN or infinite.
inline float max_abs(const float* x, int n) {
  vf m = vf_zero(), bad = vf_zero();
  for (int i = 0; i < n; i += 16) {
    const vf v = vf_load(x + i);
    m = vf_max(vf_abs(v), m);
    bad = vf_fma(v, vf_zero(), bad);
  }
  return vf_reduce_max(m) + vf_reduce_add(bad);
}

// q = round(x * 127 / max|x|); returns the scale. n a multiple of 16; sixteen(i, q as whole numbers) for each 16 from i.
// A span that is not finite becomes zeros with the scale NaN, so that the row's results are NaN and seen.
template <class F>
inline float quantize_span(const float* x, int n, int8_t* q, const F& sixteen) {
  const float top = max_abs(x, n);
  const vf inv = vf_set1(top > 0 ? 127.0f / top : 0.0f);
  for (int i = 0; i < n; i += 16) {
    const vi r = top > 0 ? vi_round(vf_mul(vf_load(x + i), inv)) : vi_zero();
    vi_store_i8(q + i, r);
    sixteen(i, r);
  }
  return top > 0 ? top / 127.0f : top;
}

void quantize_chunk_k(const float* x, int n, int8_t* q, ActMetaK* meta) {
  int32_t sum16[16] = {};
  memset(q, 0, kChunk);
  meta->scale = quantize_span(x, n, q, [&](int i, vi r) { sum16[i / 16] = vi_sum(r); });
  for (int j = 0; j < 8; ++j) meta->sum32[j] = (int16_t)(sum16[2 * j] + sum16[2 * j + 1]);
  for (int j = 0; j < 16; ++j) meta->neg_sum16[j] = -sum16[j];
}

void quantize_chunk_b(const float* x, int n, int8_t* q, ActMetaB* meta) {
  memset(q, 0, kChunk);
  memset(meta, 0, sizeof(*meta));
  for (int b = 0; 32 * b < n; ++b) {
    vi sums = vi_zero();
    meta->scale[b] = quantize_span(x + 32 * b, 32, q + 32 * b, [&](int, vi r) { sums = vi_add(sums, r); });
    const int32_t sum = vi_sum(sums);
    meta->neg_sum[b] = -sum;
    meta->scaled_sum[b] = meta->scale[b] * (float)sum;
  }
}

inline void round_i16(const float* x, int n, float inverse, int16_t* out) {
  for (int d = 0; d < n; d += 16) vi_store_i16(out + d, vi_round(vf_mul(vf_load(x + d), vf_set1(inverse))));
}

constexpr float kLengthSteps = 32767.0f;

// x [n] in steps of 1/32767 of its length, so that a product with another such row is less than 2^31 for every n
// (Cauchy-Schwarz); returns the step, NaN if the length is not finite.
inline float round_to_length(const float* x, int n, int16_t* out) {
  vf sum = vf_zero();
  for (int d = 0; d < n; d += 16) sum = vf_fma(vf_load(x + d), vf_load(x + d), sum);
  const float length = sqrtf(vf_reduce_add(sum));
  round_i16(x, n, kLengthSteps / (length + 1e-30f), out);
  return (length + 0 * length) / kLengthSteps;
}

void quantize_chunk_i16(const float* x, int n, int16_t* q, ActMetaI16* meta) {
  for (int i = 0; i < n; i += kI16Columns) meta->scale[i / kI16Columns] = round_to_length(x + i, kI16Columns, q + i);
}

void quantize_chunk(const float* src, int chunk, const ActView& out, int row) {
  const int k0 = chunk * kChunk, n = out.width - k0 < kChunk ? out.width - k0 : kChunk;
  const size_t at = (size_t)chunk * out.capacity + row;
  if (out.f32) {
    float* dst = out.f32 + (size_t)row * out.stride + k0;
    if (dst != src) memcpy(dst, src, sizeof(float) * (size_t)n);
  }
  if (out.qk) quantize_chunk_k(src, n, out.qk + at * kChunk, out.meta_k + at);
  if (out.qi) quantize_chunk_i16(src, n, out.qi + at * kChunk, out.meta_i + at);
  if (out.qb) quantize_chunk_b(src, n, out.qb + at * kChunk, out.meta_b + at);
}

void rms_norm(const float* src, const float* weight, float eps, int n, float* dst) {
  vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) {
      const vf x = vf_load(src + i + 16 * j);
      sum[j] = vf_fma(x, x, sum[j]);
    }
  for (; i < n; i += 16) {
    const vf x = n - i >= 16 ? vf_load(src + i) : load_tail(src + i, n - i);
    sum[0] = vf_fma(x, x, sum[0]);
  }
  const float total = vf_reduce_add(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
  const float scale = 1.0f / sqrtf(total / (float)n + eps);
  const vf k = vf_set1(scale);
  for (i = 0; i + 16 <= n; i += 16) vf_store(dst + i, vf_mul(vf_mul(vf_load(src + i), k), vf_load(weight + i)));
  for (; i < n; ++i) dst[i] = src[i] * scale * weight[i];
}

// Sum of f(x) over n floats: four chains of vectors, then the tail alone.
template <class Vector, class One>
inline float sum_of(const float* src, int n, const Vector& f, const One& one) {
  vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) sum[j] = vf_add(sum[j], f(vf_load(src + i + 16 * j)));
  for (; i + 16 <= n; i += 16) sum[0] = vf_add(sum[0], f(vf_load(src + i)));
  float total = vf_reduce_add(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
  for (; i < n; ++i) total += one(src[i]);
  return total;
}

void layer_norm(const float* src, const float* weight, const float* bias, float eps, int n, float* dst) {
  const float mean = sum_of(src, n, [](vf x) { return x; }, [](float x) { return x; }) / (float)n;
  const vf shift = vf_set1(mean);
  const float squares = sum_of(
      src, n,
      [&](vf x) {
        const vf d = vf_sub(x, shift);
        return vf_mul(d, d);
      },
      [&](float x) { return (x - mean) * (x - mean); });
  const float scale = 1.0f / sqrtf(squares / (float)n + eps);
  const vf k = vf_set1(scale);
  int i = 0;
  for (; i + 16 <= n; i += 16)
    vf_store(dst + i, vf_fma(vf_mul(vf_sub(vf_load(src + i), shift), k), vf_load(weight + i), vf_load(bias + i)));
  for (; i < n; ++i) dst[i] = (src[i] - mean) * scale * weight[i] + bias[i];
}

void add(float* dst, const float* src, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) vf_store(dst + i, vf_add(vf_load(dst + i), vf_load(src + i)));
  for (; i < n; ++i) dst[i] += src[i];
}

// exp by 2^n * p(r), |r| <= ln2/2; degree-6 polynomial with Cephes' coefficients, relative error under 2e-7.
inline vf vf_exp(vf x) {
  x = vf_max(vf_min(x, vf_set1(88.0f)), vf_set1(-87.0f));
  const vi n = vi_round(vf_mul(x, vf_set1(1.44269504f)));
  const vf fn = vf_from_int(n);
  vf r = vf_fma(fn, vf_set1(-0.693359375f), x);
  r = vf_fma(fn, vf_set1(2.12194440e-4f), r);
  vf p = vf_set1(1.9875691500e-4f);
  p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
  p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
  p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
  p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
  p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
  p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
  return vf_scale2(p, n);
}

constexpr float kLog2E = 1.44269504f;
constexpr float kExp2[4] = {0.69312216f, 0.24023711f, 0.05591611f, 0.00960079f};  // least maximum of the relative error

// 2^x for x up to 100, relative error under 4e-6; from -32 down it stays at 2^-32.
inline vf vf_exp2_down(vf x) {
  x = vf_max(x, vf_set1(-32.0f));
  const vi n = vi_round(x);
  const vf r = vf_sub(x, vf_from_int(n));
  vf p = vf_set1(kExp2[3]);
  p = vf_fma(p, r, vf_set1(kExp2[2]));
  p = vf_fma(p, r, vf_set1(kExp2[1]));
  p = vf_fma(p, r, vf_set1(kExp2[0]));
  return vf_scale2(vf_fma(p, r, vf_set1(1.0f)), n);
}

void silu_mul(const float* gate, const float* up, int rows, float* dst, int stride) {
  const vf one = vf_set1(1.0f);
  for (int r = 0; r < rows; ++r, dst += stride)
    for (int i = 0; i < kPanelRows; i += 16, gate += 16, up += 16) {
      const vf g = vf_load(gate);
      const vf e = vf_exp(vf_sub(vf_zero(), g));
      vf_store(dst + i, vf_mul(vf_div(g, vf_add(one, e)), vf_load(up)));
    }
}

void rotate(const float* cs, int half, bool interleaved, float scale, int n, float* x) {
  const auto turn = [&](int j, float& a, float& b) {
    const float c = cs[2 * j], s = cs[2 * j + 1], x0 = a, x1 = b;
    a = x0 * c - x1 * s;
    b = x1 * c + x0 * s;
  };
  // Two loops, which the compiler vectorizes.
  if (interleaved)
    for (int j = 0; j < half; ++j) turn(j, x[2 * j], x[2 * j + 1]);
  else
    for (int j = 0; j < half; ++j) turn(j, x[j], x[j + half]);
  if (scale != 1.0f)
    for (int i = 0; i < n; ++i) x[i] *= scale;
}

// erf by Abramowitz & Stegun 7.1.26, absolute error under 1.5e-7; odd, so |x| is taken and the sign put back.
void gelu(const float* x, int n, float* dst) {
  const vf one = vf_set1(1.0f);
  for (int i = 0; i < n; i += 16) {
    const vf v = vf_load(x + i), a = vf_mul(vf_abs(v), vf_set1(0.70710678f));
    const vf t = vf_div(one, vf_fma(vf_set1(0.3275911f), a, one));
    vf p = vf_set1(1.061405429f);
    p = vf_fma(p, t, vf_set1(-1.453152027f));
    p = vf_fma(p, t, vf_set1(1.421413741f));
    p = vf_fma(p, t, vf_set1(-0.284496736f));
    p = vf_fma(p, t, vf_set1(0.254829592f));
    // 1 - erf(|x| / sqrt 2), which keeps its digits where erf itself has come to 1
    const vf rest = vf_mul(vf_mul(p, t), vf_exp(vf_sub(vf_zero(), vf_mul(a, a))));
    const vf half = vf_mul(vf_set1(0.5f), vf_mul(vf_abs(v), rest));
    vf_store(dst + i, vf_sub(vf_max(v, vf_zero()), half));
  }
}

int argmax(const float* x, int n) {
  vf top = vf_set1(-INFINITY), bad = vf_zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const vf v = vf_load(x + i);
    top = vf_max(v, top);
    bad = vf_fma(v, vf_zero(), bad);  // NaN once a NaN or infinity is seen
  }
  float best = vf_reduce_max(top), nan = vf_reduce_add(bad);
  for (; i < n; ++i) {
    best = x[i] > best ? x[i] : best;
    nan += x[i] * 0.0f;
  }
  if (nan != nan) return -1;
  for (i = 0; i < n; ++i)
    if (x[i] == best) return i;
  return -1;
}

}  // namespace
