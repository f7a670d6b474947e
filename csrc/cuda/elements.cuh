// Elements whose type is known when the kernel runs.
#pragma once

#include "support/device.h"
#include "support/elements.h"

namespace fairkernels {

template <typename Real>
FK_DEVICE Real element_at(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::float64:
      return static_cast<Real>(static_cast<const double*>(data)[offset]);
    case Dtype::float32:
      return static_cast<Real>(static_cast<const float*>(data)[offset]);
    case Dtype::bfloat16:
      return static_cast<Real>(widen(static_cast<const BFloat16*>(data)[offset]));
    case Dtype::float16:
      return static_cast<Real>(widen(static_cast<const Half*>(data)[offset]));
    default:
      return static_cast<Real>(widen(static_cast<const uint8_t*>(data)[offset]));
  }
}

}  // namespace fairkernels
