// Mixing each sample with another one of its class (Domain Mixup, arXiv 2411.14424). Bound by memory: 2 reads and 1
// write an element; the partners cost a sort of the labels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/random_start.h"
#include "cpu/strided.h"
#include "support/platform.h"

namespace fairkernels {

constexpr uint32_t kMixupStream = 2;  // of the generator: random starts use 0 and 1

// The samples in the order of their labels, whatever integers these are: a stable sort by eleven bits at a time of the
// distance from the smallest, so that a few thousand classes take one or two passes.
inline std::vector<int64_t> sorted_by_label(LabelRow labels) {
  constexpr int kBits = 11;
  constexpr uint64_t kDigits = uint64_t{1} << kBits;
  std::vector<int64_t> order(labels.samples);
  std::iota(order.begin(), order.end(), int64_t{0});
  int64_t smallest = labels.samples == 0 ? 0 : labels[0];
  int64_t largest = smallest;
  for (int64_t b = 0; b < labels.samples; ++b) {
    smallest = std::min(smallest, labels[b]);
    largest = std::max(largest, labels[b]);
  }
  const auto distance = [least = static_cast<uint64_t>(smallest)](int64_t label) {
    return static_cast<uint64_t>(label) - least;
  };
  std::vector<int64_t> sorted(labels.samples);
  for (int shift = 0; shift < 64 && distance(largest) >> shift != 0; shift += kBits) {
    const auto digit = [&](int64_t b) { return distance(labels[b]) >> shift & (kDigits - 1); };
    std::vector<int64_t> next(kDigits + 1);
    for (int64_t b = 0; b < labels.samples; ++b) {
      ++next[digit(b) + 1];
    }
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t b : order) {
      sorted[next[digit(b)]++] = b;
    }
    std::swap(order, sorted);
  }
  return order;
}

// Uniform among the other samples of the class, the sample itself where it is alone: the members of a class stand in a
// circle, and each takes a random number of steps.
inline void find_partners(LabelRow labels, uint64_t seed, int64_t* partners) {
  const std::vector<int64_t> order = sorted_by_label(labels);
  std::vector<float> noise((labels.samples + 3) / 4 * 4);
  uniform_run(seed, kMixupStream, 0, noise.size() / 4, noise.data());
  for (int64_t first = 0, last = 0; first < labels.samples; first = last) {
    while (last < labels.samples && labels[order[last]] == labels[order[first]]) {
      ++last;
    }
    const int64_t others = last - first - 1;
    for (int64_t place = first; place < last; ++place) {
      const int64_t sample = order[place];
      const int64_t steps = others == 0 ? 0 : 1 + static_cast<int64_t>(static_cast<double>(noise[sample]) * others);
      const int64_t there = place + steps;
      partners[sample] = order[there < last ? there : there - (others + 1)];
    }
  }
}

template <typename Real>
FK_INLINE void mix_body(const Real* own, const Real* other, Real share, int64_t n, Real* out) {
  const Real rest = 1 - share;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = share * own[i] + rest * other[i];
  }
}

FK_CLONES static void mix(const float* own, const float* other, float share, int64_t n, float* out) {
  mix_body(own, other, share, n, out);
}

FK_CLONES static void mix(const double* own, const double* other, double share, int64_t n, double* out) {
  mix_body(own, other, share, n, out);
}

template <typename Real>
struct Mixup {
  const Source& x;
  const int64_t* partners;
  const Real* shares;
  const Sink& out;
  int64_t elements;  // of a sample
};

// Samples [begin, end), of type T.
template <typename T>
void mix_samples(const Mixup<Accumulator<T>>& task, int64_t begin, int64_t end) {
  using Real = Accumulator<T>;
  alignas(64) Real own_buffer[kChunk];
  alignas(64) Real other_buffer[kChunk];
  alignas(64) Real mixed_buffer[kChunk];
  alignas(64) T out_buffer[kChunk];
  for (int64_t sample = begin; sample < end; ++sample) {
    for (int64_t start = 0; start < task.elements; start += kChunk) {
      const int64_t n = std::min(kChunk, task.elements - start);
      const Real* own = task.x.read(sample, start, n, own_buffer);
      const Real* other = task.x.read(task.partners[sample], start, n, other_buffer);
      T* out = task.out.template place<T>(sample, start, out_buffer);
      if constexpr (std::is_same_v<T, Real>) {
        mix(own, other, task.shares[sample], n, out);
      } else {
        mix(own, other, task.shares[sample], n, mixed_buffer);
        store_run(mixed_buffer, n, out);
      }
      task.out.write(sample, start, n, out);
    }
  }
}

}  // namespace fairkernels
