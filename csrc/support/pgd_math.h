// One element of a step of projected gradient descent; host and device.
#pragma once

#include <cmath>

#include "support/clip.h"
#include "support/platform.h"

namespace fairkernels {

// +1, -1, and 0 for 0 and NaN, by one comparison.
template <typename Real>
FK_HOST_DEVICE FK_INLINE Real sign(Real x) {
  return std::fabs(x) > 0 ? std::copysign(Real(1), x) : Real(0);
}

// clip(clip(from + step sign(grad), centre - eps, centre + eps), low, high)
template <typename Real>
FK_HOST_DEVICE FK_INLINE Real linf_moved(Real from, Real grad, Real centre, Real step, Real eps, Real low, Real high) {
  return clip(clip(from + step * sign(grad), centre - eps, centre + eps), low, high);
}

// clip(centre + ((from - centre) + step grad) shrink, low, high)
template <typename Real>
FK_HOST_DEVICE FK_INLINE Real l2_moved(Real from, Real grad, Real centre, Real step, Real shrink, Real low, Real high) {
  return clip(centre + ((from - centre) + step * grad) * shrink, low, high);
}

// Sums over a sample, in double: squares of large or tiny gradients would leave the range of floats.
struct L2Sums {
  double grad_grad;
  double delta_delta;
  double delta_grad;
};

// The factors of a sample that go with the gradient and, so that it ends in the ball, with all of the perturbation; NaN
// stays NaN.
struct L2Step {
  double step;
  double shrink;
};

FK_HOST_DEVICE FK_INLINE L2Step l2_step_of(L2Sums sums, double alpha, double eps) {
  const double step = alpha / (std::sqrt(sums.grad_grad) + 1e-10);
  const double squared = sums.delta_delta + 2 * step * sums.delta_grad + step * step * sums.grad_grad;
  return {step, squared <= eps * eps ? 1 : eps / std::sqrt(squared)};
}

}  // namespace fairkernels
