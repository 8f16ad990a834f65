// du, dx, dA and dB for a few rows of dy, W decoded in the product dx = dy W + du A.
//
// dx starts beside the launches of side_gradients.cu and waits for du only before its last step. The bytes of W are
// read once. A block owns `kColumns` inputs and a part of N; its warps split that part again, and the blocks of a
// cluster add their sums in a fixed order.

#include "few_rows.cuh"
#include "side_gradients.cuh"

namespace fastlora {
namespace {

constexpr int kWarpsK = 2;
constexpr int kWarpsN = 4;
constexpr int kSlab = 64;  // columns of a warp: a word of 8 for each of its 8 lanes g
constexpr int kColumns = kWarpsK * kSlab;
constexpr int kChunk = 256;  // rows of W in one stage of the pipeline
constexpr int kStages = 2;
constexpr int kUnit = 16;  // bytes of one copy
constexpr int kRowUnits = kColumns / 2 / kUnit;
constexpr int kTokenUnits = kChunk * 2 / kUnit;
constexpr int kGranule = 32;  // no block of statistics is smaller
constexpr int kGranules = kColumns / kGranule;
constexpr int kBytes = 4;  // of a word

template <int kTiles>
struct Shape {
  static constexpr int kWeightBytes = kChunk * kRowUnits * kUnit;
  static constexpr int kStageBytes = kWeightBytes + kTiles * kTokens * kTokenUnits * kUnit;
  static constexpr int kAbsmaxBytes = kChunk * kGranules * static_cast<int>(sizeof(float));
  static constexpr int kShared = kTableBytes + kStatisticsBytes + kAbsmaxBytes + kStages * kStageBytes;
  using Result = Sums<kColumns, kTiles * kTokens>;
  static_assert(kWarpsN * Result::kBytes <= kShared);
};

// Where row n of a chunk lies: the four rows of a lane are four apart, so that a step reads neighbouring rows.
__device__ __forceinline__ int place_of_row(int n) { return n / 16 * 16 + n % 4 * 4 + n / 4 % 4; }

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles <= 4 ? 2 : 1)
    input_gradient_kernel(const FewRowsBackward p, int ranks, int chunks, int log2_blocksize) {
  using Layout = Shape<kTiles>;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* table = shared;
  float* statistics = reinterpret_cast<float*>(shared + kTableBytes);
  float* absmax = reinterpret_cast<float*>(shared + kTableBytes + kStatisticsBytes);
  unsigned char* stages = shared + kTableBytes + kStatisticsBytes + Layout::kAbsmaxBytes;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_k = warp % kWarpsK, warp_n = warp / kWarpsK;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(ranks)) * kColumns;
  const int64_t first = static_cast<int64_t>(rank) * chunks * kChunk;
  const int64_t stop = min(p.n, first + static_cast<int64_t>(chunks) * kChunk);

