// Repacking moves 4-byte quads and never changes a bit; kernels.h describes the layout it writes.
#include "weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "half.h"

namespace autoglm {

namespace {

uint32_t load_u32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// 6-bit scale and minimum j of a K-quant block.
void scale_min(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) {
  if (j < 4) {
    *scale = s[j] & 63;
    *minimum = s[j + 4] & 63;
  } else {
    *scale = (uint8_t)((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4));
    *minimum = (uint8_t)((s[j + 4] >> 4) | ((s[j] >> 6) << 4));
  }
}

template <class B>
void dequantize_k45(const B& b, const uint8_t* qh, float* y) {
  const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
  for (int j = 0; j < 8; ++j) {
    uint8_t s, m;
    scale_min(b.scales, j, &s, &m);
    const float ds = d * (float)s, dm = dmin * (float)m;
    for (int l = 0; l < 32; ++l) {
      int q = (b.qs[32 * (j / 2) + l] >> (4 * (j & 1))) & 15;
      if (qh) q |= ((qh[l] >> j) & 1) << 4;
      y[32 * j + l] = ds * (float)q - dm;
    }
  }
}

void dequantize_block(QuantType type, const uint8_t* p, float* y) {
  switch (type) {
    case QuantType::Q4_0: case QuantType::Q5_0: {
      const bool five = type == QuantType::Q5_0;
      uint16_t h;
      std::memcpy(&h, p, 2);
      const float d = half_to_float(h);
      const uint32_t qh = five ? load_u32(p + 2) : 0;
      const uint8_t* qs = p + (five ? 6 : 2);
      for (int i = 0; i < 32; ++i) {
        const int q = ((qs[i % 16] >> (4 * (i / 16))) & 15) | (int)(((qh >> i) & 1) << 4);
        y[i] = d * (float)(q - (five ? 16 : 8));
      }
      break;
    }
    case QuantType::Q4_1: case QuantType::Q5_1: {
      const bool five = type == QuantType::Q5_1;
      uint16_t h[2];
      std::memcpy(h, p, 4);
      const float d = half_to_float(h[0]), m = half_to_float(h[1]);
      const uint32_t qh = five ? load_u32(p + 4) : 0;
      const uint8_t* qs = p + (five ? 8 : 4);
      for (int i = 0; i < 32; ++i) {
        const int q = ((qs[i % 16] >> (4 * (i / 16))) & 15) | (int)(((qh >> i) & 1) << 4);
        y[i] = d * (float)q + m;
      }
      break;
    }
    case QuantType::Q8_0: {
      BlockQ8_0 b;
      std::memcpy(&b, p, sizeof b);
      const float d = half_to_float(b.d);
      for (int i = 0; i < 32; ++i) y[i] = d * (float)b.qs[i];
      break;
    }
    case QuantType::I16: {
      BlockI16 b;
      std::memcpy(&b, p, sizeof b);
      for (int i = 0; i < 64; ++i) y[i] = b.d * (float)b.qs[i];
      break;
    }
    case QuantType::Q4_K: {
      BlockQ4_K b;
      std::memcpy(&b, p, sizeof b);
      dequantize_k45(b, nullptr, y);
      break;
    }
    case QuantType::Q5_K: {
      BlockQ5_K b;
      std::memcpy(&b, p, sizeof b);
      dequantize_k45(b, b.qh, y);
      break;
    }
    case QuantType::Q6_K: {
      BlockQ6_K b;
      std::memcpy(&b, p, sizeof b);
      const float d = half_to_float(b.d);
      for (int i = 0; i < 256; ++i) {
        const int h = i / 128, g = (i % 128) / 32, l = i % 32;
        const int lo = (b.ql[64 * h + 32 * (g & 1) + l] >> (4 * (g >> 1))) & 15;
        const int hi = (b.qh[32 * h + l] >> (2 * g)) & 3;
        y[i] = d * (float)b.scales[i / 16] * (float)((lo | hi << 4) - 32);
      }
      break;
    }
    default: break;
  }
}

// Writes four source bytes (one row, one quad of columns) into vector `vec` of a panel area.
void put_quad(uint8_t* area, int vec, int row, const uint8_t* src) {
  std::memcpy(area + vec * 128 + (row / 16) * 64 + (row % 16) * 4, src, 4);
}

void put_half(uint8_t* area, int row, uint16_t h) { std::memcpy(area + 2 * row, &h, 2); }

// Bit 4 * quad + byte of qh -> bit `quad` of plane byte `byte`.
void put_plane(uint8_t* plane, int row, uint32_t qh) {
  uint8_t out[4];
  for (int b = 0; b < 4; ++b) {
    uint32_t x = (qh >> b) & 0x11111111u;
    x = (x | x >> 3) & 0x03030303u;
    x = (x | x >> 6) & 0x000f000fu;
    out[b] = (uint8_t)(x | x >> 12);
  }
  std::memcpy(plane + (row / 16) * 64 + (row % 16) * 4, out, 4);
}

struct LegacyShape {
  int m_at, qh_at, qs_at;  // byte offsets in the source block; 0 where absent
};

LegacyShape legacy_shape(QuantType type) {
  switch (type) {
    case QuantType::Q4_0: return {0, 0, 2};
    case QuantType::Q4_1: return {2, 0, 4};
    case QuantType::Q5_0: return {0, 2, 6};
    default: return {2, 4, 8};
  }
}

uint8_t* pack_legacy(QuantType type, const uint8_t* block, int row, uint8_t* out) {
  const LegacyShape shape = legacy_shape(type);
  uint16_t h;
  std::memcpy(&h, block, 2);
  put_half(out, row, h);
  out += 64;
  if (shape.m_at) {
    std::memcpy(&h, block + shape.m_at, 2);
    put_half(out, row, h);
    out += 64;
  }
  if (shape.qh_at) {
    put_plane(out, row, load_u32(block + shape.qh_at));
    out += 128;
  }
  for (int v = 0; v < 4; ++v) put_quad(out, v, row, block + shape.qs_at + 4 * v);
  return out + 512;
}

void pack_k_scales(uint16_t d, uint16_t dmin, const uint8_t* scales, int row, uint8_t* out) {
  put_half(out, row, d);
  put_half(out + 64, row, dmin);
  for (int j = 0; j < 8; ++j) {
    uint8_t s, m;
    scale_min(scales, j, &s, &m);
    out[128 + 32 * j + row] = s;
    out[128 + 256 + 64 * (j / 2) + 2 * row + (j & 1)] = m;
  }
}

template <class B>
uint8_t* pack_k45(const uint8_t* block, const uint8_t* qh, int row, uint8_t* out) {
  B b;
  std::memcpy(&b, block, sizeof b);
  pack_k_scales(b.d, b.dmin, b.scales, row, out);
  out += 640;
  if (qh) {
    for (int v = 0; v < 8; ++v) put_quad(out, v, row, qh + 4 * v);
    out += 1024;
  }
  for (int v = 0; v < 32; ++v) put_quad(out, v, row, b.qs + 4 * v);
  return out + 4096;
}

uint8_t* pack_q6_k(const uint8_t* block, int row, uint8_t* out) {
  BlockQ6_K b;
  std::memcpy(&b, block, sizeof b);
  put_half(out, row, b.d);
  for (int j = 0; j < 16; ++j) out[64 + 32 * j + row] = (uint8_t)b.scales[j];
  out += 576;
  // [half of the columns][quad][nibbles, nibbles, high bits]: what is multiplied together lies together.
  for (int v = 0; v < 32; ++v) put_quad(out, 24 * (v / 16) + 3 * (v % 8) + v / 8 % 2, row, b.ql + 4 * v);
  for (int v = 0; v < 16; ++v) put_quad(out, 24 * (v / 8) + 3 * (v % 8) + 2, row, b.qh + 4 * v);
  return out + 6144;
}

uint8_t* pack_block(QuantType type, const uint8_t* block, int row, uint8_t* out) {
  switch (type) {
    case QuantType::Q4_K: return pack_k45<BlockQ4_K>(block, nullptr, row, out);
    case QuantType::Q5_K: return pack_k45<BlockQ5_K>(block, block + 16, row, out);
    case QuantType::Q6_K: return pack_q6_k(block, row, out);
    case QuantType::I16:
      std::memcpy(out + 4 * row, block, 4);
      for (int pair = 0; pair < 32; ++pair) put_quad(out + 128, pair, row, block + 4 + 4 * pair);
      return out + 128 + 4096;
    case QuantType::Q8_0: {
      uint16_t h;
      std::memcpy(&h, block, 2);
      put_half(out, row, h);
      for (int v = 0; v < 8; ++v) put_quad(out + 64, v, row, block + 2 + 4 * v);
      return out + 1088;
    }
    default: return pack_legacy(type, block, row, out);
  }
}

bool is_float(QuantType t) { return t == QuantType::F32 || t == QuantType::F16 || t == QuantType::BF16; }

size_t packed_block_bytes(QuantType type) {  // of 32 rows
  uint8_t sink[8192], block[256] = {};
  return (size_t)(pack_block(type, block, 0, sink) - sink);
}

template <class T>
void pack_floats(const uint8_t* src, int rows, int cols, uint8_t* out) {
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < cols; ++k)
      std::memcpy(out + ((size_t)k * kPanelRows + r) * sizeof(T), src + ((size_t)r * cols + k) * sizeof(T), sizeof(T));
}

// `rows` rows, of up to 32, that follow each other in src. Rows within blocks: a block's vectors stay in the first
// cache while all rows are put into them, which is twice as fast as row by row.
void pack_panel(QuantType type, const uint8_t* src, int rows, int cols, uint8_t* out) {
  const size_t src_block = block_bytes(type);
  if (is_float(type)) return src_block == 4 ? pack_floats<float>(src, rows, cols, out) : pack_floats<uint16_t>(src, rows, cols, out);
  const int blocks = cols / block_elements(type);
  for (int b = 0; b < blocks; ++b) {
    uint8_t* end = out;
    for (int r = 0; r < rows; ++r) end = pack_block(type, src + ((size_t)r * blocks + b) * src_block, r, out);
    out = end;
  }
}

// One read of a file, at least; the larger the fewer, but what is read should still be in the second cache.
constexpr size_t kReadBytes = 64 << 10;

}  // namespace

