// The symmetry penalty summed over all unordered pairs of classes, and its derivative (Sy-FAR, arXiv 2509.12939).
// Bound by memory: K * K rates are read once, and the backward writes as many; about 15 operations for a pair. C_ij and
// C_ji lie far apart, so pairs are visited in tiles: 32 x 32 rates and the transpose of their mirror image, side by
// side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "support/elements.h"
#include "support/lanes.h"
#include "support/pair_penalty.h"
#include "support/platform.h"

namespace fairkernels {

constexpr int64_t kTile = 32;

template <typename T>
struct Matrix {
  T* data;
  int64_t row_stride;
  int64_t column_stride;
};

// The pairs (first_row + i, first_column + j) with i < rows, j < columns, and above the diagonal. Rows are padded to
// whole lanes, with columns that are not active.
template <typename Real>
struct PairTile {
  int64_t first_row;
  int64_t first_column;
  int64_t rows;
  int64_t columns;
  alignas(64) Real forward[kTile][kTile];   // C_ij, later the derivative by it
  alignas(64) Real backward[kTile][kTile];  // C_ji, later the derivative by it
  alignas(64) Real row_active[kTile];       // 1 or 0
  alignas(64) Real column_active[kTile];

  bool diagonal() const { return first_row == first_column; }
};

// Sum over the active pairs of one tile, rows in fp32 or fp64, their totals in double. On the diagonal, columns are
// struck off as the rows reach them.
template <typename Real>
FK_INLINE double tile_penalty_body(PairTile<Real>& tile, Real eps) {
  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (tile.diagonal()) {
      tile.column_active[i] = 0;
    }
    const Real* forward = tile.forward[i];
    const Real* backward = tile.backward[i];
    const Real* active = tile.column_active;
    const Real sum = lane_sum<Real>(padded(tile.columns), [=](int64_t j) {
      const Real value = pair_penalty(forward[j], backward[j], eps).value;
      return active[j] != 0 ? value : Real(0);
    });
    total += tile.row_active[i] != 0 ? sum : Real(0);
  }
  return total;
}

// The same, leaving `scale` times the derivatives in place of the rates; 0 where a pair is not active.
template <typename Real>
FK_INLINE double tile_slopes_body(PairTile<Real>& tile, Real eps, Real scale) {
  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (tile.diagonal()) {
      tile.column_active[i] = 0;
    }
    Real* forward = tile.forward[i];
    Real* backward = tile.backward[i];
    const Real* active = tile.column_active;
    const Real row_active = tile.row_active[i];
    const Real sum = lane_sum<Real>(padded(tile.columns), [=](int64_t j) {
      const PairPenalty<Real> pair = pair_penalty(forward[j], backward[j], eps);
      const bool charged = row_active * active[j] != 0;
      forward[j] = charged ? scale * pair.by_forward : Real(0);
      backward[j] = charged ? scale * pair.by_backward : Real(0);
      return charged ? pair.value : Real(0);
    });
    total += sum;
  }
  return total;
}

FK_CLONES static double tile_penalty(PairTile<float>& tile, float eps) {
  return tile_penalty_body(tile, eps);
}

FK_CLONES static double tile_penalty(PairTile<double>& tile, double eps) {
  return tile_penalty_body(tile, eps);
}

FK_CLONES static double tile_slopes(PairTile<float>& tile, float eps, float scale) {
  return tile_slopes_body(tile, eps, scale);
}

FK_CLONES static double tile_slopes(PairTile<double>& tile, double eps, double scale) {
  return tile_slopes_body(tile, eps, scale);
}

// Of a whole tile, by squares of four: so much the compiler keeps in registers. What lies beyond `rows` and `columns` comes
// along and is worth nothing.
template <typename Real>
FK_INLINE void transpose(const Real (&from)[kTile][kTile], int64_t rows, int64_t columns, Real (&to)[kTile][kTile]) {
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < columns; j += 4) {
      for (int64_t r = 0; r < 4; ++r) {
        for (int64_t c = 0; c < 4; ++c) {
          to[j + c][i + r] = from[i + r][j + c];
        }
      }
    }
  }
}

// A row of a tile. A call of memcpy would take longer than the copy.
template <typename T, typename Real>
FK_INLINE void load_tile_row(const T* from, int64_t stride, int64_t n, Real* to) {
  if constexpr (std::is_same_v<T, Real>) {
    if (stride == 1) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        to[j] = from[j];
      }
      return;
    }
  }
  load(from, stride, n, to);
}

template <typename T, typename Real>
FK_INLINE void store_tile_row(const Real* from, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, Real>) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      to[j] = from[j];
    }
  } else {
    store_run(from, n, to);
  }
}

