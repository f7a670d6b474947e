// The leading singular value of a matrix in shared memory that one block works on, as cpu/iteration.h has it. It has at
// most 128 columns; rows may be many.
// Bound by latency: a step is one pass over the matrix by all warps, two barriers, and the vectors, which the first warp
// keeps in its registers, in double: 4 rounds of sums over its lanes and the 3 x 3 eigenproblem. A pass takes 2
// multiply-adds an entry, of which shared memory gives 32 in a cycle. Floor: so many cycles a step, and the barriers.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared_tile.cuh"
#include "support/iteration_math.h"

namespace fairkernels {

constexpr int kSpectralThreads = 512;
constexpr int kSpectralWarps = kSpectralThreads / device::kWarp;
constexpr int kMostSpectralColumns = 128;
constexpr int kRowsAtOnce = 4;  // of a warp, or of each part of it

// What a thread keeps of a vector of as many columns.
inline int spectral_entries(int64_t columns) {
  return columns <= 32 ? 1 : columns <= 64 ? 2 : 4;
}

// Enough to take all rows at once, if there are so many.
inline int spectral_threads(int64_t rows, int64_t columns) {
  int64_t width = 1;
  while (width < columns && width < device::kWarp) {
    width *= 2;
  }
  const int64_t rows_per_warp = kRowsAtOnce * device::kWarp / width;
  const int64_t warps = (rows + rows_per_warp - 1) / rows_per_warp;
  return device::kWarp * static_cast<int>(warps < 1 ? 1 : warps > kSpectralWarps ? kSpectralWarps : warps);
}

// A power of two in two factors: by itself it may be out of range.
template <typename Real>
struct PowerOfTwo {
  Real half;
  Real rest;

  FK_DEVICE static PowerOfTwo of(int exponent) {
    return {static_cast<Real>(std::ldexp(1.0, exponent / 2)), static_cast<Real>(std::ldexp(1.0, exponent - exponent / 2))};
  }

  FK_DEVICE Real times(Real x) const { return x * half * rest; }
};

template <typename Real>
FK_DEVICE void multiply_all(const SharedTile<Real>& matrix, PowerOfTwo<Real> factor) {
  const int warps = device::threads() / device::kWarp;
  for (int i = device::thread() / device::kWarp; i < matrix.rows; i += warps) {
    for (int j = device::thread() % device::kWarp; j < matrix.columns; j += device::kWarp) {
      matrix(i, j) = factor.times(matrix(i, j));
    }
  }
  device::barrier();
}

// A vector to start from, of any floating type; null: none.
struct StartHint {
  const void* data;
  Dtype dtype;
  int64_t stride;
  bool of_rows;  // it is one for the vector along the rows, u; else for that along the columns

  FK_DEVICE double operator()(int64_t at) const { return element_at<double>(data, dtype, at * stride); }
};

// What threads of a block leave for each other.
template <typename Real>
struct SpectralMemory {
  Real x[kMostSpectralColumns];
  Real products[kSpectralWarps][kMostSpectralColumns];
  // The vectors that find no room in registers, see BlockIteration.
  double r[kMostSpectralColumns];
  double ar[kMostSpectralColumns];
  double p[kMostSpectralColumns];
  double ap[kMostSpectralColumns];
  int asked;
  bool flag;
};

// The entries of columns lane, lane + 32, ..., of a vector.
template <int kEntries>
struct LaneEntries {
  double of[kEntries];

  FK_DEVICE double& operator[](int k) { return of[k]; }
  FK_DEVICE double operator[](int k) const { return of[k]; }
};

// All threads of the block call what is public. A matrix with fewer than 32 columns has several rows in a warp.
template <int kEntries, typename Real>
class BlockIteration {
 public:
  FK_DEVICE BlockIteration(const SharedTile<Real>& matrix, const IterationOptions& options, SpectralMemory<Real>& memory)
      : matrix_(matrix),
        options_(options),
        memory_(memory),
        lane_(device::thread() % device::kWarp),
        warp_(device::thread() / device::kWarp),
        warps_(device::threads() / device::kWarp) {
    while (width_ < matrix.columns && width_ < device::kWarp) {
      width_ *= 2;
    }
  }