bool known_type(int id) {
  switch ((QuantType)id) {
    case QuantType::F32: case QuantType::F16: case QuantType::Q4_0: case QuantType::Q4_1: case QuantType::Q5_0:
    case QuantType::Q5_1: case QuantType::Q8_0: case QuantType::Q4_K: case QuantType::Q5_K: case QuantType::Q6_K:
    case QuantType::BF16: case QuantType::I16: return true;
  }
  return false;
}

int block_elements(QuantType type) {
  switch (type) {
    case QuantType::F32: case QuantType::F16: case QuantType::BF16: return 1;
    case QuantType::Q4_K: case QuantType::Q5_K: case QuantType::Q6_K: return 256;
    case QuantType::I16: return 64;
    default: return 32;
  }
}

size_t block_bytes(QuantType type) {
  switch (type) {
    case QuantType::F32: return 4;
    case QuantType::F16: case QuantType::BF16: return 2;
    case QuantType::Q4_0: return sizeof(BlockQ4_0);
    case QuantType::Q4_1: return sizeof(BlockQ4_1);
    case QuantType::Q5_0: return sizeof(BlockQ5_0);
    case QuantType::Q5_1: return sizeof(BlockQ5_1);
    case QuantType::Q8_0: return sizeof(BlockQ8_0);
    case QuantType::Q4_K: return sizeof(BlockQ4_K);
    case QuantType::Q5_K: return sizeof(BlockQ5_K);
    case QuantType::Q6_K: return sizeof(BlockQ6_K);
    case QuantType::I16: return sizeof(BlockI16);
  }
  throw std::invalid_argument("unknown weight type");
}

