// du = scale * (dy B), dB = scale * (dy^T u) and dA = du^T x in two chained launches.
//
// dA and dB are sums over rows, of which tensor cores want pairs in a register: two neighbours of each of two rows are
// loaded instead, and exchanged. So nothing is transposed in memory, and each operand is read once.

#include "side_gradients.cuh"

namespace fastlora {
namespace {

constexpr int kSideThreads = 512;
constexpr int kSideWarps = kSideThreads / 32;
constexpr int kPitch = kSpan + 1;  // floats from one rank's sums to the next one's: on different banks

using SideSums = float[kSideWarps][kFragment][kPitch];

// narrow^T wide, (r, columns), for narrow (m, r) and wide (m, columns). A warp takes kSpan columns and each `splits`th
// 16 rows; a block kSideWarps / splits times as many columns. store(rank, column, sum); ranks from r on are not stored.
template <typename T, bool kRanksFirst, typename Store>
__device__ __forceinline__ void side_product(
    const void* narrow,
    const void* wide,
    int m,
    int r,
    int64_t columns,
    int64_t block,
    int splits,
    SideSums& sums,
    Store store) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int spans = kSideWarps / splits, part = warp % splits;
  const int64_t column0 = (block * spans + warp / splits) * kSpan;
  const bool inside = column0 + 4 * g < columns;
  const T* source = static_cast<const T*>(wide) + column0 + 4 * g;
  if (block * spans * kSpan >= columns) return;
  for (int r0 = 0; r0 < r; r0 += kFragment) {
    // The fragment's row g is the rank 2 g, row g + 8 the rank 2 g + 1; column g of tile i is the column 4 g + i.
    float acc[kSpanTiles][4] = {};
#pragma unroll 2
    for (int row0 = part * kFragment; row0 < m; row0 += splits * kFragment) {
      uint32_t a[4];
      uint2 b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 2 * t + i % 2 + i / 2 * 8;
        a[i] = pair<T>(narrow, row, r, r0 + 2 * g, row < m ? r : 0, false);
        b[i] = make_uint2(0, 0);
        if (inside && row < m) b[i] = *reinterpret_cast<const uint2*>(source + row * columns);
      }
      const uint32_t a0 = lower_halves(a[0], a[1]), a1 = upper_halves(a[0], a[1]);
      const uint32_t a2 = lower_halves(a[2], a[3]), a3 = upper_halves(a[2], a[3]);
      const auto multiply = [&](int tile, uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
        Numeric<T>::mma(acc[tile], a0, a1, a2, a3, lower_halves(b0, b1), lower_halves(b2, b3));
        Numeric<T>::mma(acc[tile + 1], a0, a1, a2, a3, upper_halves(b0, b1), upper_halves(b2, b3));
      };
      multiply(0, b[0].x, b[1].x, b[2].x, b[3].x);
      multiply(2, b[0].y, b[1].y, b[2].y, b[3].y);
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kSpanTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][2 * g + i / 2][8 * t + i % 2 * 4 + tile] = acc[tile][i];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < spans * kFragment * kSpan; i += kSideThreads) {
      // Neighbouring threads store neighbours.
      const int span = i / (kFragment * kSpan), j = i % (kFragment * kSpan);
      const int rank = kRanksFirst ? j % kFragment : j / kSpan, column = kRanksFirst ? j / kFragment : j % kSpan;
      const int64_t place = (block * spans + span) * kSpan + column;
      if (place >= columns || r0 + rank >= r) continue;
      float sum = 0.0f;
      for (int other = 0; other < splits; ++other) sum += sums[span * splits + other][rank][column];
      store(r0 + rank, place, sum);
    }
  }
}

