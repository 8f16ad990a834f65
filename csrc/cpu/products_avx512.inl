// What both kinds of AVX-512 share: moves of 32-bit words, and a decoder that writes panels.

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
// absent rows and elements zero.
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
  const __mmask16 stored = static_cast<__mmask16>((1u << out_rows) - 1);
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
      for (int w = 0; w < 16; ++w) _mm512_mask_storeu_epi32(out + w * out_stride, stored, x[w]);
    } else {
      alignas(64) uint32_t rest[16][16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) _mm512_store_si512(rest[w], x[w]);
      for (int w = 0; w < words; ++w) {
        _mm512_mask_storeu_epi32(out + w * out_stride, stored, _mm512_load_si512(rest[w]));
      }
    }
    out += 16 * out_stride;
  }
}

// The statistics of blocks, asked for in any order.
class Statistics {
 public:
  explicit Statistics(const PackedWeight& w)
      : w_(w), shift_(__builtin_ctz(static_cast<unsigned>(w.blocksize))), offset_(w.nested ? *w.absmax_offset : 0.0f) {}

  float at(int64_t element) const {
    const int64_t block = element >> shift_;
    if (!w_.nested) return w_.absmax[block];
    const float product = w_.absmax_code[w_.absmax_q[block]] * w_.absmax_scale[block >> 8];
    return product + offset_;
  }

 private:
  const PackedWeight& w_;
  int shift_;
  float offset_;
};

inline __m512 code_vector(QuantType type) {
  alignas(64) float code[kCodes];
  for (int i = 0; i < kCodes; ++i) code[i] = code_value(type, i);
  return _mm512_load_ps(code);
}

// Whether each row of the columns [c0, c0 + columns) begins at a byte and needs one statistic for 32 columns.
inline bool in_whole_blocks(const PackedWeight& w, int64_t c0, int64_t columns) {
  return c0 + columns <= w.k && w.k % 32 == 0 && c0 % 32 == 0 && columns % 32 == 0;
}

}  // namespace
}  // namespace fastlora
