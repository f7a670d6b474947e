// The terms of few classes, whose sums by class lie in shared memory together.
// Bytes: one read of the logits and labels, the results are small; 12 operations and an exp for each logit. Floor: the
// read, and for up to some thousand samples the latency of a launch and a few barriers.
// One launch: a block for each problem up to 256 samples, beyond a cluster of up to 8 blocks, which read each other's
// sums in distributed shared memory, up to 8,192 samples. GPUs without clusters: a block up to 1,024 samples. More: one
// launch of up to 256 blocks, or 32 clusters, and one, a block for each problem, that adds their sums and makes the terms.
#pragma once

#include "cuda/class_surrogates.cuh"
#include "cuda/spectral_iteration.cuh"
#include "support/pair_penalty.h"

namespace fairkernels {

constexpr int kSmallThreads = 384;  // 168 registers each: in double 128 are too few
constexpr int kMostSmallClasses = 64;
constexpr int64_t kFewSamples = 1024;  // that one block adds up
constexpr int64_t kClusterSamples = 256;  // that one block of a cluster adds up, if the others are enough
constexpr int64_t kMostStretches = 256;
constexpr int64_t kSmallBytes = 92 << 10;  // of a block: sums, and the rates of the rows that are worked on together
constexpr int64_t kDeclaredBytes = 24 << 10;  // more than what the kernels declare

template <typename Real>
bool has_few_classes(const ClassTask& task) {
  return task.classes <= ShortRow<Real>::kColumns;
}

// How the samples of a problem are divided: among clusters of blocks, or single ones, and within a block into chunks, rows
// whose rates are kept.
struct SmallShape {
  int64_t groups;  // clusters of a problem
  int64_t cluster;  // blocks of each
  int64_t stretch;  // samples of a block
  int64_t chunk;    // a multiple of 32

  FK_HOST_DEVICE int64_t blocks() const { return groups * cluster; }
};

// Of a block there may be so many, with what the kernels declare.
inline int64_t most_small_bytes() {
  const int64_t there = static_cast<int64_t>(device::most_shared_memory()) - kDeclaredBytes;
  return there < kSmallBytes ? there : kSmallBytes;
}

inline SmallShape small_shape(const ClassTask& task, size_t real_bytes, int most_cluster) {
  SmallShape shape{1, 1, task.samples, 0};
  if (task.samples > (most_cluster > 1 ? kClusterSamples : kFewSamples)) {
    const int64_t wanted = (task.samples + kClusterSamples - 1) / kClusterSamples;
    shape.cluster = wanted < most_cluster ? wanted : most_cluster;
    if (most_cluster == 1 || task.samples > kFewSamples * most_cluster) {
      const int64_t groups = (wanted + shape.cluster - 1) / shape.cluster;
      const int64_t most = kMostStretches / shape.cluster;
      shape.groups = groups < most ? groups : most;
    }
    shape.stretch = (task.samples + shape.blocks() - 1) / shape.blocks();
  }
  const int64_t warp = device::kWarp;
  const int64_t kinds = has_charges(task) ? 2 : 1;
  const int64_t sums = kinds * (task.classes + 1) * static_cast<int64_t>(real_bytes);
  const int64_t row = sums + 4 + task.classes / 8 + 1;  // its key, and its bits in the masks
  const int64_t fits = (most_small_bytes() - 2 * task.classes * sums) / row / warp * warp;
  const int64_t all = (shape.stretch + warp - 1) / warp * warp;
  shape.chunk = all < fits ? all : (fits < warp ? warp : fits);
  return shape;
}

// Sums by class of each group, K rows of K rates and a weight, and the sum of the losses.
template <typename Real>
struct SmallWorkspace {
  double* losses;  // [problems, groups]
  Real* sums;      // [problems, groups, 1 or 2, K, K + 1], the second of charges

  FK_HOST_DEVICE SmallWorkspace(const ClassTask& task, const SmallShape& shape)
      : losses(static_cast<double*>(task.workspace)),
        sums(reinterpret_cast<Real*>(losses + task.problems * shape.groups)) {}

