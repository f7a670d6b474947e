// Minimum, maximum and clipping as torch has them: NaN on either side wins. Branch free.
#pragma once

#include "support/platform.h"

namespace fairkernels {

template <typename Real>
FK_INLINE Real minimum(Real a, Real b) {
  return (a < b) | (a != a) ? a : b;
}

template <typename Real>
FK_INLINE Real maximum(Real a, Real b) {
  return (a > b) | (a != a) ? a : b;
}

template <typename Real>
FK_INLINE Real clip(Real value, Real low, Real high) {
  return minimum(maximum(value, low), high);
}

}  // namespace fairkernels
