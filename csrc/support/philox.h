// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): four 32-bit words from a position and a seed,
// with no state to keep, so that every element can be drawn by whoever works on it; host and device.
#pragma once

#include <cstdint>

#include "support/platform.h"

namespace fairkernels {

struct PhiloxWords {
  uint32_t word[4];
};

FK_HOST_DEVICE FK_INLINE PhiloxWords philox(uint64_t index, uint32_t stream, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(index);
  uint32_t c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = stream;
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) in steps of 2^-24: exact in every type from float up, so all of them see the same numbers.
FK_HOST_DEVICE FK_INLINE float uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

}  // namespace fairkernels
