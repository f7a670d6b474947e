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
  bool straight() const { return one_run() && strides[0] == 1; }

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

// The straight run that element `start` is in, from there to its end.
struct Run {
  int64_t offset;
  int64_t length;
};

inline Run run_at(const Walk& walk, int64_t start) {
  Run run{0, walk.sizes.back() - start % walk.sizes.back()};
  for (size_t d = walk.sizes.size(); d-- > 0;) {
    run.offset += start % walk.sizes[d] * walk.strides[d];
    start /= walk.sizes[d];
  }
  return run;
}

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

// Elements of one type from one place to another.
template <typename T>
void copy_run(const T* from, int64_t from_stride, int64_t n, T* to, int64_t to_stride) {
  if (from_stride == 1 && to_stride == 1) {
    std::copy_n(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i * to_stride] = from[i * from_stride];
    }
  }
}

// An operand that is read: an image, or a parameter broadcast over it. Where samples are worked on one by one the walk
// is that of one sample, and sample_stride leads from one to the next; otherwise there is a single sample, number 0.
class Source {
 public:
  Source(const void* data, Dtype dtype, Walk walk, int64_t sample_stride)
      : data_(data), dtype_(dtype), walk_(std::move(walk)), sample_stride_(sample_stride), period_(walk_.period()) {}

  // Elements [start, start + count) of an image, as they are; in `buffer` unless they could be used where they are.
  template <typename T>
  const T* image(int64_t sample, int64_t start, int64_t count, T* buffer) const {
    return elements(static_cast<const T*>(data_), sample, start, count, buffer);
  }

  // Elements [start, start + count) of a parameter, whatever their type, as Real; likewise.
  template <typename Real>
  const Real* read(int64_t sample, int64_t start, int64_t count, Real* buffer) const {
    return with_type(dtype_, [&](auto type) -> const Real* {
      using T = decltype(type);
      return elements(static_cast<const T*>(data_), sample, start, count, buffer);
    });
  }

  // For how many elements from `start` on, at most `count`, it has one value.
  int64_t constant_for(int64_t start, int64_t count) const {
    return std::min(count, walk_.strides.back() == 0 ? run_at(walk_, start).length : 1);
  }

  // After how many elements it repeats itself, in every sample alike, if that is within a chunk; else 0.
  int64_t short_period() const { return sample_stride_ == 0 && period_ <= kChunk ? period_ : 0; }

 private:
  template <typename T, typename Element>
  const Element* elements(const T* data, int64_t sample, int64_t start, int64_t count, Element* buffer) const {
    data += sample * sample_stride_;
    if constexpr (std::is_same_v<T, Element>) {
      if (walk_.straight()) {
        return data + start;
      }
      const Run run = run_at(walk_, start);
      if (walk_.strides.back() == 1 && run.length >= count) {
        return data + run.offset;
      }
    }
    const int64_t distinct = period_ > 0 ? std::min(period_, count) : count;
    for_each_run(walk_, start, distinct, [&](int64_t offset, int64_t done, int64_t length) {
      if constexpr (std::is_same_v<T, Element>) {
        copy_run(data + offset, walk_.strides.back(), length, buffer + done, 1);
      } else {
        load(data + offset, walk_.strides.back(), length, buffer + done);
      }
    });
    for (int64_t done = distinct; done < count; done *= 2) {
      std::copy_n(buffer, std::min(done, count - done), buffer + done);
    }
    return buffer;
  }

  const void* data_;
  Dtype dtype_;
  Walk walk_;
  int64_t sample_stride_;
  int64_t period_;
};

// A number for all elements, or an operand with one for each. What repeats itself within a chunk is laid out once, in a
// buffer of kFilled elements, for chunks to start anywhere in the first period.
constexpr int64_t kFilled = 2 * kChunk;

template <typename Real>
struct Parameter {
  Real value;
  const Source* each;

  // Before the first chunk of at most n elements, one thread's buffer.
  void fill(int64_t n, Real* buffer) const {
    if (each == nullptr) {
      std::fill_n(buffer, n, value);
    } else if (each->short_period() > 0) {
      each->read(0, 0, n + each->short_period(), buffer);
    }
  }

  const Real* read(int64_t sample, int64_t start, int64_t count, Real* filled) const {
    if (each == nullptr) {
      return filled;
    }
    const int64_t period = each->short_period();
    return period > 0 ? filled + start % period : each->read(sample, start, count, filled);
  }

  Real at(int64_t sample, int64_t index) const {
    Real element;
    return each == nullptr ? value : *each->read(sample, index, 1, &element);
  }

  int64_t constant_for(int64_t start, int64_t count) const {
    return each == nullptr ? count : each->constant_for(start, count);
  }
};

// A parameter with one thread's buffer for it, for chunks of at most n elements.
template <typename Real>
class FilledParameter {
 public:
  FilledParameter(const Parameter<Real>& parameter, int64_t n) : parameter_(parameter) { parameter.fill(n, filled_); }

  const Real* read(int64_t sample, int64_t start, int64_t count) {
    return parameter_.read(sample, start, count, filled_);
  }

 private:
  const Parameter<Real>& parameter_;
  alignas(64) Real filled_[kFilled];
};

// The operand that is written, an image.
class Sink {
 public:
  Sink(void* data, Walk walk, int64_t sample_stride)
      : data_(data), walk_(std::move(walk)), sample_stride_(sample_stride) {}

  // Where to compute elements from `start` on: the result itself, or `buffer`, which write() then puts in its place.
  template <typename T>
  T* place(int64_t sample, int64_t start, T* buffer) const {
    return walk_.straight() ? address<T>(sample) + start : buffer;
  }

  template <typename T>
  void write(int64_t sample, int64_t start, int64_t count, const T* computed) const {
    if (walk_.straight()) {
      return;
    }
    for_each_run(walk_, start, count, [&](int64_t offset, int64_t done, int64_t length) {
      copy_run(computed + done, 1, length, address<T>(sample) + offset, walk_.strides.back());
    });
  }

 private:
  template <typename T>
  T* address(int64_t sample) const {
    return static_cast<T*>(data_) + sample * sample_stride_;
  }

  void* data_;
  Walk walk_;
  int64_t sample_stride_;
};

}  // namespace fairkernels
