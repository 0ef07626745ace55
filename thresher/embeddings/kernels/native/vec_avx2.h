// vec.h with AVX2 and F16C: two registers, lanes 0..7 and 8..15.
#pragma once
#include <immintrin.h>

namespace thresher::avx2 {

struct Vec {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};

// Sixteen words from 16 - n on: n times all bits, then zeros.
static const int32_t MASKS[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
static inline Ints first_lanes(int n) {
  const __m256i* p = reinterpret_cast<const __m256i*>(MASKS + 16 - n);
  return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
}

static inline Vec floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Ints ints(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
// 0, 1, .. 15
static inline Ints lane_numbers() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline Vec load(const float* p, int n) {
  const Ints m = first_lanes(n);
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
static inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline void store(float* p, Vec a, int n) {
  const Ints m = first_lanes(n);
  _mm256_maskstore_ps(p, m.lo, a.lo);
  _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}

static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline Vec add_exact(Vec a, Vec b, Vec c) { return a + b * c; }
static inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline Vec floor(Vec a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
static inline Vec nearest(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

static inline Mask operator<(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
static inline Mask operator<=(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
static inline Mask operator==(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
static inline bool any(Mask m) { return _mm256_movemask_ps(_mm256_or_ps(m.lo, m.hi)) != 0; }
static inline bool all(Mask m) { return _mm256_movemask_ps(_mm256_and_ps(m.lo, m.hi)) == 0xFF; }
static inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

static inline Ints as_ints(Vec a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
static inline Vec as_floats(Ints a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
// Signed 32-bit to fp32, and back towards zero.
static inline Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
static inline Ints to_ints(Vec a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
static inline Ints floor_to_ints(Vec a) { return to_ints(floor(a)); }

static inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
static inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
static inline Ints operator*(Ints a, Ints b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
static inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
static inline Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
static inline Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
template <int BITS>
static inline Ints shift_left(Ints a) { return {_mm256_slli_epi32(a.lo, BITS), _mm256_slli_epi32(a.hi, BITS)}; }
template <int BITS>
static inline Ints shift_right(Ints a) { return {_mm256_srli_epi32(a.lo, BITS), _mm256_srli_epi32(a.hi, BITS)}; }
template <int BITS>
static inline Ints shift_signed(Ints a) { return {_mm256_srai_epi32(a.lo, BITS), _mm256_srai_epi32(a.hi, BITS)}; }

static inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
// The first `size` (0..16) bytes at p, then zeros.
static inline __m128i load_16(const void* p, int size) {
  alignas(16) uint8_t bytes[16] = {};
  if (size > 0) memcpy(bytes, p, static_cast<size_t>(size));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
}
static inline void store_16(void* p, __m128i a, int size) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), a);
  if (size > 0) memcpy(p, bytes, static_cast<size_t>(size));
}
static inline int lower(int n) { return n < 8 ? n : 8; }
static inline int upper(int n) { return n < 8 ? 0 : n - 8; }

static inline Ints signed_bytes(__m128i b) { return {_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))}; }
static inline Ints plain_bytes(__m128i b) { return {_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))}; }
static inline Ints load_int8(const int8_t* p) { return signed_bytes(load_16(p)); }
static inline Ints load_int8(const int8_t* p, int n) { return signed_bytes(load_16(p, n)); }
static inline Ints load_uint8(const uint8_t* p) { return plain_bytes(load_16(p)); }
static inline Ints load_uint8(const uint8_t* p, int n) { return plain_bytes(load_16(p, n)); }

// Eight words below 2^16 to halves.
static inline __m128i narrow(__m256i a) {
  return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
static inline __m128i low_bytes(Ints a) {
  const __m256i byte = _mm256_set1_epi32(0xFF);
  return _mm_packus_epi16(narrow(_mm256_and_si256(a.lo, byte)), narrow(_mm256_and_si256(a.hi, byte)));
}
// The low byte of each lane.
static inline void store_bytes(void* p, Ints a) { _mm_storeu_si128(static_cast<__m128i*>(p), low_bytes(a)); }
static inline void store_bytes(void* p, Ints a, int n) { store_16(p, low_bytes(a), n); }

static inline Vec load_fp16(const uint16_t* p) { return {_mm256_cvtph_ps(load_16(p)), _mm256_cvtph_ps(load_16(p + 8))}; }
static inline Vec load_fp16(const uint16_t* p, int n) {
  return {_mm256_cvtph_ps(load_16(p, 2 * lower(n))), _mm256_cvtph_ps(load_16(p + 8, 2 * upper(n)))};
}
static inline __m128i to_fp16(__m256 a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void store_halves(uint16_t* p, __m128i lo, __m128i hi, int n) {
  store_16(p, lo, 2 * lower(n));
  store_16(p + 8, hi, 2 * upper(n));
}
static inline void store_fp16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_fp16(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), to_fp16(a.hi));
}
static inline void store_fp16(uint16_t* p, Vec a, int n) { store_halves(p, to_fp16(a.lo), to_fp16(a.hi), n); }

// bf16 is the upper half of fp32; stores cut the lower half off.
static inline __m256 from_bf16(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
static inline __m128i to_bf16(__m256 a) { return narrow(_mm256_srli_epi32(_mm256_castps_si256(a), 16)); }
static inline Vec load_bf16(const uint16_t* p) { return {from_bf16(load_16(p)), from_bf16(load_16(p + 8))}; }
static inline Vec load_bf16(const uint16_t* p, int n) {
  return {from_bf16(load_16(p, 2 * lower(n))), from_bf16(load_16(p + 8, 2 * upper(n)))};
}
static inline void store_bf16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), to_bf16(a.hi));
}
static inline void store_bf16(uint16_t* p, Vec a, int n) { store_halves(p, to_bf16(a.lo), to_bf16(a.hi), n); }

// Lanes folded by halves: k and k + 8, then + 4, + 2, + 1.
static inline float sum(Vec a) {
  const __m256 b = _mm256_add_ps(a.lo, a.hi);
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
static inline float largest(Vec a) {
  const __m256 b = _mm256_max_ps(a.lo, a.hi);
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

}  // namespace thresher::avx2
