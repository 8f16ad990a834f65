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

struct Arch {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 14;
  static constexpr bool kPairs = true;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const uint32_t* p) { return _mm512_load_ps(p); }
  static V load_floats(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, V x) { _mm512_store_ps(p, x); }
  static V broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V multiply_add(V a, V b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void transpose(
      const void* source,
      int64_t row_bytes,
      int64_t rows,
      int64_t elements,
      uint32_t* out,
      int64_t out_stride,
      int64_t out_rows) {
    transpose_words<2>(source, row_bytes, rows, elements, out, out_stride, static_cast<int>(out_rows));
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
      interleave(_mm512_load_si512(even + c), _mm512_load_si512(odd + c), out);
    }
  }
  static bool pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
namespace {

inline __m256i round_bfloat16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

bool Arch::pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || weight->n % 2 != 0 || !in_whole_blocks(*weight, c0, columns)) return false;
  const Statistics statistics(*weight);
  const __m512 code = code_vector(weight->quant_type);
  const auto decode = [&](int64_t element) {
    const __m256i rounded = round_bfloat16(_mm512_mul_ps(code, _mm512_set1_ps(statistics.at(element))));
    // The permutation reads 5 bits of an index; with the table twice, the fifth does not matter.
    const __m512i table = _mm512_broadcast_i64x4(rounded);
    const __m512i byte =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight->w_packed + element / 2)));
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16)), table);
  };
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = 2 * (begin + w) * weight->k + c0;
    for (int64_t c = 0; c < columns; c += 32) {
      interleave(decode(element + c), decode(element + weight->k + c), panel + (c / kColumns * words + w) * kColumns);
    }
  }
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
