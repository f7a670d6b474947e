// The samples of one problem in the order of their classes, by a stable counting sort: O(B + K) for each block, a few percent
// of a softmax; O(B log B) where there are many more classes than samples. Every row of a confusion matrix, or what a block
// adds to it, is then summed by one thread, in the order of the samples: no atomics, and since blocks depend on the problem
// alone, the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
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

// The samples of one class, of one block where there are several: so many positions in the order, from the first one on.
// Their weights add up to `count`.
struct ClassGroup {
  int64_t label;
  int64_t first;
  int64_t rows;
  double count;
};

// Where a class is among those that are listed in increasing order.
inline int64_t place_in(const std::vector<int64_t>& present, int64_t label) {
  return std::lower_bound(present.begin(), present.end(), label) - present.begin();
}

template <typename Real>
struct ClassOrder {
  int64_t classes;
  std::vector<int64_t> sample;     // position -> sample; those that are ignored come last
  std::vector<ClassGroup> groups;  // of the classes that occur, in increasing order, block by block
  std::vector<int64_t> present;    // the classes whose count is not 0, also if it is NaN
  int64_t counted = 0;             // positions before those that are ignored
  int64_t most_rows = 0;           // of a chunk

  // `weights` may be null: all ones. Where there is more than one block of so many samples, each is put in order by itself.
  ClassOrder(LabelRow labels, const Real* weights, int64_t classes, int64_t ignore_index,
             int64_t block = std::numeric_limits<int64_t>::max())
      : classes(classes),
        sample(labels.samples),
        weight_(weights != nullptr ? labels.samples : 0),
        steps_ahead_(std::clamp<int64_t>(512 / std::max<int64_t>(classes, 1), 1, 8)) {
    const auto bin = [=](int64_t b) { return labels[b] == ignore_index ? classes : labels[b]; };
    if (classes > 16 * labels.samples) {
      sort_samples(bin);
    } else {
      sort_blocks(bin, block);
    }
    if (weights != nullptr) {
      std::transform(sample.begin(), sample.end(), weight_.begin(), [&](int64_t b) { return weights[b]; });
    }
    for (ClassGroup& group : groups) {
      const auto first = weight_.begin() + (weights != nullptr ? group.first : 0);
      group.count = weights != nullptr ? std::accumulate(first, first + group.rows, 0.0) : group.rows;
      most_rows = std::max(most_rows, group.rows);
    }
    add_up_classes(block < labels.samples);
    most_rows = std::min(most_rows, rows_per_chunk(classes));
  }

  Real weight(int64_t position) const { return weight_.empty() ? Real(1) : weight_[position]; }

  bool has_blocks() const { return !count_of_class_.empty(); }

  // Without rows if the class does not occur. Not for orders with blocks.
  ClassGroup group(int64_t label) const {
    const auto before = [](const ClassGroup& group, int64_t wanted) { return group.label < wanted; };
    const auto at = std::lower_bound(groups.begin(), groups.end(), label, before);
    return at == groups.end() || at->label != label ? ClassGroup{label, 0, 0, 0} : *at;
  }

  // The sum of a class's weights, and of all classes'.
  double count(int64_t label) const { return has_blocks() ? count_of_class_[label] : group(label).count; }

  std::vector<double> counts() const {
    std::vector<double> all(classes);
    for (const ClassGroup& group : groups) {
      all[group.label] += group.count;
    }
    return all;
  }

  // Calls function(chunk) for the chunks of one class.
  template <typename Function>
  void for_each_chunk(const ClassGroup& group, const Function& function) const {
    const int64_t most = rows_per_chunk(classes);
    for (int64_t done = 0; done < group.rows; done += most) {
      function(Chunk{group.label, group.first + done, std::min(most, group.rows - done)});
    }
  }

  // The sample to be fetched while the one at `position` is worked on: so much later that memory has the time to answer.
  int64_t ahead(int64_t position) const { return sample[std::min<int64_t>(position + steps_ahead_, sample.size() - 1)]; }

  int64_t elements_per_chunk() const { return classes * most_rows; }
  int64_t elements_per_group() const { return counted * classes / std::max<int64_t>(groups.size(), 1) + classes; }

  std::vector<Chunk> chunks() const {
    std::vector<Chunk> all;
    all.reserve(groups.size() + counted / rows_per_chunk(classes));
    for (const ClassGroup& group : groups) {
      for_each_chunk(group, [&](Chunk chunk) { all.push_back(chunk); });
    }
    return all;
  }

 private:
  template <typename Bin>
  void sort_blocks(const Bin& bin, int64_t block) {
    const int64_t samples = sample.size();
    std::vector<int64_t> start(classes + 3);
    std::vector<int64_t> ignored;
    for (int64_t first = 0; first < samples; first += std::min(block, samples - first)) {
      const int64_t last = first + std::min(block, samples - first);
      groups.reserve(groups.size() + std::min(classes, last - first));
      sort_block(bin, first, last, start, ignored);
      counted = start[classes];
    }
    std::copy(ignored.begin(), ignored.end(), sample.begin() + counted);
  }

  // Counts two places further on than where a class's first position will be; adding up moves the positions by one, and
  // every sample that takes its place moves its class's by one more.
  template <typename Bin>
  void sort_block(const Bin& bin, int64_t first, int64_t last, std::vector<int64_t>& start, std::vector<int64_t>& ignored) {
    std::fill(start.begin(), start.end(), int64_t{0});
    start[0] = start[1] = counted;
    for (int64_t b = first; b < last; ++b) {
      ++start[bin(b) + 2];
    }
    for (int64_t label = 0; label < classes; ++label) {
      start[label + 2] += start[label + 1];
    }
    for (int64_t b = first; b < last; ++b) {
      if (bin(b) == classes) {
        ignored.push_back(b);
      } else {
        sample[start[bin(b) + 1]++] = b;
      }
    }
    for (int64_t label = 0; label < classes; ++label) {
      if (start[label] != start[label + 1]) {
        groups.push_back({label, start[label], start[label + 1] - start[label], 0});
      }
    }
  }

  // For few samples of many classes, where an array of these would cost more than the sort.
  template <typename Bin>
  void sort_samples(const Bin& bin) {
    std::iota(sample.begin(), sample.end(), int64_t{0});
    std::sort(sample.begin(), sample.end(), [&](int64_t a, int64_t b) { return std::pair(bin(a), a) < std::pair(bin(b), b); });
    groups.reserve(sample.size());
    for (int64_t b : sample) {
      if (bin(b) == classes) {
        break;
      }
      if (groups.empty() || groups.back().label != bin(b)) {
        groups.push_back({bin(b), counted, 0, 0});
      }
      ++groups.back().rows;
      ++counted;
    }
  }

  // Without blocks a group is all of its class, and there is no need for an array of all classes.
  void add_up_classes(bool blocks) {
    present.reserve(std::min<int64_t>(classes, groups.size()));
    const auto see = [this](int64_t label, double count) {
      if (count != 0) {
        present.push_back(label);
      }
    };
    if (!blocks) {
      for (const ClassGroup& group : groups) {
        see(group.label, group.count);
      }
      return;
    }
    count_of_class_ = counts();
    for (int64_t label = 0; label < classes; ++label) {
      see(label, count_of_class_[label]);
    }
  }

  std::vector<Real> weight_;  // position -> weight; empty: all ones
  std::vector<double> count_of_class_;  // where there are blocks
  int64_t steps_ahead_;
};

}  // namespace fairkernels
