// fair_cross_entropy: checks and glue. The mathematics is in cpu/cross_entropy.h, cpu/symmetry_loss.h and cpu/spectral_loss.h.
// One read of the logits forward; one read of them and one write of their gradient backward, each with one exp a logit.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/spectral_loss.h"
#include "cpu/symmetry_loss.h"
#include "support/confusion_arguments.h"
#include "support/parallel.h"
#include "support/spectral_terms.h"
#include "support/symmetry_options.h"
#include "support/symmetry_terms.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

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
};

class FairArguments {
 public:
  FairArguments(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, const FairOptions& options,
                int64_t ignore_index)
      : options(options),
        batch(logits, labels, std::nullopt, 1.0, ignore_index),
        weight_(weight),
        weight_offset_(checked_weight(logits), weight ? 1 : 2) {}

  template <typename Real>
  CrossEntropy<Real> cross_entropy(const ClassOrder<Real>& order, int64_t problem) const {
    std::vector<Real> weight(weight_ ? batch.classes : 0);
    if (weight_) {
      with_float_type(float_dtype_of(*weight_, "weight"), [&](auto type) {
        const auto* data = data_of<decltype(type)>(*weight_) + weight_offset_(problem);
        load(data, weight_->stride(-1), batch.classes, weight.data());
      });
    }
    return CrossEntropy<Real>(order, std::move(weight), options.label_smoothing, options.reduction == Reduction::mean);
  }

  bool compact() const { return options.symmetry.absent == Absent::ignore; }

  Shape per_problem(std::initializer_list<int64_t> sizes) const { return reshaped(batch.shape, 2, sizes); }

  Shape confusion_shape() const {
    const int64_t size = options.return_parts ? batch.classes : 0;
    return per_problem({size, size});
  }

  Shape coefficients_shape() const {
    return options.wants_symmetry() ? fairkernels::coefficients_shape(batch, options.symmetry.absent) : per_problem({0, 0});
  }

  const FairOptions options;
  const ConfusionArguments batch;

 private:
  const Tensor& checked_weight(const Tensor& logits) const {
    if (!weight_) {
      return logits;
    }
    float_dtype_of(*weight_, "weight");
    require_shape(*weight_, per_problem({batch.classes}), "weight");
    return *weight_;
  }

  OptionalTensor weight_;
  ProblemOffset weight_offset_;
};

struct Results {
  explicit Results(const FairArguments& arguments)
      : accumulator(accumulator_dtype(arguments.batch.dtype)),
        total(empty(arguments.per_problem({}), arguments.batch.dtype)),
        cross_entropy(empty(arguments.per_problem({}), accumulator)),
        symmetry(empty(arguments.per_problem({}), accumulator)),
        spectral(empty(arguments.per_problem({}), accumulator)),
        confusion(empty(arguments.confusion_shape(), accumulator)),
        coefficients(empty(arguments.coefficients_shape(), accumulator)),
        u(empty(arguments.per_problem({arguments.batch.classes}), accumulator)),
        v(empty(arguments.per_problem({arguments.batch.classes}), accumulator)) {}

  Dtype accumulator;
  Tensor total;
  Tensor cross_entropy;
  Tensor symmetry;
  Tensor spectral;
  Tensor confusion;
  Tensor coefficients;
  Tensor u;
  Tensor v;
};

// Where the matrices and vectors of one problem go.
template <typename Real>
struct ProblemResults {
  ProblemResults(const Results& results, const FairArguments& arguments, int64_t problem)
      : coefficients(problem_matrix(mutable_data_of<Real>(results.coefficients), arguments.coefficients_shape(), problem)),
        confusion(problem_matrix(mutable_data_of<Real>(results.confusion), arguments.confusion_shape(), problem)),
        u(mutable_data_of<Real>(results.u) + problem * arguments.batch.classes),
        v(mutable_data_of<Real>(results.v) + problem * arguments.batch.classes) {}

  Matrix<Real> coefficients;
  Matrix<Real> confusion;
  Real* u;
  Real* v;
};

