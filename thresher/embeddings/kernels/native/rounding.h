// Sixteen values to storage, stochastically or to the nearest; rows/rounding.py has the formulas.
#pragma once
#include "vec.h"

namespace thresher::TH_ISA {

static inline float levels_of(int tier) { return tier == INT8 ? 127.0f : 7.0f; }

// The scale of a row with the given largest size: the old one where it still fits.
static inline float kept_scale(float largest, float scale, float levels) {
  const bool fits = largest >= (0.5f * levels) * scale && largest <= levels * scale;
  return fits ? scale : largest / levels;
}

static inline float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// What is no number stays none and is stored as 0, as torch does.
static inline Vec cut(Vec y, float levels) { return min(floats(levels), max(floats(-levels), y)); }
// Whole numbers in -levels .. levels.
static inline Ints quantised(Vec x, Vec inverse, float levels, Ints bits) {
  const Vec y = add_exact(x * inverse, to_floats(shift_right<8>(bits)), floats(0x1p-24f));
  return floor_to_ints(cut(y, levels));
}
static inline Ints quantised(Vec x, Vec inverse, float levels) { return to_ints(cut(nearest(x * inverse), levels)); }

// Values that fp16 holds exactly.
static inline Vec rounded_fp16(Vec x, Ints bits) {
  const Vec size = abs(x);
  const Vec raised = as_floats((as_ints(size) + (bits & ints(0x1FFFu))) & ints(~0x1FFFu));
  const Vec small = floor(size * floats(0x1p24f) + unit(bits)) * floats(0x1p-24f);
  return copysign(select(size < floats(0x1p-14f), small, min(floats(65504.0f), raised)), x);
}
static inline Vec rounded_fp16(Vec x) { return min(floats(65504.0f), max(floats(-65504.0f), x)); }

// Values whose upper half is the bf16.
static inline Vec rounded_bf16(Vec x, Ints bits) { return as_floats(as_ints(x) + (bits & ints(0xFFFFu))); }

}  // namespace thresher::TH_ISA
