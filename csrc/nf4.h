// The 4-bit weight format of bitsandbytes: code tables, nibbles, statistics. Host and device, no torch.
//
// A matrix (n, k) is flattened row by row. Byte j of w_packed holds element 2j in its high nibble and 2j + 1 in its
// low one; a nibble indexes a table of 16 float32 values. Each run of `blocksize` elements shares one statistic.
//
//   flat     a = absmax[b]
//   nested   a = fp32(absmax_code[absmax_q[b]] * absmax_scale[b / 256]) + absmax_offset
//   w        = out_type(fp32(code[nibble] * a))
//
// Every product and sum is rounded to float32 on its own: compile with floating-point contraction off.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLORA_HOST_DEVICE __host__ __device__
#else
#define FASTLORA_HOST_DEVICE
#endif

namespace fastlora {

enum class QuantType : int32_t { kNF4 = 0, kFP4 = 1 };

constexpr int kCodes = 16;
constexpr int64_t kNestedBlocksize = 256;

// The value of a nibble. NF4: Dettmers et al., QLoRA (2023), appendix E. FP4: sign, then eight magnitudes over 12;
// both of its zeros are +0.0, as in bitsandbytes.
FASTLORA_HOST_DEVICE constexpr float code_value(QuantType type, int nibble) {
  constexpr float nf4[kCodes] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  constexpr float fp4[kCodes / 2] = {
      0.0f,
      static_cast<float>(0.0625 / 12),
      static_cast<float>(8.0 / 12),
      1.0f,
      static_cast<float>(4.0 / 12),
      0.5f,
      static_cast<float>(2.0 / 12),
      0.25f,
  };
  if (type == QuantType::kNF4) return nf4[nibble];
  return nibble & 8 ? 0.0f - fp4[nibble & 7] : fp4[nibble];
}

// The nibble of element i, counted from the first element of `packed`.
FASTLORA_HOST_DEVICE inline int nibble_at(const uint8_t* packed, int64_t i) {
  return (packed[i >> 1] >> (i & 1 ? 0 : 4)) & 15;
}

// The statistic of a nested block.
FASTLORA_HOST_DEVICE inline float nested_absmax(float code, float scale, float offset) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(code, scale), offset);
#else
  const float product = code * scale;
  return product + offset;
#endif
}

}  // namespace fastlora
