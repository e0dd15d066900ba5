// Products for one to eight rows, of Q4_K to sixteen in tiles, straight from the packed bytes.
//
// So few rows are bound by the reading of weights; unpacking into registers instead of the scratch halves the
// instructions. The integer sums and the order of float steps are those of gemm_products.h, so the results are
// the same bits.
#pragma once

namespace {

// Halves of a panel that T rows take at once: what their sums leave of the registers. Half by half every other line is
// read, which no core reads ahead by itself.
constexpr int direct_halves(int T) { return T <= kPairRows ? 2 : 1; }

// Asks for the head of a chunk, which is used in between the columns behind it, so that lines are asked for in order: a
// core that reads ahead by itself then does (one core of Zen 4, one row of Q4_K 11.6 to 29.8 GB/s, of Q6_K 10.1 to 28.5).
template <int Bytes>
AUTOGLM_INLINE void touch(const uint8_t* p) {
  if (fills_first_cache) return;
#pragma GCC unroll 32
  for (int i = 0; i < Bytes; i += 64) prefetch(p + i);
}

// acc += scale * dot for both halves of T rows
template <int T, int R>
AUTOGLM_INLINE void add_scaled(vi (&d)[T][R], const vf (&scale)[R], vf (&acc)[T][R]) {
  AUTOGLM_TILE(acc[t][g] = vf_fma(vf_from_int(d[t][g]), scale[g], acc[t][g]))
}

// d += w . a, of the k-th quad that comes to d; through a sum of 16 bits where the instruction set has them.
template <int Bits, class Sum>
AUTOGLM_INLINE void add_quad(int k, vb w, Quad a, Sum& d, Sum& narrow) {
  if constexpr (kNarrowSums) {
    narrow = dot4_narrow(narrow, w, a);
    if (k % narrow_run(Bits) != narrow_run(Bits) - 1) return;
    d = widen_sums(d, narrow);
    narrow = vi_zero();
  } else {
    d = dot4(d, w, a);
  }
}

// Blocks 2 pair and 2 pair + 1, whose fifth bits, if there are five, are bits Plane and Plane + 1 of the plane's bytes.
template <int T, int R, bool Five, int Plane>
AUTOGLM_INLINE void direct_k32_pair(const uint8_t* p, int pair, int half, const int8_t* qx, Ahead& ahead,
                                    vf (&acc)[T][R]) {
  const vb low = vb_set1(15), high = vb_set1(16), upper = vb_set1(0xf0);
  // Where products take full bytes, high nibbles stay in place, 16 times too large, and their scale is taken 16
  // times smaller: both exact, and a shift less for every 64 bytes (18.9 to 19.6 GB/s on two cores).
  constexpr bool in_place = !Five && kFullBytes;
  const vf unit = vf_set1(in_place ? 0.0625f : 1.0f);
  const uint8_t *plane = p + 640, *nib = plane + (Five ? 1024 : 0) + pair * 1024;
  constexpr int bits = Five ? 5 : 4;
  vi d0[T][R], d1[T][R], n0[T][R], n1[T][R];
  AUTOGLM_TILE(d0[t][g] = d1[t][g] = n0[t][g] = n1[t][g] = vi_zero())
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    if (half == 0 && k % 2 == 0) k ? ahead.ask_between() : ahead.ask();
    vb x0[R], x1[R];
#pragma GCC unroll 2
    for (int g = 0; g < R; ++g) {
      const int at = k * kQuadBytes + (half + g) * kVec;
      const vb x = vb_load(nib + at);
      x0[g] = vb_and(x, low);
      x1[g] = in_place ? vb_and(x, upper) : vb_and(vb_shr<4>(x), low);
      if (Five) {
        const vb h = vb_load(plane + at);
        x0[g] = vb_or(x0[g], vb_and(high_bit_raw<Plane>(h), high));
        x1[g] = vb_or(x1[g], vb_and(high_bit_raw<Plane + 1>(h), high));
      }
    }
    AUTOGLM_TILE({
      add_quad<bits>(k, x0[g], quad_load(qx + t * kChunk + 64 * pair, k), d0[t][g], n0[t][g]);
      add_quad<bits>(k, x1[g], quad_load(qx + t * kChunk + 64 * pair + 32, k), d1[t][g], n1[t][g]);
    })
  }
  vf s0[R], s1[R];
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const vf d = vf_load_f16((const uint16_t*)p + 16 * (half + g));
    s0[g] = vf_mul(d, vf_load_u8(p + 128 + 64 * pair + 16 * (half + g)));
    s1[g] = vf_mul(vf_mul(d, unit), vf_load_u8(p + 128 + 64 * pair + 32 + 16 * (half + g)));
  }
  add_scaled<T, R>(d0, s0, acc);
  add_scaled<T, R>(d1, s1, acc);
}

