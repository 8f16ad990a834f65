// The product of one or two rows by few_rows_stream.cu, for compute capability 9.0.
#pragma once

#include "few_rows.cuh"
#include "stream_plan.h"

namespace fastlora {

// False where the kernel does not take p. `busy`: blocks of the launch before. A block needs all of a multiprocessor,
// so it would wait for theirs to end; many of those are not worth as many multiprocessors.
inline bool plan_stream(const FewRowsForward& p, const DeviceLimits& limits, int64_t busy, StreamPlan& plan) {
  const int64_t spared = limits.multiprocessors / 8;
  const int64_t places = limits.multiprocessors - (busy < spared ? busy : spared);
  return limits.hopper && make_plan(p, places, limits.shared_memory, plan);
}

// Where p.r > 0 the launch before makes u; this one starts beside it.
cudaError_t launch_stream(
    const FewRowsForward& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream);
cudaError_t launch_stream(
    const FewRowsPacked& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastlora
