// The symmetry gap of rates that lie where the coefficients go, and its derivatives by the sums of each class, which
// replace them; then the terms. A block holds a square of pairs and its mirror image.
// Bound by memory: one read of the rates and one write of the coefficients, 8 bytes an entry in fp32, out of the cache up
// to some thousand classes; about 12 operations an entry. Floor: their copy. Two launches.
#pragma once

#include "cuda/class_sums.cuh"
#include "cuda/spectral_norm.h"

namespace fairkernels {

constexpr int kPairThreads = 256;
constexpr int kSide = device::kWarp;
constexpr int kSideRows = kPairThreads / kSide;

// Squares on and above the diagonal are numbered column by column.
struct Square {
  int64_t row;
  int64_t column;
};

FK_DEVICE Square square_of(int64_t number) {
  int64_t column = static_cast<int64_t>((std::sqrt(8 * static_cast<double>(number) + 1) - 1) / 2);
  while (column * (column + 1) / 2 > number) {
    --column;
  }
  while ((column + 1) * (column + 2) / 2 <= number) {
    ++column;
  }
  return {number - column * (column + 1) / 2, column};
}

// Of one problem: its rates, and which classes they belong to.
template <typename Real>
struct PairProblem {
  Real* rates;
  const Real* counts;
  ClassSet set;  // where there is one, columns are classes and rows those of the set; else columns are like rows
  int64_t used;         // rows that have a class, where there is a set
  Real eps;
  Real factor;

