// The leading singular value of a matrix that is too large for one block, by the Gram matrix G of its shorter side S.
// A launch for each of: the largest entry, G, perhaps the sum of its parts and the image of a start, the begin, every
// step, of which those after the end do nothing, and the end. Nobody waits for the device.
// The matrix is read three times, 12 bytes an entry in fp32, for G ceil(S / 64) times out of the cache; G takes S / 2
// multiply-adds an entry. A step is bound by memory: one read of G, 4 * S * S bytes, and by every block two of the six
// vectors. The small vector work in between is done by every block again, which is cheaper than a launch of its own.
// Floor: the multiply-adds of G, and a read of it and a launch for each step.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/problems.cuh"
#include "cuda/reduce.cuh"
#include "cuda/spectral_iteration.cuh"
#include "cuda/spectral_norm.h"

namespace fairkernels {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / device::kWarp;
constexpr int kMostRowsOfWarp = 4;
constexpr int kStepChunk = 1024;   // entries of a vector that are in shared memory at a time
constexpr int kExtentThreads = 512;
constexpr int64_t kMostExtents = 64;
constexpr int kSums = 8;           // v·Av, v·Ar, r·Ar, v·Ap, r·Ap, p·Ap, v·v, p·p
constexpr int64_t kStretch = 1024;  // of the long side, whose products are added in the type of the matrix
constexpr int kGramThreads = 256;
constexpr int kGramChunk = 32;
constexpr int kEndColumns = 32;

template <typename Real>
constexpr int kGramTile = sizeof(Real) == 8 ? 32 : 64;

FK_HOST_DEVICE inline int64_t parts_of(int64_t n, int64_t each) {
  return (n + each - 1) / each;
}

// A matrix by its sides, and the memory of its iteration. Each problem has two sets of state, which take turns: what one
// launch writes the next one reads. A set has the vectors v, r, p and their products with G, the sums of all blocks, and a
// flag that ends the iteration. The answer is the vector at which it has ended, and behind it theta.
struct Steps {
  SpectralNormTask task;
  bool short_is_v;
  int64_t n;  // the short side
  int64_t long_side;
  int64_t short_stride;
  int64_t long_stride;
  int64_t rows_of_warp;
  int64_t blocks;     // of a step of a problem
  int64_t width;      // of a row of G, behind which lies the sum of the row of the matrix
  int64_t tiles;      // of a side of G
  int64_t tile_parts;
  int64_t long_each;  // of a split of the long side
  int64_t splits;
  int64_t extents;    // of a problem

