// Products of bfloat16 on processors with AVX512_BF16: a word holds two elements, multiplied and summed at once.

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#include "products_avx512.inl"

namespace fastlora {
namespace {

struct Source;

struct Arch : Avx512<2> {
  static V multiply_add(V a, V b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Two rows of 32 elements become 32 words.
  static void interleave(__m512i even, __m512i odd, uint32_t* out) {
    const __m512i unpack = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0);
    const __m512i upper = _mm512_add_epi16(unpack, _mm512_set1_epi16(16));
    _mm512_store_si512(out, _mm512_permutex2var_epi16(even, unpack, odd));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(even, upper, odd));
  }
  static void interleave(
      const uint16_t* even, const uint16_t* odd, int64_t columns, uint32_t* out, int64_t part_stride) {
    for (int64_t c = 0; c < columns; c += 32, out += part_stride) {
      interleave(_mm512_loadu_si512(even + c), _mm512_loadu_si512(odd + c), out);
    }
  }
  static bool pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
  static bool pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
namespace {

template <>
template <>
inline __m512i Rows<2>::encode<2>(__m512 values) {
  // Subnormal values become zero, as the products take them.
  return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

bool Arch::pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight) || c0 + columns > weight->k || weight->n % 2 != 0) return false;
  const Rows<2> rows(*weight, true);
  __m512i table[2]{};
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = 2 * (begin + w) * weight->k + c0;
    for (int i = 0; i < 2; ++i) rows.prefetch(element + (kRowsAhead + i) * weight->k);
    for (int64_t c = 0; c < columns; c += kRun) {
      __m512i values[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = element + i * weight->k + c;
        if (c == 0 || rows.begins_block(at)) table[i] = rows.table(at);
        rows.decode(at, table[i], values + i);
      }
      interleave(values[0], values[1], panel + (c / kColumns * words + w) * kColumns);
    }
  }
  return true;
}

bool Arch::pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight)) return false;
  pack_rows_along<2>(*weight, true, c0, columns, begin, words, kColumns, panel);
  return true;
}

}  // namespace

const Kernels& kernels_avx512_bf16() { return kKernels; }

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace fastlora {
const Kernels& kernels_avx512_bf16() { return kernels_plain(); }
}  // namespace fastlora

#endif
