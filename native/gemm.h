// One weight panel times any number of activation rows: picks the unpacked or the direct products by type.
#pragma once

namespace {

inline int count_tiles(int rows) { return divide_up(rows, kTileT); }

// Calls f(first row, rows) over tiles of at most so many rows, as even as possible.
template <class F>
AUTOGLM_INLINE void for_tiles(int rows, int most, const F& f) {
  const int tiles = divide_up(rows, most);
  for (int i = 0, t0 = 0; i < tiles; ++i) {
    const int n = divide_up(rows - t0, tiles - i);
    f(t0, n);
    t0 += n;
  }
}

// Calls f.run<T>(first row) over tiles of at most kTileT rows.
template <class F>
inline void for_tiles(int rows, const F& f) {
  for_tiles(rows, kTileT, [&](int t0, int n) {
    switch (n) {
      case 1: f.template run<1>(t0); break;
      case 2: f.template run<2>(t0); break;
#define AUTOGLM_CASE(N) case N: f.template run<(kTileT >= N ? N : 1)>(t0); break;
      AUTOGLM_CASE(3) AUTOGLM_CASE(4) AUTOGLM_CASE(5) AUTOGLM_CASE(6)
#undef AUTOGLM_CASE
    }
  });
}

template <int Bits>
struct RunK32 {
  const Scratch& s; const int8_t* q; const ActMetaK* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_k32<T, kTileR, Bits>(s, half, q + t0 * kChunk, meta + t0, c + t0 * kPanelRows);
  }
};
struct RunK16 {
  const Scratch& s; const int8_t* q; const ActMetaK* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_k16<T, kTileR>(s, half, q + t0 * kChunk, meta + t0, c + t0 * kPanelRows);
  }
};
template <int Offset, bool HasMin, int Bits>
struct RunB32 {
  const Scratch& s; int blocks; const int8_t* q; const ActMetaB* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_b32<T, kTileR, Offset, HasMin, Bits>(s, half, blocks, q + t0 * kChunk, meta + t0, c + t0 * kPanelRows);
  }
};
struct RunI16 {
  const uint8_t* p; int blocks; const int16_t* q; const ActMetaI16* meta; Ahead* ahead; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_i16<T, kTileR>(p, half, blocks, q + t0 * kChunk, meta + t0, *ahead, c + t0 * kPanelRows);
  }
};
struct RunFloat {
  const float* w; int cols; const float* x; int stride; float* c; Ahead* ahead;
  template <int T> void run(int t0) const {
    ahead->ask();
    AUTOGLM_HALVES product_float<T, kTileR>(w, half, cols, x + (size_t)t0 * stride, stride, c + t0 * kPanelRows);
  }
};

constexpr int kFloatColumns = 64;  // of a float panel, handled between two visits of the accumulators
inline int float_bytes(QuantType t) { return t == QuantType::F32 ? 4 : 2; }

// The columns of a float panel that lie at p, from column k0 on; those at `next` come after them.
void float_columns(const PackedMatrix& w, const uint8_t* p, const uint8_t* next, const ActView& x, int k0, int row_begin,
                   int rows, float* c, float* unpacked) {
  const int cols = std::min(kFloatColumns, w.cols - k0), bytes = cols * kPanelRows * float_bytes(w.type);
  const float* weights = (const float*)p;
  if (w.type != QuantType::F32) {
    const uint16_t* src = (const uint16_t*)p;
    for (int i = 0; i < 2 * cols; ++i) {
      prefetch(src + 16 * i + 1024);
      vf_store(unpacked + 16 * i, w.type == QuantType::F16 ? vf_load_f16(src + 16 * i) : vf_load_bf16(src + 16 * i));
    }
    weights = unpacked;
  }
  // One tile alone reads on without being held up by what it asks for.
  const int tiles = count_tiles(rows);
  Ahead ahead{next, next + bytes, tiles > 1 ? divide_up(bytes / 64, tiles) : 0};
  for_tiles(rows, RunFloat{weights, cols, x.f32 + (size_t)row_begin * x.stride + k0, x.stride, c, &ahead});
}

