// Minimum, maximum and clipping as torch has them: NaN on either side wins. In the one form that gcc 12 vectorises.
#pragma once

#include "support/platform.h"

namespace fairkernels {

template <typename Real>
FK_INLINE Real minimum(Real a, Real b) {
  const Real smaller = a < b ? a : b;  // b if that is NaN
  return a != a ? a : smaller;
}

template <typename Real>
FK_INLINE Real maximum(Real a, Real b) {
  const Real larger = a > b ? a : b;
  return a != a ? a : larger;
}

template <typename Real>
FK_INLINE Real clip(Real value, Real low, Real high) {
  return minimum(maximum(value, low), high);
}

}  // namespace fairkernels
