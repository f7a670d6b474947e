// The gradient of class terms by the logits.
// Bound by memory: one read of the logits and one write of their gradient, 8 bytes of an element in fp32; an exp and some
// 20 operations; the rows of coefficients come out of the cache. Floor: the copy of the logits. One launch. Rows of more
// than 2,048 classes, 1,024 in double, are read three times, all but the first time from the cache.
// Before it come up to two that read the labels: where a mean is taken over more than 4,096 samples; where spectral_loss
// divides by the samples of a class, of more than 1,024; where there are fewer samples than classes, and more than 2,048
// samples or 8,192 classes.
#pragma once

#include "cuda/class_set.cuh"
#include "cuda/class_surrogates.cuh"

namespace fairkernels {

constexpr int kWeightThreads = 256;
constexpr int64_t kSamplesOfPart = 4096;  // whose labels a block reads for a mean
constexpr int64_t kMostSampleParts = 256;
constexpr int kCountThreads = 512;
constexpr int kCounted = 4096;          // classes whose samples a block counts
constexpr int64_t kMostCounted = 1024;  // samples up to which each row counts those of its class

struct GradientShape {
  int64_t blocks;     // of a problem
  int64_t rows;       // of a block
  int64_t parts;      // sums of weights in the workspace; 0: each block adds them up
  int64_t countings;  // blocks that count the samples of classes, for a problem; 0: each row does
};

// Whether the slopes of the symmetry term are by the classes that occur.
FK_HOST_DEVICE inline bool is_compact(const ClassTask& task) {
  return task.wants_symmetry && task.sym_weight != 0 && task.samples < task.classes;
}

inline bool divides_by_samples(const ClassTask& task) {
  return task.ce_weight != 0 && task.wants_cross_entropy && task.mean_of_samples;
}

// Whether the spectral term's gradient is divided by the samples of a class here, or by all.
FK_HOST_DEVICE inline bool divides_here(const ClassTask& task) {
  return task.wants_spectral && task.spec_weight != 0 && !task.divides_u;
}

inline int64_t sample_parts(const ClassTask& task) {
  const bool needs_sum = divides_by_samples(task) || (divides_here(task) && task.surrogate == Surrogate::kl_all);
  if (!needs_sum || task.samples <= kSamplesOfPart) {
    return 0;
  }
  const int64_t parts = (task.samples + kSamplesOfPart - 1) / kSamplesOfPart;
  return parts < kMostSampleParts ? parts : kMostSampleParts;
}

inline int64_t class_countings(const ClassTask& task) {
  const bool needs_counts = divides_here(task) && task.surrogate != Surrogate::kl_all;
  return needs_counts && task.samples > kMostCounted ? (task.classes + kCounted - 1) / kCounted : 0;
}

// Memory between the launches.
struct GradientWorkspace : Workspace {
  double* weights;  // [problems, parts], sums of those of samples
  int32_t* counts;  // [problems, K], samples of each class
  unsigned* sets;   // of the classes that occur, where blocks do not make them

  FK_HOST_DEVICE GradientWorkspace(const ClassTask& task, int64_t parts, int64_t countings) : Workspace{task.workspace} {
    weights = take<double>(task.problems * parts);
    counts = take<int32_t>(countings > 0 ? task.problems * task.classes : 0);
    sets = take<unsigned>(is_compact(task) ? words_of_sets(task) : 0);
  }
};

inline int64_t class_gradient_bytes(const ClassTask& task) {
  return GradientWorkspace(task, sample_parts(task), class_countings(task)).bytes;
}

// The sum of the class weights of samples [begin, end), the same in all threads of the block.
template <typename Real>
FK_DEVICE double sum_of_weights(const ClassTask& task, const ClassSamples& samples, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t b = begin + device::thread(); b < end; b += device::threads()) {
    const int64_t label = class_of(task, samples, b);
    if (label < task.classes) {
      sum += weight_of<Real>(task, samples, b) * class_weight_of<Real>(task, samples, label);
    }
  }
  return block_sum(sum);
}

