// spectral_loss: checks and glue. The mathematics is in cpu/spectral_loss.h, cpu/spectral_norm.h, cpu/sparse_norm.h and
// cuda/class_terms.cuh.
#include "cpu/spectral_loss.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "support/confusion_arguments.h"
#include "support/gpu_classes.h"
#include "support/parallel.h"
#include "support/spectral_options.h"
#include "support/spectral_terms.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

class LossArguments {
 public:
  LossArguments(const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight, const OptionalTensor& start,
                Surrogate surrogate, double margin, int64_t ignore_index)
      : batch(logits, labels, std::nullopt, 1.0, ignore_index),
        vectors(reshaped(batch.shape, 2, {batch.classes})),
        class_weights(class_weight, vectors, "class_weight", logits, "logits"),
        starts(start, vectors, "start", logits, "logits"),
        surrogate(surrogate),
        margin(margin) {}

  // What the row of a class is multiplied by, a function of the class.
  template <typename Real>
  auto row_factor(const ClassOrder<Real>& order, int64_t problem) const {
    return [this, &order, weights = class_weights(problem)](int64_t label) {
      const double count = surrogate == Surrogate::kl_all ? order.counted : order.count(label);
      return inverse_count(count) * (weights.empty() ? 1 : weights[label]);
    };
  }

  const ConfusionArguments batch;
  const Shape vectors;
  const SideVectors class_weights;
  const SideVectors starts;
  const Surrogate surrogate;
  const double margin;
};

#if defined(FK_WITH_CUDA)

ClassTask spectral_task(const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight,
                        const LossArguments& arguments, const IterationOptions& options, int64_t ignore_index) {
  ClassTask task = class_task(logits, labels, 1.0, ignore_index);
  task.class_weight = class_operand(class_weight, 1);
  task.wants_spectral = true;
  task.surrogate = arguments.surrogate;
  task.margin = arguments.margin;
  task.spec_weight = 1;
  task.iteration = options;
  return task;
}

#endif

// Of the rows of the matrix, [begin, end).
template <typename T, typename Factor>
void dense_rows(const LossArguments& arguments, const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order,
                const std::vector<int64_t>& present, const Factor& row_factor, int64_t begin, int64_t end,
                PackedMatrix<Accumulator<T>>& matrix) {
  ExpChunk<T> rows(logits, order.most_rows);
  SurrogateSum<Accumulator<T>> sum(arguments.surrogate, arguments.margin, logits.classes, order.most_rows);
  for (int64_t i = begin; i < end; ++i) {
    sum.clear();
    order.for_each_chunk(order.group(present[i]), [&](Chunk chunk) {
      rows.compute(order, chunk);
      sum.add(rows, chunk);
    });
    sum.take(present[i], row_factor(present[i]), matrix.row(i));
  }
}

// The same for "kl", whose samples without an error need no exponentials.
template <typename T, typename Factor>
void sparse_rows(const LossArguments& arguments, const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order,
                 const std::vector<int64_t>& present, const Factor& row_factor, int64_t begin, int64_t end,
                 std::vector<std::vector<Entry>>& entries) {
  RowReader<T> reader(logits, 1);
  RivalSum<Accumulator<T>> sum(arguments.margin, logits.classes);
  for (int64_t i = begin; i < end; ++i) {
    sum.clear();
    const ClassGroup group = order.group(present[i]);
    for (int64_t at = group.first; at < group.first + group.rows; ++at) {
      sum.add(reader(order.sample[at], 0), group.label);
    }
    entries[i] = sum.take(row_factor(present[i]));
  }
}

template <typename T>
void forward_problem(const LossArguments& arguments, int64_t problem, const IterationOptions& options, T& loss,
                     Accumulator<T>* u, Accumulator<T>* v) {
  const int64_t classes = arguments.batch.classes;
  const auto logits = arguments.batch.logits<T>(problem);
  const auto order = arguments.batch.order<Accumulator<T>>(problem);
  const auto row_factor = arguments.row_factor(order, problem);
  const std::vector<int64_t>& present = order.present;
  const int64_t n = present.size();
  SurrogateMatrix<Accumulator<T>> matrix(arguments.surrogate, n, classes);
  parallel_ranges(n, classes * (arguments.batch.samples / std::max<int64_t>(n, 1) + 1), [&](int64_t begin, int64_t end) {
    if (matrix.sparse) {
      sparse_rows(arguments, logits, order, present, row_factor, begin, end, matrix.entries);
    } else {
      dense_rows(arguments, logits, order, present, row_factor, begin, end, matrix.dense);
    }
  });
  const SurrogatePair found = leading_pair(matrix, options, arguments.starts(problem));
  loss = narrow(found.pair.sigma, T{});
  scatter_pair(found, present, matrix.sparse, classes, u, v);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight,
                                           const OptionalTensor& start, StringHandle surrogate, double margin,
                                           int64_t ignore_index, StringHandle method, std::optional<int64_t> iters,
                                           std::optional<double> tol) {
  const Surrogate kind = surrogate_named(take_string(surrogate));
  const IterationOptions options = take_iteration(method, iters, tol, float_dtype_of(logits, "logits"));
  const LossArguments arguments(logits, labels, class_weight, start, kind, margin, ignore_index);
  const ConfusionArguments& batch = arguments.batch;
  const Tensor loss = empty(reshaped(batch.shape, 2, {}), batch.dtype, &logits);
  const Tensor u = empty(arguments.vectors, accumulator_dtype(batch.dtype), &logits);
  const Tensor v = empty(arguments.vectors, accumulator_dtype(batch.dtype), &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = spectral_task(logits, labels, class_weight, arguments, options, ignore_index);
    task.start = class_operand(start, 1);
    task.total = results_of(loss);
    task.u = results_of(u);
    task.v = results_of(v);
    run_class_terms(task, logits);
    return {loss, u, v};
  }
#endif
  with_float_type(batch.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    for_each_problem(batch.problems, batch.samples * batch.classes, [&](int64_t problem) {
      forward_problem(arguments, problem, options, mutable_data_of<T>(loss)[problem],
                      mutable_data_of<Real>(u) + problem * batch.classes, mutable_data_of<Real>(v) + problem * batch.classes);
    });
  });
  return {loss, u, v};
}

