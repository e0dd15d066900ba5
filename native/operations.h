// What a program can do, one operation a struct: what it works on, its pieces of work, and the loop over them.
//
// Included by program.cpp alone, which builds them.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "program.h"

namespace autoglm {

// Rows handled per visit of a weight panel, at most: activations of a chunk and the panels' accumulators stay in L2.
constexpr int kRowBlock = 258;  // a multiple of every tile's rows
// Panels a piece of work takes of kGroupRows rows or more: fewer readings of the activations, longer pieces of a row written.
constexpr int kPanelGroup = 8;
// Rows a step that is run in slices does between two looks at the clock, at most: several blocks share one loop.
constexpr int kSliceRows = 8 * kRowBlock;

constexpr int kStoreAhead = 8;  // rows

// Rows in blocks as even as possible.
struct RowBlocks {
  int first, count, blocks;
  RowBlocks(int first, int end) : first(first), count(end - first), blocks((count + kRowBlock - 1) / kRowBlock) {}
  int begin(int block) const { return first + (int)((int64_t)count * block / blocks); }
  int rows(int block) const { return begin(block + 1) - begin(block); }
};

// Panels a piece of work takes of n rows and so many panels in all: fewer where threads would have nothing to do.
inline int panel_group(int n, int panels, int threads) {
  int group = n >= kGroupRows ? kPanelGroup : 1;
  while (group > 1 && panels < 2 * group * threads) group /= 2;
  return group;
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

using Clock = std::chrono::steady_clock;
inline double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// As the pool's; while profiling, what each thread works is added up.
template <class F>
void Program::parallel_for(int count, const F& f) {
  if (!profiling_) return pool_.parallel_for(count, f, next_pieces());
  pool_.parallel_for(count, [&](int i, int thread) {
    const auto start = Clock::now();
    f(i, thread);
    busy_[(size_t)thread].value += since(start);
  }, next_pieces());
}

// A product of n rows: the weights are read once for every kRowBlock rows, the multiply-adds are those of real rows.
inline void count_product(const PackedMatrix& m, int n, Work* work) {
  const double macs = (double)m.rows * m.cols * n;
  work->bytes += (double)m.panels * (double)m.panel_bytes * ((n + kRowBlock - 1) / kRowBlock);
  const ActKind kind = activation_kind(m.type);
  (kind == ActKind::Float ? work->float_macs : kind == ActKind::I16 ? work->int16_macs : work->int8_macs) += macs;
}

inline void describe_weights(const PackedMatrix& m, OpProfile* profile) {
  profile->rows += m.rows;
  profile->cols = m.cols;
  auto& types = profile->types;
  if (std::find(types.begin(), types.end(), (int)m.type) == types.end()) types.push_back((int)m.type);
}

struct Program::Op {
  bool logits = false;  // rows are Step::logits_rows, not all tokens
  OpProfile profile;
  virtual ~Op() = default;
  virtual const char* name() const = 0;
  // Independent pieces of work in a step: rows, unless an operation counts otherwise.
  virtual int count(const Step& step) const { return logits ? step.num_logits : step.num_tokens; }
  // How many of them a step that is run in slices does between two looks at the clock, at most and at least.
  virtual int slice(const Program&) const { return kSliceRows; }
  virtual int least_slice(const Program& p) const { return std::min(slice(p), kGroupRows); }
  int fitted_slice = 0;  // what the time per slice has left of it; 0: not known yet
  virtual void run(Program& p, const Step& step, int begin, int end) = 0;
  // Of a whole step, run in one piece; nothing where neither weights nor the cache are read.
  virtual Work work(const Program&, const Step&) const { return {}; }
  // The weights its threads share out in a step of few rows, and those of the next operation that has some.
  virtual Pieces pieces() const { return {}; }
  Pieces next;
};

struct Program::Embed : Op {
  const char* name() const override { return "embed"; }
  QuantType type;
  const uint8_t* table;
  size_t row_size;
  int width;
  Buffer* out;
  void run(Program& p, const Step& step, int begin, int end) override {
    p.parallel_for(end - begin, [&](int i, int) {
      const int r = begin + i, id = step.token_ids[r];
      if (id < 0)
        std::memcpy(out->row(r), step.embeddings + (size_t)(-1 - id) * (size_t)width, sizeof(float) * (size_t)width);
      else
        dequantize(type, table + (size_t)id * row_size, (size_t)width, out->row(r));
    });
  }
  Work work(const Program&, const Step& step) const override {
    Work w;
    for (int t = 0; t < step.num_tokens; ++t) w.bytes += step.token_ids[t] < 0 ? 0 : (double)row_size;
    return w;
  }
};

inline void apply_norm(const KernelTable& kernels, const float* x, const std::vector<float>& weight, const std::vector<float>& bias,
               float eps, int width, float* out) {
  if (bias.empty())
    kernels.rms_norm(x, weight.data(), eps, width, out);
  else
    kernels.layer_norm(x, weight.data(), bias.data(), eps, width, out);
}

struct Program::Norm : Op {
  const char* name() const override { return "norm"; }
  Buffer *x, *branch;
  std::vector<float> post_weight, weight, bias;  // with a bias a LayerNorm
  float eps;
  Activation* act;
  void run(Program& p, const Step&, int begin, int end) override {
    const ActView out = act->view();
    p.parallel_for(end - begin, [&](int i, int thread) {
      const int r = begin + i;
      float *row = x->row(r), *normed = (float*)p.scratch(thread);
      if (branch) {
        const float* b = branch->row(r);
        if (!post_weight.empty()) {
          p.kernels_.rms_norm(b, post_weight.data(), eps, x->width, normed);
          b = normed;
        }
        p.kernels_.add(row, b, x->width);
      }
      apply_norm(p.kernels_, row, weight, bias, eps, x->width, normed);
      for (int c = 0; c < act->chunks(); ++c) p.kernels_.quantize_chunk(normed + c * kChunk, c, out, r);
    });
  }
};

struct Program::Normalize : Op {
  const char* name() const override { return "norm"; }
  Buffer *x, *out;
  std::vector<float> weight, bias;
  float eps;
  void run(Program& p, const Step&, int begin, int end) override {
    p.parallel_for(end - begin, [&](int i, int) {
      apply_norm(p.kernels_, x->row(begin + i), weight, bias, eps, x->width, out->row(begin + i));
    });
  }
};

struct Program::Quantize : Op {
  const char* name() const override { return "quantize"; }
  Buffer* x;
  Activation* act;
  Unary function;
  void run(Program& p, const Step&, int begin, int end) override {
    const ActView out = act->view();
    p.parallel_for(end - begin, [&](int i, int) {
      const int r = begin + i;
      // In place: whoever asks for a function of a buffer has no other use for it.
      if (function == Unary::Gelu) p.kernels_.gelu(x->row(r), round_up(x->width, 16), x->row(r));
      for (int c = 0; c < act->chunks(); ++c) p.kernels_.quantize_chunk(x->row(r) + c * kChunk, c, out, r);
    });
  }
};

struct Program::Linear : Op {
  std::string label;
  const char* name() const override { return label.c_str(); }
  Activation* act;
  std::vector<Part> parts;
  Buffer* out;
  bool accumulate;
  float scale = 1.0f;  // of what is accumulated

  // One row of one panel.
  void store(const Part& part, int panel, const float* src, float* dst) const {
    const int r0 = panel * kPanelRows, n = std::min(kPanelRows, part.matrix->view().rows - r0);
    const float* bias = part.bias.empty() ? nullptr : part.bias.data() + r0;
    dst += part.column + r0;
    if (accumulate) {
      for (int i = 0; i < n; ++i) dst[i] += scale * (bias ? src[i] + bias[i] : src[i]);
    } else if (bias) {
      for (int i = 0; i < n; ++i) dst[i] = src[i] + bias[i];
    } else {
      std::memcpy(dst, src, sizeof(float) * (size_t)n);
    }
  }

  int panels() const {
    int sum = 0;
    for (const Part& part : parts) sum += part.matrix->view().panels;
    return sum;
  }

  void run(Program& p, const Step&, int first, int end) override {
    const ActView in = act->view();
    const RowBlocks blocks(first, end);
    const int group = panel_group(blocks.rows(0), panels(), p.pool_.size());
    const auto pieces = [&](const Part& part) { return (part.matrix->view().panels + group - 1) / group; };
    int total = 0;
    for (const Part& part : parts) total += pieces(part);
    p.parallel_for(blocks.blocks * total, [&](int i, int thread) {
      const int begin = blocks.begin(i / total), n = blocks.rows(i / total);
      i %= total;
      const Part* part = parts.data();
      for (; i >= pieces(*part); ++part) i -= pieces(*part);
      const PackedMatrix& w = part->matrix->view();
      const int panel = i * group, count = std::min(group, w.panels - panel);
      uint8_t* scratch = p.scratch(thread);
      float* c = (float*)(scratch + kGemmScratch);
      p.kernels_.gemm_panels(w, panel, count, in, begin, n, c, scratch);
      const int column = part->column + panel * kPanelRows, width = count * kPanelRows;
      for (int t = 0; t < n; ++t) {
        // Rows lie too far apart for the processor to see them coming.
        const float* soon = out->row(begin + std::min(t + kStoreAhead, n - 1)) + column;
        for (int j = 0; j < width; j += 16) __builtin_prefetch(soon + j, 1);
        for (int j = 0; j < count; ++j) store(*part, panel + j, c + (j * n + t) * kPanelRows, out->row(begin + t));
      }
    });
  }

  Pieces pieces() const override {
    const PackedMatrix& first = parts[0].matrix->view();
    return {first.data, first.panel_bytes, panels()};
  }
  Work work(const Program&, const Step& step) const override {
    Work w;
    for (const Part& part : parts) count_product(part.matrix->view(), count(step), &w);
    return w;
  }
};

struct Program::GatedMlp : Op {
  const char* name() const override { return "gate_up"; }
  Activation *act, *result;
  std::shared_ptr<Matrix> gate, up;
  // One item is 256 columns of the hidden layer: the span one activation scale covers.
  void run(Program& p, const Step&, int first, int end) override {
    const ActView in = act->view(), out = result->view();
    const int per_chunk = kChunk / kPanelRows;
    const RowBlocks blocks(first, end);
    const int chunks = result->chunks();
    p.parallel_for(blocks.blocks * chunks, [&](int i, int thread) {
      const int begin = blocks.begin(i / chunks), n = blocks.rows(i / chunks), chunk = i % chunks;
      const int size = n * kPanelRows, group = n >= kGroupRows ? kPanelGroup / 2 : per_chunk;
      uint8_t* scratch = p.scratch(thread);
      float *g = (float*)(scratch + kGemmScratch), *u = g + group * size, *h = u + group * size;
      const int last = std::min(gate->view().panels, (chunk + 1) * per_chunk);
      for (int panel = chunk * per_chunk; panel < last; panel += group) {
        const int count = std::min(group, last - panel);
        p.kernels_.gemm_panels(gate->view(), panel, count, in, begin, n, g, scratch);
        p.kernels_.gemm_panels(up->view(), panel, count, in, begin, n, u, scratch);
        for (int j = 0; j < count; ++j)
          p.kernels_.silu_mul(g + j * size, u + j * size, n, h + (panel + j) % per_chunk * kPanelRows, kChunk);
      }
      for (int t = 0; t < n; ++t) p.kernels_.quantize_chunk(h + t * kChunk, chunk, out, begin + t);
    });
  }
  Pieces pieces() const override {
    const PackedMatrix& w = gate->view();
    return {w.data, w.panel_bytes * (kChunk / kPanelRows), result->chunks()};
  }
  Work work(const Program&, const Step& step) const override {
    Work w;
    for (const auto& m : {gate, up}) count_product(m->view(), count(step), &w);
    return w;
  }
};

inline const float* rope_of(const Step& step, const RopeConfig& rope, int token) {
  return step.rope.data() + (size_t)token * (size_t)rope.rotary_dim;
}

// Rotates the queries of one row and divides them by the root of their length, so that attention need not.
inline void turn_queries(const KernelTable& kernels, const RopeConfig& rope, const float* cs, int num_heads, float* q) {
  const float scale = 1.0f / std::sqrt((float)rope.head_dim);
  for (int h = 0; h < num_heads; ++h, q += rope.head_dim)
    kernels.rotate(cs, rope.rotary_dim / 2, rope.interleaved, scale, rope.head_dim, q);
}

struct Program::RopeQueries : Op {
  const char* name() const override { return "rope_queries"; }
  Buffer* q;
  void run(Program& p, const Step& step, int begin, int end) override {
    p.parallel_for(end - begin, [&](int i, int) {
      const int r = begin + i, token = logits ? step.logits_rows[r] : r;
      turn_queries(p.kernels_, p.rope_, rope_of(step, p.rope_, token), p.num_heads_, q->row(r));
    });
  }
};

struct Program::RopeCache : Op {
  const char* name() const override { return "rope_cache"; }
  Buffer* rows;      // [q | k | v], or [k | v]
  bool has_queries;
  int layer;

  void run(Program& p, const Step& step, int begin, int end) override {
    const KvLayer& kv = p.cache_->layer(layer);
    const int d = p.rope_.head_dim;
    p.parallel_for(end - begin, [&](int i, int) {
      const int r = begin + i;
      const float* cs = rope_of(step, p.rope_, r);
      float* keys = rows->row(r);
      if (has_queries) {
        turn_queries(p.kernels_, p.rope_, cs, p.num_heads_, keys);
        keys += p.num_heads_ * d;
      }
      const int slot = step.slot_mapping[r];
      for (int h = 0; h < kv.num_kv_heads; ++h) {
        float *k = keys + h * d, *v = keys + (kv.num_kv_heads + h) * d;
        p.kernels_.rotate(cs, p.rope_.rotary_dim / 2, p.rope_.interleaved, 1.0f, d, k);
        p.kernels_.kv_write(kv, slot / kKvBlock, slot % kKvBlock, h, k, v);
      }
    });
  }
};

// How many keys token t of a sequence sees: without limits those up to itself, at context_len - (tokens after it).
inline int keys_of(const Step& step, int seq, int t) {
  return step.limits ? step.limits[t] : step.context_lens[seq] - (step.cu_seqlens_q[seq + 1] - 1 - t);
}

struct Program::Attend : Op {
  const char* name() const override { return "attention"; }
  Buffer *queries, *out;
  int layer;
  const std::vector<Step::AttnItem>& items(const Step& step) const { return logits ? step.attention_wanted : step.attention; }
  int count(const Step& step) const override { return (int)items(step).size(); }
  int slice(const Program& p) const override { return 2 * p.pool_.size(); }
  void run(Program& p, const Step& step, int begin, int end) override {
    const int d = p.rope_.head_dim;
    p.parallel_for(end - begin, [&](int i, int thread) {
      const Step::AttnItem& item = items(step)[(size_t)(begin + i)];
      const float* q[kAttnRows];
      float* o[kAttnRows];
      int32_t limit[kAttnRows];
      int rows = 0;
      for (int t = item.token_begin; t < item.token_end; ++t)
        for (int h = item.head_begin; h < item.head_end; ++h, ++rows) {
          const int row = item.row + t - item.token_begin;
          q[rows] = queries->row(row) + h * d;
          o[rows] = out->row(row) + h * d;
          limit[rows] = keys_of(step, item.seq, t);
        }
      p.kernels_.attention(p.cache_->layer(layer),
                           {q, o, limit, rows, step.block_tables + (size_t)item.seq * (size_t)step.max_blocks, item.kv_head},
                           p.scratch(thread));
    });
  }
  // The cache counts once a step, though the rows of a prompt go over it again and again: those find it in a cache.
  Work work(const Program& p, const Step& step) const override {
    const KvLayer& kv = p.cache_->layer(layer);
    Work w;
    std::vector<int> most((size_t)step.num_seqs);  // keys a sequence's rows see
    for (const Step::AttnItem& item : items(step))
      for (int t = item.token_begin; t < item.token_end; ++t) {
        const int keys = keys_of(step, item.seq, t);
        most[(size_t)item.seq] = std::max(most[(size_t)item.seq], keys);
        for (KvType type : {kv.k_type, kv.v_type})
          (type == KvType::I16 ? w.int16_macs : w.float_macs) += (double)keys * (item.head_end - item.head_begin) * kv.head_dim;
      }
    for (int keys : most) w.bytes += (double)((keys + kKvBlock - 1) / kKvBlock) * kv.num_kv_heads * (double)(kv.k_bytes + kv.v_bytes);
    return w;
  }
};

struct Program::PackHeads : Op {
  const char* name() const override { return "pack_heads"; }
  Buffer* qkv;
  int count(const Step& step) const override { return (step.num_tokens + kAttnKeys - 1) / kAttnKeys; }
  int slice(const Program& p) const override { return 2 * p.pool_.size(); }
  void run(Program& p, const Step& step, int begin, int end) override {
    const FullHeads& heads = p.full_heads_;
    p.parallel_for(end - begin, [&](int i, int) {
      for (int h = 0; h < heads.num_heads; ++h)
        p.kernels_.pack_heads(heads, h, begin + i, qkv->row(0), (size_t)qkv->stride, step.rope.data(), p.rope_.rotary_dim / 2,
                              p.rope_.interleaved);
    });
  }
};

struct Program::FullAttend : Op {
  const char* name() const override { return "full_attention"; }
  Buffer* out;
  // Head by head, so that the keys and values of one stay in the cache.
  int num_heads;
  static int blocks(const Step& step) { return (step.num_tokens + kFullRows - 1) / kFullRows; }
  int count(const Step& step) const override { return num_heads * blocks(step); }
  int slice(const Program& p) const override { return 16 * least_slice(p); }
  int least_slice(const Program& p) const override { return 4 * p.pool_.size(); }
  void run(Program& p, const Step& step, int begin, int end) override {
    const FullHeads& heads = p.full_heads_;
    p.parallel_for(end - begin, [&](int i, int thread) {
      const int head = (begin + i) / blocks(step), first = (begin + i) % blocks(step) * kFullRows;
      const int rows = std::min(kFullRows, step.num_tokens - first);
      float* o[kFullRows];
      for (int r = 0; r < rows; ++r) o[r] = out->row(first + r) + head * heads.head_dim;
      p.kernels_.full_attention(heads, head, first, rows, o, p.scratch(thread));
    });
  }
};

struct Program::Gather : Op {
  const char* name() const override { return "gather"; }
  Buffer *x, *out;
  void run(Program& p, const Step& step, int begin, int end) override {
    p.parallel_for(end - begin, [&](int i, int) {
      const int r = begin + i;
      std::memcpy(out->row(r), x->row(step.logits_rows[r]), sizeof(float) * (size_t)x->width);
    });
  }
};

}  // namespace autoglm
