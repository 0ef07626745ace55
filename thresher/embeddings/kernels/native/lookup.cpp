// Rows to vectors of bags, and what else only reads rows.
#include "lookup.h"

#include <type_traits>

#include "check.h"
#include "row.h"

namespace thresher::TH_ISA {
namespace {

// The bags of one feature within a block.
struct Segment {
  int64_t feature;
  int64_t bag, last_bag;  // last_bag is one beyond
  int64_t begin, end;     // their ids
};

Segment segment_at(const Lookup& lookup, int64_t number) {
  const Bags& bags = *lookup.bags;
  const int64_t f = number % bags.features, block = number / bags.features;
  const int64_t first = bags.first_bag[f], batch = bags.first_bag[f + 1] - first;
  const int64_t bag = first + batch * block / lookup.blocks, last = first + batch * (block + 1) / lookup.blocks;
  return {f, bag, last, bags.offsets[bag], bags.offsets[last]};
}

// Calls use(shape) with the shape for rows of `dim` columns.
template <class Use>
void with_shape(int64_t dim, const Use& use) {
  switch (dim) {
    case 16: return use(Shape<1, false>(dim));
    case 32: return use(Shape<2, false>(dim));
    case 64: return use(Shape<4, false>(dim));
    case 128: return use(Shape<8, false>(dim));
    case 256: return use(Shape<16, false>(dim));
    default: return dim < 16 ? use(Shape<1, true>(dim)) : use(Shape<0, true>(dim));
  }
}

// Calls use(shape, rows) for the rows of a table.
template <class Use>
void with_rows(const Table& table, const Scratch& scratch, const Ids& ids, const Use& use) {
  with_shape(table.dim, [&](const auto& shape) {
    using S = std::decay_t<decltype(shape)>;
    if (table.desc) {
      use(shape, TieredRows<S>(table, scratch, ids));
    } else {
      use(shape, FlatRows<S>(table, scratch, ids));
    }
  });
}

const Table& table_of(const Lookup& lookup, const Segment& segment) {
  return lookup.tables[lookup.bags->tables[segment.feature]];
}

// The first rows of a segment have no rows before them to ask for them: earlier segments do, headers before records.
void ask_headers(const Lookup& lookup, const Segment& segment) {
  const Table& table = table_of(lookup, segment);
  if (!table.desc) return;
  const Ids ids(lookup.bags->ids, lookup.bags->wide_ids);
  const int64_t end = segment.begin + HEADERS_AHEAD < segment.end ? segment.begin + HEADERS_AHEAD : segment.end;
  for (int64_t i = segment.begin; i < end; ++i) __builtin_prefetch(table.desc + 2 * ids[i]);
}

void ask_records(const Lookup& lookup, const Segment& segment) {
  const Table& table = table_of(lookup, segment);
  const Ids ids(lookup.bags->ids, lookup.bags->wide_ids);
  const int64_t ahead = rows_ahead(table);
  const int64_t end = segment.begin + ahead < segment.end ? segment.begin + ahead : segment.end;
  for (int64_t i = segment.begin; i < end; ++i) {
    if (table.desc) {
      ask_tiered(table, ids[i]);
    } else {
      ask_flat(table, ids[i]);
    }
  }
}

// Calls use(segment) for segments begin .. end - 1, whose first rows have been asked for.
template <class Use>
void for_segments(const Lookup& lookup, int64_t begin, int64_t end, const Use& use) {
  if (begin < end) {
    ask_headers(lookup, segment_at(lookup, begin));
    ask_records(lookup, segment_at(lookup, begin));
  }
  if (begin + 1 < end) ask_headers(lookup, segment_at(lookup, begin + 1));
  for (int64_t number = begin; number < end; ++number) {
    if (number + 2 < end) ask_headers(lookup, segment_at(lookup, number + 2));
    if (number + 1 < end) ask_records(lookup, segment_at(lookup, number + 1));
    use(segment_at(lookup, number));
  }
}

template <bool WEIGHTED, class S, class R>
void pool(const S& shape, R rows, const Scratch& scratch, const Lookup& lookup, const Segment& segment) {
  const Bags& bags = *lookup.bags;
  Vec here[S::FIXED ? S::FIXED : 1];
  Vec* const total = S::FIXED ? here : scratch.vector(0);
  const int64_t stride = bags.stride[segment.feature];
  float* out = lookup.out + bags.start[segment.feature] +
               (segment.bag - bags.first_bag[segment.feature]) * stride;
  int64_t i = segment.begin;
  rows.begin(i, segment.end);
  for (int64_t bag = segment.bag; bag < segment.last_bag; ++bag, out += stride) {
    const int64_t first = i, end = bags.offsets[bag + 1];
    TH_BLOCKS(j, shape) total[j] = zeros();
    for (; i < end; ++i) {
      rows.advance(i, segment.end);
      const Vec weight = floats(WEIGHTED ? bags.weights[i] : 1.0f);
      rows.visit(i, [&](int j, Vec x) TH_ALWAYS { total[j] = total[j] + (WEIGHTED ? weight * x : x); });
    }
    if (bags.pooling == MEAN && end > first) {
      const Vec inverse = floats(1.0f / static_cast<float>(end - first));
      TH_BLOCKS(j, shape) total[j] = total[j] * inverse;
    }
    TH_BLOCKS(j, shape) shape.store(out, j, total[j]);
  }
}

template <bool WEIGHTED, class S, class R>
void each_row(const S& shape, R rows, const Lookup& lookup, const Segment& segment) {
  const Bags& bags = *lookup.bags;
  const int64_t dim = rows.dim;
  rows.begin(segment.begin, segment.end);
  for (int64_t i = segment.begin; i < segment.end; ++i) {
    rows.advance(i, segment.end);
    float* out = lookup.out + i * dim;
    const Vec weight = floats(WEIGHTED ? bags.weights[i] : 1.0f);
    rows.visit(i, [&](int j, Vec x) TH_ALWAYS { shape.store(out, j, WEIGHTED ? weight * x : x); });
  }
}

template <class S, class R>
void products(const S& shape, R rows, const Lookup& lookup, const Segment& segment) {
  const Bags& bags = *lookup.bags;
  const bool pooled = bags.pooling != EACH;
  const int64_t stride = pooled ? bags.stride[segment.feature] : 0;
  const float* grad = lookup.grad;
  if (pooled) grad += bags.start[segment.feature] + (segment.bag - bags.first_bag[segment.feature]) * stride;
  int64_t i = segment.begin;
  rows.begin(i, segment.end);
  for (int64_t bag = segment.bag; bag < segment.last_bag; ++bag, grad += stride) {
    const int64_t first = i, end = bags.offsets[bag + 1];
    const float inverse = 1.0f / static_cast<float>(end - first);
    for (; i < end; ++i) {
      rows.advance(i, segment.end);
      const float* g = pooled ? grad : grad + i * rows.dim;
      Vec total = zeros();
      rows.visit(i, [&](int j, Vec x) TH_ALWAYS { total = total + shape.load(g, j) * x; });
      lookup.weight_grad[i] = bags.pooling == MEAN ? sum(total) * inverse : sum(total);
    }
  }
}

int64_t widest(const Lookup& lookup) {
  int64_t dim = 1;
  for (int32_t t = 0; t < lookup.bags->n_tables; ++t) dim = lookup.tables[t].dim > dim ? lookup.tables[t].dim : dim;
  return dim;
}

}  // namespace

bool good_offsets(const Bags& bags, int64_t begin, int64_t end) {
  bool good = true;
  for (int64_t bag = begin; bag < end; ++bag) good &= bags.offsets[bag] <= bags.offsets[bag + 1];
  return good;
}

namespace {

template <class Id>
bool within(const Id* ids, int64_t begin, int64_t end, int64_t lowest, int64_t rows) {
  bool good = true;
  for (int64_t i = begin; i < end; ++i) good &= (ids[i] >= lowest) & (ids[i] < rows);
  return good;
}

}  // namespace

bool good_ids(const Table& table, const Bags& bags, int64_t begin, int64_t end) {
  const int64_t lowest = table.identity ? -1 : 0;
  return bags.wide_ids ? within(static_cast<const int64_t*>(bags.ids), begin, end, lowest, table.rows)
                       : within(static_cast<const int32_t*>(bags.ids), begin, end, lowest, table.rows);
}

bool look_up(const Lookup& lookup, int64_t begin, int64_t end) {
  const Scratch scratch(widest(lookup));
  if (scratch.failed()) return false;
  const Bags& bags = *lookup.bags;
  for_segments(lookup, begin, end, [&](const Segment& segment) {
    with_rows(table_of(lookup, segment), scratch, Ids(bags.ids, bags.wide_ids), [&](const auto& shape, auto rows) {
      if (bags.pooling == EACH) {
        bags.weights ? each_row<true>(shape, rows, lookup, segment) : each_row<false>(shape, rows, lookup, segment);
      } else {
        bags.weights ? pool<true>(shape, rows, scratch, lookup, segment)
                     : pool<false>(shape, rows, scratch, lookup, segment);
      }
    });
  });
  return true;
}

bool weight_gradient(const Lookup& lookup, int64_t begin, int64_t end) {
  const Scratch scratch(widest(lookup));
  if (scratch.failed()) return false;
  for_segments(lookup, begin, end, [&](const Segment& segment) {
    with_rows(table_of(lookup, segment), scratch, Ids(lookup.bags->ids, lookup.bags->wide_ids),
              [&](const auto& shape, auto rows) { products(shape, rows, lookup, segment); });
  });
  return true;
}

bool read_rows(const Reading& reading, int64_t begin, int64_t end) {
  const Table& table = *reading.table;
  const Scratch scratch(table.dim);
  if (scratch.failed()) return false;
  with_rows(table, scratch, Ids(reading.rows, true), [&](const auto& shape, auto rows) {
    rows.begin(begin, end);
    for (int64_t i = begin; i < end; ++i) {
      rows.advance(i, end);
      float* out = reading.out + i * table.dim;
      rows.visit(i, [&](int j, Vec x) TH_ALWAYS { shape.store(out, j, x); });
    }
  });
  return true;
}

}  // namespace thresher::TH_ISA
