// The fair cross-entropy of one problem, L = w_ce CE + w_sym L_sym + w_spec sigma, and its gradient by the logits.
// Forward: one read of the logits and an exp each, whatever the terms. Backward: one read, one exp and one write; or, where
// the forward has kept the exponentials, no more than reading these and the write.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/kept_exps.h"
#include "cpu/spectral_loss.h"
#include "cpu/symmetry_loss.h"
#include "support/parallel.h"
#include "support/spectral_terms.h"
#include "support/symmetry_options.h"
#include "support/symmetry_terms.h"

namespace fairkernels {

// A term of weight 0 is skipped, unless its value is asked for.
struct FairOptions {
  double sym_weight;
  double spec_weight;
  double ce_weight;
  Reduction reduction;
  double label_smoothing;
  double eps;
  SymmetryOptions symmetry;
  Surrogate surrogate;
  double margin;
  bool return_parts;

  bool wants_cross_entropy() const { return ce_weight != 0 || return_parts; }
  bool wants_symmetry() const { return sym_weight != 0 || return_parts; }
  bool wants_spectral() const { return spec_weight != 0 || return_parts; }
  // Whether the gradient can be made of the exponentials alone.
  bool through_softmax() const { return spec_weight == 0 || surrogate == Surrogate::soft; }
  bool compact() const { return symmetry.absent == Absent::ignore; }
};

// The logits, and their samples in the order of the classes.
template <typename T>
struct FairProblem {
  using Real = Accumulator<T>;

  FairProblem(const FairOptions& options, Logits<T> logits, ClassOrder<Real> sorted, std::vector<Real> class_weight)
      : options(options),
        logits(logits),
        order(std::move(sorted)),
        entropy(order, std::move(class_weight), options.label_smoothing, options.reduction == Reduction::mean) {}

  const FairOptions& options;
  const Logits<T> logits;
  const ClassOrder<Real> order;
  const CrossEntropy<Real> entropy;
};

// Where the matrices and vectors of one problem go that the gradient is made of, and the rates where they are asked for.
template <typename Real>
struct FairMatrices {
  Matrix<Real> coefficients;
  Real* u;
  Real* v;
  Real* confusion;
};

// The exponentials of a problem's logits, where its gradient is going to be: as much memory less, and no second exp.
template <typename Real>
struct KeptExps {
  Real* rows;              // B x K, by sample
  std::vector<Real> sums;  // by position in the order
};

struct FairValues {
  double total = 0;
  double cross_entropy = 0;
  double symmetry = 0;
  double spectral = 0;
};

// What the rows of the surrogate's matrix are multiplied by.
template <typename Real>
double surrogate_factor(Surrogate surrogate, const ClassOrder<Real>& order, double count) {
  return inverse_count(surrogate == Surrogate::kl_all ? order.counted : count);
}

// Whether the rates that are needed are picked from the exponentials one by one: those of the present classes only, where
// these are a sixteenth of all or less. Nothing then is as long as a row but the row.
template <typename T>
bool picks_rates(const FairProblem<T>& problem, const KeptExps<Accumulator<T>>* kept) {
  const FairOptions& options = problem.options;
  const int64_t needed = options.wants_symmetry() ? problem.order.present.size() : 0;
  const bool can_pick = kept != nullptr && !problem.order.has_blocks() && options.compact() && !options.wants_spectral();
  return can_pick && 16 * needed <= problem.order.classes;
}

// How many samples are put in the order of their classes together. Neighbouring rows of few classes share cache lines, which
// two threads would take from each other, and many of them are more than the second level holds: then each thread gets its
// own stretch of the samples, and the sums of the stretches are added. These must be much smaller than the rows they sum.
constexpr int64_t kBlockClasses = 256;     // rows of more fill their cache lines
constexpr int64_t kBlockLogits = 131'072;  // half a megabyte
constexpr int64_t kMostBlocks = 32;
constexpr int64_t kRowsPerSum = 4;  // at least

inline int64_t block_of(int64_t samples, int64_t classes) {
  const int64_t least = std::max({kRowsPerSum * classes, kBlockLogits / classes, samples / kMostBlocks});
  const int64_t blocks = classes <= kBlockClasses ? (samples + least - 1) / least : 1;
  return std::max<int64_t>((samples + blocks - 1) / std::max<int64_t>(blocks, 1), 1);
}

// What becomes of the rates of the i-th present class.
template <typename T>
void put_rates(const FairProblem<T>& problem, int64_t i, const Accumulator<T>* rates, const FairMatrices<Accumulator<T>>& results,
               SurrogateMatrix<Accumulator<T>>& matrix) {
  const FairOptions& options = problem.options;
  const std::vector<int64_t>& present = problem.order.present;
  const int64_t classes = problem.order.classes;
  if (options.wants_symmetry()) {
    Accumulator<T>* row = results.coefficients.data + i * results.coefficients.row_stride;
    if (options.compact()) {
      gather(rates, classes, present, row);
    } else {
      std::copy_n(rates, classes, row);
    }
  }
  if (options.return_parts) {
    std::copy_n(rates, classes, results.confusion + present[i] * classes);
  }
  if (options.wants_spectral() && options.surrogate == Surrogate::soft) {
    Accumulator<T>* row = matrix.dense.row(i);
    std::copy_n(rates, classes, row);
    row[present[i]] *= 0;  // but a NaN stays
  }
}

// One thread's reading of the logits, class by class: each row of exponentials serves every term.
template <typename T>
class OnePass {
 public:
  using Real = Accumulator<T>;

