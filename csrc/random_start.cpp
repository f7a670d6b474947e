// random_start: checks and glue. The mathematics is in support/start_math.h, cpu/random_start.h and
// cuda/random_start.cuh.
#include "cpu/random_start.h"

#include <algorithm>
#include <vector>

#include "cuda/random_start.h"
#include "support/gpu.h"
#include "support/gpu_images.h"
#include "support/operands.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

// Whether the elements fill one block of memory, each once, in some order of the dimensions.
bool fills_memory(const Shape& shape, const Shape& strides) {
  const std::vector<size_t> order = memory_order(strides);
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const size_t d = order[i];
    if (shape[d] != 1 && strides[d] != expected) {
      return false;
    }
    expected *= shape[d];
  }
  return true;
}

Tensor empty_like(const Tensor& x, Dtype dtype) {
  const Shape shape = shape_of(x);
  const Shape strides = strides_of(x);
  return empty_strided(shape, fills_memory(shape, strides) ? strides : contiguous_strides(shape), dtype, &x);
}

template <typename T, typename Real>
void run(const RandomStart<Real>& task, Norm norm, const ImageWalk& images) {
  if (norm == Norm::linf) {
    parallel_ranges(images.chunks(), kChunk, [&](int64_t begin, int64_t end) { linf_start<T>(task, begin, end); });
  } else {
    parallel_ranges(images.samples(), task.elements,
                    [&](int64_t begin, int64_t end) { l2_start<T>(task, begin, end); });
  }
}

#if defined(FK_WITH_CUDA)

void start_on_gpu(RandomStartTask& task, Norm norm, const Tensor& x) {
  if (norm == Norm::linf) {
    launch_on_device_of(x, [&](void* stream) { return fk_random_start_linf(&task, stream); });
    return;
  }
  const int64_t parts = fk_random_start_l2_parts(&task.shape);
  const Tensor sums = empty({task.samples, parts > 1 ? parts : 0}, Dtype::float64, &x);
  task.sums = mutable_data_of<double>(sums);
  launch_on_device_of(x, [&](void* stream) { return fk_random_start_l2(&task, stream); });
}

#endif

Tensor start(const Tensor& x, const OptionalTensor& epsilons, const OptionalTensor& lows, const OptionalTensor& highs,
             double eps, double low, double high, StringHandle norm_name, int64_t seed) {
  const Norm norm = take_norm(norm_name);
  const Dtype dtype = float_dtype_of(x, "x");
  const Tensor out = empty_like(x, dtype);
  const ImageWalk images(x, norm, true, strides_of(out));
  const Source x_source = images.image(x, dtype, "x");
  const Sink sink = images.result(out, dtype);
  const auto eps_source = images.per_sample_parameter(epsilons, "epsilons");
  const auto low_source = images.parameter(lows, "lows");
  const auto high_source = images.parameter(highs, "highs");
  if (x.numel() == 0) {
    return out;
  }
#if defined(FK_WITH_CUDA)
  if (on_gpu(x)) {
    RandomStartTask task{};
    GpuImages operands(x, norm, strides_of(out));
    operands.image(x, task.x);
    operands.parameter(epsilons, eps, task.eps);
    operands.parameter(lows, low, task.low);
    operands.parameter(highs, high, task.high);
    operands.numbers(task.numbers);
    operands.image(out, task.out);
    task.shape = operands.shape(16 / size_of(dtype));
    task.samples = operands.samples();
    task.elements = images.elements();
    task.seed = static_cast<uint64_t>(seed);
    start_on_gpu(task, norm, x);
    return out;
  }
#endif
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    const auto parameter = [](double value, const std::unique_ptr<Source>& each) {
      return Parameter<Real>{static_cast<Real>(value), each.get()};
    };
    const RandomStart<Real> task{x_source,
                                 parameter(eps, eps_source),
                                 parameter(low, low_source),
                                 parameter(high, high_source),
                                 static_cast<uint64_t>(seed),
                                 sink,
                                 images.elements()};
    run<T>(task, norm, images);
  });
  return out;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_random_start_native(Tensor x, Tensor? epsilons, Tensor? lows, Tensor? highs, float eps, float low, "
      "float high, str norm, int seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_random_start_native", TORCH_BOX(&fairkernels::start));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_random_start_native", TORCH_BOX(&fairkernels::start));
}
#endif