  // sigma; on_row(i, u_i) and on_column(j, v_j) are called once for each. Zeros for a zero matrix, NaN if an entry is not
  // finite. Of the two signs the one with sum(v) >= 0 or, `sign_by_rows`, sum(u) >= 0. The matrix may be rescaled.
  template <typename OnRow, typename OnColumn>
  FK_DEVICE double leading_pair(const StartHint& hint, bool sign_by_rows, const OnRow& on_row, const OnColumn& on_column) {
    const bool nonnegative = find_extent();
    if (!(largest_ > 0 && largest_ < kInfinity<double>)) {
      const double value = largest_ - largest_;  // 0, or NaN
      for_each_of(matrix_.rows, [&](int i) { on_row(i, value); });
      for_each_of(matrix_.columns, [&](int j) { on_column(j, value); });
      return value;
    }
    const int exponent = exponent_to_take_out(largest_);
    if (exponent != 0) {
      multiply_all(matrix_, PowerOfTwo<Real>::of(-exponent));
      largest_ = PowerOfTwo<Real>::of(-exponent).times(static_cast<Real>(largest_));
    }
    begin(hint, nonnegative);
    iterate();
    return std::ldexp(finish(sign_by_rows, on_row, on_column), exponent);
  }

 private:
  using Entries = LaneEntries<kEntries>;

  enum Asked { kStart, kLargestRow, kPower, kSteepest, kLast, kAnew, kNothing };

  FK_DEVICE bool steers() const { return warp_ == 0; }
  FK_DEVICE int groups() const { return device::kWarp / width_; }
  FK_DEVICE int column(int k) const { return lane_ % width_ + k * device::kWarp; }

  template <typename Function>
  FK_DEVICE void for_each_of(int n, const Function& function) const {
    for (int at = device::thread(); at < n; at += device::threads()) {
      function(at);
    }
  }

  // Calls function(row, block) for every row of this warp; rows that are not there are zeros.
  template <typename Function>
  FK_DEVICE void for_each_rows(const Function& function) const {
    const int stride = warps_ * groups();
#pragma unroll 1
    for (int first = warp_ * groups(); first < matrix_.rows; first += kRowsAtOnce * stride) {
      const int row = first + lane_ / width_;
      Real block[kRowsAtOnce][kEntries];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEntries; ++k) {
          const bool inside = row + r * stride < matrix_.rows && column(k) < matrix_.columns;
          block[r][k] = inside ? matrix_(row + r * stride, column(k)) : Real(0);
        }
      }
      function(row, stride, block);
    }
  }

  // Whether no entry is negative; largest_ is that by absolute value, infinite if one is not finite.
  FK_DEVICE bool find_extent() {
    constexpr Real kMost = kInfinity<Real>;
    Real largest = 0;
    Real lowest = 0;
    for_each_rows([&](int, int, const Real(&block)[kRowsAtOnce][kEntries]) {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEntries; ++k) {
          const Real size = block[r][k] < 0 ? -block[r][k] : block[r][k];
          const Real known = size < kMost ? size : kMost;  // also for NaN
          largest = known > largest ? known : largest;
          lowest = block[r][k] < lowest ? block[r][k] : lowest;
        }
      }
    });
    largest_ = static_cast<double>(block_max(largest));
    return !(block_max(-lowest) > 0);
  }

  // ---- Products

  // z = M x, x that of the memory; in all lanes of a row.
  FK_DEVICE void images(const Real (&block)[kRowsAtOnce][kEntries], const Real (&x)[kEntries], Real (&z)[kRowsAtOnce]) const {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      z[r] = block[r][0] * x[0];
#pragma unroll
      for (int k = 1; k < kEntries; ++k) {
        z[r] = std::fma(block[r][k], x[k], z[r]);
      }
    }
    if constexpr (kEntries > 1) {
      warp_sums_of_four(z);
    } else {
      for (int bits = width_ / 2; bits > 0; bits /= 2) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          z[r] += device::from_partner(z[r], bits);
        }
      }
    }
  }

  FK_DEVICE void load_x(Real (&x)[kEntries]) const {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      x[k] = column(k) < matrix_.columns ? memory_.x[column(k)] : Real(0);
    }
  }

  // Leaves this warp's part of the sum over its rows.
  FK_DEVICE void leave(Real (&sums)[kEntries]) {
    for (int bits = width_; bits < device::kWarp; bits *= 2) {
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        sums[k] += device::from_partner(sums[k], bits);
      }
    }
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      if (lane_ < width_) {
        memory_.products[warp_][column(k)] = sums[k];
      }
    }
  }

  // This warp's part of MᵀM x.
  FK_DEVICE void multiply() {
    Real x[kEntries];
    load_x(x);
    Real sums[kEntries] = {};
    for_each_rows([&](int, int, const Real(&block)[kRowsAtOnce][kEntries]) {
      Real z[kRowsAtOnce];
      images(block, x, z);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEntries; ++k) {
          sums[k] = std::fma(z[r], block[r][k], sums[k]);
        }
      }
    });
    leave(sums);
  }

  // By the first warp: what all have left.
  FK_DEVICE void take(Entries& to) const {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      to[k] = 0;
    }
