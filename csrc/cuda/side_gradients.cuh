// The gradients beside dx: du, dA and dB, for any number of rows.
#pragma once

#include "few_rows.cuh"

namespace fastlora {

// Those of p.du, p.da and p.db that are not null: du and dB from one launch, dA from another, which starts beside it.
// The kernel after them may start beside both; it waits for du with wait_for_previous.
cudaError_t launch_side_gradients(const FewRowsBackward& p, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastlora
