// The row optimizers, on rows of a Shape held in sixteen-lane blocks; kernels/rules.py has the formulas.
#pragma once
#include "shape.h"
#include "update_abi.h"

namespace thresher::TH_ISA {

// The constants of a rule, where no store can change them.
struct Constants {
  explicit Constants(const Rule& rule)
      : lr(floats(rule.lr)),
        eps(floats(rule.eps)),
        beta1(floats(rule.beta1)),
        rest1(floats(rule.rest1)),
        beta2(floats(rule.beta2)),
        rest2(floats(rule.rest2)),
        correction1(floats(rule.correction1)),
        correction2(floats(rule.correction2)),
        ftrl_beta(floats(rule.ftrl_beta)),
        l1(floats(rule.l1)),
        l2(floats(rule.l2)),
        weight_decay(floats(rule.weight_decay)),
        shrink(floats(rule.shrink)),
        one(rule),
        decay(rule.decay) {}
  Vec lr, eps, beta1, rest1, beta2, rest2, correction1, correction2, ftrl_beta, l1, l2, weight_decay, shrink;
  Rule one;
  int32_t decay;
};

static inline float root(float x) { return __builtin_sqrtf(x); }

constexpr int vectors_of(int kind) { return kind == ADAM || kind == FTRL ? 2 : kind == ADAGRAD || kind == ROWWISE_ADAM; }
constexpr bool has_scalar(int kind) { return kind == ROWWISE_ADAGRAD || kind == ROWWISE_ADAM; }

// The sum of squares of g in the order of the contract: sixteen partial sums, folded by halves.
template <class S>
TH_INLINE float squares(const S& shape, const Vec* g) {
  Vec total = zeros();
  TH_BLOCKS(j, shape) total = total + g[j] * g[j];
  return sum(total);
}

// Decay, which comes before the rest.
template <class S>
TH_INLINE void apply_decay(const S& shape, const Constants& c, Vec* x, Vec* g) {
  if (c.decay == L2_DECAY) {
    TH_BLOCKS(j, shape) g[j] = g[j] + c.weight_decay * x[j];
  } else if (c.decay == DECOUPLED_DECAY) {
    TH_BLOCKS(j, shape) x[j] = x[j] * c.shrink;
  }
}

TH_INLINE Vec adam_step(const Constants& c, Vec x, Vec m, Vec second) {
  return x - (c.lr * (m * c.correction1)) / (sqrt(second * c.correction2) + c.eps);
}

TH_INLINE void ftrl_block(const Constants& c, Vec& x, Vec g, Vec& z, Vec& n) {
  const Vec before = sqrt(n);
  n = n + g * g;
  const Vec after = sqrt(n);
  z = (z + g) - ((after - before) / c.lr) * x;
  const Vec solved = (copysign(c.l1, z) - z) / ((c.ftrl_beta + after) / c.lr + c.l2);
  x = select(abs(z) <= c.l1, zeros(), solved);
}

// Updates a row whose gradient has its decay. `sums` is the sum of squares over the whole row, of row-wise optimizers.
template <int KIND, class S>
TH_INLINE void apply_rule(const S& shape, const Constants& c, Vec* x, const Vec* g, Vec* first, Vec* second,
                          float* scalar, float mean_square) {
  if constexpr (KIND == SGD) {
    TH_BLOCKS(j, shape) x[j] = x[j] - c.lr * g[j];
  } else if constexpr (KIND == ROWWISE_ADAGRAD) {
    *scalar = *scalar + mean_square;
    const Vec rate = floats(c.one.lr / (root(*scalar) + c.one.eps));
    TH_BLOCKS(j, shape) x[j] = x[j] - rate * g[j];
  } else if constexpr (KIND == ADAGRAD) {
    TH_BLOCKS(j, shape) {
      first[j] = first[j] + g[j] * g[j];
      x[j] = x[j] - (c.lr * g[j]) / (sqrt(first[j]) + c.eps);
    }
  } else if constexpr (KIND == ADAM) {
    TH_BLOCKS(j, shape) {
      first[j] = c.beta1 * first[j] + c.rest1 * g[j];
      second[j] = c.beta2 * second[j] + c.rest2 * (g[j] * g[j]);
      x[j] = adam_step(c, x[j], first[j], second[j]);
    }
  } else if constexpr (KIND == ROWWISE_ADAM) {
    *scalar = c.one.beta2 * *scalar + c.one.rest2 * mean_square;
    TH_BLOCKS(j, shape) {
      first[j] = c.beta1 * first[j] + c.rest1 * g[j];
      x[j] = adam_step(c, x[j], first[j], floats(*scalar));
    }
  } else {
    TH_BLOCKS(j, shape) ftrl_block(c, x[j], g[j], first[j], second[j]);
  }
}

}  // namespace thresher::TH_ISA
