// pgd_step: checks and glue. The mathematics is in cpu/pgd_step.h.
#include "cpu/pgd_step.h"

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