  OnePass(const FairProblem<T>& problem, KeptExps<Real>* kept)
      : problem_(problem),
        options_(problem.options),
        order_(problem.order),
        present_(problem.order.present),
        entropy_(problem.entropy),
        kept_(kept),
        picks_(picks_rates(problem, kept)),
        rows_(problem.logits, problem.order.most_rows, all_exps(kept)),
        exps_(problem.order.most_rows),
        factors_(problem.order.most_rows),
        picked_(picks_ && options_.wants_symmetry() ? present_.size() : 0),
        sum_(picks_ ? 0 : order_.classes) {
    if (!options_.wants_spectral()) {
      return;
    }
    if (options_.surrogate == Surrogate::kl) {
      rival_sum_.emplace(options_.margin, order_.classes);
    } else if (options_.surrogate != Surrogate::soft) {
      surrogate_sum_.emplace(options_.surrogate, options_.margin, order_.classes, order_.most_rows);
    }
  }

  // Puts the i-th present class's rates and its row of the surrogate's matrix where they are wanted; returns its losses' sum.
  double read_class(int64_t i, const FairMatrices<Real>& results, SurrogateMatrix<Real>& matrix) {
    const ClassGroup& group = order_.groups[i];  // without weights these are the present classes
    const double loss = read(group, inverse_count(group.count));
    if (picks_) {
      std::copy(picked_.begin(), picked_.end(), results.coefficients.data + i * results.coefficients.row_stride);
      return loss;
    }
    put_rates(problem_, i, sum_.take(), results, matrix);
    if (options_.wants_spectral()) {
      put_surrogate(i, group, matrix);
    }
    return loss;
  }

  // Of one block's samples of a class; `rates`, padded, receives the sum of their probabilities.
  double read_block(const ClassGroup& group, Real* rates) {
    const double loss = read(group, 1);
    std::copy_n(sum_.take(), padded(order_.classes), rates);
    return loss;
  }

 private:
  static Real* all_exps(const KeptExps<Real>* kept) { return kept != nullptr ? kept->rows : nullptr; }

  // Leaves `factor` times the sum of the samples' probabilities in its place, and what the surrogate makes of them.
  double read(const ClassGroup& group, double factor) {
    typename CrossEntropy<Real>::ClassTotal loss(entropy_, group.label);
    if (surrogate_sum_) {
      surrogate_sum_->clear();
    }
    if (rival_sum_) {
      rival_sum_->clear();
    }
    std::fill(picked_.begin(), picked_.end(), 0.0);
    sum_.clear();
    order_.for_each_chunk(group, [&](const Chunk& chunk) {
      rows_.compute(order_, chunk);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const ExpRow<Real> row = rows_.row(r);
        exps_[r] = row.exps;
        factors_[r] = static_cast<Real>(factor / row.sum);
        loss.add(row);
        if (kept_ != nullptr) {
          kept_->sums[chunk.first + r] = row.sum;
        }
      }
      add_rates(chunk);
      see_surrogate(chunk);
    });
    return loss.value();
  }

