// Slots of tiers, given and taken back. Only ever used by one thread at a time.
#pragma once
#include "abi.h"

namespace thresher {

static inline int64_t free_slots(const Table& table, int tier) {
  const int64_t* count = table.count + 2 * tier;
  return table.slots[tier] - count[HIGH] + count[FREE];
}

static inline int64_t take_slot(const Table& table, int tier) {
  int64_t* count = table.count + 2 * tier;
  return count[FREE] ? table.free[tier][--count[FREE]] : count[HIGH]++;
}

static inline void give_slot(const Table& table, int tier, int64_t slot) {
  table.free[tier][table.count[2 * tier + FREE]++] = static_cast<int32_t>(slot);
}

// Gives back the slot of a row at `place`, if it has one.
static inline void leave(const Table& table, uint32_t place) {
  const int tier = static_cast<int>(place >> SLOT_BITS);
  if (tier > DROPPED) give_slot(table, tier, place & SLOT_MASK);
}

// The place of a row that comes to `tier`.
static inline uint32_t arrive(const Table& table, int tier) {
  const int64_t slot = tier > DROPPED ? take_slot(table, tier) : 0;
  return static_cast<uint32_t>(tier) << SLOT_BITS | static_cast<uint32_t>(slot);
}

}  // namespace thresher
