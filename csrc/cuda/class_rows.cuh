// Rows of logits, held in the registers of a team of threads, and what else a problem's samples have.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/problems.cuh"
#include "cuda/class_terms.h"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "support/device.h"
#include "support/iteration_math.h"

namespace fairkernels {

template <typename Real>
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

// The quotient, and 0 for no samples; NaN stays NaN.
template <typename Real>
FK_DEVICE Real divided(Real numerator, Real n) {
  return n == 0 ? Real(0) : numerator / n;
}

// A running sum and what rounding has taken from it (Kahan): as good for many terms as for two.
template <typename Real>
FK_DEVICE void add_exactly(Real term, Real& sum, Real& lost) {
  const Real exact = term - lost;
  const Real raised = sum + exact;
  lost = (raised - sum) - exact;
  sum = raised;
}

// ---- The samples of one problem

struct ClassSamples {
  const int64_t* labels;
  int64_t logits;  // offsets
  int64_t sample_weight;
  int64_t weight;

  FK_DEVICE ClassSamples(const ClassTask& task, int64_t problem)
      : labels(static_cast<const int64_t*>(task.labels.data) + offset_of(task.labels.at, problem)),
        logits(offset_of(task.logits.at, problem)),
        sample_weight(task.sample_weight.data != nullptr ? offset_of(task.sample_weight.at, problem) : 0),
        weight(task.weight.data != nullptr ? offset_of(task.weight.at, problem) : 0) {}
};

// K for a sample that is ignored, 0 for a label that is no class: its weight says so.
FK_DEVICE int class_of(const ClassTask& task, const ClassSamples& samples, int64_t b) {
  const int64_t label = samples.labels[b * task.labels.stride];
  const bool known = label >= 0 && label < task.classes;
  return label == task.ignore_index ? task.classes : (known ? static_cast<int>(label) : 0);
}

// The weight of a sample that is not ignored; NaN if its label is no class, so that no result of its is a number.
template <typename Real>
FK_DEVICE Real weight_of(const ClassTask& task, const ClassSamples& samples, int64_t b) {
  const int64_t label = samples.labels[b * task.labels.stride];
  if (label < 0 || label >= task.classes) {
    return kNan<Real>;
  }
  const ClassOperand& weights = task.sample_weight;
  return weights.data == nullptr ? Real(1)
                                 : element_at<Real>(weights.data, weights.dtype, samples.sample_weight + b * weights.stride);
}

template <typename Real>
FK_DEVICE Real class_weight_of(const ClassTask& task, const ClassSamples& samples, int label) {
  return task.weight.data == nullptr
             ? Real(1)
             : element_at<Real>(task.weight.data, task.weight.dtype, samples.weight + label * task.weight.stride);
}

// ---- Teams

// Threads that hold a row together: some lanes of a warp, or a block of `kThreads` whole warps.
template <int kThreads>
struct Team {
  static constexpr int kSize = kThreads;

  // Of its warp: those that are in the team.
  static FK_DEVICE unsigned lanes() {
    if constexpr (kThreads < device::kWarp) {
      return ((1u << kThreads) - 1) << (device::thread() % device::kWarp / kThreads * kThreads);
    } else {
      return device::kAllLanes;
    }
  }

  static FK_DEVICE int rank() { return device::thread() % kThreads; }
  static FK_DEVICE int number() { return device::thread() / kThreads; }
  static FK_DEVICE int count() { return device::threads() / kThreads; }

  template <typename Real>
  static FK_DEVICE Real sum(Real value) {
    if constexpr (kThreads <= device::kWarp) {
      return lanes_sum(value, kThreads, lanes());
    } else {
      return block_sum(value);
    }
  }

  // A NaN is passed over.
  template <typename Real>
  static FK_DEVICE Real max(Real value) {
    if constexpr (kThreads <= device::kWarp) {
      return lanes_max(value, kThreads, lanes());
    } else {
      return block_max(value);
    }
  }
};

// A row, or a piece of a long one, in the registers of a team: a thread has 8 columns (4 in double), more would not leave
// a kernel the registers it needs. One kernel serves all types that it computes in the same.
template <typename Number, int kThreads>
struct RowLayout {
  using Real = Number;
  using Members = Team<kThreads>;
  static constexpr int kHeld = std::is_same_v<Real, double> ? 4 : 8;  // by a thread
  static constexpr int kColumns = kThreads * kHeld;                   // of the row or piece
  static constexpr bool kBlock = kThreads > device::kWarp;
  static constexpr int kBlockThreads = kBlock ? kThreads : 256;
  static constexpr int kTeams = kBlockThreads / kThreads;