  static int64_t bytes(const ClassTask& task, const SmallShape& shape) {
    const int64_t reals = (has_charges(task) ? 2 : 1) * task.classes * (task.classes + 1);
    return shape.groups == 1 ? 0 : task.problems * shape.groups * (8 + reals * static_cast<int64_t>(sizeof(Real)));
  }
};

// What a block has in shared memory. A row of rates, or of sums of them, ends with the weight. Where there are charges,
// these lie beside: their rows behind those of the rates, their sums behind those of the rates.
template <typename Real>
struct SmallBlock {
  int classes;
  int pitch;
  int words;  // of a mask
  int kinds;  // 1, or 2 with charges
  int chunk;
  double* losses;     // the sum of this block's
  unsigned* present;  // [2], a bit for each class that occurs
  Real* sums;      // [kinds, K, pitch]
  Real* lost;      // [kinds, K, pitch], of the sums by rounding; later the matrix of the spectral term
  Real* rates;     // [kinds, chunk, pitch]
  int* key;        // [chunk]
  unsigned* mask;  // [K, words]: the rows of each class

  FK_DEVICE SmallBlock(const ClassTask& task, const SmallShape& shape)
      : classes(task.classes),
        pitch(classes + 1),
        words(static_cast<int>(shape.chunk) / device::kWarp),
        kinds(has_charges(task) ? 2 : 1),
        chunk(static_cast<int>(shape.chunk)) {
    losses = device::shared_memory<double>();
    present = reinterpret_cast<unsigned*>(losses + 1);
    sums = reinterpret_cast<Real*>(losses + 2);
    lost = sums + cells();
    rates = lost + cells();
    key = reinterpret_cast<int*>(rates + kinds * chunk * pitch);
    mask = reinterpret_cast<unsigned*>(key + chunk);
  }

  FK_DEVICE int cells() const { return kinds * classes * pitch; }

