// Building a program, planning a step, and the loop that runs it in slices.
#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace autoglm {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::string shape(const char* what, int got, int expected) {
  return std::string(what) + ": got " + std::to_string(got) + ", expected " + std::to_string(expected);
}

// An odd number of cache lines: rows at a power-of-two distance would all fall into the same cache sets.
int row_stride(int width) { return round_up(width, 16) + (round_up(width, 16) / 16 % 2 ? 0 : 16); }

}  // namespace

void Activation::need(ActKind kind) {
  const size_t cells = (size_t)chunks() * (size_t)capacity;
  if (kind == ActKind::K256 && !qk.data()) {
    require(width % 256 == 0, "K-quant weights need a multiple of 256 columns");
    qk = Pages(cells * kChunk);
    meta_k = Pages(cells * sizeof(ActMetaK));
  } else if (kind == ActKind::B32 && !qb.data()) {
    require(width % 32 == 0, "quantized weights need a multiple of 32 columns");
    qb = Pages(cells * kChunk);
    meta_b = Pages(cells * sizeof(ActMetaB));
  } else if (kind == ActKind::I16 && !qi.data()) {
    require(width % kI16Columns == 0, "I16 weights need a multiple of 64 columns");
    qi = Pages(cells * kChunk * sizeof(int16_t));
    meta_i = Pages(cells * sizeof(ActMetaI16));
  } else if (kind == ActKind::Float && !f32.data()) {
    f32 = Pages((size_t)capacity * (size_t)row_stride(width) * sizeof(float));
  }
}

ActView Activation::view() const {
  return {width, row_stride(width), capacity, (int8_t*)qk.data(), (ActMetaK*)meta_k.data(), (int8_t*)qb.data(),
          (ActMetaB*)meta_b.data(), (int16_t*)qi.data(), (ActMetaI16*)meta_i.data(), (float*)f32.data()};
}

void Activation::populate(int rows) const {
  const auto chunkwise = [&](const Pages& pages, size_t cell) {  // [chunk][row]
    for (int c = 0; pages.data() && c < chunks(); ++c)
      pages.populate((size_t)c * (size_t)capacity * cell, (size_t)rows * cell);
  };
  chunkwise(qk, kChunk), chunkwise(meta_k, sizeof(ActMetaK));
  chunkwise(qb, kChunk), chunkwise(meta_b, sizeof(ActMetaB));
  chunkwise(qi, kChunk * sizeof(int16_t)), chunkwise(meta_i, sizeof(ActMetaI16));
  f32.populate(0, (size_t)rows * (size_t)row_stride(width) * sizeof(float));
}

size_t KvCache::block_bytes(int kv_heads, int head_dim, KvType k, KvType v) {
  const int groups = (head_dim + 31) / 32;
  const auto one = [&](KvType t) {
    const size_t cells = (size_t)head_dim * kKvBlock;
    if (t == KvType::F32) return 4 * cells;
    if (t == KvType::F16) return 2 * cells;
    if (t == KvType::I16) return 2 * cells + sizeof(float) * kKvBlock;
    return cells + sizeof(float) * (size_t)groups * kKvBlock;
  };
  return (size_t)kv_heads * (one(k) + one(v));
}

KvCache::KvCache(int num_layers, int num_blocks, int kv_heads, int head_dim, KvType k, KvType v)
    : num_blocks_(num_blocks) {
  require(head_dim % 16 == 0 && head_dim <= kMaxHeadDim, "head_dim must be a multiple of 16, at most 256");
  const size_t per_layer = block_bytes(kv_heads, head_dim, k, v) * (size_t)num_blocks;
  // The first token uses some of every layer, in huge pages all of a small cache.
  pages_ = Pages(per_layer * (size_t)num_layers, per_layer >= (size_t)8 << 20);
  const size_t k_bytes = block_bytes(1, head_dim, k, v), both = k_bytes;
  const size_t v_only = block_bytes(1, head_dim, v, v) / 2, k_only = both - v_only;
  for (int i = 0; i < num_layers; ++i) {
    uint8_t* base = pages_.data() + (size_t)i * per_layer;
    layers_.push_back({base, base + (size_t)num_blocks * (size_t)kv_heads * k_only, k, v, kv_heads, head_dim, head_dim,
                       (head_dim + 31) / 32, k_only, v_only});
  }
}

