// Dequantization on CUDA in one launch. No torch.
//
// A thread owns 8 neighbouring elements: one 4-byte load, one or two 16-byte stores, and one statistic, since a block
// holds at least 32 elements. The 16 codes lie in 16 different banks of shared memory, so lookups never conflict.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../params.h"

namespace fastlora {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kGroupsPerThread = 4;
constexpr int64_t kMaxGrid = 0x7fffffff;

template <typename T>
__device__ __forceinline__ T convert(float x);

template <>
__device__ __forceinline__ float convert<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <>
__device__ __forceinline__ __half convert<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Vector {
  T value[kVector];
};

__device__ __forceinline__ float block_absmax(const DequantizeParams& p, int64_t element, int log2_blocksize) {
  const int64_t block = element >> log2_blocksize;
  if (!p.nested) return __ldg(p.absmax + block);
  return nested_absmax(
      __ldg(p.absmax_code + __ldg(p.absmax_q + block)), __ldg(p.absmax_scale + block / kNestedBlocksize),
      __ldg(p.absmax_offset));
}

// kVectorized: rows and base pointers are aligned, so that a group of 8 elements is one vector of one row.
// kStrided: rows of the output do not follow each other without a gap.
template <typename T, bool kVectorized, bool kStrided>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p, int log2_blocksize) {
  __shared__ float code[kCodes];
  if (threadIdx.x < kCodes) code[threadIdx.x] = code_value(p.quant_type, static_cast<int>(threadIdx.x));
  __syncthreads();

  T* out = static_cast<T*>(p.out);
  const int64_t numel = p.n * p.k;
  const int64_t groups = (numel + kVector - 1) / kVector;
  const int64_t tile = static_cast<int64_t>(kThreads) * kGroupsPerThread;
  for (int64_t base = blockIdx.x * tile; base < groups; base += gridDim.x * tile) {
#pragma unroll
    for (int j = 0; j < kGroupsPerThread; ++j) {
      const int64_t group = base + j * kThreads + threadIdx.x;
      if (group >= groups) break;
      const int64_t element = group * kVector;
      const float absmax = block_absmax(p, element, log2_blocksize);
      if (kVectorized && element + kVector <= numel) {
        const uint32_t packed = __ldg(reinterpret_cast<const uint32_t*>(p.w_packed) + group);
        Vector<T> vector;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);
          vector.value[i] = convert<T>(__fmul_rn(code[(packed >> shift) & 15], absmax));
        }
        const int64_t row = kStrided ? element / p.k : 0;
        T* dst = out + element + row * (p.out_stride - p.k);
        constexpr int kStores = sizeof(Vector<T>) / sizeof(uint4);
#pragma unroll
        for (int i = 0; i < kStores; ++i) {
          reinterpret_cast<uint4*>(dst)[i] = reinterpret_cast<const uint4*>(&vector)[i];
        }
      } else {
        const int64_t stop = element + kVector < numel ? element + kVector : numel;
        for (int64_t e = element; e < stop; ++e) {
          const int64_t row = kStrided ? e / p.k : 0;
          out[e + row * (p.out_stride - p.k)] = convert<T>(__fmul_rn(code[nibble_at(p.w_packed, e)], absmax));
        }
      }
    }
  }
}

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T>
cudaError_t launch(const DequantizeParams& p, cudaStream_t stream) {
  const int64_t groups = (p.n * p.k + kVector - 1) / kVector;
  const int64_t tile = static_cast<int64_t>(kThreads) * kGroupsPerThread;
  const int64_t tiles = (groups + tile - 1) / tile;
  if (tiles == 0) return cudaSuccess;
  int log2_blocksize = 0;
  while ((1 << log2_blocksize) < p.blocksize) ++log2_blocksize;
  const bool strided = p.out_stride != p.k;
  const bool vectorized =
      aligned(p.out, 16) && aligned(p.w_packed, 4) && (!strided || (p.k % kVector == 0 && p.out_stride % kVector == 0));
  const auto kernel = vectorized ? (strided ? dequantize_kernel<T, true, true> : dequantize_kernel<T, true, false>)
                                 : (strided ? dequantize_kernel<T, false, true> : dequantize_kernel<T, false, false>);
  const auto grid = static_cast<unsigned>(tiles < kMaxGrid ? tiles : kMaxGrid);
  kernel<<<grid, kThreads, 0, stream>>>(p, log2_blocksize);
  return cudaGetLastError();
}

}  // namespace

int dequantize_cuda(const DequantizeParams& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat32:
      return launch<float>(p, cuda_stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, cuda_stream);
    case DType::kFloat16:
      return launch<__half>(p, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
