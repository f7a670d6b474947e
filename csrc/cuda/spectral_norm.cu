#include "cuda/spectral_norm.cuh"

extern "C" int64_t fk_spectral_norm_scratch(const fairkernels::SpectralNormTask* task) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::spectral_scratch<fairkernels::Accumulator<decltype(type)>>(*task);
  });
}

extern "C" int fk_spectral_norm(const fairkernels::SpectralNormTask* task, void* stream) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::launch_spectral_norm<decltype(type)>(*task, stream);
  });
}

extern "C" int fk_spectral_norm_backward(const fairkernels::OuterProductTask* task, void* stream) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::launch_outer_product<decltype(type)>(*task, stream);
  });
}
