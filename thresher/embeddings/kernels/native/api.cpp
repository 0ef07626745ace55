// What the library says about itself, and the choice of instructions.
#include <atomic>

#include "abi.h"
#include "dispatch.h"

namespace thresher {
namespace {

int best_isa() {
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

std::atomic<int> chosen{best_isa()};

}  // namespace

int isa() { return chosen.load(std::memory_order_relaxed); }

TH_EXPORT int32_t th_isa() { return isa(); }

// Takes at most `level`; returns what it took.
TH_EXPORT int32_t th_set_isa(int32_t level) {
  const int best = best_isa();
  chosen = level < 0 ? 0 : level < best ? level : best;
  return isa();
}

TH_EXPORT int32_t th_abi() { return TH_ABI; }

// Digest of the sources that this was built from.
TH_EXPORT const char* th_sources() { return TH_SOURCES; }

}  // namespace thresher
