// Rows as blocks of sixteen columns. Widths that are common have their number of blocks compiled in, so that a whole row
// stays in registers; loops over blocks unroll.
#pragma once
#include "vec.h"

#define TH_INLINE static inline __attribute__((always_inline))
#define TH_INLINE_MEMBER inline __attribute__((always_inline))
#define TH_BLOCKS(J, SHAPE) for (int J = 0, J##_end = (SHAPE).blocks(); J < J##_end; J++)

namespace thresher::TH_ISA {

// BLOCKS = 0: known at run time only. With TAIL the last block may be partly filled.
template <int BLOCKS, bool TAIL>
struct Shape {
  static constexpr int FIXED = BLOCKS;
  explicit Shape(int64_t dim) : blocks_(static_cast<int>((dim + 15) / 16)), tail_(static_cast<int>(dim - (blocks_ - 1) * 16)) {}
  int blocks() const { return BLOCKS ? BLOCKS : blocks_; }
  bool partial(int j) const { return TAIL && j == blocks() - 1; }

  Vec load(const float* p, int j) const {
    return partial(j) ? TH_ISA::load(p + 16 * j, tail_) : TH_ISA::load(p + 16 * j);
  }
  void store(float* p, int j, Vec a) const {
    partial(j) ? TH_ISA::store(p + 16 * j, a, tail_) : TH_ISA::store(p + 16 * j, a);
  }
  Ints load_int8(const int8_t* p, int j) const {
    return partial(j) ? TH_ISA::load_int8(p + 16 * j, tail_) : TH_ISA::load_int8(p + 16 * j);
  }
  void store_bytes(int8_t* p, int j, Ints a) const {
    partial(j) ? TH_ISA::store_bytes(p + 16 * j, a, tail_) : TH_ISA::store_bytes(p + 16 * j, a);
  }
  Vec load_fp16(const uint16_t* p, int j) const {
    return partial(j) ? TH_ISA::load_fp16(p + 16 * j, tail_) : TH_ISA::load_fp16(p + 16 * j);
  }
  void store_fp16(uint16_t* p, int j, Vec a) const {
    partial(j) ? TH_ISA::store_fp16(p + 16 * j, a, tail_) : TH_ISA::store_fp16(p + 16 * j, a);
  }
  Vec load_bf16(const uint16_t* p, int j) const {
    return partial(j) ? TH_ISA::load_bf16(p + 16 * j, tail_) : TH_ISA::load_bf16(p + 16 * j);
  }
  void store_bf16(uint16_t* p, int j, Vec a) const {
    partial(j) ? TH_ISA::store_bf16(p + 16 * j, a, tail_) : TH_ISA::store_bf16(p + 16 * j, a);
  }

 private:
  int blocks_;
  int tail_;
};

}  // namespace thresher::TH_ISA