template <typename Real>
FK_KERNEL(kWeightThreads) class_weight_sums(FK_CONSTANT(ClassTask) task, double* weights, int64_t parts) {
  const int64_t problem = device::block() / parts;
  const int64_t part = device::block() - problem * parts;
  const ClassSamples samples(task, problem);
  const double sum = sum_of_weights<Real>(task, samples, task.samples * part / parts, task.samples * (part + 1) / parts);
  if (device::thread() == 0) {
    weights[device::block()] = sum;
  }
}

// How many samples each class has. Whole numbers: the order of the threads does not matter.
FK_KERNEL(kCountThreads) class_counts(FK_CONSTANT(ClassTask) task, int32_t* counts, int64_t blocks) {
  using Counts = int32_t[kCounted];
  FK_SHARED(Counts, counted);
  const int64_t problem = device::block() / blocks;
  const int first = static_cast<int>(device::block() - problem * blocks) * kCounted;
  const ClassSamples samples(task, problem);
  for (int i = device::thread(); i < kCounted; i += kCountThreads) {
    counted[i] = 0;
  }
  device::barrier();
  for (int64_t b = device::thread(); b < task.samples; b += kCountThreads) {
    const int place = class_of(task, samples, b) - first;
    if (place >= 0 && place < kCounted) {
      device::add_to(counted + place, 1);
    }
  }
  device::barrier();
  for (int i = device::thread(); i < kCounted && first + i < task.classes; i += kCountThreads) {
    counts[problem * task.classes + first + i] = counted[i];
  }
}

// What all rows of a problem have in common.
template <typename Real>
struct ProblemSlopes {
  int64_t grad;           // offset, of that of the confusion matrix or of the total
  const Real* table;      // coefficients
  int64_t width;          // of a row of them
  const Real* counts;     // of soft_confusion
  double all_counts = 0;  // with Normalize::by_all
  const Real* u;          // of the spectral term
  const Real* v;
  int64_t class_weight;   // offset
  double samples = 0;     // that count, where u is to be divided by them
  Real entropy = 0;       // what a sample's loss is multiplied by, but for its class weight
  Real all_weights = 0;   // of the classes, with label smoothing

  FK_DEVICE ProblemSlopes(const ClassTask& task, const ClassSamples& samples_of, int64_t problem, const double* weights,
                          int64_t parts)
      : grad(task.grad.data != nullptr ? offset_of(task.grad.at, problem) : 0),
        width(task.ignores_absent && task.samples < task.classes ? task.samples : task.classes),
        counts(static_cast<const Real*>(task.counts) + (task.counts != nullptr ? problem * task.classes : 0)),
        u(static_cast<const Real*>(task.u) + (task.u != nullptr ? problem * task.classes : 0)),
        v(static_cast<const Real*>(task.v) + (task.v != nullptr ? problem * task.classes : 0)),
        class_weight(task.class_weight.data != nullptr ? offset_of(task.class_weight.at, problem) : 0) {
    const int64_t rows = task.samples < task.classes ? task.samples : task.classes;
    table = static_cast<const Real*>(task.coefficients) + (task.coefficients != nullptr ? problem * rows * width : 0);
    if (task.confusion_as_logits && task.normalize == Normalize::by_all) {
      double sum = 0;
      for (int64_t label = device::thread(); label < task.classes; label += device::threads()) {
        sum += counts[label];
      }
      all_counts = block_sum(sum);
    }
    if (divides_here(task) && task.surrogate == Surrogate::kl_all) {
      samples = all_weights_of(task, samples_of, weights + problem * parts, parts);
    }
    if (task.ce_weight != 0 && task.wants_cross_entropy) {
      const double divisor = task.mean_of_samples ? all_weights_of(task, samples_of, weights + problem * parts, parts) : 1;
      entropy = static_cast<Real>(task.ce_weight / divisor);
      if (task.label_smoothing != 0) {
        all_weights = sum_of_class_weights<Real>(task, samples_of);
      }
    }
  }

