// Products on any processor, by vectors of four that compilers map to what the baseline has; NEON on aarch64.

#include "products.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "transpose.inl"

namespace fastlora {
namespace {

struct Source;

struct Arch {
#if defined(__aarch64__)
  using V = float32x4_t;
  static constexpr int kMaxRows = 12;  // of 32 registers
  static V multiply_add(V a, V b, V c) { return vfmaq_f32(c, a, b); }
#else
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kMaxRows = 6;
  static V multiply_add(V a, V b, V c) { return c + a * b; }
#endif
  static constexpr int kLanes = 4;
  static constexpr bool kPairs = false;
  static V load_floats(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static V load(const uint32_t* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static V broadcast(const uint32_t* p) {
    const float x = float_of(*p);
    return V{x, x, x, x};
  }
  static V zero() { return V{}; }
  static void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
  static V add(V a, V b) { return a + b; }
  static constexpr auto transpose = transpose_floats;
  static bool pack_down(const Source&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return false; }
  static bool pack_along(const Source&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return false; }
};

}  // namespace
}  // namespace fastlora

#include "products.inl"

namespace fastlora {
const Kernels& kernels_plain() { return kKernels; }
}  // namespace fastlora
