// Dequantization on the CPU. No torch.
//
// A block has only 16 different values, so each path scales and rounds the 16 table entries once a block; an element
// is then one table lookup, which the vector paths do in registers. Rounding a table entry is the same arithmetic as
// rounding the element, so the result is exact.

#include <algorithm>
#include <type_traits>

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTLORA_X86 1
#include <immintrin.h>
#define FASTLORA_AVX2 __attribute__((target("avx2,f16c")))
#define FASTLORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")))
#endif

namespace fastlora {
namespace {

// Outputs at least this large bypass the caches: they would evict themselves before anyone reads them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

struct alignas(64) CodeTable {
  float value[kCodes];

  explicit CodeTable(QuantType type) {
    for (int i = 0; i < kCodes; ++i) value[i] = code_value(type, i);
  }
};

// The part of one block that a run of elements covers.
struct Span {
  int64_t first;
  int64_t count;
  float absmax;
};

// Cuts the elements [first, stop) at block boundaries.
class Spans {
 public:
  Spans(const DequantizeParams& p, int64_t first, int64_t stop)
      : p_(p), first_(first), stop_(stop), offset_(p.nested ? *p.absmax_offset : 0.0f) {}

  bool next(Span& span) {
    if (first_ >= stop_) return false;
    const int64_t block = first_ / p_.blocksize;
    const int64_t end = std::min(stop_, (block + 1) * p_.blocksize);
    const float absmax =
        p_.nested
            ? nested_absmax(p_.absmax_code[p_.absmax_q[block]], p_.absmax_scale[block / kNestedBlocksize], offset_)
            : p_.absmax[block];
    span = {first_, end - first_, absmax};
    first_ = end;
    return true;
  }

 private:
  const DequantizeParams& p_;
  int64_t first_;
  int64_t stop_;
  float offset_;
};

template <DType kType>
using Element = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;

template <DType kType>
inline Element<kType> convert(float x) {
  if constexpr (kType == DType::kBFloat16) return to_bfloat16(x);
  if constexpr (kType == DType::kFloat16) return to_float16(x);
  if constexpr (kType == DType::kFloat32) return x;
}

// Elements [from, to) of a span by table lookup, a byte at a time.
template <typename T>
inline void lookup(const T* table, const uint8_t* packed, const Span& span, int64_t from, int64_t to, T* out) {
  int64_t i = from;
  if (i < to && (span.first + i) % 2 != 0) {
    out[i] = table[packed[(span.first + i) / 2] & 15];
    ++i;
  }
  const uint8_t* src = packed + (span.first + i) / 2;
  for (; i + 2 <= to; i += 2, ++src) {
    out[i] = table[*src >> 4];
    out[i + 1] = table[*src & 15];
  }
  if (i < to) out[i] = table[*src >> 4];
}

template <DType kType>
void run_plain(const DequantizeParams& p, int64_t first, int64_t stop, void* out, bool) {
  using T = Element<kType>;
  const CodeTable code(p.quant_type);
  T* dst = static_cast<T*>(out);
  Spans spans(p, first, stop);
  for (Span span; spans.next(span); dst += span.count) {
    T table[kCodes];
    for (int i = 0; i < kCodes; ++i) table[i] = convert<kType>(code.value[i] * span.absmax);
    lookup(table, p.w_packed, span, 0, span.count, dst);
  }
}

#if defined(FASTLORA_X86)

FASTLORA_AVX512 inline __m256i round_bfloat16_avx512(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

FASTLORA_AVX512 inline void store_avx512(void* dst, __m512i x, bool stream) {
  if (stream) {
    _mm512_stream_si512(static_cast<__m512i*>(dst), x);
  } else {
    _mm512_storeu_si512(dst, x);
  }
}

template <DType kType>
FASTLORA_AVX512 void run_avx512(const DequantizeParams& p, int64_t first, int64_t stop, void* out, bool stream) {
  using T = Element<kType>;
  constexpr int64_t kStep = 64 / sizeof(T);
  const CodeTable code_table(p.quant_type);
  const __m512 code = _mm512_load_ps(code_table.value);
  T* dst = static_cast<T*>(out);
  Spans spans(p, first, stop);
  for (Span span; spans.next(span); dst += span.count) {
    const __m512 scaled = _mm512_mul_ps(code, _mm512_set1_ps(span.absmax));
    alignas(64) T table[kCodes];
    const int64_t head = std::min(span.first & 1, span.count);
    const uint8_t* src = p.w_packed + (span.first + head) / 2;
    const bool direct = stream && reinterpret_cast<uintptr_t>(dst + head) % 64 == 0;
    int64_t i = head;
    if constexpr (kType == DType::kFloat32) {
      _mm512_store_ps(table, scaled);
      for (; i + kStep <= span.count; i += kStep, src += kStep / 2) {
        // Lane pairs (high nibble, low nibble); the permutation ignores all but the low 4 bits of an index.
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        store_avx512(dst + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, scaled)), direct);
      }
    } else {
      __m256i rounded;
      if constexpr (kType == DType::kBFloat16) {
        rounded = round_bfloat16_avx512(scaled);
      } else {
        rounded = _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(table), rounded);
      // The permutation reads 5 bits of an index; with the table twice, the fifth does not matter.
      const __m512i twice = _mm512_broadcast_i64x4(rounded);
      for (; i + kStep <= span.count; i += kStep, src += kStep / 2) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        store_avx512(dst + i, _mm512_permutexvar_epi16(index, twice), direct);
      }
    }
    lookup(table, p.w_packed, span, 0, head, dst);
    lookup(table, p.w_packed, span, i, span.count, dst);
  }
  if (stream) _mm_sfence();
}

