// Random bits of rounding, a function of (table key, row, step, stream, column); rows/generator.py has the formulas.
#pragma once
#include "vec.h"

namespace thresher::TH_ISA {

enum Stream : uint32_t { WEIGHTS = 0, FIRST_STATE = 1, DEMOTED = 8 };

// The 64 bits that a row draws from at a step.
static inline uint64_t row_key(uint64_t table_key, int64_t known_as, uint64_t step) {
  uint64_t z = (static_cast<uint64_t>(known_as) * 0x9E3779B97F4A7C15u) ^ table_key;
  z += step * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The bits of one stream of a row, sixteen columns at a time. `col0` is the first column of the row at hand.
class Draws {
 public:
  Draws(uint64_t key, uint32_t stream, int64_t col0)
      : low_(lane_numbers() * ints(GOLDEN) + ints(static_cast<uint32_t>(key) + static_cast<uint32_t>(col0) * GOLDEN)),
        high_(ints(static_cast<uint32_t>(key >> 32) + stream * 0x85EBCA6Bu)) {}

  // Bits of columns 16 * block .. 16 * block + 15.
  Ints bits(int block) const {
    Ints x = (low_ + ints(static_cast<uint32_t>(block) * LANES * GOLDEN)) ^ high_;
    x = (x ^ shift_right<16>(x)) * ints(0x85EBCA6Bu);
    x = (x ^ shift_right<13>(x)) * ints(0xC2B2AE35u);
    return x ^ shift_right<16>(x);
  }

 private:
  static constexpr uint32_t GOLDEN = 0x9E3779B9u;
  Ints low_, high_;
};

}  // namespace thresher::TH_ISA
