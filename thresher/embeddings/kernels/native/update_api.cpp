// Splits an update into parts, runs them, and gives the rows that move their slots in order.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "slots.h"
#include "threads.h"
#include "update.h"

namespace thresher {
namespace {

enum { PARTS_PER_THREAD = 8, COST_OF_ROW = 4 };  // a row costs as much as that many occurrences

int64_t cost(const Update& update, int table, int64_t u) {
  const Sorted& sorted = *update.sorted;
  const int64_t begin = sorted.first[table];
  return (sorted.segments[begin + table + u] + COST_OF_ROW * u) * (update.tables[table].dim + 16);
}

// The smallest number of rows of a table that cost at least `wanted`.
int64_t rows_for(const Update& update, int table, int64_t wanted) {
  int64_t low = 0, high = update.sorted->unique[table];
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(update, table, middle) < wanted) low = middle + 1; else high = middle;
  }
  return low;
}

// Parts of about equal cost, over the distinct rows of all tables.
std::vector<Part> split(const Update& update) {
  const int n_tables = update.bags->n_tables;
  int64_t total = 0;
  for (int t = 0; t < n_tables; t++) total += cost(update, t, update.sorted->unique[t]);
  const int64_t parts = update.threads > 1 ? update.threads * PARTS_PER_THREAD : 1;
  std::vector<Part> result;
  int64_t rows_before = 0, cost_before = 0, begin = 0;
  int table = 0;
  for (int64_t p = 1; p <= parts; p++) {
    const int64_t goal = total / parts * p;
    auto here = [&] { return cost(update, table, update.sorted->unique[table]); };
    while (table < n_tables - 1 && cost_before + here() < goal) {
      cost_before += here();
      rows_before += update.sorted->unique[table++];
    }
    int64_t end = n_tables ? rows_before + rows_for(update, table, goal - cost_before) : 0;
    if (p == parts) {
      end = 0;
      for (int t = 0; t < n_tables; t++) end += update.sorted->unique[t];
    }
    result.push_back(Part{begin, end, {nullptr, 0, 0}, 0, -1, 0, false});
    begin = end;
  }
  return result;
}

template <class Do>
void for_moves(const std::vector<Part>& parts, const Do& act) {
  for (const Part& part : parts) {
    for (int64_t at = 0; at < part.stash.used;) {
      Move& move = *reinterpret_cast<Move*>(part.stash.bytes + at);
      at += static_cast<int64_t>(sizeof(Move)) + move.floats * 4;
      act(move);
    }
  }
}

// Decides which rows move and gives them slots. Those that rows leave become free once all have been given.
void place_moves(const Update& update, const std::vector<Part>& parts, UpdateCounts& counts) {
  for_moves(parts, [&](Move& move) {
    const Table& table = update.tables[move.table];
    const uint32_t place = table.desc[2 * move.row];
    const int tier = static_cast<int>(place >> SLOT_BITS);
    const bool fits = move.wanted == DROPPED || free_slots(table, move.wanted) > 0;
    const int target = fits ? move.wanted : move.home;
    counts.refused += !fits;
    counts.promoted += tier != NONE && target > tier;
    move.place = place;
    if (target == tier) return;
    move.place = arrive(table, target);
    move.scale = 0.0f;
  });
  for_moves(parts, [&](const Move& move) {
    const Table& table = update.tables[move.table];
    const uint32_t place = table.desc[2 * move.row];
    if (place != move.place) leave(table, place);
  });
}

// The bag of each position in ids.
std::vector<uint32_t> bags_of_positions(const Bags& bags) {
  std::vector<uint32_t> result(static_cast<size_t>(bags.n));
  const int64_t n_bags = bags.first_bag[bags.features];
  for (int64_t bag = 0; bag < n_bags; bag++) {
    std::fill(result.begin() + bags.offsets[bag], result.begin() + bags.offsets[bag + 1], static_cast<uint32_t>(bag));
  }
  return result;
}

// Gradients feature after feature. In an output of many features the vectors of one of them are far apart, at distances
// that fill only a part of a cache's sets: read several times each, they are worth putting side by side first.
class Regrouped {
 public:
  enum { FEWEST_READS = 4, BAGS_OF_PART = 64 };

