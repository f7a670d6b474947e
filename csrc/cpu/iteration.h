// The leading eigenvector of a symmetric positive semidefinite A, given by its products alone: power iteration
// accelerated by its last two directions (locally optimal conjugate gradient), or the plain one. One product a step.
// Vectors and scalars are kept in double whatever the matrix: beside a product of M * N terms they cost little, and a
// basis of three that is orthonormal only to single precision breaks down near convergence. Vectors are padded with zeros
// to whole lanes, which saves every pass over them its remainder.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/iteration_math.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

using Vector = std::vector<double>;

FK_CLONES static double dot(const double* a, const double* b, int64_t n) {
  return ragged_sum<double>(n, [=](int64_t i) { return a[i] * b[i]; });
}

FK_CLONES static double sum(const double* a, int64_t n) {
  return ragged_sum<double>(n, [=](int64_t i) { return a[i]; });
}

// to = s * a + t * b; `to` may be one of them.
FK_CLONES static void combine(double s, const double* a, double t, const double* b, int64_t n, double* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = s * a[i] + t * b[i];
  }
}

// a = s * (a - t * b - u * c)
FK_CLONES static void remove(double s, double* a, double t, const double* b, double u, const double* c, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    a[i] = s * (a[i] - t * b[i] - u * c[i]);
  }
}

// r = av - theta * v; returns <r, r> and <v, r>. n is a multiple of kLanes here and below.
struct Residual {
  double squared;
  double along;
};

FK_CLONES static Residual residual(const double* v, const double* av, double theta, int64_t n, double* r) {
  double squared[kLanes] = {};
  double along[kLanes] = {};
  for (int64_t k = 0; k < n; k += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const double left = av[k + j] - theta * v[k + j];
      r[k + j] = left;
      squared[j] += left * left;
      along[j] += left * v[k + j];
    }
  }
  return {add_lanes(squared), add_lanes(along)};
}

// <a, x> and <b, x>
struct Pair {
  double a;
  double b;
};

FK_CLONES static Pair dots(const double* a, const double* b, const double* x, int64_t n) {
  double with_a[kLanes] = {};
  double with_b[kLanes] = {};
  for (int64_t k = 0; k < n; k += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      with_a[j] += a[k + j] * x[k + j];
      with_b[j] += b[k + j] * x[k + j];
    }
  }
  return {add_lanes(with_a), add_lanes(with_b)};
}

// v = c * v + s * t and p = c * t - s * v with t = a * r + b * p: a rotation of v towards t.
FK_CLONES static void turn(double c, double s, double a, double b, const double* r, int64_t n, double* v, double* p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double towards = a * r[i] + b * p[i];
    const double old = v[i];
    v[i] = c * old + s * towards;
    p[i] = c * towards - s * old;
  }
}

inline double dot(const Vector& a, const Vector& b) {
  return dot(a.data(), b.data(), a.size());
}

inline double norm(const Vector& a) {
  return std::sqrt(dot(a, a));
}

inline void scale(Vector& a, double factor) {
  combine(factor, a.data(), 0, a.data(), a.size(), a.data());
}

// A direction and its product with A, which goes along with every change of it.
struct Direction {
  Vector x;
  Vector ax;

  explicit Direction(size_t n) : x(n), ax(n) {}

  void remove(double scale, double t, const Direction& b, double u, const Direction& c) {
    fairkernels::remove(scale, x.data(), t, b.x.data(), u, c.x.data(), x.size());
    fairkernels::remove(scale, ax.data(), t, b.ax.data(), u, c.ax.data(), x.size());
  }
};

