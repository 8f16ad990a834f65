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

struct Arch : Avx512<1> {
  static V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
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
inline __m512i Rows<1>::encode<1>(__m512 values) {
  return _mm512_castps_si512(values);
}

bool Arch::pack_down(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight) || c0 + columns > weight->k) return false;
  const Rows<1> rows(*weight, narrow(s.dtype));
  __m512i table{};
  for (int64_t w = 0; w < words; ++w) {
    const int64_t element = (begin + w) * weight->k + c0;
    rows.prefetch(element + kRowsAhead * weight->k);
    for (int64_t c = 0; c < columns; c += kRun) {
      if (c == 0 || rows.begins_block(element + c)) table = rows.table(element + c);
      __m512i values[2];
      rows.decode(element + c, table, values);
      uint32_t* out = panel + (c / kColumns * words + w) * kColumns;
      _mm512_store_si512(out, values[0]);
      _mm512_store_si512(out + 16, values[1]);
    }
  }
  return true;
}

bool Arch::pack_along(const Source& s, int64_t c0, int64_t columns, int64_t begin, int64_t words, uint32_t* panel) {
  const PackedWeight* weight = s.right->weight;
  if (weight == nullptr || !in_whole_blocks(*weight)) return false;
  pack_rows_along<1>(*weight, narrow(s.dtype), c0, columns, begin, words, kColumns, panel);
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
