// Which variant runs. Files that are compiled once declare a kernel with TH_KERNEL and pick it with TH_PICK.
#pragma once

namespace thresher {

// 2 AVX-512, 1 AVX2, 0 scalar: the best that this processor has, or what th_set_isa asked for.
int isa();

#if defined(__x86_64__)
#define TH_KERNEL(RESULT, NAME, ARGUMENTS)      \
  namespace avx512 { RESULT NAME ARGUMENTS; }   \
  namespace avx2 { RESULT NAME ARGUMENTS; }     \
  namespace scalar { RESULT NAME ARGUMENTS; }
#define TH_PICK(NAME) (isa() == 2 ? avx512::NAME : isa() == 1 ? avx2::NAME : scalar::NAME)
#else
#define TH_KERNEL(RESULT, NAME, ARGUMENTS) \
  namespace scalar { RESULT NAME ARGUMENTS; }
#define TH_PICK(NAME) (scalar::NAME)
#endif
#define TH_EXPORT extern "C" __attribute__((visibility("default")))

}  // namespace thresher
