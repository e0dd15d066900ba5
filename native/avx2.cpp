// The kernel table built for avx2; see kernels.h for what each entry promises.
#include "kernels.h"
#include "simd_avx2.h"
#include "kernels_impl.h"

namespace autoglm {
const KernelTable* avx2_table() { return &kTable; }
}  // namespace autoglm
