// The symmetry penalty summed over all unordered pairs of classes, and its gradient. Bound by memory: one read of an
// entry, 4 bytes in fp32, and of the gradient one write; about 8 operations an entry. Floor: the read, of the gradient the
// copy. C_ij and C_ji lie far apart, so both are read along the memory and meet in shared memory.
// Up to 128 classes, 64 in fp64, a block has a matrix for itself: one launch. Beyond, a block has a tile and its mirror
// image: the forward leaves sums in double that a second launch adds in order, the backward takes one launch. Where
// presence has to be found in the rows, beyond, one launch and one read more.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/problems.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared_tile.cuh"
#include "cuda/symmetry_gap.h"
#include "support/pair_penalty.h"

namespace fairkernels {

constexpr int kWholeThreads = 512;
constexpr int kTileThreads = 256;
constexpr int kTotalThreads = 512;
constexpr int kRowSumThreads = 256;
constexpr int kColumnsInFlight = 8;
constexpr int kLoadsInFlight = 16;
constexpr int kRowsPerBlock = kRowSumThreads / device::kWarp;

// Doubles take twice the shared memory: the most that every GPU has is 99 KiB.
template <typename Real>
constexpr int kMostWhole = sizeof(Real) == 8 ? 64 : 128;

template <typename Real>
constexpr int kRateTile = sizeof(Real) == 8 ? 32 : 64;

inline int64_t gap_tiles(int64_t classes, int64_t tile) {
  return (classes + tile - 1) / tile;
}

// Of a matrix; some have no tile, see tile_of.
template <typename Real>
int64_t gap_parts(int64_t classes) {
  const int64_t tiles = gap_tiles(classes, kRateTile<Real>);
  return classes <= kMostWhole<Real> ? 1 : (tiles + 1) / 2 * (tiles + 1);
}

// ---- Presence

FK_DEVICE bool is_counted(const SymmetryGapTask& task, int64_t problem, int64_t number) {
  return task.counts == nullptr ||
         element_at<double>(task.counts, task.counts_dtype,
                            offset_of(task.counts_at, problem) + number * task.count_stride) != 0;
}

// What the sum over the pairs is multiplied by; the same in all threads.
FK_DEVICE double gap_scale(const SymmetryGapTask& task, int64_t problem) {
  if (!task.mean || task.counts == nullptr) {
    return pair_scale(task.mean, static_cast<double>(task.classes));
  }
  double present = 0;
  for (int64_t i = device::thread(); i < task.classes; i += device::threads()) {
    present += is_counted(task, problem, i) ? 1 : 0;
  }
  return pair_scale(true, block_sum(present));
}

template <typename Real>
FK_DEVICE Real upstream_of(const SymmetryGapTask& task, int64_t problem, double scale) {
  return static_cast<Real>(element_at<double>(task.grad, task.dtype, offset_of(task.grad_at, problem)) * scale);
}

// Without counts a class is present if its row sum is not 0; NaN is not 0.
template <typename T>
FK_KERNEL(kRowSumThreads) symmetry_gap_row_sums(FK_CONSTANT(SymmetryGapTask) task) {
  using Real = Accumulator<T>;
  const int64_t blocks = (task.classes + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t problem = device::block() / blocks;
  const int64_t row = device::block() % blocks * kRowsPerBlock + device::thread() / device::kWarp;
  if (row >= task.classes) {
    return;
  }
  const int lane = device::thread() % device::kWarp;
  const T* from = static_cast<const T*>(task.confusion) + offset_of(task.confusion_at, problem) + row * task.row_stride;
  Real sum[kColumnsInFlight] = {};
  for (int64_t first = lane; first < task.classes; first += kColumnsInFlight * device::kWarp) {
#pragma unroll
    for (int k = 0; k < kColumnsInFlight; ++k) {
      const int64_t column = first + k * device::kWarp;
      sum[k] += column < task.classes ? widen(from[column * task.column_stride]) : Real(0);
    }
  }
#pragma unroll
  for (int k = 1; k < kColumnsInFlight; ++k) {
    sum[0] += sum[k];
  }
  const Real total = warp_sum(sum[0]);
  if (lane == 0) {
    static_cast<Real*>(task.row_sums)[problem * task.classes + row] = total;
  }
}

// ---- Pairs

// Calls function(i, j) once for each pair of n classes: those with a distance of 1 around a circle, then those with 2, so
// that all lanes have one.
template <typename Function>
FK_DEVICE void for_each_pair(int n, const Function& function) {
  const int pairs = n * (n - 1) / 2;
  for (int p = device::thread(); p < pairs; p += device::threads()) {
    const int distance = p / n;
    const int i = p - distance * n;
    const int j = i + distance + 1;
    function(i, j < n ? j : j - n);
  }
}

// The same for a tile and its mirror image.
template <typename Function>
FK_DEVICE void for_each_entry(int rows, int columns, const Function& function) {
  const int warps = device::threads() / device::kWarp;
  for (int i = device::thread() / device::kWarp; i < rows; i += warps) {
    for (int j = device::thread() % device::kWarp; j < columns; j += device::kWarp) {
      function(i, j);
    }
  }
}

// Leaves `scale` times the derivatives in place of the rates.
template <typename Real>
FK_DEVICE void slopes_in_place(Real& forward, Real& backward, Real eps, bool active, Real scale) {
  const PairPenalty<Real> pair = pair_penalty(forward, backward, eps);
  forward = active ? scale * pair.by_forward : Real(0);
  backward = active ? scale * pair.by_backward : Real(0);
}

// ---- A matrix of one block

// An even row, so that neighbouring pairs lie in different banks; twice an odd number, so that columns nearly do.
FK_HOST_DEVICE inline int whole_pitch(int classes) {
  return (classes + 1) / 4 * 4 + 2;
}

template <typename Real>
size_t whole_bytes(int64_t classes) {
  return (classes * whole_pitch(static_cast<int>(classes)) + classes) * sizeof(Real);
}

inline int whole_threads(int64_t classes) {
  const int64_t threads = (classes * classes / 8 + device::kWarp - 1) / device::kWarp * device::kWarp;
  return threads < device::kWarp ? device::kWarp : threads > kWholeThreads ? kWholeThreads : static_cast<int>(threads);
}

// A matrix in shared memory, and behind it 1 for the classes that are present.
template <typename T>
struct WholeMatrix {
  using Real = Accumulator<T>;

  FK_DEVICE explicit WholeMatrix(const SymmetryGapTask& task)
      : classes(static_cast<int>(task.classes)),
        rates{device::shared_memory<Real>(), classes, classes, whole_pitch(classes)},
        present(rates.data + classes * rates.pitch) {
    const T* from = static_cast<const T*>(task.confusion) + offset_of(task.confusion_at, device::block());
    load_tile<kLoadsInFlight>(from, task.row_stride, task.column_stride, rates);
    device::barrier();
    const int warps = device::threads() / device::kWarp;
    const int lane = device::thread() % device::kWarp;
    for (int i = device::thread() / device::kWarp; i < classes; i += warps) {
      bool counted = is_counted(task, device::block(), i);
      if (task.by_row) {
        Real sum = 0;
        for (int j = lane; j < classes; j += device::kWarp) {
          sum += rates(i, j);
        }
        counted = warp_sum(sum) != 0;
      }
      if (lane == 0) {
        present[i] = counted ? 1 : 0;
      }
    }
    device::barrier();
  }

  FK_DEVICE bool active(int i, int j) const { return present[i] * present[j] != 0; }

  FK_DEVICE double scale(bool mean) const {
    double count = 0;
    for (int i = device::thread(); mean && i < classes; i += device::threads()) {
      count += present[i];
    }
    return pair_scale(mean, mean ? block_sum(count) : 0);
  }

  const int classes;
  const SharedTile<Real> rates;
  Real* const present;
};

template <typename T>
FK_KERNEL(kWholeThreads) symmetry_gap_whole(FK_CONSTANT(SymmetryGapTask) task) {
  using Real = Accumulator<T>;
  const WholeMatrix<T> matrix(task);
  const Real eps = least_eps<Real>(task.eps);
  Real sum = 0;
  for_each_pair(matrix.classes, [&](int i, int j) {
    const Real penalty = pair_penalty(matrix.rates(i, j), matrix.rates(j, i), eps).value;
    sum += matrix.active(i, j) ? penalty : Real(0);
  });
  const double total = block_sum(static_cast<double>(sum)) * matrix.scale(task.mean);
  if (device::thread() == 0) {
    static_cast<T*>(task.out)[device::block()] = narrow(total, T{});
  }
}

template <typename T>
FK_KERNEL(kWholeThreads) symmetry_gap_whole_slopes(FK_CONSTANT(SymmetryGapTask) task) {
  using Real = Accumulator<T>;
  const WholeMatrix<T> matrix(task);
  const Real eps = least_eps<Real>(task.eps);
  const Real scale = upstream_of<Real>(task, device::block(), matrix.scale(task.mean));
  for_each_pair(matrix.classes, [&](int i, int j) {
    slopes_in_place(matrix.rates(i, j), matrix.rates(j, i), eps, matrix.active(i, j), scale);
  });
  for (int i = device::thread(); i < matrix.classes; i += device::threads()) {
    matrix.rates(i, i) = 0;
  }
  device::barrier();
  store_tile(matrix.rates, static_cast<T*>(task.out) + device::block() * task.classes * task.classes, task.classes);
}

// ---- A matrix of many tiles

// Row and column, row <= column, of a tile of the upper triangle; row -1 where there is none. A row of tiles and the one
// as far from the other end have tiles + 1 of them together.
struct TileOf {
  int64_t row;
  int64_t column;
};

FK_HOST_DEVICE inline TileOf tile_of(int64_t part, int64_t tiles) {
  const int64_t pair = part / (tiles + 1);
  const int64_t place = part - pair * (tiles + 1);
  const int64_t other = tiles - 1 - pair;
  if (place < tiles - pair) {
    return {pair, pair + place};
  }
  return {other > pair ? other : -1, other + place - (tiles - pair)};
}

// A tile and its mirror image, which of one on the diagonal is itself, in shared memory.
template <typename T>
struct MirroredTiles {
  using Real = Accumulator<T>;
  static constexpr int kTile = kRateTile<Real>;
  static constexpr int kPitch = kTile + 1;  // rows and columns lie in different banks

  struct Shared {
    Real own[kTile * kPitch];
    Real mirror[kTile * kPitch];
    bool in_row[kTile];
    bool in_column[kTile];
  };

  FK_DEVICE MirroredTiles(const SymmetryGapTask& task, int64_t problem_number, TileOf tile, Shared& memory)
      : problem(problem_number),
        first_row(tile.row * kTile),
        first_column(tile.column * kTile),
        own{memory.own, length(task, first_row), length(task, first_column), kPitch},
        mirror{diagonal() ? memory.own : memory.mirror, own.columns, own.rows, kPitch},
        in_row(memory.in_row),
        in_column(memory.in_column) {
    const T* from = static_cast<const T*>(task.confusion) + offset_of(task.confusion_at, problem);
    load_tile<kLoadsInFlight>(from + first_row * task.row_stride + first_column * task.column_stride, task.row_stride,
               task.column_stride, own);
    if (!diagonal()) {
      load_tile<kLoadsInFlight>(from + first_column * task.row_stride + first_row * task.column_stride, task.row_stride,
                 task.column_stride, mirror);
    }
    for (int at = device::thread(); at < kTile; at += device::threads()) {
      in_row[at] = at < own.rows && is_counted(task, problem, first_row + at);
      in_column[at] = at < own.columns && is_counted(task, problem, first_column + at);
    }
    device::barrier();
  }

  FK_DEVICE static int length(const SymmetryGapTask& task, int64_t first) {
    const int64_t left = task.classes - first;
    return left < kTile ? static_cast<int>(left) : kTile;
  }

  FK_DEVICE bool diagonal() const { return first_row == first_column; }

  // Calls function(C_ij, C_ji, whether the pair is active).
  template <typename Function>
  FK_DEVICE void for_each(const Function& function) const {
    const auto visit = [&](int i, int j) { function(own(i, j), mirror(j, i), in_row[i] && in_column[j]); };
    if (diagonal()) {
      for_each_pair(own.rows, visit);
    } else {
      for_each_entry(own.rows, own.columns, visit);
    }
  }

  const int64_t problem;
  const int64_t first_row;
  const int64_t first_column;
  const SharedTile<Real> own;
  const SharedTile<Real> mirror;
  bool* const in_row;
  bool* const in_column;
};

template <typename T>
FK_KERNEL(kTileThreads) symmetry_gap_tiles(FK_CONSTANT(SymmetryGapTask) task, int64_t tiles, int64_t parts) {
  using Real = Accumulator<T>;
  using Shared = typename MirroredTiles<T>::Shared;
  FK_SHARED(Shared, memory);
  const TileOf tile = tile_of(device::block() % parts, tiles);
  Real sum = 0;
  if (tile.row >= 0) {
    const Real eps = least_eps<Real>(task.eps);
    const MirroredTiles<T> pair(task, device::block() / parts, tile, memory);
    pair.for_each([&](Real forward, Real backward, bool active) {
      const Real penalty = pair_penalty(forward, backward, eps).value;
      sum += active ? penalty : Real(0);
    });
  }
  const double total = block_sum(static_cast<double>(sum));
  if (device::thread() == 0) {
    task.sums[device::block()] = total;
  }
}

template <typename T>
FK_KERNEL(kTotalThreads) symmetry_gap_total(FK_CONSTANT(SymmetryGapTask) task, int64_t parts) {
  const double* sums = task.sums + device::block() * parts;
  double sum = 0;
  for (int64_t part = device::thread(); part < parts; part += kTotalThreads) {
    sum += sums[part];
  }
  const double total = block_sum(sum) * gap_scale(task, device::block());
  if (device::thread() == 0) {
    static_cast<T*>(task.out)[device::block()] = narrow(total, T{});
  }
}

template <typename T>
FK_KERNEL(kTileThreads) symmetry_gap_tile_slopes(FK_CONSTANT(SymmetryGapTask) task, int64_t tiles, int64_t parts) {
  using Real = Accumulator<T>;
  using Shared = typename MirroredTiles<T>::Shared;
  FK_SHARED(Shared, memory);
  const int64_t problem = device::block() / parts;
  const TileOf tile = tile_of(device::block() % parts, tiles);
  if (tile.row < 0) {
    return;
  }
  const Real scale = upstream_of<Real>(task, problem, gap_scale(task, problem));
  const Real eps = least_eps<Real>(task.eps);
  const MirroredTiles<T> pair(task, problem, tile, memory);
  pair.for_each([&](Real& forward, Real& backward, bool active) { slopes_in_place(forward, backward, eps, active, scale); });
  if (pair.diagonal()) {
    for (int i = device::thread(); i < pair.own.rows; i += kTileThreads) {
      pair.own(i, i) = 0;
    }
  }
  device::barrier();
  T* out = static_cast<T*>(task.out) + problem * task.classes * task.classes;
  store_tile(pair.own, out + pair.first_row * task.classes + pair.first_column, task.classes);
  if (!pair.diagonal()) {
    store_tile(pair.mirror, out + pair.first_column * task.classes + pair.first_row, task.classes);
  }
}

// ---- Launches

// The task with counts wherever some classes may be absent.
template <typename T>
int with_counts(SymmetryGapTask& task, void* stream) {
  if (!task.by_row) {
    return 0;
  }
  const int64_t blocks = task.problems * ((task.classes + kRowsPerBlock - 1) / kRowsPerBlock);
  const int error = device::launch(symmetry_gap_row_sums<T>, {blocks, kRowSumThreads}, stream, task);
  task.by_row = false;
  task.counts = task.row_sums;
  task.counts_dtype = sizeof(Accumulator<T>) == 8 ? Dtype::float64 : Dtype::float32;
  task.count_stride = 1;
  task.counts_at = {1, {task.problems}, {task.classes}};
  return error;
}

template <typename T>
device::Grid whole_grid(const SymmetryGapTask& task) {
  return {task.problems, whole_threads(task.classes), whole_bytes<Accumulator<T>>(task.classes)};
}

template <typename T>
int launch_symmetry_gap(SymmetryGapTask task, void* stream) {
  using Real = Accumulator<T>;
  const int64_t parts = gap_parts<Real>(task.classes);
  if (parts == 1) {
    return device::launch(symmetry_gap_whole<T>, whole_grid<T>(task), stream, task);
  }
  int error = with_counts<T>(task, stream);
  if (error == 0) {
    error = device::launch(symmetry_gap_tiles<T>, {task.problems * parts, kTileThreads}, stream, task,
                           gap_tiles(task.classes, kRateTile<Real>), parts);
  }
  return error != 0 ? error : device::launch(symmetry_gap_total<T>, {task.problems, kTotalThreads}, stream, task, parts);
}

template <typename T>
int launch_symmetry_gap_backward(SymmetryGapTask task, void* stream) {
  using Real = Accumulator<T>;
  const int64_t parts = gap_parts<Real>(task.classes);
  if (parts == 1) {
    return device::launch(symmetry_gap_whole_slopes<T>, whole_grid<T>(task), stream, task);
  }
  const int error = with_counts<T>(task, stream);
  return error != 0 ? error
                    : device::launch(symmetry_gap_tile_slopes<T>, {task.problems * parts, kTileThreads}, stream, task,
                                     gap_tiles(task.classes, kRateTile<Real>), parts);
}

}  // namespace fairkernels
