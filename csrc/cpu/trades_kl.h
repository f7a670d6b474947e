// The divergence KL(p || q) of two softmaxes, p of the natural logits z and q of the adversarial ones z', row by row,
// and its gradients by both (TRADES, arXiv 1901.08573).
// Bound by the two exps an element, which either direction computes; each reads both logits once, backward writes both
// gradients once. Rows of few classes lie in the lanes side by side, sixteen at a time: one row across them would leave
// most lanes empty and fold them together five times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/elements.h"
#include "support/exp.h"
#include "support/lanes.h"
#include "support/platform.h"
#include "support/remainders.h"

namespace fairkernels {

constexpr int64_t kMostSideBySide = 64;  // classes; measured: tiles of more are fetched from memory too unevenly

// Whether rows lie across the lanes, one at a time: measured, folding the lanes costs as much as five vectors, and
// laying sixteen rows side by side a third of the vectors they then are.
inline bool rows_lie_across(int64_t rows, int64_t classes) {
  const int64_t across = rows * (padded(classes) / kLanes + 5);
  const int64_t side_by_side = padded(rows) / kLanes * classes;
  return classes > kMostSideBySide || 4 * side_by_side > 3 * across;
}

// The logits, or the gradients, of one problem.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Both logits of one row, or of sixteen rows side by side, and what becomes of them; `vectors` of sixteen lanes each.
template <typename Real>
struct LogitTile {
  int64_t vectors;
  Real* natural;      // z, then exp(z - max z), then p
  Real* adversarial;  // z', then exp(z' - max z'), then q
  Real* ratio;        // log(q_k / p_k) less its value at the row's most probable class
  Real* change;       // q - p
};

// What the lanes of a tile have in common with their row. Across a row all lanes are made to say the same.
template <typename Real, bool kAcross>
struct RunningSums {
  double lane[kLanes] = {};

  FK_INLINE void add(const Real (&block)[kLanes]) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += block[j];
    }
  }

  FK_INLINE void fold(Real (&to)[kLanes]) {
    if constexpr (kAcross) {
      const double sum = add_lanes(lane);
      std::fill_n(lane, kLanes, sum);
    }
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      to[j] = static_cast<Real>(lane[j]);
    }
  }
};

// A row's largest logits, and z' - z where z is largest.
template <typename Real>
struct Tops {
  Real natural[kLanes];
  Real adversarial[kLanes];
  Real gap[kLanes];
};

template <bool kAcross, typename Real>
FK_INLINE void find_tops(const LogitTile<Real>& tile, Tops<Real>& tops) {
  constexpr Real lowest = -std::numeric_limits<Real>::infinity();
  Real natural[kLanes];
  Real adversarial[kLanes];
  Real gap[kLanes] = {};
  std::fill_n(natural, kLanes, lowest);
  std::fill_n(adversarial, kLanes, lowest);
  for (int64_t at = 0; at < tile.vectors * kLanes; at += kLanes) {
    Real seen[kLanes];
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const Real z = tile.natural[at + j];
      seen[j] = z > natural[j] ? tile.adversarial[at + j] - z : gap[j];
    }
    std::copy_n(seen, kLanes, gap);
    see_lanes(tile.natural + at, natural);
    see_lanes(tile.adversarial + at, adversarial);
  }
  if constexpr (kAcross) {
    Real folded[kLanes];
    std::copy_n(natural, kLanes, folded);
    const Real top = max_lanes(folded);
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      gap[j] = natural[j] == top ? gap[j] : lowest;
    }
    std::fill_n(natural, kLanes, top);
    std::fill_n(adversarial, kLanes, max_lanes(adversarial));
    std::fill_n(gap, kLanes, max_lanes(gap));
  }
  std::copy_n(natural, kLanes, tops.natural);
  std::copy_n(adversarial, kLanes, tops.adversarial);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    tops.gap[j] = gap[j] == lowest || gap[j] == -lowest ? Real(0) : gap[j];  // where one of the two is impossible
  }
}

// By what a row's exponentials are to be multiplied, and log(q / p) at its most probable class.
template <typename Real>
struct Scales {
  Real natural[kLanes];
  Real adversarial[kLanes];
  Real top_ratio[kLanes];
};

