// The distinct rows of a lookup and where they occur: a stable radix sort of (row, payload) for each table.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "check.h"
#include "dispatch.h"
#include "threads.h"

namespace thresher {
namespace {

constexpr int DIGIT_BITS = 11;   // 2048 counters and as many write streams stay in the first-level caches
constexpr int64_t FEW = 256;     // below, comparing is faster than counting
constexpr int MAX_PASSES = 6;

template <class Row>
struct Pair {
  Row row;
  uint32_t payload;
};

// Memory of one thread, kept between calls.
class Scratch {
 public:
  void* take(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(new char[bytes]);
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

// Calls each(row, position, bag) for every occurrence of a table, in ascending order of positions.
template <class Id, class Each>
void visit(const Bags& bags, int32_t table, const Each& each) {
  const Id* ids = static_cast<const Id*>(bags.ids);
  for (int32_t f = 0; f < bags.features; ++f) {
    if (bags.tables[f] != table) continue;
    int64_t position = bags.offsets[bags.first_bag[f]];
    for (int64_t bag = bags.first_bag[f]; bag < bags.first_bag[f + 1]; ++bag)
      for (const int64_t end = bags.offsets[bag + 1]; position < end; ++position)
        if (ids[position] >= 0) each(static_cast<uint64_t>(ids[position]), position, bag);
  }
}

struct Digits {
  explicit Digits(int64_t rows) {
    int bits = 1;
    while (bits < 63 && (rows - 1) >> bits) ++bits;
    passes = (bits + DIGIT_BITS - 1) / DIGIT_BITS;
    width = (bits + passes - 1) / passes;
  }
  uint32_t of(uint64_t row, int pass) const { return static_cast<uint32_t>(row >> (pass * width)) & mask(); }
  uint32_t mask() const { return (1u << width) - 1; }
  int passes, width;
};

// Where the next pair with each digit goes, for each pass.
struct Counters {
  uint32_t next[MAX_PASSES][1 << DIGIT_BITS];
};

template <class Id, class Row>
class TableSort {
 public:
  TableSort(const Bags& bags, const Sorted& out, int32_t table, int64_t rows, Scratch& scratch)
      : bags_(bags), out_(out), table_(table), digits_(rows) {
    const int64_t most = out.first[table + 1] - out.first[table];
    const size_t size = sizeof(Pair<Row>) * static_cast<size_t>(most);
    char* memory = static_cast<char*>(scratch.take(sizeof(Counters) + 2 * size));
    counters_ = reinterpret_cast<Counters*>(memory);
    from_ = reinterpret_cast<Pair<Row>*>(memory + sizeof(Counters));
    to_ = reinterpret_cast<Pair<Row>*>(memory + sizeof(Counters) + size);
    few_ = most < FEW;
  }

  void run() {
    note_bags();
    if (few_) {
      compare();
    } else {
      count();
      distribute();
    }
    merge();
  }

 private:
  uint32_t payload(int64_t position, int64_t bag) const {
    return static_cast<uint32_t>(out_.by_position ? position : bag);
  }

  void note_bags() {
    if (out_.bag_of == nullptr) return;
    visit<Id>(bags_, table_, [&](uint64_t, int64_t position, int64_t bag) {
      out_.bag_of[position] = static_cast<uint32_t>(bag);
    });
  }

  void compare() {
    size_ = 0;
    visit<Id>(bags_, table_, [&](uint64_t row, int64_t position, int64_t bag) {
      from_[size_++] = {static_cast<Row>(row), payload(position, bag)};
    });
    std::sort(from_, from_ + size_, [](const Pair<Row>& a, const Pair<Row>& b) {
      return a.row < b.row || (a.row == b.row && a.payload < b.payload);
    });
  }

  void count() {
    for (int pass = 0; pass < digits_.passes; ++pass)
      memset(counters_->next[pass], 0, sizeof(uint32_t) << digits_.width);
    size_ = 0;
    visit<Id>(bags_, table_, [&](uint64_t row, int64_t, int64_t) {
      ++size_;
      for (int pass = 0; pass < digits_.passes; ++pass) ++counters_->next[pass][digits_.of(row, pass)];
    });
    for (int pass = 0; pass < digits_.passes; ++pass) {
      uint32_t total = 0;
      for (uint32_t digit = 0; digit <= digits_.mask(); ++digit) {
        const uint32_t number = counters_->next[pass][digit];
        counters_->next[pass][digit] = total;
        total += number;
      }
    }
  }

  void distribute() {
    uint32_t* next = counters_->next[0];
    visit<Id>(bags_, table_, [&](uint64_t row, int64_t position, int64_t bag) {
      from_[next[digits_.of(row, 0)]++] = {static_cast<Row>(row), payload(position, bag)};
    });
    for (int pass = 1; pass < digits_.passes; ++pass) {
      next = counters_->next[pass];
      for (int64_t i = 0; i < size_; ++i) to_[next[digits_.of(from_[i].row, pass)]++] = from_[i];
      std::swap(from_, to_);
    }
  }

  void merge() {
    const int64_t first = out_.first[table_];
    int64_t* rows = out_.rows + first;
    uint32_t* payloads = out_.payload + first;
    uint32_t* segments = out_.segments + first + table_;
    int64_t unique = 0;
    segments[0] = 0;
    for (int64_t i = 0; i < size_; ++i) {
      payloads[i] = from_[i].payload;
      // Written over by the next pair if that is of the same row.
      rows[unique] = static_cast<int64_t>(from_[i].row);
      segments[unique + 1] = static_cast<uint32_t>(i + 1);
      unique += i + 1 == size_ || from_[i + 1].row != from_[i].row;
    }
    out_.unique[table_] = unique;
  }

  const Bags& bags_;
  const Sorted& out_;
  const int32_t table_;
  const Digits digits_;
  Counters* counters_;
  Pair<Row>* from_;
  Pair<Row>* to_;
  int64_t size_ = 0;
  bool few_;
};

template <class Id, class Row>
void sort_table(const Bags& bags, const Sorted& out, int32_t table, int64_t rows) {
  thread_local Scratch scratch;
  TableSort<Id, Row>(bags, out, table, rows, scratch).run();
}

// Where the occurrences of each table start among those of all.
void count_occurrences(const Bags& bags, int64_t* first) {
  std::fill(first, first + bags.n_tables + 1, 0);
  for (int32_t f = 0; f < bags.features; ++f)
    first[bags.tables[f] + 1] += bags.offsets[bags.first_bag[f + 1]] - bags.offsets[bags.first_bag[f]];
  for (int32_t t = 0; t < bags.n_tables; ++t) first[t + 1] += first[t];
}

}  // namespace

bool good_bags(const Table* tables, const Bags& bags, int threads) {
  const int64_t all = bags.first_bag[bags.features];
  if (bags.offsets[0] != 0 || bags.offsets[all] != bags.n || !TH_PICK(good_offsets)(bags, 0, all)) return false;
  std::atomic<bool> good{true};
  parallel_for(bags.features, threads, [&](int64_t f) {
    const int64_t begin = bags.offsets[bags.first_bag[f]], end = bags.offsets[bags.first_bag[f + 1]];
    if (!TH_PICK(good_ids)(tables[bags.tables[f]], bags, begin, end)) good = false;
  });
  return good;
}

TH_EXPORT int32_t th_sort(const Table* tables, const Bags* bags, Sorted* out, int32_t threads) {
  if (!good_bags(tables, *bags, threads)) return BAD_BAGS;
  count_occurrences(*bags, out->first);
  std::atomic<int32_t> fault{OK};
  parallel_for(bags->n_tables, threads, [&](int64_t t) {
    const int64_t rows = tables[t].rows;
    const bool narrow = rows <= int64_t{1} << 32;
    const auto sort = bags->wide_ids ? (narrow ? sort_table<int64_t, uint32_t> : sort_table<int64_t, uint64_t>)
                                     : (narrow ? sort_table<int32_t, uint32_t> : sort_table<int32_t, uint64_t>);
    try {
      sort(*bags, *out, static_cast<int32_t>(t), rows);
    } catch (const std::bad_alloc&) {
      fault = OUT_OF_MEMORY;
    }
  });
  return fault;
}

}  // namespace thresher