  explicit Regrouped(const Update& update) : update(update), bags_(*update.bags) {
    const int64_t n_bags = bags_.first_bag[bags_.features];
    if (bags_.pooling == EACH || bags_.features < 2 || bags_.n < FEWEST_READS * n_bags) return;
    int64_t size = 0;
    for (int f = 0; f < bags_.features; f++) {
      const int64_t dim = update.tables[bags_.tables[f]].dim;
      if (bags_.stride[f] == dim) return;
      starts_.push_back(size);
      strides_.push_back(dim);
      size += dim * (bags_.first_bag[f + 1] - bags_.first_bag[f]);
    }
    grad_.reset(static_cast<float*>(std::malloc(static_cast<size_t>(size) * sizeof(float))));
    if (!grad_) return;
    copy();
    bags_.start = starts_.data();
    bags_.stride = strides_.data();
    this->update.bags = &bags_;
    this->update.grad = grad_.get();
  }
  Regrouped(const Regrouped&) = delete;
  Regrouped& operator=(const Regrouped&) = delete;

  Update update;

 private:
  // All features have as many bags, or their gradients would stand side by side already.
  void copy() const {
    const int64_t n_bags = bags_.first_bag[1];
    parallel_for((n_bags + BAGS_OF_PART - 1) / BAGS_OF_PART, static_cast<int>(update.threads), [&](int64_t part) {
      const int64_t end = std::min((part + 1) * BAGS_OF_PART, n_bags);
      for (int64_t bag = part * BAGS_OF_PART; bag < end; bag++) {
        for (int f = 0; f < bags_.features; f++) {
          const size_t i = static_cast<size_t>(f);
          std::memcpy(grad_.get() + starts_[i] + bag * strides_[i], update.grad + bags_.start[f] + bag * bags_.stride[f],
                      static_cast<size_t>(strides_[i]) * sizeof(float));
        }
      }
    });
  }

  Bags bags_;
  std::vector<int64_t> starts_, strides_;
  std::unique_ptr<float, decltype(&std::free)> grad_{nullptr, std::free};
};

// The first fault of the parts, in the order of rows.
int32_t fault_of(const std::vector<Part>& parts, Error* error) {
  *error = Error{0, OK, 0};
  for (const Part& part : parts) {
    if (part.out_of_memory) error->fault = OUT_OF_MEMORY;
    if (part.bad_table < 0) continue;
    error->fault = BAD_GRADIENT;
    error->table = static_cast<int32_t>(part.bad_table);
    error->row = part.bad_row;
    break;
  }
  return error->fault;
}

int32_t run_update(const Update& given, UpdateCounts* counts, Error* error) {
  const Regrouped regrouped(given);
  const Update& update = regrouped.update;
  std::vector<Part> parts = split(update);
  const int threads = static_cast<int>(update.threads);
  const int64_t n = static_cast<int64_t>(parts.size());
  parallel_for(n, threads, [&](int64_t p) { TH_PICK(update_part)(update, parts[static_cast<size_t>(p)]); });
  if (fault_of(parts, error) == OK) {
    *counts = UpdateCounts{parts.back().end, 0, 0};
    for (const Part& part : parts) counts->refused += part.refused;
    place_moves(update, parts, *counts);
    parallel_for(n, threads, [&](int64_t p) { TH_PICK(encode_moves)(update, parts[static_cast<size_t>(p)]); });
  }
  for (const Part& part : parts) std::free(part.stash.bytes);
  return error->fault;
}

}  // namespace

TH_EXPORT int32_t th_row_sums(const Update* given) {
  const Regrouped regrouped(*given);
  const Update& update = regrouped.update;
  std::vector<Part> parts = split(update);
  parallel_for(static_cast<int64_t>(parts.size()), static_cast<int>(update.threads),
               [&](int64_t p) { TH_PICK(sum_part)(update, parts[static_cast<size_t>(p)]); });
  for (const Part& part : parts) {
    if (part.out_of_memory) return OUT_OF_MEMORY;
  }
  return OK;
}

TH_EXPORT int32_t th_update(const Update* update, UpdateCounts* counts, Error* error) {
  if (!update->importance || update->bags->pooling != EACH) return run_update(*update, counts, error);
  // Samples are known by their bags, which a lookup without pooling does not write down.
  std::vector<uint32_t> bags = bags_of_positions(*update->bags);
  Sorted sorted = *update->sorted;
  sorted.bag_of = bags.data();
  Update with_bags = *update;
  with_bags.sorted = &sorted;
  return run_update(with_bags, counts, error);
}

}  // namespace thresher