// What the rows of the surrogate's matrix are multiplied by.
template <typename Real>
double surrogate_factor(Surrogate surrogate, const ClassOrder<Real>& order, int64_t label) {
  return inverse_count(surrogate == Surrogate::kl_all ? order.start[order.classes] : order.count[label]);
}

// One thread's reading of the logits, class by class: each row of exponentials serves every term.
template <typename T>
class OnePass {
 public:
  using Real = Accumulator<T>;

  OnePass(const FairArguments& arguments, const Logits<T>& logits, const ClassOrder<Real>& order,
          const std::vector<int64_t>& present, const CrossEntropy<Real>& entropy)
      : arguments_(arguments),
        order_(order),
        present_(present),
        entropy_(entropy),
        confusion_row_(logits),
        surrogate_sum_(arguments.options.surrogate, arguments.options.margin, logits.classes),
        rival_sum_(arguments.options.margin, logits.classes) {}

  // Puts the i-th present class's rates and its row of the surrogate's matrix where they are wanted; returns its losses' sum.
  double read_class(int64_t i, const ProblemResults<Real>& results, SurrogateMatrix<Real>& matrix) {
    const int64_t label = present_[i];
    typename CrossEntropy<Real>::ClassTotal loss(entropy_, label);
    surrogate_sum_.clear();
    rival_sum_.clear();
    const double factor = inverse_count(order_.count[label]);
    const Real* rates = confusion_row_(order_, label, factor, [&](const ExpChunk<T>& rows, Chunk chunk) {
      for (int64_t r = 0; r < chunk.rows; ++r) {
        loss.add(rows.row(r));
      }
      see_surrogate(rows, chunk);
    });
    put_rates(i, rates, results);
    if (arguments_.options.wants_spectral()) {
      put_surrogate(i, rates, matrix);
    }
    return loss.value();
  }

 private:
  void see_surrogate(const ExpChunk<T>& rows, const Chunk& chunk) {
    const Surrogate surrogate = arguments_.options.surrogate;
    if (!arguments_.options.wants_spectral() || surrogate == Surrogate::soft) {
      return;
    }
    if (surrogate != Surrogate::kl) {
      surrogate_sum_.add(rows, chunk);
      return;
    }
    for (int64_t r = 0; r < chunk.rows; ++r) {
      rival_sum_.add(rows.row(r), chunk.label);
    }
  }

  void put_rates(int64_t i, const Real* rates, const ProblemResults<Real>& results) const {
    const int64_t classes = order_.classes;
    Real* row = results.coefficients.data + i * results.coefficients.row_stride;
    if (arguments_.options.wants_symmetry() && arguments_.compact()) {
      gather(rates, classes, present_, row);
    } else if (arguments_.options.wants_symmetry()) {
      std::copy_n(rates, classes, row);
    }
    if (arguments_.options.return_parts) {
      std::copy_n(rates, classes, results.confusion.data + present_[i] * classes);
    }
  }

  void put_surrogate(int64_t i, const Real* rates, SurrogateMatrix<Real>& matrix) {
    const int64_t label = present_[i];
    const double factor = surrogate_factor(arguments_.options.surrogate, order_, label);
    if (arguments_.options.surrogate == Surrogate::soft) {
      Real* row = matrix.dense.row(i);
      std::copy_n(rates, order_.classes, row);
      row[label] *= 0;  // but a NaN stays
    } else if (matrix.sparse) {
      matrix.entries[i] = rival_sum_.take(factor);
    } else {
      surrogate_sum_.take(label, factor, matrix.dense.row(i));
    }
  }

  const FairArguments& arguments_;
  const ClassOrder<Real>& order_;
  const std::vector<int64_t>& present_;
  const CrossEntropy<Real>& entropy_;
  ConfusionRow<T> confusion_row_;
  SurrogateSum<Real> surrogate_sum_;
  RivalSum<Real> rival_sum_;
};

// What no class writes of the results, memory being fresh.
template <typename Real>
void clear_results(const FairArguments& arguments, int64_t present, const ProblemResults<Real>& results) {
  const int64_t classes = arguments.batch.classes;
  if (arguments.options.wants_symmetry()) {
    clear_unused(results.coefficients, arguments.coefficients_shape(), present, arguments.compact() ? present : classes);
  }
  if (arguments.options.return_parts) {
    std::fill_n(results.confusion.data, classes * classes, Real(0));
  }
  std::fill_n(results.u, classes, Real(0));
  std::fill_n(results.v, classes, Real(0));
}

