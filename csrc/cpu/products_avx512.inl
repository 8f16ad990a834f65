// What both kinds of AVX-512 share: moves of 32-bit words, a decoder that writes panels, most of an `Arch`.

#include "blocks.inl"

namespace fastlora {
namespace {

// 16 rows of 16 words become 16 words of 16 rows.
inline void transpose16(__m512i (&x)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int j = i / 4 * 8 + i % 4;
    t[j] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The words of `rows` (at most 16) rows of `elements` elements, as (words, out_stride): out_rows words each, those of
// absent rows and elements zero. out_stride is out_rows, or out_rows 16.
template <int kElements>
void transpose_words(
    const void* source,
    int64_t row_bytes,
    int64_t rows,
    int64_t elements,
    uint32_t* out,
    int64_t out_stride,
    int out_rows) {
  const char* src = static_cast<const char*>(source);
  // A store under a mask takes longer. What a whole one writes too far the next one writes over.
  const uint32_t* end = out + ((elements + kElements - 1) / kElements - 1) * out_stride + out_rows;
  const auto store = [end, stored = static_cast<__mmask16>((1u << out_rows) - 1)](uint32_t* at, __m512i words) {
    if (end - at >= 16) {
      _mm512_storeu_si512(at, words);
    } else {
      _mm512_mask_storeu_epi32(at, stored, words);
    }
  };
  for (int64_t e = 0; e < elements; e += 16 * kElements, src += 64) {
    const int64_t left = elements - e;
    __m512i x[16];
    if (rows == 16 && left >= 16 * kElements) {
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(src + r * row_bytes);
    } else {
      const uint32_t all = left >= 16 * kElements ? 0xffffffffu >> (32 - 16 * kElements) : (1u << left) - 1;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const uint32_t present = r < rows ? all : 0;
        if constexpr (kElements == 2) {
          x[r] = _mm512_maskz_loadu_epi16(present, src + r * row_bytes);
        } else {
          x[r] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(present), src + r * row_bytes);
        }
      }
    }
    transpose16(x);
    const int64_t words = left >= 16 * kElements ? 16 : (left + kElements - 1) / kElements;
    if (words == 16) {
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) store(out + w * out_stride, x[w]);
    } else {
      alignas(64) uint32_t rest[16][16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) _mm512_store_si512(rest[w], x[w]);
      for (int w = 0; w < words; ++w) {
        store(out + w * out_stride, _mm512_load_si512(rest[w]));
      }
    }
    out += 16 * out_stride;
  }
}

constexpr int kRun = 32;

// Rounded to bfloat16, and float32 again.
inline __m512 rounded_bfloat16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i top = _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(top, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Rows of a weight that are decoded in steps of kRun elements. kElements is that of a word: 1, then as float32 (rounded
// to bfloat16 if `narrow`), or 2.
template <int kElements>
class Rows : public Blocks {
 public:
  Rows(const PackedWeight& w, bool narrow) : Blocks(w), codes_(_mm512_load_ps(code_)), narrow_(narrow) {}

  // The values of the nibbles in the block of `element`.
  __m512i table(int64_t element) const {
    const __m512 values = _mm512_mul_ps(codes_, _mm512_set1_ps(absmax(element)));
    return encode<kElements>(kElements == 1 && narrow_ ? rounded_bfloat16(values) : values);
  }

  // kRun elements in kRun / 16 / kElements vectors.
  void decode(int64_t element, __m512i table, __m512i* out) const {
    const uint8_t* src = packed(element);
    if constexpr (kElements == 2) {
      // The permutation reads 5 bits of an index; the table is there twice, so the fifth does not matter.
      const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
      out[0] =
          _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16)), table);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + 8 * i)));
        out[i] =
            _mm512_permutexvar_epi32(_mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32)), table);
      }
    }
  }

 private:
  template <int kKind>
  static __m512i encode(__m512 values);

  __m512 codes_;
  bool narrow_;
};

// The panel of x W^T: rows of the weight become columns.
template <int kElements>
void pack_rows_along(
    const PackedWeight& w,
    bool narrow,
    int64_t c0,
    int64_t columns,
    int64_t begin,
    int64_t words,
    int part_columns,
    uint32_t* panel) {
  constexpr int kVectorsOfRun = kRun / 16 / kElements;
  const Rows<kElements> rows(w, narrow);
  for (int64_t c = 0; c < columns; c += 16) {
    const int present = static_cast<int>(w.n - c0 - c < 16 ? w.n - c0 - c : 16);
    uint32_t* out = panel + c / part_columns * words * part_columns + c % part_columns;
    __m512i table[16];
    for (int64_t word = 0; word < words; word += kRun / kElements) {
      const int64_t first = (begin + word) * kElements;
      __m512i x[kVectorsOfRun][16];
      for (int r = 0; r < 16; ++r) {
        __m512i part[kVectorsOfRun];
        if (r < present) {
          const int64_t element = (c0 + c + r) * w.k + first;
          if (word == 0 || rows.begins_block(element)) table[r] = rows.table(element);
          rows.decode(element, table[r], part);
        } else {
          for (int i = 0; i < kVectorsOfRun; ++i) part[i] = _mm512_setzero_si512();
        }
        for (int i = 0; i < kVectorsOfRun; ++i) x[i][r] = part[i];
      }
#pragma GCC unroll 2
      for (int i = 0; i < kVectorsOfRun; ++i) {
        transpose16(x[i]);
        uint32_t* at = out + (word + 16 * i) * part_columns;
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_store_si512(at + r * part_columns, x[i][r]);
      }
    }
  }
}

// What an `Arch` is but for its products and what it packs itself.
template <int kElements>
struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 14;
  static constexpr bool kPairs = kElements == 2;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const uint32_t* p) { return _mm512_load_ps(p); }
  static V load_floats(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, V x) { _mm512_store_ps(p, x); }
  static V broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static void transpose(
      const void* source,
      int64_t row_bytes,
      int64_t rows,
      int64_t elements,
      uint32_t* out,
      int64_t out_stride,
      int64_t out_rows) {
    transpose_words<kElements>(source, row_bytes, rows, elements, out, out_stride, static_cast<int>(out_rows));
  }
};

}  // namespace
}  // namespace fastlora
