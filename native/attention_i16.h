// Attention over a cache of whole numbers (KvType::I16), 16 bits each and one float scale a token and head.
//
// A key or query is rounded to steps of 1/32767 of its length, so that |q . k| < 2^31 for every number of dims and the
// sum is exact (Cauchy-Schwarz); a value to 1/8191 of its largest magnitude. A span's weights, each with its value's
// scale in it, are rounded to steps that keep the largest under 2^15 and the sum of weight times value under 2^31.
// So keys lose no more than in f16 and values about as much, while a product of two pairs is one instruction and
// nothing is turned into floats first. A row's steps do not depend on the rows beside it.
#pragma once

namespace {

constexpr float kCachedValueSteps = 8191.0f;
constexpr float kWeightTop = 32767.0f, kWeightSum = 262000.0f;  // 8191 * (262000 + 64 / 2) < 2^31

// A block's keys lie as [dim / 2][16 keys][2], its values as [dim / 16][8 key pairs][16 dims][2]; 16 scales follow.
inline float* i16_scales(uint8_t* block, int dim) { return (float*)(block + sizeof(int16_t) * (size_t)dim * kKvBlock); }
inline const float* i16_scales(const uint8_t* block, int dim) { return i16_scales((uint8_t*)block, dim); }

inline void write_i16_key(uint8_t* block, int offset, const float* key, int dim) {
  int16_t x[kMaxHeadDim];
  i16_scales(block, dim)[offset] = round_to_length(key, dim, x);
  for (int d = 0; d < dim; d += 2) memcpy(block + 2 * (d * kKvBlock + 2 * offset), x + d, 4);
}

inline void write_i16_value(uint8_t* block, int offset, const float* value, int dim) {
  int16_t x[kMaxHeadDim];
  const float top = max_abs(value, dim);
  round_i16(value, dim, kCachedValueSteps / (top + 1e-30f), x);
  i16_scales(block, dim)[offset] = top / kCachedValueSteps;
  int16_t* v = (int16_t*)block + offset / 2 * 32 + offset % 2;
  for (int d = 0; d < dim; d += 16)
    for (int i = 0; i < 16; ++i) v[d * kKvBlock + 2 * i] = x[d + i];
}

template <int T, int R>
AUTOGLM_INLINE void zero_tile(vi (&d)[T][R]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int g = 0; g < R; ++g) d[t][g] = vi_zero();
}

// d[t][g] += dots of 16 numbers of each row x[t] with 16 lanes of w[g], which lie as [8 pairs][16 lanes][2].
template <int T, int R>
AUTOGLM_INLINE void i16_dots(const uint8_t* const (&w)[R], const int16_t* const (&x)[T], vi (&d)[T][R]) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    vb y[R];
#pragma GCC unroll 4
    for (int g = 0; g < R; ++g) y[g] = vb_load(w[g] + k * kVec);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Quad a = quad_load((const int8_t*)x[t], k);
#pragma GCC unroll 4
      for (int g = 0; g < R; ++g) d[t][g] = dot2(d[t][g], y[g], a);
    }
  }
}

// Vectors to a tile of T rows: few rows take more, so that sums need not wait for each other.
constexpr int i16_vectors(int T) { return 2 * T <= kTileT ? 2 * kTileR : kTileR; }

// The next span is asked for once a tile, or, where tiles are few, once for 16 numbers of each of a tile's rows.
inline bool i16_asks_often(int rows) { return rows <= kAttnRows / 4; }
inline int i16_asks(int rows, int dim) {  // about
  const int tiles = count_tiles(rows), vectors = i16_vectors(divide_up(rows, tiles)), blocks = kAttnKeys / kKvBlock;
  if (!i16_asks_often(rows)) return 2 * tiles;
  return tiles * (dim / 16 * blocks / vectors + std::max(1, dim / 16 / vectors) * blocks);
}

// Scores of T queries against the keys of a span.
template <bool Often>
struct RunI16Scores {
  const int16_t* q; const float* q_scale; int dim, num_blocks; const uint8_t* const* blocks; float* s; SpanAhead* ahead;
  template <int T> void run(int t0) const {
    if (!Often) ahead->ask();
    constexpr int R = i16_vectors(T);
    for (int first = 0; first < num_blocks; first += R) {
      const int16_t* x[T];
      const uint8_t* w[R];
      vi d[T][R];
      for (int t = 0; t < T; ++t) x[t] = q + (t0 + t) * dim;
      for (int g = 0; g < R; ++g) w[g] = blocks[first + g < num_blocks ? first + g : first];
      zero_tile(d);
      for (int c = 0; c < dim; c += 16) {
        if (Often) ahead->ask();
        i16_dots<T, R>(w, x, d);
        for (int t = 0; t < T; ++t) x[t] += 16;
        for (int g = 0; g < R; ++g) w[g] += 8 * kVec;
      }
#pragma GCC unroll 4
      for (int g = 0; g < R; ++g) {
        const vf scale = vf_load((const float*)w[g]);  // the keys' scales follow them
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          vf_store(s + (t0 + t) * kAttnKeys + 16 * (first + g),
                   vf_mul(vf_from_int(d[t][g]), vf_mul(scale, vf_set1(q_scale[t0 + t]))));
      }
    }
  }
};