bool block_elements_256(QuantType t) { return t == QuantType::Q4_K || t == QuantType::Q5_K || t == QuantType::Q6_K; }

// The most rows that go straight to the products, in tiles of those whose sums stay in registers. Where what is asked for
// goes into the second cache, more of Q4_K do, with AVX-512 sixteen (two cores of Zen 4, eight rows 16.6 to 19.8 GB/s,
// sixteen 10.5 to 11.3; Q5_K and Q6_K no faster or slower).
int direct_rows(QuantType t) {
  if (t == QuantType::I16) return 0;
  return t == QuantType::Q4_K && !fills_first_cache ? kTiledRows : direct_tile(block_elements_256(t));
}

size_t chunk_bytes(QuantType type, int blocks) {
  switch (type) {
    case QuantType::Q4_K: return 640 + 4096;
    case QuantType::Q5_K: return 640 + 4096 + 1024;
    case QuantType::Q6_K: return 576 + 4096 + 2048;
    case QuantType::Q4_0: return (size_t)blocks * 576;
    case QuantType::Q4_1: return (size_t)blocks * 640;
    case QuantType::Q5_0: return (size_t)blocks * 704;
    case QuantType::Q5_1: return (size_t)blocks * 768;
    case QuantType::I16: return (size_t)blocks * 32 / kI16Columns * kI16BlockBytes;
    default: return (size_t)blocks * 1088;
  }
}

// How often the products of a chunk ask for what comes next; 0: they need not.
int asks(QuantType t, int blocks, int rows) {
  if (rows > direct_rows(t)) return kBlocks * count_tiles(rows);
  // A core that reads ahead by itself reads a row's weights as fast unasked (two cores of Zen 4, of the memory's rate: Q4_K
  // 95 %, asking 81; Q6_K 100 and 100), and so does any that does so little between two loads that enough of them are
  // under way (one core of Zen 5, one row of Q8_0: 41.0 GB/s, asking 37.0; three rows 39.1 and 36.5; on AVX2 20 and 38).
  const bool in_order = direct_halves(t == QuantType::Q6_K ? 2 * rows : rows) == 2;
  if ((in_order && !fills_first_cache && rows <= kUnaskedRows) || (t == QuantType::Q8_0 && rows < kQ8Asks)) return 0;
  if (!block_elements_256(t)) return blocks * 2 / direct_halves(rows);
  if (!fills_first_cache) return 16 * divide_up(rows, direct_tile(true));
  if (t == QuantType::Q6_K) return 2;
  // Few rows wait for memory, and all at once is read fastest (one row of Q4_K on one core of Zen 5: 40.3 GB/s, in four
  // shares 35.8); more also compute for long, while what was asked for comes in (four rows: 30.3 and 35.0).
  return rows <= 2 ? 1 : 4;
}

// Chunk `p` of one panel times the rows at `at` of the activation: c += W x.
void few_rows_chunk(QuantType type, const uint8_t* p, int blocks, const ActView& x, size_t at, int rows,
                    Ahead& ahead, float* c) {
  const bool k = block_elements_256(type);
  for_tiles(rows, direct_tile(k), [&](int t0, int n) {
    const size_t row = at + (size_t)t0;
    const int8_t* q = (k ? x.qk : x.qb) + row * kChunk;
    const void* meta = k ? (const void*)(x.meta_k + row) : (const void*)(x.meta_b + row);
    float* out = c + t0 * kPanelRows;
    switch (n) {
      case 1: direct_chunk<1>(type, p, blocks, q, meta, ahead, out); break;
#define AUTOGLM_CASE(N) case N: direct_chunk<(kDirectRows >= N ? N : 1)>(type, p, blocks, q, meta, ahead, out); break;
      AUTOGLM_CASE(2) AUTOGLM_CASE(3) AUTOGLM_CASE(4) AUTOGLM_CASE(5) AUTOGLM_CASE(6) AUTOGLM_CASE(7) AUTOGLM_CASE(8)
#undef AUTOGLM_CASE
    }
  });
}

