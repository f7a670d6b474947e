// fair_cross_entropy: checks and glue. The mathematics is in support/fair_terms.h and cuda/class_terms.cuh.
#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/bits.h"
#include "support/confusion_arguments.h"
#include "support/fair_terms.h"
#include "support/gpu_classes.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

class FairArguments {
 public:
  FairArguments(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, const FairOptions& options,
                int64_t ignore_index)
      : options(options),
        batch(logits, labels, std::nullopt, 1.0, ignore_index),
        weight_(weight),
        weight_offset_(checked_weight(logits), weight ? 1 : 2) {}

  // In blocks only for the pass that keeps the exponentials.
  template <typename T>
  FairProblem<T> problem(int64_t index, int64_t block = std::numeric_limits<int64_t>::max()) const {
    using Real = Accumulator<T>;
    std::vector<Real> weight(weight_ ? batch.classes : 0);
    if (weight_) {
      with_float_type(float_dtype_of(*weight_, "weight"), [&](auto type) {
        const auto* data = data_of<decltype(type)>(*weight_) + weight_offset_(index);
        load(data, weight_->stride(-1), batch.classes, weight.data());
      });
    }
    return FairProblem<T>(options, batch.logits<T>(index), batch.order<Real>(index, block), std::move(weight));
  }

  int64_t elements() const { return batch.samples * batch.classes; }  // of one problem
  bool in_double() const { return batch.dtype == Dtype::float64; }

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
    require_device_of(logits, "logits", *weight_, "weight");
    return *weight_;
  }

  OptionalTensor weight_;
  ProblemOffset weight_offset_;
};

using AllResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

#if defined(FK_WITH_CUDA)

ClassTask fair_task(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, const FairOptions& options,
                    int64_t ignore_index) {
  ClassTask task = class_task(logits, labels, 1.0, ignore_index);
  task.weight = class_operand(weight, 1);
  task.wants_cross_entropy = options.wants_cross_entropy();
  task.mean_of_samples = options.reduction == Reduction::mean;
  task.ce_weight = options.ce_weight;
  task.label_smoothing = options.label_smoothing;
  task.wants_symmetry = options.wants_symmetry();
  task.mean_of_pairs = options.symmetry.reduction == Reduction::mean;
  task.ignores_absent = options.symmetry.absent == Absent::ignore;
  task.sym_weight = options.sym_weight;
  task.eps = options.eps;
  task.wants_spectral = options.wants_spectral();
  task.divides_u = true;
  task.surrogate = options.surrogate;
  task.margin = options.margin;
  task.spec_weight = options.spec_weight;
  task.iteration = iteration_options(true, task.logits.dtype == Dtype::float64);
  return task;
}

#endif

struct Results {
  Results(const FairArguments& arguments, const Tensor& logits)
      : accumulator(accumulator_dtype(arguments.batch.dtype)),
        total(empty(arguments.per_problem({}), arguments.batch.dtype, &logits)),
        cross_entropy(empty(arguments.per_problem({}), accumulator, &logits)),
        symmetry(empty(arguments.per_problem({}), accumulator, &logits)),
        spectral(empty(arguments.per_problem({}), accumulator, &logits)),
        confusion(empty(arguments.confusion_shape(), accumulator, &logits)),
        coefficients(empty(arguments.coefficients_shape(), accumulator, &logits)),
        u(empty(arguments.per_problem({arguments.batch.classes}), accumulator, &logits)),
        v(empty(arguments.per_problem({arguments.batch.classes}), accumulator, &logits)),
        coefficients_shape_(arguments.coefficients_shape()) {}

  template <typename Real>
  FairMatrices<Real> matrices(const FairArguments& arguments, int64_t problem) const {
    const int64_t classes = arguments.batch.classes;
    return {problem_matrix(mutable_data_of<Real>(coefficients), coefficients_shape_, problem),
            mutable_data_of<Real>(u) + problem * classes, mutable_data_of<Real>(v) + problem * classes,
            mutable_data_of<Real>(confusion) + (arguments.options.return_parts ? problem * classes * classes : 0)};
  }

