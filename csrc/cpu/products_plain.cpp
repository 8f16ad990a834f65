// Products on any processor, by vectors of four that compilers map to what the baseline has; NEON on aarch64.

#include "products.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "blocks.inl"
#include "transpose.inl"

namespace fastlora {
namespace {

struct Source;

struct Arch {
#if defined(__aarch64__)
  using V = float32x4_t;
  static constexpr int kMaxRows = 12;  // of 32 registers
  static V multiply_add(V a, V b, V c) { return vfmaq_f32(c, a, b); }
#else
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kMaxRows = 6;
  static V multiply_add(V a, V b, V c) { return c + a * b; }
#endif
  static constexpr int kLanes = 4;
  static constexpr bool kPairs = false;
  static V load_floats(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static V load(const uint32_t* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static V broadcast(const uint32_t* p) {
    const float x = float_of(*p);
    return V{x, x, x, x};
  }
  static V zero() { return V{}; }
  static void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
  static V add(V a, V b) { return a + b; }
  static constexpr auto transpose = transpose_floats;
  static bool pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
  static bool pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
namespace {

constexpr int kRun = 8;

// Rows of a weight that are decoded in steps of kRun elements, rounded to bfloat16 if `narrow`.
class Rows : public Blocks {
 public:
  Rows(const PackedWeight& w, bool narrow) : Blocks(w), narrow_(narrow) {}

  // The values of the nibbles in the block of `element`.
  void table(int64_t element, float (&values)[kCodes]) const {
    const float a = absmax(element);
    for (int i = 0; i < kCodes; ++i) values[i] = code_[i] * a;
    if (!narrow_) return;
    for (int i = 0; i < kCodes; ++i) values[i] = from_bfloat16(to_bfloat16(values[i]));
  }

  // kRun elements, `stride` apart.
  void decode(int64_t element, const float (&values)[kCodes], float* out, int stride) const {
    const uint8_t* src = packed(element);
#pragma GCC unroll 4
    for (int i = 0; i < kRun / 2; ++i) {
      out[2 * i * stride] = values[src[i] >> 4];
      out[(2 * i + 1) * stride] = values[src[i] & 15];
    }
  }

 private:
  bool narrow_;
};

bool Arch::pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  static_assert(kColumns == kRun);
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight) || c0 + columns > weight->k) return false;
  const Rows rows(*weight, narrow(s.dtype));
  float table[kCodes];
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = (begin + w) * weight->k + c0;
    rows.prefetch(element + kRowsAhead * weight->k);
    for (int64_t c = 0; c < columns; c += kRun) {
      if (c == 0 || rows.begins_block(element + c)) rows.table(element + c, table);
      rows.decode(element + c, table, reinterpret_cast<float*>(panel + (c / kColumns * words + w) * kColumns), 1);
    }
  }
  return true;
}

bool Arch::pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight)) return false;
  const Rows rows(*weight, narrow(s.dtype));
  for (int64_t c = 0; c < columns; ++c) {
    float* out = reinterpret_cast<float*>(panel + c / kColumns * words * kColumns + c % kColumns);
    if (c0 + c >= weight->n) {
      for (int64_t w = 0; w < words; ++w) out[w * kColumns] = 0.0f;
      continue;
    }
    float table[kCodes];
    for (int64_t w = 0; w < words; w += kRun) {
      const int64_t element = (c0 + c) * weight->k + begin + w;
      if (w == 0 || rows.begins_block(element)) rows.table(element, table);
      rows.decode(element, table, out + w * kColumns, kColumns);
    }
  }
  return true;
}

}  // namespace

const Kernels& kernels_plain() { return kKernels; }
}  // namespace fastlora
