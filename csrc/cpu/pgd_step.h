// One step of projected gradient descent.
// linf: bound by memory, 3 reads and 1 write of an element, 16 bytes in fp32, nothing read twice; about 20 operations.
// l2: two passes, the first for three sums over a sample; 28 bytes of an element in fp32, unless a sample stays in the
// cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/strided.h"
#include "support/elements.h"
#include "support/lanes.h"
#include "support/pgd_math.h"
#include "support/platform.h"

namespace fairkernels {

// A parameter of one value, to be indexed like an array of them.
template <typename Real>
struct Constant {
  Real value;

  FK_INLINE Real operator[](int64_t) const { return value; }
};

// A chunk of the images; `out` may be any of the others.
template <typename T>
struct Images {
  const T* x_adv;
  const T* grad;
  const T* x;
  T* out;
  int64_t n;
};

// The parameters of a chunk: of one value each, or arrays.
template <typename Values>
struct LinfValues {
  Values alpha;
  Values eps;
  Values low;
  Values high;
  Values mask;
};

template <typename T, typename Values, typename Real = Accumulator<T>>
FK_INLINE void linf_step_body(Images<T> images, LinfValues<Values> values, Real direction) {
#pragma omp simd
  for (int64_t i = 0; i < images.n; ++i) {
    const Real step = direction * values.alpha[i] * values.mask[i];
    const Real moved = linf_moved(widen(images.x_adv[i]), widen(images.grad[i]), widen(images.x[i]), step,
                                  values.eps[i], values.low[i], values.high[i]);
    images.out[i] = narrow(moved, T{});
  }
}

template <typename T, typename Real = Accumulator<T>>
FK_INLINE L2Sums l2_sums_body(Images<T> images, const Real* mask) {
  double grad_grad[kLanes] = {};
  double delta_delta[kLanes] = {};
  double delta_grad[kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) {
    const double delta = widen(images.x_adv[i]) - widen(images.x[i]);
    const double slope = widen(images.grad[i]) * mask[i];
    grad_grad[lane] += slope * slope;
    delta_delta[lane] += delta * delta;
    delta_grad[lane] += delta * slope;
  };
  const int64_t whole = images.n / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add(first + lane, lane);
    }
  }
  for (int64_t i = whole; i < images.n; ++i) {
    add(i, i - whole);
  }
  return {add_lanes(grad_grad), add_lanes(delta_delta), add_lanes(delta_grad)};
}

template <typename Real>
struct L2Values {
  Real step;
  Real shrink;
  const Real* low;
  const Real* high;
  const Real* mask;
};

template <typename T, typename Real = Accumulator<T>>
FK_INLINE void l2_step_body(Images<T> images, L2Values<Real> values) {
#pragma omp simd
  for (int64_t i = 0; i < images.n; ++i) {
    const Real slope = widen(images.grad[i]) * values.mask[i];
    const Real moved = l2_moved(widen(images.x_adv[i]), slope, widen(images.x[i]), values.step, values.shrink,
                                values.low[i], values.high[i]);
    images.out[i] = narrow(moved, T{});
  }
}

// The same as functions of each type of images, which is what can be cloned.
#define FK_PGD_KERNELS(T, Real)                                                                             \
  FK_CLONES static void linf_step(Images<T> images, LinfValues<Constant<Real>> values, Real direction) {    \
    linf_step_body(images, values, direction);                                                              \
  }                                                                                                         \
  FK_CLONES static void linf_step(Images<T> images, LinfValues<const Real*> values, Real direction) {       \
    linf_step_body(images, values, direction);                                                              \
  }                                                                                                         \
  FK_CLONES static L2Sums l2_sums(Images<T> images, const Real* mask) { return l2_sums_body(images, mask); } \
  FK_CLONES static void l2_step(Images<T> images, L2Values<Real> values) { l2_step_body(images, values); }

FK_PGD_KERNELS(float, float)
FK_PGD_KERNELS(double, double)
FK_PGD_KERNELS(BFloat16, float)
FK_PGD_KERNELS(Half, float)
#undef FK_PGD_KERNELS

template <typename Real>
struct PgdStep {
  const Source& x_adv;
  const Source& grad;
  const Source& x;
  Parameter<Real> alpha;
  Parameter<Real> eps;
  Parameter<Real> low;
  Parameter<Real> high;
  Parameter<Real> mask;  // of value 1
  Real direction;        // +1 up the gradient, -1 down
  const Sink& out;
  int64_t elements;  // of a sample for l2, of everything for linf

  // For how many elements from `start` on, at most n, no parameter changes.
  int64_t constant_for(int64_t start, int64_t n) const {
    for (const Parameter<Real>* parameter : {&alpha, &eps, &low, &high, &mask}) {
      n = parameter->constant_for(start, n);
    }
    return n;
  }
};

