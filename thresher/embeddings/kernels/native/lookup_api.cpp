// Lookups over threads.
#include <atomic>

#include "check.h"
#include "lookup.h"
#include "threads.h"

namespace thresher {
namespace {

constexpr int64_t BLOCK_BYTES = 1 << 20;  // of output, half of a second-level cache
constexpr int64_t FEWEST_BAGS = 32, MOST_BAGS = 1024;
constexpr int64_t PARTS_PER_THREAD = 4;
constexpr int64_t ROWS_PER_PART = 256;

int64_t blocks_of(const Table* tables, const Bags& bags, int threads) {
  int64_t largest = 1, width = 0;
  for (int32_t f = 0; f < bags.features; ++f) {
    const int64_t batch = bags.first_bag[f + 1] - bags.first_bag[f];
    largest = batch > largest ? batch : largest;
    width += tables[bags.tables[f]].dim;
  }
  int64_t size = BLOCK_BYTES / (4 * (width > 0 ? width : 1));
  size = size < FEWEST_BAGS ? FEWEST_BAGS : size > MOST_BAGS ? MOST_BAGS : size;
  const int64_t blocks = (largest + size - 1) / size, parts = threads > 1 ? threads * PARTS_PER_THREAD : 1;
  return blocks > parts ? blocks : parts < largest ? parts : largest;
}

// Calls work(begin, end) for runs of segments on several threads; each returns whether it had the memory.
template <class Work>
int32_t run(const Lookup& lookup, int threads, const Work& work) {
  const int64_t segments = lookup.blocks * lookup.bags->features;
  const int64_t parts = threads > 1 ? threads * PARTS_PER_THREAD : 1;
  std::atomic<bool> done{true};
  parallel_for(parts, threads, [&](int64_t p) {
    if (!work(segments * p / parts, segments * (p + 1) / parts)) done = false;
  });
  return done ? OK : OUT_OF_MEMORY;
}

}  // namespace

// With `unchecked` ids are looked at first.
TH_EXPORT int32_t th_lookup(const Table* tables, const Bags* bags, float* out, int32_t unchecked, int32_t threads) {
  if (unchecked && !good_bags(tables, *bags, threads)) return BAD_BAGS;
  const Lookup lookup{tables, bags, out, nullptr, nullptr, blocks_of(tables, *bags, threads)};
  return run(lookup, threads, [&](int64_t begin, int64_t end) { return TH_PICK(look_up)(lookup, begin, end); });
}

TH_EXPORT int32_t th_weight_gradient(const Table* tables, const Bags* bags, const float* grad, float* weight_grad,
                                     int32_t threads) {
  const Lookup lookup{tables, bags, nullptr, grad, weight_grad, blocks_of(tables, *bags, threads)};
  return run(lookup, threads, [&](int64_t begin, int64_t end) { return TH_PICK(weight_gradient)(lookup, begin, end); });
}

TH_EXPORT int32_t th_read(const Table* table, const int64_t* rows, int64_t n, float* out, int32_t threads) {
  const Reading reading{table, rows, out};
  std::atomic<bool> done{true};
  parallel_for((n + ROWS_PER_PART - 1) / ROWS_PER_PART, threads, [&](int64_t p) {
    const int64_t begin = p * ROWS_PER_PART, end = begin + ROWS_PER_PART < n ? begin + ROWS_PER_PART : n;
    if (!TH_PICK(read_rows)(reading, begin, end)) done = false;
  });
  return done ? OK : OUT_OF_MEMORY;
}

}  // namespace thresher
