// CPU and operating-system features -> one kernel table, once.
#include <cstring>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace autoglm {

namespace {

#if defined(__x86_64__)
struct Features { bool avx2 = false, avxvnni = false, avx512 = false; };

uint64_t xcr0() {
  uint32_t lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return ((uint64_t)hi << 32) | lo;
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx || !fma || !f16c) return f;
  const uint64_t os = xcr0();
  if ((os & 6) != 6) return f;  // the kernel saves YMM state
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = b >> 5 & 1;
  const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
  const bool vnni = c >> 11 & 1;
  f.avx512 = f.avx2 && avx512 && vnni && (os & 0xe0) == 0xe0;
  f.avxvnni = f.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  return f;
}

bool is_zen5() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx) return false;
  return __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;
}
#else
bool is_zen5() { return false; }
#endif

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Mac of this kind
#endif
}
#endif

struct Choice { const char* name; const KernelTable* table; };

// What this machine can run, the best first.
std::vector<Choice> choices() {
  std::vector<Choice> able;
#if defined(__x86_64__)
  const Features f = detect();
  if (f.avx512) able.push_back({"avx512", avx512_table()});
#ifndef AUTOGLM_NO_AVXVNNI
  if (f.avxvnni) able.push_back({"avxvnni", avxvnni_table()});
#endif
  if (f.avx2) able.push_back({"avx2", avx2_table()});
#elif defined(__aarch64__)
  if (has_dot_products()) able.push_back({"neon", neon_table()});
#endif
  able.push_back({"scalar", scalar_table()});
  return able;
}

}  // namespace

const bool fills_first_cache = is_zen5();

const KernelTable* select_table(const char* force) {
  const std::vector<Choice> able = choices();
  if (!force || !*force) return able[0].table;
  for (const Choice& choice : able)
    if (!std::strcmp(force, choice.name)) return choice.table;
  return nullptr;
}

const char* table_name(size_t i) {
  const std::vector<Choice> able = choices();
  return i < able.size() ? able[i].name : nullptr;
}

}  // namespace autoglm
