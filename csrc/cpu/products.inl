// The body of every products_*.cpp, for the processor that `Arch` describes. Everything has internal linkage and
// nothing of the standard library is called: this is compiled for several processors, and the linker must not mix the
// results.

namespace fastlora {
namespace {

using V = Arch::V;
constexpr int kLanes = Arch::kLanes;
constexpr int kVectors = 2;  // of columns in a tile
constexpr int kColumns = kVectors * kLanes;
constexpr int kMaxRows = Arch::kMaxRows;
constexpr int kElements = Arch::kPairs ? 2 : 1;  // in a word

// Rows, and words of a row, that are fetched at once before they are transposed into a panel.
constexpr int kFetchRows = kColumns < 16 ? kColumns : 16;
constexpr int64_t kFetchWords = 256;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t words_of(int64_t elements) { return (elements + kElements - 1) / kElements; }

inline bool narrow(DType dtype) { return dtype == DType::kBFloat16; }

// -- from a matrix to words ----------------------------------------------------------------------------------------

struct Source {
  const Right* right;
  DequantizeParams weight;
  Decode decode;
  DType dtype;
};

// Elements [first, first + count) of a row as float32, rounded to the type computed in.
[[maybe_unused]] void fetch_floats(const Source& s, int64_t row, int64_t first, int64_t count, float* out) {
  const Matrix& matrix = s.right->matrix;
  const int64_t offset = row * matrix.columns + first;
  if (s.right->weight != nullptr) {
    if (!narrow(s.dtype)) return s.decode(s.weight, offset, offset + count, out, false);
    uint16_t part[kFetchWords];
    for (int64_t i = 0; i < count; i += kFetchWords) {
      const int64_t n = smaller(kFetchWords, count - i);
      s.decode(s.weight, offset + i, offset + i + n, part, false);
      for (int64_t j = 0; j < n; ++j) out[i + j] = from_bfloat16(part[j]);
    }
    return;
  }
  if (narrow(matrix.dtype)) {
    const uint16_t* src = static_cast<const uint16_t*>(matrix.data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(src[i]);
    return;
  }
  const float* src = static_cast<const float*>(matrix.data) + offset;
  if (narrow(s.dtype)) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(to_bfloat16(src[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = src[i];
  }
}

// The same as bfloat16.
[[maybe_unused]] void fetch_narrow(const Source& s, int64_t row, int64_t first, int64_t count, uint16_t* out) {
  const Matrix& matrix = s.right->matrix;
  const int64_t offset = row * matrix.columns + first;
  if (s.right->weight != nullptr) return s.decode(s.weight, offset, offset + count, out, false);
  if (narrow(matrix.dtype)) {
    std::memcpy(out, static_cast<const uint16_t*>(matrix.data) + offset, sizeof(uint16_t) * count);
    return;
  }
  const float* src = static_cast<const float*>(matrix.data) + offset;
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(src[i]);
}

// A panel: (columns / kColumns, words, kColumns), for the words [begin, begin + words) of the reduction and the columns
// [c0, c0 + columns). What lies outside of the operand is zero.
template <class A>
void pack_panel(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const Matrix& matrix = s.right->matrix;
  if (s.right->down) {
    const int64_t valid = smaller(columns, matrix.columns - c0);
    if (A::pack_down(s, c0, columns, begin, words, panel)) return;
    // Rows that need neither conversion nor filling up are read where they are.
    const bool as_it_is = s.right->weight == nullptr && valid == columns && narrow(matrix.dtype) == A::kPairs &&
                          narrow(s.dtype) == A::kPairs;
    if constexpr (A::kPairs) {
      alignas(64) uint16_t rows[2][kPanelColumns] = {};
      for (int64_t w = 0; w < words; ++w) {
        const int64_t row = 2 * (begin + w);
        uint32_t* out = panel + w * kColumns;
        if (as_it_is && row + 1 < matrix.rows) {
          const uint16_t* even = static_cast<const uint16_t*>(matrix.data) + row * matrix.columns + c0;
          A::interleave(even, even + matrix.columns, columns, out, words * kColumns);
          continue;
        }
        fetch_narrow(s, row, c0, valid, rows[0]);
        if (row + 1 < matrix.rows) {
          fetch_narrow(s, row + 1, c0, valid, rows[1]);
        } else {
          std::memset(rows[1], 0, sizeof rows[1]);
        }
        A::interleave(rows[0], rows[1], columns, out, words * kColumns);
      }
    } else {
      alignas(64) float row[kPanelColumns] = {};
      for (int64_t w = 0; w < words; ++w) {
        const float* from = row;
        if (as_it_is) {
          from = static_cast<const float*>(matrix.data) + (begin + w) * matrix.columns + c0;
        } else {
          fetch_floats(s, begin + w, c0, valid, row);
        }
        for (int64_t c = 0; c < columns; c += kColumns) {
          std::memcpy(panel + (c / kColumns * words + w) * kColumns, from + c, sizeof(float) * kColumns);
        }
      }
    }
    return;
  }
  if (A::pack_along(s, c0, columns, begin, words, panel)) return;
  alignas(64) uint32_t tile[kFetchRows * kFetchWords];
  for (int64_t c = 0; c < columns; c += kFetchRows) {
    const int rows = static_cast<int>(smaller(kFetchRows, matrix.rows - c0 - c));
    uint32_t* out = panel + c / kColumns * words * kColumns + c % kColumns;
    for (int64_t w = 0; w < words; w += kFetchWords) {
      const int64_t n = smaller(kFetchWords, words - w);
      const int64_t first = kElements * (begin + w);
      const int64_t count = smaller(kElements * n, matrix.columns - first);
      for (int r = 0; r < rows; ++r) {
        uint32_t* row = tile + r * kFetchWords;
        if constexpr (A::kPairs) {
          row[n - 1] = 0;
          fetch_narrow(s, c0 + c + r, first, count, reinterpret_cast<uint16_t*>(row));
        } else {
          fetch_floats(s, c0 + c + r, first, count, reinterpret_cast<float*>(row));
        }
      }
      A::transpose(tile, sizeof(uint32_t) * kFetchWords, rows, n * kElements, out + w * kColumns, kColumns, kFetchRows);
    }
  }
}

void pack(const Matrix& source, bool columns_as_rows, const Left& left, int64_t first, int64_t last) {
  const int64_t words = words_of(left.depth), tile_rows = left.tile_rows;
  const int64_t itemsize = narrow(source.dtype) ? 2 : 4;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row0 = tile * tile_rows;
    const int64_t rows = smaller(tile_rows, left.rows - row0);
    uint32_t* out = const_cast<uint32_t*>(left.words) + row0 * words;
    if (!columns_as_rows && (Arch::kPairs || !narrow(source.dtype))) {
      const char* src = static_cast<const char*>(source.data) + row0 * source.columns * itemsize;
      Arch::transpose(src, source.columns * itemsize, rows, left.depth, out, rows, rows);
      continue;
    }
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t r = 0; r < rows; ++r) {
        uint32_t word = 0;
        for (int i = 0; i < kElements; ++i) {
          const int64_t depth = kElements * w + i;
          if (depth >= left.depth) continue;
          const int64_t at = columns_as_rows ? depth * source.columns + row0 + r : (row0 + r) * source.columns + depth;
          if (narrow(source.dtype)) {
            const uint32_t bits = static_cast<const uint16_t*>(source.data)[at];
            word |= Arch::kPairs ? bits << 16 * i : bits << 16;
          } else {
            word = bits_of(static_cast<const float*>(source.data)[at]);
          }
        }
        out[w * rows + r] = word;
      }
    }
  }
}

// -- the product ---------------------------------------------------------------------------------------------------

constexpr int kAhead = 16;  // words of the reduction

// sums (kRows, kColumns) of the product of one tile and the first kUsed vectors of one panel, added to what is there.
template <int kRows, int kUsed>
void tile_product(int64_t words, const uint32_t* left, const uint32_t* panel, float* sums, bool add) {
  V sum[kRows][kUsed];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) sum[r][v] = Arch::zero();
  }
  for (int64_t w = 0; w < words; ++w, left += kRows, panel += kColumns) {
    // Both operands are larger than the first cache.
    __builtin_prefetch(left + kAhead * kRows);
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) __builtin_prefetch(panel + kAhead * kColumns + v * kLanes);
    V right[kUsed];
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) right[v] = Arch::load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V factor = Arch::broadcast(left + r);
#pragma GCC unroll 2
      for (int v = 0; v < kUsed; ++v) sum[r][v] = Arch::multiply_add(factor, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) {
      float* at = sums + r * kColumns + v * kLanes;
      Arch::store(at, add ? Arch::add(Arch::load_floats(at), sum[r][v]) : sum[r][v]);
    }
  }
}

