// The contract between the engine and the instruction-set kernels: packed layouts and one table of functions.
//
// Every kernel takes raw pointers, allocates nothing and throws nothing. Arrays are 64-byte aligned
// unless said otherwise. All kernels are row-invariant: what a row yields does not depend on which
// other rows are computed with it, so a sequence gives the same bits alone and in any batch. Within a
// row the order of floating-point operations is fixed and uses fused multiply-add, so the AVX-512,
// AVX-VNNI, AVX2 and NEON tables agree bit for bit too; the portable table does where the machine has a fused
// multiply-add and otherwise rounds through double (differences of one unit in the last place).
#pragma once
#include <cstddef>
#include <cstdint>

#include "quant_blocks.h"

namespace autoglm {

constexpr int kPanelRows = 32;   // output rows a panel holds: two vectors of 16 lanes
constexpr int kChunk = 256;      // columns handled between two visits of the float accumulators
constexpr int kBlocks = 8;       // 32-column blocks in a chunk
constexpr int kKvBlock = 16;     // tokens a KV block holds: one vector of keys

// Where lines that are asked for ahead belong. A core of Zen 5 takes 75 at once into its first cache, and reads little ahead
// by itself. One of Zen 4 holds up what comes next at two dozen; its second cache takes them all, and reads ahead by itself
// what is read in order. Any other machine is taken to be like Zen 4; no other was measured.
extern const bool fills_first_cache;

// A weight matrix [rows, cols] repacked for streaming.
//
// A panel is 32 output rows; inside it chunks of 256 columns follow each other, each with its scales
// in front of its quants and these in the order of their use, so that one product reads a panel front to
// back once. Quants are stored as "vectors" of 64 bytes = 16 rows x 4 consecutive columns (a quad), in
// unsigned form, the low nibbles apart from the high bits exactly as the GGUF block pairs them: repacking
// moves 4-byte quads and never changes a bit. Rows past the end are zero.
struct PackedMatrix {
  QuantType type;
  int rows, cols;
  int panels;          // ceil(rows / 32)
  int chunks;          // ceil(cols / 256)
  size_t panel_bytes;
  const uint8_t* data; // [panels][panel_bytes]
};

// Which quantized form of an activation row a weight type multiplies with.
enum class ActKind { K256, B32, I16, Float };

// Per row and chunk of an activation quantized with one scale per 256 (for Q4_K, Q5_K, Q6_K).
struct ActMetaK {
  float scale;
  int16_t sum32[8];    // sum of q over each 32 columns: multiplies the block minimums
  int32_t neg_sum16[16];  // minus the sum over each 16 columns: removes Q6_K's offset of 32
  int32_t pad[3];
};
// The same with one scale per 32 (for Q4_0, Q4_1, Q5_0, Q5_1, Q8_0).
struct ActMetaB {
  float scale[8];
  float scaled_sum[8];   // scale * sum of q: multiplies the minimums of Q4_1 and Q5_1
  int32_t neg_sum[8];    // minus the sum of q: removes the offsets 8, 16 and 128
};
constexpr int kI16Columns = 64;  // that share a scale, of weights and of activations; a chunk has four times as many
struct ActMetaI16 { float scale[kChunk / kI16Columns]; };
static_assert(sizeof(ActMetaK) == 96 && sizeof(ActMetaB) == 96, "activation meta");

// Activations of a step, all rows; chunk-major, so that a chunk's rows lie together.
struct ActView {
  int width, stride;       // columns; floats between rows of f32 (a multiple of 16)
  int capacity;            // rows allocated per chunk
  int8_t* qk;              // [chunks][capacity][256] or null
  ActMetaK* meta_k;        // [chunks][capacity]
  int8_t* qb;              // [chunks][capacity][256] or null
  ActMetaB* meta_b;        // [chunks][capacity]
  int16_t* qi;             // [chunks][capacity][256] or null
  ActMetaI16* meta_i;      // [chunks][capacity]
  float* f32;              // [capacity][stride] or null
};

enum class KvType { F32, F16, I16, Q8 };

// One layer's paged cache. Keys lie transposed ([dim][16 keys]) so that a vector holds 16 keys.
//   k  [num_blocks][num_kv_heads][k_bytes]: f32 or f16 [head_dim][16], or int8 [head_dim][16] + f32 scales [groups][16]
//   v  [num_blocks][num_kv_heads][v_bytes]: f32 or f16 [16][head_dim], or int8 [16][head_dim] + f32 scales [16][groups]
// A group is 32 dims (or head_dim, if that is less). head_dim_pad is head_dim rounded up to 16.
struct KvLayer {
  uint8_t *k, *v;
  KvType k_type, v_type;
  int num_kv_heads, head_dim, head_dim_pad, groups;
  size_t k_bytes, v_bytes;   // per block and head
};

// One piece of attention: `rows` query rows that share one KV head.
struct AttnTile {
  const float* const* q;     // [rows] pointers to queries [head_dim_pad], scaled by 1/sqrt(head_dim)
  float* const* out;         // [rows] pointers to outputs [head_dim_pad]
  const int32_t* limit;      // [rows] how many keys each row may see, 1 or more
  int rows;                  // at most kAttnRows
  const int32_t* block_table;
  int kv_head;
};
constexpr int kAttnRows = 128;
constexpr int kAttnKeys = 64;  // keys whose scores are turned into weights together
constexpr int kMaxHeadDim = 256;

// All heads of one sequence whose rows all see each other, as full_attention.h packs them. capacity is a multiple of 64.
struct FullHeads {
  int rows, num_heads, head_dim, capacity;
  int8_t* q;           // [num_heads][capacity][head_dim]
  float* q_scale;      // [num_heads][capacity], the softmax's scale and log2(e) in it
  int32_t* q_neg_sum;  // [num_heads][capacity]
  uint8_t* k;          // [num_heads][capacity / 32][head_dim / 4][32][4]
  float* k_scale;      // [num_heads][capacity]
  int16_t* v;          // [num_heads][capacity / 64][ceil(head_dim / 32)][32][2][16][2]: key pairs, halves, dims, pair
  float* v_scale;      // [num_heads][capacity / 64][ceil(head_dim / 32) * 32]
};
constexpr int kGroupRows = 64;  // from here on reading the activations counts for more than reading the weights
constexpr int kFullRows = 48;  // query rows that go over the keys together

struct KernelTable {
  const char* name;

