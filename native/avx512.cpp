// The kernel table built for avx512; see kernels.h for what each entry promises.
#include "kernels.h"
#include "simd_avx512.h"
#include "kernels_impl.h"

namespace autoglm {
const KernelTable* avx512_table() { return &kTable; }
}  // namespace autoglm
