// max_p sum_c a_c p_c subject to KL(u || p) <= r has p_c = u_c x / (x + d_c) / W (FAAL, arXiv 2402.17729): d_c is how
// far class c lies below the worst one, W makes the sum 1, and the divergence, which falls as x > 0 grows, is r.
// Bound by the divergence of K classes, three divisions and a logarithm each, some 35 vector operations of double
// precision; six or so evaluations find x. Memory is read once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/lanes.h"
#include "support/platform.h"
#include "support/remainders.h"

namespace fairkernels {

// The classes of one problem, padded to whole lanes: depths d, 1 at most, and shares u, 0 for who is absent.
struct Classes {
  const double* depth;
  const double* share;
  int64_t width;
};

// KL(u || p) and its derivative by log x.
struct Divergence {
  double value;
  double slope;
};

FK_INLINE double total_weight(const Classes& classes, double x) {
  const auto weight = [=](int64_t c) { return classes.share[c] * (x / (x + classes.depth[c])); };
  return lane_sum<double>(classes.width, weight);
}

// With q = p / u the divergence is sum_c u_c (q_c - 1 - log q_c), because u and p have the same sum: no term is
// negative, and where q is close to 1 the term is what the logarithm's series leaves after its first.
FK_CLONES static Divergence divergence_at(const Classes& classes, double x) {
  const double inverse = 1 / total_weight(classes, x);
  double values[kLanes] = {};
  double squares[kLanes] = {};
  for (int64_t first = 0; first < classes.width; first += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const double share = classes.share[first + j];
      const double q = x / (x + classes.depth[first + j]) * inverse;
      const LogParts<double> log = log_parts(q);
      const double above = q - 1;
      values[j] += share * ((above - log.fraction) - log.exponent * 0.69314718055994530942 + log.remainder);
      squares[j] += share * (above * above);
    }
  }
  return {add_lanes(values), -add_lanes(squares) / inverse};
}

FK_CLONES static void weights_at(const Classes& classes, double x, double* weights) {
  const double inverse = 1 / total_weight(classes, x);
#pragma omp simd
  for (int64_t c = 0; c < classes.width; ++c) {
    weights[c] = classes.share[c] * (x / (x + classes.depth[c]) * inverse);
  }
}

// log x where the divergence is `radius`, by Newton's method on its logarithm, which falls with log x almost along two
// straight lines. Where a step leaves the interval that holds the root, or is more than half of the one before, the
// interval is halved instead, so that no problem takes more than some hundred evaluations. Below -700 the weights of
// all but the worst classes underflow, above 700 they are uniform to the last bit.
inline double find_root(const Classes& classes, double radius) {
  double low = -700;
  double high = std::clamp(-std::log(std::expm1(radius)), low, 700.0);  // the divergence is at most the radius there
  double at = high;
  double last_move = std::numeric_limits<double>::infinity();
  while (high - low > 1e-13) {
    const Divergence found = divergence_at(classes, std::exp(at));
    const double move = std::log(radius / found.value) * found.value / found.slope;
    if (std::fabs(move) < 1e-8) {
      return at + move;  // the error is squared once more
    }
    (found.value > radius ? low : high) = at;
    const double next = at + move;
    const bool converges = next > low && next < high && std::fabs(move) <= last_move / 2;
    last_move = converges ? std::fabs(move) : (high - low) / 2;
    at = converges ? next : (low + high) / 2;
  }
  return at;
}

// One problem at a time; `counts` may be null: every class is present.
class DroWeights {
 public:
  explicit DroWeights(int64_t n_classes)
      : n_classes_(n_classes), depth_(padded(n_classes)), share_(padded(n_classes)), weights_(padded(n_classes)) {}

  const double* operator()(const double* losses, const double* counts, double radius) {
    const auto present = [=](int64_t c) { return counts == nullptr || counts[c] != 0; };
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    double n_present = 0;
    double highest = -std::numeric_limits<double>::infinity();
    bool is_nan = false;
    for (int64_t c = 0; c < n_classes_; ++c) {
      if (present(c)) {
        n_present += 1;
        highest = std::max(highest, losses[c]);
        is_nan |= losses[c] != losses[c];
      }
    }
    double deepest = 0;
    for (int64_t c = 0; c < n_classes_; ++c) {
      depth_[c] = present(c) ? highest - losses[c] : 0;
      share_[c] = present(c) ? 1 / n_present : 0;
      deepest = std::max(deepest, depth_[c]);
    }
    const bool infinite = deepest == std::numeric_limits<double>::infinity();
    const bool alike = !(deepest > 0) || std::isinf(highest) || radius == 0;  // nothing to choose, or no choice
    if (is_nan || (infinite && !alike)) {
      std::transform(share_.begin(), share_.end(), weights_.begin(), [](double u) { return u == 0 ? 0 : nan; });
      return weights_.data();
    }
    if (alike) {
      return share_.data();
    }
    for (double& depth : depth_) {
      depth /= deepest;
    }
    const Classes classes{depth_.data(), share_.data(), padded(n_classes_)};
    weights_at(classes, std::exp(find_root(classes, radius)), weights_.data());
    return weights_.data();
  }

 private:
  int64_t n_classes_;
  std::vector<double> depth_;
  std::vector<double> share_;
  std::vector<double> weights_;
};

}  // namespace fairkernels
