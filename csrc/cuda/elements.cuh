// Elements whose type is known when the kernel runs.
#pragma once

#include <type_traits>

#include "support/device.h"
#include "support/elements.h"

namespace fairkernels {

// Elements in 16 bytes.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Calls work(T{}) for the type of elements that are computed with in `Real`.
template <typename Real, typename Work>
FK_DEVICE void with_type_computed_in(Dtype dtype, const Work& work) {
  if constexpr (std::is_same_v<Real, double>) {
    work(double{});
  } else if (dtype == Dtype::float32) {
    work(float{});
  } else if (dtype == Dtype::bfloat16) {
    work(BFloat16{});
  } else {
    work(Half{});
  }
}

// One that is computed with in `Real`.
template <typename Real>
FK_DEVICE Real float_at(const void* data, Dtype dtype, int64_t offset) {
  Real found;
  with_type_computed_in<Real>(dtype, [&](auto type) { found = widen(static_cast<const decltype(type)*>(data)[offset]); });
  return found;
}

// Of any type.
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

// Of a floating type.
FK_DEVICE void store_element(void* data, Dtype dtype, int64_t offset, double value) {
  switch (dtype) {
    case Dtype::float64:
      static_cast<double*>(data)[offset] = value;
      break;
    case Dtype::float32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case Dtype::bfloat16:
      static_cast<BFloat16*>(data)[offset] = narrow(value, BFloat16{});
      break;
    default:
      static_cast<Half*>(data)[offset] = narrow(value, Half{});
      break;
  }
}

}  // namespace fairkernels