template <int T, int R, bool Five>
inline void direct_k32(const uint8_t* p, int half, const int8_t* qx, const ActMetaK* meta, Ahead& ahead, float* c) {
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  if (half == 0) touch<640 + (Five ? 1024 : 0)>(p);
  if (Five || T <= 2) {  // shifts of bytes are by constants
    direct_k32_pair<T, R, Five, 0>(p, 0, half, qx, ahead, acc);
    direct_k32_pair<T, R, Five, 2>(p, 1, half, qx, ahead, acc);
    direct_k32_pair<T, R, Five, 4>(p, 2, half, qx, ahead, acc);
    direct_k32_pair<T, R, Five, 6>(p, 3, half, qx, ahead, acc);
  } else {
    for (int pair = 0; pair < 4; ++pair) direct_k32_pair<T, R, Five, 0>(p, pair, half, qx, ahead, acc);
  }
  vi m[T][R];
  AUTOGLM_TILE(m[t][g] = vi_zero())
  for (int pair = 0; pair < 4; ++pair)
    AUTOGLM_TILE(m[t][g] = dot2_u8(m[t][g], p + 128 + 256 + 64 * pair + 32 * (half + g), meta[t].sum32 + 2 * pair))
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    const vf dmin = vf_sub(vf_zero(), vf_load_f16((const uint16_t*)(p + 64) + 16 * (half + g)));
    const vf a = vf_fma(vf_from_int(m[t][g]), dmin, acc[t][g]);
    vf_store(out, vf_fma(a, vf_set1(meta[t].scale), vf_load(out)));
  })
}

template <int T, int R>
inline void direct_k16(const uint8_t* p, int half, const int8_t* qx, const ActMetaK* meta, Ahead& ahead, float* c) {
  const vb low = vb_set1(15), high = vb_set1(48);
  vf acc[T][R], d[R];
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  for (int g = 0; g < R; ++g) d[g] = vf_load_f16((const uint16_t*)p + 16 * (half + g));
  if (half == 0) touch<576>(p);
  for (int h = 0; h < 2; ++h) {
    const uint8_t* columns = p + 576 + 3072 * h;
    vf part[4][2][T][R];  // dots of blocks 4h..4h+3, two halves of 16 columns each, as scaled in order below
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      vi dot[4][T][R];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b)
        AUTOGLM_TILE(dot[b][t][g] = vi_offset<5>(meta[t].neg_sum16 + 8 * h + 2 * b + s))
#pragma GCC unroll 4
      for (int k = 4 * s; k < 4 * s + 4; ++k) {
        if (half == 0) k ? ahead.ask_between() : ahead.ask();
#pragma GCC unroll 2
        for (int g = 0; g < R; ++g) {
          const uint8_t* at = columns + 3 * k * kQuadBytes + (half + g) * kVec;
          const vb x0 = vb_load(at), x1 = vb_load(at + kQuadBytes), y = vb_load(at + 2 * kQuadBytes);
          const vb w0 = vb_or(vb_and(x0, low), vb_and(vb_shl<4>(y), high));
          const vb w1 = vb_or(vb_and(x1, low), vb_and(vb_shl<2>(y), high));
          const vb w2 = vb_or(vb_and(vb_shr<4>(x0), low), vb_and(y, high));
          const vb w3 = vb_or(vb_and(vb_shr<4>(x1), low), vb_and(vb_shr<2>(y), high));
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const int8_t* q = qx + t * kChunk + 128 * h;
            dot[0][t][g] = dot4(dot[0][t][g], w0, quad_load(q, k));
            dot[1][t][g] = dot4(dot[1][t][g], w1, quad_load(q + 32, k));
            dot[2][t][g] = dot4(dot[2][t][g], w2, quad_load(q + 64, k));
            dot[3][t][g] = dot4(dot[3][t][g], w3, quad_load(q + 96, k));
          }
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) AUTOGLM_TILE(part[b][s][t][g] = vf_from_int(dot[b][t][g]))
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) {
        const vf scale = vf_mul(d[g], vf_load_i8((const int8_t*)p + 64 + 32 * (8 * h + j) + 16 * (half + g)));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t][g] = vf_fma(part[j / 2][j % 2][t][g], scale, acc[t][g]);
      }
  }
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    vf_store(out, vf_fma(acc[t][g], vf_set1(meta[t].scale), vf_load(out)));
  })
}

template <int T, int R, bool HasMin>
AUTOGLM_INLINE void add_b32(vi (&d)[T][R], const uint8_t* p, int half, int b, const ActMetaB* meta, vf (&acc)[T][R]) {
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const vf scale = vf_load_f16((const uint16_t*)p + 16 * (half + g));
    const vf minimum = HasMin ? vf_load_f16((const uint16_t*)(p + 64) + 16 * (half + g)) : vf_zero();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      acc[t][g] = vf_fma(vf_mul(vf_from_int(d[t][g]), vf_set1(meta[t].scale[b])), scale, acc[t][g]);
      if (HasMin) acc[t][g] = vf_fma(vf_set1(meta[t].scaled_sum[b]), minimum, acc[t][g]);
    }
  }
}

