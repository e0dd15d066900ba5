// The kernel table built for neon; see kernels.h for what each entry promises.
#include "kernels.h"
#include "simd_neon.h"
#include "kernels_impl.h"

namespace autoglm {
const KernelTable* neon_table() { return &kTable; }
}  // namespace autoglm
