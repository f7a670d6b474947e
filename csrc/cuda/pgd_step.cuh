// One step of projected gradient descent. Bound by memory: 3 reads and 1 write of an element, 16 bytes in fp32;
// about 20 operations.
// linf: one launch, a vector of 16 bytes a thread. Where all images lie alike and without gaps, and all parameters are
// numbers, a kernel of its own: to find a vector's places takes longer than to read it. Floor: the copy of 16 bytes.
// l2: a block owns a sample and reads it again, out of the cache: one launch. Of larger samples several blocks leave
// sums in double, and a second launch moves them: 28 bytes of an element in fp32.
#pragma once

#include "cuda/images.cuh"
#include "cuda/pgd_step.h"
#include "cuda/reduce.cuh"
#include "support/pgd_math.h"

namespace fairkernels {

template <typename T>
FK_KERNEL(kImageThreads) pgd_step_linf(FK_CONSTANT(PgdStepTask) task) {
  using Real = Accumulator<T>;
  const int64_t vector = device::block() * kImageThreads + device::thread();
  if (vector >= vectors_of(task.shape)) {
    return;
  }
  const auto place = vector_place<T>(task.shape, 0, vector, task.x_adv, task.grad, task.x, task.out, task.alpha,
                                     task.eps, task.low, task.high, task.mask);
  const ImageVector<T> x_adv = load_vector<T>(task.shape, task.x_adv, place.offset[0], place.count, false);
  const ImageVector<T> grad = load_vector<T>(task.shape, task.grad, place.offset[1], place.count, false);
  const ImageVector<T> x = load_vector<T>(task.shape, task.x, place.offset[2], place.count, true);
  Real alpha[kVector<T>], eps[kVector<T>], low[kVector<T>], high[kVector<T>], mask[kVector<T>];
  load_parameter(task.shape, task.alpha, place.offset[4], place.count, alpha);
  load_parameter(task.shape, task.eps, place.offset[5], place.count, eps);
  load_parameter(task.shape, task.low, place.offset[6], place.count, low);
  load_parameter(task.shape, task.high, place.offset[7], place.count, high);
  load_parameter(task.shape, task.mask, place.offset[8], place.count, mask);
  ImageVector<T> out;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    const Real step = static_cast<Real>(task.direction) * alpha[e] * mask[e];
    const Real moved = linf_moved(widen(x_adv.element[e]), widen(grad.element[e]), widen(x.element[e]), step, eps[e],
                                  low[e], high[e]);
    out.element[e] = narrow(moved, T{});
  }
  store_vector(task.shape, task.out, place.offset[3], place.count, out);
}

template <typename T>
FK_KERNEL(kImageThreads) pgd_step_linf_flat(FK_CONSTANT(PgdStepTask) task) {
  using Real = Accumulator<T>;
  const int64_t first = (device::block() * kImageThreads + device::thread()) * kVector<T>;
  const int64_t left = task.shape.sizes[0] - first;
  if (left <= 0) {
    return;
  }
  const int count = left < kVector<T> ? static_cast<int>(left) : kVector<T>;
  const ImageVector<T> x_adv = load_vector<T>(task.shape, task.x_adv, first, count, false);
  const ImageVector<T> grad = load_vector<T>(task.shape, task.grad, first, count, false);
  const ImageVector<T> x = load_vector<T>(task.shape, task.x, first, count, true);
  const Real mask = static_cast<Real>(task.mask.value);
  const Real step = static_cast<Real>(task.direction) * static_cast<Real>(task.alpha.value) * mask;
  const Real eps = static_cast<Real>(task.eps.value);
  const Real low = static_cast<Real>(task.low.value);
  const Real high = static_cast<Real>(task.high.value);
  ImageVector<T> out;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    const Real moved =
        linf_moved(widen(x_adv.element[e]), widen(grad.element[e]), widen(x.element[e]), step, eps, low, high);
    out.element[e] = narrow(moved, T{});
  }
  store_vector(task.shape, task.out, first, count, out);
}

// Whether that is the way to go.
inline bool is_flat(const PgdStepTask& task) {
  for (const ImageOperand* parameter : {&task.alpha, &task.eps, &task.low, &task.high, &task.mask}) {
    if (parameter->data != nullptr) {
      return false;
    }
  }
  return task.shape.dims == 1 && task.x_adv.wide && task.grad.wide && task.x.wide && task.out.wide;
}

