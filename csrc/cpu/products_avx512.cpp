// Products on processors with AVX-512: words are float32.

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "products_avx512.inl"

namespace fastlora {
namespace {

struct Source;

struct Arch {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 14;
  static constexpr bool kPairs = false;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const uint32_t* p) { return _mm512_load_ps(p); }
  static V load_floats(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, V x) { _mm512_store_ps(p, x); }
  static V broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static void transpose(
      const void* source,
      int64_t row_bytes,
      int64_t rows,
      int64_t elements,
      uint32_t* out,
      int64_t out_stride,
      int64_t out_rows) {
    transpose_words<1>(source, row_bytes, rows, elements, out, out_stride, static_cast<int>(out_rows));
  }
  static bool pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel);
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
namespace {

bool Arch::pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || narrow(s.dtype) || !in_whole_blocks(*weight, c0, columns)) return false;
  const Statistics statistics(*weight);
  const __m512 code = code_vector(weight->quant_type);
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = (begin + w) * weight->k + c0;
    for (int64_t c = 0; c < columns; c += 32) {
      const __m512 table = _mm512_mul_ps(code, _mm512_set1_ps(statistics.at(element + c)));
      float* out = reinterpret_cast<float*>(panel + (c / kColumns * words + w) * kColumns);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m128i bytes =
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight->w_packed + (element + c) / 2 + 8 * i));
        const __m512i byte = _mm512_cvtepu8_epi64(bytes);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_store_ps(out + 16 * i, _mm512_permutexvar_ps(index, table));
      }
    }
  }
  return true;
}

}  // namespace

const Kernels& kernels_avx512() { return kKernels; }

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace fastlora {
const Kernels& kernels_avx512() { return kernels_plain(); }
}  // namespace fastlora

#endif
