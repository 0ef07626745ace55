// Rows that are stored or moved outside of updates.
#pragma once
#include "dispatch.h"
#include "abi.h"

namespace thresher {

// A row on its way to another tier.
struct Transfer {
  int64_t row;
  uint32_t place;  // where it goes
};

// Values [dim] to be stored where desc already says, rounded to nearest, with optimizer vectors of zeros.
TH_KERNEL(bool, write_rows, (const Table& table, const int64_t* rows, const float* values, int64_t n))
// Encodes rows anew where `moves` says, with the bits of demotions.
TH_KERNEL(bool, transfer_rows, (const Table& table, const Transfer* moves, int64_t n))

}  // namespace thresher