// Logits become exponentials. The differences z' - z are taken first, where close logits lose nothing.
template <bool kAcross, typename Real>
FK_INLINE void take_exps(const LogitTile<Real>& tile, Scales<Real>& scales) {
  Tops<Real> tops;
  find_tops<kAcross>(tile, tops);
  RunningSums<Real, kAcross> naturals;
  RunningSums<Real, kAcross> adversarials;
  for (int64_t first = 0; first < tile.vectors * kLanes; first += kBlock) {
    const int64_t end = std::min(first + kBlock, tile.vectors * kLanes);
    Real natural_block[kLanes] = {};
    Real adversarial_block[kLanes] = {};
    for (int64_t at = first; at < end; at += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const Real natural = tile.natural[at + j];
        const Real adversarial = tile.adversarial[at + j];
        tile.ratio[at + j] = (adversarial - natural) - tops.gap[j];
        natural_block[j] += tile.natural[at + j] = exp_nonpositive(natural - tops.natural[j]);
        adversarial_block[j] += tile.adversarial[at + j] = exp_nonpositive(adversarial - tops.adversarial[j]);
      }
    }
    naturals.add(natural_block);
    adversarials.add(adversarial_block);
  }
  Real natural_sum[kLanes];
  Real adversarial_sum[kLanes];
  naturals.fold(natural_sum);
  adversarials.fold(adversarial_sum);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    scales.natural[j] = 1 / natural_sum[j];
    scales.adversarial[j] = 1 / adversarial_sum[j];
    const Real apart = tops.gap[j] - (tops.adversarial[j] - tops.natural[j]);
    scales.top_ratio[j] = apart - log_normal(adversarial_sum[j] / natural_sum[j]);
  }
}

// The divergence of the rows in a tile. Its terms are q - p - p r with r = log(q / p): they add up to the same as -p r,
// because p and q have the same sum, but none is negative. Where r is small p (exp(r) - 1 - r) says the same without
// cancellation; and since that is flat at r = 0, an error of the sums enters only by its square.
template <bool kAcross, typename Real>
FK_INLINE void divergence_body(const LogitTile<Real>& tile, double* divergence) {
  Scales<Real> scales;
  take_exps<kAcross>(tile, scales);
  RunningSums<Real, kAcross> sums;
  for (int64_t first = 0; first < tile.vectors * kLanes; first += kBlock) {
    const int64_t end = std::min(first + kBlock, tile.vectors * kLanes);
    Real block[kLanes] = {};
    for (int64_t at = first; at < end; at += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const Real p = tile.natural[at + j] * scales.natural[j];
        const Real q = tile.adversarial[at + j] * scales.adversarial[j];
        const Real r = tile.ratio[at + j] + scales.top_ratio[j];
        const bool near = r >= -1 && r <= 1;
        const Real close = p * exp_remainder(near ? r : Real(0));
        const Real term = near ? close : q - p - p * r;
        block[j] += p == 0 ? q : term;  // whatever r is there
      }
    }
    sums.add(block);
  }
  Real rows[kLanes];
  sums.fold(rows);
  std::copy_n(sums.lane, kLanes, divergence);
}