 private:
  static FK_DEVICE double all_weights_of(const ClassTask& task, const ClassSamples& samples, const double* weights,
                                         int64_t parts) {
    if (parts == 0) {
      return sum_of_weights<Real>(task, samples, 0, task.samples);
    }
    double sum = 0;
    for (int64_t part = device::thread(); part < parts; part += device::threads()) {
      sum += weights[part];
    }
    return block_sum(sum);
  }
};

// The derivatives by the rates of a sample's class.
template <typename Real>
struct RateSlopes {
  bool by_grad = false;         // that of the confusion matrix
  int64_t grad = 0;             // offset of this row of it
  const Real* table = nullptr;  // else this row of the coefficients
  ClassSet set;  // where there is one, columns are those of its classes
};

// What the gradient of one row is made of: p (rates (g - <g, p>) + common) + towards (p - e_y) - by_class w.
template <typename Real>
struct SampleSlopes {
  int label;
  bool by_rates;  // whether there are any
  RateSlopes<Real> slope;
  Real rates;
  Real common;
  Real towards;
  Real by_class;
  Real spectral;  // what the charges are multiplied by, beside v; those by the rates but for `rates`
};

template <typename Real>
FK_DEVICE SampleSlopes<Real> slopes_of(const ClassTask& task, const ClassSamples& samples,
                                       const ProblemSlopes<Real>& problem, const ClassSet& set, int64_t b, int label,
                                       Real inverse_count) {
  SampleSlopes<Real> slopes{label, false, {}, 0, 0, 0, 0, 0};
  const Real weight = weight_of<Real>(task, samples, b);
  if (task.confusion_as_logits) {
    slopes.by_rates = true;
    slopes.slope.by_grad = true;
    slopes.slope.grad = problem.grad + label * task.grad.row_stride;
    slopes.rates = weight;
    if (task.normalize == Normalize::by_all) {
      slopes.rates = divided(weight, static_cast<Real>(problem.all_counts));
    } else if (task.normalize == Normalize::by_true_class) {
      slopes.rates = divided(weight, problem.counts[label]);
    }
  } else {
    const bool is_one = task.grad.data == nullptr;
    const Real unit = is_one ? weight : weight * float_at<Real>(task.grad.data, task.grad.dtype, problem.grad);
    if (task.sym_weight != 0 && task.wants_symmetry) {
      slopes.by_rates = true;
      slopes.slope.table = problem.table + (set ? set.rank(label) : label) * problem.width;
      slopes.slope.set = task.ignores_absent ? set : ClassSet();
      slopes.rates = unit;
    }
    if (task.spec_weight != 0 && task.wants_spectral) {
      slopes.spectral = static_cast<Real>(task.spec_weight) * problem.u[label] * inverse_count;
      if (task.class_weight.data != nullptr) {
        slopes.spectral *= element_at<Real>(task.class_weight.data, task.class_weight.dtype,
                                            problem.class_weight + label * task.class_weight.stride);
      }
      if (is_by_rates(task.surrogate)) {
        slopes.by_rates = true;
        slopes.rates = unit;
      } else {
        slopes.spectral *= unit;
      }
    }
    if (task.ce_weight != 0 && task.wants_cross_entropy) {
      const Real smoothing = static_cast<Real>(task.label_smoothing);
      const Real entropy = unit * problem.entropy;
      slopes.towards = entropy * class_weight_of<Real>(task, samples, label);
      if (smoothing != 0) {
        slopes.towards *= 1 - smoothing;
        slopes.by_class = entropy * (smoothing / static_cast<Real>(task.classes));
        slopes.common = slopes.by_class * problem.all_weights;
      }
    }
  }
  slopes.rates /= static_cast<Real>(task.temperature);
  return slopes;
}