  double* extent;   // [problems, extents, 2]: the largest entry by absolute value, and minus the least
  double* state;    // [problems, 2, 6, n]
  double* sums;     // [problems, 2, kSums, blocks]
  double* answer;   // [problems, n + 1]
  double* ended;    // [problems, 2]
  double* image;    // [problems, n] of a start of the long side
  void* gram;       // [problems, splits, n, width], in the type in which sums are kept
  int64_t doubles;  // of all these
};

template <typename Real>
Steps steps_of(const SpectralNormTask& task) {
  Steps steps{};
  steps.task = task;
  steps.short_is_v = task.rows > task.columns;
  steps.n = steps.short_is_v ? task.columns : task.rows;
  steps.long_side = steps.short_is_v ? task.rows : task.columns;
  steps.short_stride = steps.short_is_v ? task.column_stride : task.row_stride;
  steps.long_stride = steps.short_is_v ? task.row_stride : task.column_stride;
  steps.rows_of_warp = steps.n <= 1056 ? 1 : steps.n <= 2112 ? 2 : kMostRowsOfWarp;
  steps.blocks = parts_of(steps.n, steps.rows_of_warp * kStepWarps);
  steps.width = parts_of(steps.n + 1, 16) * 16;
  steps.tiles = parts_of(steps.n, kGramTile<Real>);
  steps.tile_parts = steps.tiles * (steps.tiles + 1) / 2;
  const int64_t wanted = parts_of(256, steps.tile_parts);
  steps.long_each = parts_of(parts_of(steps.long_side, wanted), kStretch) * kStretch;
  steps.splits = parts_of(steps.long_side, steps.long_each);
  const int64_t extents = parts_of(task.rows * task.columns, 16 * kExtentThreads);
  steps.extents = extents < kMostExtents ? extents : kMostExtents;

  double* next = static_cast<double*>(task.scratch);
  const auto take = [&](int64_t of_problem) {
    double* taken = next;
    next = next == nullptr ? nullptr : next + task.problems * of_problem;
    steps.doubles += task.problems * of_problem;
    return taken;
  };
  steps.extent = take(steps.extents * 2);
  steps.state = take(12 * steps.n);
  steps.sums = take(2 * kSums * steps.blocks);
  steps.answer = take(steps.n + 1);
  steps.ended = take(2);
  steps.image = take(task.start != nullptr && !steps.short_is_v ? steps.n : 0);
  steps.gram = take(parts_of(steps.splits * steps.n * steps.width * sizeof(Real), sizeof(double)));
  return steps;
}

// ---- The matrix

template <typename T>
FK_DEVICE const T* matrix_of(const Steps& steps, int64_t problem) {
  return static_cast<const T*>(steps.task.matrix) + offset_of(steps.task.matrix_at, problem);
}

template <typename Real>
FK_DEVICE Real* gram_of(const Steps& steps, int64_t problem) {
  return static_cast<Real*>(steps.gram) + problem * steps.splits * steps.n * steps.width;
}

template <typename T>
FK_KERNEL(kExtentThreads) spectral_extent(FK_CONSTANT(Steps) steps) {
  using Real = Accumulator<T>;
  constexpr Real kMost = kInfinity<Real>;
  const int64_t problem = device::block() / steps.extents;
  const int64_t part = device::block() - problem * steps.extents;
  const bool along_long = steps.long_stride <= steps.short_stride;
  const int64_t lines = along_long ? steps.n : steps.long_side;
  const int64_t length = along_long ? steps.long_side : steps.n;
  const int64_t line_stride = along_long ? steps.short_stride : steps.long_stride;
  const int64_t stride = along_long ? steps.long_stride : steps.short_stride;
  const T* matrix = matrix_of<T>(steps, problem);
  Real largest = 0;
  Real lowest = 0;
  // several lines side by side where they are short
  const int warps = kExtentThreads / device::kWarp;
  for (int64_t line = part * warps + device::thread() / device::kWarp; line < lines; line += steps.extents * warps) {
    for (int64_t at = device::thread() % device::kWarp; at < length; at += device::kWarp) {
      const Real entry = widen(matrix[line * line_stride + at * stride]);
      const Real size = entry < 0 ? -entry : entry;
      const Real known = size < kMost ? size : kMost;  // also for NaN
      largest = known > largest ? known : largest;
      lowest = entry < lowest ? entry : lowest;
    }
  }
  largest = block_max(largest);
  lowest = block_max(-lowest);
  if (device::thread() == 0) {
    steps.extent[2 * device::block()] = largest;
    steps.extent[2 * device::block() + 1] = lowest;
  }
}

struct Extent {
  double largest;
  bool usable;  // finite and not 0
  bool nonnegative;
  int exponent;
};

// By all threads of a block.
FK_DEVICE Extent extent_of(const Steps& steps, int64_t problem) {
  double largest = 0;
  double below = 0;
  if (device::thread() < steps.extents) {
    largest = steps.extent[2 * (problem * steps.extents + device::thread())];
    below = steps.extent[2 * (problem * steps.extents + device::thread()) + 1];
  }
  largest = block_max(largest);
  below = block_max(below);
  const bool usable = largest > 0 && largest < kInfinity<double>;
  return {largest, usable, !(below > 0), usable ? exponent_to_take_out(largest) : 0};
}

// ---- The Gram matrix

template <typename Real>
struct alignas(16) FourOf {
  Real of[4];
};

// A tile of the upper triangle over a part of the long side; its mirror image is written along.
template <typename T>
FK_KERNEL(kGramThreads) spectral_gram(FK_CONSTANT(Steps) steps) {
  using Real = Accumulator<T>;
  constexpr int kTile = kGramTile<Real>;
  constexpr int kEach = kTile / 16;         // rows and columns of a thread
  constexpr int kPitch = kGramChunk + 4;    // fours of neighbouring rows lie in different banks
  struct Shared {
    alignas(16) Real a[kTile][kPitch];
    alignas(16) Real b[kTile][kPitch];
  };
  FK_SHARED(Shared, memory);
  const int64_t split = device::block() % steps.splits;
  int64_t part = device::block() / steps.splits % steps.tile_parts;
  const int64_t problem = device::block() / steps.splits / steps.tile_parts;
  int64_t first = 0;
  for (; part >= steps.tiles - first; ++first) {
    part -= steps.tiles - first;
  }
  const int64_t second = first + part;
  const auto scale = PowerOfTwo<Real>::of(-extent_of(steps, problem).exponent);
  const T* matrix = matrix_of<T>(steps, problem);
  const int64_t begin = split * steps.long_each;
  const int64_t end = begin + steps.long_each < steps.long_side ? begin + steps.long_each : steps.long_side;
  const bool along_long = steps.long_stride <= steps.short_stride;
  const int ty = device::thread() / 16;
  const int tx = device::thread() % 16;

  double total[kEach][kEach] = {};
  double row_total = 0;
  Real stretch[kEach][kEach] = {};
  Real row_stretch = 0;
  for (int64_t k = begin; k < end; k += kGramChunk) {
    device::barrier();  // the last chunk has been read
#pragma unroll
    for (int e = 0; e < kTile * kGramChunk / kGramThreads; ++e) {
      const int at = e * kGramThreads + device::thread();
      const int i = along_long ? at / kGramChunk : at % kTile;
      const int j = along_long ? at % kGramChunk : at / kTile;
      const int64_t of_long = (k + j) * steps.long_stride;
      const int64_t row = first * kTile + i;
      const int64_t column = second * kTile + i;
      memory.a[i][j] = row < steps.n && k + j < end ? scale.times(widen(matrix[row * steps.short_stride + of_long])) : Real(0);
      memory.b[i][j] =
          column < steps.n && k + j < end ? scale.times(widen(matrix[column * steps.short_stride + of_long])) : Real(0);
    }
    device::barrier();
#pragma unroll 2
    for (int j = 0; j < kGramChunk; j += 4) {
      FourOf<Real> a[kEach];
      FourOf<Real> b[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        a[e] = *reinterpret_cast<const FourOf<Real>*>(&memory.a[ty + 16 * e][j]);
        b[e] = *reinterpret_cast<const FourOf<Real>*>(&memory.b[tx + 16 * e][j]);
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
#pragma unroll
          for (int c = 0; c < kEach; ++c) {
            stretch[r][c] = std::fma(a[r].of[q], b[c].of[q], stretch[r][c]);
          }
        }
      }
    }
    if (first == second && device::thread() < kTile) {
      for (int j = 0; j < kGramChunk; ++j) {
        row_stretch += memory.a[device::thread()][j];
      }
    }
    if ((k - begin) % kStretch == kStretch - kGramChunk || k + kGramChunk >= end) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          total[r][c] += static_cast<double>(stretch[r][c]);
          stretch[r][c] = 0;
        }
      }
      row_total += static_cast<double>(row_stretch);
      row_stretch = 0;
    }
  }

  Real* out = gram_of<Real>(steps, problem) + split * steps.n * steps.width;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int64_t i = first * kTile + ty + 16 * r;
      const int64_t j = second * kTile + tx + 16 * c;
      if (i < steps.n && j < steps.n) {
        out[i * steps.width + j] = static_cast<Real>(total[r][c]);
        if (first != second) {
          out[j * steps.width + i] = static_cast<Real>(total[r][c]);
        }
      }
    }
  }
  const int64_t row = first * kTile + device::thread();
  if (first == second && device::thread() < kTile && row < steps.n) {
    out[row * steps.width + steps.n] = static_cast<Real>(row_total);
  }
}