  void add_rates(const Chunk& chunk) {
    if (!picks_) {
      sum_.add(exps_.data(), factors_.data(), chunk.rows);
      return;
    }
    for (int64_t r = 0; r < chunk.rows; ++r) {
      for (size_t j = 0; j < picked_.size(); ++j) {
        picked_[j] += static_cast<double>(factors_[r]) * exps_[r][present_[j]];
      }
    }
  }

  void see_surrogate(const Chunk& chunk) {
    if (surrogate_sum_) {
      surrogate_sum_->add(rows_, chunk);
    }
    for (int64_t r = 0; rival_sum_ && r < chunk.rows; ++r) {
      rival_sum_->add(rows_.row(r), chunk.label);
    }
  }

  void put_surrogate(int64_t i, const ClassGroup& group, SurrogateMatrix<Real>& matrix) {
    const double factor = surrogate_factor(options_.surrogate, order_, group.count);
    if (rival_sum_) {
      matrix.entries[i] = rival_sum_->take(factor);
    } else if (surrogate_sum_) {
      surrogate_sum_->take(group.label, factor, matrix.dense.row(i));
    }
  }

  const FairProblem<T>& problem_;
  const FairOptions& options_;
  const ClassOrder<Real>& order_;
  const std::vector<int64_t>& present_;
  const CrossEntropy<Real>& entropy_;
  KeptExps<Real>* kept_;
  bool picks_;
  ExpChunk<T> rows_;
  std::vector<const Real*> exps_;
  std::vector<Real> factors_;
  std::vector<double> picked_;  // the rates of the present classes, or
  RowSum<Real> sum_;            // those of all
  std::optional<SurrogateSum<Real>> surrogate_sum_;
  std::optional<RivalSum<Real>> rival_sum_;
};