// Sums over a row: its softmax; the slope at its top class, of several the largest, and how much the mean slope differs
// from it; the exponentials of the wrong classes. A sure row would lose its gradient to rounding if slopes were not taken
// relative to its top class, and 1 - p_y not as the sum of the others.
template <typename Real>
struct GradientSums {
  Real top;
  Real total;
  Real slope_at_top;
  Real mean;
  Real others;
};

// Part of a row in registers: logits, later exponentials, and slopes.
template <typename Layout>
struct HeldRow {
  typename Layout::Real z[Layout::kHeld];
  typename Layout::Real slope[Layout::kHeld];
};

// Those by coefficients or the incoming gradient.
template <typename Layout, typename Real>
FK_DEVICE void load_slopes(const ClassTask& task, const SampleSlopes<Real>& slopes, int first, HeldRow<Layout>& held) {
  const RateSlopes<Real>& slope = slopes.slope;
  if (slope.by_grad) {
    for_columns<Layout>(task, first, [&](int e, int column) {
      held.slope[e] = float_at<Real>(task.grad.data, task.grad.dtype, slope.grad + column * task.grad.stride);
    });
  } else if (slope.table == nullptr) {
    return;
  } else if (!slope.set) {
    for_columns<Layout>(task, first, [&](int e, int column) { held.slope[e] = slope.table[column]; });
  } else {
    for_columns<Layout>(task, first, [&](int e, int column) {
      if (slope.set.has(column)) {
        held.slope[e] = slope.table[slope.set.rank(column)];
      }
    });
  }
}

template <typename Layout, bool kCharges, typename Real>
FK_DEVICE void load_held(const ClassTask& task, int64_t row, const SampleSlopes<Real>& slopes, const Real* v, Real own,
                         int first, HeldRow<Layout>& held) {
  load_logits<Layout>(task, row, first, held.z);
#pragma unroll
  for (int e = 0; e < Layout::kHeld; ++e) {
    held.slope[e] = 0;
  }
  load_slopes<Layout>(task, slopes, first, held);
  if (slopes.spectral == 0 || !is_by_rates(task.surrogate)) {
    return;
  }
  for_columns<Layout>(task, first, [&](int e, int column) {
    if (column != slopes.label) {
      const Real gate = kCharges && task.surrogate == Surrogate::gated ? gate_of(task, held.z[e], own) : Real(1);
      held.slope[e] += slopes.spectral * (gate * v[column]);
    }
  });
}

template <typename Layout>
FK_DEVICE typename Layout::Real slope_where(const HeldRow<Layout>& held, typename Layout::Real top) {
  typename Layout::Real slope = -kInfinity<typename Layout::Real>;
#pragma unroll
  for (int e = 0; e < Layout::kHeld; ++e) {
    slope = held.z[e] == top && held.slope[e] > slope ? held.slope[e] : slope;
  }
  return slope;
}

// Of exponentials: adds what this thread holds to the sums that need the slope at the top.
template <typename Layout>
FK_DEVICE void add_held(const ClassTask& task, const HeldRow<Layout>& held, int first, int label,
                        GradientSums<typename Layout::Real>& sums) {
  for_columns<Layout>(task, first, [&](int e, int column) {
    sums.mean += held.z[e] * (held.slope[e] - sums.slope_at_top);
    sums.others += column == label ? 0 : held.z[e];
  });
}

template <typename Layout>
FK_DEVICE void finish(GradientSums<typename Layout::Real>& sums) {
  sums.mean = Layout::Members::sum(sums.mean) / sums.total;
  sums.others = Layout::Members::sum(sums.others);
}

