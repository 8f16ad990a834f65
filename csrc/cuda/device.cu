// What the launchers ask of the CUDA runtime: what they may use of a device, and what an error means. No torch.

#include <algorithm>
#include <iterator>

#include "few_rows.cuh"

namespace fastlora {
namespace {

__global__ void empty_kernel() {}

cudaError_t query(int device, DeviceLimits& limits) {
  limits.device = device;
  int major = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  // A device also runs what the driver compiles from the PTX of an older one, which waits for no launch and no cluster.
  cudaFuncAttributes code{};
  status = cudaFuncGetAttributes(&code, empty_kernel);
  if (status != cudaSuccess) return status;
  const int compiled = std::min(major, code.ptxVersion / 10);
  limits.clusters = compiled >= 9;
  limits.hopper = compiled == 9 && major == 9;
  return cudaSuccess;
}

}  // namespace

cudaError_t current_limits(DeviceLimits& limits) {
  static PerDevice<DeviceLimits> known;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const DeviceLimits* found = nullptr;
  const cudaError_t status = known.get(device, [device](DeviceLimits& value) { return query(device, value); }, found);
  if (status == cudaSuccess) limits = *found;
  return status;
}

bool has_hopper_code() {
  constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};
  return std::find(std::begin(kBuiltFor), std::end(kBuiltFor), 900) != std::end(kBuiltFor);
}

const char* take_cuda_error(int status) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace fastlora