void KvCache::populate(int blocks) const {
  const auto part = [&](const uint8_t* from, size_t bytes) {
    const double took = pages_.populate((size_t)(from - pages_.data()), bytes * (size_t)(blocks * num_kv_heads()));
    if (took > Pages::kSlow) pages_.advise_huge(false);
  };
  for (const KvLayer& layer : layers_) part(layer.k, layer.k_bytes), part(layer.v, layer.v_bytes);
}

void KvCache::fill() {
  // 0.0966 in half precision, 4e-11 as a float: normal numbers in every type of cache.
  std::memset(pages_.data(), 0x2e, pages_.size());
}

Program::Program(const KernelTable& kernels, ThreadPool& pool, int max_tokens)
    : kernels_(kernels), pool_(pool), max_tokens_(max_tokens) {
  require(max_tokens >= 1 && max_tokens <= 65536, "max_tokens must be 1 to 65536");
}

Program::~Program() {
  if (populating_.joinable()) populating_.join();
}

Buffer& Program::at(int i) {
  require(i >= 0 && i < (int)buffers_.size(), "no such buffer");
  return *buffers_[(size_t)i];
}

Activation& Program::act(int i) {
  require(i >= 0 && i < (int)activations_.size(), "no such activation");
  return *activations_[(size_t)i];
}

int Program::buffer(int width) {
  require(width > 0, "a buffer needs a width");
  auto b = std::make_unique<Buffer>();
  b->width = width;
  b->stride = row_stride(width);
  b->pages = Pages((size_t)max_tokens_ * (size_t)b->stride * sizeof(float));
  buffers_.push_back(std::move(b));
  return (int)buffers_.size() - 1;
}

int Program::activation(int width) {
  require(width > 0, "an activation needs a width");
  auto a = std::make_unique<Activation>();
  a->width = width;
  a->capacity = max_tokens_;
  activations_.push_back(std::move(a));
  return (int)activations_.size() - 1;
}

void Program::embed(QuantType type, const uint8_t* table, int vocab, int width, int out) {
  auto op = std::make_unique<Embed>();
  require(at(out).width == width, shape("embedding width", width, at(out).width));
  op->type = type;
  op->table = table;
  op->row_size = row_bytes(type, width);
  op->width = width;
  op->out = &at(out);
  vocab_ = vocab;
  embedding_width_ = width;
  ops_.push_back(std::move(op));
}