// The parts of the long side, in order, into the first.
template <typename Real>
FK_KERNEL(kStepThreads) spectral_gram_sum(FK_CONSTANT(Steps) steps, int64_t blocks) {
  const int64_t problem = device::block() / blocks;
  const int64_t entries = steps.n * steps.width;
  const int64_t at = device::block() % blocks * kStepThreads + device::thread();
  if (at < entries && at % steps.width <= steps.n) {
    Real* gram = gram_of<Real>(steps, problem);
    double sum = 0;
    for (int64_t split = 0; split < steps.splits; ++split) {
      sum += gram[split * entries + at];
    }
    gram[at] = static_cast<Real>(sum);
  }
}

// ---- The start

// The first direction, not of length 1 yet; of the lengths of the whole vectors.
struct StartDirection {
  StartHint hint;
  bool nonnegative;
  double weight;
  double beside;

  FK_DEVICE StartDirection(const Steps& steps, int64_t problem, int64_t n, bool hinted, bool is_nonnegative)
      : hint{nullptr, steps.task.start_dtype, steps.task.start_stride, false},
        nonnegative(is_nonnegative),
        weight(0),
        beside(0) {
    if (!hinted) {
      return;
    }
    hint.data = static_cast<const char*>(steps.task.start) +
                offset_of(steps.task.start_at, problem) * size_of(steps.task.start_dtype);
    double of_hint = 0;
    double of_first = 0;
    for (int64_t at = device::thread(); at < n; at += device::threads()) {
      of_hint += hint(at) * hint(at);
      of_first += first_entry(at, nonnegative) * first_entry(at, nonnegative);
    }
    weight = hint_weight(std::sqrt(block_sum(of_hint)));
    beside = kBesideHint / std::sqrt(block_sum(of_first));
  }

  FK_DEVICE double operator()(int64_t at) const {
    const double first = first_entry(at, nonnegative);
    return weight > 0 ? weight * hint(at) + beside * first : first;
  }
};

// The problem of a block of a step, and the rows of G of each of its warps.
struct StepRows {
  int64_t problem;
  int64_t part;
  int64_t first;  // of this warp

