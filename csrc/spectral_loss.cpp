// spectral_loss: checks and glue. The mathematics is in cpu/spectral_loss.h, cpu/spectral_norm.h and cpu/sparse_norm.h.
#include "cpu/spectral_loss.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/sparse_norm.h"
#include "cpu/spectral_norm.h"
#include "support/confusion_arguments.h"
#include "support/parallel.h"
#include "support/spectral_options.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

Surrogate take_surrogate(StringHandle handle) {
  const std::string name = take_string(handle);
  const bool known = name == "kl" || name == "kl-all" || name == "soft" || name == "gated";
  require(known, "surrogate must be kl, kl-all, soft or gated, got ", name);
  return name == "kl" ? Surrogate::kl : name == "kl-all" ? Surrogate::kl_all : name == "soft" ? Surrogate::soft : Surrogate::gated;
}

class LossArguments {
 public:
  LossArguments(const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight, const OptionalTensor& start,
                Surrogate surrogate, double margin, int64_t ignore_index)
      : batch(logits, labels, std::nullopt, 1.0, ignore_index),
        vectors(reshaped(batch.shape, 2, {batch.classes})),
        class_weights(class_weight, vectors, "class_weight"),
        starts(start, vectors, "start"),
        surrogate(surrogate),
        margin(margin) {}

  // What each row of the matrix is multiplied by.
  template <typename Real>
  Vector row_factors(const ClassOrder<Real>& order, int64_t problem) const {
    const double total = std::accumulate(order.count.begin(), order.count.end(), 0.0);
    const Vector weights = class_weights(problem);
    Vector factors(batch.classes);
    for (int64_t label = 0; label < batch.classes; ++label) {
      const double count = surrogate == Surrogate::kl_all ? total : order.count[label];
      factors[label] = inverse_count(count) * (weights.empty() ? 1 : weights[label]);
    }
    return factors;
  }

  const ConfusionArguments batch;
  const Shape vectors;
  const SideVectors class_weights;
  const SideVectors starts;
  const Surrogate surrogate;
  const double margin;
};

// The leading pair of one problem's matrix, its vectors those of the rows and columns listed.
struct CompactPair {
  LeadingPair pair;
  std::vector<int64_t> rows;
  std::vector<int64_t> columns;  // empty: all
};

template <typename T>
CompactPair dense_pair(const LossArguments& arguments, int64_t problem, const ClassOrder<Accumulator<T>>& order,
                       const IterationOptions& options) {
  const int64_t classes = arguments.batch.classes;
  const auto logits = arguments.batch.logits<T>(problem);
  const Vector factors = arguments.row_factors(order, problem);
  const Vector hint = arguments.starts(problem);
  const std::vector<int64_t> present = present_classes(order);
  const int64_t n = present.size();
  PackedMatrix<Accumulator<T>> matrix(n, classes);
  parallel_ranges(n, classes * (arguments.batch.samples / std::max<int64_t>(n, 1) + 1), [&](int64_t begin, int64_t end) {
    SurrogateSum<T> sum(logits, arguments.surrogate, arguments.margin);
    for (int64_t i = begin; i < end; ++i) {
      scale_row(sum(order, present[i]), factors[present[i]], classes, matrix.row(i));
    }
  });
  return {leading_pair(matrix, options, hint.empty() ? nullptr : hint.data(), Threads{}), present, {}};
}

// The columns that occur in any row.
std::vector<int64_t> used_columns(const std::vector<std::vector<Entry>>& rows) {
  std::vector<int64_t> columns;
  for (const auto& row : rows) {
    for (const Entry& entry : row) {
      columns.push_back(entry.column);
    }
  }
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  return columns;
}

SparseMatrix compress(const std::vector<std::vector<Entry>>& rows, const std::vector<int64_t>& columns) {
  SparseMatrix matrix;
  matrix.columns = columns.size();
  for (const auto& row : rows) {
    for (const Entry& entry : row) {
      matrix.column.push_back(std::lower_bound(columns.begin(), columns.end(), entry.column) - columns.begin());
      matrix.value.push_back(entry.value);
    }
    matrix.start.push_back(matrix.entries());
  }
  return matrix;
}

