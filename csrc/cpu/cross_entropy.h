// The cross-entropy of rows of logits on the CPU, whose gradient takes the place of the logits. No torch.
//
//   loss = (1 - eps) * (lse(z) - z[label]) + eps * (lse(z) - mean(z))
//   dz   = scale * (softmax(z) - (1 - eps) * onehot(label) - eps / v)
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastlora {

struct CrossEntropyParams {
  void* logits;           // (m, v) of dtype, contiguous
  const int64_t* labels;  // (m,)
  float* losses;          // (m,)
  const float* scale;     // one value that gradients are multiplied by
  int64_t v;
  int64_t ignored;  // a label without loss and gradient; any other outside of [0, v) has a loss of NaN
  float smoothing;  // eps
  bool gradient;    // over the logits
  DType dtype;      // float32 or bfloat16
};

// The rows [begin, end). Calls for disjoint ranges may run at once.
void cross_entropy_cpu(const CrossEntropyParams& params, CpuCapability capability, int64_t begin, int64_t end);

}  // namespace fastlora