// One thread's buffers of a chunk each.
template <typename T, typename Real = Accumulator<T>>
struct PgdBuffers {
  alignas(64) T x_adv[kChunk];
  alignas(64) T grad[kChunk];
  alignas(64) T x[kChunk];
  alignas(64) T out[kChunk];
  FilledParameter<Real> alpha;
  FilledParameter<Real> eps;
  FilledParameter<Real> low;
  FilledParameter<Real> high;
  FilledParameter<Real> mask;

  explicit PgdBuffers(const PgdStep<Real>& pgd) : PgdBuffers(pgd, std::min(kChunk, pgd.elements)) {}

  Images<T> images(const PgdStep<Real>& pgd, int64_t sample, int64_t start, int64_t n) {
    return {pgd.x_adv.image(sample, start, n, x_adv), pgd.grad.image(sample, start, n, grad),
            pgd.x.image(sample, start, n, x), pgd.out.place(sample, start, out), n};
  }

 private:
  PgdBuffers(const PgdStep<Real>& pgd, int64_t n)
      : alpha(pgd.alpha, n), eps(pgd.eps, n), low(pgd.low, n), high(pgd.high, n), mask(pgd.mask, n) {}
};

// Elements [start, start + n), for which the parameters are constant or not.
template <typename T, typename Real>
void linf_run(const PgdStep<Real>& pgd, int64_t start, int64_t n, bool constant, PgdBuffers<T>& buffers) {
  const Images<T> images = buffers.images(pgd, 0, start, n);
  if (constant) {
    const auto value = [&](const Parameter<Real>& parameter) { return Constant<Real>{parameter.at(0, start)}; };
    const LinfValues<Constant<Real>> values{value(pgd.alpha), value(pgd.eps), value(pgd.low), value(pgd.high),
                                            value(pgd.mask)};
    linf_step(images, values, pgd.direction);
  } else {
    const LinfValues<const Real*> values{
        buffers.alpha.read(0, start, n), buffers.eps.read(0, start, n),
        buffers.low.read(0, start, n), buffers.high.read(0, start, n),
        buffers.mask.read(0, start, n)};
    linf_step(images, values, pgd.direction);
  }
  pgd.out.write(0, start, n, images.out);
}

// Chunks [begin, end) of kChunk elements, or what is left of them up to where a parameter changes, unless that is soon.
template <typename T, typename Real>
void linf_chunks(const PgdStep<Real>& pgd, int64_t begin, int64_t end) {
  constexpr int64_t kWorthwhile = 64;
  PgdBuffers<T> buffers(pgd);
  const int64_t stop = std::min(end * kChunk, pgd.elements);
  for (int64_t start = begin * kChunk; start < stop;) {
    const int64_t chunk = std::min(kChunk, stop - start);
    const int64_t constant = pgd.constant_for(start, chunk);
    const bool worthwhile = constant >= std::min(kWorthwhile, chunk);
    const int64_t n = worthwhile ? constant : chunk;
    linf_run(pgd, start, n, worthwhile, buffers);
    start += n;
  }
}

template <typename T, typename Real>
L2Sums sample_sums(const PgdStep<Real>& pgd, int64_t sample, PgdBuffers<T>& buffers) {
  L2Sums total{0, 0, 0};
  for (int64_t start = 0; start < pgd.elements; start += kChunk) {
    const int64_t n = std::min(kChunk, pgd.elements - start);
    const Real* mask = buffers.mask.read(sample, start, n);
    const L2Sums sums = l2_sums(buffers.images(pgd, sample, start, n), mask);
    total.grad_grad += sums.grad_grad;
    total.delta_delta += sums.delta_delta;
    total.delta_grad += sums.delta_grad;
  }
  return total;
}

template <typename T, typename Real>
void l2_sample(const PgdStep<Real>& pgd, int64_t sample, PgdBuffers<T>& buffers) {
  const double alpha = pgd.alpha.at(sample, 0);
  const double eps = pgd.eps.at(sample, 0);
  const L2Step factors = l2_step_of(sample_sums(pgd, sample, buffers), pgd.direction * alpha, eps);
  for (int64_t start = 0; start < pgd.elements; start += kChunk) {
    const int64_t n = std::min(kChunk, pgd.elements - start);
    const Images<T> images = buffers.images(pgd, sample, start, n);
    const L2Values<Real> values{static_cast<Real>(factors.step), static_cast<Real>(factors.shrink),
                                buffers.low.read(sample, start, n),
                                buffers.high.read(sample, start, n),
                                buffers.mask.read(sample, start, n)};
    l2_step(images, values);
    pgd.out.write(sample, start, n, images.out);
  }
}

template <typename T, typename Real>
void l2_samples(const PgdStep<Real>& pgd, int64_t begin, int64_t end) {
  PgdBuffers<T> buffers(pgd);
  for (int64_t sample = begin; sample < end; ++sample) {
    l2_sample(pgd, sample, buffers);
  }
}

}  // namespace fairkernels
