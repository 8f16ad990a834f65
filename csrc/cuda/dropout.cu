// Dropout replayed from a seed: of a matrix, and of the LoRA term of dx, which joins dx in the same launch. No torch.

#include "few_rows.cuh"

namespace fastlora {
namespace {

constexpr int kVector = 8;  // neighbours of a thread: two counters
constexpr int64_t kMostBlocks = 0x7fffffff;

// The four words of a counter. Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
__device__ __forceinline__ void philox(uint64_t seed, uint32_t column, uint32_t row, uint32_t* words) {
  uint32_t c0 = column, c1 = row, c2 = 0, c3 = 0;
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = static_cast<uint64_t>(c0) * 0xD2511F53u, high = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(high);
    c3 = static_cast<uint32_t>(low);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The words of the elements k .. k + 7 of a row; k is a multiple of 8.
__device__ __forceinline__ void eight_words(uint64_t seed, int64_t row, int64_t k, uint32_t (&words)[kVector]) {
  philox(seed, static_cast<uint32_t>(k / 4), static_cast<uint32_t>(row), words);
  philox(seed, static_cast<uint32_t>(k / 4 + 1), static_cast<uint32_t>(row), words + 4);
}

// A dropped infinity is zero, not NaN.
__device__ __forceinline__ float dropped(const DropoutMask& mask, uint32_t word, float x) {
  return word >= mask.threshold && mask.gain > 0.0f ? __fmul_rn(x, mask.gain) : 0.0f;
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

template <typename T>
struct alignas(16) Vector {
  T value[kVector];
};

// kVectorized: k is a multiple of 8, and the pointers are aligned.
template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const DropoutParams p) {
  const uint64_t seed = __ldg(reinterpret_cast<const unsigned long long*>(p.seed));
  const int64_t groups = (p.k + kVector - 1) / kVector, count = p.m * groups;
  const bool small = count <= INT32_MAX;  // a 64-bit division takes as long as the words of an element
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = small ? static_cast<uint32_t>(i) / static_cast<uint32_t>(groups) : i / groups;
    const int64_t k = (i - row * groups) * kVector, at = row * p.k + k;
    const T* x = static_cast<const T*>(p.x) + at;
    T* out = static_cast<T*>(p.out) + at;
    uint32_t words[kVector];
    if (kVectorized) {
      Vector<T> vector;
      constexpr int kLoads = sizeof(Vector<T>) / sizeof(uint4);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) reinterpret_cast<uint4*>(&vector)[j] = reinterpret_cast<const uint4*>(x)[j];
      eight_words(seed, row, k, words);
#pragma unroll
      for (int j = 0; j < kVector; ++j) narrow(dropped(p, words[j], widened(vector.value[j])), vector.value[j]);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) reinterpret_cast<uint4*>(out)[j] = reinterpret_cast<const uint4*>(&vector)[j];
    } else {
      eight_words(seed, row, k, words);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (k + j < p.k) narrow(dropped(p, words[j], widened(x[j])), out[j]);
      }
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0; }

template <typename T>
cudaError_t launch_dropout(const DropoutParams& p, cudaStream_t stream) {
  const int64_t blocks = cut(p.m * cut(p.k, kVector), kThreads);
  if (blocks == 0) return cudaSuccess;
  const bool vectorized = p.k % kVector == 0 && aligned(p.x) && aligned(p.out);
  const auto kernel = vectorized ? dropout_kernel<T, true> : dropout_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

constexpr int kWarps = kThreads / 32;

// 16 rows and kSpan columns a warp: the words of the 8 neighbours that a lane holds are those of two counters.
template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kThreads) dropped_gradient_kernel(const DroppedGradient p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (p.k + kWarps * kSpan - 1) / (kWarps * kSpan);
  const int64_t tile_m = blockIdx.x / tiles_k, tile_k = blockIdx.x % tiles_k;
  const int64_t m0 = tile_m * kFragment, k0 = (tile_k * kWarps + warp) * kSpan;
  if (k0 >= p.k) return;
  const bool wide = p.adapter_dtype == DType::kFloat32;
  const int64_t k = k0 + 8 * t;
  float acc[kSpanTiles][4] = {};
  const auto of_a = [&](int r, int column) {
    float a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = k0 + column < p.k && r + i < p.r;
      a[i] = inside ? element<T>(p.lora_a, (r + i) * p.k + k0 + column, wide) : 0.0f;
    }
    return make_uint2(Numeric<T>::pack(a[0], a[1]), Numeric<T>::pack(a[2], a[3]));
  };
  multiply_narrow<T>(p.du, p.m, m0, p.r, of_a, acc);
  if (k >= p.k) return;
  const uint64_t seed = __ldg(reinterpret_cast<const unsigned long long*>(p.seed));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = m0 + g + 8 * half;
    if (m >= p.m) continue;
    uint32_t words[kVector];
    eight_words(seed, m, k, words);
    float term[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) term[i] = dropped(p, words[i], acc[i / 2][2 * half + i % 2]);
    T* dx = static_cast<T*>(p.dx) + m * p.k + k;
    if (kVectorized) {
      Vector<T> vector;
      *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<const uint4*>(dx);
#pragma unroll
      for (int i = 0; i < kVector; ++i) narrow(widened(vector.value[i]) + term[i], vector.value[i]);
      *reinterpret_cast<uint4*>(dx) = *reinterpret_cast<const uint4*>(&vector);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (k + i < p.k) narrow(widened(dx[i]) + term[i], dx[i]);
      }
    }
  }
}

template <typename T>
cudaError_t launch_dropped_gradient(const DroppedGradient& p, cudaStream_t stream) {
  const int64_t tiles_k = cut(p.k, kWarps * kSpan), tiles_m = cut(p.m, kFragment);
  if (tiles_m * tiles_k > kMostBlocks) return cudaErrorInvalidConfiguration;
  const auto kernel = p.k % kVector == 0 ? dropped_gradient_kernel<T, true> : dropped_gradient_kernel<T, false>;
  kernel<<<static_cast<unsigned>(tiles_m * tiles_k), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int dropout_cuda(const DropoutParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_dropout<float>(params, cuda_stream);
    case DType::kBFloat16:
      return launch_dropout<__nv_bfloat16>(params, cuda_stream);
    case DType::kFloat16:
      return launch_dropout<__half>(params, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

int dropped_gradient_cuda(const DroppedGradient& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return launch_dropped_gradient<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::kFloat16) return launch_dropped_gradient<__half>(params, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