  template <typename T>
  void put(const FairValues& values, int64_t problem) const {
    using Real = Accumulator<T>;
    mutable_data_of<T>(total)[problem] = narrow(values.total, T{});
    mutable_data_of<Real>(cross_entropy)[problem] = static_cast<Real>(values.cross_entropy);
    mutable_data_of<Real>(symmetry)[problem] = static_cast<Real>(values.symmetry);
    mutable_data_of<Real>(spectral)[problem] = static_cast<Real>(values.spectral);
  }

  AllResults all() const { return {total, cross_entropy, symmetry, spectral, confusion, coefficients, u, v}; }

#if defined(FK_WITH_CUDA)
  void take_places(const FairOptions& options, ClassTask& task) const {
    task.total = results_of(total);
    task.cross_entropy = results_of(cross_entropy);
    task.symmetry = results_of(symmetry);
    task.spectral = results_of(spectral);
    task.confusion = options.return_parts ? results_of(confusion) : nullptr;
    task.coefficients = options.wants_symmetry() ? results_of(coefficients) : nullptr;
    task.u = results_of(u);
    task.v = results_of(v);
  }
#endif

  // What no class writes, memory being fresh.
  template <typename Real>
  void clear(const FairArguments& arguments, int64_t present, const FairMatrices<Real>& matrices) const {
    const int64_t classes = arguments.batch.classes;
    if (arguments.options.wants_symmetry()) {
      clear_unused(matrices.coefficients, coefficients_shape_, present, arguments.options.compact() ? present : classes);
    }
    if (arguments.options.return_parts) {
      std::fill_n(matrices.confusion, classes * classes, Real(0));
    }
    std::fill_n(matrices.u, classes, Real(0));
    std::fill_n(matrices.v, classes, Real(0));
  }

  Dtype accumulator;
  Tensor total;
  Tensor cross_entropy;
  Tensor symmetry;
  Tensor spectral;
  Tensor confusion;
  Tensor coefficients;
  Tensor u;
  Tensor v;

 private:
  Shape coefficients_shape_;
};

FairOptions fair_options(double sym_weight, double spec_weight, double ce_weight, StringHandle reduction, double label_smoothing,
                         double eps, StringHandle absent, StringHandle sym_reduction, StringHandle surrogate, double margin,
                         bool return_parts) {
  const Reduction of_samples = reduction_named(take_string(reduction));
  const SymmetryOptions symmetry(absent, sym_reduction);
  const Surrogate named = surrogate_named(take_string(surrogate));
  return {sym_weight, spec_weight, ce_weight, of_samples, label_smoothing, eps, symmetry, named, margin, return_parts};
}

// All options in one text, words in the order of the operator's arguments, of a float its bits: to receive twelve arguments
// takes longer than a small problem does, and this one is only read again when it has changed.
class OptionText {
 public:
  void read(StringHandle handle) {
    const std::string text = take_string(handle);
    if (!options_ || text != text_) {
      parse(text);
    }
  }

  const FairOptions& options() const { return *options_; }
  int64_t ignore_index() const { return ignore_index_; }

 private:
  void parse(const std::string& text) {
    std::istringstream words(text);
    const std::vector<std::string> word{std::istream_iterator<std::string>(words), {}};
    require(word.size() == 12, "options must be 12 words, got ", text);
    const auto number = [&](size_t i) { return bits_as<double>(static_cast<uint64_t>(std::stoull(word[i]))); };
    const FairOptions options{number(0), number(1), number(2), reduction_named(word[3]), number(4), number(6),
                              SymmetryOptions(word[7], word[8]), surrogate_named(word[9]), number(10), false};
    ignore_index_ = std::stoll(word[5]);
    options_.emplace(options);
    text_ = text;
  }

