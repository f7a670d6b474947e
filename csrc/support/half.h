// The two 16-bit floating point types as bits, and their conversions in integer and float arithmetic only: unlike F16C
// intrinsics these vectorise on every instruction set. A GPU has instructions for float16.
#pragma once

#include <cstdint>

#include "support/bits.h"
#include "support/platform.h"
#if defined(__CUDACC__)
#include "support/device.h"
#endif

namespace fairkernels {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

FK_HOST_DEVICE FK_INLINE float widen(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest, ties to even. Rounding could carry a NaN's payload into infinity, so NaN is set apart.
FK_HOST_DEVICE FK_INLINE BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

// Normal numbers: the exponent is moved by a multiplication, which also takes infinity and NaN where they belong.
// Subnormal ones: placed in the mantissa of 0.5, which is then subtracted.
FK_HOST_DEVICE FK_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return device::from_half(x.bits);
#endif
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t doubled = word + word;
  const float normal = bits_as<float>((doubled >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const float subnormal = bits_as<float>((doubled >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = doubled < (1u << 27) ? bits_as<uint32_t>(subnormal) : bits_as<uint32_t>(normal);
  return bits_as<float>(sign | magnitude);
}

// Adding a power of two that is 2^13 times the result's last place lets the hardware round, ties to even; the first two
// multiplications push what is too large to infinity.
FK_HOST_DEVICE FK_INLINE Half narrow(float x, Half) {
#if defined(__CUDA_ARCH__)
  return {device::to_half(x)};
#endif
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t doubled = bits + bits;
  const float magnitude = bits_as<float>(bits & 0x7fffffffu);
  const float saturated = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = doubled & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float rounded = bits_as<float>((bias >> 1) + 0x07800000u) + saturated;
  const uint32_t sum = bits_as<uint32_t>(rounded);
  const uint32_t number = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  return {static_cast<uint16_t>(sign | (doubled > 0xff000000u ? 0x7e00u : number))};
}

}  // namespace fairkernels