  static size_t bytes(const ClassTask& task, const SmallShape& shape) {
    const size_t classes = task.classes;
    const size_t reals = (has_charges(task) ? 2 : 1) * (classes + 1) * (2 * classes + shape.chunk);
    return 2 * sizeof(double) + reals * sizeof(Real) + 4 * shape.chunk + classes * (shape.chunk / 8);
  }
};

// Classes that have a row in the coefficients, in increasing order: those that occur, or all where there is room.
struct SmallSlots {
  int used;
  int label[kMostSmallClasses];
};

// What this thread adds to the sum over k of w_k (top - z_k).
template <typename Layout>
FK_DEVICE typename Layout::Real weighted_drop(const ClassTask& task, const StagedWeights<typename Layout::Real>& weights,
                                              int first, typename Layout::Real top,
                                              const typename Layout::Real (&z)[Layout::kHeld]) {
  typename Layout::Real drop = 0;
  for_columns<Layout>(task, first, [&](int e, int column) { drop += weights[column] * (top - z[e]); });
  return drop;
}

// The loss of a sample by the logarithm of its row's sum, its drop from the largest logit, and all weighted drops.
template <typename Real>
FK_DEVICE Real row_loss(const ClassTask& task, Real log_total, Real own_drop, Real own_weight, Real all_weights,
                        Real all_drops) {
  const Real smoothing = static_cast<Real>(task.label_smoothing);
  const Real own = own_weight * (log_total + own_drop);
  if (smoothing == 0) {
    return own;
  }
  return (1 - smoothing) * own + smoothing / static_cast<Real>(task.classes) * (all_weights * log_total + all_drops);
}

// Puts the weighted rates of a chunk's rows into shared memory; returns the sum of this thread's losses.
template <typename Real>
FK_DEVICE double small_rates(const ClassTask& task, const ClassSamples& samples, int64_t first, int rows,
                             const StagedWeights<Real>& weights, Real all_weights, const SmallBlock<Real>& block) {
  using Layout = ShortRow<Real>;
  using Members = typename Layout::Members;
  double losses = 0;
  for (int turn = 0; turn < rows; turn += Members::count()) {
    const int r = turn + Members::number();
    const int64_t b = first + (r < rows ? r : 0);
    const int label = class_of(task, samples, b);
    const bool counts = r < rows && label != task.classes;
    const int64_t row = samples.logits + b * task.logits.row_stride;
    Real z[Layout::kHeld] = {};
    if (counts) {
      load_logits<Layout>(task, row, 0, z);
    }
    Real all_drops = 0;
    const Real top = finite_top(Members::max(largest_held(z)));
    if (task.wants_cross_entropy && task.label_smoothing != 0) {
      all_drops = Members::sum(weighted_drop<Layout>(task, weights, 0, top, z));
    }
    const Real own = counts ? logit_at<Real>(task, row, label) : Real(0);
    Rival<Real> rival{};
    Real charge[Layout::kHeld];
    if (has_charges(task)) {
      if (task.surrogate == Surrogate::kl) {
        rival = find_rival<Layout, false>(task, row, label, own, z);
      }
#pragma unroll
      for (int e = 0; e < Layout::kHeld; ++e) {
        charge[e] = z[e];
      }
    }
    const Real total = Members::sum(to_exps(top, z));
    if (!counts) {
      continue;
    }
    const Real weight = weight_of<Real>(task, samples, b);
    const Real factor = weight / total;
    for_columns<Layout>(task, 0, [&](int e, int column) { block.rates[r * block.pitch + column] = z[e] * factor; });
    if (has_charges(task)) {
      to_charges<Layout>(task, charge_row(label, own, top, total, rival), 0, z, charge);
      Real* charges = block.rates + (block.chunk + r) * block.pitch;
      for_columns<Layout>(task, 0, [&](int e, int column) { charges[column] = charge[e] * weight; });
    }
    if (Members::rank() == 0) {
      block.rates[r * block.pitch + block.classes] = weight;
      if (has_charges(task)) {
        block.rates[(block.chunk + r) * block.pitch + block.classes] = weight;
      }
      if (task.wants_cross_entropy) {
        losses += weight * row_loss(task, std::log(total), top - own, class_weight_of<Real>(task, samples, label), all_weights,
                                    all_drops);
      }
    }
  }
  return losses;
}

// Which rows each class has, by votes of the warps.
template <typename Real>
FK_DEVICE void small_masks(const SmallBlock<Real>& block) {
  const int lane = device::thread() % device::kWarp;
  const int warp = device::thread() / device::kWarp;
  for (int at = warp; at < block.classes * block.words; at += kSmallThreads / device::kWarp) {
    const int label = at / block.words;
    const unsigned rows = device::vote(block.key[(at - label * block.words) * device::kWarp + lane] == label);
    if (lane == 0) {
      block.mask[at] = rows;
      device::set_bits(block.present + label / device::kWarp, rows != 0 ? 1u << label % device::kWarp : 0);
    }
  }
}

// Adds the chunk's rows to the sums of their classes, each cell's in their order.
template <typename Real>
FK_DEVICE void add_chunk(const SmallBlock<Real>& block) {
  for (int cell = device::thread(); cell < block.cells(); cell += kSmallThreads) {
    const int row = cell / block.pitch;
    const int kind = row / block.classes;
    const int label = row - kind * block.classes;
    const Real* rates = block.rates + kind * block.chunk * block.pitch + (cell - row * block.pitch);
    Real sum = block.sums[cell];
    Real lost = block.lost[cell];
    for (int word = 0; word < block.words; ++word) {
      unsigned rows = block.mask[label * block.words + word];
      while (rows != 0) {
        const int r = word * device::kWarp + device::bits_set((rows & -rows) - 1);
        rows &= rows - 1;
        add_exactly(rates[r * block.pitch], sum, lost);
      }
    }
    block.sums[cell] = sum;
    block.lost[cell] = lost;
  }
}

// Samples [begin, end); returns the sum of this thread's losses.
template <typename Real>
FK_DEVICE double add_samples(const ClassTask& task, const ClassSamples& samples, const SmallShape& shape, int64_t begin,
                             int64_t end, const SmallBlock<Real>& block) {
  for (int cell = device::thread(); cell < block.cells(); cell += kSmallThreads) {
    block.sums[cell] = 0;
    block.lost[cell] = 0;
  }
  if (device::thread() < 2) {
    block.present[device::thread()] = 0;
  }
  using Weights = Real[kMostSmallClasses];
  FK_SHARED(Weights, staged);
  const StagedWeights<Real> weights = stage_weights(task, samples, 0, kMostSmallClasses, staged);
  Real all_weights = 0;
  if (task.wants_cross_entropy && task.label_smoothing != 0) {
    all_weights = sum_of_class_weights<Real>(task, samples);
  }
  double losses = 0;
  for (int64_t first = begin; first < end; first += shape.chunk) {
    const int rows = static_cast<int>(end - first < shape.chunk ? end - first : shape.chunk);
    device::barrier();  // what was there before has been read
    for (int r = device::thread(); r < static_cast<int>(shape.chunk); r += kSmallThreads) {
      block.key[r] = r < rows ? class_of(task, samples, first + r) : block.classes;
    }
    losses += small_rates(task, samples, first, rows, weights, all_weights, block);
    device::barrier();
    small_masks(block);
    device::barrier();
    add_chunk(block);
  }
  device::barrier();
  return losses;
}

// The classes that occur, or all.
template <typename Real>
FK_DEVICE void find_slots(const SmallBlock<Real>& block, bool direct, SmallSlots& slots) {
  if (device::thread() == 0) {
    slots.used = 0;
    for (int label = 0; label < block.classes; ++label) {
      if (direct || (block.present[label / device::kWarp] >> label % device::kWarp & 1u) != 0) {
        slots.label[slots.used++] = label;
      }
    }
  }
  device::barrier();
}

template <typename Real>
FK_DEVICE void put(void* to, int64_t at, Real value) {
  if (to != nullptr) {
    static_cast<Real*>(to)[at] = value;
  }
}

template <typename Real>
FK_DEVICE void put_rate(const ClassTask& task, int64_t at, Real rate) {
  if (task.confusion_as_logits) {
    store_element(task.confusion, task.logits.dtype, at, rate);
  } else {
    static_cast<Real*>(task.confusion)[at] = rate;
  }
}

template <typename Real>
FK_DEVICE void small_confusion(const ClassTask& task, int64_t problem, const SmallBlock<Real>& block) {
  const int classes = block.classes;
  for (int label = device::thread(); label < classes; label += kSmallThreads) {
    put(task.counts, problem * classes + label, block.sums[label * block.pitch + classes]);
  }
  if (task.confusion == nullptr) {
    return;
  }
  double all = 0;
  for (int label = 0; label < classes && task.normalize == Normalize::by_all; ++label) {
    all += block.sums[label * block.pitch + classes];
  }
  for (int cell = device::thread(); cell < classes * classes; cell += kSmallThreads) {
    const Real* row = block.sums + cell / classes * block.pitch;
    const Real sum = row[cell % classes];
    const Real by = task.normalize == Normalize::by_all ? static_cast<Real>(all) : row[classes];
    put_rate<Real>(task, problem * classes * classes + cell, task.normalize == Normalize::none ? sum : divided(sum, by));
  }
}

// The symmetry gap; its derivatives by the sums of each class replace these.
template <typename Real>
FK_DEVICE double small_symmetry(const ClassTask& task, const SmallBlock<Real>& block) {
  const int classes = block.classes;
  const Real eps = least_eps<Real>(task.eps);
  double active = static_cast<double>(classes);
  if (task.ignores_absent) {
    active = 0;
    for (int label = 0; label < classes; ++label) {
      active += block.sums[label * block.pitch + classes] != 0 ? 1 : 0;
    }
  }
  const double scale = pair_scale(task.mean_of_pairs, active);
  const Real factor = static_cast<Real>(task.sym_weight * scale);
  double penalties = 0;
  for (int cell = device::thread(); cell < classes * classes; cell += kSmallThreads) {
    const int i = cell / classes;
    const int j = cell - i * classes;
    if (i > j) {
      continue;
    }
    Real& forward = block.sums[i * block.pitch + j];
    Real& backward = block.sums[j * block.pitch + i];
    const Real row_count = block.sums[i * block.pitch + classes];
    const Real column_count = block.sums[j * block.pitch + classes];
    const Real rate = divided(forward, row_count);
    if (i == j) {
      penalties += 0 * rate;  // NaN is never lost, also where a class has no partner
      forward = 0;
      continue;
    }
    const PairPenalty<Real> pair = pair_penalty(rate, divided(backward, column_count), eps);
    const bool charged = !task.ignores_absent || (row_count != 0 && column_count != 0);
    penalties += charged ? pair.value : Real(0);
    forward = charged ? divided(factor * pair.by_forward, row_count) : Real(0);
    backward = charged ? divided(factor * pair.by_backward, column_count) : Real(0);
  }
  return scale * block_sum(penalties);
}

template <typename Real>
FK_DEVICE void small_coefficients(const ClassTask& task, int64_t problem, const SmallBlock<Real>& block,
                                  const SmallSlots& slots) {
  const int classes = block.classes;
  const int rows = task.samples < classes ? static_cast<int>(task.samples) : classes;
  const int width = task.ignores_absent ? rows : classes;
  Real* out = static_cast<Real*>(task.coefficients) + problem * rows * width;
  for (int cell = device::thread(); cell < rows * width; cell += kSmallThreads) {
    const int row = cell / width;
    const int column = cell - row * width;
    const bool used = row < slots.used && (!task.ignores_absent || column < slots.used);
    const int label = task.ignores_absent && used ? slots.label[column] : column;
    out[cell] = used ? block.sums[slots.label[row] * block.pitch + label] : Real(0);
  }
}

// The mean over samples without weights is one over nothing.
FK_DEVICE double mean_or_sum(const ClassTask& task, double losses, double divisor) {
  if (!task.mean_of_samples) {
    return losses;
  }
  return divisor != 0 ? losses / divisor : kNan<double>;
}

template <typename Real>
FK_DEVICE void put_values(const ClassTask& task, int64_t problem, double entropy, double gap, double sigma) {
  put(task.cross_entropy, problem, static_cast<Real>(entropy));
  put(task.symmetry, problem, static_cast<Real>(gap));
  put(task.spectral, problem, static_cast<Real>(sigma));
  double total = task.ce_weight != 0 ? task.ce_weight * entropy : 0;
  total += task.sym_weight != 0 ? task.sym_weight * gap : 0;
  total += task.spec_weight != 0 ? task.spec_weight * sigma : 0;
  if (task.total != nullptr) {
    store_element(task.total, task.logits.dtype, problem, total);
  }
}

template <typename Real>
FK_DEVICE Real row_factor_of(const ClassTask& task, int64_t problem, int label) {
  const ClassOperand& weights = task.class_weight;
  return weights.data == nullptr ? Real(1)
                                 : element_at<Real>(weights.data, weights.dtype,
                                                    offset_of(weights.at, problem) + label * weights.stride);
}

// Where the spectral iteration starts.
FK_DEVICE StartHint start_hint(const ClassTask& task, int64_t problem) {
  const ClassOperand& start = task.start;
  StartHint hint{nullptr, start.dtype, start.stride, false};
  if (start.data != nullptr) {
    hint.data = static_cast<const char*>(start.data) + offset_of(start.at, problem) * size_of(start.dtype);
  }
  return hint;
}

// The spectral norm of the surrogate's matrix, which is made where `lost` was; all of it before the sums are overwritten.
template <typename Real>
FK_DEVICE double small_spectral(const ClassTask& task, int64_t problem, const SmallBlock<Real>& block) {
  using Memory = SpectralMemory<Real>;
  FK_SHARED(Memory, memory);
  const int classes = block.classes;
  const Real* from = block.sums + (block.kinds - 1) * classes * block.pitch;
  const SharedTile<Real> matrix{block.lost, classes, classes, block.pitch};
  Real all = 0;
  for (int label = 0; label < classes && task.surrogate == Surrogate::kl_all; ++label) {
    all += block.sums[label * block.pitch + classes];
  }
  for (int cell = device::thread(); cell < classes * classes; cell += kSmallThreads) {
    const int label = cell / classes;
    const int column = cell - label * classes;
    const Real own = from[label * block.pitch + classes];
    const Real rate = divided(from[label * block.pitch + column], task.surrogate == Surrogate::kl_all ? all : own);
    const Real entry = own != 0 ? rate * row_factor_of<Real>(task, problem, label) : rate;
    matrix(label, column) = label == column ? 0 * entry : entry;  // a NaN is kept
  }
  device::barrier();
  Real* u = static_cast<Real*>(task.u) + problem * classes;
  Real* v = static_cast<Real*>(task.v) + problem * classes;
  const auto on_row = [&](int label, double entry) {
    const Real count = task.surrogate == Surrogate::kl_all ? all : from[label * block.pitch + classes];
    u[label] = task.divides_u ? divided(static_cast<Real>(entry), count) : static_cast<Real>(entry);
  };
  const auto on_column = [&](int label, double entry) { v[label] = static_cast<Real>(entry); };
  const StartHint hint = start_hint(task, problem);
  if (ShortRow<Real>::kColumns <= device::kWarp || classes <= device::kWarp) {
    return BlockIteration<1, Real>(matrix, task.iteration, memory).leading_pair(hint, false, on_row, on_column);
  }
  return BlockIteration<2, Real>(matrix, task.iteration, memory).leading_pair(hint, false, on_row, on_column);
}

// The terms, from the sums by class in shared memory.
template <typename Real>
FK_DEVICE void small_terms(const ClassTask& task, int64_t problem, const ClassSamples& samples, double losses,
                           const SmallBlock<Real>& block, const SmallSlots& slots) {
  small_confusion<Real>(task, problem, block);
  if (task.total == nullptr) {
    return;
  }
  double entropy = 0;
  double gap = 0;
  if (task.wants_cross_entropy) {
    double divisor = 0;
    for (int label = 0; label < block.classes; ++label) {
      const double count = block.sums[label * block.pitch + block.classes];
      divisor += count != 0 ? class_weight_of<Real>(task, samples, label) * count : 0;
    }
    entropy = mean_or_sum(task, block_sum(losses), divisor);
  }
  double sigma = 0;
  if (task.wants_spectral) {
    sigma = small_spectral<Real>(task, problem, block);
  }
  device::barrier();  // the sums have been read
  if (task.wants_symmetry) {
    gap = small_symmetry(task, block);
    device::barrier();
    small_coefficients(task, problem, block, slots);
  }
  if (device::thread() == 0) {
    put_values<Real>(task, problem, entropy, gap, sigma);
  }
  for (int label = device::thread(); label < block.classes && task.u != nullptr && !task.wants_spectral; label += kSmallThreads) {
    put(task.u, problem * block.classes + label, Real(0));
    put(task.v, problem * block.classes + label, Real(0));
  }
}

// Adds the sums of the blocks of a cluster, a share of them in each block, into those of its first. Returns the losses of
// all, in the first thread of that block.
template <typename Real>
FK_DEVICE double add_cluster(const SmallBlock<Real>& block, double losses, int rank, int blocks) {
  const double sum = block_sum(losses);
  if (device::thread() == 0) {
    *block.losses = sum;
  }
  device::cluster_barrier();
  Real* added = device::shared_of(0, block.lost);
  for (int cell = rank * kSmallThreads + device::thread(); cell < block.cells(); cell += blocks * kSmallThreads) {
    Real all = 0;
    Real lost = 0;
    for (int other = 0; other < blocks; ++other) {
      add_exactly(device::shared_of(other, block.sums)[cell], all, lost);
    }
    added[cell] = all;
  }
  double all_losses = 0;
  for (int other = 0; other < blocks && rank == 0 && device::thread() == 0; ++other) {
    all_losses += *device::shared_of(other, block.losses);
  }
  device::cluster_barrier();  // nobody reads another block's memory any more, which may be gone
  for (int cell = device::thread(); cell < block.cells() && rank == 0; cell += kSmallThreads) {
    block.sums[cell] = block.lost[cell];
  }
  device::barrier();
  return all_losses;
}

template <typename Real>
FK_KERNEL(kSmallThreads) class_terms_small(FK_CONSTANT(ClassTask) task, SmallShape shape) {
  FK_SHARED(SmallSlots, slots);
  const int64_t problem = device::block() / shape.blocks();
  const int64_t number = device::block() - problem * shape.blocks();
  const int rank = static_cast<int>(number % shape.cluster);
  const int64_t begin = number * shape.stretch;
  const int64_t end = begin + shape.stretch < task.samples ? begin + shape.stretch : task.samples;
  const ClassSamples samples(task, problem);
  const SmallBlock<Real> block(task, shape);
  double losses = add_samples(task, samples, shape, begin, end, block);
  if (shape.cluster > 1) {
    losses = add_cluster(block, losses, rank, static_cast<int>(shape.cluster));
    if (rank != 0) {
      return;
    }
  }
  if (shape.groups == 1) {
    find_slots(block, task.samples >= task.classes, slots);
    small_terms(task, problem, samples, losses, block, slots);
    return;
  }
  const SmallWorkspace<Real> workspace(task, shape);
  const int64_t group = device::block() / shape.cluster;
  const int cells = block.cells();
  for (int cell = device::thread(); cell < cells; cell += kSmallThreads) {
    workspace.sums[group * cells + cell] = block.sums[cell];
  }
  const double sum = block_sum(losses);
  if (device::thread() == 0) {
    workspace.losses[group] = sum;
  }
}

// Adds the groups, in their order.
template <typename Real>
FK_KERNEL(kSmallThreads) class_terms_combine(FK_CONSTANT(ClassTask) task, SmallShape shape) {
  FK_SHARED(SmallSlots, slots);
  const int64_t problem = device::block();
  const ClassSamples samples(task, problem);
  const SmallBlock<Real> block(task, SmallShape{});
  const SmallWorkspace<Real> workspace(task, shape);
  const int cells = block.cells();
  for (int cell = device::thread(); cell < cells; cell += kSmallThreads) {
    Real sum = 0;
    Real lost = 0;
    for (int64_t group = 0; group < shape.groups; ++group) {
      add_exactly(workspace.sums[(problem * shape.groups + group) * cells + cell], sum, lost);
    }
    block.sums[cell] = sum;
  }
  double losses = 0;
  for (int64_t group = device::thread(); group < shape.groups; group += kSmallThreads) {
    losses += workspace.losses[problem * shape.groups + group];
  }
  device::barrier();
  find_slots(block, true, slots);
  small_terms(task, problem, samples, losses, block, slots);
}

// On the GPU that is current.
template <typename Real>
SmallShape small_shape(const ClassTask& task) {
  int most = 1;
  if (task.samples > kClusterSamples) {
    const size_t bytes = static_cast<size_t>(most_small_bytes());
    most = device::most_cluster(class_terms_small<Real>, kSmallThreads, bytes);
  }
  return small_shape(task, sizeof(Real), most);
}

template <typename Real>
int launch_class_terms_small(const ClassTask& task, void* stream) {
  const SmallShape shape = small_shape<Real>(task);
  const device::Grid grid{task.problems * shape.blocks(), kSmallThreads, SmallBlock<Real>::bytes(task, shape),
                          static_cast<int>(shape.cluster)};
  const int error = device::launch(class_terms_small<Real>, grid, stream, task, shape);
  if (error != 0 || shape.groups == 1) {
    return error;
  }
  const device::Grid combine{task.problems, kSmallThreads, SmallBlock<Real>::bytes(task, SmallShape{})};
  return device::launch(class_terms_combine<Real>, combine, stream, task, shape);
}

}  // namespace fairkernels
