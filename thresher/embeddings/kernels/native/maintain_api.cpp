// Storing, counting, demoting and packing rows of one table: what happens in order here, records by maintain.cpp.
#include <atomic>
#include <cstring>
#include <vector>

#include "maintain.h"
#include "slots.h"
#include "threads.h"

namespace thresher {
namespace {

enum { ROWS_OF_PART = 1024, BUCKETS = 512, BASE = (127 - 40) << 3 };

int tier_of(uint32_t place) { return static_cast<int>(place >> SLOT_BITS); }

// Runs act(from, to) over 0 .. n - 1 in parts; false if one of them said so.
template <class Act>
bool in_parts(int64_t n, int threads, const Act& act) {
  std::atomic<bool> well{true};
  parallel_for((n + ROWS_OF_PART - 1) / ROWS_OF_PART, threads, [&](int64_t part) {
    const int64_t from = part * ROWS_OF_PART;
    if (!act(from, from + ROWS_OF_PART < n ? from + ROWS_OF_PART : n)) well = false;
  });
  return well;
}

int bucket_of(float priority) {
  int32_t bits;
  std::memcpy(&bits, &priority, sizeof bits);
  const int bucket = (bits >> 20) - BASE;
  return bucket < 0 ? 0 : bucket >= BUCKETS ? BUCKETS - 1 : bucket;
}

// The tier a row is demoted to.
int lowered(int tier, float priority, const float* keep_from, const int32_t* lower) {
  while (lower[tier] >= 0 && priority < keep_from[tier]) tier = lower[tier];
  return tier;
}

}  // namespace

// Stores values [n, dim] in the tiers given. Returns the tier that has too few slots, -1 if all went well, -2 without
// memory; `slots` says how many rows need one there, and how many are free.
TH_EXPORT int32_t th_write(const Table* table, const int64_t* rows, const int64_t* tiers, const float* values, int64_t n,
                           int64_t* slots, int64_t threads) {
  int64_t come[TIERS] = {}, go[TIERS] = {};
  for (int64_t i = 0; i < n; i++) {
    const int from = tier_of(table->desc[2 * rows[i]]), to = static_cast<int>(tiers[i]);
    if (from == to) continue;
    go[from]++;
    come[to]++;
  }
  for (int tier = INT4; tier < TIERS; tier++) {
    if (come[tier] <= go[tier] + free_slots(*table, tier)) continue;
    slots[0] = come[tier];
    slots[1] = go[tier] + free_slots(*table, tier);
    return tier;
  }
  for (int64_t i = 0; i < n; i++) {
    const uint32_t place = table->desc[2 * rows[i]];
    if (tier_of(place) != tiers[i]) leave(*table, place);
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t* const desc = table->desc + 2 * rows[i];
    if (tier_of(desc[0]) == tiers[i]) continue;
    desc[0] = arrive(*table, static_cast<int>(tiers[i]));
    desc[1] = 0;
  }
  const bool well = in_parts(n, static_cast<int>(threads), [&](int64_t from, int64_t to) {
    return TH_PICK(write_rows)(*table, rows + from, values + from * table->dim, to - from);
  });
  return well ? -1 : -2;
}

// Adds rows that are not NONE to buckets [512] of their priorities.
TH_EXPORT void th_histogram(const Table* table, float gain, int64_t* buckets) {
  for (int64_t row = 0; row < table->rows; row++) {
    if (tier_of(table->desc[2 * row]) != NONE) buckets[bucket_of(table->stat[2 * row + 1] / gain)]++;
  }
}

// Demotes rows first .. first + count - 1; `lower` names the next level below each tier, -1 if there is none. Returns
// how many rows moved, or -1 without memory.
TH_EXPORT int64_t th_demote(const Table* table, int64_t first, int64_t count, const float* keep_from,
                            const int32_t* lower, int64_t threads) {
  std::vector<Transfer> moves;
  for (int64_t row = first; row < first + count; row++) {
    const int tier = tier_of(table->desc[2 * row]);
    const int target = lowered(tier, table->stat[2 * row + 1], keep_from, lower);
    if (target == tier || (target > DROPPED && free_slots(*table, target) == 0)) continue;
    moves.push_back(Transfer{row, arrive(*table, target)});
  }
  std::vector<uint32_t> left;
  for (const Transfer& move : moves) left.push_back(table->desc[2 * move.row]);
  const bool well = in_parts(static_cast<int64_t>(moves.size()), static_cast<int>(threads), [&](int64_t from, int64_t to) {
    return TH_PICK(transfer_rows)(*table, moves.data() + from, to - from);
  });
  for (const uint32_t place : left) leave(*table, place);
  return well ? static_cast<int64_t>(moves.size()) : -1;
}

// Moves the records of a tier into slots 0 .. live - 1 and empties its free stack.
TH_EXPORT void th_compact(const Table* table, int32_t tier) {
  int64_t* const count = table->count + 2 * tier;
  const int64_t live = count[HIGH] - count[FREE];
  const size_t bytes = static_cast<size_t>(table->record_bytes[tier]);
  for (int64_t row = 0; row < table->rows; row++) {
    uint32_t* const desc = table->desc + 2 * row;
    const int64_t slot = desc[0] & SLOT_MASK;
    if (tier_of(desc[0]) != tier || slot < live) continue;
    int64_t to = take_slot(*table, tier);
    while (to >= live) to = take_slot(*table, tier);
    std::memcpy(table->slabs[tier] + static_cast<size_t>(to) * bytes, table->slabs[tier] + static_cast<size_t>(slot) * bytes, bytes);
    desc[0] = static_cast<uint32_t>(tier) << SLOT_BITS | static_cast<uint32_t>(to);
  }
  count[HIGH] = live;
  count[FREE] = 0;
}

}  // namespace thresher
