// Clipping as torch has it: NaN wins, be it the value or a bound. A vector minimum or maximum returns its second operand
// if either is NaN, and so do the two selections below, each of them one instruction: they keep NaN of `low`, and what
// they lose is NaN of `value` or `high`. Host and device.
#pragma once

#include <cmath>

#include "support/platform.h"

namespace fairkernels {

template <typename Real>
FK_HOST_DEVICE FK_INLINE Real clip(Real value, Real low, Real high) {
  const Real raised = value > low ? value : low;
  const Real within = high < raised ? high : raised;
#if defined(__CUDA_ARCH__)
  const bool unordered = value != value || high != high;
#else
  const bool unordered = std::isunordered(value, high);  // one comparison
#endif
  return unordered ? value + high : within;
}

}  // namespace fairkernels
