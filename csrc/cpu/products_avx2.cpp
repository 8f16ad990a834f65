// Products on processors with AVX2 and FMA: words are float32.

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "blocks.inl"
#include "transpose.inl"

namespace fastlora {
namespace {

struct Source;

struct Arch {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6;
  static constexpr bool kPairs = false;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const uint32_t* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); }
  static V load_floats(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, V x) { _mm256_store_ps(p, x); }
  static V broadcast(const uint32_t* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static constexpr auto transpose = transpose_floats;
  static bool pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
  static bool pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
namespace {

// 8 rows of 8 words become 8 words of 8 rows.
inline void transpose8(__m256 (&x)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = t[i];
}

// Rounded to bfloat16, and float32 again.
inline __m256 rounded_bfloat16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i top = _mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_castsi256_ps(top), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}

constexpr int kRun = 16;

// The values of the nibbles in one block.
struct Table {
  __m256 low, high;
};

// Rows of a weight that are decoded in steps of kRun elements, rounded to bfloat16 if `narrow`.
class Rows : public Blocks {
 public:
  Rows(const PackedWeight& w, bool narrow) : Blocks(w), narrow_(narrow) {}

  Table table(int64_t element) const {
    const __m256 a = _mm256_set1_ps(absmax(element));
    const Table t{_mm256_mul_ps(_mm256_load_ps(code_), a), _mm256_mul_ps(_mm256_load_ps(code_ + 8), a)};
    return narrow_ ? Table{rounded_bfloat16(t.low), rounded_bfloat16(t.high)} : t;
  }

  void decode(int64_t element, const Table& table, __m256 (&out)[2]) const {
    const __m128i byte = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed(element)));
    const __m128i low_nibble = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(byte, 4), low_nibble);
    const __m128i nibbles = _mm_unpacklo_epi8(high, _mm_and_si128(byte, low_nibble));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i index = _mm256_cvtepu8_epi32(i == 0 ? nibbles : _mm_srli_si128(nibbles, 8));
      // The permutation reads 3 bits of an index; the fourth, as a sign, chooses between its results.
      out[i] = _mm256_blendv_ps(
          _mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
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
  Table table{};
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = (begin + w) * weight->k + c0;
    rows.prefetch(element + kRowsAhead * weight->k);
    for (int64_t c = 0; c < columns; c += kRun) {
      if (c == 0 || rows.begins_block(element + c)) table = rows.table(element + c);
      __m256 values[2];
      rows.decode(element + c, table, values);
      float* out = reinterpret_cast<float*>(panel + (c / kColumns * words + w) * kColumns);
      _mm256_store_ps(out, values[0]);
      _mm256_store_ps(out + 8, values[1]);
    }
  }
  return true;
}

bool Arch::pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight)) return false;
  const Rows rows(*weight, narrow(s.dtype));
  for (int64_t c = 0; c < columns; c += 8) {
    const int64_t present = smaller(8, weight->n - c0 - c);
    float* out = reinterpret_cast<float*>(panel + c / kColumns * words * kColumns + c % kColumns);
    Table table[8];
    for (int64_t w = 0; w < words; w += kRun) {
      __m256 x[2][8];
      for (int r = 0; r < 8; ++r) {
        __m256 part[2]{};
        if (r < present) {
          const int64_t element = (c0 + c + r) * weight->k + begin + w;
          if (w == 0 || rows.begins_block(element)) table[r] = rows.table(element);
          rows.decode(element, table[r], part);
        }
        for (int i = 0; i < 2; ++i) x[i][r] = part[i];
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        transpose8(x[i]);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) _mm256_store_ps(out + (w + 8 * i + j) * kColumns, x[i][j]);
      }
    }
  }
  return true;
}

}  // namespace

const Kernels& kernels_avx2() { return kKernels; }

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace fastlora {
const Kernels& kernels_avx2() { return kernels_plain(); }
}  // namespace fastlora

#endif
