// What each class's samples add up to: rates and losses. A block owns a class, or a piece of its columns, and up to 128
// samples of it.
// Bytes: one read of the logits and labels, and of the rows that are written; 12 operations and an exp for each logit.
// Floor: the read. One launch up to 2,048 samples, of which a block finds those of its class by reading the labels.
// Beyond, four to put them in order (class_order.cuh), one, and where there are at least as many samples as classes one
// that adds the parts of classes that have several. Rows of more than 2,048 classes, 1,024 in double, are read twice, in
// one launch more. One more finds the classes that occur among more than 8,192, or of more than 2,048 samples that are
// fewer than classes.
#pragma once

#include "cuda/class_order.cuh"
#include "cuda/class_set.cuh"
#include "cuda/class_small.cuh"

namespace fairkernels {

constexpr int kPartThreads = 256;

// Top, sum and weighted drops of a row, and where "kl" charges it and how much.
constexpr int kRowNumbers = 5;

// Rows of a problem are classes, or where there are fewer samples than classes those that occur, in increasing order.
// A slot is a class, or a row if there is nothing to do for classes that have none.
struct SumShape {
  int64_t rows;
  int64_t width;  // of the coefficients
  int64_t slots;
  int64_t items;  // blocks of a problem, or so many times the pieces of a row: slots, or parts of classes
  int64_t pieces;
  int64_t pair_blocks;
  bool by_class;
  bool compact;
  bool ordered;
  bool divided;  // whether classes of many samples are divided into parts

  FK_HOST_DEVICE bool gathers(const ClassTask& task) const { return compact && task.ignores_absent; }
};

template <typename Real>
SumShape sum_shape(const ClassTask& task) {
  SumShape shape{};
  shape.compact = task.samples < task.classes;
  shape.rows = shape.compact ? task.samples : task.classes;
  shape.width = task.ignores_absent ? shape.rows : task.classes;
  shape.by_class = !shape.compact || task.confusion != nullptr;
  shape.slots = shape.by_class ? task.classes : shape.rows;
  shape.pieces = (task.classes + LongRow<Real>::kColumns - 1) / LongRow<Real>::kColumns;
  shape.ordered = task.samples > kMostScanned;
  shape.divided = shape.ordered && !shape.compact;
  shape.items = shape.divided ? most_parts(task) : shape.slots;
  const int64_t tiles = (shape.rows + device::kWarp - 1) / device::kWarp;
  shape.pair_blocks = tiles * (tiles + 1) / 2 + (shape.compact && !task.ignores_absent ? shape.rows : 0);
  return shape;
}

// Of rates, and of charges where there are any.
FK_HOST_DEVICE inline int sum_kinds(const ClassTask& task) {
  return has_charges(task) ? 2 : 1;
}

// Memory between the launches.
template <typename Real>
struct SumWorkspace : Workspace {
  double* losses;     // [problems, slots]
  double* divisors;   // [problems, slots]
  double* penalties;  // [problems, pair_blocks]
  double* part_numbers;  // [problems, most_divided, 2], weight and losses of parts of classes
  ClassOrderTables tables;
  Real* counts;   // [problems, rows]
  Real* matrix;   // [problems, rows, K], of the spectral term
  Real* sigma;    // [problems]
  Real* left;     // [problems, rows], its left singular vector
  double* sizes;  // [problems, slots], samples that count in a class
  Real* numbers;  // [problems, B, kRowNumbers]
  Real* part_sums;  // [problems, most_divided, 1 or 2, K], the second of charges
  unsigned* sets;   // of the classes that occur, where blocks do not make them