  // Of a kernel, on a multiprocessor together: in float 128 registers are enough for rows as a whole, without charges.
  template <bool kPieces, bool kCharges>
  static constexpr int blocks() {
    return kPieces || kCharges || std::is_same_v<Real, double> ? 1 : 512 / kBlockThreads;
  }
};

template <typename Real>
using ShortRow = RowLayout<Real, 8>;
template <typename Real>
using HalfWarpRow = RowLayout<Real, 16>;
template <typename Real>
using WarpRow = RowLayout<Real, device::kWarp>;
template <typename Real>
using BlockRow = RowLayout<Real, 128>;
template <typename Real>
using LongRow = RowLayout<Real, 256>;

// Calls launch(layout, pieces) for rows of so many classes: up to 64 are held by 8 lanes, if kFewest is 8, up to 128 by
// 16, up to 256 by a warp, up to 1,024 by a small block, up to 2,048 by a large one, longer rows piece by piece. In double
// it is half as many, and two layouts are enough: 16 lanes up to 64, a large block up to 1,024.
template <typename Real, int kFewest, typename Launch>
int with_layout(int64_t classes, const Launch& launch) {
  constexpr std::false_type kWhole;
  if constexpr (!std::is_same_v<Real, double> && kFewest == 8) {
    if (classes <= ShortRow<Real>::kColumns) {
      return launch(ShortRow<Real>(), kWhole);
    }
  }
  if (classes <= HalfWarpRow<Real>::kColumns) {
    return launch(HalfWarpRow<Real>(), kWhole);
  }
  if constexpr (!std::is_same_v<Real, double>) {
    if (classes <= WarpRow<Real>::kColumns) {
      return launch(WarpRow<Real>(), kWhole);
    }
    if (classes <= BlockRow<Real>::kColumns) {
      return launch(BlockRow<Real>(), kWhole);
    }
  }
  return classes <= LongRow<Real>::kColumns ? launch(LongRow<Real>(), kWhole)
                                            : launch(LongRow<Real>(), std::true_type());
}

// The column, counted from the first, of what a thread holds in place `e`. Threads have those that they can read in one
// access: 16 bytes of one are next to those of the next.
template <typename Layout>
FK_DEVICE int column_of(Dtype dtype, int e) {
  constexpr int kPart = kVector<typename Layout::Real>;
  const int rank = Layout::Members::rank();
  return is_half(dtype) ? rank * Layout::kHeld + e : (e / kPart * Layout::Members::kSize + rank) * kPart + e % kPart;
}

// Calls visit(e, column) for the columns of a row that a thread holds, its piece beginning at column `first`.
template <typename Layout, typename Visit>
FK_DEVICE void for_columns(const ClassTask& task, int first, const Visit& visit) {
#pragma unroll
  for (int e = 0; e < Layout::kHeld; ++e) {
    const int column = first + column_of<Layout>(task.logits.dtype, e);
    if (column < task.classes) {
      visit(e, column);
    }
  }
}

// Whether vectors of a row lie on 16 bytes.
template <typename T>
FK_DEVICE bool is_wide(const T* row, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// Calls visit(e, column, wide) for what a thread reads or writes of a row in one access if `wide`, else one by one.
template <typename Layout, typename T, typename Visit>
FK_DEVICE void for_accesses(const ClassTask& task, int first, bool aligned, const Visit& visit) {
#pragma unroll
  for (int e = 0; e < Layout::kHeld; e += kVector<T>) {
    const int column = first + column_of<Layout>(task.logits.dtype, e);
    visit(e, column, aligned && column + kVector<T> <= task.classes);
  }
}

template <typename Layout, typename T>
FK_DEVICE void load_row(const ClassTask& task, const T* row, int first, typename Layout::Real (&z)[Layout::kHeld]) {
  using Real = typename Layout::Real;
  const int64_t stride = task.logits.stride;
  for_accesses<Layout, T>(task, first, is_wide(row, stride), [&](int at, int column, bool wide) {
    T element[kVector<T>];
    if (wide) {
      const device::Bytes16 bytes = device::load16(row + column);
      memcpy(element, &bytes, sizeof(element));
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const bool there = column + e < task.classes;
      z[at + e] = wide ? widen(element[e]) : (there ? widen(row[(column + e) * stride]) : -kInfinity<Real>);
    }
  });
}

// The logits of a row, which begins at `row`, from column `first` on, divided by the temperature; -inf beyond the classes.
template <typename Layout>
FK_DEVICE void load_logits(const ClassTask& task, int64_t row, int first, typename Layout::Real (&z)[Layout::kHeld]) {
  using Real = typename Layout::Real;
  with_type_computed_in<Real>(task.logits.dtype, [&](auto type) {
    load_row<Layout>(task, static_cast<const decltype(type)*>(task.logits.data) + row, first, z);
  });
  if (task.temperature != 1) {
    const Real temperature = static_cast<Real>(task.temperature);
#pragma unroll
    for (int e = 0; e < Layout::kHeld; ++e) {
      z[e] = z[e] / temperature;
    }
  }
}

template <typename Real>
FK_DEVICE Real logit_at(const ClassTask& task, int64_t row, int column) {
  const Real z = float_at<Real>(task.logits.data, task.logits.dtype, row + column * task.logits.stride);
  return task.temperature != 1 ? z / static_cast<Real>(task.temperature) : z;
}

// Writes a row of the gradient, contiguous, from column `first` on.
template <typename Layout>
FK_DEVICE void store_gradient(const ClassTask& task, const typename Layout::Real (&values)[Layout::kHeld], int64_t row,
                              int first) {
  with_type_computed_in<typename Layout::Real>(task.logits.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(task.gradient) + row;
    for_accesses<Layout, T>(task, first, is_wide(to, 1), [&](int at, int column, bool wide) {
      T element[kVector<T>];
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        element[e] = narrow(values[at + e], T{});
        if (!wide && column + e < task.classes) {
          to[column + e] = element[e];
        }
      }
      if (wide) {
        device::Bytes16 bytes;
        memcpy(&bytes, element, sizeof(bytes));
        device::store16_once(to + column, bytes);
      }
    });
  });
}