// acc += step * sum over the blocks of a span of weight * value for T rows.
template <bool Often>
struct RunI16Values {
  const int16_t* p; const float* step; int dim, num_blocks; const uint8_t* const* blocks; float* acc; SpanAhead* ahead;
  template <int T, int R> void columns(int t0, int column) const {
    const int16_t* x[T];
    vi d[T][R];
    for (int t = 0; t < T; ++t) x[t] = p + (t0 + t) * kAttnKeys;
    zero_tile(d);
    for (int b = 0; b < num_blocks; ++b) {
      if (Often) ahead->ask();
      const uint8_t* w[R];
      for (int g = 0; g < R; ++g) w[g] = blocks[b] + (column / 16 + g) * 8 * kVec;
      i16_dots<T, R>(w, x, d);
      for (int t = 0; t < T; ++t) x[t] += kKvBlock;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int g = 0; g < R; ++g) {
        float* a = acc + (t0 + t) * dim + column + 16 * g;
        vf_store(a, vf_fma(vf_from_int(d[t][g]), vf_set1(step[t0 + t]), vf_load(a)));
      }
  }
  template <int T> void run(int t0) const {
    if (!Often) ahead->ask();
    int column = 0;
    constexpr int R = i16_vectors(T);
    for (; column + 16 * R <= dim; column += 16 * R) columns<T, R>(t0, column);
    for (; column < dim; column += 16) columns<T, 1>(t0, column);
  }
};

// Scores of a span -> weights with the scale of their values in them, rounded, and what a step of them is. Sixteen rows
// go together, so that none waits for its own maximum and sums.
struct I16Softmax {
  const AttnScratch& x;
  int dim;

  // The largest of each lane. Whole: the row sees all keys of the span; what lies in the places of others may be anything.
  template <bool Whole> vf highest(float* s, int keys) const {
    vf m = vf_set1(-INFINITY);
#pragma GCC unroll 4
    for (int i = 0; i < kAttnKeys; i += 16) {
      vf y = vf_load(s + i);
      if (!Whole) vf_store(s + i, y = vf_min(y, vf_load(kCap + 16 - clamp_keys(keys - i, 16))));
      m = vf_max(y, m);
    }
    return m;
  }

  // Scores become weights; their largest and their sum, of each lane.
  template <bool Whole> void weigh(int row, int keys, float* largest, float* sum) const {
    float* s = x.s + kAttnKeys * row;
    const vf shift = vf_set1(-kLog2E * x.top[row]);
    vf total = vf_load(x.sum + 16 * row), most = vf_zero(), all = vf_zero();
#pragma GCC unroll 4
    for (int i = 0; i < kAttnKeys; i += 16) {
      vf w = vf_exp2_down(vf_fma(vf_load(s + i), vf_set1(kLog2E), shift)), values = vf_load(x.scale + i);
      if (!Whole) {
        const int valid = clamp_keys(keys - i, 16);
        w = vf_mul(w, vf_load(kValid + 16 - valid));
        values = vf_min(values, vf_load(kSeen + 16 - valid));
      }
      total = vf_add(total, w);
      w = vf_mul(w, values);
      vf_store(s + i, w);
      most = vf_max(w, most);
      all = vf_add(all, w);
    }
    vf_store(x.sum + 16 * row, total);
    vf_store(largest, most);
    vf_store(sum, all);
  }

  // Rows first .. first + count - 1, at most sixteen; keys(row) of the span each sees.
  template <class Keys> void run(int first, int count, const Keys& keys) const {
    alignas(64) float a[16 * 16], b[16 * 16], of_row[16], inverse[16], step[16];
    for (int i = 0; i < count; ++i) {
      float* s = x.s + kAttnKeys * (first + i);
      const int n = keys(first + i);
      vf_store(a + 16 * i, n == kAttnKeys ? highest<true>(s, n) : highest<false>(s, n));
    }
    vf_store(of_row, largest_of_rows(a));
    for (int i = 0; i < count; ++i) {
      const int row = first + i;
      raise_top(of_row[i], x.top + row, x.sum + 16 * row, x.acc + dim * row, dim);
    }
    for (int i = 0; i < count; ++i) {
      const int row = first + i, n = keys(row);
      n == kAttnKeys ? weigh<true>(row, n, a + 16 * i, b + 16 * i) : weigh<false>(row, n, a + 16 * i, b + 16 * i);
    }
    const vf tiny = vf_set1(1e-30f), by_top = vf_div(vf_set1(kWeightTop), vf_add(largest_of_rows(a), tiny));
    const vf steps = vf_min(by_top, vf_div(vf_set1(kWeightSum), vf_add(sums_of_rows(b), tiny)));
    vf_store(inverse, steps);
    vf_store(step, vf_div(vf_set1(1.0f), steps));
    for (int i = 0; i < count; ++i) {
      const int row = first + i;
      x.step[row] = step[i];
      round_i16(x.s + kAttnKeys * row, kAttnKeys, inverse[i], x.p + kAttnKeys * row);
    }
  }
};

}  // namespace
