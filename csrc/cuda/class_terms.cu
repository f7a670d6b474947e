#include "cuda/class_terms.cuh"

namespace fairkernels {

// Half types are computed with in float32, and known as such when a kernel reads or writes them.
template <typename Function>
auto with_accumulator(Dtype dtype, Function&& function) {
  return dtype == Dtype::float64 ? function(double{}) : function(float{});
}

}  // namespace fairkernels

extern "C" int64_t fk_class_terms_bytes(const fairkernels::ClassTask* task) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::class_terms_bytes<decltype(type)>(*task);
  });
}

extern "C" int64_t fk_class_gradient_bytes(const fairkernels::ClassTask* task) {
  return fairkernels::class_gradient_bytes(*task);
}

extern "C" int fk_class_terms(const fairkernels::ClassTask* task, void* stream) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::launch_class_terms<decltype(type)>(*task, stream);
  });
}

extern "C" int fk_class_gradient(const fairkernels::ClassTask* task, void* stream) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::launch_class_gradient<decltype(type)>(*task, stream);
  });
}
