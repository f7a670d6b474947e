// Element types, and reading and writing runs of elements whatever their type and stride. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "support/half.h"
#include "support/platform.h"

namespace fairkernels {

enum class Dtype { float64, float32, bfloat16, float16, int64, byte };  // byte: uint8, and bool as 0 and 1

FK_HOST_DEVICE inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
    case Dtype::int64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::byte:
      return 1;
    default:
      return 2;
  }
}

FK_HOST_DEVICE inline bool is_half(Dtype dtype) {
  return dtype == Dtype::bfloat16 || dtype == Dtype::float16;
}

// The type in which sums are kept.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename Function>
auto with_float_type(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float64:
      return function(double{});
    case Dtype::float32:
      return function(float{});
    case Dtype::bfloat16:
      return function(BFloat16{});
    case Dtype::float16:
      return function(Half{});
    default:
      throw std::runtime_error("a floating point tensor is needed here");
  }
}

// Half types are computed with in float32.
template <typename Function>
auto with_accumulator(Dtype dtype, Function&& function) {
  return with_float_type(dtype, [&](auto type) { return function(Accumulator<decltype(type)>{}); });
}

template <typename Function>
auto with_type(Dtype dtype, Function&& function) {
  if (dtype == Dtype::byte) {
    return function(uint8_t{});
  }
  return with_float_type(dtype, function);
}

FK_HOST_DEVICE FK_INLINE double widen(double x) {
  return x;
}

FK_HOST_DEVICE FK_INLINE float widen(float x) {
  return x;
}

FK_HOST_DEVICE FK_INLINE float widen(uint8_t x) {
  return x;
}

template <typename Real>
FK_HOST_DEVICE FK_INLINE double narrow(Real x, double) {
  return x;
}

template <typename Real>
FK_HOST_DEVICE FK_INLINE float narrow(Real x, float) {
  return static_cast<float>(x);
}

FK_HOST_DEVICE FK_INLINE BFloat16 narrow(double x, BFloat16 type) {
  return narrow(static_cast<float>(x), type);
}

FK_HOST_DEVICE FK_INLINE Half narrow(double x, Half type) {
  return narrow(static_cast<float>(x), type);
}

template <typename T, typename Real>
FK_INLINE void load_run_body(const T* from, int64_t n, Real* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<Real>(widen(from[i]));
  }
}

template <typename T, typename Real>
FK_INLINE void store_run_body(const Real* from, int64_t n, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = narrow(from[i], T{});
  }
}

template <typename T, typename Real>
inline void load_run(const T* from, int64_t n, Real* to) {
  if constexpr (std::is_same_v<T, Real>) {
    std::copy_n(from, n, to);
  } else {
    load_run_body(from, n, to);
  }
}

FK_CLONES static void load_run(const BFloat16* from, int64_t n, float* to) {
  load_run_body(from, n, to);
}

FK_CLONES static void load_run(const Half* from, int64_t n, float* to) {
  load_run_body(from, n, to);
}

template <typename T, typename Real>
inline void store_run(const Real* from, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, Real>) {
    std::copy_n(from, n, to);
  } else {
    store_run_body(from, n, to);
  }
}

FK_CLONES static void store_run(const float* from, int64_t n, BFloat16* to) {
  store_run_body(from, n, to);
}

FK_CLONES static void store_run(const float* from, int64_t n, Half* to) {
  store_run_body(from, n, to);
}

template <typename T, typename Real>
void load(const T* from, int64_t stride, int64_t n, Real* to) {
  if (stride == 1) {
    load_run(from, n, to);
  } else if (stride == 0 && n > 0) {
    std::fill_n(to, n, static_cast<Real>(widen(*from)));
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<Real>(widen(from[i * stride]));
    }
  }
}

template <typename T, typename Real>
void store(const Real* from, int64_t n, T* to, int64_t stride) {
  if (stride == 1) {
    store_run(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i * stride] = narrow(from[i], T{});
    }
  }
}

}  // namespace fairkernels
