// One layer on the CPU, forward and backward. No torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../params.h"

namespace fastlora {

// How work is spread: calls body(begin, end) for disjoint parts of [0, count), on up to `threads` threads, and waits.
struct Threads {
  int64_t count;
  std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)> run;
};

// y = x W^T + scale * (u B^T) + bias, u = x A^T. Matrices are contiguous; m, n and k are at least 1. r may be 0, and
// lora_a, lora_b and u null.
struct CpuForward : PackedWeight {
  const void* x;       // (m, k) of dtype
  const void* lora_a;  // (r, k) of adapter_dtype
  const void* lora_b;  // (n, r) of adapter_dtype
  const void* bias;    // (n,) of bias_dtype, or null
  void* y;             // (m, n) of out_dtype
  void* u;             // (m, r) of dtype
  float scale;
  int64_t m;
  int64_t r;
  DType dtype;          // bfloat16 or float32
  DType adapter_dtype;  // dtype or float32, as bias_dtype and out_dtype
  DType bias_dtype;
  DType out_dtype;
};

// du = scale * (dy B), dx = dy W + du A, dA = du^T x, dB = scale * (dy^T u). The same conditions; dx, da and db may be
// null where they are not needed, x and da together, u and db together. du is needed for dx and for da.
struct CpuBackward : PackedWeight {
  const void* dy;      // (m, n) of dtype
  const void* x;       // (m, k) of dtype
  const void* u;       // (m, r) of dtype
  const void* lora_a;  // (r, k) of adapter_dtype
  const void* lora_b;  // (n, r) of adapter_dtype
  void* du;            // (m, r) of dtype
  void* dx;            // (m, k) of dtype
  void* da;            // (r, k) of adapter_dtype
  void* db;            // (n, r) of adapter_dtype
  float scale;
  int64_t m;
  int64_t r;
  DType dtype;
  DType adapter_dtype;
};

// The results do not depend on the number of threads.
void linear_forward_cpu(const CpuForward& params, CpuCapability capability, const Threads& threads);
void linear_backward_cpu(const CpuBackward& params, CpuCapability capability, const Threads& threads);

}  // namespace fastlora
