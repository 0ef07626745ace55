// vec.h with AVX-512 (F, BW, DQ, VL): one register.
#pragma once
#include <immintrin.h>

namespace thresher::avx512 {

struct Vec {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

static inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

static inline Vec floats(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec zeros() { return {_mm512_setzero_ps()}; }
static inline Ints ints(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
// 0, 1, .. 15
static inline Ints lane_numbers() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec add_exact(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(b.v, c.v, a.v)}; }
static inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
static inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

static inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
static inline Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
static inline bool any(Mask m) { return m.v != 0; }
static inline bool all(Mask m) { return m.v == 0xFFFF; }
static inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }

static inline Ints as_ints(Vec a) { return {_mm512_castps_si512(a.v)}; }
static inline Vec as_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
// Signed 32-bit to fp32, and back towards zero.
static inline Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline Ints to_ints(Vec a) { return {_mm512_cvttps_epi32(a.v)}; }
static inline Ints floor_to_ints(Vec a) {
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

static inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int BITS>
static inline Ints shift_left(Ints a) { return {_mm512_slli_epi32(a.v, BITS)}; }
template <int BITS>
static inline Ints shift_right(Ints a) { return {_mm512_srli_epi32(a.v, BITS)}; }  // zeros come in
template <int BITS>
static inline Ints shift_signed(Ints a) { return {_mm512_srai_epi32(a.v, BITS)}; }  // the sign comes in

static inline Ints load_int8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline Ints load_int8(const int8_t* p, int n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p))};
}
static inline Ints load_uint8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline Ints load_uint8(const uint8_t* p, int n) {
  return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p))};
}
// The low byte of each lane.
static inline void store_bytes(void* p, Ints a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
static inline void store_bytes(void* p, Ints a, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(n), a.v); }

static inline Vec load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline Vec load_fp16(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
static inline void store_fp16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store_fp16(uint16_t* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// bf16 is the upper half of fp32; stores cut the lower half off.
static inline Vec load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
static inline Vec load_bf16(const uint16_t* p, int n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16))};
}
static inline void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
static inline void store_bf16(uint16_t* p, Vec a, int n) {
  _mm512_mask_cvtepi32_storeu_epi16(p, first_lanes(n), _mm512_srli_epi32(_mm512_castps_si512(a.v), 16));
}

// Lanes folded by halves: k and k + 8, then + 4, + 2, + 1.
static inline float sum(Vec a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
static inline float largest(Vec a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

}  // namespace thresher::avx512
