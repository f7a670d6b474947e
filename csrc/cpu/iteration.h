// The leading eigenvector of a symmetric positive semidefinite A, given by its products alone: power iteration accelerated by
// its last two directions (locally optimal conjugate gradient), or the plain one. One product a step.
// Vectors and scalars are kept in double whatever the matrix: beside a product of M * N terms they cost nothing, and a basis
// of three that is orthonormal only to single precision breaks down near convergence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

using Vector = std::vector<double>;

struct IterationOptions {
  bool accelerated = true;  // "locg"; else "power"
  int64_t iters = 64;
  double tol = 2e-5;  // of the residual |Av - theta v| relative to theta
};

// A negative number stands for what is not given. Where singular values nearly tie, sigma is wrong by up to half of tol:
// 2e-5 makes that 1e-5, at the price of one step more than 1e-4.
inline IterationOptions iteration_options(bool accelerated, bool in_double, int64_t iters = -1, double tol = -1) {
  const int64_t usual = !accelerated ? 1000 : in_double ? 256 : 64;
  return {accelerated, iters < 0 ? usual : iters, tol < 0 ? (in_double ? 1e-8 : 2e-5) : tol};
}

FK_CLONES static double dot(const double* a, const double* b, int64_t n) {
  return ragged_sum<double>(n, [=](int64_t i) { return a[i] * b[i]; });
}

// to = s * a + t * b; `to` may be one of them.
FK_CLONES static void combine(double s, const double* a, double t, const double* b, int64_t n, double* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = s * a[i] + t * b[i];
  }
}

inline double dot(const Vector& a, const Vector& b) {
  return dot(a.data(), b.data(), a.size());
}

inline double norm(const Vector& a) {
  return std::sqrt(dot(a, a));
}

inline void combine(double s, const Vector& a, double t, const Vector& b, Vector& to) {
  combine(s, a.data(), t, b.data(), a.size(), to.data());
}

inline void scale(Vector& a, double factor) {
  combine(factor, a, 0, a, a);
}

// A direction and its product with A, which goes along with every change of it.
struct Direction {
  Vector x;
  Vector ax;

  explicit Direction(size_t n) : x(n), ax(n) {}

  void scale_by(double factor) {
    scale(x, factor);
    scale(ax, factor);
  }

  void add(double factor, const Direction& other) {
    combine(1, x, factor, other.x, x);
    combine(1, ax, factor, other.ax, ax);
  }
};

// One rotation of Jacobi's method: annihilates t[p][q], p < q of 0, 1, 2, and turns the eigenvectors along.
inline void rotate(double (&t)[3][3], double (&vectors)[3][3], int p, int q) {
  if (t[p][q] == 0) {
    return;
  }
  const double ratio = (t[q][q] - t[p][p]) / (2 * t[p][q]);
  const double tangent = (ratio < 0 ? -1 : 1) / (std::fabs(ratio) + std::hypot(ratio, 1.0));
  const double cosine = 1 / std::hypot(tangent, 1.0);
  const double sine = tangent * cosine;
  const int r = 3 - p - q;
  const double off = t[p][q];
  t[p][p] -= tangent * off;
  t[q][q] += tangent * off;
  t[p][q] = t[q][p] = 0;
  const double rp = cosine * t[r][p] - sine * t[r][q];
  const double rq = sine * t[r][p] + cosine * t[r][q];
  t[r][p] = t[p][r] = rp;
  t[r][q] = t[q][r] = rq;
  for (auto& row : vectors) {
    const double vp = cosine * row[p] - sine * row[q];
    row[q] = sine * row[p] + cosine * row[q];
    row[p] = vp;
  }
}

struct Coefficients {
  double v, r, p;
};

