// The product of one or two rows by few_rows_stream.cu, for compute capability 9.0.
#pragma once

#include "few_rows.cuh"
#include "stream_plan.h"

namespace fastlora {

// A block of this many threads that needs 40 registers each, and one of the product, fit a multiprocessor together, and
// so does what it needs of shared memory.
constexpr int kBesideStream = 256;
constexpr int kSharedBeside = 8192;

// False where the kernel does not take p.
inline bool plan_stream(const FewRowsForward& p, const DeviceLimits& limits, StreamPlan& plan) {
  const int shared_memory = limits.shared_memory - (p.r > 0 ? kSharedBeside : 0);
  return limits.hopper && make_plan(p, limits.multiprocessors, shared_memory, plan);
}

// Where p.r > 0 the launch before makes u; this one starts beside it.
cudaError_t launch_stream(
    const FewRowsForward& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream);
cudaError_t launch_stream(
    const FewRowsPacked& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastlora
