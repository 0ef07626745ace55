// Which rows move to a higher tier, and where they wait until slots are given.
#pragma once
#include <cstdlib>

#include "isa.h"
#include "update.h"

namespace thresher::TH_ISA {

// The priorities above which rows move.
class Promotion {
 public:
  Promotion(const Table& table, const Rule& rule) : table_(table), rule_(rule) {
    float lowest = __builtin_inff();
    for (int tier = FP32; tier >= NONE; tier--) {
      above_[tier] = lowest;
      if (table.record_bytes[tier] && rule.promote_above[tier] < lowest) lowest = rule.promote_above[tier];
    }
  }

  // The highest tier that a row of `tier` has the priority for.
  int wanted(int tier, float priority) const {
    if (!(priority > above_[tier])) return tier;
    int level = FP32;
    while (level > tier && !(table_.record_bytes[level] && priority > rule_.promote_above[level])) level--;
    return level;
  }

  // Whether there is no slot for a row that wants to go there.
  bool full(int tier) const {
    const int64_t* count = table_.count + 2 * tier;
    return count[FREE] == 0 && count[HIGH] >= table_.slots[tier];
  }

 private:
  const Table& table_;
  const Rule& rule_;
  float above_[TIERS];  // by tier of a row: the lowest threshold among higher levels
};

// Puts a move at the end of the stash of a part; returns where its numbers go, null without memory.
static inline float* push(Part& part, const Move& move) {
  Stash& stash = part.stash;
  const int64_t size = static_cast<int64_t>(sizeof(Move)) + move.floats * 4;
  if (stash.used + size > stash.room) {
    const int64_t room = 2 * stash.room + 64 * size;
    void* const bytes = std::realloc(stash.bytes, static_cast<size_t>(room));
    if (!bytes) {
      part.out_of_memory = true;
      return nullptr;
    }
    stash.bytes = static_cast<char*>(bytes);
    stash.room = room;
  }
  Move* const kept = reinterpret_cast<Move*>(stash.bytes + stash.used);
  *kept = move;
  stash.used += size;
  return reinterpret_cast<float*>(kept + 1);
}

}  // namespace thresher::TH_ISA