template <typename T>
void forward_problem(const FairArguments& arguments, int64_t problem, const Results& tensors) {
  using Real = Accumulator<T>;
  const FairOptions& options = arguments.options;
  const ProblemResults<Real> results(tensors, arguments, problem);
  const auto logits = arguments.batch.logits<T>(problem);
  const auto order = arguments.batch.order<Real>(problem);
  const std::vector<int64_t> present = present_classes(order);
  const auto entropy = arguments.cross_entropy(order, problem);
  const int64_t classes = arguments.batch.classes;
  const int64_t n = present.size();
  clear_results(arguments, n, results);

  std::vector<double> losses(n);
  SurrogateMatrix<Real> matrix(options.surrogate, options.wants_spectral() ? n : 0, classes);
  const int64_t elements_each = arguments.batch.samples * classes / std::max<int64_t>(n, 1) + classes;
  parallel_ranges(n, elements_each, [&](int64_t begin, int64_t end) {
    OnePass<T> pass(arguments, logits, order, present, entropy);
    for (int64_t i = begin; i < end; ++i) {
      losses[i] = pass.read_class(i, results, matrix);
    }
  });

  double total = 0;
  double cross_entropy = 0;
  double symmetry = 0;
  double spectral = 0;
  if (options.wants_cross_entropy()) {
    cross_entropy = std::accumulate(losses.begin(), losses.end(), 0.0) / entropy.divisor();
    total += options.ce_weight != 0 ? options.ce_weight * cross_entropy : 0;
  }
  if (options.wants_symmetry()) {
    symmetry = symmetry_gap_of(results.coefficients, present, classes, options.eps, options.symmetry, options.sym_weight);
    total += options.sym_weight != 0 ? options.sym_weight * symmetry : 0;
  }
  if (options.wants_spectral()) {
    const SurrogatePair found = leading_pair(matrix, iteration_options(true, arguments.batch.dtype == Dtype::float64), {});
    spectral = found.pair.sigma;
    scatter_pair(found, present, matrix.sparse, classes, results.u, results.v);
    total += options.spec_weight != 0 ? options.spec_weight * spectral : 0;
  }
  mutable_data_of<T>(tensors.total)[problem] = narrow(total, T{});
  mutable_data_of<Real>(tensors.cross_entropy)[problem] = static_cast<Real>(cross_entropy);
  mutable_data_of<Real>(tensors.symmetry)[problem] = static_cast<Real>(symmetry);
  mutable_data_of<Real>(tensors.spectral)[problem] = static_cast<Real>(spectral);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, double sym_weight, double spec_weight,
    double ce_weight, StringHandle reduction, double label_smoothing, int64_t ignore_index, double eps, StringHandle absent,
    StringHandle sym_reduction, StringHandle surrogate, double margin, bool return_parts) {
  const FairOptions options{sym_weight,
                            spec_weight,
                            ce_weight,
                            take_reduction(reduction),
                            label_smoothing,
                            eps,
                            SymmetryOptions(absent, sym_reduction),
                            take_surrogate(surrogate),
                            margin,
                            return_parts};
  const FairArguments arguments(logits, labels, weight, options, ignore_index);
  const Results results(arguments);
  with_float_type(arguments.batch.dtype, [&](auto type) {
    for_each_problem(arguments.batch.problems, arguments.batch.samples * arguments.batch.classes,
                     [&](int64_t problem) { forward_problem<decltype(type)>(arguments, problem, results); });
  });
  return {results.total,     results.cross_entropy, results.symmetry, results.spectral,
          results.confusion, results.coefficients,  results.u,        results.v};
}

// What the backward finds again of one problem.
template <typename Real>
struct Saved {
  Matrix<const Real> coefficients;
  const Real* u;
  const Real* v;
};

