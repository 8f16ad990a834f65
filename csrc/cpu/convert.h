// Scalar conversions. Static, not inline: sources that are compiled for more capable processors include this, too, and
// the linker must not let one copy serve all.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlora {

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

static inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

static inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline uint16_t to_float16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  uint32_t u = bits_of(x) & 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (u < 0x38800000) {
    // One unit of 0.5f in the last place is float16's smallest subnormal, so this sum rounds where float16 does.
    return static_cast<uint16_t>(sign | (bits_of(float_of(u) + 0.5f) - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000) >> 13));
}

}  // namespace fastlora
