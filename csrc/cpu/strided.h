// Operands of an elementwise kernel, whatever their dtype, strides and broadcasting. The elements are numbered in one
// common order; each operand is walked in that order and handed to the kernel in chunks: in place where a chunk lies in
// memory as the kernel wants it, otherwise through a small buffer.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/elements.h"

namespace fairkernels {

constexpr int64_t kChunk = 1024;
constexpr size_t kMaxDims = 64;  // of any tensor

using Dims = std::vector<int64_t>;

// The order of the dimensions from the outermost to the innermost in memory. `strides` are those of the result: written
// front to back, it sets the pace. Dimensions of equal stride keep their order.
inline std::vector<size_t> memory_order(const Dims& strides) {
  std::vector<size_t> order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

inline std::vector<size_t> row_major_order(size_t dims) {
  std::vector<size_t> order(dims);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// How one operand is walked: dimensions from the outermost to the innermost, neighbours merged where one stride serves
// both.
struct Walk {
  Dims sizes;
  Dims strides;

  Walk(const Dims& all_sizes, const Dims& all_strides, const std::vector<size_t>& order) {
    for (size_t d : order) {
      if (all_sizes[d] != 1) {
        append(all_sizes[d], all_strides[d]);
      }
    }
    if (sizes.empty()) {
      append(1, 1);
    }
  }

  bool one_run() const { return sizes.size() == 1; }

  // After how many elements the operand repeats itself, as one value per channel does in channels_last; 0 if it does
  // not.
  int64_t period() const {
    const bool repeats = !one_run() && strides[0] == 0;
    return repeats ? std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<int64_t>()) : 0;
  }

 private:
  void append(int64_t size, int64_t stride) {
    if (!sizes.empty() && strides.back() == stride * size) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
};

// Calls function(offset, done, length) for the straight runs of elements [start, start + count).
template <typename Function>
void for_each_run(const Walk& walk, int64_t start, int64_t count, const Function& function) {
  const size_t inner = walk.sizes.size() - 1;
  std::array<int64_t, kMaxDims> index;
  int64_t rest = start;
  for (size_t d = walk.sizes.size(); d-- > 0;) {
    index[d] = rest % walk.sizes[d];
    rest /= walk.sizes[d];
  }
  for (int64_t done = 0; done < count;) {
    const int64_t length = std::min(count - done, walk.sizes[inner] - index[inner]);
    int64_t offset = 0;
    for (size_t d = 0; d <= inner; ++d) {
      offset += index[d] * walk.strides[d];
    }
    function(offset, done, length);
    done += length;
    index[inner] = 0;
    for (size_t d = inner; d-- > 0;) {
      if (++index[d] < walk.sizes[d]) {
        break;
      }
      index[d] = 0;
    }
  }
}

// An operand that is read: an image, or a parameter broadcast over it. Where samples are worked on one by one the walk
// is that of one sample, and sample_stride leads from one to the next; otherwise there is a single sample, number 0.
class Source {
 public:
  Source(const void* data, Dtype dtype, Walk walk, int64_t sample_stride)
      : data_(data), dtype_(dtype), walk_(std::move(walk)), sample_stride_(sample_stride), period_(walk_.period()) {}

  // Elements [start, start + count) as Real; they are in `buffer` unless they could be used where they are.
  template <typename Real>
  const Real* read(int64_t sample, int64_t start, int64_t count, Real* buffer) const {
    return with_type(dtype_, [&](auto type) -> const Real* {
      using T = decltype(type);
      const T* data = static_cast<const T*>(data_) + sample * sample_stride_;
      if constexpr (std::is_same_v<T, Real>) {
        if (walk_.one_run() && walk_.strides[0] == 1) {
          return data + start;
        }
      }
      gather(data, start, count, buffer);
      return buffer;
    });
  }

 private:
  template <typename T, typename Real>
  void gather(const T* data, int64_t start, int64_t count, Real* buffer) const {
    const int64_t distinct = period_ > 0 ? std::min(period_, count) : count;
    for_each_run(walk_, start, distinct, [&](int64_t offset, int64_t done, int64_t length) {
      load(data + offset, walk_.strides.back(), length, buffer + done);
    });
    for (int64_t done = distinct; done < count; done *= 2) {
      std::copy_n(buffer, std::min(done, count - done), buffer + done);
    }
  }

  const void* data_;
  Dtype dtype_;
  Walk walk_;
  int64_t sample_stride_;
  int64_t period_;
};

// A number for all elements, or an operand with one for each.
template <typename Real>
struct Parameter {
  Real value;
  const Source* each;

  // One thread's buffer of a chunk; a number fills it once and for all.
  void fill(Real* buffer) const { std::fill_n(buffer, each == nullptr ? kChunk : 0, value); }

  const Real* read(int64_t sample, int64_t start, int64_t count, Real* filled) const {
    return each == nullptr ? filled : each->read(sample, start, count, filled);
  }
};

// The operand that is written.
class Sink {
 public:
  Sink(void* data, Dtype dtype, Walk walk, int64_t sample_stride)
      : data_(data), dtype_(dtype), walk_(std::move(walk)), sample_stride_(sample_stride) {}

  // Where to compute elements from `start` on: the result itself, or `buffer`, which write() then puts in its place.
  template <typename Real>
  Real* place(int64_t sample, int64_t start, Real* buffer) const {
    const bool same_type = dtype_ == (std::is_same_v<Real, double> ? Dtype::float64 : Dtype::float32);
    const bool in_place = same_type && walk_.one_run() && walk_.strides[0] == 1;
    return in_place ? static_cast<Real*>(data_) + sample * sample_stride_ + start : buffer;
  }

  template <typename Real>
  void write(int64_t sample, int64_t start, int64_t count, const Real* computed, const Real* buffer) const {
    if (computed != buffer) {
      return;
    }
    with_float_type(dtype_, [&](auto type) {
      auto* data = static_cast<decltype(type)*>(data_) + sample * sample_stride_;
      for_each_run(walk_, start, count, [&](int64_t offset, int64_t done, int64_t length) {
        store(buffer + done, length, data + offset, walk_.strides.back());
      });
    });
  }

 private:
  void* data_;
  Dtype dtype_;
  Walk walk_;
  int64_t sample_stride_;
};

}  // namespace fairkernels