// Of a row that is held whole; its logits become exponentials.
template <typename Layout>
FK_DEVICE GradientSums<typename Layout::Real> sums_of_held(const ClassTask& task, int label, HeldRow<Layout>& held) {
  using Members = typename Layout::Members;
  GradientSums<typename Layout::Real> sums{};
  const auto top = Members::max(largest_held(held.z));
  sums.slope_at_top = Members::max(slope_where(held, top));
  sums.top = finite_top(top);
  sums.total = Members::sum(to_exps(sums.top, held.z));
  add_held(task, held, 0, label, sums);
  finish<Layout>(sums);
  return sums;
}

// Of a row that is held piece by piece.
template <typename Layout, bool kCharges, typename Real>
FK_DEVICE GradientSums<Real> sums_of_pieces(const ClassTask& task, int64_t row, const SampleSlopes<Real>& slopes,
                                            const Real* v, Real own, HeldRow<Layout>& held) {
  using Members = typename Layout::Members;
  GradientSums<Real> sums{};
  Real top = -kInfinity<Real>;
  Real total = 0;
  Real slope = -kInfinity<Real>;
  for (int first = 0; first < task.classes; first += Layout::kColumns) {
    load_held<Layout, kCharges>(task, row, slopes, v, own, first, held);
    const Real here = largest_held(held.z);
    const Real raised = here > top ? here : top;
    const Real at_raised = slope_where(held, raised);
    slope = here > top || at_raised > slope ? at_raised : slope;
    total = rescaled(total, top, raised) + to_exps(finite_top(raised), held.z);
    top = raised;
  }
  const Real highest = Members::max(top);
  sums.slope_at_top = Members::max(top == highest ? slope : -kInfinity<Real>);
  sums.top = finite_top(highest);
  sums.total = Members::sum(rescaled(total, top, sums.top));
  for (int first = 0; first < task.classes; first += Layout::kColumns) {
    load_held<Layout, kCharges>(task, row, slopes, v, own, first, held);
    to_exps(sums.top, held.z);
    add_held(task, held, first, slopes.label, sums);
  }
  finish<Layout>(sums);
  return sums;
}

// What charges add that do not go through the rates: "kl-all" more `towards`, "kl" the softmax of the raised logits.
template <typename Layout, bool kPieces, typename Real>
FK_DEVICE Rival<Real> charge_slopes(const ClassTask& task, int64_t row, Real own, const Real* v,
                                    const GradientSums<Real>& sums, Real (&z)[Layout::kHeld], SampleSlopes<Real>& slopes) {
  Rival<Real> rival{};
  if (task.surrogate == Surrogate::kl) {
    rival = find_rival<Layout, kPieces>(task, row, slopes.label, own, z);
    slopes.spectral = rival.place >= 0 ? slopes.spectral * v[rival.place] : Real(0);
  } else if (task.surrogate == Surrogate::kl_all) {
    const ChargeRow<Real> charges = charge_row(slopes.label, own, sums.top, sums.total, rival);
    Real hit = 0;
    for (int first = 0; first < (kPieces ? task.classes : 1); first += Layout::kColumns) {
      if constexpr (kPieces) {
        load_logits<Layout>(task, row, first, z);
      }
      for_columns<Layout>(task, first, [&](int e, int column) {
        const Real exp = task.margin == 0 ? Real(0) : std::exp(z[e] - sums.top);
        hit += column != slopes.label && is_hit(task, charges, z[e], exp) ? v[column] : Real(0);
      });
    }
    slopes.towards += slopes.spectral * Layout::Members::sum(hit);
  }
  return rival;
}

