// The symmetry penalty of Sy-FAR (arXiv 2509.12939), |C_ij - C_ji| * s / (s + eps) with s = C_ij + C_ji; host and
// device.
#pragma once

#include <cmath>

#include "support/platform.h"

namespace fairkernels {

// One unordered pair of classes: its penalty and the derivative by each rate.
template <typename Real>
struct PairPenalty {
  Real value;
  Real by_forward;
  Real by_backward;
};

// Branch free, so that loops over pairs vectorise; a division by zero is computed and not selected.
template <typename Real>
FK_HOST_DEVICE FK_INLINE PairPenalty<Real> pair_penalty(Real forward, Real backward, Real eps) {
  const Real mass = forward + backward;
  const Real gap = forward - backward;
  const Real width = std::fabs(gap);
  const Real damped = mass + eps;
  const Real damping = mass / damped;
  const Real together = gap > 0 ? damping : (gap < 0 ? -damping : Real(0));  // draws the two rates towards each other
  const Real down =
      width / damped * (eps / damped);  // lowers both, small pairs weigh less; (mass + eps)^2 would underflow
  const Real none = mass - mass;        // 0, or NaN if a rate is
  const bool charged = mass > 0;
  return {charged ? width * damping : none, charged ? down + together : none, charged ? down - together : none};
}

}  // namespace fairkernels
