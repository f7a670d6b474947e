// A random point of the ball around each image; an element's random numbers depend on the seed and on its row-major
// number alone, so they are those of the CPU. 1 read and 1 write of an element, 8 bytes in fp32; the generator takes
// about 50 operations for four elements that follow each other in row-major order, for each where they do not, and
// normal numbers about 50 in double for each.
// linf: one launch, a vector of 16 bytes a thread. Bound by memory, floor: the copy.
// l2: bound by its operations in double, floor: about 100 of an element. A block owns a sample and draws it twice, for its length and to place it: one launch. Of larger samples several
// blocks leave sums, and a second launch places them.
#pragma once

#include "cuda/images.cuh"
#include "cuda/random_start.h"
#include "cuda/reduce.cuh"
#include "support/clip.h"
#include "support/start_math.h"

namespace fairkernels {

// The random numbers of a vector's elements, for which draw(uniforms, place) has one of four.
template <int kCount, typename Real, typename Draw>
FK_DEVICE void draw_vector(uint64_t seed, int64_t number, int64_t stride, int count, Real (&drawn)[kCount],
                           const Draw& draw) {
  Uniforms four{};
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const int64_t at = number + e * stride;
    if (e < count && (e == 0 || stride != 1 || at % 4 == 0)) {
      four = uniforms(static_cast<uint64_t>(at / 4), seed);
    }
    drawn[e] = e < count ? draw(four, static_cast<int>(at % 4)) : Real(0);
  }
}

FK_DEVICE float uniform_of(const Uniforms& four, int place) {
  const float early = place == 0 ? four.number[0] : four.number[1];
  const float late = place == 2 ? four.number[2] : four.number[3];
  return place < 2 ? early : late;
}

FK_DEVICE double normal_of(const Uniforms& four, int place) {
  const NormalPair pair = place < 2 ? normal_pair(four.number[0], four.number[1]) : normal_pair(four.number[2], four.number[3]);
  return place % 2 == 0 ? pair.first : pair.second;
}

// Writes the vector of x moved by `offsets` and clipped.
template <typename T, typename Real>
FK_DEVICE void place_vector(const RandomStartTask& task, const VectorPlace<6>& place, const Real (&offsets)[kVector<T>]) {
  const ImageVector<T> x = load_vector<T>(task.shape, task.x, place.offset[0], place.count, true);
  Real low[kVector<T>], high[kVector<T>];
  load_parameter(task.shape, task.low, place.offset[3], place.count, low);
  load_parameter(task.shape, task.high, place.offset[4], place.count, high);
  ImageVector<T> out;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    out.element[e] = narrow(clip(widen(x.element[e]) + offsets[e], low[e], high[e]), T{});
  }
  store_vector(task.shape, task.out, place.offset[1], place.count, out);
}

template <typename T>
FK_DEVICE VectorPlace<6> start_place(const RandomStartTask& task, int64_t sample, int64_t vector) {
  return vector_place<T>(task.shape, sample, vector, task.x, task.out, task.numbers, task.low, task.high,
                         task.eps);
}

template <typename T>
FK_KERNEL(kImageThreads) random_start_linf(FK_CONSTANT(RandomStartTask) task) {
  using Real = Accumulator<T>;
  const int64_t vector = device::block() * kImageThreads + device::thread();
  if (vector >= vectors_of(task.shape)) {
    return;
  }
  const VectorPlace<6> place = start_place<T>(task, 0, vector);
  Real eps[kVector<T>], drawn[kVector<T>], offsets[kVector<T>];
  load_parameter(task.shape, task.eps, place.offset[5], place.count, eps);
  const int64_t stride = task.numbers.strides[task.shape.dims - 1];
  draw_vector(task.seed, place.offset[2], stride, place.count, drawn, uniform_of);
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    offsets[e] = centred(static_cast<float>(drawn[e]), eps[e]);
  }
  place_vector<T>(task, place, offsets);
}

// The normal numbers of a vector.
template <typename T, typename Real>
FK_DEVICE void draw_direction(const RandomStartTask& task, const VectorPlace<6>& place, Real (&direction)[kVector<T>]) {
  const int64_t stride = task.numbers.strides[task.shape.dims - 1];
  draw_vector(task.seed, place.offset[2], stride, place.count, direction,
              [](const Uniforms& four, int at) { return static_cast<Real>(normal_of(four, at)); });
}

template <typename T>
FK_DEVICE double squared_length(const RandomStartTask& task, SamplePart part) {
  using Real = Accumulator<T>;
  double squared = 0;
  for (int64_t vector = part.begin + device::thread(); vector < part.end; vector += kSampleThreads) {
    Real direction[kVector<T>];
    draw_direction<T>(task, start_place<T>(task, part.sample, vector), direction);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      squared += static_cast<double>(direction[e]) * direction[e];
    }
  }
  return block_sum(squared);
}

template <typename T>
FK_DEVICE void place_part(const RandomStartTask& task, SamplePart part, double squared) {
  using Real = Accumulator<T>;
  const double radius = random_radius(task.seed, part.sample, sample_parameter(task.eps, part.sample), task.elements);
  const Real factor = static_cast<Real>(per_length(squared, radius));
  for (int64_t vector = part.begin + device::thread(); vector < part.end; vector += kSampleThreads) {
    const VectorPlace<6> place = start_place<T>(task, part.sample, vector);
    Real offsets[kVector<T>];
    draw_direction<T>(task, place, offsets);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      offsets[e] *= factor;
    }
    place_vector<T>(task, place, offsets);
  }
}

template <typename T>
FK_KERNEL(kSampleThreads) random_start_l2(FK_CONSTANT(RandomStartTask) task) {
  const SamplePart whole = sample_part(task.shape, 1);
  place_part<T>(task, whole, squared_length<T>(task, whole));
}

template <typename T>
FK_KERNEL(kSampleThreads) random_start_l2_sums(FK_CONSTANT(RandomStartTask) task, int64_t parts) {
  const double squared = squared_length<T>(task, sample_part(task.shape, parts));
  if (device::thread() == 0) {
    task.sums[device::block()] = squared;
  }
}

template <typename T>
FK_KERNEL(kSampleThreads) random_start_l2_place(FK_CONSTANT(RandomStartTask) task, int64_t parts) {
  const SamplePart part = sample_part(task.shape, parts);
  double squared = 0;
  for (int64_t i = 0; i < parts; ++i) {
    squared += task.sums[part.sample * parts + i];
  }
  place_part<T>(task, part, squared);
}

template <typename T>
int launch_random_start_linf(const RandomStartTask& task, void* stream) {
  return device::launch(random_start_linf<T>, {image_blocks(task.shape), kImageThreads}, stream, task);
}

template <typename T>
int launch_random_start_l2(const RandomStartTask& task, void* stream) {
  const int64_t parts = sample_parts(task.shape);
  const device::Grid grid{task.samples * parts, kSampleThreads};
  if (parts == 1) {
    return device::launch(random_start_l2<T>, grid, stream, task);
  }
  const int error = device::launch(random_start_l2_sums<T>, grid, stream, task, parts);
  return error != 0 ? error : device::launch(random_start_l2_place<T>, grid, stream, task, parts);
}

}  // namespace fairkernels
