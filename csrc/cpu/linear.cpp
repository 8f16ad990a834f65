// One layer as a sequence of products, over chunks of the rows of x. The base weight is decoded once for each chunk.

#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "dropout.h"
#include "products.h"

namespace fastlora {
namespace {

// Words of a packed chunk of rows: they should stay in a shared cache while every panel passes over them.
constexpr int64_t kChunkWords = int64_t{2} << 20;
constexpr int64_t kFewestChunkRows = 256;  // so that decoding the weight stays a small part
constexpr int64_t kMostChunkRows = 1024;   // so that the sums of a panel stay in the cache of a core

constexpr int64_t kFewWords = 1 << 13;  // packed in less time than threads take to begin
constexpr int64_t kDecodeRows = 16;     // of a product, that take as long as decoding its panel

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps: fresh pages cost more than what is written to them here.
class Buffer {
 public:
  uint32_t* words(int64_t count) {
    if (count > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const int64_t bytes = ceil_div(count * int64_t{sizeof(uint32_t)}, 64) * 64;
      memory_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint32_t, Free> memory_;
  int64_t capacity_ = 0;
};

thread_local Buffer panel_buffer;
thread_local Buffer left_buffer;
thread_local Buffer side_buffer;

const Kernels& kernels_of(CpuCapability capability, DType dtype) {
  if (capability == CpuCapability::kAVX512BF16 && dtype == DType::kBFloat16) return kernels_avx512_bf16();
  if (capability >= CpuCapability::kAVX512) return kernels_avx512();
  return capability == CpuCapability::kAVX2 ? kernels_avx2() : kernels_plain();
}

class Layer {
 public:
  Layer(DType dtype, CpuCapability capability, const Threads& threads)
      : kernels_(kernels_of(capability, dtype)), dtype_(dtype), capability_(capability), threads_(threads) {}

  int64_t chunk_rows(int64_t rows, int64_t depth) const {
    const int64_t most = std::clamp(kChunkWords / words_of(depth), kFewestChunkRows, kMostChunkRows);
    return ceil_div(rows, ceil_div(rows, most));
  }

  Left pack(const Matrix& source, bool columns_as_rows, Buffer& buffer) const {
    const int64_t rows = columns_as_rows ? source.columns : source.rows;
    const int64_t depth = columns_as_rows ? source.rows : source.columns;
    const int64_t tile_rows = ceil_div(rows, ceil_div(rows, kernels_.max_rows));
    const int64_t tiles = ceil_div(rows, tile_rows);
    const Left left{buffer.words(tiles * tile_rows * words_of(depth)), rows, depth, tile_rows};
    if (tiles * tile_rows * words_of(depth) <= kFewWords) {
      kernels_.pack(source, columns_as_rows, left, 0, tiles);
    } else {
      threads_.run(
          tiles, [&](int64_t first, int64_t last) { kernels_.pack(source, columns_as_rows, left, first, last); });
    }
    return left;
  }

  // A product without a first term, without bias.
  Product product(const Left& left, const Right& right, int64_t columns, void* out, DType out_dtype) const {
    Product p{};
    p.left = left;
    p.right = right;
    p.first_scale = 1.0f;
    p.scale = 1.0f;
    p.out = out;
    p.out_dtype = out_dtype;
    p.columns = columns;
    p.row_stride = columns;
    p.column_stride = 1;
    p.dtype = dtype_;
    return p;
  }

  void multiply(const Product& p) const {
    const int64_t tiles = ceil_div(p.left.rows, p.left.tile_rows);
    // What the busiest thread does, in rows of a product, for panels of each width and tiles in groups: each group
    // decodes the panel for itself. More pieces than these gain nothing, and a wider panel reads the left operand less
    // often.
    int64_t columns = 0, panels = 0, groups = 1, least = 0;
    for (int64_t width = kPanelColumns; width >= kernels_.panel_columns; width /= 2) {
      const int64_t across = ceil_div(p.columns, width);
      for (int64_t split = 1; split <= std::min(tiles, threads_.count); ++split) {
        const int64_t rows = ceil_div(tiles, split) * p.left.tile_rows;
        const int64_t busiest = ceil_div(across * split, threads_.count) * width * (rows + kDecodeRows);
        if (least > 0 && busiest + busiest / 32 >= least) continue;
        least = busiest;
        columns = width;
        panels = across;
        groups = split;
      }
    }
    const int64_t group = ceil_div(tiles, groups);
    threads_.run(panels * groups, [&](int64_t begin, int64_t end) {
      uint32_t* scratch = panel_buffer.words(panel_scratch(columns, group * p.left.tile_rows));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % groups * group, last = std::min(tiles, first + group);
        if (first < last) kernels_.multiply(p, capability_, columns, i / groups, first, last, scratch);
      }
    });
  }

 private:
  int64_t words_of(int64_t elements) const { return kernels_.pairs ? ceil_div(elements, 2) : elements; }

  const Kernels& kernels_;
  DType dtype_;
  CpuCapability capability_;
  const Threads& threads_;
};

Right along_rows(const void* data, int64_t rows, int64_t columns, DType dtype, const PackedWeight* weight = nullptr) {
  return {{data, rows, columns, dtype}, weight, false};
}

Right down_columns(const void* data, int64_t rows, int64_t columns, DType dtype, const PackedWeight* weight = nullptr) {
  return {{data, rows, columns, dtype}, weight, true};
}

template <typename T>
T* offset(T* data, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

}  // namespace

void linear_forward_cpu(const CpuForward& p, CpuCapability capability, const Threads& threads) {
  const Layer layer(p.dtype, capability, threads);
  std::vector<float> bias;
  if (p.bias != nullptr) {
    bias.resize(p.n);
    for (int64_t i = 0; i < p.n; ++i) {
      bias[i] = p.bias_dtype == DType::kFloat32 ? static_cast<const float*>(p.bias)[i]
                                                : from_bfloat16(static_cast<const uint16_t*>(p.bias)[i]);
    }
  }
  const int64_t chunk = layer.chunk_rows(p.m, p.k);
  for (int64_t row = 0; row < p.m; row += chunk) {
    const int64_t rows = std::min(chunk, p.m - row);
    const Left x = layer.pack({offset(p.x, row * p.k, p.dtype), rows, p.k, p.dtype}, false, left_buffer);
    Product y = layer.product(
        x, along_rows(nullptr, p.n, p.k, p.dtype, &p), p.n, offset(p.y, row * p.n, p.out_dtype), p.out_dtype);
    y.bias = p.bias != nullptr ? bias.data() : nullptr;
    if (p.r > 0) {
      void* u = offset(p.u, row * p.r, p.dtype);
      const Left side =
          p.dropped == nullptr
              ? x
              : layer.pack({offset(p.dropped, row * p.k, p.dtype), rows, p.k, p.dtype}, false, side_buffer);
      layer.multiply(layer.product(side, along_rows(p.lora_a, p.r, p.k, p.adapter_dtype), p.r, u, p.dtype));
      y.first_left = layer.pack({u, rows, p.r, p.dtype}, false, side_buffer);
      y.first_right = along_rows(p.lora_b, p.n, p.r, p.adapter_dtype);
      y.first_scale = p.scale;
    }
    layer.multiply(y);
  }
}

void linear_backward_cpu(const CpuBackward& p, CpuCapability capability, const Threads& threads) {
  const Layer layer(p.dtype, capability, threads);
  const int64_t chunk = layer.chunk_rows(p.m, p.n);
  const bool needs_du = p.r > 0 && (p.dx != nullptr || p.da != nullptr);
  for (int64_t row = 0; (needs_du || p.dx != nullptr) && row < p.m; row += chunk) {
    const int64_t rows = std::min(chunk, p.m - row);
    const Left dy = layer.pack({offset(p.dy, row * p.n, p.dtype), rows, p.n, p.dtype}, false, left_buffer);
    void* du = nullptr;
    if (needs_du) {
      du = offset(p.du, row * p.r, p.dtype);
      Product product = layer.product(dy, down_columns(p.lora_b, p.n, p.r, p.adapter_dtype), p.r, du, p.dtype);
      product.scale = p.scale;
      layer.multiply(product);
    }
    if (p.dx == nullptr) continue;
    Product dx =
        layer.product(dy, down_columns(nullptr, p.n, p.k, p.dtype, &p), p.k, offset(p.dx, row * p.k, p.dtype), p.dtype);
    if (needs_du) {
      const Left left = layer.pack({du, rows, p.r, p.dtype}, false, side_buffer);
      const Right right = down_columns(p.lora_a, p.r, p.k, p.adapter_dtype);
      if (p.dropout.seed == nullptr) {
        dx.first_left = left;
        dx.first_right = right;
      } else {
        layer.multiply(layer.product(left, right, p.k, dx.out, p.dtype));
        const DropoutParams dropped{p.dropout, p.dx, p.dx, p.m, p.k, p.dtype};
        threads.run(
            rows, [&](int64_t begin, int64_t end) { dropout_cpu(dropped, capability, row + begin, row + end); });
        dx.onto = true;
      }
    }
    layer.multiply(dx);
  }
  if (p.da != nullptr) {
    const Left du = layer.pack({p.du, p.m, p.r, p.dtype}, true, side_buffer);
    layer.multiply(layer.product(du, down_columns(p.x, p.m, p.k, p.dtype), p.k, p.da, p.adapter_dtype));
  }
  if (p.db != nullptr) {
    const Left u = layer.pack({p.u, p.m, p.r, p.dtype}, true, side_buffer);
    Product db = layer.product(u, down_columns(p.dy, p.m, p.n, p.dtype), p.n, p.db, p.adapter_dtype);
    db.scale = p.scale;
    db.row_stride = 1;
    db.column_stride = p.r;
    layer.multiply(db);
  }
}

}  // namespace fastlora