  FK_DEVICE explicit StepRows(const Steps& steps)
      : problem(device::block() / steps.blocks),
        part(device::block() - problem * steps.blocks),
        first((part * kStepWarps + device::thread() / device::kWarp) * steps.rows_of_warp) {}
};

FK_DEVICE int lane() {
  return device::thread() % device::kWarp;
}

// Bound by memory: one read of the matrix. A start is a vector of its long side, the iteration is one of the short.
template <typename T>
FK_KERNEL(kStepThreads) spectral_start_image(FK_CONSTANT(Steps) steps) {
  using Real = Accumulator<T>;
  const StepRows rows(steps);
  const Extent extent = extent_of(steps, rows.problem);
  const auto scale = PowerOfTwo<Real>::of(-extent.exponent);
  const StartDirection start(steps, rows.problem, steps.long_side, true, extent.nonnegative);
  const T* matrix = matrix_of<T>(steps, rows.problem);
  for (int64_t row = rows.first; row < rows.first + steps.rows_of_warp && row < steps.n; ++row) {
    double sum = 0;
    for (int64_t at = lane(); at < steps.long_side; at += device::kWarp) {
      const Real entry = scale.times(widen(matrix[row * steps.short_stride + at * steps.long_stride]));
      sum = std::fma(static_cast<double>(entry), start(at), sum);
    }
    sum = warp_sum(sum);
    if (lane() == 0) {
      steps.image[rows.problem * steps.n + row] = extent.usable ? sum : 0;
    }
  }
}

// ---- Products

template <typename Real, int kVectors>
struct StepMemory {
  Real chunk[kVectors][kStepChunk];
  double sums[kSums];
  double of_warp[kStepWarps][kSums];
};

