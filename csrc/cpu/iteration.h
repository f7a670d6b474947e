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
  double tol = 1e-5;   // of the residual |Av - theta v| relative to theta
  double noise = 1e-6;  // what is left of the residual when products are rounded; no tol goes below it
};

// A negative number stands for what is not given. Where singular values nearly tie, sigma is wrong by up to half of tol, and
// elsewhere u and v by about tol: 1e-5 promises sigma to 1e-5, 1e-10 gradients to 1e-8.
inline IterationOptions iteration_options(bool accelerated, bool in_double, int64_t iters = -1, double tol = -1) {
  const int64_t usual = !accelerated ? 1000 : in_double ? 256 : 64;
  return {accelerated, iters < 0 ? usual : iters, tol < 0 ? (in_double ? 1e-10 : 1e-5) : tol, in_double ? 2e-15 : 1e-6};
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

// a = s * (a - t * b - u * c)
FK_CLONES static void remove(double s, double* a, double t, const double* b, double u, const double* c, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    a[i] = s * (a[i] - t * b[i] - u * c[i]);
  }
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

// One rotation of Jacobi's method: annihilates t[p][q], p < q of 0, 1, 2, and turns the eigenvectors along.
inline void rotate(double (&t)[3][3], double (&vectors)[3][3], int p, int q) {
  if (t[p][q] == 0) {
    return;
  }
  const double ratio = (t[q][q] - t[p][p]) / (2 * t[p][q]);
  const double tangent = (ratio < 0 ? -1 : 1) / (std::fabs(ratio) + std::sqrt(ratio * ratio + 1));
  const double cosine = 1 / std::sqrt(tangent * tangent + 1);
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

// The eigenvector of the largest eigenvalue of a symmetric 3 x 3 matrix, which is worn out. Convergence is quadratic: of
// eight sweeps the last ones find nothing to do.
inline Coefficients leading_eigenvector(double (&t)[3][3]) {
  double vectors[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  const double negligible = 1e-18 * (t[0][0] + t[1][1] + t[2][2]);
  for (int sweep = 0; sweep < 8 && std::fabs(t[0][1]) + std::fabs(t[0][2]) + std::fabs(t[1][2]) > negligible; ++sweep) {
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
  static constexpr double kCancelled = 1e-2;
  static constexpr int64_t kRefresh = 8;

  bool converged() {
    theta_ = dot(v_.x, v_.ax);
    combine(1, v_.ax.data(), -theta_, v_.x.data(), v_.x.size(), r_.x.data());
    residual_ = norm(r_.x);
    return !(residual_ > std::max(options_.tol, options_.noise) * theta_);
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
    const double along = dot(v_.x, r_.x);
    const double left = 1 / std::sqrt(residual_ * residual_ - along * along);
    combine(left, r_.x.data(), -along * left, v_.x.data(), v_.x.size(), r_.x.data());
  }

  // Twice where much of it is taken away, which leaves rounding errors along v and r; and then its product is a difference of
  // large numbers, too, whose error would grow from step to step.
  bool orthonormalise_p() {
    double least = 1;
    for (int twice = 0; twice < 2; ++twice) {
      const double along_v = dot(v_.x, p_.x);
      const double along_r = dot(r_.x, p_.x);
      const double left = 1 - along_v * along_v - along_r * along_r;
      if (!(left >= kDependent * kDependent)) {
        return false;
      }
      p_.remove(1 / std::sqrt(left), along_v, v_, along_r, r_);
      least = std::min(least, left);
      if (left > 0.5) {
        break;
      }
    }
    if (least < kCancelled) {
      apply_(p_.x, p_.ax);
    }
    return true;
  }

  // Of v, r and p, which are orthonormal.
  Coefficients best_combination() const {
    const double vr = dot(v_.x, r_.ax);
    const double rr = dot(r_.x, r_.ax);
    const double vp = has_p_ ? dot(v_.x, p_.ax) : 0;
    const double rp = has_p_ ? dot(r_.x, p_.ax) : 0;
    const double pp = has_p_ ? dot(p_.x, p_.ax) : 0;
    double t[3][3] = {{theta_, vr, vp}, {vr, rr, rp}, {vp, rp, pp}};
    return leading_eigenvector(t);
  }

  // v turns towards the best combination; p becomes the direction, orthogonal to it, in which it has moved.
  void move(const Coefficients& best) {
    const double sine = std::sqrt(best.r * best.r + best.p * best.p);
    has_p_ = sine > 0;
    if (has_p_) {
      turn(best.v, sine, best.r / sine, best.p / sine, r_.x.data(), v_.x.size(), v_.x.data(), p_.x.data());
      turn(best.v, sine, best.r / sine, best.p / sine, r_.ax.data(), v_.x.size(), v_.ax.data(), p_.ax.data());
    }
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