  std::string text_;
  std::optional<FairOptions> options_;
  int64_t ignore_index_ = 0;
};

AllResults forward(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, double sym_weight, double spec_weight,
    double ce_weight, StringHandle reduction, double label_smoothing, int64_t ignore_index, double eps, StringHandle absent,
    StringHandle sym_reduction, StringHandle surrogate, double margin, bool return_parts) {
  const FairOptions options = fair_options(sym_weight, spec_weight, ce_weight, reduction, label_smoothing, eps, absent,
                                           sym_reduction, surrogate, margin, return_parts);
  const FairArguments arguments(logits, labels, weight, options, ignore_index);
  const Results results(arguments, logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = fair_task(logits, labels, weight, options, ignore_index);
    results.take_places(options, task);
    run_class_terms(task, logits);
    return results.all();
  }
#endif
  with_float_type(arguments.batch.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_problem(arguments.batch.problems, arguments.elements(), [&](int64_t index) {
      const auto problem = arguments.problem<T>(index);
      const auto matrices = results.matrices<Accumulator<T>>(arguments, index);
      results.clear(arguments, problem.order.present.size(), matrices);
      results.put<T>(fair_forward(problem, arguments.in_double(), matrices, nullptr), index);
    });
  });
  return results.all();
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& weight, double sym_weight,
                double spec_weight, double ce_weight, StringHandle reduction, double label_smoothing, int64_t ignore_index,
                double eps, StringHandle absent, StringHandle sym_reduction, StringHandle surrogate, double margin,
                bool return_parts, const Tensor& coefficients, const Tensor& u, const Tensor& v) {
  const FairOptions options = fair_options(sym_weight, spec_weight, ce_weight, reduction, label_smoothing, eps, absent,
                                           sym_reduction, surrogate, margin, return_parts);
  const FairArguments arguments(logits, labels, weight, options, ignore_index);
  const ConfusionArguments& batch = arguments.batch;
  const Shape shape = arguments.coefficients_shape();
  require_dtype(grad, batch.dtype, "grad");
  require_shape(grad, arguments.per_problem({}), "grad");
  const Dtype accumulator = accumulator_dtype(batch.dtype);
  const Tensor saved = dense(coefficients, shape, accumulator, "coefficients");
  const Tensor left = dense(u, arguments.per_problem({batch.classes}), accumulator, "u");
  const Tensor right = dense(v, arguments.per_problem({batch.classes}), accumulator, "v");
  const Tensor grad_logits = empty(batch.shape, batch.dtype, &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = fair_task(logits, labels, weight, options, ignore_index);
    task.grad = class_operand(grad, 0);
    task.coefficients = const_cast<void*>(saved.const_data_ptr());
    task.u = const_cast<void*>(left.const_data_ptr());
    task.v = const_cast<void*>(right.const_data_ptr());
    run_class_gradient(task, logits, grad_logits);
    return grad_logits;
  }
#endif
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(batch.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    for_each_problem(batch.problems, arguments.elements(), [&](int64_t index) {
      const double upstream = widen(data_of<T>(grad)[grad_offset(index)]);
      const FairMatrices<const Real> matrices{problem_matrix(data_of<Real>(saved), shape, index),
                                              data_of<Real>(left) + index * batch.classes,
                                              data_of<Real>(right) + index * batch.classes, nullptr};
      T* out = mutable_data_of<T>(grad_logits) + index * arguments.elements();
      fair_backward(arguments.problem<T>(index), upstream, matrices, out);
    });
  });
  return grad_logits;
}