template <typename T>
void backward_problem(const LossArguments& arguments, int64_t problem, double grad, const Accumulator<T>* u,
                      const Accumulator<T>* v, T* grad_logits) {
  using Real = Accumulator<T>;
  const int64_t classes = arguments.batch.classes;
  const auto logits = arguments.batch.logits<T>(problem);
  const auto order = arguments.batch.order<Real>(problem);
  const auto row_factor = arguments.row_factor(order, problem);
  std::vector<Real> right(padded(classes));
  std::copy_n(v, classes, right.begin());
  const std::vector<Chunk> chunks = order.chunks();
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    SurrogateGradient<Real> surrogate(arguments.surrogate, arguments.margin, classes, right.data());
    std::vector<Real> by_rates(padded(classes));
    std::vector<Real> exps(padded(classes));
    int64_t label = 0;
    double slope = 0;
    const auto enter = [&](int64_t entered) {
      label = entered;
      slope = row_factor(label) * grad * u[label];
    };
    const auto row = [&](const RowTask<Real>& task, int64_t) {
      if (arguments.surrogate == Surrogate::kl) {
        std::fill_n(task.out, classes, Real(0));
        surrogate.add_by_rival(task.logits, label, slope, task.out);
        return;
      }
      std::fill(by_rates.begin(), by_rates.end(), Real(0));
      if (surrogate.through_rates()) {
        surrogate.add_by_rates(task.logits, label, 1, by_rates.data());
      }
      const Real scale = static_cast<Real>(slope);
      const ExpRow<Real> exp_row = softmax_backward(task, classes, Real(1), by_rates.data(), scale, Real(0), exps.data());
      if (!surrogate.through_rates()) {
        surrogate.add_by_hits(exp_row, label, slope, task.out);
      }
    };
    backward_chunks(logits, order, chunks.data() + begin, chunks.data() + end, enter, row, grad_logits);
  });
  clear_ignored(order, grad_logits);
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight,
                const OptionalTensor& start, StringHandle surrogate, double margin, int64_t ignore_index, StringHandle method,
                std::optional<int64_t> iters, std::optional<double> tol, const Tensor& u, const Tensor& v) {
  const Surrogate kind = surrogate_named(take_string(surrogate));
  [[maybe_unused]] const IterationOptions options = take_iteration(method, iters, tol, float_dtype_of(logits, "logits"));
  const LossArguments arguments(logits, labels, class_weight, start, kind, margin, ignore_index);
  const ConfusionArguments& batch = arguments.batch;
  require_dtype(grad, batch.dtype, "grad");
  require_shape(grad, reshaped(batch.shape, 2, {}), "grad");
  const Tensor left = dense(u, arguments.vectors, accumulator_dtype(batch.dtype), "u");
  const Tensor right = dense(v, arguments.vectors, accumulator_dtype(batch.dtype), "v");
  const Tensor grad_logits = empty(batch.shape, batch.dtype, &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = spectral_task(logits, labels, class_weight, arguments, options, ignore_index);
    task.grad = class_operand(grad, 0);
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
    const int64_t size = batch.samples * batch.classes;
    for_each_problem(batch.problems, size, [&](int64_t problem) {
      const double upstream = widen(data_of<T>(grad)[grad_offset(problem)]);
      backward_problem(arguments, problem, upstream, data_of<Real>(left) + problem * batch.classes,
                       data_of<Real>(right) + problem * batch.classes, mutable_data_of<T>(grad_logits) + problem * size);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_spectral_loss_native(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? start, str surrogate, float margin, "
      "int ignore_index, str method, int? iters, float? tol) -> (Tensor loss, Tensor u, Tensor v)");
  m.def(
      "_spectral_loss_backward_native(Tensor grad, Tensor logits, Tensor labels, Tensor? class_weight, Tensor? start, "
      "str surrogate, float margin, int ignore_index, str method, int? iters, float? tol, Tensor u, Tensor v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_spectral_loss_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_spectral_loss_backward_native", TORCH_BOX(&fairkernels::backward));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_spectral_loss_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_spectral_loss_backward_native", TORCH_BOX(&fairkernels::backward));
}
#endif
