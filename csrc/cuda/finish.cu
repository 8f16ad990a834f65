// What follows a library product whose float32 sums were kept: y = sums + scale * (u B^T) + bias, rounded once. No
// torch.

#include "few_rows.cuh"

namespace fastlora {
namespace {

constexpr int kWarps = kThreads / 32;

// 16 rows and kSpan columns a warp.
template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * kFragment;
  const int64_t n0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kSpan;
  if (n0 >= p.n) return;
  const bool wide = p.adapter_dtype == DType::kFloat32, wide_bias = p.bias_dtype == DType::kFloat32;
  const int64_t n = n0 + 8 * t;
  float acc[kSpanTiles][4] = {};
  const auto of_b = [&](int r, int column) {
    const int64_t row = n0 + column;
    const int stop = row < p.n ? p.r : 0;
    return make_uint2(pair<T>(p.lora_b, row, p.r, r, stop, wide), pair<T>(p.lora_b, row, p.r, r + 2, stop, wide));
  };
  multiply_narrow<T>(p.u, p.m, m0, p.r, of_b, acc);
  float bias[2 * kSpanTiles];
#pragma unroll
  for (int i = 0; i < 2 * kSpanTiles; ++i) {
    bias[i] = p.bias != nullptr && n + i < p.n ? element<T>(p.bias, n + i, wide_bias) : 0.0f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = m0 + g + 8 * half;
    if (m >= p.m) continue;
    const float* sums = p.sums + m * p.n + n;
    const int64_t target = m * p.n + n;
    if (kVectorized) {
      if (n >= p.n) continue;
      const float4 low = reinterpret_cast<const float4*>(sums)[0], high = reinterpret_cast<const float4*>(sums)[1];
      const float value[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = value[i] + p.scale * acc[i / 2][2 * half + i % 2] + bias[i];
      if (p.out_dtype == DType::kFloat32) {
        float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.y) + target);
        out[0] = make_float4(y[0], y[1], y[2], y[3]);
        out[1] = make_float4(y[4], y[5], y[6], y[7]);
      } else {
        *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + target) = make_uint4(
            Numeric<T>::pack(y[0], y[1]), Numeric<T>::pack(y[2], y[3]), Numeric<T>::pack(y[4], y[5]),
            Numeric<T>::pack(y[6], y[7]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i >= p.n) break;
        const float y = sums[i] + p.scale * acc[i / 2][2 * half + i % 2] + bias[i];
        store_as<T>(p.y, target + i, y, p.out_dtype == DType::kFloat32);
      }
    }
  }
}

template <typename T>
cudaError_t launch(const FinishParams& p, cudaStream_t stream) {
  const int64_t columns = cut(p.n, kWarps * kSpan), rows = cut(p.m, kFragment);
  constexpr int64_t kMostRows = 65535;  // of a grid
  const auto kernel = p.n % 8 == 0 ? finish_kernel<T, true> : finish_kernel<T, false>;
  for (int64_t first = 0; first < rows; first += kMostRows) {
    FinishParams part = p;
    const int64_t m = first * kFragment;
    part.m = p.m - m;
    part.sums = p.sums + m * p.n;
    part.u = static_cast<const T*>(p.u) + m * p.r;
    part.y = p.out_dtype == DType::kFloat32 ? static_cast<void*>(static_cast<float*>(p.y) + m * p.n)
                                            : static_cast<void*>(static_cast<T*>(p.y) + m * p.n);
    const dim3 grid(
        static_cast<unsigned>(columns), static_cast<unsigned>(rows - first < kMostRows ? rows - first : kMostRows));
    kernel<<<grid, kThreads, 0, stream>>>(part);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

int finish_cuda(const FinishParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::kFloat16) return launch<__half>(params, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