// The products of the rows of this warp with vectors that vectors_at(at, x) gives, kVectors of them.
template <typename Real, int kVectors, typename VectorsAt>
FK_DEVICE void multiply_rows(const Steps& steps, const StepRows& rows, StepMemory<Real, kVectors>& memory,
                             const VectorsAt& vectors_at, double (&products)[kMostRowsOfWarp][kVectors]) {
  const Real* gram = gram_of<Real>(steps, rows.problem);
  Real sums[kMostRowsOfWarp][kVectors] = {};
#pragma unroll 1
  for (int64_t first = 0; first < steps.n; first += kStepChunk) {
    const int length = steps.n - first < kStepChunk ? static_cast<int>(steps.n - first) : kStepChunk;
    device::barrier();  // the last chunk has been read
    for (int at = device::thread(); at < length; at += kStepThreads) {
      double x[kVectors];
      vectors_at(first + at, x);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        memory.chunk[i][at] = static_cast<Real>(x[i]);
      }
    }
    device::barrier();
    for (int at = lane(); at < length; at += device::kWarp) {
#pragma unroll
      for (int r = 0; r < kMostRowsOfWarp; ++r) {
        const int64_t row = rows.first + r;
        const Real entry = r < steps.rows_of_warp && row < steps.n ? gram[row * steps.width + first + at] : Real(0);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          sums[r][i] = std::fma(entry, memory.chunk[i][at], sums[r][i]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kMostRowsOfWarp; ++r) {
    warp_sums(sums[r]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      products[r][i] = static_cast<double>(sums[r][i]);
    }
  }
}

// Adds what the warps have, in order, and leaves it for the next launch.
template <typename Memory>
FK_DEVICE void leave_sums(const Steps& steps, const StepRows& rows, int set, int count, Memory& memory,
                          const double (&sums)[kSums]) {
  if (lane() == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      memory.of_warp[device::thread() / device::kWarp][i] = sums[i];
    }
  }
  device::barrier();
  if (device::thread() < count) {
    double sum = 0;
    for (int warp = 0; warp < kStepWarps; ++warp) {
      sum += memory.of_warp[warp][device::thread()];
    }
    steps.sums[((2 * rows.problem + set) * kSums + device::thread()) * steps.blocks + rows.part] = sum;
  }
}

// Those of all blocks, by the warps; in shared memory afterwards.
template <typename Memory>
FK_DEVICE void add_sums(const Steps& steps, int64_t problem, int set, Memory& memory) {
  const int number = device::thread() / device::kWarp;
  const double* sums = steps.sums + ((2 * problem + set) * kSums + number) * steps.blocks;
  double sum = 0;
  for (int64_t part = lane(); part < steps.blocks; part += device::kWarp) {
    sum += sums[part];
  }
  sum = warp_sum(sum);
  if (lane() == 0) {
    memory.sums[number] = sum;
  }
  device::barrier();
}
static_assert(kSums == kStepWarps, "each warp adds one of the sums");

FK_DEVICE double* state_of(const Steps& steps, int64_t problem, int set) {
  return steps.state + (2 * problem + set) * 6 * steps.n;
}

FK_DEVICE double of_length_1(double length) {
  return 1 / (length > 0 ? length : 1);
}

// Writes the first set of state: v and Av, no other direction.
template <typename Real>
FK_KERNEL(kStepThreads) spectral_begin(FK_CONSTANT(Steps) steps) {
  using Memory = StepMemory<Real, 1>;
  FK_SHARED(Memory, memory);
  const StepRows rows(steps);
  const bool has_image = steps.task.start != nullptr && !steps.short_is_v;  // that is taken as it is
  const Extent extent = extent_of(steps, rows.problem);
  const StartDirection start(steps, rows.problem, steps.n, steps.task.start != nullptr && steps.short_is_v,
                             extent.nonnegative);
  const Real* gram = gram_of<Real>(steps, rows.problem);
  const double* image = steps.image + rows.problem * steps.n;
  // where a row of the matrix is all 0, so is the vector from the beginning
  const auto x_at = [&](int64_t at) {
    const bool is_zero = gram[at * (steps.width + 1)] == 0;
    return is_zero ? 0.0 : has_image ? image[at] : start(at);
  };
  double squares = 0;
  for (int64_t at = device::thread(); extent.usable && at < steps.n; at += kStepThreads) {
    const double x = x_at(at);
    squares += x * x;
  }
  const double factor = of_length_1(std::sqrt(block_sum(squares)));
  double products[kMostRowsOfWarp][1];
  multiply_rows<Real, 1>(
      steps, rows, memory, [&](int64_t at, double (&x)[1]) { x[0] = extent.usable ? factor * x_at(at) : 0; }, products);
  double* state = state_of(steps, rows.problem, 0);
  double sums[kSums] = {};
#pragma unroll
  for (int r = 0; r < kMostRowsOfWarp; ++r) {
    const int64_t row = rows.first + r;
    if (r < steps.rows_of_warp && row < steps.n) {
      const double v = extent.usable ? factor * x_at(row) : 0;
      const double av = products[r][0];
      if (lane() == 0) {
        for (int i = 0; i < 6; ++i) {
          state[i * steps.n + row] = i == 0 ? v : i == 3 ? av : 0;
        }
      }
      sums[0] += v * av;
      sums[1] += steps.task.options.accelerated ? 0 : av * av;
      sums[6] += v * v;
    }
  }
  leave_sums(steps, rows, 0, kSums, memory, sums);
  if (rows.part == 0 && device::thread() == 0) {
    steps.ended[2 * rows.problem] = extent.usable ? 0 : 1;
  }
}

// ---- Steps

// The best combination of v, r and p: theta, then the factors of the three in the new v and in the new p.
struct Rotation {
  double theta;
  double v[3];
  double p[3];
};

FK_DEVICE Rotation rotation_of(const double (&sums)[kSums]) {
  const double per_v = of_length_1(std::sqrt(sums[6]));
  const double per_p = of_length_1(std::sqrt(sums[7]));
  const double theta = sums[0] * per_v * per_v;
  const double a = sums[1] * per_v;
  const double c = sums[2] - theta;
  const double b = sums[3] * per_v * per_p;
  const double d = sums[4] * per_p;
  const double e = sums[5] * per_p * per_p - theta;
  const bool moves = a * a + b * b > 0;
  const Coefficients best = moves ? leading_eigenvector(a, b, c, d, e) : Coefficients{1, 0, 0};
  const double gain = 2 * (best.v * best.r * a + best.v * best.p * b + best.r * best.p * d) + best.r * best.r * c +
                      best.p * best.p * e;
  const double sine = std::sqrt(best.r * best.r + best.p * best.p);
  const double turn = best.v * of_length_1(sine);
  return {theta + gain,
          {best.v * per_v, best.r, best.p * per_p},
          {-sine * per_v, turn * best.r, turn * best.p * per_p}};
}

// An entry of the combination of three vectors, those from `number` on.
FK_DEVICE double combined(const double* state, int number, int64_t at, int64_t n, const double (&of)[3]) {
  const double* first = state + number * n + at;
  return of[0] * first[0] + of[1] * first[n] + of[2] * first[2 * n];
}

// Where the diagonal of G is largest: a direction that is not mapped to 0.
template <typename Real>
FK_DEVICE int64_t largest_diagonal(const Steps& steps, int64_t problem) {
  const Real* gram = gram_of<Real>(steps, problem);
  Real best = -1;
  for (int64_t at = device::thread(); at < steps.n; at += kStepThreads) {
    const Real entry = gram[at * (steps.width + 1)];
    best = entry > best ? entry : best;
  }
  best = block_max(best);
  double before = 0;  // minus the first place, so that the largest is the first
  for (int64_t at = steps.n - 1 - device::thread(); at >= 0; at -= kStepThreads) {
    before = gram[at * (steps.width + 1)] == best ? static_cast<double>(steps.n - at) : before;
  }
  return steps.n - static_cast<int64_t>(block_max(before));
}

FK_DEVICE void end_here(const Steps& steps, const StepRows& rows, int next) {
  if (rows.part == 0 && device::thread() == 0) {
    steps.ended[2 * rows.problem + next] = 1;
  }
}

// The same with an answer: theta, and of the vector what is in each row.
template <typename Entry>
FK_DEVICE void end_with(const Steps& steps, const StepRows& rows, int next, double theta, const Entry& entry) {
  double* answer = steps.answer + rows.problem * (steps.n + 1);
  const int64_t end = steps.n < rows.first + steps.rows_of_warp ? steps.n : rows.first + steps.rows_of_warp;
  for (int64_t row = rows.first + lane(); row < end; row += device::kWarp) {
    answer[row] = entry(row);
  }
  if (rows.part == 0 && device::thread() == 0) {
    answer[steps.n] = theta;
  }
  end_here(steps, rows, next);
}

template <typename Real>
FK_KERNEL(kStepThreads) spectral_locg_step(FK_CONSTANT(Steps) steps, int old) {
  using Memory = StepMemory<Real, 3>;
  FK_SHARED(Memory, memory);
  FK_SHARED(Rotation, shared_rotation);
  const StepRows rows(steps);
  const int next = 1 - old;
  if (steps.ended[2 * rows.problem + old] != 0) {
    end_here(steps, rows, next);
    return;
  }
  const int64_t n = steps.n;
  const double* before = state_of(steps, rows.problem, old);
  add_sums(steps, rows.problem, old, memory);
  if (device::thread() == 0) {
    shared_rotation = rotation_of(memory.sums);
  }
  device::barrier();
  const Rotation rotation = shared_rotation;

  // the residual of the new v, and how it and the new p lie to each other
  double squares = 0;
  double r_v = 0;
  double p_v = 0;
  double p_r = 0;
  for (int64_t at = device::thread(); at < n; at += kStepThreads) {
    const double v = combined(before, 0, at, n, rotation.v);
    const double p = combined(before, 0, at, n, rotation.p);
    const double r = combined(before, 3, at, n, rotation.v) - rotation.theta * v;
    squares = std::fma(r, r, squares);
    r_v = std::fma(r, v, r_v);
    p_v = std::fma(p, v, p_v);
    p_r = std::fma(p, r, p_r);
  }
  squares = block_sum(squares);
  r_v = block_sum(r_v);
  p_v = block_sum(p_v);
  p_r = block_sum(p_r);
  const double outside = squares - r_v * r_v;
  const double residual = std::sqrt(outside > 0 ? outside : 0);
  const double theta = rotation.theta + r_v;
  const bool lost = theta == 0;  // the first direction happens to be one that is mapped to 0
  if (!(residual > least_residual(steps.task.options) * theta) && !lost) {
    end_with(steps, rows, next, theta, [&](int64_t row) { return combined(before, 0, row, n, rotation.v); });
    return;
  }
  const int64_t pick = lost ? largest_diagonal<Real>(steps, rows.problem) : -1;
  const double per_r = lost ? 0 : of_length_1(residual);
  p_r = (p_r - r_v * p_v) * per_r;
  const double left = 1 - p_v * p_v - p_r * p_r;
  const bool has_p = rotation.p[0] != 0 && left > kDependent && !lost;
  const double per_p = has_p ? 1 / std::sqrt(left) : 0;
  const auto vectors_at = [&](int64_t at, double (&x)[3]) {
    const double v = combined(before, 0, at, n, rotation.v);
    const double r = (combined(before, 3, at, n, rotation.v) - rotation.theta * v - r_v * v) * per_r;
    x[0] = at == pick ? 1 : v;
    x[1] = r;
    x[2] = (combined(before, 0, at, n, rotation.p) - p_v * v - p_r * r) * per_p;
  };
  double products[kMostRowsOfWarp][3];
  multiply_rows<Real, 3>(steps, rows, memory, vectors_at, products);

  double* after = state_of(steps, rows.problem, next);
  double sums[kSums] = {};
#pragma unroll
  for (int i = 0; i < kMostRowsOfWarp; ++i) {
    const int64_t row = rows.first + i;
    if (i < steps.rows_of_warp && row < n) {
      double x[3];
      vectors_at(row, x);
      if (lane() == 0) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          after[k * n + row] = x[k];
          after[(k + 3) * n + row] = products[i][k];
        }
      }
      sums[0] += x[0] * products[i][0];
      sums[1] += x[0] * products[i][1];
      sums[2] += x[1] * products[i][1];
      sums[3] += x[0] * products[i][2];
      sums[4] += x[1] * products[i][2];
      sums[5] += x[2] * products[i][2];
      sums[6] += x[0] * x[0];
      sums[7] += x[2] * x[2];
    }
  }
  leave_sums(steps, rows, next, kSums, memory, sums);
  if (rows.part == 0 && device::thread() == 0) {
    steps.ended[2 * rows.problem + next] = 0;
  }
}