FASTLORA_AVX2 inline __m256i round_bfloat16_avx2(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}

FASTLORA_AVX2 inline void store_avx2(void* dst, __m256i x, bool stream) {
  if (stream) {
    _mm256_stream_si256(static_cast<__m256i*>(dst), x);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(dst), x);
  }
}

template <DType kType>
FASTLORA_AVX2 void run_avx2(const DequantizeParams& p, int64_t first, int64_t stop, void* out, bool stream) {
  using T = Element<kType>;
  constexpr int64_t kStep = 32;
  const CodeTable code_table(p.quant_type);
  const __m256 code0 = _mm256_load_ps(code_table.value);
  const __m256 code1 = _mm256_load_ps(code_table.value + 8);
  const __m128i low_nibble = _mm_set1_epi8(15);
  T* dst = static_cast<T*>(out);
  Spans spans(p, first, stop);
  for (Span span; spans.next(span); dst += span.count) {
    const __m256 a = _mm256_set1_ps(span.absmax);
    const __m256 scaled0 = _mm256_mul_ps(code0, a);
    const __m256 scaled1 = _mm256_mul_ps(code1, a);
    alignas(32) T table[kCodes];
    const int64_t head = std::min(span.first & 1, span.count);
    const uint8_t* src = p.w_packed + (span.first + head) / 2;
    const bool direct = stream && reinterpret_cast<uintptr_t>(dst + head) % 32 == 0;
    int64_t i = head;

    // The 16-bit table as two byte tables, since the widest lookup here is a byte's.
    __m256i low_bytes = _mm256_setzero_si256();
    __m256i high_bytes = _mm256_setzero_si256();
    if constexpr (kType == DType::kFloat32) {
      _mm256_store_ps(table, scaled0);
      _mm256_store_ps(table + 8, scaled1);
    } else {
      __m128i half0, half1;
      if constexpr (kType == DType::kBFloat16) {
        const __m256i both = _mm256_permute4x64_epi64(
            _mm256_packus_epi32(round_bfloat16_avx2(scaled0), round_bfloat16_avx2(scaled1)), 0xd8);
        half0 = _mm256_castsi256_si128(both);
        half1 = _mm256_extracti128_si256(both, 1);
      } else {
        half0 = _mm256_cvtps_ph(scaled0, _MM_FROUND_TO_NEAREST_INT);
        half1 = _mm256_cvtps_ph(scaled1, _MM_FROUND_TO_NEAREST_INT);
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(table), half0);
      _mm_store_si128(reinterpret_cast<__m128i*>(table) + 1, half1);
      const __m128i byte_mask = _mm_set1_epi16(0xff);
      low_bytes = _mm256_broadcastsi128_si256(
          _mm_packus_epi16(_mm_and_si128(half0, byte_mask), _mm_and_si128(half1, byte_mask)));
      high_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(half0, 8), _mm_srli_epi16(half1, 8)));
    }

    for (; i + kStep <= span.count; i += kStep, src += kStep / 2) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_nibble);
      const __m128i low = _mm_and_si128(bytes, low_nibble);
      const __m128i index0 = _mm_unpacklo_epi8(high, low);
      const __m128i index1 = _mm_unpackhi_epi8(high, low);
      if constexpr (kType == DType::kFloat32) {
        const __m128i part[4] = {index0, _mm_srli_si128(index0, 8), index1, _mm_srli_si128(index1, 8)};
        for (int j = 0; j < 4; ++j) {
          const __m256i index = _mm256_cvtepu8_epi32(part[j]);
          const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
          const __m256 value = _mm256_blendv_ps(
              _mm256_permutevar8x32_ps(scaled0, index), _mm256_permutevar8x32_ps(scaled1, index), upper);
          store_avx2(dst + i + 8 * j, _mm256_castps_si256(value), direct);
        }
      } else {
        const __m256i index = _mm256_set_m128i(index1, index0);
        const __m256i low_part = _mm256_shuffle_epi8(low_bytes, index);
        const __m256i high_part = _mm256_shuffle_epi8(high_bytes, index);
        const __m256i word0 = _mm256_unpacklo_epi8(low_part, high_part);
        const __m256i word1 = _mm256_unpackhi_epi8(low_part, high_part);
        store_avx2(dst + i, _mm256_permute2x128_si256(word0, word1, 0x20), direct);
        store_avx2(dst + i + 16, _mm256_permute2x128_si256(word0, word1, 0x31), direct);
      }
    }
    lookup(table, p.w_packed, span, 0, head, dst);
    lookup(table, p.w_packed, span, i, span.count, dst);
  }
  if (stream) _mm_sfence();
}

