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

// The results do not depend on the number of threads.
void linear_forward_cpu(const CpuForward& params, CpuCapability capability, const Threads& threads);
void linear_backward_cpu(const CpuBackward& params, CpuCapability capability, const Threads& threads);

}  // namespace fastlora
