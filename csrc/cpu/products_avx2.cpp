// Products on processors with AVX2 and FMA: words are float32.

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
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
  static bool pack_down(const Source&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return false; }
  static bool pack_along(const Source&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return false; }
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
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
