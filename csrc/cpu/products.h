// Matrix products whose right operand is decoded a panel at a time: what linear.cpp drives, one `Kernels` for each kind
// of processor. No torch.
//
// Operands are packed into 32-bit words, each of which holds a float32 or (in `pairs`) two bfloat16 that follow each
// other along the reduction. A left operand is packed once, as tiles of `tile_rows` rows; of the right operand one
// panel is decoded at a time, into a scratch buffer that stays in the cache of the core. Sums are float32 and taken in
// one order, whatever the number of threads and the shape of the tiles.
#pragma once

#include <cstdint>

#include "../params.h"
#include "convert.h"

namespace fastlora {

// Fills the elements [first, stop) of the flattened matrix, which lie next to each other from `out` on. Of `p`, out and
// out_stride are not read. `stream`: the output bypasses the caches.
using Decode = void (*)(const DequantizeParams& p, int64_t first, int64_t stop, void* out, bool stream);

Decode decoder(DType dtype, CpuCapability capability);

// A matrix of the type computed in, or float32 and then rounded to it.
struct Matrix {
  const void* data;
  int64_t rows;
  int64_t columns;  // as far apart as rows are
  DType dtype;
};

// The right operand: a matrix, or the packed weight where `weight` is set.
struct Right {
  Matrix matrix;
  const PackedWeight* weight;
  bool down;  // the reduction runs down the columns (dy W), not along the rows (x W^T)
};

// A left operand as `Kernels::pack` leaves it: tiles of (words, rows), the last one with as many rows as are left; a
// word that has no second element is zero there.
struct Left {
  const uint32_t* words;
  int64_t rows;
  int64_t depth;  // elements of the reduction
  int64_t tile_rows;
};

// out = scale * (first_scale * (first_left first_right) + bias + left right), rounded once; what `out` holds is added
// to it before where `onto` is set.
struct Product {
  Left left;
  Right right;
  Left first_left;  // no rows: none
  Right first_right;
  float first_scale;
  const float* bias;  // (columns,) or null
  float scale;
  void* out;
  DType out_dtype;
  bool onto;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
  DType dtype;  // computed in
};

constexpr int64_t kDepthWords = 512;   // of the reduction that a panel covers at once
constexpr int64_t kPanelColumns = 64;  // at most

struct Kernels {
  bool pairs;
  int64_t max_rows;       // of a tile
  int64_t panel_columns;  // a panel has this many columns, or a multiple up to kPanelColumns

  // Packs the rows of `source`, or its columns as rows, into the tiles [first, last) of `left.words`.
  void (*pack)(const Matrix& source, bool columns_as_rows, const Left& left, int64_t first, int64_t last);

  // The columns of one panel, rows of the tiles [first, last). `scratch`: panel_scratch() words, 64-byte aligned.
  void (*multiply)(
      const Product& p,
      CpuCapability capability,
      int64_t panel_columns,
      int64_t panel,
      int64_t first,
      int64_t last,
      uint32_t* scratch);
};

constexpr int64_t panel_scratch(int64_t panel_columns, int64_t rows) { return panel_columns * (kDepthWords + rows); }

const Kernels& kernels_plain();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();

}  // namespace fastlora