template <typename Real>
FK_KERNEL(kStepThreads) spectral_power_step(FK_CONSTANT(Steps) steps, int old) {
  using Memory = StepMemory<Real, 1>;
  FK_SHARED(Memory, memory);
  const StepRows rows(steps);
  const int next = 1 - old;
  if (steps.ended[2 * rows.problem + old] != 0) {
    end_here(steps, rows, next);
    return;
  }
  const int64_t n = steps.n;
  const double* before = state_of(steps, rows.problem, old);
  add_sums(steps, rows.problem, old, memory);
  const double theta = memory.sums[0];
  const double length = std::sqrt(memory.sums[1]);
  double squares = 0;
  for (int64_t at = device::thread(); at < n; at += kStepThreads) {
    const double r = before[3 * n + at] - theta * before[at];
    squares = std::fma(r, r, squares);
  }
  const double residual = std::sqrt(block_sum(squares));
  const bool lost = theta == 0;
  if (!(residual > least_residual(steps.task.options) * theta) && !lost) {
    end_with(steps, rows, next, theta, [&](int64_t row) { return before[row]; });
    return;
  }
  const int64_t pick = lost ? largest_diagonal<Real>(steps, rows.problem) : -1;
  const double factor = lost ? 0 : of_length_1(length);
  const auto vectors_at = [&](int64_t at, double (&x)[1]) { x[0] = at == pick ? 1 : factor * before[3 * n + at]; };
  double products[kMostRowsOfWarp][1];
  multiply_rows<Real, 1>(steps, rows, memory, vectors_at, products);
  double* after = state_of(steps, rows.problem, next);
  double sums[kSums] = {};
#pragma unroll
  for (int i = 0; i < kMostRowsOfWarp; ++i) {
    const int64_t row = rows.first + i;
    if (i < steps.rows_of_warp && row < n) {
      double x[1];
      vectors_at(row, x);
      if (lane() == 0) {
        after[row] = x[0];
        after[3 * n + row] = products[i][0];
      }
      sums[0] += x[0] * products[i][0];
      sums[1] += products[i][0] * products[i][0];
    }
  }
  leave_sums(steps, rows, next, kSums, memory, sums);
  if (rows.part == 0 && device::thread() == 0) {
    steps.ended[2 * rows.problem + next] = 0;
  }
}

