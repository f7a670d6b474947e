// same_class_mixup: checks and glue. The search for partners and the mixing are in cpu/same_class_mixup.h.
#include "cpu/same_class_mixup.h"

#include <tuple>
#include <vector>

#include "support/operands.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

template <typename Real>
std::vector<Real> load_shares(const OptionalTensor& lams, double lam, int64_t samples) {
  std::vector<Real> shares(samples, static_cast<Real>(lam));
  if (lams) {
    require_shape(*lams, {samples}, "lams");
    with_float_type(float_dtype_of(*lams, "lams"), [&](auto type) {
      load(data_of<decltype(type)>(*lams), lams->stride(0), samples, shares.data());
    });
  }
  return shares;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& labels, const OptionalTensor& lams, double lam,
                                   int64_t seed) {
  const Dtype dtype = float_dtype_of(x, "x");
  require(x.dim() >= 1, "x must be [B, ...], got []");
  const int64_t samples = x.size(0);
  require_dtype(labels, Dtype::int64, "labels");
  require_shape(labels, {samples}, "labels");
  const Tensor mixed = torch::stable::empty_like(x);
  const Tensor partner = empty({samples}, Dtype::int64);
  const ImageWalk images(x, Norm::l2, false, strides_of(mixed));  // sample by sample, as for that norm
  const Source source = images.image(x, dtype, "x");
  const Sink sink = images.result(mixed, dtype);
  int64_t* partners = mutable_data_of<int64_t>(partner);
  find_partners({data_of<int64_t>(labels), labels.stride(0), samples}, static_cast<uint64_t>(seed), partners);
  with_float_type(dtype, [&](auto type) {
    using Real = Accumulator<decltype(type)>;
    const std::vector<Real> shares = load_shares<Real>(lams, lam, samples);
    const Mixup<Real> task{source, partners, shares.data(), sink, images.elements()};
    parallel_ranges(samples, task.elements, [&](int64_t begin, int64_t end) { mix_samples<decltype(type)>(task, begin, end); });
  });
  return {mixed, partner};
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_same_class_mixup_native(Tensor x, Tensor labels, Tensor? lams, float lam, int seed) "
      "-> (Tensor mixed, Tensor partner)");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_same_class_mixup_native", TORCH_BOX(&fairkernels::forward));
}
