#include "cuda/class_gradient.cuh"

extern "C" int64_t fk_class_gradient_bytes(const fairkernels::ClassTask* task) {
  return fairkernels::class_gradient_bytes(*task);
}

extern "C" int fk_class_gradient(const fairkernels::ClassTask* task, void* stream) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::launch_class_gradient<decltype(type)>(*task, stream);
  });
}
