#include "dropout.h"

#include <algorithm>

#include "convert.h"

// One source for each kind of processor: what has to become its vector instructions is inlined into functions for it.
#if defined(__GNUC__)
#define FASTLORA_INLINE inline __attribute__((always_inline))
#else
#define FASTLORA_INLINE inline
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTLORA_X86 1
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds it in its own header for AVX-512
#endif
#define FASTLORA_AVX2 __attribute__((target("avx2")))
#define FASTLORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

namespace fastlora {
namespace {

constexpr int64_t kCounters = 32;  // at a time: enough that no product waits for the one before
constexpr int64_t kWords = 4 * kCounters;
constexpr uint32_t kFactors[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kKeySteps[2] = {0x9E3779B9u, 0xBB67AE85u};

// The four words of each of kCounters counters that follow each other in a row.
using Philox = void (*)(uint64_t seed, uint32_t first, uint32_t row, uint32_t* words);

void philox_plain(uint64_t seed, uint32_t first, uint32_t row, uint32_t* words) {
  for (int64_t i = 0; i < kCounters; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = row, c2 = 0, c3 = 0;
    auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t low = uint64_t{c0} * kFactors[0], high = uint64_t{c2} * kFactors[1];
      c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ key0;
      c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ key1;
      c1 = static_cast<uint32_t>(high);
      c3 = static_cast<uint32_t>(low);
      key0 += kKeySteps[0];
      key1 += kKeySteps[1];
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

#if defined(FASTLORA_X86)

// A word has a 64-bit lane, whose upper half may hold anything: products read the lower one. Counters lie in the order
// in which interleaving the lanes of two vectors leaves the words of each side by side.
FASTLORA_AVX2 void philox_avx2(uint64_t seed, uint32_t first, uint32_t row, uint32_t* words) {
  constexpr int kVectors = kCounters / 4;
  const __m256i low_half = _mm256_set1_epi64x(0xffffffff), order = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i factor0 = _mm256_set1_epi64x(kFactors[0]), factor1 = _mm256_set1_epi64x(kFactors[1]);
  __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t{first} + 4 * v), order);
    c1[v] = _mm256_set1_epi64x(row);
    c2[v] = c3[v] = _mm256_setzero_si256();
  }
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i keys0 = _mm256_set1_epi64x(key0), keys1 = _mm256_set1_epi64x(key1);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i low = _mm256_mul_epu32(c0[v], factor0), high = _mm256_mul_epu32(c2[v], factor1);
      c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(high, 32), c1[v]), keys0);
      c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(low, 32), c3[v]), keys1);
      c1[v] = high;
      c3[v] = low;
    }
    key0 += kKeySteps[0];
    key1 += kKeySteps[1];
  }
  for (int v = 0; v < kVectors; ++v) {
    const __m256i a = _mm256_xor_si256(_mm256_and_si256(c0[v], low_half), _mm256_slli_epi64(c1[v], 32));
    const __m256i b = _mm256_xor_si256(_mm256_and_si256(c2[v], low_half), _mm256_slli_epi64(c3[v], 32));
    auto* out = reinterpret_cast<__m256i*>(words) + 2 * v;
    _mm256_storeu_si256(out, _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi64(a, b));
  }
}

FASTLORA_AVX512 void philox_avx512(uint64_t seed, uint32_t first, uint32_t row, uint32_t* words) {
  constexpr int kVectors = kCounters / 8;
  const __m512i low_half = _mm512_set1_epi64(0xffffffff), order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i factor0 = _mm512_set1_epi64(kFactors[0]), factor1 = _mm512_set1_epi64(kFactors[1]);
  __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = _mm512_add_epi64(_mm512_set1_epi64(int64_t{first} + 8 * v), order);
    c1[v] = _mm512_set1_epi64(row);
    c2[v] = c3[v] = _mm512_setzero_si512();
  }
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i keys0 = _mm512_set1_epi64(key0), keys1 = _mm512_set1_epi64(key1);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i low = _mm512_mul_epu32(c0[v], factor0), high = _mm512_mul_epu32(c2[v], factor1);
      c0[v] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(high, 32), c1[v]), keys0);
      c2[v] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(low, 32), c3[v]), keys1);
      c1[v] = high;
      c3[v] = low;
    }
    key0 += kKeySteps[0];
    key1 += kKeySteps[1];
  }
  for (int v = 0; v < kVectors; ++v) {
    const __m512i a = _mm512_xor_si512(_mm512_and_si512(c0[v], low_half), _mm512_slli_epi64(c1[v], 32));
    const __m512i b = _mm512_xor_si512(_mm512_and_si512(c2[v], low_half), _mm512_slli_epi64(c3[v], 32));
    auto* out = reinterpret_cast<__m512i*>(words) + 2 * v;
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + 1, _mm512_unpackhi_epi64(a, b));
  }
}

#endif  // FASTLORA_X86

FASTLORA_INLINE float widened(float x) { return x; }
FASTLORA_INLINE float widened(uint16_t x) { return from_bfloat16(x); }
FASTLORA_INLINE void narrow(float x, float& out) { out = x; }
FASTLORA_INLINE void narrow(float x, uint16_t& out) { out = to_bfloat16(x); }

template <typename T, Philox kPhilox>
FASTLORA_INLINE void rows(const DropoutParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.k;
    T* out = static_cast<T*>(p.out) + row * p.k;
    for (int64_t start = 0; start < p.k; start += kWords) {
      uint32_t words[kWords];
      kPhilox(*p.seed, static_cast<uint32_t>(start / 4), static_cast<uint32_t>(row), words);
      const int64_t count = std::min(kWords, p.k - start);
      for (int64_t i = 0; i < count; ++i) {
        const float kept = words[i] >= p.threshold && p.gain > 0 ? widened(x[start + i]) : 0.0f;
        narrow(kept * p.gain, out[start + i]);
      }
    }
  }
}

template <typename T>
void rows_plain(const DropoutParams& p, int64_t begin, int64_t end) {
  rows<T, philox_plain>(p, begin, end);
}

#if defined(FASTLORA_X86)

template <typename T>
FASTLORA_AVX2 void rows_avx2(const DropoutParams& p, int64_t begin, int64_t end) {
  rows<T, philox_avx2>(p, begin, end);
}

template <typename T>
FASTLORA_AVX512 void rows_avx512(const DropoutParams& p, int64_t begin, int64_t end) {
  rows<T, philox_avx512>(p, begin, end);
}

#endif

template <typename T>
void run(const DropoutParams& p, CpuCapability capability, int64_t begin, int64_t end) {
#if defined(FASTLORA_X86)
  if (capability >= CpuCapability::kAVX512) return rows_avx512<T>(p, begin, end);
  if (capability == CpuCapability::kAVX2) return rows_avx2<T>(p, begin, end);
#endif
  (void)capability;
  rows_plain<T>(p, begin, end);
}

}  // namespace

void dropout_cpu(const DropoutParams& p, CpuCapability capability, int64_t begin, int64_t end) {
  p.dtype == DType::kFloat32 ? run<float>(p, capability, begin, end) : run<uint16_t>(p, capability, begin, end);
}

}  // namespace fastlora