// ---- Class weights, where smoothing needs those of all columns

FK_HOST_DEVICE inline bool stages_weights(const ClassTask& task) {
  return task.wants_cross_entropy && task.label_smoothing != 0 && task.weight.data != nullptr;
}

// In shared memory, from column `first` on; null where all are 1.
template <typename Real>
struct StagedWeights {
  const Real* staged;
  int first;

  FK_DEVICE Real operator[](int column) const { return staged == nullptr ? Real(1) : staged[column - first]; }
};

// All threads of a block come; `memory` has room for `count`.
template <typename Real>
FK_DEVICE StagedWeights<Real> stage_weights(const ClassTask& task, const ClassSamples& samples, int first,
                                                      int count, Real* memory) {
  if (!stages_weights(task)) {
    return {nullptr, 0};
  }
  device::barrier();  // what was staged before has been read
  for (int i = device::thread(); i < count && first + i < task.classes; i += device::threads()) {
    memory[i] = class_weight_of<Real>(task, samples, first + i);
  }
  device::barrier();
  return {memory, first};
}

// The same in all threads of the block.
template <typename Real>
FK_DEVICE Real sum_of_class_weights(const ClassTask& task, const ClassSamples& samples) {
  double sum = 0;
  for (int label = device::thread(); label < task.classes; label += device::threads()) {
    sum += class_weight_of<Real>(task, samples, label);
  }
  return static_cast<Real>(block_sum(sum));
}

// ---- Softmax

// What exponents are shifted by: 0 in a row of -inf, whose exponentials then are zeros, not NaN.
template <typename Real>
FK_DEVICE Real finite_top(Real top) {
  return top == -kInfinity<Real> ? Real(0) : top;
}

// A sum of exponentials relative to `from`, relative to `to`. Nothing stays nothing, however far apart they are.
template <typename Real>
FK_DEVICE Real rescaled(Real total, Real from, Real to) {
  return total == 0 ? total : total * std::exp(finite_top(from) - finite_top(to));
}

template <typename Real, int kHeld>
FK_DEVICE Real largest_held(const Real (&z)[kHeld]) {
  Real top = z[0];
#pragma unroll
  for (int e = 1; e < kHeld; ++e) {
    top = z[e] > top || top != top ? z[e] : top;
  }
  return top;
}

// Exponentials in place of logits; their sum over what this thread holds.
template <typename Real, int kHeld>
FK_DEVICE Real to_exps(Real shift, Real (&z)[kHeld]) {
  Real total = 0;
#pragma unroll
  for (int e = 0; e < kHeld; ++e) {
    z[e] = std::exp(z[e] - shift);
    total += z[e];
  }
  return total;
}

// The largest logit of a row, or rather what its exponentials are relative to, and their sum.
template <typename Real>
struct RowSums {
  Real top;
  Real total;
};

// Of a whole row, whose logits become exponentials.
template <typename Layout>
FK_DEVICE RowSums<typename Layout::Real> softmax_sums(typename Layout::Real (&z)[Layout::kHeld]) {
  const auto top = finite_top(Layout::Members::max(largest_held(z)));
  const auto total = to_exps(top, z);
  return {top, Layout::Members::sum(total)};
}

}  // namespace fairkernels
