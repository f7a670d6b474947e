// The samples of one problem in the order of their classes, by a stable counting sort: O(B + K), a few percent of a
// softmax. Every row of a confusion matrix is then summed by one thread, in the order of the samples: no atomics, and
// the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "support/lanes.h"

namespace fairkernels {

struct LabelRow {
  const int64_t* data;
  int64_t stride;
  int64_t samples;

  int64_t operator[](int64_t b) const { return data[b * stride]; }
};

// A run of samples of one class, as many as fit the first-level cache together. The division into chunks depends on the
// problem alone, never on the threads.
struct Chunk {
  int64_t label;
  int64_t first;
  int64_t rows;
};

inline int64_t rows_per_chunk(int64_t classes) {
  return std::max<int64_t>(2048 / std::max<int64_t>(padded(classes), 1), 1);
}

template <typename Real>
struct ClassOrder {
  int64_t classes;
  std::vector<int64_t> start;    // class -> first position; start[classes] is where the ignored samples begin
  std::vector<int64_t> sample;   // position -> sample
  std::vector<Real> weight;      // position -> weight of the sample
  std::vector<int64_t> present;  // the classes whose sum is not 0, also if it is NaN
  int64_t most_rows = 0;         // of a chunk

  // `weights` may be null: all ones.
  ClassOrder(LabelRow labels, const Real* weights, int64_t classes, int64_t ignore_index)
      : classes(classes),
        start(classes + 3),
        sample(labels.samples),
        weight(labels.samples, Real(1)),
        weight_of_class_(weights != nullptr ? classes : 0) {
    sort(labels, ignore_index);
    if (weights != nullptr) {
      std::transform(sample.begin(), sample.end(), weight.begin(), [&](int64_t b) { return weights[b]; });
    }
    for (int64_t label = 0; label < classes; ++label) {
      const int64_t rows = start[label + 1] - start[label];
      if (rows == 0) {
        continue;
      }
      if (weights != nullptr) {
        const auto first = weight.begin() + start[label];
        weight_of_class_[label] = std::accumulate(first, first + rows, 0.0);
      }
      most_rows = std::max(most_rows, rows);
      if (count(label) != 0) {
        present.push_back(label);
      }
    }
    most_rows = std::min(most_rows, rows_per_chunk(classes));
  }

  // The sum of a class's weights, and of all classes'.
  double count(int64_t label) const {
    return weight_of_class_.empty() ? start[label + 1] - start[label] : weight_of_class_[label];
  }

  std::vector<double> counts() const {
    std::vector<double> all(classes);
    for (int64_t label : present) {
      all[label] = count(label);
    }
    return all;
  }

  // Calls function(chunk) for the chunks of one class.
  template <typename Function>
  void for_each_chunk(int64_t label, const Function& function) const {
    const int64_t most = rows_per_chunk(classes);
    for (int64_t at = start[label]; at < start[label + 1]; at += most) {
      function(Chunk{label, at, std::min(most, start[label + 1] - at)});
    }
  }

  // The sample to be fetched while the one at `position` is worked on: so much later that memory has the time to answer.
  int64_t ahead(int64_t position) const {
    const int64_t steps = std::clamp<int64_t>(512 / classes, 1, 8);
    return sample[std::min<int64_t>(position + steps, sample.size() - 1)];
  }

  int64_t elements_per_chunk() const { return classes * most_rows; }

  std::vector<Chunk> chunks() const {
    std::vector<Chunk> all;
    for (int64_t label = 0; label < classes; ++label) {
      for_each_chunk(label, [&](Chunk chunk) { all.push_back(chunk); });
    }
    return all;
  }

 private:
  // Counts two places further on than where a class's first position will be; adding up moves the positions by one, and
  // every sample that takes its place moves its class's by one more. There may be more classes than samples: one array, and
  // as few passes over it as can be.
  void sort(LabelRow labels, int64_t ignore_index) {
    const auto bin = [&](int64_t b) { return labels[b] == ignore_index ? classes : labels[b]; };
    for (int64_t b = 0; b < labels.samples; ++b) {
      ++start[bin(b) + 2];
    }
    for (int64_t label = 0; label <= classes; ++label) {
      start[label + 2] += start[label + 1];
    }
    for (int64_t b = 0; b < labels.samples; ++b) {
      sample[start[bin(b) + 1]++] = b;
    }
  }

  std::vector<double> weight_of_class_;  // empty: all weights are one
};

}  // namespace fairkernels
