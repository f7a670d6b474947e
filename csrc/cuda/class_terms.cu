#include "cuda/class_terms.cuh"

extern "C" int64_t fk_class_terms_bytes(const fairkernels::ClassTask* task) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::class_terms_bytes<decltype(type)>(*task);
  });
}

extern "C" int fk_class_terms(const fairkernels::ClassTask* task, void* stream) {
  return fairkernels::with_accumulator(task->logits.dtype, [&](auto type) {
    return fairkernels::launch_class_terms<decltype(type)>(*task, stream);
  });
}
