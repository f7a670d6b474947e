// exp for the arguments of a softmax, x <= 0: branch free, so that it inlines into vectorised loops. About 1 ulp.
// NaN stays NaN; what would leave the normal range (below -87 in float, -708 in double) becomes 0, and so does -inf.
#pragma once

#include <cstdint>

#include "support/bits.h"
#include "support/platform.h"

namespace fairkernels {

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2. Adding the magic number 1.5 * 2^23 rounds, and leaves
// n in the low bits, from where a shift moves it into the exponent. ln 2 is split in two (Cody and Waite), the high part
// short enough for n * high to be exact. Polynomial: 1 + r + r^2 p(r), p minimax for the relative error, 3e-9. Far below the
// range all of this is rubbish, which the last line drops.
FK_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.38144335e-3f;
  p = p * r + 8.36879667e-3f;
  p = p * r + 4.16683964e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : p * power;
}

// The same in double: magic number 1.5 * 2^52, Taylor's polynomial of degree 13 (remainder 4e-18).
FK_INLINE double exp_nonpositive(double x) {
  const double magic = 6755399441055744.0;
  const double shifted = x * 1.4426950408889634074 + magic;
  const double n = shifted - magic;
  double r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const double power = bits_as<double>((bits_as<uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);
  return x < -708.0 ? 0.0 : p * power;
}

}  // namespace fairkernels
