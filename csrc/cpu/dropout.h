// LoRA dropout on the CPU, replayed from a seed. No torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastlora {

// Rows [begin, end) of out, in float32 or bfloat16.
void dropout_cpu(const DropoutParams& params, CpuCapability capability, int64_t begin, int64_t end);

}  // namespace fastlora