using TileProduct = void (*)(int64_t, const uint32_t*, const uint32_t*, float*, bool);

template <int kUsed, int kRows = kMaxRows>
TileProduct tile_product_of(int64_t rows) {
  if constexpr (kRows == 1) {
    return tile_product<1, kUsed>;
  } else {
    return rows == kRows ? tile_product<kRows, kUsed> : tile_product_of<kUsed, kRows - 1>(rows);
  }
}

TileProduct tile_product_of(int64_t rows, int64_t columns) {
  static_assert(kVectors == 2);
  return columns <= kLanes ? tile_product_of<1>(rows) : tile_product_of<2>(rows);
}

// Writes the valid part of a tile of sums.
void store_tile(const Product& p, const float* sums, int64_t row0, int64_t rows, int64_t c0, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, sums += kColumns) {
    const int64_t at = (row0 + r) * p.row_stride + c0 * p.column_stride;
    if (narrow(p.out_dtype)) {
      uint16_t* out = static_cast<uint16_t*>(p.out) + at;
      if (p.onto) {
        for (int64_t c = 0; c < columns; ++c) {
          uint16_t& place = out[c * p.column_stride];
          place = to_bfloat16(p.scale * sums[c] + from_bfloat16(place));
        }
      } else if (p.column_stride == 1) {
        for (int64_t c = 0; c < columns; ++c) out[c] = to_bfloat16(p.scale * sums[c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) out[c * p.column_stride] = to_bfloat16(p.scale * sums[c]);
      }
    } else {
      float* out = static_cast<float*>(p.out) + at;
      if (p.onto) {
        for (int64_t c = 0; c < columns; ++c) out[c * p.column_stride] += p.scale * sums[c];
      } else {
        for (int64_t c = 0; c < columns; ++c) out[c * p.column_stride] = p.scale * sums[c];
      }
    }
  }
}

