// Sums over the threads of a warp or a block, in an order that depends on nothing but their number.
#pragma once

#include "support/device.h"

namespace fairkernels {

// Of `lanes` neighbouring lanes, a power of two. `mask` has all lanes that come.
template <typename Real>
FK_DEVICE Real lanes_sum(Real value, int lanes, unsigned mask = device::kAllLanes) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    value += device::from_partner(value, bits, mask);
  }
  return value;
}

template <typename Real>
FK_DEVICE Real warp_sum(Real value) {
  return lanes_sum(value, device::kWarp);
}

// The largest value of `lanes` neighbouring lanes; a NaN is passed over.
template <typename Real>
FK_DEVICE Real lanes_max(Real value, int lanes, unsigned mask = device::kAllLanes) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    const Real other = device::from_partner(value, bits, mask);
    value = other > value || value != value ? other : value;
  }
  return value;
}

// Sums of several values at once: their exchanges do not wait for each other.
template <int kCount, typename Real>
FK_DEVICE void warp_sums(Real (&values)[kCount]) {
#pragma unroll
  for (int bits = device::kWarp / 2; bits > 0; bits /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] += device::from_partner(values[i], bits);
    }
  }
}

// The same of four values with 9 exchanges instead of 20: lanes share the values among each other while they add.
template <typename Real>
FK_DEVICE void warp_sums_of_four(Real (&values)[4]) {
  const bool upper = (device::thread() & 16) != 0;
  const bool odd = (device::thread() & 8) != 0;
  Real first = upper ? values[2] : values[0];
  Real second = upper ? values[3] : values[1];
  first += device::from_partner(upper ? values[0] : values[2], 16);
  second += device::from_partner(upper ? values[1] : values[3], 16);
  Real sum = odd ? second : first;
  sum += device::from_partner(odd ? first : second, 8);
#pragma unroll
  for (int bits = 4; bits > 0; bits /= 2) {
    sum += device::from_partner(sum, bits);
  }
  const Real beside = device::from_partner(sum, 8);
  first = odd ? beside : sum;
  second = odd ? sum : beside;
  const Real first_across = device::from_partner(first, 16);
  const Real second_across = device::from_partner(second, 16);
  values[0] = upper ? first_across : first;
  values[1] = upper ? second_across : second;
  values[2] = upper ? first : first_across;
  values[3] = upper ? second : second_across;
}

// A value of every warp, which one of its lanes has, for all threads of a block of whole warps. All of them must come;
// what they did in shared memory before is seen by all afterwards.
template <typename Number>
FK_DEVICE const Number* of_every_warp(Number value, int lane) {
  using PerWarp = Number[device::kWarp];
  FK_SHARED(PerWarp, values);
  device::barrier();  // those of an earlier call have been read
  if (device::thread() % device::kWarp == lane) {
    values[device::thread() / device::kWarp] = value;
  }
  device::barrier();
  return values;
}

// The same in all threads of such a block.
template <typename Real>
FK_DEVICE Real block_sum(Real value) {
  const int lane = device::thread() % device::kWarp;
  const Real* sums = of_every_warp(warp_sum(value), 0);
  return warp_sum(lane < device::threads() / device::kWarp ? sums[lane] : Real(0));
}

// The sum over the lanes up to this one.
template <typename Number>
FK_DEVICE Number warp_sum_up_to(Number value) {
  const int lane = device::thread() % device::kWarp;
#pragma unroll
  for (int step = 1; step < device::kWarp; step *= 2) {
    const Number other = device::from_lane(value, lane >= step ? lane - step : lane);
    value += lane >= step ? other : 0;
  }
  return value;
}

// The sum over the threads of a block before this one, likewise.
template <typename Number>
FK_DEVICE Number block_sum_before(Number value) {
  const Number up_to = warp_sum_up_to(value);
  const Number* sums = of_every_warp(up_to, device::kWarp - 1);
  Number before = up_to - value;
  for (int warp = 0; warp < device::thread() / device::kWarp; ++warp) {
    before += sums[warp];
  }
  return before;
}

// The largest, likewise; a NaN is passed over.
template <typename Real>
FK_DEVICE Real block_max(Real value) {
  const int lane = device::thread() % device::kWarp;
  const Real* largest = of_every_warp(lanes_max(value, device::kWarp), 0);
  return lanes_max(largest[lane < device::threads() / device::kWarp ? lane : 0], device::kWarp);
}

}  // namespace fairkernels
