// The bits of a value read as another type of the same size.
#pragma once

#include <cstring>

#include "support/platform.h"

namespace fairkernels {

template <typename To, typename From>
FK_HOST_DEVICE FK_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace fairkernels