#endif  // FASTLORA_X86

template <DType kType>
Decode decoder_of(CpuCapability capability) {
#if defined(FASTLORA_X86)
  if (capability >= CpuCapability::kAVX512) return run_avx512<kType>;
  if (capability == CpuCapability::kAVX2) return run_avx2<kType>;
#endif
  (void)capability;
  return run_plain<kType>;
}

}  // namespace

CpuCapability cpu_capability() {
#if defined(FASTLORA_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("fma")) {
    return CpuCapability::kPlain;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return CpuCapability::kAVX2;
  return __builtin_cpu_supports("avx512bf16") ? CpuCapability::kAVX512BF16 : CpuCapability::kAVX512;
#else
  return CpuCapability::kPlain;
#endif
}

Decode decoder(DType dtype, CpuCapability capability) {
  switch (dtype) {
    case DType::kBFloat16:
      return decoder_of<DType::kBFloat16>(capability);
    case DType::kFloat16:
      return decoder_of<DType::kFloat16>(capability);
    default:
      return decoder_of<DType::kFloat32>(capability);
  }
}

void dequantize_cpu(const DequantizeParams& p, CpuCapability capability, int64_t start, int64_t stop) {
  const Decode run = decoder(p.dtype, capability);
  const int64_t itemsize = p.dtype == DType::kFloat32 ? 4 : 2;
  const bool stream = p.n * p.k * itemsize >= kStreamBytes;
  auto* out = static_cast<char*>(p.out);
  if (p.out_stride == p.k) {
    run(p, start, stop, out + start * itemsize, stream);
    return;
  }
  while (start < stop) {
    const int64_t row = start / p.k;
    const int64_t end = std::min(stop, (row + 1) * p.k);
    run(p, start, end, out + (row * p.out_stride + start - row * p.k) * itemsize, stream);
    start = end;
  }
}

}  // namespace fastlora
