// The kernel table built for avxvnni; see kernels.h for what each entry promises.
#include "kernels.h"
#include "simd_avx2.h"
#include "kernels_impl.h"

namespace autoglm {
const KernelTable* avxvnni_table() { return &kTable; }
}  // namespace autoglm