// Reads all logits; returns the sum of the losses.
template <typename T>
double read_classes(const FairProblem<T>& problem, const FairMatrices<Accumulator<T>>& matrices,
                    SurrogateMatrix<Accumulator<T>>& matrix, KeptExps<Accumulator<T>>* kept) {
  const int64_t n = problem.order.groups.size();
  std::vector<double> losses(n);
  parallel_ranges(n, problem.order.elements_per_group(), [&](int64_t begin, int64_t end) {
    OnePass<T> pass(problem, kept);
    for (int64_t i = begin; i < end; ++i) {
      losses[i] = pass.read_class(i, matrices, matrix);
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// The same where the order has blocks: each thread reads its own, and then the sums of the blocks are added, in their order.
template <typename T>
double read_blocks(const FairProblem<T>& problem, const FairMatrices<Accumulator<T>>& matrices,
                   SurrogateMatrix<Accumulator<T>>& matrix, KeptExps<Accumulator<T>>* kept) {
  using Real = Accumulator<T>;
  const ClassOrder<Real>& order = problem.order;
  const int64_t n = order.groups.size();
  const int64_t width = padded(order.classes);
  const AlignedArray<Real> sums(n * width);
  std::vector<double> losses(n);
  parallel_ranges(n, order.elements_per_group(), [&](int64_t begin, int64_t end) {
    OnePass<T> pass(problem, kept);
    for (int64_t g = begin; g < end; ++g) {
      losses[g] = pass.read_block(order.groups[g], sums.get() + g * width);
    }
  });
  const int64_t present = order.present.size();
  parallel_ranges(present, n / std::max<int64_t>(present, 1) * width, [&](int64_t begin, int64_t end) {
    std::vector<double> totals((end - begin) * width);
    std::vector<Real> rates(width);
    for (int64_t g = 0; g < n; ++g) {
      const int64_t i = place_in(order.present, order.groups[g].label);
      if (begin <= i && i < end) {
        add_to_total(sums.get() + g * width, width, &totals[(i - begin) * width]);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      double* total = &totals[(i - begin) * width];
      combine(inverse_count(order.count(order.present[i])), total, 0, total, width, total);
      store_run(total, width, rates.data());
      put_rates(problem, i, rates.data(), matrices, matrix);
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// The values of all terms. Rates are summed into the matrices and there replaced by what the gradient is made of; where
// `kept` is not null it receives the exponentials.
template <typename T>
FairValues fair_forward(const FairProblem<T>& problem, bool in_double, const FairMatrices<Accumulator<T>>& matrices,
                        KeptExps<Accumulator<T>>* kept) {
  const FairOptions& options = problem.options;
  const std::vector<int64_t>& present = problem.order.present;
  const int64_t classes = problem.order.classes;
  const int64_t n = present.size();
  SurrogateMatrix<Accumulator<T>> matrix(options.surrogate, options.wants_spectral() ? n : 0, classes);
  const auto read = problem.order.has_blocks() ? read_blocks<T> : read_classes<T>;
  const double losses = read(problem, matrices, matrix, kept);

  FairValues values;
  if (options.wants_cross_entropy()) {
    const double divisor = problem.entropy.divisor();  // 0: a mean over nothing, whatever smoothing adds
    values.cross_entropy = divisor != 0 ? losses / divisor : std::numeric_limits<double>::quiet_NaN();
    values.total += options.ce_weight != 0 ? options.ce_weight * values.cross_entropy : 0;
  }
  if (options.wants_symmetry()) {
    values.symmetry =
        symmetry_gap_of(matrices.coefficients, present, classes, options.eps, options.symmetry, options.sym_weight);
    values.total += options.sym_weight != 0 ? options.sym_weight * values.symmetry : 0;
  }
  if (options.wants_spectral()) {
    const SurrogatePair found = leading_pair(matrix, iteration_options(true, in_double), {});
    values.spectral = found.pair.sigma;
    scatter_pair(found, present, matrix.sparse, classes, matrices.u, matrices.v);
    values.total += options.spec_weight != 0 ? options.spec_weight * values.spectral : 0;
  }
  return values;
}

// What the gradients of one class's samples have in common. Derivatives by the rates go through the softmax together, the
// cross-entropy's rates beside them; what is charged to the logits themselves is added afterwards.
template <typename Real>
class ClassSlopes {
 public:
  template <typename Problem>
  ClassSlopes(const Problem& problem, double upstream, const FairMatrices<const Real>& matrices, bool picks)
      : options_(problem.options),
        order_(problem.order),
        entropy_(problem.entropy),
        upstream_(upstream),
        matrices_(matrices),
        picks_(picks),
        classes_(order_.classes),
        ce_factor_(options_.ce_weight != 0 ? upstream * options_.ce_weight / entropy_.divisor() : 0),
        by_class_(entropy_.smooths() ? classes_ : 0),
        v_(options_.spec_weight != 0 && options_.surrogate != Surrogate::soft ? padded_copy(matrices.v) : std::vector<Real>()),
        by_rates_(picks ? 0 : padded(classes_ + 1)) {
    if (options_.spec_weight != 0) {
      surrogate_.emplace(options_.surrogate, options_.margin, classes_, v_.empty() ? matrices.v : v_.data());
    }
    for (size_t k = 0; k < by_class_.size(); ++k) {
      by_class_[k] = static_cast<Real>(ce_factor_ * entropy_.by_class(k));
    }
  }

  void enter(int64_t of_class) {
    label = of_class;
    count = order_.count(label);
    scale = static_cast<Real>(upstream_ * inverse_count(count));
    common = static_cast<Real>(ce_factor_ * entropy_.by_rate(label));
    by_label_ = static_cast<Real>(ce_factor_ * entropy_.by_label(label));
    if (picks_) {
      picked_ = matrices_.coefficients.data + place_in(order_.present, label) * matrices_.coefficients.row_stride;
      return;
    }
    if (surrogate_) {
      spec_slope_ = options_.spec_weight * matrices_.u[label];
      std::fill(by_rates_.begin(), by_rates_.end(), Real(0));
    }
    if (options_.sym_weight != 0) {
      load_coefficients(matrices_.coefficients, order_.present, classes_, options_.compact(), label, by_rates_.data());
    }
    if (surrogate_ && options_.surrogate == Surrogate::soft) {
      surrogate_->add_by_rates(nullptr, label, static_cast<Real>(spec_slope_), by_rates_.data());
    }
  }

  // The derivatives by the rates, for all classes or, where rates are picked, for the present ones.
  const Real* by_rates() const { return picks_ ? picked_ : by_rates_.data(); }

  // The same of one sample: different for those of a class only where there are gates.
  const Real* by_rates_of(const Real* logits) {
    if (!surrogate_ || options_.surrogate != Surrogate::gated) {
      return by_rates_.data();
    }
    own_by_rates_ = by_rates_;
    surrogate_->add_by_rates(logits, label, static_cast<Real>(spec_slope_), own_by_rates_.data());
    return own_by_rates_.data();
  }

  void charge_logits(Real* out) const {
    out[label] -= by_label_;
    if (!by_class_.empty()) {
      add_scaled(out, Real(-1), by_class_.data(), classes_);
    }
  }

  void charge_surrogate(const ExpRow<Real>& row, Real* out) {
    if (!surrogate_ || surrogate_->through_rates()) {
      return;
    }
    const double slope = upstream_ * spec_slope_ * surrogate_factor(options_.surrogate, order_, count);
    if (options_.surrogate == Surrogate::kl) {
      surrogate_->add_by_rival(row, label, slope, out);
    } else {
      surrogate_->add_by_hits(row, label, slope, out);
    }
  }

  int64_t label = 0;
  double count = 0;
  Real scale = 0;
  Real common = 0;

 private:
  std::vector<Real> padded_copy(const Real* vector) const {
    std::vector<Real> copy(padded(classes_));
    std::copy_n(vector, classes_, copy.begin());
    return copy;
  }

  const FairOptions& options_;
  const ClassOrder<Real>& order_;
  const CrossEntropy<Real>& entropy_;
  double upstream_;
  FairMatrices<const Real> matrices_;
  bool picks_;
  int64_t classes_;
  double ce_factor_;
  std::vector<Real> by_class_;
  std::vector<Real> v_;
  std::optional<SurrogateGradient<Real>> surrogate_;
  std::vector<Real> by_rates_;
  std::vector<Real> own_by_rates_;
  const Real* picked_ = nullptr;
  Real by_label_ = 0;
  double spec_slope_ = 0;
};

// `upstream` times the gradient of the total, a contiguous B x K.
template <typename T>
void fair_backward(const FairProblem<T>& problem, double upstream, const FairMatrices<const Accumulator<T>>& matrices,
                   T* grad_logits) {
  using Real = Accumulator<T>;
  const int64_t classes = problem.order.classes;
  const std::vector<Chunk> chunks = problem.order.chunks();
  parallel_ranges(chunks.size(), problem.order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    ClassSlopes<Real> slopes(problem, upstream, matrices, false);
    std::vector<Real> exps(padded(classes));
    const auto enter = [&](int64_t label) { slopes.enter(label); };
    const auto row = [&](const RowTask<Real>& task, int64_t) {
      const Real* by_rates = slopes.by_rates_of(task.logits);
      const ExpRow<Real> exp_row =
          softmax_backward(task, classes, Real(1), by_rates, slopes.scale, slopes.common, exps.data());
      slopes.charge_logits(task.out);
      slopes.charge_surrogate(exp_row, task.out);
    };
    backward_chunks(problem.logits, problem.order, chunks.data() + begin, chunks.data() + end, enter, row, grad_logits);
  });
  clear_ignored(problem.order, grad_logits);
}

// The gradient of the total in place of the exponentials that the forward has kept.
template <typename T>
void fair_backward(const FairProblem<T>& problem, const FairMatrices<const Accumulator<T>>& matrices,
                   KeptExps<Accumulator<T>>& kept) {
  using Real = Accumulator<T>;
  const ClassOrder<Real>& order = problem.order;
  const bool picks = picks_rates(problem, &kept);
  const std::vector<int64_t> places = picks && problem.options.wants_symmetry() ? order.present : std::vector<int64_t>();
  const std::vector<Chunk> chunks = order.chunks();
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    ClassSlopes<Real> slopes(problem, 1.0, matrices, picks);
    std::vector<KeptRow<Real>> rows(order.most_rows);
    std::vector<Real> picked(places.size());
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      if (i == begin || chunk.label != slopes.label) {
        slopes.enter(chunk.label);
      }
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const int64_t at = chunk.first + r;
        rows[r] = {kept.rows + order.sample[at] * order.classes, kept.sums[at], kept.rows + order.ahead(at) * order.classes};
      }
      for (int64_t r = 0; picks && r < chunk.rows; ++r) {
        picked_to_slopes(rows[r], order.classes, places, slopes.by_rates(), slopes.scale, slopes.common, picked.data());
      }
      if (!picks) {
        exps_to_slopes(rows.data(), chunk.rows, order.classes, slopes.label, slopes.by_rates(), slopes.scale, slopes.common);
      }
      for (int64_t r = 0; r < chunk.rows; ++r) {
        slopes.charge_logits(rows[r].exps);
      }
    }
  });
  clear_ignored(order, kept.rows);
}

}  // namespace fairkernels