void Program::norm(int x, int branch, std::vector<float> post_weight, std::vector<float> weight, float eps, int a) {
  auto op = std::make_unique<Norm>();
  op->x = &at(x);
  op->branch = branch < 0 ? nullptr : &at(branch);
  const int width = op->x->width;
  require((int)weight.size() == width, shape("norm weight", (int)weight.size(), width));
  require(post_weight.empty() || (int)post_weight.size() == width, shape("post norm weight", (int)post_weight.size(), width));
  require(!op->branch || op->branch->width == width, "norm: branch width differs from x");
  require(act(a).width == width, shape("activation width", act(a).width, width));
  op->post_weight = std::move(post_weight);
  op->weight = std::move(weight);
  op->eps = eps;
  op->act = &act(a);
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::layer_norm(int x, int branch, std::vector<float> weight, std::vector<float> bias, float eps, int a) {
  require(bias.size() == weight.size(), shape("layer norm bias", (int)bias.size(), (int)weight.size()));
  norm(x, branch, {}, std::move(weight), eps, a);
  static_cast<Norm&>(*ops_.back()).bias = std::move(bias);
}

void Program::normalize(int x, std::vector<float> weight, std::vector<float> bias, float eps, int out) {
  auto op = std::make_unique<Normalize>();
  op->x = &at(x);
  op->out = &at(out);
  const int width = op->x->width;
  require((int)weight.size() == width, shape("norm weight", (int)weight.size(), width));
  require(bias.empty() || (int)bias.size() == width, shape("norm bias", (int)bias.size(), width));
  require(op->out->width == width, shape("norm output width", op->out->width, width));
  op->weight = std::move(weight);
  op->bias = std::move(bias);
  op->eps = eps;
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::quantize(int x, int a, Unary function) {
  auto op = std::make_unique<Quantize>();
  op->function = function;
  require(at(x).width == act(a).width, shape("activation width", act(a).width, at(x).width));
  op->x = &at(x);
  op->act = &act(a);
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::linear(int a, std::vector<Part> parts, int out, bool accumulate, float scale, std::string name) {
  auto op = std::make_unique<Linear>();
  op->act = &act(a);
  op->out = &at(out);
  for (const Part& part : parts) {
    const PackedMatrix& m = part.matrix->view();
    require(m.cols == op->act->width, shape("matrix columns", m.cols, op->act->width));
    require(part.column >= 0 && part.column + m.rows <= op->out->width, "matrix rows do not fit the output buffer");
    require(part.bias.empty() || (int)part.bias.size() == m.rows, shape("bias", (int)part.bias.size(), m.rows));
    op->act->need(activation_kind(m.type));
    describe_weights(m, &op->profile);
  }
  op->parts = std::move(parts);
  op->accumulate = accumulate;
  op->scale = scale;
  op->label = std::move(name);
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::gated_mlp(int a, std::shared_ptr<Matrix> gate, std::shared_ptr<Matrix> up, int result) {
  auto op = std::make_unique<GatedMlp>();
  op->act = &act(a);
  op->result = &act(result);
  for (const auto& m : {gate, up}) {
    require(m->view().cols == op->act->width, shape("matrix columns", m->view().cols, op->act->width));
    require(m->view().rows == op->result->width, shape("matrix rows", m->view().rows, op->result->width));
    op->act->need(activation_kind(m->view().type));
    describe_weights(m->view(), &op->profile);
  }
  op->gate = std::move(gate);
  op->up = std::move(up);
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

namespace {
void check_rope(const RopeConfig& rope) {
  require(rope.rotary_dim > 0 && rope.rotary_dim <= rope.head_dim && rope.rotary_dim % 2 == 0, "rotary_dim");
  require((int)rope.inv_freq.size() == rope.rotary_dim / 2, shape("inv_freq", (int)rope.inv_freq.size(), rope.rotary_dim / 2));
  require(rope.sections[0] + rope.sections[1] + rope.sections[2] == rope.rotary_dim / 2, "rope sections do not sum up");
}
}  // namespace

void Program::require_queries(int q) {
  const int width = num_heads_ * rope_.head_dim;
  require(cache_ != nullptr, "set_attention comes first");
  require(at(q).width >= width, shape("query width", at(q).width, width));
}

void Program::set_attention(RopeConfig rope, std::shared_ptr<KvCache> cache, int num_heads) {
  check_rope(rope);
  require(cache->head_dim() == rope.head_dim, "the cache has another head_dim");
  require(num_heads > 0 && num_heads % cache->num_kv_heads() == 0, "query heads are no multiple of KV heads");
  rope_ = std::move(rope);
  cache_ = std::move(cache);
  num_heads_ = num_heads;
}

size_t Program::full_attention_bytes(int num_rows, int num_heads, int head_dim) {
  const size_t rows = (size_t)num_heads * (size_t)round_up(num_rows, kAttnKeys);
  const size_t cells = rows * (size_t)head_dim, values = rows * (size_t)round_up(head_dim, kPanelRows);
  return 2 * cells + values * sizeof(int16_t) + rows * (2 * sizeof(float) + sizeof(int32_t)) +
         values / kAttnKeys * sizeof(float);
}

void Program::set_full_attention(RopeConfig rope, int num_heads) {
  check_rope(rope);
  require(rope.head_dim % 16 == 0 && rope.head_dim <= kMaxHeadDim, "head_dim must be a multiple of 16, at most 256");
  require(num_heads > 0, "num_heads");
  full_pages_ = Pages(full_attention_bytes(max_tokens_, num_heads, rope.head_dim));
  const int capacity = round_up(max_tokens_, kAttnKeys);
  const size_t rows = (size_t)num_heads * (size_t)capacity, cells = rows * (size_t)rope.head_dim;
  const size_t values = rows * (size_t)round_up(rope.head_dim, kPanelRows);
  uint8_t* at = full_pages_.data();
  const auto take = [&at](size_t bytes) { return std::exchange(at, at + bytes); };
  FullHeads& h = full_heads_;
  h = {0, num_heads, rope.head_dim, capacity, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  h.k = take(cells);
  h.v = (int16_t*)take(values * sizeof(int16_t));
  h.q = (int8_t*)take(cells);
  h.k_scale = (float*)take(rows * sizeof(float));
  h.q_scale = (float*)take(rows * sizeof(float));
  h.q_neg_sum = (int32_t*)take(rows * sizeof(int32_t));
  h.v_scale = (float*)take(values / kAttnKeys * sizeof(float));
  rope_ = std::move(rope);
}

void Program::full_attention(int qkv, int out) {
  require(full_heads_.num_heads > 0, "set_full_attention comes first");
  const int width = full_heads_.num_heads * full_heads_.head_dim;
  require(at(qkv).width == 3 * width, shape("qkv width", at(qkv).width, 3 * width));
  require(at(out).width == width, shape("attention output", at(out).width, width));
  auto pack = std::make_unique<PackHeads>();
  pack->qkv = &at(qkv);
  ops_.push_back(std::move(pack));
  auto attend = std::make_unique<FullAttend>();
  attend->out = &at(out);
  attend->num_heads = full_heads_.num_heads;
  ops_.push_back(std::move(attend));
}

void Program::rope_cache(int rows, int layer) {
  auto op = std::make_unique<RopeCache>();
  require(cache_ && layer >= 0 && layer < cache_->num_layers(), "no such layer in the cache");
  require(!gathered_, "keys and values are those of all tokens: rope_cache comes before gather");
  const int q = num_heads_ * rope_.head_dim, kv = 2 * cache_->num_kv_heads() * rope_.head_dim;
  op->has_queries = at(rows).width != kv;
  if (op->has_queries) require(at(rows).width == q + kv, shape("qkv width", at(rows).width, q + kv));
  op->rows = &at(rows);
  op->layer = layer;
  ops_.push_back(std::move(op));
}

void Program::rope_queries(int q) {
  auto op = std::make_unique<RopeQueries>();
  require_queries(q);
  op->q = &at(q);
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::attention(int q, int layer, int out) {
  auto op = std::make_unique<Attend>();
  require(cache_ && layer >= 0 && layer < cache_->num_layers(), "no such layer in the cache");
  require_queries(q);
  require(at(out).width == num_heads_ * rope_.head_dim, shape("attention output", at(out).width, num_heads_ * rope_.head_dim));
  op->queries = &at(q);
  op->out = &at(out);
  op->layer = layer;
  op->logits = gathered_;
  ops_.push_back(std::move(op));
}

void Program::gather(int x, int out) {
  auto op = std::make_unique<Gather>();
  require(at(x).width == at(out).width, shape("gather", at(out).width, at(x).width));
  op->x = &at(x);
  op->out = &at(out);
  gathered_ = op->logits = true;
  ops_.push_back(std::move(op));
}

void Program::result(int x) {
  at(x);
  result_ = x;
  Pieces next;
  for (int round = 0; round < 2; ++round)  // behind the last comes the next step's first
    for (size_t i = ops_.size(); i-- > 0;) {
      ops_[i]->next = next;
      if (const Pieces own = ops_[i]->pieces(); own.count) next = own;
    }
}

int Program::result_width() const { return result_ < 0 ? 0 : buffers_[(size_t)result_]->stride; }

void Program::set_profiling(bool on) {
  const auto forget = [](OpProfile& p) { p.calls = 0, p.seconds = p.busy_s = 0, p.work = {}; };
  profiling_ = on;
  if (!on) return;
  busy_.assign((size_t)pool_.size(), {});
  forget(plan_);
  for (const auto& op : ops_) forget(op->profile);
}

std::vector<OpProfile> Program::profile() const {
  std::vector<OpProfile> all{plan_};
  all[0].name = "plan";
  for (const auto& op : ops_) {
    all.push_back(op->profile);
    all.back().name = op->name();
  }
  return all;
}

size_t Program::nbytes() const {
  size_t n = scratch_.size() + full_pages_.size();
  for (const auto& b : buffers_) n += b->pages.size();
  for (const auto& a : activations_)
    n += a->qk.size() + a->meta_k.size() + a->qb.size() + a->meta_b.size() + a->qi.size() + a->meta_i.size() + a->f32.size();
  return n;
}

void Program::plan_rope(Step& step) const {
  const int half = rope_.rotary_dim / 2, T = step.num_tokens;
  step.rope.resize((size_t)T * (size_t)half * 2);
  pool_.parallel_for(T, [&](int t, int) {
    float* cs = step.rope.data() + (size_t)t * (size_t)half * 2;
    for (int j = 0; j < half; ++j) {
      const int axis = j < rope_.sections[0] ? 0 : j < rope_.sections[0] + rope_.sections[1] ? 1 : 2;
      const float angle = (float)step.positions[axis * T + t] * rope_.inv_freq[(size_t)j];
      cs[2 * j] = std::cos(angle);
      cs[2 * j + 1] = std::sin(angle);
    }
  });
}

void Program::plan_attention(Step& step) const {
  const int groups = num_heads_ / cache_->num_kv_heads();
  // Enough pieces for every thread: a decode step of one sequence may have only two KV heads.
  const int tasks = step.num_tokens * cache_->num_kv_heads(), want = 2 * pool_.size();
  int heads = std::min(groups, kAttnRows);
  if (tasks < want && pool_.size() > cache_->num_kv_heads()) heads = std::max(1, std::min(heads, groups * tasks / want));
  const int tokens = std::max(1, kAttnRows / heads);
  const auto add = [&](std::vector<Step::AttnItem>& items, int s, int begin, int end, int row) {
    for (int t = begin; t < end; t += tokens)
      for (int kv = 0; kv < cache_->num_kv_heads(); ++kv)
        for (int h = 0; h < groups; h += heads)
          items.push_back({s, kv, t, std::min(t + tokens, end), kv * groups + h, kv * groups + std::min(h + heads, groups),
                           row + t - begin});
  };
  step.attention.clear();
  for (int s = 0; s < step.num_seqs; ++s)
    add(step.attention, s, step.cu_seqlens_q[s], step.cu_seqlens_q[s + 1], step.cu_seqlens_q[s]);
  step.attention_wanted.clear();
  for (int i = 0, next; i < step.num_logits; i = next) {  // runs of rows of one sequence
    const int32_t* rows = step.logits_rows;
    const int s = (int)(std::upper_bound(step.cu_seqlens_q, step.cu_seqlens_q + step.num_seqs, rows[i]) - step.cu_seqlens_q) - 1;
    for (next = i + 1; next < step.num_logits && rows[next] == rows[next - 1] + 1 && rows[next] < step.cu_seqlens_q[s + 1];) ++next;
    add(step.attention_wanted, s, rows[i], rows[next - 1] + 1, i);
  }
  for (auto* items : {&step.attention, &step.attention_wanted})
    std::stable_sort(items->begin(), items->end(), [&](const Step::AttnItem& a, const Step::AttnItem& b) {
      return keys_of(step, a.seq, a.token_end - 1) > keys_of(step, b.seq, b.token_end - 1);
    });
}

void Program::make_scratch() {
  int widest = 0;
  for (const auto& b : buffers_) widest = std::max(widest, b->stride);
  const size_t rows = (size_t)std::min(max_tokens_, kRowBlock);
  const size_t few = std::min(rows, (size_t)kGroupRows);  // have a chunk of both matrices of a gated MLP at once
  const size_t gemm = kGemmScratch + (rows * (kPanelGroup * kPanelRows + kChunk) + few * kChunk) * sizeof(float);
  const size_t norm = (size_t)round_up(widest, kChunk) * sizeof(float);
  scratch_bytes_ = (std::max({gemm, norm, kAttnScratch, kFullScratch}) + 4095) / 4096 * 4096;
  scratch_ = Pages(scratch_bytes_ * (size_t)pool_.size());
}

void Program::populate_in_background(int tokens) {
  require(result_ >= 0, "the program has no result");
  require(tokens > 0, "a step has at least one token");
  require(!populating_.joinable(), "memory is populated once");
  if (!scratch_.data()) make_scratch();
  populating_ = std::thread([this, tokens = std::min(tokens, max_tokens_)] { populate(tokens); });
}

void Program::populate(int tokens) const {
  if (cache_) cache_->populate(std::min((tokens + kKvBlock - 1) / kKvBlock, cache_->num_blocks()));
  scratch_.populate(0, scratch_.size());
  for (const auto& a : activations_) a->populate(tokens);
  for (const auto& b : buffers_)  // the result's rows are those wanted: one
    b->pages.populate(0, (size_t)(b.get() == buffers_[(size_t)result_].get() ? 1 : tokens) * (size_t)b->stride * sizeof(float));
}

void Program::start(Step step) {
  require(result_ >= 0, "the program has no result");
  if (!scratch_.data()) make_scratch();
  const auto before = Clock::now();
  step_ = std::move(step);
  if (cache_ || full_heads_.num_heads) plan_rope(step_);
  if (cache_) plan_attention(step_);
  full_heads_.rows = step_.num_tokens;
  next_op_ = 0;
  next_row_ = 0;
  if (!profiling_) return;
  const double took = since(before);
  plan_.seconds += took;
  plan_.busy_s += took;  // nearly all of it on this thread alone
  ++plan_.calls;
}

void Program::note(Op& op, double took, bool is_done) {
  OpProfile& p = op.profile;
  p.seconds += took;
  for (Seconds& busy : busy_) p.busy_s += std::exchange(busy.value, 0);
  if (!is_done) return;
  ++p.calls;
  const Work work = op.work(*this, step_);
  p.work.bytes += work.bytes;
  p.work.int8_macs += work.int8_macs;
  p.work.int16_macs += work.int16_macs;
  p.work.float_macs += work.float_macs;
}

// What fits the operation before that is like the next one, in the layer below; the least if there is none.
int Program::first_slice() const {
  const Op& op = *ops_[next_op_];
  for (size_t i = next_op_; i-- > 0;) {
    const Op& before = *ops_[i];
    if (before.profile.rows == op.profile.rows && before.profile.cols == op.profile.cols && !std::strcmp(before.name(), op.name()))
      return before.fitted_slice;
  }
  return op.least_slice(*this);
}

// What the threads read after the operation that runs, in a step of so few rows that reading is what takes time.
Pieces Program::next_pieces() const {
  return step_.num_tokens < kGroupRows ? ops_[next_op_]->next : Pieces{};
}

bool Program::advance(double seconds) {
  const bool whole = std::isinf(seconds), timed = profiling_ || !whole;
  const auto started = Clock::now();
  while (next_op_ < ops_.size()) {
    Op& op = *ops_[next_op_];
    if (!op.fitted_slice) op.fitted_slice = first_slice();
    const int count = op.count(step_), end = whole ? count : std::min(count, next_row_ + op.fitted_slice);
    if (end > next_row_) {
      const auto before = timed ? Clock::now() : started;
      op.run(*this, step_, next_row_, end);
      const double took = timed ? since(before) : 0;
      if (profiling_) note(op, took, end >= count);
      // Longer pieces read the weights less often; one that takes half of the time allowed is long enough.
      if (took > seconds / 2) op.fitted_slice = std::max(op.least_slice(*this), op.fitted_slice / 2);
      else if (took < seconds / 8) op.fitted_slice = std::min(op.slice(*this), op.fitted_slice * 2);
    }
    next_row_ = end;
    if (end >= count) {
      ++next_op_;
      next_row_ = 0;
    }
    if (!whole && since(started) >= seconds) break;
  }
  return next_op_ == ops_.size();
}

const float* Program::result_rows() const { return buffers_[(size_t)result_]->row(0); }

}  // namespace autoglm