size_t row_bytes(QuantType type, int cols) {
  if (cols % block_elements(type)) throw std::invalid_argument("row length is not a whole number of blocks");
  return (size_t)(cols / block_elements(type)) * block_bytes(type);
}

ActKind activation_kind(QuantType type) {
  if (is_float(type)) return ActKind::Float;
  if (type == QuantType::I16) return ActKind::I16;
  return block_elements(type) == 256 ? ActKind::K256 : ActKind::B32;
}

void dequantize(QuantType type, const uint8_t* src, size_t n, float* dst) {
  if (type == QuantType::F32) {
    std::memcpy(dst, src, 4 * n);
  } else if (is_float(type)) {
    for (size_t i = 0; i < n; ++i) {
      uint16_t h;
      std::memcpy(&h, src + 2 * i, 2);
      if (type == QuantType::F16) {
        dst[i] = half_to_float(h);
      } else {
        const uint32_t bits = (uint32_t)h << 16;
        std::memcpy(dst + i, &bits, 4);
      }
    }
  } else {
    const size_t per = (size_t)block_elements(type), bytes = block_bytes(type);
    for (size_t b = 0; b * per < n; ++b) dequantize_block(type, src + b * bytes, dst + b * per);
  }
}

Matrix::Matrix(QuantType stored, int rows, int cols, bool in_floats, Slabs& slabs)
    : stored_(stored), slabs_(slabs) {
  const QuantType type = in_floats && !is_float(stored) ? QuantType::F32 : stored;
  view_ = {type, rows, cols, (rows + kPanelRows - 1) / kPanelRows, (cols + kChunk - 1) / kChunk, 0, nullptr};
  (void)row_bytes(stored, cols);  // refuses a row that is no whole number of blocks
  view_.panel_bytes = is_float(type) ? (row_bytes(type, cols) * kPanelRows + 63) / 64 * 64
                                     : (size_t)(cols / block_elements(type)) * packed_block_bytes(type);
  piece_ = slabs.cut(view_.panel_bytes * (size_t)view_.panels + 4096);  // slack: kernels prefetch past the end
  view_.data = piece_.data;
}