  // c[i][t][r] = sum over columns of W[(first + i) * 32 + r] * x[row_begin + t], f32 [count][num_rows][32].
  // Integer dots are exact; float steps per chunk as the formats intend. Of kGroupRows rows and more panels take turns at
  // each chunk, so that its activations come from L2 for all but the first; of fewer each is read in one go, since a core
  // reads on by itself what lies side by side, and begins anew at a jump. scratch: kGemmScratch bytes.
  void (*gemm_panels)(const PackedMatrix& w, int first, int count, const ActView& x, int row_begin, int num_rows,
                      float* c, uint8_t* scratch);

  // Quantize columns [256 * chunk, 256 * chunk + 256) of one row into the forms for which `out` has arrays.
  // src points at the chunk's first column and may lie in out.f32 itself.
  void (*quantize_chunk)(const float* src, int chunk, const ActView& out, int row);

  // dst = src / sqrt(mean(src^2) + eps) * weight. In place allowed. n need not be a multiple of 16.
  void (*rms_norm)(const float* src, const float* weight, float eps, int n, float* dst);
  // dst = (src - mean) / sqrt(variance + eps) * weight + bias. In place allowed. n need not be a multiple of 16.
  void (*layer_norm)(const float* src, const float* weight, const float* bias, float eps, int n, float* dst);
  // dst += src
  void (*add)(float* dst, const float* src, int n);
  // dst = silu(gate) * up, of a panel's [rows][32] each; rows of dst are `stride` floats apart
  void (*silu_mul)(const float* gate, const float* up, int rows, float* dst, int stride);

  // dst = x (1 + erf(x / sqrt 2)) / 2, the exact GELU; n a multiple of 16, in place allowed
  void (*gelu)(const float* x, int n, float* dst);

  // Rotate the first 2 * half dims of a head in place and multiply all n by scale (1 changes nothing). Pair j is dims
  // (2j, 2j + 1) if interleaved, else (j, j + half); cs [half][2] holds the cosine and sine of its angle.
  void (*rotate)(const float* cs, int half, bool interleaved, float scale, int n, float* x);
  // Write one head's key and value of one token into a cache slot (rounding to the cache's type).
  void (*kv_write)(const KvLayer& layer, int block, int offset, int kv_head, const float* key, const float* value);
  // Softmax attention over the paged cache, keys in spans of 64 from the first on. Rows' limits must not fall.
  // scratch: kAttnScratch bytes.
  void (*attention)(const KvLayer& layer, const AttnTile& tile, uint8_t* scratch);

  // Pack rows 64 * span .. of one head from fused rows [q | k | v] that lie `stride` floats apart, queries and keys rotated
  // as `rotate` does by cs, [rows][half][2].
  void (*pack_heads)(const FullHeads& heads, int head, int span, const float* qkv, size_t stride, const float* cs, int half,
                     bool interleaved);
  // Rows first .. first + rows - 1 (at most kFullRows) of one head attend to all rows. scratch: kFullScratch bytes.
  void (*full_attention)(const FullHeads& heads, int head, int first, int rows, float* const* out, uint8_t* scratch);

  // Index of the largest of n floats, the lowest index among equals; -1 if a NaN is among them.
  int (*argmax)(const float* x, int n);

  // Measures of this instruction set (peaks.h): the multiply-adds done in so many rounds, at most 2^20 of them.
  int64_t (*peak_int8)(int rounds);
  int64_t (*peak_int16)(int rounds);
  int64_t (*peak_float)(int rounds);
  // Reads a multiple of 256 bytes, asking `ahead` bytes ahead unless that is 0.
  void (*peak_read)(const uint8_t* p, size_t bytes, size_t ahead);
};

constexpr size_t kGemmScratch = 8192 + 2048 + 2048 + 512;
// Two blocks' keys or values as floats, then per row: accumulator, weights of a span, running sums, maximum; and for a
// cache of whole numbers the span's scales and per row: query and weights in 16 bits, a step for each.
constexpr size_t kAttnScratch =
    sizeof(float) * (2 * kKvBlock * kMaxHeadDim + kAttnRows * (kMaxHeadDim + kAttnKeys + 16 + 1)) +
    sizeof(float) * kAttnKeys + kAttnRows * (sizeof(int16_t) * (kMaxHeadDim + kAttnKeys) + 2 * sizeof(float));

// Per row: scores and weights of a span, accumulator, running sums, maximum.
constexpr size_t kFullScratch = sizeof(float) * kFullRows * (kAttnKeys + kAttnKeys / 2 + kMaxHeadDim + 16 + 1);

const KernelTable* scalar_table();
const KernelTable* avx2_table();
const KernelTable* avxvnni_table();
const KernelTable* avx512_table();
const KernelTable* neon_table();

// Picks the best table that CPU and operating system support and the compiler could build. `force` is "", "scalar", "avx2",
// "avxvnni", "avx512" or "neon"; returns null if the forced one cannot run here.
const KernelTable* select_table(const char* force);
// The i-th name it can be forced to here, the best first; null past the last.
const char* table_name(size_t i);

}  // namespace autoglm
