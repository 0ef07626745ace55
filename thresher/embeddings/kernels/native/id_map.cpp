// Maps from 64-bit ids to numbers: open addressing, linear probing, deletion by shifting back.
//
// The arrays belong to the caller. keys[slots], numbers[slots]; slots is a power of two, at most half of them in use;
// a number of -1 marks an empty slot.

#include <cstdint>

#include "dispatch.h"

namespace {

inline uint64_t slot_of(int64_t id, uint64_t mask) {
  uint64_t x = static_cast<uint64_t>(id);
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 32;
  return x & mask;
}

inline uint64_t probe(const int64_t* keys, const int64_t* numbers, uint64_t mask, int64_t id) {
  uint64_t slot = slot_of(id, mask);
  while (numbers[slot] >= 0 && keys[slot] != id) slot = (slot + 1) & mask;
  return slot;
}

constexpr int64_t kAhead = 16;

}  // namespace

TH_EXPORT int64_t th_map_find(int64_t* keys, int64_t* numbers, int64_t slots, const int64_t* ids, int64_t* found, int64_t n) {
  const uint64_t mask = static_cast<uint64_t>(slots) - 1;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      const uint64_t next = slot_of(ids[i + kAhead], mask);
      __builtin_prefetch(keys + next);
      __builtin_prefetch(numbers + next);
    }
    found[i] = numbers[probe(keys, numbers, mask, ids[i])];
  }
  return n;
}

// Returns how many ids were not there before.
TH_EXPORT int64_t th_map_put(int64_t* keys, int64_t* numbers, int64_t slots, const int64_t* ids, int64_t* values, int64_t n) {
  const uint64_t mask = static_cast<uint64_t>(slots) - 1;
  int64_t added = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t slot = probe(keys, numbers, mask, ids[i]);
    added += numbers[slot] < 0;
    keys[slot] = ids[i];
    numbers[slot] = values[i];
  }
  return added;
}

// Returns how many ids were there.
TH_EXPORT int64_t th_map_erase(int64_t* keys, int64_t* numbers, int64_t slots, const int64_t* ids, int64_t*, int64_t n) {
  const uint64_t mask = static_cast<uint64_t>(slots) - 1;
  int64_t erased = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t hole = probe(keys, numbers, mask, ids[i]);
    if (numbers[hole] < 0) continue;
    ++erased;
    for (uint64_t next = (hole + 1) & mask; numbers[next] >= 0; next = (next + 1) & mask) {
      // An entry may move into the hole if its own first slot does not lie between hole and it.
      if (((next - slot_of(keys[next], mask)) & mask) >= ((next - hole) & mask)) {
        keys[hole] = keys[next];
        numbers[hole] = numbers[next];
        hole = next;
      }
    }
    numbers[hole] = -1;
  }
  return erased;
}
