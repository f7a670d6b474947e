// Random points of a ball, by element; host and device. Products and sums are kept apart, so that no compiler fuses them
// and every machine starts from the same point.
#pragma once

#include <cmath>
#include <cstdint>

#include "support/normal.h"
#include "support/philox.h"
#include "support/platform.h"

namespace fairkernels {

// u in [0, 1) to [-eps, eps).
template <typename Real>
FK_HOST_DEVICE FK_INLINE Real centred(float u, Real eps) {
  return eps * static_cast<Real>(2 * u - 1);  // exact in brackets
}

// eps u^(1/d): uniform in the volume of the d-dimensional ball.
FK_HOST_DEVICE FK_INLINE double random_radius(uint64_t seed, int64_t sample, double eps, int64_t dimensions) {
  const double u = uniform(philox(static_cast<uint64_t>(sample), 1, seed).word[0]);
  return eps * std::pow(u, 1.0 / static_cast<double>(dimensions));
}

// What brings a direction of this squared length to `radius`; one of no length stays where it is.
FK_HOST_DEVICE FK_INLINE double per_length(double squared, double radius) {
  return squared > 0 ? radius / std::sqrt(squared) : 0;
}

// Four uniform numbers of the elements [4 counter, 4 counter + 4).
struct Uniforms {
  float number[4];
};

FK_HOST_DEVICE FK_INLINE Uniforms uniforms(uint64_t counter, uint64_t seed) {
  const PhiloxWords words = philox(counter, 0, seed);
  return {{uniform(words.word[0]), uniform(words.word[1]), uniform(words.word[2]), uniform(words.word[3])}};
}

}  // namespace fairkernels
