// vec.h in plain C++: an array. What the other two must equal.
#pragma once
#include <cmath>

namespace thresher::scalar {

struct Vec {
  float v[16];
};
struct Ints {
  uint32_t v[16];
};
struct Mask {
  bool v[16];
};

#define TH_LANES(TYPE, EXPRESSION)                        \
  TYPE r;                                                 \
  for (int k = 0; k < 16; ++k) r.v[k] = (EXPRESSION);     \
  return r

static inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t as_int(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline Vec floats(float x) { TH_LANES(Vec, x); }
static inline Vec zeros() { TH_LANES(Vec, 0.0f); }
static inline Ints ints(uint32_t x) { TH_LANES(Ints, x); }
// 0, 1, .. 15
static inline Ints lane_numbers() { TH_LANES(Ints, static_cast<uint32_t>(k)); }

static inline Vec load(const float* p) { TH_LANES(Vec, p[k]); }
static inline Vec load(const float* p, int n) { TH_LANES(Vec, k < n ? p[k] : 0.0f); }
static inline void store(float* p, Vec a, int n) {
  for (int k = 0; k < n; ++k) p[k] = a.v[k];
}
static inline void store(float* p, Vec a) { store(p, a, 16); }

static inline Vec operator+(Vec a, Vec b) { TH_LANES(Vec, a.v[k] + b.v[k]); }
static inline Vec operator-(Vec a, Vec b) { TH_LANES(Vec, a.v[k] - b.v[k]); }
static inline Vec operator*(Vec a, Vec b) { TH_LANES(Vec, a.v[k] * b.v[k]); }
static inline Vec operator/(Vec a, Vec b) { TH_LANES(Vec, a.v[k] / b.v[k]); }
static inline Vec add_exact(Vec a, Vec b, Vec c) { return a + b * c; }
static inline Vec sqrt(Vec a) { TH_LANES(Vec, __builtin_sqrtf(a.v[k])); }
static inline Vec min(Vec a, Vec b) { TH_LANES(Vec, a.v[k] < b.v[k] ? a.v[k] : b.v[k]); }
static inline Vec max(Vec a, Vec b) { TH_LANES(Vec, a.v[k] > b.v[k] ? a.v[k] : b.v[k]); }
static inline Vec floor(Vec a) { TH_LANES(Vec, __builtin_floorf(a.v[k])); }
static inline Vec nearest(Vec a) { TH_LANES(Vec, __builtin_nearbyintf(a.v[k])); }

static inline Mask operator<(Vec a, Vec b) { TH_LANES(Mask, a.v[k] < b.v[k]); }
static inline Mask operator<=(Vec a, Vec b) { TH_LANES(Mask, a.v[k] <= b.v[k]); }
static inline Mask operator==(Vec a, Vec b) { TH_LANES(Mask, a.v[k] == b.v[k]); }
static inline bool any(Mask m) {
  bool found = false;
  for (int k = 0; k < 16; ++k) found |= m.v[k];
  return found;
}
static inline bool all(Mask m) {
  bool every = true;
  for (int k = 0; k < 16; ++k) every &= m.v[k];
  return every;
}
static inline Vec select(Mask m, Vec yes, Vec no) { TH_LANES(Vec, m.v[k] ? yes.v[k] : no.v[k]); }

static inline Ints as_ints(Vec a) { TH_LANES(Ints, as_int(a.v[k])); }
static inline Vec as_floats(Ints a) { TH_LANES(Vec, as_float(a.v[k])); }
// Signed 32-bit to fp32, and back towards zero (of values within 32 bits).
static inline Vec to_floats(Ints a) { TH_LANES(Vec, static_cast<float>(static_cast<int32_t>(a.v[k]))); }
static inline Ints to_ints(Vec a) { TH_LANES(Ints, static_cast<uint32_t>(static_cast<int32_t>(a.v[k]))); }
static inline Ints floor_to_ints(Vec a) { return to_ints(floor(a)); }

static inline Ints operator+(Ints a, Ints b) { TH_LANES(Ints, a.v[k] + b.v[k]); }
static inline Ints operator-(Ints a, Ints b) { TH_LANES(Ints, a.v[k] - b.v[k]); }
static inline Ints operator*(Ints a, Ints b) { TH_LANES(Ints, a.v[k] * b.v[k]); }
static inline Ints operator&(Ints a, Ints b) { TH_LANES(Ints, a.v[k] & b.v[k]); }
static inline Ints operator|(Ints a, Ints b) { TH_LANES(Ints, a.v[k] | b.v[k]); }
static inline Ints operator^(Ints a, Ints b) { TH_LANES(Ints, a.v[k] ^ b.v[k]); }
template <int BITS>
static inline Ints shift_left(Ints a) { TH_LANES(Ints, a.v[k] << BITS); }
template <int BITS>
static inline Ints shift_right(Ints a) { TH_LANES(Ints, a.v[k] >> BITS); }
template <int BITS>
static inline Ints shift_signed(Ints a) {
  TH_LANES(Ints, static_cast<uint32_t>(static_cast<int32_t>(a.v[k]) >> BITS));
}

static inline Ints load_int8(const int8_t* p, int n) {
  TH_LANES(Ints, k < n ? static_cast<uint32_t>(static_cast<int32_t>(p[k])) : 0u);
}
static inline Ints load_int8(const int8_t* p) { return load_int8(p, 16); }
static inline Ints load_uint8(const uint8_t* p, int n) { TH_LANES(Ints, k < n ? p[k] : 0u); }
static inline Ints load_uint8(const uint8_t* p) { return load_uint8(p, 16); }
// The low byte of each lane.
static inline void store_bytes(void* p, Ints a, int n) {
  for (int k = 0; k < n; ++k) static_cast<uint8_t*>(p)[k] = static_cast<uint8_t>(a.v[k]);
}
static inline void store_bytes(void* p, Ints a) { store_bytes(p, a, 16); }

static inline float from_fp16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3FFu;
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return as_float(as_int(size) | sign);
  }
  if (exponent == 31) return as_float(sign | 0x7F800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
  return as_float(sign | (exponent + 112u) << 23 | fraction << 13);
}
static inline uint16_t to_fp16(float x) {
  const uint32_t bits = as_int(x), size = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (size > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((size >> 13) & 0x3FFu));
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 65536 or beyond
  if (size < 0x38800000u)  // below 2^-14: whole multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(__builtin_nearbyintf(as_float(size) * 0x1p24f)));
  const uint32_t rounded = size + 0xFFFu + ((size >> 13) & 1u);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10)));
}
static inline Vec load_fp16(const uint16_t* p, int n) { TH_LANES(Vec, k < n ? from_fp16(p[k]) : 0.0f); }
static inline Vec load_fp16(const uint16_t* p) { return load_fp16(p, 16); }
static inline void store_fp16(uint16_t* p, Vec a, int n) {
  for (int k = 0; k < n; ++k) p[k] = to_fp16(a.v[k]);
}
static inline void store_fp16(uint16_t* p, Vec a) { store_fp16(p, a, 16); }

// bf16 is the upper half of fp32; stores cut the lower half off.
static inline Vec load_bf16(const uint16_t* p, int n) {
  TH_LANES(Vec, k < n ? as_float(static_cast<uint32_t>(p[k]) << 16) : 0.0f);
}
static inline Vec load_bf16(const uint16_t* p) { return load_bf16(p, 16); }
static inline void store_bf16(uint16_t* p, Vec a, int n) {
  for (int k = 0; k < n; ++k) p[k] = static_cast<uint16_t>(as_int(a.v[k]) >> 16);
}
static inline void store_bf16(uint16_t* p, Vec a) { store_bf16(p, a, 16); }

// Lanes folded by halves: k and k + 8, then + 4, + 2, + 1.
static inline float sum(Vec a) {
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) a.v[k] = a.v[k] + a.v[k + half];
  return a.v[0];
}
static inline float largest(Vec a) {
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) a.v[k] = a.v[k] > a.v[k + half] ? a.v[k] : a.v[k + half];
  return a.v[0];
}

#undef TH_LANES

}  // namespace thresher::scalar
