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

template <typename T>
struct ClassSamples {
  using Real = Accumulator<T>;

  const T* logits;
  const int64_t* labels;
  int64_t sample_weight;  // offsets
  int64_t weight;

  FK_DEVICE ClassSamples(const ClassTask& task, int64_t problem)
      : logits(static_cast<const T*>(task.logits.data) + offset_of(task.logits.at, problem)),
        labels(static_cast<const int64_t*>(task.labels.data) + offset_of(task.labels.at, problem)),
        sample_weight(task.sample_weight.data != nullptr ? offset_of(task.sample_weight.at, problem) : 0),
        weight(task.weight.data != nullptr ? offset_of(task.weight.at, problem) : 0) {}
};

// K for a sample that is ignored, 0 for a label that is no class: its weight says so.
template <typename T>
FK_DEVICE int class_of(const ClassTask& task, const ClassSamples<T>& samples, int64_t b) {
  const int64_t label = samples.labels[b * task.labels.stride];
  const bool known = label >= 0 && label < task.classes;
  return label == task.ignore_index ? task.classes : (known ? static_cast<int>(label) : 0);
}

// The weight of a sample that is not ignored; NaN if its label is no class, so that no result of its is a number.
template <typename T>
FK_DEVICE Accumulator<T> weight_of(const ClassTask& task, const ClassSamples<T>& samples, int64_t b) {
  using Real = Accumulator<T>;
  const int64_t label = samples.labels[b * task.labels.stride];
  if (label < 0 || label >= task.classes) {
    return kNan<Real>;
  }
  const ClassOperand& weights = task.sample_weight;
  return weights.data == nullptr ? Real(1)
                                 : element_at<Real>(weights.data, weights.dtype, samples.sample_weight + b * weights.stride);
}

template <typename T>
FK_DEVICE Accumulator<T> class_weight_of(const ClassTask& task, const ClassSamples<T>& samples, int label) {
  using Real = Accumulator<T>;
  return task.weight.data == nullptr
             ? Real(1)
             : element_at<Real>(task.weight.data, task.weight.dtype, samples.weight + label * task.weight.stride);
}

// ---- Teams

// Threads that hold a row together: some lanes of a warp, or a block of `kThreads` whole warps.
template <int kThreads>
struct Team {
  static constexpr int kSize = kThreads;

  static FK_DEVICE int rank() { return device::thread() % kThreads; }
  static FK_DEVICE int number() { return device::thread() / kThreads; }
  static FK_DEVICE int count() { return device::threads() / kThreads; }

  template <typename Real>
  static FK_DEVICE Real sum(Real value) {
    if constexpr (kThreads <= device::kWarp) {
      return lanes_sum(value, kThreads);
    } else {
      return block_sum(value);
    }
  }

  // A NaN is passed over.
  template <typename Real>
  static FK_DEVICE Real max(Real value) {
    if constexpr (kThreads <= device::kWarp) {
      return lanes_max(value, kThreads);
    } else {
      return block_max(value);
    }
  }
};

// How rows lie in the registers of their teams: each thread has kVectors times 16 bytes of the logits, or a piece of the
// row is held so.
template <typename T, int kThreads, int kHeldAtLeast>
struct RowLayout {
  using Type = T;
  using Real = Accumulator<T>;
  using Members = Team<kThreads>;
  static constexpr int kVectors = kHeldAtLeast < kVector<T> ? 1 : kHeldAtLeast / kVector<T>;
  static constexpr int kHeld = kVectors * kVector<T>;  // by a thread
  static constexpr int kStep = kThreads * kVector<T>;  // columns from one vector of a thread to the next
  static constexpr int kColumns = kVectors * kStep;    // of the row or piece
  static constexpr bool kBlock = kThreads > device::kWarp;
  static constexpr int kBlockThreads = kBlock ? kThreads : 256;
};

// 8 elements of a row in a thread, 4 in double: more would not leave a kernel the registers it needs. Rows of up to 64
// classes (32 in double) are held by 8 lanes, of up to 256 (128) by a warp, of up to 1,024 (512) by a small block, of up to
// 2,048 (1,024) by a large one; longer ones piece by piece.
template <typename T>
constexpr int kElements = std::is_same_v<T, double> ? 4 : 8;

template <typename T>
using ShortRow = RowLayout<T, 8, kElements<T>>;
template <typename T>
using WarpRow = RowLayout<T, device::kWarp, kElements<T>>;
template <typename T>
using BlockRow = RowLayout<T, 128, kElements<T>>;
template <typename T>
using LongRow = RowLayout<T, 256, kElements<T>>;

