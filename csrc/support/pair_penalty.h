// The symmetry penalty of Sy-FAR (arXiv 2509.12939), |C_ij - C_ji| * s / (s + eps) with s = C_ij + C_ji; host and
// device.
#pragma once

#include <cmath>
#include <limits>

#include "support/platform.h"

namespace fairkernels {

// One unordered pair of classes: its penalty and the derivative by each rate.
template <typename Real>
struct PairPenalty {
  Real value;
  Real by_forward;
  Real by_backward;
};

// Branch free, so that loops over pairs vectorise; a division by zero is computed and not selected. One division, which costs
// as much as all else together. It must not overflow: eps is at least `least_eps`, which no sum of rates notices.
template <typename Real>
FK_HOST_DEVICE FK_INLINE PairPenalty<Real> pair_penalty(Real forward, Real backward, Real eps) {
  const Real mass = forward + backward;
  const Real gap = forward - backward;
  const Real width = std::fabs(gap);
  const Real inverse = 1 / (mass + eps);
  const Real damping = mass * inverse;
  const Real together = gap > 0 ? damping : (gap < 0 ? -damping : Real(0));  // draws the two rates towards each other
  const Real down = width * inverse * (eps * inverse);  // lowers both, small pairs weigh less; (mass + eps)^2 would underflow
  const Real none = mass - mass;                        // 0, or NaN if a rate is
  const bool charged = mass > 0;
  return {charged ? width * damping : none, charged ? down + together : none, charged ? down - together : none};
}

template <typename Real>
constexpr Real kLeastEps = 4 * std::numeric_limits<Real>::min();

template <typename Real>
FK_HOST_DEVICE FK_INLINE Real least_eps(double eps) {
  return static_cast<Real>(eps) < kLeastEps<Real> ? kLeastEps<Real> : static_cast<Real>(eps);
}

// What the sum over the pairs of `present` classes is multiplied by; the mean over no pairs is 0.
FK_HOST_DEVICE FK_INLINE double pair_scale(bool mean, double present) {
  const double pairs = present * (present - 1) / 2;
  return !mean ? 1 : pairs > 0 ? 1 / pairs : 0;
}

}  // namespace fairkernels
