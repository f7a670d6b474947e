#include "cuda/symmetry_gap.cuh"

extern "C" int64_t fk_symmetry_gap_parts(const fairkernels::SymmetryGapTask* task) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::gap_parts<fairkernels::Accumulator<decltype(type)>>(task->classes);
  });
}

extern "C" int fk_symmetry_gap(const fairkernels::SymmetryGapTask* task, void* stream) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::launch_symmetry_gap<decltype(type)>(*task, stream);
  });
}

extern "C" int fk_symmetry_gap_backward(const fairkernels::SymmetryGapTask* task, void* stream) {
  return fairkernels::with_float_type(task->dtype, [&](auto type) {
    return fairkernels::launch_symmetry_gap_backward<decltype(type)>(*task, stream);
  });
}