Source make_source(const Right& right, DType dtype, CpuCapability capability) {
  Source s{&right, {}, nullptr, dtype};
  if (right.weight != nullptr) {
    static_cast<PackedWeight&>(s.weight) = *right.weight;
    s.weight.dtype = dtype;
    s.decode = decoder(dtype, capability);
  }
  return s;
}

void multiply(
    const Product& p,
    CpuCapability capability,
    int64_t panel_columns,
    int64_t panel,
    int64_t first,
    int64_t last,
    uint32_t* scratch) {
  const int64_t c0 = panel * panel_columns;
  const int64_t valid = smaller(panel_columns, p.columns - c0);
  const int64_t parts = (valid + kColumns - 1) / kColumns;
  const int64_t tile_rows = p.left.tile_rows, tile_sums = tile_rows * kColumns;
  uint32_t* words = scratch;
  float* sums = reinterpret_cast<float*>(scratch + panel_columns * kDepthWords);
  // Of a rank of 16, or what is left of columns, half a panel may be empty.
  const int64_t last_columns = valid - (parts - 1) * kColumns;
  const TileProduct whole = tile_product_of(tile_rows, kColumns), whole_last = tile_product_of(tile_rows, last_columns);

  const auto accumulate = [&](const Left& left, const Right& right, bool add, bool finish) {
    const Source source = make_source(right, p.dtype, capability);
    const int64_t depth = words_of(left.depth);
    for (int64_t begin = 0; begin < depth; begin += kDepthWords) {
      const int64_t n = smaller(kDepthWords, depth - begin);
      pack_panel<Arch>(source, c0, parts * kColumns, begin, n, words);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t row0 = tile * tile_rows, rows = smaller(tile_rows, left.rows - row0);
        const uint32_t* words_of_tile = left.words + row0 * depth + begin * rows;
        for (int64_t part = 0; part < parts; ++part) {
          float* at = sums + ((tile - first) * parts + part) * tile_sums;
          const TileProduct product = rows < tile_rows
                                          ? tile_product_of(rows, part + 1 < parts ? kColumns : last_columns)
                                      : part + 1 < parts ? whole
                                                         : whole_last;
          product(n, words_of_tile, words + part * n * kColumns, at, add);
          if (finish && begin + n == depth) {
            const int64_t column0 = part * kColumns;
            store_tile(p, at, row0, rows, c0 + column0, smaller(kColumns, valid - column0));
          }
        }
      }
      add = true;
    }
  };

  const bool has_first = p.first_left.rows > 0;
  if (has_first) accumulate(p.first_left, p.first_right, false, false);
  if (p.bias != nullptr || (has_first && p.first_scale != 1.0f)) {
    for (int64_t i = 0; i < (last - first) * parts; ++i) {
      float bias[kColumns];
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t column = i % parts * kColumns + c;
        bias[c] = p.bias != nullptr && column < valid ? p.bias[c0 + column] : 0.0f;
      }
      for (int64_t r = 0; r < tile_rows; ++r) {
        float* at = sums + i * tile_sums + r * kColumns;
        for (int64_t c = 0; c < kColumns; ++c) at[c] = has_first ? p.first_scale * at[c] + bias[c] : bias[c];
      }
    }
  }
  accumulate(p.left, p.right, has_first || p.bias != nullptr, true);
}

constexpr Kernels kKernels{Arch::kPairs, kMaxRows, kColumns < 32 ? 32 : kColumns, pack, multiply};

}  // namespace
}  // namespace fastlora
