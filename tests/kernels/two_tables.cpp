// Every kernel of two tables on the same numbers: prints what differs, and ends with 1 if anything does.
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "program.h"
#include "weights.h"

using namespace autoglm;

namespace {

using Results = std::map<std::string, std::vector<float>>;

std::vector<float> normal(size_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(n);
  for (float& v : x) v = draw(bits);
  return x;
}

// Any bytes are GGUF rows, if the half floats among them are numbers: d and what follows it, which Q6_K has at its end.
std::vector<uint8_t> random_rows(QuantType type, int rows, int cols) {
  std::vector<uint8_t> x(row_bytes(type, cols) * (size_t)rows);
  std::mt19937 bits(7);
  for (uint8_t& v : x) v = (uint8_t)bits();
  const size_t block = block_bytes(type), at = type == QuantType::Q6_K ? block - 2 : 0;
  for (size_t i = 0; i < x.size(); i += block)
    for (size_t j = 0; j < std::min<size_t>(4, block - at); j += 2) x[i + at + j + 1] = (uint8_t)(0x28 | (x[i + at + j + 1] & 0x83));
  if (block <= 4)  // floats themselves
    for (size_t i = block - 1; i < x.size(); i += block) x[i] = (uint8_t)(0x3c | (x[i] & 0x80));
  return x;
}

void products(const KernelTable& k, Results& out) {
  ThreadPool pool(1);
  Slabs slabs(1);
  for (int id = 0; id < 32; ++id) {
    if (!known_type(id)) continue;
    const QuantType type = (QuantType)id;
    const int rows = 160, cols = block_elements(type) == 256 ? 768 : 896, tokens = 70;
    const std::vector<uint8_t> stored = random_rows(type, rows, cols);
    const std::vector<float> x = normal((size_t)tokens * cols, 1);
    for (const bool wide : {false, true}) {  // in 16-bit whole numbers
      if (wide && type != QuantType::F32) continue;
      Matrix matrix(wide ? QuantType::I16 : type, rows, cols, false, slabs);
      std::vector<uint8_t> source = stored;
      if (wide) {
        source.resize(matrix.source_bytes());
        for (size_t i = 0; i < source.size(); ++i) source[i] = (uint8_t)(i * 37 >> 3);
        for (size_t i = 0; i < source.size(); i += sizeof(BlockI16)) *(float*)(source.data() + i) = 0.01f;
      }
      matrix.fill({source.data()}, pool);
      const PackedMatrix& w = matrix.view();
      Activation act{};
      act.width = cols, act.capacity = tokens;
      act.need(activation_kind(w.type));
      const ActView view = act.view();
      for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < act.chunks(); ++c) k.quantize_chunk(x.data() + (size_t)t * cols + c * kChunk, c, view, t);
      Pages scratch(kGemmScratch), sums(sizeof(float) * (size_t)w.panels * tokens * kPanelRows);
      for (int n : {1, 2, 3, 4, 5, 7, 16, 17, 33, 70}) {
        k.gemm_panels(w, 0, w.panels, view, tokens - n, n, (float*)sums.data(), scratch.data());
        std::vector<float>& to = out["product of type " + std::to_string((int)w.type) + ", rows " + std::to_string(n)];
        to.assign((float*)sums.data(), (float*)sums.data() + (size_t)w.panels * n * kPanelRows);
      }
    }
  }
}

void rows_of_floats(const KernelTable& k, Results& out) {
  for (int n : {96, 100}) {
    const std::vector<float> x = normal(n, 2), w = normal(n, 3), b = normal(n, 4);
    std::vector<float> y(n);
    const auto keep = [&](const char* name) { out[name + (" of " + std::to_string(n))] = y; };
    k.rms_norm(x.data(), w.data(), 1e-5f, n, y.data()), keep("rms_norm");
    k.layer_norm(x.data(), w.data(), b.data(), 1e-5f, n, y.data()), keep("layer_norm");
    k.add(y.data(), x.data(), n), keep("add");
    if (n % 32) continue;
    k.gelu(x.data(), n, y.data()), keep("gelu");
    k.silu_mul(x.data(), w.data(), n / kPanelRows, y.data(), kPanelRows), keep("silu_mul");
    y[0] = (float)k.argmax(x.data(), n), keep("argmax");
    for (const bool interleaved : {false, true}) {
      y = x;
      k.rotate(b.data(), 24, interleaved, 0.25f, n, y.data()), keep(interleaved ? "rotate pairs" : "rotate halves");
    }
  }
}