// The eigenvector of the largest eigenvalue of a symmetric 3 x 3 matrix, which is worn out. Convergence is quadratic: eight
// sweeps are more than enough.
inline Coefficients leading_eigenvector(double (&t)[3][3]) {
  double vectors[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  for (int sweep = 0; sweep < 8; ++sweep) {
    rotate(t, vectors, 0, 1);
    rotate(t, vectors, 0, 2);
    rotate(t, vectors, 1, 2);
  }
  int top = t[1][1] > t[0][0] ? 1 : 0;
  top = t[2][2] > t[top][top] ? 2 : top;
  const double sign = vectors[0][top] < 0 ? -1 : 1;
  return {sign * vectors[0][top], sign * vectors[1][top], sign * vectors[2][top]};
}

// apply(x, y) computes y = A x. The iteration goes on until the residual is small: it tells an eigenvector, the change of
// theta does not. Nor does it go on beyond, where directions are noise.
template <typename Apply>
class LeadingDirection {
 public:
  LeadingDirection(Vector start, const Apply& apply, const IterationOptions& options)
      : apply_(apply), options_(options), v_(start.size()), r_(start.size()), p_(start.size()) {
    v_.x = std::move(start);
    scale(v_.x, 1 / norm(v_.x));
    apply_(v_.x, v_.ax);
    for (steps_ = 0; steps_ < options_.iters && !converged(); ++steps_) {
      options_.accelerated ? accelerated_step() : plain_step();
    }
  }

  Vector take() { return std::move(v_.x); }
  int64_t steps() const { return steps_; }

 private:
  static constexpr double kDependent = 1e-3;  // of p outside v and r: what is left of it is mostly rounding
  static constexpr int64_t kRefresh = 8;

  bool converged() {
    theta_ = dot(v_.x, v_.ax);
    combine(1, v_.ax, -theta_, v_.x, r_.x);
    residual_ = norm(r_.x);
    return !(residual_ > options_.tol * theta_);
  }

  void plain_step() {
    std::swap(v_.x, v_.ax);
    scale(v_.x, 1 / norm(v_.x));
    apply_(v_.x, v_.ax);
  }

  void accelerated_step() {
    scale(r_.x, 1 / residual_);
    for (int twice = 0; twice < 2; ++twice) {
      combine(1, r_.x, -dot(v_.x, r_.x), v_.x, r_.x);
      scale(r_.x, 1 / norm(r_.x));
    }
    apply_(r_.x, r_.ax);
    has_p_ = has_p_ && orthonormalise_p();
    const Coefficients c = best_combination();
    move(c);
    if (steps_ % kRefresh == kRefresh - 1) {
      apply_(v_.x, v_.ax);
    }
  }

  bool orthonormalise_p() {
    for (int twice = 0; twice < 2; ++twice) {
      p_.add(-dot(v_.x, p_.x), v_);
      p_.add(-dot(r_.x, p_.x), r_);
      const double remainder = norm(p_.x);
      if (!(remainder >= kDependent)) {
        return false;
      }
      p_.scale_by(1 / remainder);
    }
    return true;
  }

  // Of the space spanned by v, r and p, in the order of which they are orthonormal.
  Coefficients best_combination() const {
    const double vr = dot(v_.x, r_.ax);
    const double rr = dot(r_.x, r_.ax);
    const double vp = has_p_ ? dot(v_.x, p_.ax) : 0;
    const double rp = has_p_ ? dot(r_.x, p_.ax) : 0;
    const double pp = has_p_ ? dot(p_.x, p_.ax) : 0;
    double t[3][3] = {{theta_, vr, vp}, {vr, rr, rp}, {vp, rp, pp}};
    return leading_eigenvector(t);
  }

  // v becomes the combination, p the part of it that was outside v.
  void move(const Coefficients& c) {
    p_.scale_by(has_p_ ? c.p : 0);
    p_.add(c.r, r_);
    v_.scale_by(c.v);
    v_.add(1, p_);
    v_.scale_by(1 / norm(v_.x));
    const double length = norm(p_.x);
    has_p_ = length > 0;
    p_.scale_by(has_p_ ? 1 / length : 0);
  }

  const Apply& apply_;
  IterationOptions options_;
  Direction v_;  // the estimate
  Direction r_;  // its residual, the direction of steepest ascent
  Direction p_;  // the last change of v
  bool has_p_ = false;
  double theta_ = 0;
  double residual_ = 0;
  int64_t steps_ = 0;
};

}  // namespace fairkernels