// Exponentials become the gradient.
template <typename Layout, bool kCharges, typename Real>
FK_DEVICE void to_gradient(const ClassTask& task, const StagedWeights<Real>& weights, const SampleSlopes<Real>& slopes,
                           const GradientSums<Real>& sums, const Rival<Real>& rival, const Real (&z)[Layout::kHeld],
                           int first, HeldRow<Layout>& held) {
  const Real inverse = 1 / sums.total;
  for_columns<Layout>(task, first, [&](int e, int column) {
    const Real rate = held.z[e] * inverse;
    const Real relative = (held.slope[e] - sums.slope_at_top) - sums.mean;
    Real gradient = slopes.by_rates ? rate * (slopes.rates * relative + slopes.common) : rate * slopes.common;
    gradient += slopes.towards * (column == slopes.label ? -(sums.others * inverse) : rate);
    if (slopes.by_class != 0) {
      gradient -= slopes.by_class * weights[column];
    }
    if (kCharges && task.surrogate == Surrogate::kl && slopes.spectral != 0) {
      const Real raised = std::exp(z[e] - finite_top(rival.highest));
      gradient += slopes.spectral * ((column == slopes.label ? -rival.others : raised) / rival.all);
    }
    held.z[e] = gradient;
  });
}

// How many samples a class has, found by a team.
template <typename Members>
FK_DEVICE int samples_of_class(const ClassTask& task, const ClassSamples& samples, int label) {
  int count = 0;
  for (int64_t b = Members::rank(); b < task.samples; b += Members::kSize) {
    count += class_of(task, samples, b) == label ? 1 : 0;
  }
  return Members::sum(count);
}

// Class weights in shared memory: all, or those of a piece.
template <typename Layout>
FK_HOST_DEVICE inline int staged_columns(const ClassTask& task) {
  const int columns = task.classes < Layout::kColumns ? task.classes : Layout::kColumns;
  return stages_weights(task) ? columns : 0;
}

template <typename Layout, bool kPieces, bool kCharges>
FK_CROWDED_KERNEL(Layout::kBlockThreads, (Layout::template blocks<kPieces, kCharges>()))
class_gradient(FK_CONSTANT(ClassTask) task, GradientShape shape) {
  using Real = typename Layout::Real;
  using Members = typename Layout::Members;
  const int64_t problem = device::block() / shape.blocks;
  const int64_t begin = (device::block() - problem * shape.blocks) * shape.rows;
  const int64_t end = begin + shape.rows < task.samples ? begin + shape.rows : task.samples;
  const ClassSamples samples(task, problem);
  const double* weights = GradientWorkspace(task, shape.parts, shape.countings).weights;  // the others take registers
  const ProblemSlopes<Real> common(task, samples, problem, weights, shape.parts);
  const GradientWorkspace workspace(task, shape.parts, shape.countings);
  Real* staged = device::shared_memory<Real>();
  unsigned* shared = reinterpret_cast<unsigned*>(staged + staged_columns<Layout>(task));
  const ClassSet set = is_compact(task) ? ClassSet(task, samples, problem, workspace.sets, shared) : ClassSet();
  const StagedWeights<Real> all = kPieces ? StagedWeights<Real>{} : stage_weights(task, samples, 0, task.classes, staged);
  const int64_t out = problem * task.samples * task.classes;

  for (int64_t turn = begin; turn < end; turn += Members::count()) {
    const bool inside = turn + Members::number() < end;
    const int64_t b = inside ? turn + Members::number() : begin;
    const int label = class_of(task, samples, b);
    const bool counts = label != task.classes;
    const int64_t row = samples.logits + b * task.logits.row_stride;
    Real inverse_count = 1;
    if (divides_here(task)) {
      Real count = static_cast<Real>(common.samples);
      if (task.surrogate != Surrogate::kl_all) {
        count = static_cast<Real>(shape.countings == 0 ? samples_of_class<Members>(task, samples, label)
                                  : counts             ? workspace.counts[problem * task.classes + label]
                                                       : 0);
      }
      inverse_count = divided(Real(1), count);
    }
    SampleSlopes<Real> slopes =
        counts ? slopes_of(task, samples, common, set, b, label, inverse_count) : SampleSlopes<Real>{label, false};
    const Real own = counts ? logit_at<Real>(task, row, label) : Real(0);
    HeldRow<Layout> held{};
    Real z[Layout::kHeld] = {};
    if constexpr (!kPieces) {
      if (counts) {
        load_held<Layout, kCharges>(task, row, slopes, common.v, own, 0, held);
      }
#pragma unroll
      for (int e = 0; e < Layout::kHeld && kCharges; ++e) {
        z[e] = held.z[e];
      }
      const auto sums = sums_of_held(task, label, held);
      Rival<Real> rival{};
      if constexpr (kCharges) {
        rival = charge_slopes<Layout, false>(task, row, own, common.v, sums, z, slopes);
      }
      if (counts) {
        to_gradient<Layout, kCharges>(task, all, slopes, sums, rival, z, 0, held);
      } else {
        held = {};
      }
      if (inside) {
        store_gradient<Layout>(task, held.z, out + b * task.classes, 0);
      }
    } else {
      GradientSums<Real> sums{};
      Rival<Real> rival{};
      if (counts) {
        sums = sums_of_pieces<Layout, kCharges>(task, row, slopes, common.v, own, held);
        if constexpr (kCharges) {
          rival = charge_slopes<Layout, true>(task, row, own, common.v, sums, z, slopes);
        }
      }
      for (int first = 0; first < task.classes; first += Layout::kColumns) {
        held = {};
        if (counts) {
          load_held<Layout, kCharges>(task, row, slopes, common.v, own, first, held);
#pragma unroll
          for (int e = 0; e < Layout::kHeld && kCharges; ++e) {
            z[e] = held.z[e];
          }
          to_exps(sums.top, held.z);
          const auto weights = stage_weights(task, samples, first, Layout::kColumns, staged);
          to_gradient<Layout, kCharges>(task, weights, slopes, sums, rival, z, first, held);
        }
        store_gradient<Layout>(task, held.z, out + b * task.classes, first);
      }
    }
  }
}

