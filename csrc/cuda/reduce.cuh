// Sums over the threads of a warp or a block, in an order that depends on nothing but their number.
#pragma once

#include "support/device.h"

namespace fairkernels {

template <typename Real>
FK_DEVICE Real warp_sum(Real value) {
#pragma unroll
  for (int bits = device::kWarp / 2; bits > 0; bits /= 2) {
    value += device::from_partner(value, bits);
  }
  return value;
}

// Of `lanes` neighbouring lanes, a power of two.
template <typename Real>
FK_DEVICE Real lanes_sum(Real value, int lanes) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    value += device::from_partner(value, bits);
  }
  return value;
}

// The same, of the largest value; a NaN is passed over.
template <typename Real>
FK_DEVICE Real lanes_max(Real value, int lanes) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    const Real other = device::from_partner(value, bits);
    value = other > value || value != value ? other : value;
  }
  return value;
}

// The same in all threads of a block of whole warps, at most 32. All of them must come; what they did in shared memory
// before is seen by all afterwards.
template <typename Real>
FK_DEVICE Real block_sum(Real value) {
  using PerWarp = Real[device::kWarp];
  FK_SHARED(PerWarp, sums);
  const int lane = device::thread() % device::kWarp;
  const int warps = device::threads() / device::kWarp;
  value = warp_sum(value);
  device::barrier();  // of an earlier call the sums have been read
  if (lane == 0) {
    sums[device::thread() / device::kWarp] = value;
  }
  device::barrier();
  return warp_sum(lane < warps ? sums[lane] : Real(0));
}

// The same, of the largest value; a NaN is passed over.
template <typename Real>
FK_DEVICE Real block_max(Real value) {
  using PerWarp = Real[device::kWarp];
  FK_SHARED(PerWarp, largest);
  const int lane = device::thread() % device::kWarp;
  const int warps = device::threads() / device::kWarp;
  value = lanes_max(value, device::kWarp);
  device::barrier();
  if (lane == 0) {
    largest[device::thread() / device::kWarp] = value;
  }
  device::barrier();
  return lanes_max(largest[lane < warps ? lane : 0], device::kWarp);
}

}  // namespace fairkernels
