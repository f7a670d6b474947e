// The leading singular value of matrices of any size with its vectors, and its gradient.
// Up to a shorter side of 128, if it fits into shared memory, a block has a matrix: one launch, one read, see
// spectral_iteration.cuh. Beyond, a launch a step, see spectral_steps.cuh.
// Backward, the outer product of u and v: bound by memory, one launch, one write, 4 bytes an entry in fp32,
// one product. Floor: the write.
#pragma once

#include "cuda/problems.cuh"
#include "cuda/spectral_iteration.cuh"
#include "cuda/spectral_norm.h"
#include "cuda/spectral_steps.cuh"

namespace fairkernels {

constexpr int kMatrixLoadsInFlight = 8;

// ---- A matrix of one block

// It lies upright: its columns are the shorter side.
struct Upright {
  bool turned;
  int rows;
  int columns;
  int64_t row_stride;
  int64_t column_stride;
};

FK_HOST_DEVICE inline Upright upright(const SpectralNormTask& task) {
  const int rows = static_cast<int>(task.rows);
  const int columns = static_cast<int>(task.columns);
  if (task.rows < task.columns) {
    return {true, columns, rows, task.column_stride, task.row_stride};
  }
  return {false, rows, columns, task.row_stride, task.column_stride};
}

// Rows of an odd number of entries: those of a column lie in different banks. Where several rows make up those of a warp
// they lie without gaps.
FK_HOST_DEVICE inline int spectral_pitch(int columns) {
  const bool fills_warp = columns == 2 || columns == 4 || columns == 8 || columns == 16;
  return fills_warp ? columns : columns | 1;
}

template <typename Real>
FK_DEVICE void load_matrix(const SpectralNormTask& task, const Upright& shape, const SharedTile<Real>& tile) {
  const int64_t offset = offset_of(task.matrix_at, device::block());
  const auto load = [&](auto type) {
    load_tile<kMatrixLoadsInFlight>(static_cast<const decltype(type)*>(task.matrix) + offset, shape.row_stride, shape.column_stride, tile);
  };
  if constexpr (sizeof(Real) == 8) {
    load(double{});
  } else if (task.dtype == Dtype::float32) {
    load(float{});
  } else if (task.dtype == Dtype::bfloat16) {
    load(BFloat16{});
  } else {
    load(Half{});
  }
  device::barrier();
}

template <typename Real, int kEntries>
FK_KERNEL(kSpectralThreads) spectral_norm_on_chip(FK_CONSTANT(SpectralNormTask) task) {
  using Memory = SpectralMemory<Real>;
  FK_SHARED(Memory, memory);
  const int64_t problem = device::block();
  const Upright shape = upright(task);
  const SharedTile<Real> matrix{device::shared_memory<Real>(), shape.rows, shape.columns, spectral_pitch(shape.columns)};
  load_matrix(task, shape, matrix);

  StartHint hint{nullptr, task.start_dtype, task.start_stride, shape.turned};
  if (task.start != nullptr) {
    hint.data = static_cast<const char*>(task.start) + offset_of(task.start_at, problem) * size_of(task.start_dtype);
  }
  Real* of_rows = static_cast<Real*>(shape.turned ? task.v : task.u) + problem * shape.rows;
  Real* of_columns = static_cast<Real*>(shape.turned ? task.u : task.v) + problem * shape.columns;
  BlockIteration<kEntries, Real> iteration(matrix, task.options, memory);
  const double sigma = iteration.leading_pair(
      hint, shape.turned, [&](int i, double entry) { of_rows[i] = static_cast<Real>(entry); },
      [&](int j, double entry) { of_columns[j] = static_cast<Real>(entry); });
  if (device::thread() == 0) {
    store_element(task.sigma, task.dtype, problem, sigma);
  }
}

template <typename Real>
size_t on_chip_bytes(const SpectralNormTask& task) {
  const int64_t shorter = task.rows < task.columns ? task.rows : task.columns;
  const int64_t longer = task.rows < task.columns ? task.columns : task.rows;
  return shorter == 0 ? 0 : sizeof(Real) * longer * spectral_pitch(static_cast<int>(shorter));
}

// Whether a block has a matrix for itself. One without entries has nothing but zeros to write.
template <typename Real>
bool is_on_chip(const SpectralNormTask& task) {
  constexpr int64_t kMostSide = 1 << 20;
  constexpr size_t kBeside = sizeof(SpectralMemory<Real>) + 2048;  // what the kernel and the runtime need
  const int64_t shorter = task.rows < task.columns ? task.rows : task.columns;
  return shorter == 0 || (shorter <= kMostSpectralColumns && task.rows <= kMostSide && task.columns <= kMostSide &&
         on_chip_bytes<Real>(task) + kBeside <= device::most_shared_memory());
}

template <typename Real>
int launch_on_chip(const SpectralNormTask& task, void* stream) {
  const Upright shape = upright(task);
  const device::Grid grid{task.problems, spectral_threads(shape.rows, shape.columns), on_chip_bytes<Real>(task)};
  switch (spectral_entries(shape.columns)) {
    case 1:
      return device::launch(spectral_norm_on_chip<Real, 1>, grid, stream, task);
    case 2:
      return device::launch(spectral_norm_on_chip<Real, 2>, grid, stream, task);
    default:
      return device::launch(spectral_norm_on_chip<Real, 4>, grid, stream, task);
  }
}

template <typename Real>
int64_t spectral_scratch(const SpectralNormTask& task) {
  return is_on_chip<Real>(task) ? 0 : steps_of<Real>(task).doubles;
}

template <typename T>
int launch_spectral_norm(const SpectralNormTask& task, void* stream) {
  using Real = Accumulator<T>;
  return is_on_chip<Real>(task) ? launch_on_chip<Real>(task, stream) : launch_steps<T>(task, stream);
}

// ---- The gradient

constexpr int kOuterThreads = 256;
constexpr int64_t kOuterVectors = 4;  // of a thread

template <typename T>
constexpr int kOuterVector = 16 / sizeof(T);

template <typename T>
constexpr int64_t kOuterEntries = kOuterThreads * kOuterVectors * kOuterVector<T>;  // of a block

template <typename T>
FK_KERNEL(kOuterThreads) outer_product(FK_CONSTANT(OuterProductTask) task, int64_t parts, bool wide) {
  using Real = Accumulator<T>;
  const int64_t problem = device::block() / parts;
  const int64_t part = device::block() - problem * parts;
  const int64_t entries = task.rows * task.columns;
  const Real* u = static_cast<const Real*>(task.u) + problem * task.rows;
  const Real* v = static_cast<const Real*>(task.v) + problem * task.columns;
  T* out = static_cast<T*>(task.out) + problem * entries;
  const double factor = element_at<double>(task.grad, task.dtype, offset_of(task.grad_at, problem));
#pragma unroll 1
  for (int64_t k = 0; k < kOuterVectors; ++k) {
    const int64_t first = part * kOuterEntries<T> + (k * kOuterThreads + device::thread()) * kOuterVector<T>;
    if (first >= entries) {
      return;
    }
    int64_t row = entries <= UINT32_MAX ? static_cast<uint32_t>(first) / static_cast<uint32_t>(task.columns)
                                        : first / task.columns;
    int64_t column = first - row * task.columns;
    Real scale = static_cast<Real>(factor * u[row]);
    T vector[kOuterVector<T>];
#pragma unroll
    for (int e = 0; e < kOuterVector<T>; ++e) {
      if (first + e < entries) {
        vector[e] = narrow(scale * v[column], T{});
      }
      if (++column == task.columns && first + e + 1 < entries) {
        column = 0;
        scale = static_cast<Real>(factor * u[++row]);
      }
    }
    if (wide) {
      device::Bytes16 bytes;
      memcpy(&bytes, vector, sizeof(bytes));
      device::store16_once(out + first, bytes);
    } else {
#pragma unroll
      for (int e = 0; e < kOuterVector<T>; ++e) {
        if (first + e < entries) {
          out[first + e] = vector[e];
        }
      }
    }
  }
}

template <typename T>
int launch_outer_product(const OuterProductTask& task, void* stream) {
  const int64_t entries = task.rows * task.columns;
  const int64_t parts = (entries + kOuterEntries<T> - 1) / kOuterEntries<T>;
  const bool wide = entries % kOuterVector<T> == 0;
  return device::launch(outer_product<T>, {task.problems * parts, kOuterThreads}, stream, task, parts, wide);
}

}  // namespace fairkernels
