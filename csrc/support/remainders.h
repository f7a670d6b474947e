// exp and log without the first terms of their series, which cancel in divergences of distributions that are close.
// Branch free, so that they inline into vectorised loops; host and device.
#pragma once

#include <cstdint>

#include "support/bits.h"
#include "support/platform.h"

namespace fairkernels {

// exp(x) - 1 - x for |x| <= 1, relative error about 1 ulp: x^2 (1/2! + x/3! + ...), the series cut where it no longer
// shows.
FK_HOST_DEVICE FK_INLINE float exp_remainder(float x) {
  float p = 1.0f / 39916800.0f;
  p = p * x + 1.0f / 3628800.0f;
  p = p * x + 1.0f / 362880.0f;
  p = p * x + 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  return p * (x * x);
}

FK_HOST_DEVICE FK_INLINE double exp_remainder(double x) {
  double p = 1.0 / 6402373705728000.0;
  p = p * x + 1.0 / 355687428096000.0;
  p = p * x + 1.0 / 20922789888000.0;
  p = p * x + 1.0 / 1307674368000.0;
  p = p * x + 1.0 / 87178291200.0;
  p = p * x + 1.0 / 6227020800.0;
  p = p * x + 1.0 / 479001600.0;
  p = p * x + 1.0 / 39916800.0;
  p = p * x + 1.0 / 3628800.0;
  p = p * x + 1.0 / 362880.0;
  p = p * x + 1.0 / 40320.0;
  p = p * x + 1.0 / 5040.0;
  p = p * x + 1.0 / 720.0;
  p = p * x + 1.0 / 120.0;
  p = p * x + 1.0 / 24.0;
  p = p * x + 1.0 / 6.0;
  p = p * x + 0.5;
  return p * (x * x);
}

// log(x) = exponent ln 2 + fraction - remainder for normal x > 0: x = 2^exponent (1 + fraction), 1 + fraction between
// sqrt(1/2) and sqrt(2), and remainder = fraction - log(1 + fraction) >= 0, by the odd series in
// fraction / (2 + fraction), as fdlibm has it.
template <typename Real>
struct LogParts {
  Real exponent;
  Real fraction;
  Real remainder;
};

FK_HOST_DEVICE FK_INLINE LogParts<float> log_parts(float x) {
  const uint32_t root_half = 0x3f3504f3u;
  const uint32_t shifted = bits_as<uint32_t>(x) + (0x3f800000u - root_half);
  const float exponent = bits_as<float>((shifted >> 23) | 0x4b000000u) - (8388608.0f + 127.0f);
  const float f = bits_as<float>((shifted & 0x7fffffu) + root_half) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  float p = 0.24279078841f;
  p = p * z + 0.28498786688f;
  p = p * z + 0.40000972152f;
  p = p * z + 0.66666662693f;
  const float half_square = 0.5f * f * f;
  return {exponent, f, half_square - s * (half_square + p * z)};
}

FK_HOST_DEVICE FK_INLINE LogParts<double> log_parts(double x) {
  const uint64_t root_half = 0x3fe6a09e667f3bcdull;
  const uint64_t shifted = bits_as<uint64_t>(x) + (0x3ff0000000000000ull - root_half);
  const double exponent = bits_as<double>((shifted >> 52) | 0x4330000000000000ull) - (4503599627370496.0 + 1023.0);
  const double f = bits_as<double>((shifted & 0xfffffffffffffull) + root_half) - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double p = 1.479819860511658591e-01;
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  const double half_square = 0.5 * f * f;
  return {exponent, f, half_square - s * (half_square + p * z)};
}

template <typename Real>
FK_HOST_DEVICE FK_INLINE Real log_normal(Real x) {
  const LogParts<Real> parts = log_parts(x);
  return parts.exponent * Real(0.69314718055994530942) + (parts.fraction - parts.remainder);
}

}  // namespace fairkernels
