// Every kernel, once, over the sixteen lanes of a simd_*.h; included by one file per instruction set.
//
// All code sits in an anonymous namespace: the linker must never merge two instruction sets' bodies.
#include <math.h>
#include <string.h>

#include <algorithm>

namespace {
using namespace autoglm;
#define AUTOGLM_INLINE inline __attribute__((always_inline))

constexpr int divide_up(int n, int by) { return (n + by - 1) / by; }

AUTOGLM_INLINE void ask_line(const void* p) {
  if (fills_first_cache) prefetch(p);
  else prefetch_second(p);
}
}  // namespace

#include "gemm_unpack.h"
#include "gemm_products.h"
#include "gemm_direct.h"
#include "gemm.h"
#include "activations.h"
#include "attention_common.h"
#include "attention_i16.h"
#include "attention.h"
#include "full_attention.h"
#include "peaks.h"

namespace {

const KernelTable kTable = {kIsaName, gemm_panels, quantize_chunk, rms_norm, layer_norm,
                             add, silu_mul, gelu, rotate, kv_write, attention, pack_heads, full_attention, argmax,
                             peak_int8, peak_int16, peak_float, peak_read};

}  // namespace