// ---- The end

// Bound by memory: one read of the matrix. The vector of the long side is M or its transpose times the other one.
template <typename T>
FK_KERNEL(kStepThreads) spectral_end(FK_CONSTANT(Steps) steps, int old, int64_t parts) {
  using Real = Accumulator<T>;
  struct Shared {
    double x[kStepChunk];
    double of_warp[kStepWarps][kEndColumns];
    StepMemory<Real, 1> sums;
    Rotation rotation;
  };
  FK_SHARED(Shared, memory);
  const int64_t n = steps.n;
  const int64_t problem = device::block() / parts;
  const int64_t part = device::block() - problem * parts;
  const Extent extent = extent_of(steps, problem);
  const auto scale = PowerOfTwo<Real>::of(-extent.exponent);
  const bool ended = steps.ended[2 * problem + old] != 0;
  const double* state = ended ? steps.answer + problem * (n + 1) : state_of(steps, problem, old);
  Rotation rotation{ended && extent.usable ? state[n] : 0, {1, 0, 0}, {0, 0, 0}};
  if (!ended) {
    add_sums(steps, problem, old, memory.sums);
    if (device::thread() == 0) {
      memory.rotation = rotation_of(memory.sums.sums);
      if (!steps.task.options.accelerated) {
        memory.rotation = {memory.sums.sums[0], {1, 0, 0}, {0, 0, 0}};
      }
    }
    device::barrier();
    rotation = memory.rotation;
  }
  const bool combines = !ended && steps.task.options.accelerated;
  const auto x_at = [&](int64_t at) {
    return !extent.usable ? 0 : combines ? combined(state, 0, at, n, rotation.v) : state[at];
  };
  const double sigma = std::sqrt(rotation.theta);
  const double poison = extent.largest - extent.largest;  // NaN if an entry is not finite

  const Real* gram = gram_of<Real>(steps, problem);
  double sign_sum = 0;
  for (int64_t at = device::thread(); extent.usable && at < n; at += kStepThreads) {
    sign_sum += steps.short_is_v ? x_at(at) : x_at(at) * static_cast<double>(gram[at * steps.width + n]);
  }
  const double sign = block_sum(sign_sum) < 0 ? -1 : 1;
  const double factor = sign * of_length_1(sigma);

  // Lanes go along the side that lies side by side in memory.
  const T* matrix = matrix_of<T>(steps, problem);
  const bool along_long = steps.long_stride <= steps.short_stride;
  const int warp = device::thread() / device::kWarp;
  constexpr int kEach = kEndColumns / kStepWarps;
  const int64_t first_column = part * kEndColumns;
  double products[kEach] = {};
  for (int64_t first = 0; first < n && extent.usable; first += kStepChunk) {
    const int length = n - first < kStepChunk ? static_cast<int>(n - first) : kStepChunk;
    device::barrier();
    for (int at = device::thread(); at < length; at += kStepThreads) {
      memory.x[at] = x_at(first + at);
    }
    device::barrier();
    const auto entry = [&](int at, int64_t column) {
      const bool inside = column < steps.long_side;
      return inside ? static_cast<double>(scale.times(
                          widen(matrix[(first + at) * steps.short_stride + column * steps.long_stride])))
                    : 0.0;
    };
    if (along_long) {
      for (int at = warp; at < length; at += kStepWarps) {
        products[0] = std::fma(entry(at, first_column + lane()), memory.x[at], products[0]);
      }
    } else {
      for (int at = lane(); at < length; at += device::kWarp) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          products[k] = std::fma(entry(at, first_column + warp * kEach + k), memory.x[at], products[k]);
        }
      }
    }
  }
  if (along_long) {
    memory.of_warp[warp][lane()] = products[0];
  } else {
    warp_sums(products);
    if (lane() == 0) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        memory.of_warp[0][warp * kEach + k] = products[k];
      }
    }
  }
  device::barrier();
  Real* long_out = static_cast<Real*>(steps.short_is_v ? steps.task.u : steps.task.v) + problem * steps.long_side;
  Real* short_out = static_cast<Real*>(steps.short_is_v ? steps.task.v : steps.task.u) + problem * n;
  const int64_t column = first_column + device::thread();
  if (device::thread() < kEndColumns && column < steps.long_side) {
    double sum = 0;
    for (int from = 0; from < (along_long ? kStepWarps : 1); ++from) {
      sum += memory.of_warp[from][device::thread()];
    }
    long_out[column] = static_cast<Real>(factor * sum + poison);
  }
  for (int64_t at = part * kStepThreads + device::thread(); at < n; at += parts * kStepThreads) {
    short_out[at] = static_cast<Real>(sign * x_at(at) + poison);
  }
  if (part == 0 && device::thread() == 0) {
    store_element(steps.task.sigma, steps.task.dtype, problem, std::ldexp(sigma, extent.exponent) + poison);
  }
}

