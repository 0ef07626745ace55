// The parts of an update that run side by side, and what they leave to be done in order.
#pragma once
#include "dispatch.h"
#include "update_abi.h"

namespace thresher {

// A row that has no record in the tier it wants, on its way there: the header of an entry of a Stash. The row's weights
// and optimizer vectors follow, each in whole blocks of sixteen fp32.
struct Move {
  int64_t row;
  int32_t table;
  int32_t home;    // where it stays if it cannot move: its tier, or the table's entry
  int32_t wanted;
  uint32_t place;  // where it goes, once that is known
  float scale;     // of its record, 0 if that is left
  int32_t floats;  // that follow
};

// Moves in ascending order of (table, row).
struct Stash {
  char* bytes;
  int64_t used;
  int64_t room;
};

// Rows begin .. end - 1 of the distinct rows of all tables.
struct Part {
  int64_t begin;
  int64_t end;
  Stash stash;
  int64_t refused;
  int64_t bad_table;  // where a gradient is not finite, else -1
  int64_t bad_row;
  bool out_of_memory;
};

TH_KERNEL(void, update_part, (const Update& update, Part& part))
TH_KERNEL(void, encode_moves, (const Update& update, Part& part))
TH_KERNEL(void, sum_part, (const Update& update, Part& part))

}  // namespace thresher