template <int T, int R, bool HasPlane, int V>
AUTOGLM_INLINE void direct_nibbles(const uint8_t* p, int half, const int8_t* q, vi (&d)[T][R], vi (&narrow)[T][R]) {
  constexpr int bits = HasPlane ? 5 : 4;
  const vb low = vb_set1(15);
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const int at = V * kQuadBytes + (half + g) * kVec;
    const vb x = vb_load(p + (HasPlane ? 128 : 0) + at);
    vb x0 = vb_and(x, low), x1 = vb_and(vb_shr<4>(x), low);
    if (HasPlane) {
      const vb h = vb_load(p + (half + g) * kVec);
      x0 = vb_or(x0, high_bit<V>(h));
      x1 = vb_or(x1, high_bit<V + 4>(h));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      add_quad<bits>(2 * V, x0, quad_load(q + t * kChunk, V), d[t][g], narrow[t][g]);
      add_quad<bits>(2 * V + 1, x1, quad_load(q + t * kChunk + 16, V), d[t][g], narrow[t][g]);
    }
  }
}

template <int T, int R, int Offset, bool HasMin, bool HasPlane>
inline void direct_b32(const uint8_t* p, int half, int blocks, const int8_t* qx, const ActMetaB* meta, Ahead& ahead,
                       float* c) {
  constexpr int header = HasMin ? 128 : 64, size = header + 512 + (HasPlane ? 128 : 0);
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b, p += size) {
    ahead.ask();
    vi d[T][R], narrow[T][R];
    AUTOGLM_TILE(d[t][g] = Offset >= 0 ? vi_offset<(Offset < 0 ? 0 : Offset)>(meta[t].neg_sum + b) : vi_zero())
    AUTOGLM_TILE(narrow[t][g] = vi_zero())
    direct_nibbles<T, R, HasPlane, 0>(p + header, half, qx + 32 * b, d, narrow);
    direct_nibbles<T, R, HasPlane, 1>(p + header, half, qx + 32 * b, d, narrow);
    direct_nibbles<T, R, HasPlane, 2>(p + header, half, qx + 32 * b, d, narrow);
    direct_nibbles<T, R, HasPlane, 3>(p + header, half, qx + 32 * b, d, narrow);
    add_b32<T, R, HasMin>(d, p, half, b, meta, acc);
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

template <int T, int R>
inline void direct_q8(const uint8_t* p, int half, int blocks, const int8_t* qx, const ActMetaB* meta, Ahead& ahead,
                      float* c) {
  const vb flip = vb_set1(kQ8Unsigned ? 0x80 : 0);
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b, p += 1088) {
    ahead.ask();
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = kQ8Unsigned ? vi_offset<7>(meta[t].neg_sum + b) : vi_zero())
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) {
        const vb x = vb_xor(vb_load(p + 64 + k * kQuadBytes + (half + g) * kVec), flip);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const Quad a = quad_load(qx + t * kChunk + 32 * b, k);
          d[t][g] = kQ8Unsigned ? dot4(d[t][g], x, a) : dot4_q8(d[t][g], x, a);
        }
      }
    add_b32<T, R, false>(d, p, half, b, meta, acc);
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

#define AUTOGLM_HALVES for (int half = 0; half < 2; half += kTileR)

// The most rows whose sums stay in registers. K-quants work on two blocks at once or four, the others on one.
constexpr int direct_tile(bool k_quant) { return k_quant ? divide_up(kDirectRows, 2) : kDirectRows; }

template <int T>
void direct_chunk(QuantType type, const uint8_t* p, int blocks, const int8_t* q, const void* meta, Ahead& ahead,
                  float* c) {
  constexpr int K = T <= direct_tile(true) ? T : 1;
  constexpr int R = direct_halves(T), K16R = direct_halves(2 * K);
  const ActMetaK* mk = (const ActMetaK*)meta;
  const ActMetaB* mb = (const ActMetaB*)meta;
  if (type == QuantType::Q6_K) {
    for (int half = 0; half < 2; half += K16R) direct_k16<K, K16R>(p, half, q, mk, ahead, c);
    return;
  }
  for (int half = 0; half < 2; half += R) switch (type) {
    case QuantType::Q4_K: direct_k32<K, R, false>(p, half, q, mk, ahead, c); break;
    case QuantType::Q5_K: direct_k32<K, R, true>(p, half, q, mk, ahead, c); break;
    case QuantType::Q4_0: direct_b32<T, R, 3, false, false>(p, half, blocks, q, mb, ahead, c); break;
    case QuantType::Q4_1: direct_b32<T, R, -1, true, false>(p, half, blocks, q, mb, ahead, c); break;
    case QuantType::Q5_0: direct_b32<T, R, 4, false, true>(p, half, blocks, q, mb, ahead, c); break;
    case QuantType::Q5_1: direct_b32<T, R, -1, true, true>(p, half, blocks, q, mb, ahead, c); break;
    default: direct_q8<T, R>(p, half, blocks, q, mb, ahead, c);
  }
}

}  // namespace