// What this thread adds to the sums over a part.
template <typename T>
FK_DEVICE L2Sums l2_thread_sums(const PgdStepTask& task, SamplePart part) {
  using Real = Accumulator<T>;
  L2Sums sums{0, 0, 0};
  for (int64_t vector = part.begin + device::thread(); vector < part.end; vector += kSampleThreads) {
    const auto place = vector_place<T>(task.shape, part.sample, vector, task.x_adv, task.grad, task.x, task.mask);
    const ImageVector<T> x_adv = load_vector<T>(task.shape, task.x_adv, place.offset[0], place.count, true);
    const ImageVector<T> grad = load_vector<T>(task.shape, task.grad, place.offset[1], place.count, true);
    const ImageVector<T> x = load_vector<T>(task.shape, task.x, place.offset[2], place.count, true);
    Real mask[kVector<T>];
    load_parameter(task.shape, task.mask, place.offset[3], place.count, mask);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < place.count) {
        const double delta = widen(x_adv.element[e]) - widen(x.element[e]);
        const double slope = widen(grad.element[e]) * mask[e];
        sums.grad_grad += slope * slope;
        sums.delta_delta += delta * delta;
        sums.delta_grad += delta * slope;
      }
    }
  }
  return sums;
}

template <typename T>
FK_DEVICE void l2_move(const PgdStepTask& task, SamplePart part, L2Sums sums) {
  using Real = Accumulator<T>;
  const double alpha = task.direction * sample_parameter(task.alpha, part.sample);
  const L2Step factors = l2_step_of(sums, alpha, sample_parameter(task.eps, part.sample));
  const Real step = static_cast<Real>(factors.step);
  const Real shrink = static_cast<Real>(factors.shrink);
  for (int64_t vector = part.begin + device::thread(); vector < part.end; vector += kSampleThreads) {
    const auto place = vector_place<T>(task.shape, part.sample, vector, task.x_adv, task.grad, task.x, task.out,
                                       task.low, task.high, task.mask);
    const ImageVector<T> x_adv = load_vector<T>(task.shape, task.x_adv, place.offset[0], place.count, false);
    const ImageVector<T> grad = load_vector<T>(task.shape, task.grad, place.offset[1], place.count, false);
    const ImageVector<T> x = load_vector<T>(task.shape, task.x, place.offset[2], place.count, true);
    Real low[kVector<T>], high[kVector<T>], mask[kVector<T>];
    load_parameter(task.shape, task.low, place.offset[4], place.count, low);
    load_parameter(task.shape, task.high, place.offset[5], place.count, high);
    load_parameter(task.shape, task.mask, place.offset[6], place.count, mask);
    ImageVector<T> out;
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const Real moved = l2_moved(widen(x_adv.element[e]), widen(grad.element[e]) * mask[e], widen(x.element[e]), step,
                                  shrink, low[e], high[e]);
      out.element[e] = narrow(moved, T{});
    }
    store_vector(task.shape, task.out, place.offset[3], place.count, out);
  }
}

FK_DEVICE L2Sums l2_block_sums(L2Sums sums) {
  const double grad_grad = block_sum(sums.grad_grad);
  const double delta_delta = block_sum(sums.delta_delta);
  return {grad_grad, delta_delta, block_sum(sums.delta_grad)};
}

// A block has a sample for itself. The result may lie where x_adv does: nothing is written before all is added.
template <typename T>
FK_KERNEL(kSampleThreads) pgd_step_l2(FK_CONSTANT(PgdStepTask) task) {
  const SamplePart whole = sample_part(task.shape, 1);
  l2_move<T>(task, whole, l2_block_sums(l2_thread_sums<T>(task, whole)));
}

template <typename T>
FK_KERNEL(kSampleThreads) pgd_step_l2_sums(FK_CONSTANT(PgdStepTask) task, int64_t parts) {
  const L2Sums sums = l2_block_sums(l2_thread_sums<T>(task, sample_part(task.shape, parts)));
  if (device::thread() == 0) {
    double* out = task.sums + 3 * device::block();
    out[0] = sums.grad_grad;
    out[1] = sums.delta_delta;
    out[2] = sums.delta_grad;
  }
}

template <typename T>
FK_KERNEL(kSampleThreads) pgd_step_l2_move(FK_CONSTANT(PgdStepTask) task, int64_t parts) {
  const SamplePart part = sample_part(task.shape, parts);
  L2Sums sums{0, 0, 0};
  for (const double* of = task.sums + 3 * part.sample * parts; of < task.sums + 3 * (part.sample + 1) * parts; of += 3) {
    sums.grad_grad += of[0];
    sums.delta_delta += of[1];
    sums.delta_grad += of[2];
  }
  l2_move<T>(task, part, sums);
}

template <typename T>
int launch_pgd_step_linf(const PgdStepTask& task, void* stream) {
  const auto kernel = is_flat(task) ? pgd_step_linf_flat<T> : pgd_step_linf<T>;
  return device::launch(kernel, {image_blocks(task.shape), kImageThreads}, stream, task);
}

template <typename T>
int launch_pgd_step_l2(const PgdStepTask& task, void* stream) {
  const int64_t parts = sample_parts(task.shape);
  const device::Grid grid{task.samples * parts, kSampleThreads};
  if (parts == 1) {
    return device::launch(pgd_step_l2<T>, grid, stream, task);
  }
  const int error = device::launch(pgd_step_l2_sums<T>, grid, stream, task, parts);
  return error != 0 ? error : device::launch(pgd_step_l2_move<T>, grid, stream, task, parts);
}

}  // namespace fairkernels
