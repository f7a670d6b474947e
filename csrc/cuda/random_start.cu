#include "cuda/random_start.cuh"

extern "C" int64_t fk_random_start_l2_parts(const fairkernels::ImageShape* shape) {
  return fairkernels::sample_parts(*shape);
}

extern "C" int fk_random_start_linf(const fairkernels::RandomStartTask* task, void* stream) {
  return fairkernels::with_float_type(task->x.dtype, [&](auto type) {
    return fairkernels::launch_random_start_linf<decltype(type)>(*task, stream);
  });
}

extern "C" int fk_random_start_l2(const fairkernels::RandomStartTask* task, void* stream) {
  return fairkernels::with_float_type(task->x.dtype, [&](auto type) {
    return fairkernels::launch_random_start_l2<decltype(type)>(*task, stream);
  });
}