// du for 16 ranks and 8 kGroups rows of dy; the warps of a cluster split N, and its first block adds their sums.
template <typename T, int kGroups>
__device__ __forceinline__ void output_side(const FewRowsBackward& p, int block, int ranks, SideSums& sums) {
  constexpr int kTileTokens = kTokens * kGroups;
  static_assert(kTileTokens <= kSpan && kFragment * kTileTokens <= kSideThreads);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const bool wide = p.adapter_dtype == DType::kFloat32;
  const int tiles_r = (p.r + kFragment - 1) / kFragment, tile = block / ranks;
  const int r0 = tile % tiles_r * kFragment, m0 = tile / tiles_r * kTileTokens;
  float acc[kGroups][4] = {};
  // The 16 rows of the fragment are the ranks 2 g (row g) and 2 g + 1 (row g + 8), neighbours in memory.
#pragma unroll(kGroups == 1 ? 2 : 1)
  for (int64_t n0 = (block % ranks * kSideWarps + warp) * 32; n0 < p.n; n0 += ranks * kSideWarps * 32) {
    const int64_t n = n0 + t * 8;
    const bool inside = n < p.n;
    uint32_t a[8];
    uint4 b[kGroups];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = pair<T>(p.lora_b, n + i, p.r, r0 + 2 * g, inside ? p.r : 0, wide);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int64_t token = m0 + i * kTokens + g;
      b[i] = inside && token < p.m ? eight<T>(p.dy, token * p.n + n, false) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Numeric<T>::mma(
          acc[i], lower_halves(a[0], a[1]), upper_halves(a[0], a[1]), lower_halves(a[2], a[3]),
          upper_halves(a[2], a[3]), b[i].x, b[i].y);
      Numeric<T>::mma(
          acc[i], lower_halves(a[4], a[5]), upper_halves(a[4], a[5]), lower_halves(a[6], a[7]),
          upper_halves(a[6], a[7]), b[i].z, b[i].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kGroups; ++i) {
    sums[warp][2 * g + i % 4 / 2][i / 4 * kTokens + 2 * t + i % 2] = acc[i / 4][i % 4];
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), row = thread % kFragment, column = thread / kFragment;
  float sum = 0.0f;
  if (column < kTileTokens) {
#pragma unroll
    for (int i = 0; i < kSideWarps; ++i) sum += sums[i][row][column];
  }
  if (ranks > 1) sum = sum_of_threads<kSideThreads>(sum, column < kTileTokens, ranks);
  if (column >= kTileTokens || block % ranks > 0 || r0 + row >= p.r || m0 + column >= p.m) return;
  static_cast<T*>(p.du)[static_cast<int64_t>(m0 + column) * p.r + r0 + row] = Numeric<T>::narrow(p.scale * sum);
}

// The first `projections` blocks, clusters of `ranks`, make du, the others dB. Two of these blocks fit a
// multiprocessor.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kSideThreads, 2)
    output_gradient_kernel(const FewRowsBackward p, int projections, int ranks, int splits) {
  let_next_start();
  __shared__ SideSums sums;
  const int block = static_cast<int>(blockIdx.x);
  if (block < projections) return output_side<T, kGroups>(p, block, ranks, sums);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  side_product<T, true>(
      p.u, p.dy, p.m, p.r, p.n, block - projections, splits, sums,
      [&](int rank, int64_t n, float sum) { store_as<T>(p.db, n * p.r + rank, p.scale * sum, wide); });
}

template <typename T>
__global__ void __launch_bounds__(kSideThreads) adapter_gradient_kernel(const FewRowsBackward p, int splits) {
  let_next_start();
  __shared__ SideSums sums;
  wait_for_previous();
  const bool wide = p.adapter_dtype == DType::kFloat32;
  side_product<T, false>(p.du, p.x, p.m, p.r, p.k, blockIdx.x, splits, sums, [&](int rank, int64_t k, float sum) {
    store_as<T>(p.da, rank * p.k + k, sum, wide);
  });
}

// ---------------------------------------------------------------------------------------------------------------- host

template <typename T>
cudaError_t launch(const FewRowsBackward& p, const DeviceLimits& limits, cudaStream_t stream) {
  int splits = 1;
  while (splits < kSideWarps && splits * kFragment < p.m) splits *= 2;
  const int64_t columns = kSideWarps / splits * kSpan;  // of a block
  constexpr int kMostGroups = 4;
  constexpr int kManyRows = 256;  // from here on blocks of more rows, which read B less often, keep the device busy
  const bool many = p.m >= kManyRows;
  const int64_t tiles = p.du == nullptr ? 0 : cut(p.r, kFragment) * cut(p.m, kTokens * (many ? kMostGroups : 1));
  const int ranks = sharers_of(tiles, p.n, kSideThreads, limits);
  const int64_t projections = tiles * ranks;
  const int64_t blocks = projections + (p.db == nullptr ? 0 : cut(cut(p.n, columns), ranks) * ranks);
  if (blocks > INT32_MAX || cut(p.k, columns) > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (blocks > 0) {
    const cudaError_t status = launch_few_rows(
        many ? output_gradient_kernel<T, kMostGroups> : output_gradient_kernel<T, 1>,
        dim3(static_cast<unsigned>(blocks)), kSideThreads, 0, ranks, false, stream, p, static_cast<int>(projections),
        ranks, splits);
    if (status != cudaSuccess) return status;
  }
  if (p.da == nullptr) return cudaSuccess;
  return launch_few_rows(
      adapter_gradient_kernel<T>, dim3(static_cast<unsigned>(cut(p.k, columns))), kSideThreads, 0, 1, limits.clusters,
      stream, p, splits);
}

}  // namespace

cudaError_t launch_side_gradients(const FewRowsBackward& p, const DeviceLimits& limits, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch<__half>(p, limits, stream) : launch<__nv_bfloat16>(p, limits, stream);
}

}  // namespace fastlora