// Logits become gradients: slope_r p (sum_j p_j r_j - r) by z, slope_r (q - p) by z', slope_r being one for each lane.
// Neither sum of differences is left to the rounding of the sums: the ratios are taken from the most probable class's,
// and what the changes q - p add up to, which is 0, is subtracted again.
template <bool kAcross, typename Real>
FK_INLINE void slopes_body(const LogitTile<Real>& tile, const Real* slope) {
  Scales<Real> scales;
  take_exps<kAcross>(tile, scales);
  RunningSums<Real, kAcross> changes;
  RunningSums<Real, kAcross> ratios;
  for (int64_t first = 0; first < tile.vectors * kLanes; first += kBlock) {
    const int64_t end = std::min(first + kBlock, tile.vectors * kLanes);
    Real change_block[kLanes] = {};
    Real ratio_block[kLanes] = {};
    for (int64_t at = first; at < end; at += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const Real p = tile.natural[at + j] * scales.natural[j];
        const Real q = tile.adversarial[at + j] * scales.adversarial[j];
        const Real relative = p == 0 ? Real(0) : tile.ratio[at + j];
        const Real r = tile.ratio[at + j] + scales.top_ratio[j];
        const bool near = p != 0 && r >= -1 && r <= 1;
        const Real inside = near ? r : Real(0);
        const Real close = p * (inside + exp_remainder(inside));
        const Real change = near ? close : q - p;
        tile.natural[at + j] = p;
        tile.adversarial[at + j] = q;
        tile.ratio[at + j] = relative;
        tile.change[at + j] = change;
        change_block[j] += change;
        ratio_block[j] += p * relative;
      }
    }
    changes.add(change_block);
    ratios.add(ratio_block);
  }
  Real excess[kLanes];
  Real mean[kLanes];
  changes.fold(excess);
  ratios.fold(mean);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    mean[j] += excess[j] - excess[j];  // 0, or NaN if q is
  }
  for (int64_t at = 0; at < tile.vectors * kLanes; at += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      tile.natural[at + j] = slope[j] * (tile.natural[at + j] * (mean[j] - tile.ratio[at + j]));
      tile.adversarial[at + j] = slope[j] * (tile.change[at + j] - tile.adversarial[at + j] * excess[j]);
    }
  }
}

FK_CLONES static void divergence(const LogitTile<float>& tile, bool across, double* rows) {
  across ? divergence_body<true>(tile, rows) : divergence_body<false>(tile, rows);
}

FK_CLONES static void divergence(const LogitTile<double>& tile, bool across, double* rows) {
  across ? divergence_body<true>(tile, rows) : divergence_body<false>(tile, rows);
}

FK_CLONES static void slopes(const LogitTile<float>& tile, bool across, const float* slope) {
  across ? slopes_body<true>(tile, slope) : slopes_body<false>(tile, slope);
}

FK_CLONES static void slopes(const LogitTile<double>& tile, bool across, const double* slope) {
  across ? slopes_body<true>(tile, slope) : slopes_body<false>(tile, slope);
}

// One thread's tile: loads rows of either layout, any type and stride, and stores them.
template <typename T>
class LogitTiles {
 public:
  using Real = Accumulator<T>;

  LogitTiles(int64_t classes, bool across) : classes_(classes), across_(across), memory_(4 * vectors() * kLanes) {}

  bool across() const { return across_; }

  LogitTile<Real> load(Rows<const T> natural, Rows<const T> adversarial, int64_t first, int64_t n) {
    const int64_t size = vectors() * kLanes;
    Real* memory = memory_.data();
    const LogitTile<Real> tile{vectors(), memory, memory + size, memory + 2 * size, memory + 3 * size};
    load_rows(natural, first, n, tile.natural);
    load_rows(adversarial, first, n, tile.adversarial);
    return tile;
  }

  void store(const Real* lanes, int64_t first, int64_t n, T* contiguous) const {
    if (across_) {
      store_run(lanes, classes_, contiguous + first * classes_);
      return;
    }
    for (int64_t r = 0; r < n; ++r) {
      T* row = contiguous + (first + r) * classes_;
      for (int64_t k = 0; k < classes_; ++k) {
        row[k] = narrow(lanes[k * kLanes + r], T{});
      }
    }
  }

 private:
  int64_t vectors() const { return across_ ? padded(classes_) / kLanes : classes_; }

  // Lanes without a class hold -inf, lanes without a row zeros.
  void load_rows(Rows<const T> rows, int64_t first, int64_t n, Real* lanes) const {
    const T* data = rows.data + first * rows.row_stride;
    if (across_) {
      fairkernels::load(data, rows.column_stride, classes_, lanes);
      std::fill(lanes + classes_, lanes + padded(classes_), -std::numeric_limits<Real>::infinity());
      return;
    }
    if (n < kLanes) {
      std::fill_n(lanes, classes_ * kLanes, Real(0));
    }
    for (int64_t r = 0; r < n; ++r) {
      const T* row = data + r * rows.row_stride;
      for (int64_t k = 0; k < classes_; ++k) {
        lanes[k * kLanes + r] = widen(row[k * rows.column_stride]);
      }
    }
  }

  int64_t classes_;
  bool across_;
  std::vector<Real> memory_;
};

}  // namespace fairkernels
