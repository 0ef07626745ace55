// Ids and offsets are looked at before anything else reads them. Which of them is at fault, Python finds out.
#pragma once
#include "abi.h"
#include "dispatch.h"

namespace thresher {

// Whether the offsets of bags begin .. end - 1 do not decrease and end within the ids.
TH_KERNEL(bool, good_offsets, (const Bags& bags, int64_t begin, int64_t end))
// Whether ids begin .. end - 1 are rows of the table.
TH_KERNEL(bool, good_ids, (const Table& table, const Bags& bags, int64_t begin, int64_t end))

// Whether all offsets are in order and all ids are rows of their tables.
bool good_bags(const Table* tables, const Bags& bags, int threads);

}  // namespace thresher