  FK_HOST_DEVICE SumWorkspace(const ClassTask& task, const SumShape& shape) : Workspace{task.workspace} {
    losses = take<double>(task.problems * shape.slots);
    divisors = take<double>(task.problems * shape.slots);
    penalties = take<double>(task.problems * shape.pair_blocks);
    sizes = take<double>(task.problems * shape.slots);
    const int64_t divided = shape.divided ? task.problems * most_divided(task) : 0;
    part_numbers = take<double>(2 * divided);
    const int64_t ordered = shape.ordered ? task.problems : 0;
    tables.weights = take<double>(ordered * order_chunks(task));
    tables.order = take<int64_t>(ordered * task.samples);
    tables.starts = take<int64_t>(ordered * (task.classes + 1));
    tables.parts = take<int64_t>(ordered * (task.classes + 1));
    counts = take<Real>(task.problems * shape.rows);
    const int64_t spectral = task.wants_spectral ? task.problems : 0;
    matrix = take<Real>(spectral * shape.rows * task.classes);
    sigma = take<Real>(spectral);
    left = take<Real>(spectral * shape.rows);
    numbers = take<Real>(shape.pieces > 1 ? task.problems * task.samples * kRowNumbers : 0);
    part_sums = take<Real>(divided * sum_kinds(task) * task.classes);
    tables.ranks = take<int32_t>(ordered * task.samples);
    tables.counts = take<int32_t>(ordered * order_chunks(task) * task.classes);
    sets = take<unsigned>(shape.compact ? words_of_sets(task) : 0);
  }
};

// Tops, sums and drops of rows that are held piece by piece. A block has a row.
template <typename Real>
FK_KERNEL(LongRow<Real>::kBlockThreads) class_row_numbers(FK_CONSTANT(ClassTask) task, SumShape shape) {
  using Layout = LongRow<Real>;
  using Members = typename Layout::Members;
  const int64_t problem = device::block() / task.samples;
  const int64_t b = device::block() - problem * task.samples;
  const ClassSamples samples(task, problem);
  if (class_of(task, samples, b) == task.classes) {
    return;
  }
  const int64_t row = samples.logits + b * task.logits.row_stride;
  Real z[Layout::kHeld];
  Real top = -kInfinity<Real>;
  Real total = 0;
  for (int first = 0; first < task.classes; first += Layout::kColumns) {
    load_logits<Layout>(task, row, first, z);
    const Real here = largest_held(z);
    const Real raised = here > top ? here : top;
    total = rescaled(total, top, raised) + to_exps(finite_top(raised), z);
    top = raised;
  }
  const Real highest = finite_top(Members::max(top));
  total = Members::sum(rescaled(total, top, highest));
  Real drops = 0;
  if (task.wants_cross_entropy && task.label_smoothing != 0) {
    for (int first = 0; first < task.classes; first += Layout::kColumns) {
      load_logits<Layout>(task, row, first, z);
      drops += weighted_drop<Layout>(
          task, stage_weights(task, samples, first, Layout::kColumns, device::shared_memory<Real>()), first, highest, z);
    }
    drops = Members::sum(drops);
  }
  Rival<Real> rival{};
  if (has_charges(task) && task.surrogate == Surrogate::kl) {
    const int label = class_of(task, samples, b);
    rival = find_rival<Layout, true>(task, row, label, logit_at<Real>(task, row, label), z);
  }
  if (device::thread() == 0) {
    Real* numbers = SumWorkspace<Real>(task, shape).numbers + device::block() * kRowNumbers;
    numbers[0] = highest;
    numbers[1] = total;
    numbers[2] = drops;
    numbers[3] = static_cast<Real>(rival.place);
    numbers[4] = rival.charge;
  }
}

// Calls work(b) for the samples of a class, or a part of it, whose turn it is for this team, in their order. Teams of a
// warp come to it together.
template <typename Layout, typename Work>
FK_DEVICE void for_samples_of(const ClassTask& task, const SumShape& shape, const ClassOrderTables& tables, int64_t problem,
                              int label, const ClassPart& part, const Work& work) {
  constexpr int kTeams = Layout::kTeams;
  const int team = Layout::Members::number();
  if (shape.ordered) {
    const int64_t* starts = tables.starts + problem * (task.classes + 1);
    const int64_t begin = starts[label] + (part.number - part.first) * kPartSamples;
    const bool is_last = part.number - part.first == part.parts - 1;
    const int64_t end = is_last ? starts[label + 1] : begin + kPartSamples;
    for (int64_t at = begin + team; at < end; at += kTeams) {
      work(tables.order[problem * task.samples + at]);
    }
    return;
  }
  using Found = unsigned[kMostScanned / device::kWarp];
  FK_SHARED(Found, found);
  const ClassSamples samples(task, problem);
  const int words = static_cast<int>((task.samples + device::kWarp - 1) / device::kWarp);
  for (int word = device::thread() / device::kWarp; word < words; word += device::threads() / device::kWarp) {
    const int64_t b = static_cast<int64_t>(word) * device::kWarp + device::thread() % device::kWarp;
    const unsigned own = device::vote(b < task.samples && class_of(task, samples, b) == label);
    if (device::thread() % device::kWarp == 0) {
      found[word] = own;
    }
  }
  device::barrier();
  int given = 0;  // teams that have a sample of this turn
  int own = 0;
  for (int word = 0; word < words; ++word) {
    for (unsigned left = found[word]; left != 0; left &= left - 1) {
      own = given == team ? word * device::kWarp + device::bits_set((left & -left) - 1) : own;
      if (++given == kTeams) {
        work(own);
        given = 0;
      }
    }
  }
  if (team < given) {
    work(own);
  }
}

// Sums over the samples of a class. A team's rates lie in its registers.
template <typename Layout, bool kCharges>
struct ClassSum {
  using Real = typename Layout::Real;
  static constexpr int kCharged = kCharges ? Layout::kHeld : 1;