  // Where the rate of row i towards the class of row j lies; null if there is none.
  FK_DEVICE Real* at(const SumShape& shape, int64_t i, int64_t j) const {
    if (!set) {
      return i < shape.rows && j < shape.rows ? rates + i * shape.width + j : nullptr;
    }
    return i < used && j < used ? rates + i * shape.width + set.select(static_cast<int>(j)) : nullptr;
  }
};

template <typename Real>
struct PairTiles {
  Real forward[kSide][kSide + 1];
  Real backward[kSide][kSide + 1];
};

template <typename Real>
FK_DEVICE void load_square(const SumShape& shape, const PairProblem<Real>& problem, Square square,
                           Real (&tile)[kSide][kSide + 1]) {
  const int b = device::thread() % kSide;
  for (int a = device::thread() / kSide; a < kSide; a += kSideRows) {
    const Real* from = problem.at(shape, square.row * kSide + a, square.column * kSide + b);
    tile[a][b] = from != nullptr ? *from : Real(0);
  }
}

// Above the diagonal out of one tile, below it out of the other.
template <typename Real>
FK_DEVICE void store_square(const SumShape& shape, const PairProblem<Real>& problem, Square square,
                            const Real (&upper)[kSide][kSide + 1], const Real (&lower)[kSide][kSide + 1]) {
  const int b = device::thread() % kSide;
  for (int a = device::thread() / kSide; a < kSide; a += kSideRows) {
    const int64_t i = square.row * kSide + a;
    const int64_t j = square.column * kSide + b;
    Real* to = problem.at(shape, i, j);
    if (to != nullptr) {
      *to = i < j ? upper[a][b] : (i > j ? lower[a][b] : Real(0));
    }
  }
}

// The penalties of this thread's pairs; derivatives by the sums replace the rates in the tiles.
template <typename Real>
FK_DEVICE double charge_square(const ClassTask& task, const SumShape& shape, const PairProblem<Real>& problem, Square square,
                               PairTiles<Real>& tiles) {
  double penalties = 0;
  const int b = device::thread() % kSide;
  const int64_t j = square.column * kSide + b;
  const Real column_count = j < shape.rows ? problem.counts[j] : Real(0);
  for (int a = device::thread() / kSide; a < kSide; a += kSideRows) {
    const int64_t i = square.row * kSide + a;
    if (i == j) {
      penalties += 0 * tiles.forward[a][b];  // NaN is never lost, also where a class has no partner
    }
    if (i >= j || j >= shape.rows) {
      continue;
    }
    const Real row_count = problem.counts[i];
    const PairPenalty<Real> pair = pair_penalty(tiles.forward[a][b], tiles.backward[b][a], problem.eps);
    const bool charged = !task.ignores_absent || (row_count != 0 && column_count != 0);
    penalties += charged ? pair.value : Real(0);
    tiles.forward[a][b] = charged ? divided(problem.factor * pair.by_forward, row_count) : Real(0);
    tiles.backward[b][a] = charged ? divided(problem.factor * pair.by_backward, column_count) : Real(0);
  }
  return penalties;
}

// Pairs of a class that occurs with those that do not, whose rows are 0.
template <typename Real>
FK_DEVICE double charge_absent(const ClassTask& task, const SumShape& shape, const PairProblem<Real>& problem, int64_t row) {
  double penalties = 0;
  Real* rates = problem.rates + row * shape.width;
  for (int column = device::thread(); column < task.classes; column += kPairThreads) {
    if (row >= problem.used) {
      rates[column] = 0;
    } else if (!problem.set.has(column)) {
      const PairPenalty<Real> pair = pair_penalty(rates[column], Real(0), problem.eps);
      penalties += pair.value;
      rates[column] = divided(problem.factor * pair.by_forward, problem.counts[row]);
    }
  }
  return penalties;
}

template <typename Real>
FK_DEVICE double active_classes(const ClassTask& task, const SumShape& shape, const Real* counts) {
  if (!task.mean_of_pairs || !task.ignores_absent) {
    return static_cast<double>(task.classes);  // nobody asks, or all are
  }
  double active = 0;
  for (int64_t row = device::thread(); row < shape.rows; row += device::threads()) {
    active += counts[row] != 0 ? 1 : 0;
  }
  return block_sum(active);
}

template <typename Real>
FK_KERNEL(kPairThreads) class_pairs(FK_CONSTANT(ClassTask) task, SumShape shape) {
  FK_SHARED(PairTiles<Real>, tiles);
  const int64_t number = device::block() / shape.pair_blocks;
  const int64_t block = device::block() - number * shape.pair_blocks;
  const int64_t side = (shape.rows + kSide - 1) / kSide;
  const int64_t squares = side * (side + 1) / 2;
  const SumWorkspace<Real> workspace(task, shape);
  const bool by_class = shape.compact && !task.ignores_absent;
  unsigned* shared = device::shared_memory<unsigned>();
  const ClassSet set =
      by_class ? ClassSet(task, ClassSamples(task, number), number, workspace.sets, shared) : ClassSet();
  PairProblem<Real> problem{};
  problem.rates = static_cast<Real*>(task.coefficients) + number * shape.rows * shape.width;
  problem.counts = workspace.counts + number * shape.rows;
  problem.set = set;
  problem.used = by_class ? set.size() : shape.rows;
  problem.eps = least_eps<Real>(task.eps);
  problem.factor = static_cast<Real>(task.sym_weight * pair_scale(task.mean_of_pairs, active_classes(task, shape, problem.counts)));

  double penalties = 0;
  if (block < squares) {
    const Square square = square_of(block);
    const Square mirrored{square.column, square.row};
    load_square(shape, problem, square, tiles.forward);
    load_square(shape, problem, mirrored, tiles.backward);
    device::barrier();
    penalties = charge_square(task, shape, problem, square, tiles);
    device::barrier();
    store_square(shape, problem, square, tiles.forward, tiles.backward);
    if (square.row != square.column) {
      store_square(shape, problem, mirrored, tiles.forward, tiles.backward);
    }
  } else {
    penalties = charge_absent(task, shape, problem, block - squares);
  }
  penalties = block_sum(penalties);
  if (device::thread() == 0) {
    workspace.penalties[device::block()] = penalties;
  }
}

FK_DEVICE double sum_of(const double* numbers, int64_t n) {
  double sum = 0;
  for (int64_t i = device::thread(); i < n; i += device::threads()) {
    sum += numbers[i];
  }
  return block_sum(sum);
}

// The left singular vector by class: 0, or NaN, for those that do not occur.
template <typename Real>
FK_DEVICE void put_left(const ClassTask& task, const SumShape& shape, int64_t problem,
                        const SumWorkspace<Real>& workspace) {
  Real* u = static_cast<Real*>(task.u) + problem * task.classes;
  const bool compact = task.wants_spectral && shape.compact;
  unsigned* shared = device::shared_memory<unsigned>();
  const ClassSet set =
      compact ? ClassSet(task, ClassSamples(task, problem), problem, workspace.sets, shared) : ClassSet();
  double all = 0;
  if (task.wants_spectral && task.surrogate == Surrogate::kl_all) {
    all = sum_of(workspace.sizes + problem * shape.slots, shape.slots);
  }
  for (int label = device::thread(); label < task.classes; label += device::threads()) {
    Real entry = 0;
    if (!task.wants_spectral) {
      static_cast<Real*>(task.v)[problem * task.classes + label] = 0;
    } else if (compact && !set.has(label)) {
      entry = 0 * workspace.sigma[problem];
    } else {
      const int row = compact ? set.rank(label) : label;
      const Real by = task.surrogate == Surrogate::kl_all ? static_cast<Real>(all)
                                                          : static_cast<Real>(workspace.counts[problem * shape.rows + row]);
      entry = workspace.left[problem * shape.rows + row];
      entry = task.divides_u ? divided(entry, by) : entry;
    }
    u[label] = entry;
  }
}

// The terms from what the classes and squares add up to. A block has a problem.
template <typename Real>
FK_KERNEL(kPairThreads) class_terms_of_sums(FK_CONSTANT(ClassTask) task, SumShape shape) {
  const int64_t problem = device::block();
  const SumWorkspace<Real> workspace(task, shape);
  double entropy = 0;
  double gap = 0;
  if (task.wants_cross_entropy) {
    const double losses = sum_of(workspace.losses + problem * shape.slots, shape.slots);
    entropy = mean_or_sum(task, losses, sum_of(workspace.divisors + problem * shape.slots, shape.slots));
  }
  if (task.wants_symmetry) {
    const double active = active_classes(task, shape, workspace.counts + problem * shape.rows);
    gap = pair_scale(task.mean_of_pairs, active) * sum_of(workspace.penalties + problem * shape.pair_blocks, shape.pair_blocks);
  }
  const double sigma = task.wants_spectral ? static_cast<double>(workspace.sigma[problem]) : 0;
  if (device::thread() == 0) {
    put_values<Real>(task, problem, entropy, gap, sigma);
  }
  if (task.u != nullptr) {
    put_left<Real>(task, shape, problem, workspace);
  }
}

inline int64_t scratch_begin(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// What the spectral norm of the surrogates' matrices is asked for. Its scratch memory lies behind the workspace.
template <typename Real>
SpectralNormTask spectrum_of(const ClassTask& task, const SumShape& shape, const SumWorkspace<Real>& workspace) {
  SpectralNormTask norm{};
  norm.problems = task.problems;
  norm.rows = shape.rows;
  norm.columns = task.classes;
  norm.dtype = std::is_same_v<Real, double> ? Dtype::float64 : Dtype::float32;
  norm.matrix = workspace.matrix;
  norm.row_stride = task.classes;
  norm.column_stride = 1;
  norm.matrix_at = {1, {task.problems}, {shape.rows * task.classes}};
  norm.start = task.start.data;
  norm.start_dtype = task.start.dtype;
  norm.start_stride = task.start.stride;
  norm.start_at = task.start.at;
  norm.options = task.iteration;
  norm.sigma = workspace.sigma;
  norm.u = workspace.left;
  norm.v = task.v;
  norm.scratch = static_cast<unsigned char*>(task.workspace) + scratch_begin(workspace.bytes);
  return norm;
}

// Bytes of the workspace with the scratch memory of the spectral norm.
template <typename Real>
int64_t class_terms_large_bytes(const ClassTask& task) {
  const SumShape shape = sum_shape<Real>(task);
  const SumWorkspace<Real> workspace(task, shape);
  if (!task.wants_spectral) {
    return workspace.bytes;
  }
  const SpectralNormTask norm = spectrum_of(task, shape, workspace);
  return scratch_begin(workspace.bytes) + 8 * fk_spectral_norm_scratch(&norm);
}

template <typename Real>
int launch_class_terms_large(const ClassTask& task, void* stream) {
  const SumShape shape = sum_shape<Real>(task);
  int error = launch_ordered_sums<Real>(task, shape, stream);
  if (error == 0 && task.wants_symmetry) {
    const size_t bytes = shape.compact && !task.ignores_absent ? set_bytes_in_block(task) : 0;
    error = device::launch(class_pairs<Real>, {task.problems * shape.pair_blocks, kPairThreads, bytes}, stream, task, shape);
  }
  if (error == 0 && task.wants_spectral) {
    const SpectralNormTask norm = spectrum_of(task, shape, SumWorkspace<Real>(task, shape));
    error = fk_spectral_norm(&norm, stream);
  }
  if (error == 0 && task.total != nullptr) {
    const size_t bytes = task.wants_spectral && shape.compact ? set_bytes_in_block(task) : 0;
    error = device::launch(class_terms_of_sums<Real>, {task.problems, kPairThreads, bytes}, stream, task, shape);
  }
  return error;
}

}  // namespace fairkernels
