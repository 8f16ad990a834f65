#include "cross_entropy.h"

#include <cstring>

#include "convert.h"

namespace fastlora {
namespace {

inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return from_bfloat16(x); }

namespace plain {
constexpr int kLanes = 4;
#include "cross_entropy.inl"
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kLanes = 8;
#include "cross_entropy.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace avx512 {
constexpr int kLanes = 16;
#include "cross_entropy.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
namespace avx2 = plain;
namespace avx512 = plain;
#endif

}  // namespace

void cross_entropy_cpu(const CrossEntropyParams& params, CpuCapability capability, int64_t begin, int64_t end) {
  if (capability >= CpuCapability::kAVX512) return avx512::rows(params, begin, end);
  if (capability == CpuCapability::kAVX2) return avx2::rows(params, begin, end);
  plain::rows(params, begin, end);
}

}  // namespace fastlora
