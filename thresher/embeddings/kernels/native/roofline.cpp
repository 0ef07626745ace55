// What memory allows: the same rows touched in the same order with as little work as possible. For benchmarks.

#include <cstdint>
#include <cstring>

#include "dispatch.h"

namespace {

constexpr int64_t kAhead = 16;
constexpr int64_t kLine = 64;

inline void fetch(const uint8_t* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(row + at);
}

}  // namespace

// Reads rows[i] (bytes each, a multiple of 4) of a table; returns a sum over their words, so that nothing is left out.
TH_EXPORT int64_t th_touch_read(const uint8_t* table, int64_t bytes, const int64_t* rows, int64_t n) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) fetch(table + rows[i + kAhead] * bytes, bytes);
    const uint8_t* row = table + rows[i] * bytes;
    for (int64_t at = 0; at < bytes; at += kLine) {
      uint32_t word;
      std::memcpy(&word, row + at, sizeof word);
      sum += word;
    }
  }
  return sum;
}

// Reads and writes back a word of every line of rows[i].
TH_EXPORT int64_t th_touch_write(uint8_t* table, int64_t bytes, const int64_t* rows, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) fetch(table + rows[i + kAhead] * bytes, bytes);
    uint8_t* row = table + rows[i] * bytes;
    for (int64_t at = 0; at < bytes; at += kLine) {
      uint32_t word;
      std::memcpy(&word, row + at, sizeof word);
      word ^= 1u;
      std::memcpy(row + at, &word, sizeof word);
    }
  }
  return n;
}