template <typename T, typename Real>
FK_INLINE void load_tile_body(const Matrix<const T>& rates, const Real* active, PairTile<Real>& tile) {
  alignas(64) Real mirror[kTile][kTile];
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t at = (tile.first_row + i) * rates.row_stride + tile.first_column * rates.column_stride;
    load_tile_row(rates.data + at, rates.column_stride, tile.columns, tile.forward[i]);
    std::fill(tile.forward[i] + tile.columns, tile.forward[i] + padded(tile.columns), Real(0));
  }
  for (int64_t j = 0; j < tile.columns; ++j) {
    const int64_t at = (tile.first_column + j) * rates.row_stride + tile.first_row * rates.column_stride;
    load_tile_row(rates.data + at, rates.column_stride, tile.rows, mirror[j]);
  }
  transpose(mirror, tile.columns, tile.rows, tile.backward);
  for (int64_t i = 0; i < tile.rows; ++i) {
    std::fill(tile.backward[i] + tile.columns, tile.backward[i] + padded(tile.columns), Real(0));
  }
  std::copy_n(active + tile.first_row, tile.rows, tile.row_active);
  std::copy_n(active + tile.first_column, tile.columns, tile.column_active);
  std::fill(tile.column_active + tile.columns, tile.column_active + kTile, Real(0));
}

// A tile on the diagonal is its own mirror image: the derivatives by C_ji go below the diagonal.
template <typename Real>
FK_INLINE void fold_diagonal(PairTile<Real>& tile) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      tile.forward[i][j] = tile.backward[j][i];
    }
  }
}

template <typename T, typename Real>
FK_INLINE void store_tile_body(PairTile<Real>& tile, const Matrix<T>& slopes) {
  if (tile.diagonal()) {
    fold_diagonal(tile);
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    store_tile_row(tile.forward[i], tile.columns,
                   slopes.data + (tile.first_row + i) * slopes.row_stride + tile.first_column);
  }
  if (tile.diagonal()) {
    return;
  }
  alignas(64) Real mirror[kTile][kTile];
  transpose(tile.backward, tile.rows, tile.columns, mirror);
  for (int64_t j = 0; j < tile.columns; ++j) {
    store_tile_row(mirror[j], tile.rows, slopes.data + (tile.first_column + j) * slopes.row_stride + tile.first_row);
  }
}

template <typename T, typename Real>
void load_tile(const Matrix<const T>& rates, const Real* active, PairTile<Real>& tile) {
  load_tile_body(rates, active, tile);
}

template <typename T, typename Real>
void store_tile(PairTile<Real>& tile, const Matrix<T>& slopes) {
  store_tile_body(tile, slopes);
}

FK_CLONES static void load_tile(const Matrix<const float>& rates, const float* active, PairTile<float>& tile) {
  load_tile_body(rates, active, tile);
}

FK_CLONES static void store_tile(PairTile<float>& tile, const Matrix<float>& slopes) {
  store_tile_body(tile, slopes);
}

// A row of tiles begins at the diagonal, so the later ones are shorter: a turn of a loop takes one from either end, and all
// turns have the same to do.
inline int64_t tile_rows(int64_t classes) {
  return (classes + kTile - 1) / kTile;
}

inline int64_t tile_turns(int64_t classes) {
  return (tile_rows(classes) + 1) / 2;
}

// Calls function(tile) for the tiles of one row of tiles, their rates loaded.
template <typename T, typename Real, typename Function>
void for_each_tile_of_row(const Matrix<const T>& rates, int64_t classes, const Real* active, int64_t tile_row,
                          const Function& function) {
  PairTile<Real> tile;
  tile.first_row = tile_row * kTile;
  tile.rows = std::min(kTile, classes - tile.first_row);
  for (tile.first_column = tile.first_row; tile.first_column < classes; tile.first_column += kTile) {
    tile.columns = std::min(kTile, classes - tile.first_column);
    load_tile(rates, active, tile);
    function(tile);
  }
}

// The same for the tiles of one turn.
template <typename T, typename Real, typename Function>
void for_each_tile(const Matrix<const T>& rates, int64_t classes, const Real* active, int64_t turn, const Function& function) {
  const int64_t other = tile_rows(classes) - 1 - turn;
  for_each_tile_of_row(rates, classes, active, turn, function);
  if (other != turn) {
    for_each_tile_of_row(rates, classes, active, other, function);
  }
}

// The penalty of one turn; these are added in order, for the same bits on any number of threads.
template <typename T, typename Real>
double turn_penalty(const Matrix<const T>& rates, int64_t classes, const Real* active, Real eps, int64_t turn) {
  double total = 0;
  for_each_tile(rates, classes, active, turn, [&](PairTile<Real>& tile) { total += tile_penalty(tile, eps); });
  return total;
}

// The same, and `scale` times its derivatives by the rates, (i, j) and (j, i). Columns of `slopes` lie side by side; it
// may be `rates` itself, because a tile and its mirror image are read before they are written and belong to no other
// tile.
template <typename T, typename Real, typename Out>
double turn_slopes(const Matrix<const T>& rates, int64_t classes, const Real* active, Real eps, Real scale, int64_t turn,
                   const Matrix<Out>& slopes) {
  double total = 0;
  for_each_tile(rates, classes, active, turn, [&](PairTile<Real>& tile) {
    total += tile_slopes(tile, eps, scale);
    store_tile(tile, slopes);
  });
  return total;
}

// Without counts a class is present if its row sum is not 0; NaN is not 0.
template <typename T, typename Real>
void present_by_row_sum(const Matrix<const T>& rates, int64_t classes, Real* active) {
  std::vector<Real> row(classes);
  for (int64_t i = 0; i < classes; ++i) {
    load(rates.data + i * rates.row_stride, rates.column_stride, classes, row.data());
    active[i] = std::accumulate(row.begin(), row.end(), Real(0)) != 0;
  }
}

}  // namespace fairkernels
