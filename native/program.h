// A network as a list of operations over named buffers, built once and run with one call a step.
//
// Python composes it (model/text.py reads like the paper); running it touches no Python. Each
// operation is one or two parallel loops; a buffer holds one row per token of the step.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"
#include "weights.h"

namespace autoglm {

struct Buffer {  // f32 [capacity][stride], zero-initialized
  int width, stride;
  Pages pages;
  float* row(int r) const { return (float*)pages.data() + (size_t)r * stride; }
};

// A quantized (or float) activation; the forms it needs follow from the weights that read it.
struct Activation {
  int width, capacity;
  Pages qk, meta_k, qb, meta_b, qi, meta_i, f32;
  void need(ActKind kind);
  ActView view() const;
  void populate(int rows) const;
  int chunks() const { return (width + kChunk - 1) / kChunk; }
};

struct RopeConfig {
  int head_dim, rotary_dim;
  bool interleaved;         // pair j is dims (2j, 2j + 1), else (j, j + rotary_dim / 2)
  int sections[3];          // pairs per axis t, h, w; {rotary_dim / 2, 0, 0} for plain rotation
  std::vector<float> inv_freq;  // [rotary_dim / 2]
};

// The paged cache of all layers.
class KvCache {
 public:
  KvCache(int num_layers, int num_blocks, int num_kv_heads, int head_dim, KvType k, KvType v);
  const KvLayer& layer(int i) const { return layers_[(size_t)i]; }
  int num_layers() const { return (int)layers_.size(); }
  int num_blocks() const { return num_blocks_; }
  int num_kv_heads() const { return layers_[0].num_kv_heads; }
  int head_dim() const { return layers_[0].head_dim; }
  size_t nbytes() const { return pages_.size(); }
  // Memory of the first blocks, which are the first to be handed out.
  void populate(int blocks) const;
  // Overwrites all of it with one small number: pages nobody wrote are all one page of zeros, too fast to be timed.
  void fill();
  static size_t block_bytes(int num_kv_heads, int head_dim, KvType k, KvType v);  // one layer, one block

 private:
  int num_blocks_;
  Pages pages_;
  std::vector<KvLayer> layers_;
};

// What one step works on. All arrays are read only; see engine/batch.py.
struct Step {
  int num_tokens = 0, num_seqs = 0, max_blocks = 0, num_logits = 0;
  const int32_t *token_ids, *positions;   // [T], [3][T]
  const int32_t *slot_mapping;            // [T]
  const int32_t *cu_seqlens_q;            // [S + 1]
  const int32_t *context_lens;            // [S]
  const int32_t *block_tables;            // [S][max_blocks]
  const int32_t *limits = nullptr;        // [T] keys each row may see, never falling within a sequence; null: up to itself
  const float *embeddings = nullptr;      // [M][D]: a token id of -1 - i stands for row i
  int num_embeddings = 0;
  const int32_t *logits_rows;             // [L]

  struct AttnItem { int seq, kv_head, token_begin, token_end, head_begin, head_end, row; };  // row: of token_begin
  std::vector<AttnItem> attention;        // of all tokens, longest first
  std::vector<AttnItem> attention_wanted;  // of those in logits_rows
  std::vector<float> rope;                // [T][rotary_dim / 2][cos, sin]
};

// What an operation has to do in one step: bytes of weights or cached keys and values it reads, multiply-adds.
struct Work { double bytes = 0, int8_macs = 0, int16_macs = 0, float_macs = 0; };

// One operation's totals since profiling was switched on. busy_s is summed over the threads: seconds * threads - busy_s
// is what they waited, for each other or for work.
struct OpProfile {
  std::string name;
  int rows = 0, cols = 0;   // of its weights, 0 where it has none
  std::vector<int> types;   // of its weights, each once
  int calls = 0;
  double seconds = 0, busy_s = 0;
  Work work;
};

class Program {
 public:
  Program(const KernelTable& kernels, ThreadPool& pool, int max_tokens);
  ~Program();

