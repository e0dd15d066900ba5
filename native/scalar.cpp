// The kernel table built for scalar; see kernels.h for what each entry promises.
#include "kernels.h"
#include "simd_scalar.h"
#include "kernels_impl.h"

namespace autoglm {
const KernelTable* scalar_table() { return &kTable; }
}  // namespace autoglm
