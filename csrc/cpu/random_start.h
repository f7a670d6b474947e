// A random point of the ball around each image. Bound by the generator, about 50 operations for four elements, and in
// the l2 ball by their way to normal numbers, about 50 for each. An element's random numbers depend on the seed and on
// its row-major number alone, not on strides, dtype or threads. Products and sums are kept in separate loops, so that
// no compiler fuses them and every machine starts from the same point.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/clip.h"
#include "support/normal.h"
#include "cpu/strided.h"
#include "support/lanes.h"
#include "support/start_math.h"
#include "support/platform.h"

namespace fairkernels {

// Uniform numbers of the elements [4 first, 4 (first + n)).
FK_CLONES static void uniform_run(uint64_t seed, uint32_t stream, int64_t first, int64_t n, float* numbers) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const PhiloxWords words = philox(static_cast<uint64_t>(first + i), stream, seed);
    numbers[4 * i] = uniform(words.word[0]);
    numbers[4 * i + 1] = uniform(words.word[1]);
    numbers[4 * i + 2] = uniform(words.word[2]);
    numbers[4 * i + 3] = uniform(words.word[3]);
  }
}

template <typename Real>
FK_INLINE void centre_body(const float* uniforms, const Real* eps, int64_t n, Real* offsets) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    offsets[i] = centred(uniforms[i], eps[i]);
  }
}

FK_CLONES static void centre(const float* uniforms, const float* eps, int64_t n, float* offsets) {
  centre_body(uniforms, eps, n, offsets);
}

FK_CLONES static void centre(const float* uniforms, const double* eps, int64_t n, double* offsets) {
  centre_body(uniforms, eps, n, offsets);
}

template <typename T, typename Real = Accumulator<T>>
FK_INLINE void shift_and_clip_body(const T* x, const Real* offsets, const Real* low, const Real* high, int64_t n,
                                   T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = narrow(clip(widen(x[i]) + offsets[i], low[i], high[i]), T{});
  }
}

FK_CLONES static void shift_and_clip(const float* x, const float* offsets, const float* low, const float* high,
                                     int64_t n, float* out) {
  shift_and_clip_body(x, offsets, low, high, n, out);
}

FK_CLONES static void shift_and_clip(const double* x, const double* offsets, const double* low, const double* high,
                                     int64_t n, double* out) {
  shift_and_clip_body(x, offsets, low, high, n, out);
}

FK_CLONES static void shift_and_clip(const BFloat16* x, const float* offsets, const float* low, const float* high,
                                     int64_t n, BFloat16* out) {
  shift_and_clip_body(x, offsets, low, high, n, out);
}

FK_CLONES static void shift_and_clip(const Half* x, const float* offsets, const float* low, const float* high,
                                     int64_t n, Half* out) {
  shift_and_clip_body(x, offsets, low, high, n, out);
}

template <typename Real>
struct RandomStart {
  const Source& x;
  Parameter<Real> eps;
  Parameter<Real> low;
  Parameter<Real> high;
  uint64_t seed;
  const Sink& out;
  int64_t elements;  // of a sample for l2, of everything for linf
};

template <typename T, typename Real = Accumulator<T>>
struct StartBuffers {
  alignas(64) float uniforms[kChunk];
  alignas(64) Real offsets[kChunk];
  alignas(64) T x[kChunk];
  alignas(64) T out[kChunk];
  FilledParameter<Real> eps;
  FilledParameter<Real> low;
  FilledParameter<Real> high;

  explicit StartBuffers(const RandomStart<Real>& task) : StartBuffers(task, std::min(kChunk, task.elements)) {}

 private:
  StartBuffers(const RandomStart<Real>& task, int64_t n) : eps(task.eps, n), low(task.low, n), high(task.high, n) {}
};

// Moves a chunk of x by `offsets`.
template <typename T, typename Real>
void place_chunk(const RandomStart<Real>& task, int64_t sample, int64_t start, int64_t n, const Real* offsets,
                 StartBuffers<T>& buffers) {
  const T* x = task.x.image(sample, start, n, buffers.x);
  const Real* low = buffers.low.read(sample, start, n);
  const Real* high = buffers.high.read(sample, start, n);
  T* out = task.out.place(sample, start, buffers.out);
  shift_and_clip(x, offsets, low, high, n, out);
  task.out.write(sample, start, n, out);
}

// Chunks [begin, end) of kChunk elements: x + eps (2u - 1), clipped.
template <typename T, typename Real>
void linf_start(const RandomStart<Real>& task, int64_t begin, int64_t end) {
  StartBuffers<T> buffers(task);
  for (int64_t start = begin * kChunk; start < std::min(end * kChunk, task.elements); start += kChunk) {
    const int64_t n = std::min(kChunk, task.elements - start);
    uniform_run(task.seed, 0, start / 4, (n + 3) / 4, buffers.uniforms);
    centre(buffers.uniforms, buffers.eps.read(0, start, n), n, buffers.offsets);
    place_chunk(task, 0, start, n, buffers.offsets, buffers);
  }
}

// Normal numbers of the elements [first, first + n).
template <typename Real>
void normal_run(uint64_t seed, int64_t first, int64_t n, Real* numbers) {
  alignas(64) float uniforms[kChunk];
  alignas(64) double normals[kChunk];
  for (int64_t start = first / 4 * 4; start < first + n; start += kChunk) {
    const int64_t from = std::max(first, start);
    const int64_t to = std::min(first + n, start + kChunk);
    const int64_t counters = (to - start + 3) / 4;
    uniform_run(seed, 0, start / 4, counters, uniforms);
    normal_pairs(uniforms, 2 * counters, normals);
    std::copy(normals + (from - start), normals + (to - start), numbers + (from - first));
  }
}

// A random direction of length `radius`; a direction of no length stays where it is.
template <typename Real>
void scale_direction(std::vector<Real>& direction, double radius) {
  double squared = 0;
  for (Real number : direction) {
    squared += static_cast<double>(number) * number;
  }
  const Real factor = static_cast<Real>(per_length(squared, radius));
  for (Real& number : direction) {
    number *= factor;
  }
}

// Samples [begin, end): x + eps u^(1/d) times a normal direction, clipped.
template <typename T, typename Real>
void l2_start(const RandomStart<Real>& task, int64_t begin, int64_t end) {
  StartBuffers<T> buffers(task);
  std::vector<Real> direction(task.elements);
  for (int64_t sample = begin; sample < end; ++sample) {
    const double eps = task.eps.at(sample, 0);
    normal_run(task.seed, sample * task.elements, task.elements, direction.data());
    scale_direction(direction, random_radius(task.seed, sample, eps, task.elements));
    for (int64_t start = 0; start < task.elements; start += kChunk) {
      const int64_t n = std::min(kChunk, task.elements - start);
      place_chunk(task, sample, start, n, &direction[start], buffers);
    }
  }
}

}  // namespace fairkernels