#pragma unroll 4
    for (int warp = 0; warp < warps_; ++warp) {
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        const int at = lane_ + k * device::kWarp;
        to[k] += at < matrix_.columns ? static_cast<double>(memory_.products[warp][at]) : 0.0;
      }
    }
  }

  FK_DEVICE void give(const Entries& x) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const int at = lane_ + k * device::kWarp;
      if (at < matrix_.columns) {
        memory_.x[at] = static_cast<Real>(x[k]);
      }
    }
  }

  FK_DEVICE Entries own(const double* vector) const {
    Entries entries;
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      entries[k] = vector[lane_ + k * device::kWarp];
    }
    return entries;
  }

  FK_DEVICE void keep(const Entries& entries, double* vector) const {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      vector[lane_ + k * device::kWarp] = entries[k];
    }
  }

  // ---- The start

  FK_DEVICE void begin(const StartHint& hint, bool nonnegative) {
    const int n = hint.of_rows ? matrix_.rows : matrix_.columns;
    double of_hint = 0;
    double of_first = 0;
    if (hint.data != nullptr) {
      for_each_of(n, [&](int at) {
        of_hint += hint(at) * hint(at);
        of_first += first_entry(at, nonnegative) * first_entry(at, nonnegative);
      });
      of_hint = block_sum(of_hint);
      of_first = block_sum(of_first);
    }
    const double weight = hint_weight(std::sqrt(of_hint));
    const double beside = kBesideHint / std::sqrt(of_first);
    const auto start_at = [&](int at) {
      const double first = first_entry(at, nonnegative);
      return weight > 0 ? weight * hint(at) + beside * first : first;
    };
    if (weight > 0 && hint.of_rows) {
      Real sums[kEntries] = {};
      for_each_rows([&](int row, int stride, const Real(&block)[kRowsAtOnce][kEntries]) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Real factor = row + r * stride < n ? static_cast<Real>(start_at(row + r * stride)) : Real(0);
#pragma unroll
          for (int k = 0; k < kEntries; ++k) {
            sums[k] = std::fma(factor, block[r][k], sums[k]);
          }
        }
      });
      leave(sums);
      device::barrier();
      take(v_);
      return;
    }
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const int at = lane_ + k * device::kWarp;
      v_[k] = at < matrix_.columns ? start_at(at) : 0;
    }
  }

  // Where the first direction happens to be one that the matrix maps to 0: the first row with the largest entry is none.
  FK_DEVICE void take_largest_row() {
    int found = matrix_.rows;
    for (int i = 0; i < matrix_.rows && found == matrix_.rows; ++i) {
      bool here = false;
      for (int j = lane_; j < matrix_.columns; j += device::kWarp) {
        const Real entry = matrix_(i, j);
        here = here || static_cast<double>(entry < 0 ? -entry : entry) == largest_;
      }
      found = device::vote(here) != 0 ? i : found;
    }
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const int at = lane_ + k * device::kWarp;
      v_[k] = found < matrix_.rows && at < matrix_.columns ? static_cast<double>(matrix_(found, at)) : 0;
    }
  }

  // ---- Vectors, which the first warp has

  FK_DEVICE static double part_of_dot(const Entries& a, const Entries& b) {
    double sum = a[0] * b[0];
#pragma unroll
    for (int k = 1; k < kEntries; ++k) {
      sum = std::fma(a[k], b[k], sum);
    }
    return sum;
  }

  FK_DEVICE static double dot(const Entries& a, const Entries& b) {
    return warp_sum(part_of_dot(a, b));
  }

  FK_DEVICE static void to_length_1(Entries& x) {
    const double length = std::sqrt(dot(x, x));
    const double factor = length > 0 ? 1 / length : 0;
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      x[k] *= factor;
    }
  }

  // ---- Steps

  FK_DEVICE void iterate() {
    int asked = kStart;
    if (steers()) {
      to_length_1(v_);
      give(v_);
    }
    device::barrier();
    while (asked != kNothing) {
      multiply();
      device::barrier();
      if (steers()) {
        const int next = after(static_cast<Asked>(asked));
        if (lane_ == 0) {
          memory_.asked = next;
        }
      }
      device::barrier();
      asked = memory_.asked;
    }
  }

  // Takes the product that was asked for and says which is the next one.
  FK_DEVICE Asked after(Asked asked) {
    Entries product;
    take(product);
    if (asked == kSteepest || asked == kLast) {
      keep(product, asked == kSteepest ? memory_.ar : memory_.ap);
      if (asked == kSteepest && has_p_) {
        has_p_ = outside_v_and_r();
        if (has_p_ && p_left_ < kCancelled) {
          give(own(memory_.p));
          return kLast;
        }
      }
      move();
      if (steps_ % kRefresh == 0) {
        give(v_);
        return kAnew;
      }
    } else {
      av_ = product;
    }
    theta_ = dot(v_, av_);
    if (asked == kStart && theta_ == 0) {
      take_largest_row();
      to_length_1(v_);
      give(v_);
      return kLargestRow;
    }
    return step();
  }

  // Goes on until the residual is small: it tells an eigenvector, the change of theta does not.
  FK_DEVICE Asked step() {
    Entries r;
    double residual[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      r[k] = av_[k] - theta_ * v_[k];
      residual[0] = std::fma(r[k], r[k], residual[0]);
      residual[1] = std::fma(r[k], v_[k], residual[1]);
    }
    warp_sums(residual);
    const double squared = residual[0];
    const double along = residual[1];
    if (steps_ >= options_.iters || !(std::sqrt(squared) > least_residual(options_) * theta_)) {
      return kNothing;
    }
    ++steps_;
    if (!options_.accelerated) {
      v_ = av_;
      to_length_1(v_);
      give(v_);
      return kPower;
    }
    const double factor = 1 / std::sqrt(squared - along * along);  // orthogonal to v already but for rounding
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      r[k] = factor * (r[k] - along * v_[k]);
    }
    give(r);
    keep(r, memory_.r);
    return kSteepest;
  }

  // Makes p orthogonal to v and r. Twice where much of it is taken away, which leaves rounding errors along v and r; and
  // then its product is a difference of large numbers, too, whose error would grow from step to step.
  FK_DEVICE bool outside_v_and_r() {
    const Entries r = own(memory_.r);
    const Entries ar = own(memory_.ar);
    Entries p = own(memory_.p);
    Entries ap = own(memory_.ap);
    p_left_ = 1;
    bool again = true;
    for (int turn = 0; turn < 2 && again; ++turn) {
      double along[2] = {part_of_dot(v_, p), part_of_dot(r, p)};
      warp_sums(along);
      const double left = 1 - along[0] * along[0] - along[1] * along[1];
      if (!(left >= kDependent)) {
        return false;
      }
      const double factor = 1 / std::sqrt(left);
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        p[k] = factor * (p[k] - along[0] * v_[k] - along[1] * r[k]);
        ap[k] = factor * (ap[k] - along[0] * av_[k] - along[1] * ar[k]);
      }
      p_left_ = left < p_left_ ? left : p_left_;
      again = left <= kMostlyLeft;
    }
    keep(p, memory_.p);
    keep(ap, memory_.ap);
    return true;
  }

  // v turns towards the best combination of v, r and p; p becomes the direction, orthogonal to it, in which it has moved.
  FK_DEVICE void move() {
    const Entries r = own(memory_.r);
    const Entries ar = own(memory_.ar);
    Entries p{};
    Entries ap{};
    if (has_p_) {
      p = own(memory_.p);
      ap = own(memory_.ap);
    }
    double products[5] = {part_of_dot(v_, ar), part_of_dot(r, ar), part_of_dot(v_, ap),
                          part_of_dot(r, ap), part_of_dot(p, ap)};
    warp_sums(products);
    const Coefficients best =
        leading_eigenvector(products[0], products[2], products[1] - theta_, products[3], products[4] - theta_);
    const double sine = std::sqrt(best.r * best.r + best.p * best.p);
    has_p_ = sine > 0;
    if (has_p_) {
      turn(best.v, sine, best.r / sine, best.p / sine, r, v_, p);
      turn(best.v, sine, best.r / sine, best.p / sine, ar, av_, ap);
      keep(p, memory_.p);
      keep(ap, memory_.ap);
    }
  }

  FK_DEVICE static void turn(double cosine, double sine, double of_r, double of_p, const Entries& r, Entries& v, Entries& p) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const double towards = of_r * r[k] + of_p * p[k];
      const double old = v[k];
      v[k] = cosine * old + sine * towards;
      p[k] = cosine * towards - sine * old;
    }
  }

  // ---- The end

  template <typename OnRow, typename OnColumn>
  FK_DEVICE double finish(bool sign_by_rows, const OnRow& on_row, const OnColumn& on_column) {
    if (steers()) {
      give(v_);
      double sum = 0;
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        sum += v_[k];
      }
      const double total = warp_sum(sum);
      if (lane_ == 0) {
        memory_.flag = total < 0;
      }
    }
    device::barrier();
    double squares = 0;
    double sum = 0;
    for_each_image([&](int, double z) {
      squares += z * z;
      sum += z;
    });
    const double sigma = std::sqrt(block_sum(squares));
    const double row_sum = block_sum(sum);
    const double sign = (sign_by_rows ? row_sum < 0 : memory_.flag) ? -1 : 1;
    const double factor = sigma > 0 ? sign / sigma : 0;
    for_each_image([&](int row, double z) { on_row(row, factor * z); });
    if (steers()) {
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        const int at = lane_ + k * device::kWarp;
        if (at < matrix_.columns) {
          on_column(at, sigma > 0 ? sign * v_[k] : 0);
        }
      }
    }
    return sigma;
  }

  // Calls function(i, (M x)_i) once for each row.
  template <typename Function>
  FK_DEVICE void for_each_image(const Function& function) const {
    Real x[kEntries];
    load_x(x);
    for_each_rows([&](int row, int stride, const Real(&block)[kRowsAtOnce][kEntries]) {
      Real z[kRowsAtOnce];
      images(block, x, z);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (lane_ % width_ == 0 && row + r * stride < matrix_.rows) {
          function(row + r * stride, static_cast<double>(z[r]));
        }
      }
    });
  }

  const SharedTile<Real>& matrix_;
  const IterationOptions& options_;
  SpectralMemory<Real>& memory_;
  const int lane_;
  const int warp_;
  const int warps_;
  int width_ = 1;  // lanes of a row
  double largest_ = 0;

  // Of the first warp. The residual of v, which is the direction r of steepest ascent, the last change p of v, Ar and Ap
  // lie in shared memory.
  Entries v_{};   // the estimate
  Entries av_{};  // its product with A
  bool has_p_ = false;
  double p_left_ = 1;
  double theta_ = 0;
  int64_t steps_ = 0;
};

}  // namespace fairkernels