template <int Offset, bool HasMin, bool HasPlane>
void legacy_chunk(const uint8_t* p, int blocks, const Scratch& s, const ActView& x, size_t at, int rows, float* c) {
  unpack_b32<HasMin, HasPlane>(p, blocks, s);
  for_tiles(rows, RunB32<Offset, HasMin, HasPlane ? 5 : 4>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
}

void many_rows_chunk(QuantType type, const uint8_t* p, int blocks, const Scratch& s, const ActView& x, size_t at,
                     int rows, float* c) {
  switch (type) {
    case QuantType::Q4_K:
      unpack_q4_k(p, s);
      return for_tiles(rows, RunK32<4>{s, x.qk + at * kChunk, x.meta_k + at, c});
    case QuantType::Q5_K:
      unpack_q5_k(p, s);
      return for_tiles(rows, RunK32<5>{s, x.qk + at * kChunk, x.meta_k + at, c});
    case QuantType::Q6_K:
      unpack_q6_k(p, s);
      return for_tiles(rows, RunK16{s, x.qk + at * kChunk, x.meta_k + at, c});
    case QuantType::I16:
      return for_tiles(rows, RunI16{p, blocks * 32 / kI16Columns, x.qi + at * kChunk, x.meta_i + at, s.ahead, c});
    case QuantType::Q4_0: return legacy_chunk<3, false, false>(p, blocks, s, x, at, rows, c);
    case QuantType::Q4_1: return legacy_chunk<-1, true, false>(p, blocks, s, x, at, rows, c);
    case QuantType::Q5_0: return legacy_chunk<4, false, true>(p, blocks, s, x, at, rows, c);
    case QuantType::Q5_1: return legacy_chunk<-1, true, true>(p, blocks, s, x, at, rows, c);
    default:
      unpack_q8_0(p, blocks, s);
      for_tiles(rows, RunB32<(kQ8Unsigned ? 7 : -1), false, 8>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
  }
}

void gemm_panels(const PackedMatrix& w, int first, int count, const ActView& x, int row_begin, int rows, float* c,
                 uint8_t* scratch) {
  const uint8_t* p = w.data + (size_t)first * w.panel_bytes;
  const size_t panel = (size_t)rows * kPanelRows;
  if (count > 1 && rows < kGroupRows) {
    for (int i = 0; i < count; ++i) gemm_panels(w, first + i, 1, x, row_begin, rows, c + i * panel, scratch);
    return;
  }
  memset(c, 0, sizeof(float) * panel * (size_t)count);
  if (w.type == QuantType::F32 || w.type == QuantType::F16 || w.type == QuantType::BF16) {
    const int step = kFloatColumns * kPanelRows * float_bytes(w.type);
    for (int k0 = 0; k0 < w.cols; k0 += kFloatColumns, p += step)
      for (int i = 0; i < count; ++i) {
        const uint8_t* here = p + i * w.panel_bytes;
        float_columns(w, here, i + 1 < count ? here + w.panel_bytes : p + step, x, k0, row_begin, rows, c + i * panel,
                      (float*)scratch);
      }
    return;
  }
  Ahead ahead;
  const Scratch s = carve(scratch, &ahead);
  const bool few = rows <= direct_rows(w.type);
  const int further = rows > 4 && count == 1 ? 4096 : 0;  // the products of several rows hide more than one chunk's way
  for (int chunk = 0; chunk < w.chunks; ++chunk) {
    const int left = (w.cols - chunk * kChunk) / 32, blocks = left < kBlocks ? left : kBlocks;
    const size_t at = (size_t)chunk * x.capacity + row_begin;
    const int bytes = (int)chunk_bytes(w.type, blocks), shares = asks(w.type, blocks, rows);
    for (int i = 0; i < count; ++i) {
      const uint8_t *here = p + i * w.panel_bytes, *next = i + 1 < count ? here + w.panel_bytes : p + bytes;
      ahead = {next + further, next + further + bytes, shares ? divide_up(bytes / 64, shares) : 0};
      if (few) few_rows_chunk(w.type, here, blocks, x, at, rows, ahead, c + i * panel);
      else many_rows_chunk(w.type, here, blocks, s, x, at, rows, c + i * panel);
    }
    p += bytes;
  }
}

}  // namespace