  const auto load = [&](int stage, int64_t n0) {
    unsigned char* weight = stages + stage * Layout::kStageBytes;
    unsigned char* tokens = weight + Layout::kWeightBytes;
#pragma unroll
    for (int i = 0; i < kChunk * kRowUnits / kThreads; ++i) {
      const int v = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = v / kRowUnits, unit = v % kRowUnits;
      const int64_t k = k0 + unit * 2 * kUnit;
      const bool inside = n0 + row < stop && k < p.k;
      const int64_t source = inside ? ((n0 + row) * p.k + k) / 2 : 0;
      const int place = place_of_row(row);
      copy_async(weight + (place * kRowUnits + (unit ^ (place & 2))) * kUnit, p.w_packed + source, inside);
    }
#pragma unroll
    for (int i = 0; i < kTiles * kTokens * kTokenUnits / kThreads; ++i) {
      const int v = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = v / kTokenUnits, unit = v % kTokenUnits;
      const int64_t n = n0 + unit * (kUnit / 2);
      const bool inside = row < p.m && n < stop;
      const int64_t source = inside ? row * p.n + n : 0;
      copy_async(
          tokens + (row * kTokenUnits + (unit ^ ((row & 3) << 1))) * kUnit, static_cast<const T*>(p.dy) + source,
          inside);
    }
    commit_copies();
  };
  // A thread looks after one row of the chunk.
  const auto load_statistics = [&](Statistic(&s)[kGranules], int64_t n0) {
    const int64_t n = n0 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kGranules; ++i) {
      const int64_t k = k0 + i * kGranule;
      s[i] = load_statistic(p, n * p.k + k, log2_blocksize, n < stop && k < p.k);
    }
  };

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage < chunks) load(stage, first + stage * kChunk);
  }
  Statistic next[kGranules];
  load_statistics(next, first);
  const float offset = p.nested ? __ldg(p.absmax_offset) : 0.0f;
  fill_tables(p, reinterpret_cast<float2*>(table), statistics);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  __syncthreads();

  float acc[kBytes][kTiles][4] = {};
  const auto copy = static_cast<uint32_t>(lane % kCopies) * static_cast<uint32_t>(sizeof(float2));
  for (int chunk = 0; chunk < chunks; ++chunk) {
    reinterpret_cast<float4*>(absmax)[place_of_row(static_cast<int>(threadIdx.x))] = make_float4(
        absmax_of(p, next[0], statistics, offset), absmax_of(p, next[1], statistics, offset),
        absmax_of(p, next[2], statistics, offset), absmax_of(p, next[3], statistics, offset));
    if (chunk + 1 < chunks) {
      wait_copies<kStages - 1>();
      load_statistics(next, first + static_cast<int64_t>(chunk + 1) * kChunk);
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const unsigned char* weight = stages + chunk % kStages * Layout::kStageBytes;
    const unsigned char* tokens = weight + Layout::kWeightBytes;
#pragma unroll
    for (int step = 0; step < kChunk / kWarpsN / kFragment; ++step) {
      const int group = warp_n * (kChunk / kWarpsN / kFragment) + step;
      uint2 b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = tile * kTokens + g;
        const int unit = (group * 2 + t / 2) ^ ((g & 3) << 1);
        b[tile] = *reinterpret_cast<const uint2*>(tokens + (row * kTokenUnits + unit) * kUnit + t % 2 * 8);
      }
      uint32_t word[4];
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = group * 16 + i * 4 + t;
        word[i] = *reinterpret_cast<const uint32_t*>(
            weight + place * kRowUnits * kUnit + (warp_k ^ ((t >> 1) & 1)) * 32 + g * 4);
        a[i] = absmax[place * kGranules + warp_k * 2 + g / 4];
      }
      const auto multiply = [&](int byte, float2 v0, float2 v1, float2 v2, float2 v3) {
        const uint32_t a0 = Numeric<T>::pack(v0.x, v1.x), a1 = Numeric<T>::pack(v0.y, v1.y);
        const uint32_t a2 = Numeric<T>::pack(v2.x, v3.x), a3 = Numeric<T>::pack(v2.y, v3.y);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Numeric<T>::mma(acc[byte][tile], a0, a1, a2, a3, b[tile].x, b[tile].y);
        }
      };
      const auto at = [&](auto decoder, int byte) {
        multiply(byte, decoder(word[0], a[0]), decoder(word[1], a[1]), decoder(word[2], a[2]), decoder(word[3], a[3]));
      };
      at([&](uint32_t w, float s) { return decode<0>(table, w, copy, s); }, 0);
      at([&](uint32_t w, float s) { return decode<1>(table, w, copy, s); }, 1);
      at([&](uint32_t w, float s) { return decode<2>(table, w, copy, s); }, 2);
      at([&](uint32_t w, float s) { return decode<3>(table, w, copy, s); }, 3);
    }
    __syncthreads();
    if (chunk + kStages < chunks) load(chunk % kStages, first + static_cast<int64_t>(chunk + kStages) * kChunk);
  }

  if (p.r > 0) {
    wait_for_previous();
    const int64_t k = k0 + warp_k * kSlab + 8 * g;
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    // The steps over R are dealt to the warps of the whole cluster, whose sums are added anyway.
    for (int r0 = (rank * kWarpsN + warp_n) * kFragment; r0 < p.r; r0 += ranks * kWarpsN * kFragment) {
      const int r = r0 + 4 * t;
      uint4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = r + i < p.r && k < p.k ? eight<T>(p.lora_a, (r + i) * p.k + k, wide) : nothing;
      }
      uint32_t b[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int token = tile * kTokens + g;
        const int inside = token < p.m ? p.r : 0;
        b[tile][0] = pair<T>(p.du, token, p.r, r, inside, false);
        b[tile][1] = pair<T>(p.du, token, p.r, r + 2, inside, false);
      }
      const auto multiply = [&](int byte, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Numeric<T>::mma(
              acc[byte][tile], lower_halves(v0, v1), upper_halves(v0, v1), lower_halves(v2, v3), upper_halves(v2, v3),
              b[tile][0], b[tile][1]);
        }
      };
      multiply(0, a[0].x, a[1].x, a[2].x, a[3].x);
      multiply(1, a[0].y, a[1].y, a[2].y, a[3].y);
      multiply(2, a[0].z, a[1].z, a[2].z, a[3].z);
      multiply(3, a[0].w, a[1].w, a[2].w, a[3].w);
    }
  }

  __syncthreads();
  const typename Layout::Result sums{reinterpret_cast<float*>(shared)};
#pragma unroll
  for (int byte = 0; byte < kBytes; ++byte) {
    const int column = warp_k * kSlab + 8 * g + 2 * byte;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.at(warp_n, tile * kTokens + 2 * t + i % 2, column + i / 2) = acc[byte][tile][i];
      }
    }
  }
  sums.template finish<kWarpsN>(p.m, ranks, [&](int token, int column, float sum) {
    const int64_t k = k0 + column;
    if (k < p.k) static_cast<T*>(p.dx)[token * p.k + k] = Numeric<T>::narrow(sum);
  });
}

template <typename T, int kTiles>
cudaError_t launch_input_gradient(const FewRowsBackward& p, const DeviceLimits& limits, cudaStream_t stream) {
  using Layout = Shape<kTiles>;
  static Slots slots;
  const int64_t tiles = cut(p.k, kColumns), chunks = cut(p.n, kChunk);
  return launch_split(slots, input_gradient_kernel<T, kTiles>, Layout::kShared, tiles, chunks, p, limits, stream);
}

template <typename T>
cudaError_t launch(const FewRowsBackward& p, cudaStream_t stream) {
  DeviceLimits limits{};
  if (const cudaError_t status = current_limits(limits); status != cudaSuccess) return status;
  // Before dx, which is long and starts beside them.
  if (p.r > 0) {
    if (const cudaError_t status = launch_side_gradients(p, limits, stream); status != cudaSuccess) return status;
  }
  if (p.dx == nullptr) return cudaSuccess;
  if (p.m <= 8) return launch_input_gradient<T, 1>(p, limits, stream);
  if (p.m <= 16) return launch_input_gradient<T, 2>(p, limits, stream);
  if (p.m <= 32) return launch_input_gradient<T, 4>(p, limits, stream);
  return launch_input_gradient<T, 8>(p, limits, stream);
}

}  // namespace

int few_rows_backward_cuda(const FewRowsBackward& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::kFloat16) return launch<__half>(params, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