int Matrix::fill(const Rows& src, ThreadPool& pool) {
  // A few panels at a time, so that small ones need few reads, but no fewer pieces than threads.
  const size_t src_panel = row_bytes(stored_, view_.cols) * kPanelRows;
  const int group = std::clamp((int)(kReadBytes / src_panel), 1, std::max(1, view_.panels / pool.size()));
  std::vector<Pages> buffers((size_t)pool.size());
  std::atomic<int> next{0}, code{0};
  // In the order of the file, of which what comes next is asked for.
  pool.parallel_for(pool.size(), [&](int, int thread) {
    for (int first; !code && (first = group * next++) < view_.panels;) {
      const int failed = fill_group(src, first, std::min(first + group, view_.panels), buffers[(size_t)thread]);
      if (failed) code = failed;
    }
  });
  settle(code);
  return code;
}

// Panels [first, end). The buffer takes what is read, and behind it a panel in floats; it is made for the first group.
int Matrix::fill_group(const Rows& src, int first, int end, Pages& buffer) {
  const int cols = view_.cols;
  const bool unpacks = view_.type != stored_;
  const size_t src_panel = row_bytes(stored_, cols) * kPanelRows, at = (size_t)first * src_panel;
  const size_t read_bytes = src.file ? (size_t)(end - first) * src_panel : 0;
  const size_t floats_at = (read_bytes + 63) / 64 * 64, per_row = (size_t)cols;
  if (!buffer.data() && (src.file || unpacks))
    buffer = Pages(floats_at + (unpacks ? per_row * kPanelRows * sizeof(float) : 0));
  const uint8_t* in = buffer.data();
  if (src.file) {
    const int code = src.file->read(src.offset + at, std::min(read_bytes, source_bytes() - at), buffer.data());
    if (code) return code;
  } else {
    in = src.memory + at;
  }
  slabs_.hand_out(piece_, (size_t)first * view_.panel_bytes, (size_t)(end - first) * view_.panel_bytes);
  for (int panel = first; panel < end; ++panel, in += src_panel) {
    const int rows = std::min(kPanelRows, view_.rows - panel * kPanelRows);
    const uint8_t* panel_in = in;
    if (unpacks) {
      float* floats = (float*)(buffer.data() + floats_at);
      dequantize(stored_, in, per_row * (size_t)rows, floats);
      panel_in = (const uint8_t*)floats;
    }
    pack_panel(view_.type, panel_in, rows, cols, piece_.data + (size_t)panel * view_.panel_bytes);
  }
  return 0;
}

void Matrix::settle(int code) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    state_ = code;
  }
  settled_.notify_all();
}

void Matrix::wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  settled_.wait(lock, [&] { return state_ != kEmpty; });
  if (state_) throw ReadError{state_};
}

}  // namespace autoglm