void cached_attention(const KernelTable& k, Results& out) {
  for (const KvType type : {KvType::F32, KvType::F16, KvType::I16, KvType::Q8})
    for (const int dim : {64, 128})
      for (const int rows : {1, 2, 3, 7, 40}) {
        const int keys = 200, blocks = (keys + kKvBlock - 1) / kKvBlock;
        KvCache cache(1, blocks, 1, dim, type, type);
        const std::vector<float> kv = normal((size_t)2 * keys * dim, 5), q = normal((size_t)rows * dim, 6);
        for (int i = 0; i < keys; ++i)
          k.kv_write(cache.layer(0), i / kKvBlock, i % kKvBlock, 0, &kv[(size_t)i * dim], &kv[(size_t)(keys + i) * dim]);
        std::vector<float> y((size_t)rows * dim);
        std::vector<const float*> from;
        std::vector<float*> to;
        std::vector<int32_t> limit, table;
        for (int r = 0; r < rows; ++r) from.push_back(&q[(size_t)r * dim]), to.push_back(&y[(size_t)r * dim]), limit.push_back(keys - rows + r + 1);
        for (int b = 0; b < blocks; ++b) table.push_back(b);
        Pages scratch(kAttnScratch);
        k.attention(cache.layer(0), {from.data(), to.data(), limit.data(), rows, table.data(), 0}, scratch.data());
        out["attention, cache " + std::to_string((int)type) + ", dims " + std::to_string(dim) + ", rows " + std::to_string(rows)] = y;
      }
}

void picture_attention(const KernelTable& k, Results& out) {
  for (const int dim : {48, 64, 128}) {
    const int rows = 100, capacity = 128, width = (dim + kPanelRows - 1) / kPanelRows * kPanelRows;
    Pages q((size_t)capacity * dim), qs(4 * capacity), qn(4 * capacity), kk((size_t)capacity * dim), ks(4 * capacity);
    Pages v(2 * (size_t)capacity * width), vs(4 * (size_t)capacity / kAttnKeys * width), scratch(kFullScratch);
    const FullHeads heads{rows, 1, dim, capacity, (int8_t*)q.data(), (float*)qs.data(), (int32_t*)qn.data(), kk.data(),
                          (float*)ks.data(), (int16_t*)v.data(), (float*)vs.data()};
    const std::vector<float> qkv = normal((size_t)3 * rows * dim, 8), cs = normal((size_t)rows * dim, 9);
    for (int span = 0; span < capacity / kAttnKeys; ++span) k.pack_heads(heads, 0, span, qkv.data(), 3 * dim, cs.data(), dim / 2, false);
    std::vector<float> y((size_t)kFullRows * dim);
    std::vector<float*> to;
    for (int r = 0; r < kFullRows; ++r) to.push_back(&y[(size_t)r * dim]);
    k.full_attention(heads, 0, 10, kFullRows, to.data(), scratch.data());
    out["picture attention, dims " + std::to_string(dim)] = y;
  }
}

Results all(const KernelTable& k) {
  Results out;
  products(k, out), rows_of_floats(k, out), cached_attention(k, out), picture_attention(k, out);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const KernelTable *one = select_table(argc > 1 ? argv[1] : ""), *two = select_table("scalar");
  if (!one) return std::printf("no such table here\n"), 2;
  const Results a = all(*one), b = all(*two);
  int differ = 0;
  for (const auto& [name, x] : a) {
    const std::vector<float>& y = b.at(name);
    if (x.size() == y.size() && !std::memcmp(x.data(), y.data(), sizeof(float) * x.size())) continue;
    ++differ;
    std::printf("%s differs\n", name.c_str());
  }
  std::printf("%s: %zu results, %d differ from %s's\n", one->name, a.size(), differ, two->name);
  return differ > 0;
}
