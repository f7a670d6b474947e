// pgd_step: checks and glue. The mathematics is in support/pgd_math.h, cpu/pgd_step.h and cuda/pgd_step.cuh.
#include "cpu/pgd_step.h"

#include "cuda/pgd_step.h"
#include "support/gpu.h"
#include "support/gpu_images.h"
#include "support/operands.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

template <typename T, typename Real>
void run(const PgdStep<Real>& pgd, Norm norm, const ImageWalk& images) {
  if (norm == Norm::linf) {
    parallel_ranges(images.chunks(), kChunk, [&](int64_t begin, int64_t end) { linf_chunks<T>(pgd, begin, end); });
  } else {
    parallel_ranges(images.samples(), pgd.elements,
                    [&](int64_t begin, int64_t end) { l2_samples<T>(pgd, begin, end); });
  }
}

#if defined(FK_WITH_CUDA)

void step_on_gpu(PgdStepTask& task, Norm norm, const Tensor& x) {
  if (norm == Norm::linf) {
    launch_on_device_of(x, [&](void* stream) { return fk_pgd_step_linf(&task, stream); });
    return;
  }
  const int64_t parts = fk_pgd_step_l2_parts(&task.shape);
  const Tensor sums = empty({task.samples, parts > 1 ? parts : 0, 3}, Dtype::float64, &x);
  task.sums = mutable_data_of<double>(sums);
  launch_on_device_of(x, [&](void* stream) { return fk_pgd_step_l2(&task, stream); });
}

#endif

void step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const OptionalTensor& alphas,
          const OptionalTensor& epsilons, const OptionalTensor& lows, const OptionalTensor& highs,
          const OptionalTensor& mask, double alpha, double eps, double low, double high, StringHandle norm_name,
          bool targeted, const Tensor& out) {
  const Norm norm = take_norm(norm_name);
  const Dtype dtype = float_dtype_of(x, "x");
  require_shape(out, shape_of(x), "out");
  const ImageWalk images(x, norm, false, strides_of(out));
  const Source x_adv_source = images.image(x_adv, dtype, "x_adv");
  const Source grad_source = images.image(grad, dtype, "grad");
  const Source x_source = images.image(x, dtype, "x");
  const Sink sink = images.result(out, dtype);
  const auto alpha_source = images.per_sample_parameter(alphas, "alphas");
  const auto eps_source = images.per_sample_parameter(epsilons, "epsilons");
  const auto low_source = images.parameter(lows, "lows");
  const auto high_source = images.parameter(highs, "highs");
  const auto mask_source = images.parameter(mask, "mask");
  if (x.numel() == 0) {
    return;
  }
#if defined(FK_WITH_CUDA)
  if (on_gpu(x)) {
    PgdStepTask task{};
    GpuImages operands(x, norm, strides_of(out));
    operands.image(x_adv, task.x_adv);
    operands.image(grad, task.grad);
    operands.image(x, task.x);
    operands.image(out, task.out);
    operands.parameter(alphas, alpha, task.alpha);
    operands.parameter(epsilons, eps, task.eps);
    operands.parameter(lows, low, task.low);
    operands.parameter(highs, high, task.high);
    operands.parameter(mask, 1, task.mask);
    task.shape = operands.shape(16 / size_of(dtype));
    task.samples = operands.samples();
    task.direction = targeted ? -1 : 1;
    step_on_gpu(task, norm, x);
    return;
  }
#endif
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    const auto parameter = [](double value, const std::unique_ptr<Source>& each) {
      return Parameter<Real>{static_cast<Real>(value), each.get()};
    };
    const PgdStep<Real> pgd{x_adv_source,
                            grad_source,
                            x_source,
                            parameter(alpha, alpha_source),
                            parameter(eps, eps_source),
                            parameter(low, low_source),
                            parameter(high, high_source),
                            parameter(1, mask_source),
                            static_cast<Real>(targeted ? -1 : 1),
                            sink,
                            images.elements()};
    run<T>(pgd, norm, images);
  });
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_pgd_step_native(Tensor x_adv, Tensor grad, Tensor x, Tensor? alphas, Tensor? epsilons, Tensor? lows, "
      "Tensor? highs, Tensor? mask, float alpha, float eps, float low, float high, str norm, bool targeted, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_pgd_step_native", TORCH_BOX(&fairkernels::step));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_pgd_step_native", TORCH_BOX(&fairkernels::step));
}
#endif
