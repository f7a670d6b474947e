// One step of projected gradient descent.
// linf: bound by memory, 3 reads and 1 write of an element, 16 bytes in fp32, nothing read twice; about 12 operations.
// l2: two passes, the first for three sums over a sample; 28 bytes of an element in fp32, unless a sample stays in the
// cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/clip.h"
#include "cpu/strided.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// A parameter of one value, to be indexed like an array of them.
template <typename Real>
struct Constant {
  Real value;

  FK_INLINE Real operator[](int64_t) const { return value; }
};

// +1, -1, and 0 for 0 and NaN, by one comparison.
template <typename Real>
FK_INLINE Real sign(Real x) {
  return std::fabs(x) > 0 ? std::copysign(Real(1), x) : Real(0);
}

// out = clip(clip(x_adv + step sign(grad), x - eps, x + eps), low, high); `out` may be any of the images.
template <typename Real, typename Values>
FK_INLINE void linf_step_body(const Real* x_adv, const Real* grad, const Real* x, Values step, Values eps, Values low,
                              Values high, int64_t n, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real moved = x_adv[i] + step[i] * sign(grad[i]);
    const Real near = clip(moved, x[i] - eps[i], x[i] + eps[i]);
    out[i] = clip(near, low[i], high[i]);
  }
}

FK_CLONES static void linf_step(const float* x_adv, const float* grad, const float* x, Constant<float> step,
                                Constant<float> eps, Constant<float> low, Constant<float> high, int64_t n, float* out) {
  linf_step_body(x_adv, grad, x, step, eps, low, high, n, out);
}

FK_CLONES static void linf_step(const double* x_adv, const double* grad, const double* x, Constant<double> step,
                                Constant<double> eps, Constant<double> low, Constant<double> high, int64_t n,
                                double* out) {
  linf_step_body(x_adv, grad, x, step, eps, low, high, n, out);
}

FK_CLONES static void linf_step(const float* x_adv, const float* grad, const float* x, const float* step,
                                const float* eps, const float* low, const float* high, int64_t n, float* out) {
  linf_step_body(x_adv, grad, x, step, eps, low, high, n, out);
}

FK_CLONES static void linf_step(const double* x_adv, const double* grad, const double* x, const double* step,
                                const double* eps, const double* low, const double* high, int64_t n, double* out) {
  linf_step_body(x_adv, grad, x, step, eps, low, high, n, out);
}

// Sums over a chunk of a sample, in double: squares of large or tiny gradients would leave the range of floats.
struct L2Sums {
  double grad_grad;
  double delta_delta;
  double delta_grad;
};

template <typename Real>
FK_INLINE L2Sums l2_sums_body(const Real* x_adv, const Real* grad, const Real* x, int64_t n) {
  const auto delta = [=](int64_t i) { return static_cast<double>(x_adv[i] - x[i]); };
  const auto slope = [=](int64_t i) { return static_cast<double>(grad[i]); };
  return {ragged_sum<double>(n, [=](int64_t i) { return slope(i) * slope(i); }),
          ragged_sum<double>(n, [=](int64_t i) { return delta(i) * delta(i); }),
          ragged_sum<double>(n, [=](int64_t i) { return delta(i) * slope(i); })};
}

FK_CLONES static L2Sums l2_sums(const float* x_adv, const float* grad, const float* x, int64_t n) {
  return l2_sums_body(x_adv, grad, x, n);
}

FK_CLONES static L2Sums l2_sums(const double* x_adv, const double* grad, const double* x, int64_t n) {
  return l2_sums_body(x_adv, grad, x, n);
}

// out = clip(x + ((x_adv - x) + step grad) shrink, low, high); `out` may be any of the images.
template <typename Real>
FK_INLINE void l2_step_body(const Real* x_adv, const Real* grad, const Real* x, Real step, Real shrink, const Real* low,
                            const Real* high, int64_t n, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real delta = (x_adv[i] - x[i]) + step * grad[i];
    out[i] = clip(x[i] + delta * shrink, low[i], high[i]);
  }
}

FK_CLONES static void l2_step(const float* x_adv, const float* grad, const float* x, float step, float shrink,
                              const float* low, const float* high, int64_t n, float* out) {
  l2_step_body(x_adv, grad, x, step, shrink, low, high, n, out);
}

FK_CLONES static void l2_step(const double* x_adv, const double* grad, const double* x, double step, double shrink,
                              const double* low, const double* high, int64_t n, double* out) {
  l2_step_body(x_adv, grad, x, step, shrink, low, high, n, out);
}

template <typename Real>
FK_INLINE void multiply_body(const Real* a, const Real* b, int64_t n, Real* product) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    product[i] = a[i] * b[i];
  }
}

FK_CLONES static void multiply(const float* a, const float* b, int64_t n, float* product) {
  multiply_body(a, b, n, product);
}

FK_CLONES static void multiply(const double* a, const double* b, int64_t n, double* product) {
  multiply_body(a, b, n, product);
}

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

  bool constant() const { return !alpha.each && !eps.each && !low.each && !high.each && !mask.each; }
};

// One thread's buffers of a chunk each.
template <typename Real>
struct PgdBuffers {
  alignas(64) Real x_adv[kChunk];
  alignas(64) Real grad[kChunk];
  alignas(64) Real x[kChunk];
  alignas(64) Real alpha[kChunk];
  alignas(64) Real eps[kChunk];
  alignas(64) Real low[kChunk];
  alignas(64) Real high[kChunk];
  alignas(64) Real mask[kChunk];
  alignas(64) Real step[kChunk];
  alignas(64) Real out[kChunk];

