// The scalar mathematics of the iteration for a leading singular value, see cpu/iteration.h; host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "support/platform.h"

namespace fairkernels {

template <typename Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

struct IterationOptions {
  bool accelerated = true;  // "locg"; else "power"
  int64_t iters = 64;
  double tol = 1e-5;   // of the residual |Av - theta v| relative to theta
  double noise = 1e-6;  // what is left of the residual when products are rounded; no tol goes below it
};

// A negative number stands for what is not given. Where singular values nearly tie, sigma is wrong by up to half of tol,
// and elsewhere u and v by about tol: 1e-5 promises sigma to 1e-5, 1e-10 gradients to 1e-8.
inline IterationOptions iteration_options(bool accelerated, bool in_double, int64_t iters = -1, double tol = -1) {
  const int64_t usual = !accelerated ? 1000 : in_double ? 256 : 64;
  return {accelerated, iters < 0 ? usual : iters, tol < 0 ? (in_double ? 1e-10 : 1e-5) : tol, in_double ? 2e-15 : 1e-6};
}

FK_HOST_DEVICE FK_INLINE double least_residual(const IterationOptions& options) {
  return options.tol > options.noise ? options.tol : options.noise;
}

// Of the squared length of p, what is left of it outside v and r.
constexpr double kDependent = 1e-6;   // the rest is mostly rounding
constexpr double kCancelled = 1e-2;   // its product is a difference of large numbers
constexpr double kMostlyLeft = 0.5;   // little has been taken away, which leaves no errors along v and r
constexpr int64_t kRefresh = 16;      // steps after which Av is multiplied anew

constexpr double kBesideHint = 0.1;

// The first direction. Ones always overlap with the leading vector of a nonnegative matrix; a signed one may turn them
// into 0, so there every entry differs.
FK_HOST_DEVICE FK_INLINE double first_entry(int64_t j, bool nonnegative) {
  const double turn = 0.618034 * static_cast<double>(j);
  return nonnegative ? 1.0 : 1.0 + 0.5 * (turn - std::floor(turn));
}

// 1 / length of a hint that is of use, else 0.
FK_HOST_DEVICE FK_INLINE double hint_weight(double length) {
  return length > 0 && length < kInfinity<double> ? 1 / length : 0;
}

// Of the power of two that brings entries to where neither their squares nor the sums of these leave the range.
FK_HOST_DEVICE FK_INLINE int exponent_to_take_out(double largest) {
  const int exponent = std::ilogb(largest);
  return exponent >= -20 && exponent <= 20 ? 0 : exponent;
}

struct Coefficients {
  double v, r, p;
};

// The eigenvector, of length 1, of the largest eigenvalue of [[0, a, b], [a, c, d], [b, d, e]], a > 0; (1, 0, 0) where all
// of it vanishes.
// Newton's method on the characteristic polynomial falls monotonically from an upper bound, the eigenvalue of
// [[0, h], [h, m]] with h = |(a, b)| and m that of the lower block. Close to convergence of the iteration around it the
// bound is h^2 / |m| already, and two turns are enough: Jacobi's rotations took longer than vectors of a hundred entries.
FK_HOST_DEVICE FK_INLINE Coefficients leading_eigenvector(double a, double b, double c, double d, double e) {
  const double h2 = a * a + b * b;
  const double m = (c + e) / 2 + std::sqrt((c - e) * (c - e) / 4 + d * d);
  const double root = std::sqrt(m * m / 4 + h2);
  double x = m > 0 ? m / 2 + root : h2 / (root - m / 2);
  for (int turn = 0; turn < 16; ++turn) {
    const double block = (x - c) * (x - e) - d * d;
    const double value = x * block - a * a * (x - e) - b * b * (x - c) - 2 * a * b * d;
    const double slope = block + x * (2 * x - c - e) - h2;
    const double change = value / slope;
    if (!(change > 1e-12 * x)) {
      break;
    }
    x -= change;
  }
  const Coefficients best{(x - c) * (x - e) - d * d, a * (x - e) + b * d, b * (x - c) + a * d};
  const double length = std::sqrt(best.v * best.v + best.r * best.r + best.p * best.p);
  if (!(length > 0)) {
    return {1, 0, 0};
  }
  return {best.v / length, best.r / length, best.p / length};
}

}  // namespace fairkernels
