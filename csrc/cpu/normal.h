// Normal numbers by the method of Box and Muller: from two uniform ones u0 and u1, sqrt(-2 ln(1 - u0)) times the cosine
// and the sine of 2 pi u1. In double and branch free, so that they vectorise: the library's functions take ten times as
// long.
#pragma once

#include <cmath>
#include <cstdint>

#include "support/bits.h"
#include "support/platform.h"

namespace fairkernels {

// ln(v) for normal v in (0, 1]: v = 2^e m with m in [1/sqrt 2, sqrt 2], ln m = 2 atanh((m - 1) / (m + 1)) by its
// series. Near 1, e is 0 and m - 1 exact, so that small logarithms keep their digits.
FK_INLINE double log_of_unit(double v) {
  const uint64_t bits = bits_as<uint64_t>(v);
  const double mantissa = bits_as<double>((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
  const double exponent = bits_as<double>((bits >> 52) | 0x4330000000000000ull) - (4503599627370496.0 + 1023.0);
  const bool large = mantissa > 1.4142135623730951;
  const double m = large ? 0.5 * mantissa : mantissa;
  const double e = large ? exponent + 1 : exponent;
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  double series = 1.0 / 23;
  series = series * z + 1.0 / 21;
  series = series * z + 1.0 / 19;
  series = series * z + 1.0 / 17;
  series = series * z + 1.0 / 15;
  series = series * z + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  series = series * z + 1.0;
  return e * 0.69314718055994530942 + 2 * s * series;
}

struct SineCosine {
  double sine;
  double cosine;
};

// Sine and cosine of 2 pi u, u in [0, 1): the nearest quarter turn is taken off exactly, the rest is at most pi / 4 and
// left to Taylor's polynomials (remainder 5e-17). The magic number 1.5 * 2^52 rounds and leaves the quarter in the low
// bits.
FK_INLINE SineCosine turn(double u) {
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

// n pairs: uniforms[2i], uniforms[2i + 1] to the normal numbers[2i], numbers[2i + 1].
FK_CLONES static void normal_pairs(const float* uniforms, int64_t n, double* numbers) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double radius = std::sqrt(-2 * log_of_unit(1 - static_cast<double>(uniforms[2 * i])));
    const SineCosine angle = turn(uniforms[2 * i + 1]);
    numbers[2 * i] = radius * angle.cosine;
    numbers[2 * i + 1] = radius * angle.sine;
  }
}

}  // namespace fairkernels
