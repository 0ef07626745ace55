// Sixteen fp32 lanes (Vec) and sixteen 32-bit ones (Ints), the same results to the bit whatever the processor has.
//
// One rounding after each operation; conversions round to nearest even; min(a, b) is a < b ? a : b;
// add_exact(a, b, c) is a + b * c where fp32 holds the product exactly.
//
// `n` of loads and stores counts lanes (1..16): lanes beyond are read as 0 and not written, nor is their memory touched.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"

#if TH_LEVEL == 2
#include "vec_avx512.h"
#elif TH_LEVEL == 1
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

namespace thresher::TH_ISA {

enum { LANES = 16 };

static inline Vec operator-(Vec a) { return as_floats(as_ints(a) ^ ints(0x80000000u)); }
static inline Vec abs(Vec a) { return as_floats(as_ints(a) & ints(0x7FFFFFFFu)); }
// The size of a with the sign of b.
static inline Vec copysign(Vec a, Vec b) {
  return as_floats((as_ints(a) & ints(0x7FFFFFFFu)) | (as_ints(b) & ints(0x80000000u)));
}
static inline Vec clamp(Vec a, float low, float high) { return min(max(a, floats(low)), floats(high)); }

// Bits r of 32 to fp32 in [0, 1): (r >> 8) * 2^-24.
static inline Vec unit(Ints bits) { return to_floats(shift_right<8>(bits)) * floats(0x1p-24f); }

}  // namespace thresher::TH_ISA