template <typename T>
CompactPair sparse_pair(const LossArguments& arguments, int64_t problem, const ClassOrder<Accumulator<T>>& order,
                        const IterationOptions& options) {
  const auto logits = arguments.batch.logits<T>(problem);
  const Vector factors = arguments.row_factors(order, problem);
  const Vector hint = arguments.starts(problem);
  const std::vector<int64_t> present = present_classes(order);
  const int64_t n = present.size();
  std::vector<std::vector<Entry>> rows(n);
  const int64_t elements_each = arguments.batch.classes * (arguments.batch.samples / std::max<int64_t>(n, 1) + 1);
  parallel_ranges(n, elements_each, [&](int64_t begin, int64_t end) {
    RivalSum<T> sum(logits, arguments.margin);
    for (int64_t i = begin; i < end; ++i) {
      rows[i] = sum(order, present[i]);
      for (Entry& entry : rows[i]) {
        entry.value *= factors[present[i]];
      }
    }
  });
  const std::vector<int64_t> columns = used_columns(rows);
  SparseMatrix matrix = compress(rows, columns);
  Vector start(hint.empty() ? 0 : columns.size());
  std::transform(columns.begin(), columns.begin() + start.size(), start.begin(), [&](int64_t j) { return hint[j]; });
  const double* first = start.empty() ? nullptr : start.data();
  if (!is_dense(matrix)) {
    return {leading_pair(matrix, options, first), present, columns};
  }
  auto dense = to_dense<Accumulator<T>>(matrix);
  return {leading_pair(dense, options, first, Threads{}), present, columns};
}

// The vector of all classes, 0 at those that are not listed; NaN throughout if sigma is.
template <typename Real>
void scatter(const Vector& compact, const std::vector<int64_t>& listed, double sigma, int64_t classes, Real* out) {
  std::fill_n(out, classes, static_cast<Real>(0 * (sigma - sigma)));
  for (size_t i = 0; i < listed.size(); ++i) {
    out[listed[i]] = static_cast<Real>(compact[i]);
  }
}

template <typename T>
void forward_problem(const LossArguments& arguments, int64_t problem, const IterationOptions& options, T& loss,
                     Accumulator<T>* u, Accumulator<T>* v) {
  const int64_t classes = arguments.batch.classes;
  const auto order = arguments.batch.order<Accumulator<T>>(problem);
  const bool sparse = arguments.surrogate == Surrogate::kl;
  const CompactPair found = sparse ? sparse_pair<T>(arguments, problem, order, options)
                                   : dense_pair<T>(arguments, problem, order, options);
  loss = narrow(found.pair.sigma, T{});
  scatter(found.pair.u, found.rows, found.pair.sigma, classes, u);
  if (sparse) {
    scatter(found.pair.v, found.columns, found.pair.sigma, classes, v);
  } else {
    std::copy(found.pair.v.begin(), found.pair.v.end(), v);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight,
                                           const OptionalTensor& start, StringHandle surrogate, double margin,
                                           int64_t ignore_index, StringHandle method, std::optional<int64_t> iters,
                                           std::optional<double> tol) {
  const Surrogate kind = take_surrogate(surrogate);
  const IterationOptions options = take_iteration(method, iters, tol, float_dtype_of(logits, "logits"));
  const LossArguments arguments(logits, labels, class_weight, start, kind, margin, ignore_index);
  const ConfusionArguments& batch = arguments.batch;
  const Tensor loss = empty(reshaped(batch.shape, 2, {}), batch.dtype);
  const Tensor u = empty(arguments.vectors, accumulator_dtype(batch.dtype));
  const Tensor v = empty(arguments.vectors, accumulator_dtype(batch.dtype));
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
  Vector slopes = arguments.row_factors(order, problem);
  for (int64_t label = 0; label < classes; ++label) {
    slopes[label] *= grad * u[label];
  }
  std::vector<Real> right(padded(classes));
  std::copy_n(v, classes, right.begin());
  const std::vector<Chunk> chunks = order.chunks();
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    SurrogateGradient<T> gradient(logits, arguments.surrogate, arguments.margin, right.data(), slopes.data());
    for (int64_t i = begin; i < end; ++i) {
      gradient(chunks[i], &order.sample[chunks[i].first], grad_logits);
    }
  });
  clear_ignored(order, grad_logits);
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& class_weight,
                const OptionalTensor& start, StringHandle surrogate, double margin, int64_t ignore_index, StringHandle method,
                std::optional<int64_t> iters, std::optional<double> tol, const Tensor& u, const Tensor& v) {
  const Surrogate kind = take_surrogate(surrogate);
  take_iteration(method, iters, tol, float_dtype_of(logits, "logits"));
  const LossArguments arguments(logits, labels, class_weight, start, kind, margin, ignore_index);
  const ConfusionArguments& batch = arguments.batch;
  require_dtype(grad, batch.dtype, "grad");
  require_shape(grad, reshaped(batch.shape, 2, {}), "grad");
  const Tensor left = dense(u, arguments.vectors, accumulator_dtype(batch.dtype), "u");
  const Tensor right = dense(v, arguments.vectors, accumulator_dtype(batch.dtype), "v");
  const Tensor grad_logits = empty(batch.shape, batch.dtype);
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