  Real charges[kCharged] = {};
  Real lost_charges[kCharged] = {};
  Real rates[Layout::kHeld] = {};
  Real lost[Layout::kHeld] = {};
  double count = 0;
  double losses = 0;
};

template <typename Layout, bool kPieces, bool kCharges, typename Real>
FK_DEVICE void add_sample(const ClassTask& task, const ClassSamples& samples, int64_t b, int label, int first,
                          const StagedWeights<Real>& weights, Real all_weights, const Real* numbers,
                          ClassSum<Layout, kCharges>& sum) {
  using Members = typename Layout::Members;
  const int64_t row = samples.logits + b * task.logits.row_stride;
  const Real weight = weight_of<Real>(task, samples, b);
  Real z[Layout::kHeld];
  load_logits<Layout>(task, row, first, z);
  Real charge[ClassSum<Layout, kCharges>::kCharged] = {};
  Rival<Real> rival{};
  const Real own = logit_at<Real>(task, row, label);
  if constexpr (kCharges) {
    if (task.surrogate == Surrogate::kl && !kPieces) {
      rival = find_rival<Layout, false>(task, row, label, own, z);
    }
#pragma unroll
    for (int e = 0; e < Layout::kHeld; ++e) {
      charge[e] = z[e];
    }
  }
  Real top, total, drops = 0;
  if constexpr (kPieces) {
    top = numbers[b * kRowNumbers];
    total = numbers[b * kRowNumbers + 1];
    drops = numbers[b * kRowNumbers + 2];
    rival.place = static_cast<int>(numbers[b * kRowNumbers + 3]);
    rival.charge = numbers[b * kRowNumbers + 4];
    to_exps(top, z);
  } else {
    top = finite_top(Members::max(largest_held(z)));
    if (task.wants_cross_entropy && task.label_smoothing != 0) {
      drops = Members::sum(weighted_drop<Layout>(task, weights, first, top, z));
    }
    total = Members::sum(to_exps(top, z));
  }
  const Real factor = weight / total;
#pragma unroll
  for (int e = 0; e < Layout::kHeld; ++e) {
    add_exactly(z[e] * factor, sum.rates[e], sum.lost[e]);
  }
  if constexpr (kCharges) {
    to_charges<Layout>(task, charge_row(label, own, top, total, rival), first, z, charge);
    for_columns<Layout>(task, first, [&](int e, int) {
      add_exactly(charge[e] * weight, sum.charges[e], sum.lost_charges[e]);
    });
  }
  sum.count += weight;
  if (task.wants_cross_entropy) {
    const Real own_weight = class_weight_of<Real>(task, samples, label);
    sum.losses += weight * row_loss(task, std::log(total), top - own, own_weight, all_weights, drops);
  }
}

// Where the sums over a class go.
template <typename Real>
struct ClassPlace {
  int64_t problem;
  int label;      // `classes`: none has this row
  int64_t row;    // of the coefficients; none if there are no more rows
  ClassSet set;  // where there are fewer samples than classes
  double all;  // weights of all samples, for Normalize::by_all and "kl-all"
  int64_t part;  // where the sums of a part of a class wait for the others; -1: it has but one
};

// The sum of the weights of all samples of a problem.
template <typename Real>
FK_DEVICE double sum_of_samples(const ClassTask& task, const SumShape& shape, const ClassSamples& samples, int64_t problem) {
  double sum = 0;
  if (shape.ordered) {
    const int64_t chunks = order_chunks(task);
    const double* weights = SumWorkspace<Real>(task, shape).tables.weights + problem * chunks;
    for (int64_t chunk = device::thread(); chunk < chunks; chunk += device::threads()) {
      sum += weights[chunk];
    }
    return block_sum(sum);
  }
  for (int64_t b = device::thread(); b < task.samples; b += device::threads()) {
    sum += class_of(task, samples, b) < task.classes ? weight_of<Real>(task, samples, b) : 0;
  }
  return block_sum(sum);
}

template <typename Real>
FK_DEVICE void put_column(const ClassTask& task, const SumShape& shape, const ClassPlace<Real>& place, int column,
                          Real sum, Real charge, Real count) {
  const Real rate = divided(sum, count);
  if (task.wants_spectral && place.row < shape.rows) {
    const Real by = task.surrogate == Surrogate::kl_all ? static_cast<Real>(place.all) : count;
    Real entry = task.surrogate == Surrogate::soft ? rate : divided(charge, by);
    if (place.label < task.classes && count != 0) {
      entry *= row_factor_of<Real>(task, place.problem, place.label);
    }
    Real* matrix = SumWorkspace<Real>(task, shape).matrix;
    matrix[(place.problem * shape.rows + place.row) * task.classes + column] = column == place.label ? 0 * entry : entry;
  }
  if (task.confusion != nullptr && place.label < task.classes) {
    const Real by_all = divided(sum, static_cast<Real>(place.all));
    const Real handed = task.normalize == Normalize::none ? sum : (task.normalize == Normalize::by_all ? by_all : rate);
    put_rate<Real>(task, (place.problem * task.classes + place.label) * task.classes + column, handed);
  }
  if (!task.wants_symmetry || place.row >= shape.rows) {
    return;
  }
  Real* row = static_cast<Real*>(task.coefficients) + (place.problem * shape.rows + place.row) * shape.width;
  if (!shape.gathers(task)) {
    row[column] = column == place.label ? 0 * rate : rate;  // a NaN is kept for the sum
  } else if (place.set.has(column)) {
    row[place.set.rank(column)] = column == place.label ? 0 * rate : rate;
  }
}

// A column of a class, or of a part that waits for the others.
template <typename Real>
FK_DEVICE void put_sums(const ClassTask& task, const SumShape& shape, const ClassPlace<Real>& place, int column, Real sum,
                        Real charge, Real count) {
  if (place.part < 0) {
    put_column(task, shape, place, column, sum, charge, count);
    return;
  }
  const int64_t row = (place.problem * most_divided(task) + place.part) * sum_kinds(task);
  Real* sums = SumWorkspace<Real>(task, shape).part_sums + row * task.classes;
  sums[column] = sum;
  if (has_charges(task)) {
    sums[task.classes + column] = charge;
  }
}

// The weight of a class and the sum of its losses, or those of a part.
template <typename Real>
FK_DEVICE void put_numbers(const ClassTask& task, const SumShape& shape, const ClassSamples& samples,
                           const ClassPlace<Real>& place, int slot, double count, double losses) {
  const SumWorkspace<Real> workspace(task, shape);
  if (place.part >= 0) {
    double* numbers = workspace.part_numbers + 2 * (place.problem * most_divided(task) + place.part);
    numbers[0] = count;
    numbers[1] = losses;
    return;
  }
  if (place.label < task.classes) {
    put(task.counts, place.problem * task.classes + place.label, static_cast<Real>(count));
  }
  if (task.total != nullptr) {
    const int64_t at = place.problem * shape.slots + slot;
    workspace.losses[at] = losses;
    workspace.sizes[at] = count;
    workspace.divisors[at] = count != 0 ? class_weight_of<Real>(task, samples, place.label) * count : 0;
    if (place.row < shape.rows) {
      workspace.counts[place.problem * shape.rows + place.row] = static_cast<Real>(count);
    }
  }
}

// Columns of the coefficients that belong to no class.
template <typename Real>
FK_DEVICE void clear_rest(const ClassTask& task, const SumShape& shape, const ClassPlace<Real>& place) {
  if (!task.wants_symmetry || place.row >= shape.rows || !shape.gathers(task)) {
    return;
  }
  Real* row = static_cast<Real*>(task.coefficients) + (place.problem * shape.rows + place.row) * shape.width;
  for (int column = place.set.size() + device::thread(); column < shape.width; column += device::threads()) {
    row[column] = 0;
  }
}

template <typename Real>
FK_DEVICE ClassPlace<Real> place_of(const ClassTask& task, const SumShape& shape, int64_t problem, int slot,
                                 const ClassSet& set) {
  if (!shape.compact) {
    return {problem, slot, slot, set, 0, -1};
  }
  if (!shape.by_class) {
    return {problem, slot < set.size() ? set.select(slot) : task.classes, slot, set, 0, -1};
  }
  const int before = set.rank(slot);
  return {problem, slot, set.has(slot) ? before : set.size() + slot - before, set, 0, -1};
}

// Where the set of classes lies in shared memory, in words: behind the sums of the teams, or the weights.
template <typename Layout>
FK_HOST_DEVICE inline int64_t set_offset(const ClassTask& task) {
  const bool stages = stages_weights(task) && task.classes <= Layout::kColumns;  // not where rows are held in pieces
  const int64_t rows = Layout::kBlock ? (stages ? 1 : 0) : Layout::kTeams * sum_kinds(task);
  return rows * task.classes * static_cast<int64_t>(sizeof(typename Layout::Real) / 4);
}

// Adds up what the teams of a block have.
template <typename Layout, bool kCharges, typename Real>
FK_DEVICE void put_sums_of_teams(const ClassTask& task, const SumShape& shape, const ClassPlace<Real>& place,
                                 ClassSum<Layout, kCharges>& sum, Real* sums_of_teams) {
  using Members = typename Layout::Members;
  constexpr int kTeams = Layout::kTeams;
  using PerTeam = double[2][kTeams];
  FK_SHARED(PerTeam, numbers_of_teams);
  device::barrier();  // the weights have been read
  if (Members::rank() == 0) {
    numbers_of_teams[0][Members::number()] = sum.count;
    numbers_of_teams[1][Members::number()] = sum.losses;
  }
  for_columns<Layout>(task, 0, [&](int e, int column) {
    sums_of_teams[Members::number() * task.classes + column] = sum.rates[e];
    if constexpr (kCharges) {
      sums_of_teams[(kTeams + Members::number()) * task.classes + column] = sum.charges[e];
    }
  });
  device::barrier();
  sum.count = 0;
  sum.losses = 0;
  for (int team = 0; team < kTeams; ++team) {
    sum.count += numbers_of_teams[0][team];
    sum.losses += numbers_of_teams[1][team];
  }
  for (int column = device::thread(); column < task.classes; column += Layout::kBlockThreads) {
    Real rates = 0;
    Real lost = 0;
    for (int team = 0; team < kTeams; ++team) {
      add_exactly(sums_of_teams[team * task.classes + column], rates, lost);
    }
    Real charges = 0;
    lost = 0;
    for (int team = 0; team < kTeams && kCharges; ++team) {
      add_exactly(sums_of_teams[(kTeams + team) * task.classes + column], charges, lost);
    }
    put_sums(task, shape, place, column, rates, charges, static_cast<Real>(sum.count));
  }
}

template <typename Layout, bool kPieces, bool kCharges>
FK_CROWDED_KERNEL(Layout::kBlockThreads, (Layout::template blocks<kPieces, kCharges>()))
class_sums(FK_CONSTANT(ClassTask) task, SumShape shape) {
  using Real = typename Layout::Real;
  using Members = typename Layout::Members;
  Real* sums_of_teams = device::shared_memory<Real>();  // [kTeams, K]; the set behind it
  const int piece = static_cast<int>(device::block() % shape.pieces);
  const int64_t item = device::block() / shape.pieces % shape.items;
  const int64_t problem = device::block() / shape.pieces / shape.items;
  const int first = piece * Layout::kColumns;
  const ClassSamples samples(task, problem);
  const SumWorkspace<Real> workspace(task, shape);
  ClassPart part{static_cast<int>(item), item, item, 1};
  if (shape.divided) {
    part = class_part(task, workspace.tables, problem, item);
    if (part.parts == 0) {
      return;
    }
  }
  unsigned* shared = device::shared_memory<unsigned>() + set_offset<Layout>(task);
  const ClassSet set = shape.compact ? ClassSet(task, samples, problem, workspace.sets, shared) : ClassSet();
  ClassPlace<Real> place = place_of<Real>(task, shape, problem, part.label, set);
  place.part = part.parts > 1 ? part.place() : -1;
  if (needs_all(task)) {
    place.all = sum_of_samples<Real>(task, shape, samples, problem);
  }
  Real all_weights = 0;
  if (task.wants_cross_entropy && task.label_smoothing != 0) {
    all_weights = sum_of_class_weights<Real>(task, samples);
  }
  // The sums of the teams come there later.
  const StagedWeights<Real> weights =
      kPieces ? StagedWeights<Real>{} : stage_weights(task, samples, 0, task.classes, sums_of_teams);

  ClassSum<Layout, kCharges> sum;
  if (place.label < task.classes) {
    const Real* numbers = workspace.numbers + problem * task.samples * kRowNumbers;
    for_samples_of<Layout>(task, shape, workspace.tables, problem, place.label, part, [&](int64_t b) {
      add_sample<Layout, kPieces, kCharges>(task, samples, b, place.label, first, weights, all_weights, numbers, sum);
    });
  }
  if constexpr (!Layout::kBlock) {
    put_sums_of_teams(task, shape, place, sum, sums_of_teams);
  } else {
    for_columns<Layout>(task, first, [&](int e, int column) {
      put_sums(task, shape, place, column, sum.rates[e], kCharges ? sum.charges[kCharges ? e : 0] : Real(0),
               static_cast<Real>(sum.count));
    });
  }
  if (piece != 0) {
    return;
  }
  clear_rest(task, shape, place);
  if (device::thread() == 0) {
    put_numbers(task, shape, samples, place, part.label, sum.count, sum.losses);
  }
}

// Adds the parts of the classes that have several, in their order. A block has a class.
template <typename Real>
FK_KERNEL(kPartThreads) class_parts(FK_CONSTANT(ClassTask) task, SumShape shape) {
  const int64_t problem = device::block() / task.classes;
  const int label = static_cast<int>(device::block() - problem * task.classes);
  const SumWorkspace<Real> workspace(task, shape);
  const int64_t* parts = workspace.tables.parts + problem * (task.classes + 1) + label;
  const ClassPart part{label, parts[0], parts[0], parts[1] - parts[0]};
  if (part.parts == 1) {
    return;
  }
  const ClassSamples samples(task, problem);
  ClassPlace<Real> place{problem, label, label, ClassSet(), 0, -1};
  if (needs_all(task)) {
    place.all = sum_of_samples<Real>(task, shape, samples, problem);
  }
  const int64_t at = problem * most_divided(task) + part.place();
  double count = 0;
  double losses = 0;
  for (int64_t i = 0; i < part.parts; ++i) {
    count += workspace.part_numbers[2 * (at + i)];
    losses += workspace.part_numbers[2 * (at + i) + 1];
  }
  const int64_t pitch = sum_kinds(task) * static_cast<int64_t>(task.classes);
  for (int column = device::thread(); column < task.classes; column += kPartThreads) {
    const Real* sums = workspace.part_sums + at * pitch + column;
    Real rates = 0;
    Real lost = 0;
    Real charges = 0;
    Real lost_charges = 0;
    for (int64_t i = 0; i < part.parts; ++i) {
      add_exactly(sums[i * pitch], rates, lost);
      add_exactly(has_charges(task) ? sums[i * pitch + task.classes] : Real(0), charges, lost_charges);
    }
    put_column(task, shape, place, column, rates, charges, static_cast<Real>(count));
  }
  if (device::thread() == 0) {
    put_numbers(task, shape, samples, place, label, count, losses);
  }
}

template <typename Real>
int launch_class_sums(const ClassTask& task, const SumShape& shape, void* stream) {
  if (shape.pieces > 1) {
    const size_t bytes = stages_weights(task) ? LongRow<Real>::kColumns * sizeof(Real) : 0;
    const device::Grid grid{task.problems * task.samples, LongRow<Real>::kBlockThreads, bytes};
    if (const int error = device::launch(class_row_numbers<Real>, grid, stream, task, shape); error != 0) {
      return error;
    }
  }
  return with_layout<Real, 16>(task.classes, [&](auto layout, auto pieces) {
    using Layout = decltype(layout);
    const size_t set = shape.compact ? set_bytes_in_block(task) : 0;
    const size_t bytes = 4 * static_cast<size_t>(set_offset<Layout>(task)) + set;
    const device::Grid grid{task.problems * shape.items * shape.pieces, Layout::kBlockThreads, bytes};
    return has_charges(task) ? device::launch(class_sums<Layout, pieces.value, true>, grid, stream, task, shape)
                             : device::launch(class_sums<Layout, pieces.value, false>, grid, stream, task, shape);
  });
}

// With what comes before and after where there are many samples.
template <typename Real>
int launch_ordered_sums(const ClassTask& task, const SumShape& shape, void* stream) {
  const SumWorkspace<Real> workspace(task, shape);
  int error = shape.ordered ? launch_class_order<Real>(task, workspace.tables, stream) : 0;
  if (error == 0 && shape.compact) {
    error = launch_class_sets(task, workspace.sets, stream);
  }
  if (error == 0) {
    error = launch_class_sums<Real>(task, shape, stream);
  }
  if (error == 0 && shape.divided) {
    error = device::launch(class_parts<Real>, {task.problems * task.classes, kPartThreads}, stream, task, shape);
  }
  return error;
}

}  // namespace fairkernels