// apply(x, y) computes y = A x, the padding left as it is. The iteration goes on until the residual is small: it tells an
// eigenvector, the change of theta does not. Nor does it go on beyond, where directions are noise.
template <typename Apply>
class LeadingDirection {
 public:
  LeadingDirection(Vector start, const Apply& apply, const IterationOptions& options)
      : apply_(apply),
        options_(options),
        n_(start.size()),
        width_(padded(n_)),
        v_(width_),
        r_(width_),
        p_(width_) {
    std::copy(start.begin(), start.end(), v_.x.begin());
    scale(v_.x, 1 / norm(v_.x));
    apply_(v_.x, v_.ax);
    for (steps_ = 0; steps_ < options_.iters && !converged(); ++steps_) {
      options_.accelerated ? accelerated_step() : plain_step();
    }
  }

  Vector take() {
    v_.x.resize(n_);
    return std::move(v_.x);
  }

  int64_t steps() const { return steps_; }

 private:
  bool converged() {
    theta_ = dot(v_.x, v_.ax);
    residual_ = residual(v_.x.data(), v_.ax.data(), theta_, width_, r_.x.data());
    return !(std::sqrt(residual_.squared) > least_residual(options_) * theta_);
  }

  void plain_step() {
    std::swap(v_.x, v_.ax);
    scale(v_.x, 1 / norm(v_.x));
    apply_(v_.x, v_.ax);
  }

  void accelerated_step() {
    orthonormalise_r();
    apply_(r_.x, r_.ax);
    has_p_ = has_p_ && orthonormalise_p();
    move(best_combination());
    if (steps_ % kRefresh == kRefresh - 1) {
      apply_(v_.x, v_.ax);
    }
  }

  // It is orthogonal to v already but for rounding.
  void orthonormalise_r() {
    const double along = residual_.along;
    const double left = 1 / std::sqrt(residual_.squared - along * along);
    combine(left, r_.x.data(), -along * left, v_.x.data(), width_, r_.x.data());
  }

  // Twice where much of it is taken away, which leaves rounding errors along v and r; and then its product is a
  // difference of large numbers, too, whose error would grow from step to step.
  bool orthonormalise_p() {
    double least = 1;
    for (int twice = 0; twice < 2; ++twice) {
      const Pair along = dots(v_.x.data(), r_.x.data(), p_.x.data(), width_);
      const double left = 1 - along.a * along.a - along.b * along.b;
      if (!(left >= kDependent)) {
        return false;
      }
      p_.remove(1 / std::sqrt(left), along.a, v_, along.b, r_);
      least = std::min(least, left);
      if (left > kMostlyLeft) {
        break;
      }
    }
    if (least < kCancelled) {
      apply_(p_.x, p_.ax);
    }
    return true;
  }

  // Of v, r and p, which are orthonormal; of length 1.
  Coefficients best_combination() const {
    const Pair of_r = dots(v_.x.data(), r_.x.data(), r_.ax.data(), width_);
    const Pair across = has_p_ ? dots(v_.x.data(), r_.x.data(), p_.ax.data(), width_) : Pair{0, 0};
    const double of_p = has_p_ ? dot(p_.x, p_.ax) : 0;
    return leading_eigenvector(of_r.a, across.a, of_r.b - theta_, across.b, of_p - theta_);
  }

  // v turns towards the best combination; p becomes the direction, orthogonal to it, in which it has moved.
  void move(const Coefficients& best) {
    const double sine = std::sqrt(best.r * best.r + best.p * best.p);
    has_p_ = sine > 0;
    if (has_p_) {
      turn(best.v, sine, best.r / sine, best.p / sine, r_.x.data(), width_, v_.x.data(), p_.x.data());
      turn(best.v, sine, best.r / sine, best.p / sine, r_.ax.data(), width_, v_.ax.data(), p_.ax.data());
    }
  }

  const Apply& apply_;
  IterationOptions options_;
  size_t n_;
  int64_t width_;  // of the vectors: n padded with zeros
  Direction v_;    // the estimate
  Direction r_;    // its residual, the direction of steepest ascent
  Direction p_;    // the last change of v
  bool has_p_ = false;
  double theta_ = 0;
  Residual residual_{0, 0};
  int64_t steps_ = 0;
};

}  // namespace fairkernels