// ---- Launches

template <typename T>
int launch_steps(const SpectralNormTask& task, void* stream) {
  using Real = Accumulator<T>;
  const Steps steps = steps_of<Real>(task);
  const device::Grid step{task.problems * steps.blocks, kStepThreads};
  int error = device::launch(spectral_extent<T>, {task.problems * steps.extents, kExtentThreads}, stream, steps);
  if (error == 0) {
    error = device::launch(spectral_gram<T>, {task.problems * steps.tile_parts * steps.splits, kGramThreads}, stream, steps);
  }
  if (error == 0 && steps.splits > 1) {
    const int64_t blocks = parts_of(steps.n * steps.width, kStepThreads);
    error = device::launch(spectral_gram_sum<Real>, {task.problems * blocks, kStepThreads}, stream, steps, blocks);
  }
  if (error == 0 && task.start != nullptr && !steps.short_is_v) {
    error = device::launch(spectral_start_image<T>, step, stream, steps);
  }
  if (error == 0) {
    error = device::launch(spectral_begin<Real>, step, stream, steps);
  }
  for (int64_t turn = 0; turn < task.options.iters && error == 0; ++turn) {
    const int old = static_cast<int>(turn % 2);
    error = task.options.accelerated ? device::launch(spectral_locg_step<Real>, step, stream, steps, old)
                                     : device::launch(spectral_power_step<Real>, step, stream, steps, old);
  }
  if (error != 0) {
    return error;
  }
  const int64_t parts = parts_of(steps.long_side, kEndColumns);
  return device::launch(spectral_end<T>, {task.problems * parts, kStepThreads}, stream, steps,
                        static_cast<int>(task.options.iters % 2), parts);
}

}  // namespace fairkernels