  // Every builder returns an index or nothing and throws std::invalid_argument on a shape mismatch.
  int buffer(int width);
  int activation(int width);
  void embed(QuantType type, const uint8_t* table, int vocab, int width, int out);
  // x += branch (normed by post_weight, if given); act = quantize(rms_norm(x, weight)). branch may be -1.
  void norm(int x, int branch, std::vector<float> post_weight, std::vector<float> weight, float eps, int act);
  // The same with LayerNorm: x += branch; act = quantize(layer_norm(x, weight, bias)).
  void layer_norm(int x, int branch, std::vector<float> weight, std::vector<float> bias, float eps, int act);
  // out = rms_norm(x, weight), or layer_norm with a bias; out may be x.
  void normalize(int x, std::vector<float> weight, std::vector<float> bias, float eps, int out);
  enum class Unary { None, Gelu };
  void quantize(int x, int act, Unary function = Unary::None);
  // out[:, column .. column + rows) = W act (+ bias), or += scale * (...) with accumulate. Several matrices share one loop.
  struct Part { std::shared_ptr<Matrix> matrix; std::vector<float> bias; int column; };
  // `name` stands in its profile.
  void linear(int act, std::vector<Part> parts, int out, bool accumulate, float scale = 1.0f, std::string name = "linear");
  // result = quantize(silu(gate act) * (up act)), never leaving the cache in float
  void gated_mlp(int act, std::shared_ptr<Matrix> gate, std::shared_ptr<Matrix> up, int result);
  void set_attention(RopeConfig rope, std::shared_ptr<KvCache> cache, int num_heads);
  // Of rows [q | k | v], or [k | v] where nobody has a query yet: rotate q and k, scale q, write k and v into the cache
  // of `layer`.
  void rope_cache(int rows, int layer);
  // The same for rows that begin with q, whose keys and values another rope_cache writes.
  void rope_queries(int q);
  // Rows that begin with q, rotated and scaled.
  void attention(int q, int layer, int out);
  // Instead of set_attention, rope_cache and attention, where every row of the one sequence sees every other:
  // whole-number attention over packed copies (full_attention.h). As many heads of keys as of queries.
  void set_full_attention(RopeConfig rope, int num_heads);
  static size_t full_attention_bytes(int num_rows, int num_heads, int head_dim);  // of the packed copies
  void full_attention(int qkv, int out);
  // From here on rows are those of Step::logits_rows.
  void gather(int x, int out);
  // The rows of buffer x are the step's result.
  void result(int x);

  // Memory for a step of so many tokens of a first prompt, handed out by the system on a thread beside whoever goes on:
  // the first step would wait for it otherwise. Once, when the program is complete.
  void populate_in_background(int tokens);

  // Inputs must have been checked. Afterwards the result rows stand in result_rows() until the next start.
  void start(Step step);
  // Goes on for about so many seconds; whether the step is done. What is computed does not depend on where it paused.
  bool advance(double seconds);
  const float* result_rows() const;
  int max_tokens() const { return max_tokens_; }
  int result_width() const;
  int vocab() const { return vocab_; }
  int embedding_width() const { return embedding_width_; }
  const KvCache* cache() const { return cache_.get(); }
  const Buffer& buffer_at(int i) const { return *buffers_.at((size_t)i); }
  size_t nbytes() const;

  // Switching it on (or on again) forgets what was measured. Off, a step run whole looks at no clock between operations.
  void set_profiling(bool on);
  // Operations in their order; the first, "plan", is what start() does.
  std::vector<OpProfile> profile() const;

 private:
  struct Op;
  struct Embed; struct Norm; struct Normalize; struct Quantize; struct Linear; struct GatedMlp; struct RopeQueries; struct RopeCache; struct Attend;
  struct PackHeads; struct FullAttend; struct Gather;
  Buffer& at(int i);
  Activation& act(int i);
  void require_queries(int q);
  uint8_t* scratch(int thread) { return scratch_.data() + (size_t)thread * scratch_bytes_; }
  void plan_attention(Step& step) const;
  int first_slice() const;
  void plan_rope(Step& step) const;
  void make_scratch();
  void populate(int tokens) const;
  template <class F> void parallel_for(int count, const F& f);
  Pieces next_pieces() const;
  void note(Op& op, double took, bool is_done);

  const KernelTable& kernels_;
  ThreadPool& pool_;
  int max_tokens_, vocab_ = 0, embedding_width_ = 0, num_heads_ = 0, result_ = -1;
  bool gathered_ = false;
  size_t scratch_bytes_ = 0;
  Pages scratch_;
  RopeConfig rope_{};
  std::shared_ptr<KvCache> cache_;
  FullHeads full_heads_{};
  Pages full_pages_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::unique_ptr<Activation>> activations_;
  std::vector<std::unique_ptr<Op>> ops_;
  Step step_;
  size_t next_op_ = 0;  // where the step stands: ops_.size() when it is done
  int next_row_ = 0;
  bool profiling_ = false;
  OpProfile plan_;
  struct alignas(64) Seconds { double value = 0; };
  std::vector<Seconds> busy_;  // of each thread, in the operation that runs
  std::thread populating_;
};

}  // namespace autoglm