  explicit PgdBuffers(const PgdStep<Real>& pgd) {
    pgd.alpha.fill(alpha);
    pgd.eps.fill(eps);
    pgd.low.fill(low);
    pgd.high.fill(high);
    pgd.mask.fill(mask);
  }
};

template <typename Real>
void linf_chunk(const PgdStep<Real>& pgd, int64_t start, int64_t n, PgdBuffers<Real>& buffers) {
  const Real* x_adv = pgd.x_adv.read(0, start, n, buffers.x_adv);
  const Real* grad = pgd.grad.read(0, start, n, buffers.grad);
  const Real* x = pgd.x.read(0, start, n, buffers.x);
  Real* out = pgd.out.place(0, start, buffers.out);
  const Real direction = pgd.direction;
  if (pgd.constant()) {
    using Value = Constant<Real>;
    linf_step(x_adv, grad, x, Value{direction * pgd.alpha.value}, Value{pgd.eps.value}, Value{pgd.low.value},
              Value{pgd.high.value}, n, out);
  } else {
    const Real* alpha = pgd.alpha.read(0, start, n, buffers.alpha);
    const Real* eps = pgd.eps.read(0, start, n, buffers.eps);
    const Real* low = pgd.low.read(0, start, n, buffers.low);
    const Real* high = pgd.high.read(0, start, n, buffers.high);
    const Real* mask = pgd.mask.read(0, start, n, buffers.mask);
    std::transform(alpha, alpha + n, mask, buffers.step, [=](Real a, Real m) { return direction * a * m; });
    linf_step(x_adv, grad, x, static_cast<const Real*>(buffers.step), eps, low, high, n, out);
  }
  pgd.out.write(0, start, n, out, buffers.out);
}

// Chunks [begin, end) of kChunk elements.
template <typename Real>
void linf_chunks(const PgdStep<Real>& pgd, int64_t begin, int64_t end) {
  PgdBuffers<Real> buffers(pgd);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk;
    linf_chunk(pgd, start, std::min(kChunk, pgd.elements - start), buffers);
  }
}

template <typename Real>
const Real* masked_gradient(const PgdStep<Real>& pgd, int64_t sample, int64_t start, int64_t n,
                            PgdBuffers<Real>& buffers) {
  const Real* grad = pgd.grad.read(sample, start, n, buffers.grad);
  if (pgd.mask.each == nullptr) {
    return grad;
  }
  multiply(grad, pgd.mask.read(sample, start, n, buffers.mask), n, buffers.grad);
  return buffers.grad;
}

template <typename Real>
L2Sums sample_sums(const PgdStep<Real>& pgd, int64_t sample, PgdBuffers<Real>& buffers) {
  L2Sums total{0, 0, 0};
  for (int64_t start = 0; start < pgd.elements; start += kChunk) {
    const int64_t n = std::min(kChunk, pgd.elements - start);
    const Real* grad = masked_gradient(pgd, sample, start, n, buffers);
    const Real* x_adv = pgd.x_adv.read(sample, start, n, buffers.x_adv);
    const L2Sums sums = l2_sums(x_adv, grad, pgd.x.read(sample, start, n, buffers.x), n);
    total.grad_grad += sums.grad_grad;
    total.delta_delta += sums.delta_delta;
    total.delta_grad += sums.delta_grad;
  }
  return total;
}

// The factor that brings a perturbation of squared length `squared` back into the ball; NaN stays NaN.
inline double shrink_factor(double squared, double eps) {
  return squared <= eps * eps ? 1 : eps / std::sqrt(squared);
}

template <typename Real>
void l2_sample(const PgdStep<Real>& pgd, int64_t sample, PgdBuffers<Real>& buffers) {
  const double alpha = *pgd.alpha.read(sample, 0, 1, buffers.alpha);
  const double eps = *pgd.eps.read(sample, 0, 1, buffers.eps);
  const L2Sums sums = sample_sums(pgd, sample, buffers);
  const double step = pgd.direction * alpha / (std::sqrt(sums.grad_grad) + 1e-10);
  const double squared = sums.delta_delta + 2 * step * sums.delta_grad + step * step * sums.grad_grad;
  const double shrink = shrink_factor(squared, eps);
  for (int64_t start = 0; start < pgd.elements; start += kChunk) {
    const int64_t n = std::min(kChunk, pgd.elements - start);
    const Real* grad = masked_gradient(pgd, sample, start, n, buffers);
    const Real* x_adv = pgd.x_adv.read(sample, start, n, buffers.x_adv);
    const Real* x = pgd.x.read(sample, start, n, buffers.x);
    const Real* low = pgd.low.read(sample, start, n, buffers.low);
    const Real* high = pgd.high.read(sample, start, n, buffers.high);
    Real* out = pgd.out.place(sample, start, buffers.out);
    l2_step(x_adv, grad, x, static_cast<Real>(step), static_cast<Real>(shrink), low, high, n, out);
    pgd.out.write(sample, start, n, out, buffers.out);
  }
}

template <typename Real>
void l2_samples(const PgdStep<Real>& pgd, int64_t begin, int64_t end) {
  PgdBuffers<Real> buffers(pgd);
  for (int64_t sample = begin; sample < end; ++sample) {
    l2_sample(pgd, sample, buffers);
  }
}

}  // namespace fairkernels
