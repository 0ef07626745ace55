// Work on a lookup, cut into parts that run side by side.
#pragma once
#include "abi.h"
#include "dispatch.h"

namespace thresher {

// Bags are walked in blocks, all features of a block one after the other, so that what they write lies close together.
// Segment number `block * features + f` is the bags of feature f within a block.
struct Lookup {
  const Table* tables;
  const Bags* bags;
  float* out;         // of a lookup
  const float* grad;  // of the weights' gradient: see Bags
  float* weight_grad; // [n]
  int64_t blocks;
};

// Rows to be read: [n, dim].
struct Reading {
  const Table* table;
  const int64_t* rows;
  float* out;
};

// Segments begin .. end - 1. False without memory.
TH_KERNEL(bool, look_up, (const Lookup& lookup, int64_t begin, int64_t end))
TH_KERNEL(bool, weight_gradient, (const Lookup& lookup, int64_t begin, int64_t end))
// Rows begin .. end - 1.
TH_KERNEL(bool, read_rows, (const Reading& reading, int64_t begin, int64_t end))

}  // namespace thresher
