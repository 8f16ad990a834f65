// What device.cu and `Slots` find, by a CUDA runtime that answers as it is told. Needs nvcc, no GPU and no CUDA
// library.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../few_rows.cuh"

namespace {

struct Machine {
  int device = 0, major = 9, ptx_version = 90;
  bool cluster_query_fails = false;
  std::atomic<int> queries{0};
  cudaError_t last = cudaSuccess;
} machine;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

__global__ void some_kernel() {}

fastlora::DeviceLimits limits_of(int device, int major, int ptx_version) {
  machine.device = device;
  machine.major = major;
  machine.ptx_version = ptx_version;
  fastlora::DeviceLimits limits{};
  require(fastlora::current_limits(limits) == cudaSuccess, "the limits are found");
  require(limits.device == device && limits.multiprocessors == 132, "they are those of the device");
  require(limits.shared_memory == 232448, "all of them");
  return limits;
}

}  // namespace

#if !defined(__CUDA_ARCH__)
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = machine.device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++machine.queries;
  std::this_thread::yield();
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? machine.major
           : attribute == cudaDevAttrMultiProcessorCount  ? 132
                                                          : 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = machine.ptx_version;
  attributes->binaryVersion = machine.major * 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned int) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 3;
  return machine.last = machine.cluster_query_fails ? cudaErrorInvalidClusterSize : cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "what it means"; }
cudaError_t cudaGetLastError() {
  const cudaError_t last = machine.last;
  machine.last = cudaSuccess;
  return last;
}
// What the code that nvcc makes of a kernel calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
}
#endif

int main() {
  using fastlora::DeviceLimits;
  int device = 0;
  const auto check = [&](int major, int ptx_version, bool clusters, bool hopper, const char* what) {
    const DeviceLimits limits = limits_of(device++, major, ptx_version);
    require(limits.clusters == clusters && limits.hopper == hopper, what);
  };
  check(8, 80, false, false, "an 8.0 has no clusters");
  check(9, 90, true, true, "a 9.0 has");
  check(10, 100, true, false, "and so has a 10.0");
  check(12, 100, true, false, "also from the PTX of another one");
  check(9, 80, false, false, "the PTX of an 8.0 waits for nothing on a 9.0");
  check(12, 89, false, false, "nor on a 12.0");
  check(10, 90, true, false, "the PTX of a 9.0 waits for clusters, and has no products of 9.0 elsewhere");

  machine.queries = 0;
  limits_of(0, 8, 80);
  require(machine.queries == 0, "what is known is not asked for again");
  std::vector<std::thread> threads;
  machine.device = device, machine.major = 9, machine.ptx_version = 90;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([] {
      DeviceLimits limits{};
      require(fastlora::current_limits(limits) == cudaSuccess, "threads find limits");
      require(limits.clusters && limits.hopper && limits.shared_memory == 232448, "and never a part of them");
    });
  }
  for (std::thread& thread : threads) thread.join();
  require(machine.queries == 3, "one of the threads has asked for all");

  const DeviceLimits hopper = limits_of(1, 9, 90);
  require(
      fastlora::sharers_of(4, 1 << 20, 512, hopper) == fastlora::kMaxRanks, "few tiles are shared by whole clusters");
  require(fastlora::sharers_of(0, 1 << 20, 512, hopper) == 1, "and none by nobody");

  for (const bool fails : {false, true}) {
    machine.cluster_query_fails = fails;
    fastlora::Slots slots_of_kernel;
    const int* slots = nullptr;
    const DeviceLimits limits = limits_of(1, 9, 90);
    require(slots_of_kernel.find(some_kernel, 256, 0, limits, slots) == cudaSuccess, "slots are found");
    require(slots[1] == 264 && slots[8] == (fails ? 0 : 24), "by the blocks to a cluster");
    require(cudaGetLastError() == cudaSuccess, "no error is left to the next launch");
  }
  machine.last = cudaErrorInvalidConfiguration;
  require(
      std::strcmp(fastlora::take_cuda_error(cudaErrorInvalidConfiguration), "what it means") == 0, "an error is named");
  require(cudaGetLastError() == cudaSuccess, "and not left to the next launch either");
  std::puts("ok");
}