// Calls visit(e, column) for the columns of a row that a thread holds, its piece beginning at column `first`.
template <typename Layout, typename Visit>
FK_DEVICE void for_columns(int first, int classes, const Visit& visit) {
  constexpr int kWide = kVector<typename Layout::Type>;
#pragma unroll
  for (int i = 0; i < Layout::kVectors; ++i) {
    const int column = first + i * Layout::kStep + Layout::Members::rank() * kWide;
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      if (column + e < classes) {
        visit(i * kWide + e, column + e);
      }
    }
  }
}

// Whether vectors of a row lie on 16 bytes.
template <typename T>
FK_DEVICE bool is_wide(const T* row, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// The logits of a row from column `first` on, divided by the temperature; -inf beyond the classes.
template <typename Layout>
FK_DEVICE void load_logits(const ClassTask& task, const typename Layout::Type* row, int first,
                           typename Layout::Real (&z)[Layout::kHeld]) {
  using T = typename Layout::Type;
  using Real = typename Layout::Real;
  constexpr int kWide = kVector<T>;
  const int64_t stride = task.logits.stride;
  const bool wide = is_wide(row, stride);
  const int classes = task.classes;
  const bool heated = task.temperature != 1;
  const Real temperature = static_cast<Real>(task.temperature);
#pragma unroll
  for (int i = 0; i < Layout::kVectors; ++i) {
    const int column = first + i * Layout::kStep + Layout::Members::rank() * kWide;
    T element[kWide];
    if (wide && column + kWide <= classes) {
      const device::Bytes16 bytes = device::load16(row + column);
      memcpy(element, &bytes, sizeof(element));
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        z[i * kWide + e] = widen(element[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        const bool there = column + e < classes;
        z[i * kWide + e] = there ? widen(row[(column + e) * stride]) : -kInfinity<Real>;
      }
    }
    if (heated) {
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        z[i * kWide + e] = z[i * kWide + e] / temperature;
      }
    }
  }
}

template <typename T>
FK_DEVICE Accumulator<T> logit_at(const ClassTask& task, const T* row, int column) {
  const Accumulator<T> z = widen(row[column * task.logits.stride]);
  return task.temperature != 1 ? z / static_cast<Accumulator<T>>(task.temperature) : z;
}

// Writes a row, contiguous, from column `first` on.
template <typename Layout>
FK_DEVICE void store_row(const typename Layout::Real (&values)[Layout::kHeld], int first, int classes,
                         typename Layout::Type* row) {
  using T = typename Layout::Type;
  constexpr int kWide = kVector<T>;
  const bool wide = is_wide(row, 1);
#pragma unroll
  for (int i = 0; i < Layout::kVectors; ++i) {
    const int column = first + i * Layout::kStep + Layout::Members::rank() * kWide;
    T element[kWide];
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      element[e] = narrow(values[i * kWide + e], T{});
    }
    if (wide && column + kWide <= classes) {
      device::Bytes16 bytes;
      memcpy(&bytes, element, sizeof(bytes));
      device::store16_once(row + column, bytes);
    } else {
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        if (column + e < classes) {
          row[column + e] = element[e];
        }
      }
    }
  }
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
template <typename T>
FK_DEVICE StagedWeights<Accumulator<T>> stage_weights(const ClassTask& task, const ClassSamples<T>& samples, int first,
                                                      int count, Accumulator<T>* memory) {
  if (!stages_weights(task)) {
    return {nullptr, 0};
  }
  device::barrier();  // what was staged before has been read
  for (int i = device::thread(); i < count && first + i < task.classes; i += device::threads()) {
    memory[i] = class_weight_of(task, samples, first + i);
  }
  device::barrier();
  return {memory, first};
}

// The same in all threads of the block.
template <typename T>
FK_DEVICE Accumulator<T> sum_of_class_weights(const ClassTask& task, const ClassSamples<T>& samples) {
  double sum = 0;
  for (int label = device::thread(); label < task.classes; label += device::threads()) {
    sum += class_weight_of(task, samples, label);
  }
  return static_cast<Accumulator<T>>(block_sum(sum));
}

// ---- Softmax

// What exponents are shifted by: 0 in a row of -inf, whose exponentials then are zeros, not NaN.
template <typename Real>
FK_DEVICE Real finite_top(Real top) {
  return top == -kInfinity<Real> ? Real(0) : top;
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