template <typename Layout, bool kPieces, bool kCharges>
int launch_class_gradient_with(const ClassTask& task, void* stream) {
  const int64_t teams = Layout::kBlockThreads / Layout::Members::kSize;
  const int64_t turns = is_compact(task) || divides_by_samples(task) ? 4 : 1;
  const int64_t rows = teams * turns;
  const GradientShape shape{(task.samples + rows - 1) / rows, rows, sample_parts(task), class_countings(task)};
  const size_t set = is_compact(task) ? set_bytes_in_block(task) : 0;
  const size_t bytes = staged_columns<Layout>(task) * sizeof(typename Layout::Real) + set;
  const device::Grid grid{task.problems * shape.blocks, Layout::kBlockThreads, bytes};
  return device::launch(class_gradient<Layout, kPieces, kCharges>, grid, stream, task, shape);
}

// What has to be known of all labels.
template <typename Real>
int launch_before_gradient(const ClassTask& task, void* stream) {
  const int64_t parts = sample_parts(task);
  const int64_t countings = class_countings(task);
  const GradientWorkspace workspace(task, parts, countings);
  const device::Grid of_weights{task.problems * parts, kWeightThreads};
  const device::Grid of_counts{task.problems * countings, kCountThreads};
  int error = device::launch(class_weight_sums<Real>, of_weights, stream, task, workspace.weights, parts);
  if (error == 0) {
    error = device::launch(class_counts, of_counts, stream, task, workspace.counts, countings);
  }
  return error == 0 && is_compact(task) ? launch_class_sets(task, workspace.sets, stream) : error;
}

template <typename Real>
int launch_class_gradient(const ClassTask& task, void* stream) {
  if (const int error = launch_before_gradient<Real>(task, stream); error != 0) {
    return error;
  }
  const bool charges = has_charges(task) && task.spec_weight != 0;
  return with_layout<Real, 8>(task.classes, [&](auto layout, auto pieces) {
    using Layout = decltype(layout);
    return charges ? launch_class_gradient_with<Layout, pieces.value, true>(task, stream)
                   : launch_class_gradient_with<Layout, pieces.value, false>(task, stream);
  });
}

}  // namespace fairkernels
