// Clipping as torch has it: NaN wins, be it the value or a bound. Of the two operands that a vector minimum or maximum is
// given it returns the second one if either is NaN, and so do the comparisons below, each of them one instruction: NaN of
// `low` is kept by the first, and by the second for being its second operand; what they lose is NaN of `value` or `high`.
#pragma once

#include <cmath>

#include "support/platform.h"

namespace fairkernels {

template <typename Real>
FK_INLINE Real clip(Real value, Real low, Real high) {
  const Real raised = value > low ? value : low;
  const Real within = high < raised ? high : raised;
  return std::isunordered(value, high) ? value + high : within;
}

}  // namespace fairkernels
