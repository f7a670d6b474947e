// What one sample adds to its row of a surrogate's matrix, see cpu/spectral_loss.h. A team has the sample's row.
#pragma once

#include <climits>

#include "cuda/class_rows.cuh"

namespace fairkernels {

FK_HOST_DEVICE inline bool has_charges(const ClassTask& task) {
  return task.wants_spectral && task.surrogate != Surrogate::soft;
}

// Whether the charges go through the rates, and their derivatives with those of the rates through the softmax.
FK_HOST_DEVICE inline bool is_by_rates(Surrogate surrogate) {
  return surrogate == Surrogate::soft || surrogate == Surrogate::gated;
}

// "kl": the strongest wrong class, the first of several, and the charge where it is within the margin; -1 and 0 if it is
// not. The exponentials, relative to its logit, of the wrong classes and of all.
template <typename Real>
struct Rival {
  int place;
  Real charge;
  Real highest;
  Real others;
  Real all;
};

// A NaN is the largest of all: its exponential is NaN all the same.
template <typename Real>
FK_DEVICE Real as_rival(Real z) {
  return z != z ? kInfinity<Real> : z;
}

// `z` holds the row, or is used to hold one piece of it after the other.
template <typename Layout, bool kPieces>
FK_DEVICE Rival<typename Layout::Real> find_rival(const ClassTask& task, int64_t row, int label,
                                                  typename Layout::Real own, typename Layout::Real (&z)[Layout::kHeld]) {
  using Real = typename Layout::Real;
  using Members = typename Layout::Members;
  const Real margin = static_cast<Real>(task.margin);
  Rival<Real> rival{INT_MAX, 0, -kInfinity<Real>, 0, 0};
  for (int first = 0; first < (kPieces ? task.classes : 1); first += Layout::kColumns) {
    if constexpr (kPieces) {
      load_logits<Layout>(task, row, first, z);
    }
    for_columns<Layout>(task, first, [&](int e, int column) {
      const Real known = as_rival(z[e]);
      rival.highest = column != label && known > rival.highest ? known : rival.highest;
    });
  }
  rival.highest = Members::max(rival.highest);
  for (int first = 0; first < (kPieces ? task.classes : 1); first += Layout::kColumns) {
    if constexpr (kPieces) {
      load_logits<Layout>(task, row, first, z);
    }
    for_columns<Layout>(task, first, [&](int e, int column) {
      if (column != label) {
        rival.place = as_rival(z[e]) == rival.highest && column < rival.place ? column : rival.place;
        rival.others += std::exp(z[e] - finite_top(rival.highest));
      }
    });
  }
  rival.place = -Members::max(-rival.place);
  rival.others = Members::sum(rival.others);
  const Real ahead = rival.highest - own + margin;
  rival.all = rival.others + std::exp(-ahead);
  if (is_ahead(own, margin + rival.highest) || rival.place >= task.classes) {
    rival.place = -1;
  } else {
    rival.charge = ahead + std::log(rival.all);
  }
  return rival;
}

// What the charges of a row's columns have in common.
template <typename Real>
struct ChargeRow {
  int label;
  Real own;        // the logit of the class
  Real own_exp;    // relative to the top
  Real total;      // of the exponentials
  Real loss;       // -log p_y
  Rival<Real> rival;
};

template <typename Real>
FK_DEVICE Real gate_of(const ClassTask& task, Real z, Real own) {
  return 1 / (1 + std::exp(-(static_cast<Real>(task.margin) + (z - own))));
}

// "kl-all": whether a wrong class is within the margin, or NaN. At margin 0 logits decide, whose order rounding does not
// change.
template <typename Real>
FK_DEVICE bool is_hit(const ClassTask& task, const ChargeRow<Real>& row, Real z, Real exp) {
  return task.margin == 0 ? !is_ahead(row.own, z) : !(row.own_exp > static_cast<Real>(task.margin) * row.total + exp);
}

template <typename Real>
FK_DEVICE Real charge_of(const ClassTask& task, const ChargeRow<Real>& row, int column, Real z, Real exp) {
  if (column == row.label) {
    return 0 * (exp / row.total);  // a NaN is kept for the sum: no other class may be there
  }
  if (task.surrogate == Surrogate::gated) {
    return gate_of(task, z, row.own) * (exp / row.total);
  }
  if (task.surrogate == Surrogate::kl_all) {
    return is_hit(task, row, z, exp) ? row.loss : Real(0);
  }
  return column == row.rival.place ? row.rival.charge : Real(0);
}

template <typename Real>
FK_DEVICE ChargeRow<Real> charge_row(int label, Real own, Real top, Real total, const Rival<Real>& rival) {
  return {label, own, std::exp(own - top), total, std::log(total) + (top - own), rival};
}

// Logits become charges.
template <typename Layout>
FK_DEVICE void to_charges(const ClassTask& task, const ChargeRow<typename Layout::Real>& row, int first,
                          const typename Layout::Real (&exps)[Layout::kHeld], typename Layout::Real (&z)[Layout::kHeld]) {
  for_columns<Layout>(task, first, [&](int e, int column) { z[e] = charge_of(task, row, column, z[e], exps[e]); });
}

}  // namespace fairkernels
