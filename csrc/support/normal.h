// Normal numbers by the method of Box and Muller: from two uniform ones u0 and u1, sqrt(-2 ln(1 - u0)) times the cosine
// and the sine of 2 pi u1. In double and branch free, so that they vectorise: the library's functions take ten times as
// long; host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "support/bits.h"
#include "support/platform.h"
#include "support/remainders.h"

namespace fairkernels {

struct SineCosine {
  double sine;
  double cosine;
};

// Sine and cosine of 2 pi u, u in [0, 1): the nearest quarter turn is taken off exactly, the rest is at most pi / 4 and
// left to Taylor's polynomials (remainder 5e-17). The magic number 1.5 * 2^52 rounds and leaves the quarter in the low
// bits.
FK_HOST_DEVICE FK_INLINE SineCosine turn(double u) {
  const double magic = 6755399441055744.0;
  const double shifted = 4 * u + magic;
  const uint64_t quarter = bits_as<uint64_t>(shifted);
  const double x = (4 * u - (shifted - magic)) * 1.57079632679489661923;
  const double z = x * x;
  double sine = -1.0 / 1307674368000.0;
  sine = sine * z + 1.0 / 6227020800.0;
  sine = sine * z - 1.0 / 39916800.0;
  sine = sine * z + 1.0 / 362880.0;
  sine = sine * z - 1.0 / 5040.0;
  sine = sine * z + 1.0 / 120.0;
  sine = sine * z - 1.0 / 6.0;
  sine = sine * z * x + x;
  double cosine = 1.0 / 20922789888000.0;
  cosine = cosine * z - 1.0 / 87178291200.0;
  cosine = cosine * z + 1.0 / 479001600.0;
  cosine = cosine * z - 1.0 / 3628800.0;
  cosine = cosine * z + 1.0 / 40320.0;
  cosine = cosine * z - 1.0 / 720.0;
  cosine = cosine * z + 1.0 / 24.0;
  cosine = cosine * z - 0.5;
  cosine = cosine * z + 1.0;
  const bool swapped = (quarter & 1) != 0;
  const uint64_t sine_sign = (quarter & 2) << 62;
  const uint64_t cosine_sign = ((quarter + 1) & 2) << 62;
  return {bits_as<double>(bits_as<uint64_t>(swapped ? cosine : sine) ^ sine_sign),
          bits_as<double>(bits_as<uint64_t>(swapped ? sine : cosine) ^ cosine_sign)};
}

struct NormalPair {
  double first;
  double second;
};

FK_HOST_DEVICE FK_INLINE NormalPair normal_pair(float u0, float u1) {
  const double radius = std::sqrt(-2 * log_normal(1 - static_cast<double>(u0)));
  const SineCosine angle = turn(u1);
  return {radius * angle.cosine, radius * angle.sine};
}

// n pairs: uniforms[2i], uniforms[2i + 1] to the normal numbers[2i], numbers[2i + 1].
FK_CLONES static void normal_pairs(const float* uniforms, int64_t n, double* numbers) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const NormalPair pair = normal_pair(uniforms[2 * i], uniforms[2 * i + 1]);
    numbers[2 * i] = pair.first;
    numbers[2 * i + 1] = pair.second;
  }
}

}  // namespace fairkernels
