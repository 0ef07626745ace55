// The gradient of a row, added up from the places where the row occurs.
#pragma once
#include "shape.h"
#include "update_abi.h"

namespace thresher::TH_ISA {

enum { GRADIENTS_AHEAD = 12 };  // occurrences whose gradients are asked for before they are used

// The occurrences of one table's rows.
class Source {
 public:
  Source(const Update& update, int table)
      : bags_(*update.bags), sorted_(*update.sorted), grad_(update.grad), dim_(update.tables[table].dim) {
    const int64_t begin = sorted_.first[table];
    payload_ = sorted_.payload + begin;
    rows = sorted_.rows + begin;
    segments = sorted_.segments + begin + table;
    unique = sorted_.unique[table];
    last_ = unique ? segments[unique] - 1 : 0;
    int features = 0;
    for (int f = 0; f < bags_.features; f++) {
      if (bags_.tables[f] != table) continue;
      feature_ = f;
      features++;
    }
    one_feature_ = features == 1;
    plain_ = bags_.pooling == EACH ? bags_.weights == nullptr : bags_.pooling == SUM && !sorted_.by_position && one_feature_;
    base_ = grad_;
    stride_ = dim_;
    if (plain_ && bags_.pooling != EACH) {
      base_ = grad_ + bags_.start[feature_] - bags_.first_bag[feature_] * bags_.stride[feature_];
      stride_ = bags_.stride[feature_];
    }
  }

  // g = 0 + c_1 G_1 + c_2 G_2 + ... of distinct row u.
  template <class S>
  TH_INLINE_MEMBER void add_up(const S& shape, int64_t u, Vec* g) const {
    TH_BLOCKS(j, shape) g[j] = zeros();
    const uint32_t end = segments[u + 1];
    for (uint32_t k = segments[u]; k < end; k++) {
      if (plain_) {
        ask_for(shape, base_ + payload_[ahead(k)] * stride_);
        const float* from = base_ + payload_[k] * stride_;
        TH_BLOCKS(j, shape) g[j] = g[j] + shape.load(from, j);
      } else {
        ask_for(shape, place(payload_[ahead(k)]));
        const float* from = place(payload_[k]);
        const Vec factor = floats(coefficient(payload_[k]));
        TH_BLOCKS(j, shape) g[j] = g[j] + factor * shape.load(from, j);
      }
    }
  }

  // How much the priority of row u grows by, before the gain: the sum of the importance of its samples.
  float increment(int64_t u, const float* importance) const {
    if (!importance) return static_cast<float>(segments[u + 1] - segments[u]);
    float total = 0.0f;
    for (uint32_t k = segments[u]; k < segments[u + 1]; k++) {
      const uint32_t number = bag(payload_[k]);
      total = total + importance[number - bags_.first_bag[feature_of(number)]];
    }
    return total;
  }

  const int64_t* rows;
  const uint32_t* segments;
  int64_t unique;

 private:
  template <class S>
  TH_INLINE_MEMBER static void ask_for(const S& shape, const float* vector) {
    TH_BLOCKS(j, shape) __builtin_prefetch(vector + LANES * j);
  }

  uint32_t ahead(uint32_t k) const { return k + GRADIENTS_AHEAD < last_ ? k + GRADIENTS_AHEAD : last_; }

  uint32_t bag(uint32_t payload) const { return sorted_.by_position ? sorted_.bag_of[payload] : payload; }

  // The last feature that starts at the bag or before.
  int feature_of(uint32_t bag) const {
    if (one_feature_) return feature_;
    int low = 0, high = bags_.features;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (bags_.first_bag[middle] <= bag) low = middle; else high = middle;
    }
    return low;
  }

  const float* place(uint32_t payload) const {
    if (bags_.pooling == EACH) return grad_ + payload * dim_;
    const uint32_t number = bag(payload);
    const int f = feature_of(number);
    return grad_ + bags_.start[f] + (number - bags_.first_bag[f]) * bags_.stride[f];
  }

  float coefficient(uint32_t payload) const {
    const float weight = bags_.weights ? bags_.weights[payload] : 1.0f;
    if (bags_.pooling != MEAN) return weight;
    const uint32_t number = bag(payload);
    return weight * (1.0f / static_cast<float>(bags_.offsets[number + 1] - bags_.offsets[number]));
  }

  const Bags& bags_;
  const Sorted& sorted_;
  const float* grad_;
  int64_t dim_;
  const uint32_t* payload_;
  uint32_t last_;
  int feature_ = 0;
  bool one_feature_;
  bool plain_;
  const float* base_;
  int64_t stride_;
};

// Whether all of a row's gradient are numbers.
template <class S>
TH_INLINE bool finite(const S& shape, const Vec* g) {
  Vec size = abs(g[0]) * zeros();
  for (int j = 1; j < shape.blocks(); j++) size = size + g[j] * zeros();
  return all(size == zeros());
}

}  // namespace thresher::TH_ISA
