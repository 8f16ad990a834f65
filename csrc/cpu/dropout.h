// LoRA dropout on the CPU, replayed from a seed. No torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastlora {

// Rows [begin, end) of out = x with dropped elements 0 and the others times gain, as fastlora/dropout.py says. Matrices
// are contiguous with k columns, of float32 or bfloat16.
struct DropoutParams {
  const void* x;
  void* out;
  int64_t k;
  uint64_t seed;
  uint32_t threshold;  // words below it are dropped
  float gain;
  DType dtype;
};

void dropout_cpu(const DropoutParams& params, int64_t begin, int64_t end);

}  // namespace fastlora