// One thread's gradients by the logits. Derivatives by the rates go through the softmax together, the cross-entropy's rates
// beside them; what is charged to the logits themselves is added afterwards.
template <typename T>
class FairGradient {
 public:
  using Real = Accumulator<T>;

  FairGradient(const FairArguments& arguments, const ClassOrder<Real>& order, const std::vector<int64_t>& present,
               const CrossEntropy<Real>& entropy, double upstream, const Saved<Real>& saved)
      : arguments_(arguments),
        order_(order),
        present_(present),
        entropy_(entropy),
        upstream_(upstream),
        saved_(saved),
        classes_(order.classes),
        ce_factor_(arguments.options.ce_weight != 0 ? upstream * arguments.options.ce_weight / entropy.divisor() : 0),
        by_class_(entropy.smooths() ? classes_ : 0),
        v_(padded_copy(saved.v)),
        surrogate_(arguments.options.surrogate, arguments.options.margin, classes_, v_.data()),
        by_rates_(padded(classes_)),
        own_by_rates_(padded(classes_)),
        exps_(padded(classes_)) {
    for (size_t k = 0; k < by_class_.size(); ++k) {
      by_class_[k] = static_cast<Real>(ce_factor_ * entropy_.by_class(k));
    }
  }

  void enter(int64_t label) {
    const FairOptions& options = arguments_.options;
    label_ = label;
    scale_ = static_cast<Real>(upstream_ * inverse_count(order_.count[label]));
    common_ = static_cast<Real>(ce_factor_ * entropy_.by_rate(label));
    by_label_ = static_cast<Real>(ce_factor_ * entropy_.by_label(label));
    if (options.sym_weight != 0) {
      load_coefficients(saved_.coefficients, present_, classes_, arguments_.compact(), label, by_rates_.data());
    } else {
      std::fill(by_rates_.begin(), by_rates_.end(), Real(0));
    }
    spec_slope_ = options.spec_weight != 0 ? options.spec_weight * saved_.u[label] : 0;
    if (options.spec_weight != 0 && options.surrogate == Surrogate::soft) {
      surrogate_.add_by_rates(nullptr, label, static_cast<Real>(spec_slope_), by_rates_.data());
    }
  }

  void row(const RowTask<Real>& task) {
    const FairOptions& options = arguments_.options;
    const bool gated = options.spec_weight != 0 && options.surrogate == Surrogate::gated;
    if (gated) {
      own_by_rates_ = by_rates_;
      surrogate_.add_by_rates(task.logits, label_, static_cast<Real>(spec_slope_), own_by_rates_.data());
    }
    const Real* by_rates = gated ? own_by_rates_.data() : by_rates_.data();
    const ExpRow<Real> exp_row = softmax_backward(task, classes_, Real(1), by_rates, scale_, common_, exps_.data());
    task.out[label_] -= by_label_;
    if (!by_class_.empty()) {
      add_scaled(task.out, Real(-1), by_class_.data(), classes_);
    }
    if (options.spec_weight == 0 || surrogate_.through_rates()) {
      return;
    }
    const double slope = upstream_ * spec_slope_ * surrogate_factor(options.surrogate, order_, label_);
    if (options.surrogate == Surrogate::kl) {
      surrogate_.add_by_rival(exp_row, label_, slope, task.out);
    } else {
      surrogate_.add_by_hits(exp_row, label_, slope, task.out);
    }
  }

 private:
  std::vector<Real> padded_copy(const Real* vector) const {
    std::vector<Real> copy(padded(classes_));
    std::copy_n(vector, classes_, copy.begin());
    return copy;
  }

  const FairArguments& arguments_;
  const ClassOrder<Real>& order_;
  const std::vector<int64_t>& present_;
  const CrossEntropy<Real>& entropy_;
  double upstream_;
  Saved<Real> saved_;
  int64_t classes_;
  double ce_factor_;
  std::vector<Real> by_class_;
  std::vector<Real> v_;
  SurrogateGradient<Real> surrogate_;
  std::vector<Real> by_rates_;
  std::vector<Real> own_by_rates_;
  std::vector<Real> exps_;
  int64_t label_ = 0;
  Real scale_ = 0;
  Real common_ = 0;
  Real by_label_ = 0;
  double spec_slope_ = 0;
};

