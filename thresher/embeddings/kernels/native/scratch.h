// Where the blocks of one row live while it is worked on.
#pragma once
#include <cstdlib>

#include "shape.h"

namespace thresher::TH_ISA {

// Blocks for a row of any width, where they are not registers.
class Scratch {
 public:
  explicit Scratch(int64_t dim) : blocks_((dim + 15) / 16) {
    const size_t vectors = 4 * static_cast<size_t>(blocks_) * sizeof(Vec);
    memory_ = std::aligned_alloc(64, vectors + static_cast<size_t>(blocks_) * 128);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool failed() const { return memory_ == nullptr; }
  Vec* vector(int number) const { return static_cast<Vec*>(memory_) + number * blocks_; }
  float* floats() const { return reinterpret_cast<float*>(vector(4)); }
  int8_t* bytes() const { return reinterpret_cast<int8_t*>(floats() + 16 * blocks_); }

 private:
  int64_t blocks_;
  void* memory_;
};

}  // namespace thresher::TH_ISA