// The value of one problem and its gradient. The exponentials are kept in between, where they are all it takes and have the
// gradient's type.
template <typename T>
double with_gradient_of(const FairArguments& arguments, int64_t index, T* gradient) {
  using Real = Accumulator<T>;
  const FairOptions& options = arguments.options;
  const int64_t classes = arguments.batch.classes;
  const bool keeps = std::is_same_v<T, Real> && options.through_softmax();
  const auto problem = arguments.problem<T>(index, keeps ? block_of(arguments.batch.samples, classes) : arguments.batch.samples);
  const int64_t rows = options.wants_symmetry() ? problem.order.present.size() : 0;
  const int64_t columns = options.compact() ? rows : classes;
  const std::unique_ptr<Real[]> coefficients(new Real[rows * columns]);
  const std::unique_ptr<Real[]> u(new Real[options.wants_spectral() ? classes : 0]);
  const std::unique_ptr<Real[]> v(new Real[options.wants_spectral() ? classes : 0]);
  const FairMatrices<Real> matrices{{coefficients.get(), columns, 1}, u.get(), v.get(), nullptr};
  const FairMatrices<const Real> derivatives{{coefficients.get(), columns, 1}, u.get(), v.get(), nullptr};
  if constexpr (std::is_same_v<T, Real>) {
    if (options.through_softmax()) {
      KeptExps<Real> kept{gradient, std::vector<Real>(arguments.batch.samples)};
      const FairValues values = fair_forward(problem, arguments.in_double(), matrices, &kept);
      fair_backward(problem, derivatives, kept);
      return values.total;
    }
  }
  const FairValues values = fair_forward(problem, arguments.in_double(), matrices, nullptr);
  fair_backward(problem, 1.0, derivatives, gradient);
  return values.total;
}

#if defined(FK_WITH_CUDA)

// Both directions, one after the other.
std::tuple<Tensor, Tensor> with_gradient_on_gpu(const FairArguments& arguments, const Tensor& logits, const Tensor& labels,
                                                const OptionalTensor& weight, int64_t ignore_index) {
  const FairOptions& options = arguments.options;
  const Results results(arguments, logits);
  const Tensor gradient = empty(arguments.batch.shape, arguments.batch.dtype, &logits);
  ClassTask task = fair_task(logits, labels, weight, options, ignore_index);
  results.take_places(options, task);
  run_class_terms(task, logits);
  run_class_gradient(task, logits, gradient);  // with no upstream gradient: 1
  return {results.total, gradient};
}

#endif

std::tuple<Tensor, Tensor> with_gradient(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight,
                                         StringHandle options) {
  thread_local OptionText text;
  text.read(options);
  const FairArguments arguments(logits, labels, weight, text.options(), text.ignore_index());
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    return with_gradient_on_gpu(arguments, logits, labels, weight, text.ignore_index());
  }
#endif
  const Tensor total = empty(arguments.per_problem({}), arguments.batch.dtype);
  const Tensor gradient = empty(arguments.batch.shape, arguments.batch.dtype);
  with_float_type(arguments.batch.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_problem(arguments.batch.problems, arguments.elements(), [&](int64_t index) {
      T* out = mutable_data_of<T>(gradient) + index * arguments.elements();
      mutable_data_of<T>(total)[index] = narrow(with_gradient_of<T>(arguments, index, out), T{});
    });
  });
  return {total, gradient};
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
      "str sym_reduction, str surrogate, float margin, bool return_parts, Tensor coefficients, Tensor u, Tensor v) -> Tensor");
  m.def(
      "_fair_cross_entropy_with_gradient_native(Tensor logits, Tensor labels, Tensor? weight, str options) -> "
      "(Tensor total, Tensor gradient)");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_fair_cross_entropy_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_fair_cross_entropy_backward_native", TORCH_BOX(&fairkernels::backward));
  m.impl("_fair_cross_entropy_with_gradient_native", TORCH_BOX(&fairkernels::with_gradient));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_fair_cross_entropy_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_fair_cross_entropy_backward_native", TORCH_BOX(&fairkernels::backward));
  m.impl("_fair_cross_entropy_with_gradient_native", TORCH_BOX(&fairkernels::with_gradient));
}
#endif
