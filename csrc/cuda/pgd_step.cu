#include "cuda/pgd_step.cuh"

extern "C" int64_t fk_pgd_step_l2_parts(const fairkernels::ImageShape* shape) {
  return fairkernels::sample_parts(*shape);
}

extern "C" int fk_pgd_step_linf(const fairkernels::PgdStepTask* task, void* stream) {
  return fairkernels::with_float_type(task->x.dtype, [&](auto type) {
    return fairkernels::launch_pgd_step_linf<decltype(type)>(*task, stream);
  });
}

extern "C" int fk_pgd_step_l2(const fairkernels::PgdStepTask* task, void* stream) {
  return fairkernels::with_float_type(task->x.dtype, [&](auto type) {
    return fairkernels::launch_pgd_step_l2<decltype(type)>(*task, stream);
  });
}