template <typename T>
void backward_problem(const FairArguments& arguments, int64_t problem, double upstream, const Saved<Accumulator<T>>& saved,
                      T* grad_logits) {
  using Real = Accumulator<T>;
  const auto logits = arguments.batch.logits<T>(problem);
  const auto order = arguments.batch.order<Real>(problem);
  const std::vector<int64_t> present = present_classes(order);
  const std::vector<Chunk> chunks = order.chunks();
  const auto entropy = arguments.cross_entropy(order, problem);
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    FairGradient<T> gradient(arguments, order, present, entropy, upstream, saved);
    const auto enter = [&](int64_t label) { gradient.enter(label); };
    const auto row = [&](const RowTask<Real>& task, int64_t) { gradient.row(task); };
    backward_chunks(logits, order, chunks.data() + begin, chunks.data() + end, enter, row, grad_logits);
  });
  clear_ignored(order, grad_logits);
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, double sym_weight,
                double spec_weight, double ce_weight, StringHandle reduction, double label_smoothing, int64_t ignore_index,
                double eps, StringHandle absent, StringHandle sym_reduction, StringHandle surrogate, double margin,
                bool return_parts, const Tensor& cross_entropy, const Tensor& symmetry, const Tensor& spectral,
                const Tensor& confusion, const Tensor& coefficients, const Tensor& u, const Tensor& v) {
  const FairOptions options{sym_weight,
                            spec_weight,
                            ce_weight,
                            take_reduction(reduction),
                            label_smoothing,
                            eps,
                            SymmetryOptions(absent, sym_reduction),
                            take_surrogate(surrogate),
                            margin,
                            return_parts};
  const FairArguments arguments(logits, labels, weight, options, ignore_index);
  (void)cross_entropy, (void)symmetry, (void)spectral, (void)confusion;
  const ConfusionArguments& batch = arguments.batch;
  const Shape shape = arguments.coefficients_shape();
  require_dtype(grad, batch.dtype, "grad");
  require_shape(grad, arguments.per_problem({}), "grad");
  const Dtype accumulator = accumulator_dtype(batch.dtype);
  const Tensor matrices = dense(coefficients, shape, accumulator, "coefficients");
  const Tensor left = dense(u, arguments.per_problem({batch.classes}), accumulator, "u");
  const Tensor right = dense(v, arguments.per_problem({batch.classes}), accumulator, "v");
  const Tensor grad_logits = empty(batch.shape, batch.dtype);
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(batch.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    const int64_t size = batch.samples * batch.classes;
    for_each_problem(batch.problems, size, [&](int64_t problem) {
      const double upstream = widen(data_of<T>(grad)[grad_offset(problem)]);
      const Saved<Real> saved{problem_matrix(data_of<Real>(matrices), shape, problem),
                              data_of<Real>(left) + problem * batch.classes, data_of<Real>(right) + problem * batch.classes};
      backward_problem(arguments, problem, upstream, saved, mutable_data_of<T>(grad_logits) + problem * size);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_fair_cross_entropy_native(Tensor logits, Tensor labels, Tensor? weight, float sym_weight, float spec_weight, "
      "float ce_weight, str reduction, float label_smoothing, int ignore_index, float eps, str absent, str sym_reduction, "
      "str surrogate, float margin, bool return_parts) -> (Tensor total, Tensor cross_entropy, Tensor symmetry, Tensor spectral, "
      "Tensor confusion, Tensor coefficients, Tensor u, Tensor v)");
  m.def(
      "_fair_cross_entropy_backward_native(Tensor grad, Tensor logits, Tensor labels, Tensor? weight, float sym_weight, "
      "float spec_weight, float ce_weight, str reduction, float label_smoothing, int ignore_index, float eps, str absent, "
      "str sym_reduction, str surrogate, float margin, bool return_parts, Tensor cross_entropy, Tensor symmetry, Tensor spectral, "
      "Tensor confusion, Tensor coefficients, Tensor u, Tensor v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_fair_cross_entropy_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_fair_cross_entropy_backward_native", TORCH_BOX(&fairkernels::backward));
}
