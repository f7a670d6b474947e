// Which matrix of a batch's errors the spectral term is the norm of, see cpu/spectral_loss.h. Host and device.
#pragma once

#include <limits>

#include "support/platform.h"

namespace fairkernels {

enum class Surrogate { kl, kl_all, soft, gated };

// Whether a class is so far ahead of another that nothing is charged. Not with an infinite logit, whose softmax is none:
// then the charge is NaN and says so.
template <typename Real>
FK_HOST_DEVICE bool is_ahead(Real own, Real other) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  return own > other && own < infinity;
}

}  // namespace fairkernels
