// y = x W^T + scale * (u B^T) + bias and u = x A^T for a few rows of x; W, and A and B where they are packed, decoded
// in the products.
//
// Two chained launches: the first makes u, the second starts beside it and waits for u only before its last step.
// The bytes of W are read once. A block owns `kRows` outputs and a part of K; its warps split that part again, and the
// blocks of a cluster add their sums through distributed shared memory, in a fixed order.

#include "few_rows.cuh"
#include "few_rows_stream.cuh"

namespace fastlora {
namespace {

constexpr int kSlab = 128;  // elements of a row that a warp multiplies at once, 32 a lane
constexpr int kStages = 2;
constexpr int kGroups = 2;  // groups of 16 outputs to a warp
constexpr int kUnit = 16;   // bytes of one copy

// kTiles tiles of 8 tokens.
template <int kTiles>
struct Shape {
  static constexpr int kWarpsRow = 4;
  static constexpr int kWarpsK = kThreads / 32 / kWarpsRow;
  static constexpr int kChunk = kWarpsK * kSlab;  // elements of K in one stage of the pipeline
  static constexpr int kRows = kWarpsRow * kGroups * kFragment;
  static constexpr int kRowUnits = kChunk / 2 / kUnit;
  static constexpr int kTokenUnits = kChunk * 2 / kUnit;
  static constexpr int kWeightBytes = kRows * kRowUnits * kUnit;
  static constexpr int kStageBytes = kWeightBytes + kTiles * kTokens * kTokenUnits * kUnit;
  static constexpr int kShared = kTableBytes + kStatisticsBytes + kStages * kStageBytes;
  static constexpr int kBlocks = kTiles <= 4 ? 2 : 1;  // on a multiprocessor
  using Result = Sums<kRows, kTiles * kTokens>;
  static_assert(kWarpsK * Result::kBytes <= kStages * kStageBytes);
};

// Two neighbours of a row of B as a fragment register; those from `stop` on are zero.
template <typename T, typename Params>
__device__ __forceinline__ uint32_t pair_of_b(const Params& p, int64_t row, int column, int stop, bool wide) {
  if constexpr (kArePacked<Params>) {
    return Numeric<T>::pack(
        column < stop ? element_of_b<T>(p, row, column, wide) : 0.0f,
        column + 1 < stop ? element_of_b<T>(p, row, column + 1, wide) : 0.0f);
  } else {
    return pair<T>(p.lora_b, row, p.r, column, stop, wide);
  }
}

// Adds scale * (u B^T) to the sums of a warp. The steps over R are dealt to `warps` warps, this one being number
// `warp`, whose sums are added anyway.
template <typename T, int kTiles, int kTileGroups, typename Params>
__device__ __forceinline__ void add_lora(
    const Params& p, float (&acc)[kTileGroups][kTiles][4], int64_t row0, int warp, int warps, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int r0 = warp * kFragment; r0 < p.r; r0 += warps * kFragment) {
    const int r = r0 + 4 * t;
    uint32_t b[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = tile * kTokens + g;
      const int inside = token < p.m ? p.r : 0;
      b[tile][0] = pair<T>(p.u, token, p.r, r, inside, false);
      b[tile][1] = pair<T>(p.u, token, p.r, r + 2, inside, false);
    }
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
      const int64_t row = row0 + group * kFragment + g;
      const int upper = row < p.n ? p.r : 0, lower = row + 8 < p.n ? p.r : 0;
      const uint32_t a0 = pair_of_b<T>(p, row, r, upper, wide);
      const uint32_t a1 = pair_of_b<T>(p, row + 8, r, lower, wide);
      const uint32_t a2 = pair_of_b<T>(p, row, r + 2, upper, wide);
      const uint32_t a3 = pair_of_b<T>(p, row + 8, r + 2, lower, wide);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float lora[4] = {};
        Numeric<T>::mma(lora, a0, a1, a2, a3, b[tile][0], b[tile][1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[group][tile][i] += p.scale * lora[i];
      }
    }
  }
}

// Leaves the sums of a warp, whose rows start at `row0` of the block, as part `part`.
template <int kTiles, int kTileGroups, typename Result>
__device__ __forceinline__ void put_sums(
    const Result& sums, const float (&acc)[kTileGroups][kTiles][4], int part, int row0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int group = 0; group < kTileGroups; ++group) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.at(part, tile * kTokens + 2 * t + i % 2, row0 + group * kFragment + g + i / 2 * 8) = acc[group][tile][i];
      }
    }
  }
}

template <typename T, int kParts, typename Result>
__device__ __forceinline__ void finish_rows(const FewRowsForward& p, const Result& sums, int64_t row0, int ranks) {
  sums.template finish<kParts>(p.m, ranks, [&](int token, int row, float sum) {
    const int64_t n = row0 + row;
    if (n >= p.n) return;
    if (p.bias != nullptr) sum += element<T>(p.bias, n, p.bias_dtype == DType::kFloat32);
    store_as<T>(p.y, token * p.n + n, sum, p.out_dtype == DType::kFloat32);
  });
}

template <typename T, int kTiles, typename Params>
__global__ void __launch_bounds__(kThreads, Shape<kTiles>::kBlocks)
    linear_kernel(const Params p, int ranks, int chunks, int log2_blocksize) {
  let_next_start();
  using Layout = Shape<kTiles>;
  constexpr int kWarpsRow = Layout::kWarpsRow, kWarpsK = Layout::kWarpsK, kChunk = Layout::kChunk;
  constexpr int kRowUnits = Layout::kRowUnits, kTokenUnits = Layout::kTokenUnits;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* table = shared;
  float* statistics = reinterpret_cast<float*>(shared + kTableBytes);
  unsigned char* stages = shared + kTableBytes + kStatisticsBytes;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp % kWarpsRow, warp_k = warp / kWarpsRow;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(ranks)) * Layout::kRows;
  const int64_t first = static_cast<int64_t>(rank) * chunks * kChunk;
  const int64_t stop = min(p.k, first + static_cast<int64_t>(chunks) * kChunk);

  // Rows alternate between the two halves of a line of shared memory, so that eight lanes read eight different units.
  const auto load = [&](int stage, int64_t k0) {
    unsigned char* weight = stages + stage * Layout::kStageBytes;
    unsigned char* tokens = weight + Layout::kWeightBytes;
#pragma unroll
    for (int i = 0; i < Layout::kRows * kRowUnits / kThreads; ++i) {
      const int v = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = v / kRowUnits, unit = v % kRowUnits;
      const int64_t k = k0 + unit * 2 * kUnit;
      const bool inside = row0 + row < p.n && k < stop;
      const int64_t source = inside ? ((row0 + row) * p.k + k) / 2 : 0;
      copy_async(weight + (row * kRowUnits + (unit ^ ((row & 1) << 2))) * kUnit, p.w_packed + source, inside);
    }
    // The four units of a lane's 32 elements go four units apart: step j of all lanes is then one run.
#pragma unroll
    for (int i = 0; i < kTiles * kTokens * kTokenUnits / kThreads; ++i) {
      const int v = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = v / kTokenUnits, unit = v % kTokenUnits;
      const int64_t k = k0 + unit * (kUnit / 2);
      const bool inside = row < p.m && k < stop;
      const int64_t source = inside ? row * p.k + k : 0;
      const int place = (unit / 16 * 16 + unit % 4 * 4 + unit / 4 % 4) ^ ((row & 1) << 2);
      copy_async(tokens + (row * kTokenUnits + place) * kUnit, static_cast<const T*>(p.x) + source, inside);
    }
    commit_copies();
  };
  const auto load_statistics = [&](Statistic(&s)[kGroups][2], int64_t k0) {
    const int64_t k = k0 + warp_k * kSlab + t * 32;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + (warp_row * kGroups + group) * kFragment + half * 8 + g;
        s[group][half] = load_statistic(p, row * p.k + k, log2_blocksize, row < p.n && k < stop);
      }
    }
  };

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage < chunks) load(stage, first + stage * kChunk);
  }
  Statistic next[kGroups][2];
  load_statistics(next, first);
  const float offset = p.nested ? __ldg(p.absmax_offset) : 0.0f;
  fill_tables(p, reinterpret_cast<float2*>(table), statistics);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  if (p.r > 0) prefetch_b(p, row0, min(p.n - row0, static_cast<int64_t>(Layout::kRows)), wide);

  float acc[kGroups][kTiles][4] = {};
  const auto copy = static_cast<uint32_t>(lane % kCopies) * static_cast<uint32_t>(sizeof(float2));
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) {
      wait_copies<kStages - 1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    float absmax[kGroups][2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      absmax[group][0] = absmax_of(p, next[group][0], statistics, offset);
      absmax[group][1] = absmax_of(p, next[group][1], statistics, offset);
    }
    if (chunk + 1 < chunks) load_statistics(next, first + static_cast<int64_t>(chunk + 1) * kChunk);

    const unsigned char* weight = stages + chunk % kStages * Layout::kStageBytes;
    const unsigned char* tokens = weight + Layout::kWeightBytes;
    const int odd = (g & 1) << 2;
    uint4 words[kGroups][2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (warp_row * kGroups + group) * kFragment + half * 8 + g;
        words[group][half] =
            *reinterpret_cast<const uint4*>(weight + (row * kRowUnits + ((warp_k * 4 + t) ^ odd)) * kUnit);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int place = (warp_k * 16 + j * 4 + t) ^ odd;
        b[tile] = *reinterpret_cast<const uint4*>(tokens + ((tile * kTokens + g) * kTokenUnits + place) * kUnit);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t upper[4], lower[4];
        const uint4 &w0 = words[group][0], &w1 = words[group][1];
        decode_word<T>(upper, table, j == 0 ? w0.x : j == 1 ? w0.y : j == 2 ? w0.z : w0.w, copy, absmax[group][0]);
        decode_word<T>(lower, table, j == 0 ? w1.x : j == 1 ? w1.y : j == 2 ? w1.z : w1.w, copy, absmax[group][1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Numeric<T>::mma(acc[group][tile], upper[0], lower[0], upper[1], lower[1], b[tile].x, b[tile].y);
          Numeric<T>::mma(acc[group][tile], upper[2], lower[2], upper[3], lower[3], b[tile].z, b[tile].w);
        }
      }
    }
    __syncthreads();
    if (chunk + kStages < chunks) load(chunk % kStages, first + static_cast<int64_t>(chunk + kStages) * kChunk);
  }

  if (p.r > 0) {
    wait_for_previous();
    const int64_t first_row = row0 + warp_row * kGroups * kFragment;
    add_lora<T, kTiles, kGroups>(p, acc, first_row, rank * kWarpsK + warp_k, ranks * kWarpsK, wide);
  }
  const typename Layout::Result sums{reinterpret_cast<float*>(stages)};
  put_sums<kTiles, kGroups>(sums, acc, warp_k, warp_row * kGroups * kFragment);
  finish_rows<T, kWarpsK>(p, sums, row0, ranks);
}

// The same for at most 16 tokens, where the bytes of W are the whole cost: they go straight to registers, several
// slabs ahead, and x comes from the cache. All warps split K; `kTileGroups` groups of 16 outputs a block.
template <int kTiles, int kTileGroups>
struct DecodeShape {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChunk = kWarps * kSlab;
  static constexpr int kRows = kTileGroups * kFragment;
  static constexpr int kAhead = 4 / kTileGroups;  // slabs that a warp has under way
  using Result = Sums<kRows, kTiles * kTokens>;
  static constexpr int kShared = kTableBytes + kStatisticsBytes;
  static_assert(kWarps * Result::kBytes <= kShared);
};

template <typename T, int kTiles, int kTileGroups, typename Params>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const Params p, int ranks, int chunks, int log2_blocksize) {
  let_next_start();
  using Layout = DecodeShape<kTiles, kTileGroups>;
  constexpr int kAhead = Layout::kAhead, kChunk = Layout::kChunk;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* table = shared;
  float* statistics = reinterpret_cast<float*>(shared + kTableBytes);

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(ranks)) * Layout::kRows;
  const int64_t k0 = static_cast<int64_t>(rank) * chunks * kChunk;
  const int length = static_cast<int>(min(p.k - k0, static_cast<int64_t>(chunks) * kChunk));
  const int start = warp * kSlab + t * 32;  // of this lane, from k0 on

  uint4 words[kAhead][kTileGroups][2];
  Statistic found[kAhead][kTileGroups][2];
  int64_t first[kTileGroups][2];  // element of W where this lane starts
  bool inside[kTileGroups][2];
#pragma unroll
  for (int group = 0; group < kTileGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + group * kFragment + half * 8 + g;
      inside[group][half] = row < p.n;
      first[group][half] = row * p.k + k0 + start;
    }
  }
  const auto load = [&](uint4(&word)[kTileGroups][2], Statistic(&s)[kTileGroups][2], int k) {
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool here = inside[group][half] && start + k < length;
        const int64_t element = first[group][half] + k;
        word[group][half] = make_uint4(0, 0, 0, 0);
        if (here) {
          asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(word[group][half].x), "=r"(word[group][half].y), "=r"(word[group][half].z),
                         "=r"(word[group][half].w)
                       : "l"(p.w_packed + element / 2));
        }
        s[group][half] = load_statistic(p, element, log2_blocksize, here);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(words[i], found[i], i * kChunk);
  const float offset = p.nested ? __ldg(p.absmax_offset) : 0.0f;
  fill_tables(p, reinterpret_cast<float2*>(table), statistics);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  if (p.r > 0) prefetch_b(p, row0, min(p.n - row0, static_cast<int64_t>(Layout::kRows)), wide);
  __syncthreads();

  float acc[kTileGroups][kTiles][4] = {};
  const auto copy = static_cast<uint32_t>(lane % kCopies) * static_cast<uint32_t>(sizeof(float2));
  const T* x = static_cast<const T*>(p.x) + g * p.k + k0 + start;
  for (int k = 0; warp * kSlab + k < length; k += kAhead * kChunk) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = k + i * kChunk;
      if (warp * kSlab + at >= length) break;
      const bool here = start + at < length;
      uint4 b[4][kTiles];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          b[j][tile] = make_uint4(0, 0, 0, 0);
          if (here && tile * kTokens + g < p.m) {
            b[j][tile] = __ldg(reinterpret_cast<const uint4*>(x + tile * kTokens * p.k + at + j * 8));
          }
        }
      }
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        const float upper_absmax = absmax_of(p, found[i][group][0], statistics, offset);
        const float lower_absmax = absmax_of(p, found[i][group][1], statistics, offset);
        const uint4 w0 = words[i][group][0], w1 = words[i][group][1];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t upper[4], lower[4];
          decode_word<T>(upper, table, j == 0 ? w0.x : j == 1 ? w0.y : j == 2 ? w0.z : w0.w, copy, upper_absmax);
          decode_word<T>(lower, table, j == 0 ? w1.x : j == 1 ? w1.y : j == 2 ? w1.z : w1.w, copy, lower_absmax);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint4 v = b[j][tile];
            Numeric<T>::mma(acc[group][tile], upper[0], lower[0], upper[1], lower[1], v.x, v.y);
            Numeric<T>::mma(acc[group][tile], upper[2], lower[2], upper[3], lower[3], v.z, v.w);
          }
        }
      }
      load(words[i], found[i], at + kAhead * kChunk);
    }
  }
  if (p.r > 0) {
    wait_for_previous();
    add_lora<T, kTiles, kTileGroups>(p, acc, row0, rank * Layout::kWarps + warp, ranks * Layout::kWarps, wide);
  }
  __syncthreads();
  const typename Layout::Result sums{reinterpret_cast<float*>(shared)};
  put_sums<kTiles, kTileGroups>(sums, acc, warp, 0);
  finish_rows<T, Layout::kWarps>(p, sums, row0, ranks);
}

// u for 16 ranks and 8 tokens a cluster of `sharers` blocks, whose warps split K. It starts beside the product before
// it and lets its own product start when that one has ended. Copies of W that are under way delay every load behind
// them: where A takes more than one round of loads the blocks of a cluster ask for it before. One alone would take
// longer to ask.
template <typename T, int kBlockThreads, Storage kStorage, typename Params>
__global__ void __launch_bounds__(kBlockThreads) project_kernel(const Params p, int sharers) {
  constexpr int kRound = 4;  // loads of A of a thread that are under way at once
  const bool rounds = p.k > static_cast<int64_t>(sharers) * kBlockThreads * kRound;
  if (sharers > 1 && rounds && blockIdx.y == 0) prefetch_a(p, p.adapter_dtype == DType::kFloat32);
  wait_for_previous();
  let_next_start();
  const auto store = [&](int64_t token, int r, float sum) {
    if (r < p.r) static_cast<T*>(p.u)[token * p.r + r] = Numeric<T>::narrow(sum);
  };
  project<T, kBlockThreads, 1, kStorage>(p, store, sharers);
}

template <typename T, int kTiles, typename Params>
cudaError_t launch_linear(const Params& p, const DeviceLimits& limits, cudaStream_t stream) {
  using Layout = Shape<kTiles>;
  static Slots slots;
  const int64_t tiles = cut(p.n, Layout::kRows), chunks = cut(p.k, Layout::kChunk);
  return launch_split(slots, linear_kernel<T, kTiles, Params>, Layout::kShared, tiles, chunks, p, limits, stream);
}

template <typename T, int kTiles, int kTileGroups, typename Params>
cudaError_t launch_decode_groups(const Params& p, const DeviceLimits& limits, cudaStream_t stream) {
  using Layout = DecodeShape<kTiles, kTileGroups>;
  static Slots slots;
  const int64_t tiles = cut(p.n, Layout::kRows), chunks = cut(p.k, Layout::kChunk);
  const auto kernel = decode_kernel<T, kTiles, kTileGroups, Params>;
  return launch_split(slots, kernel, Layout::kShared, tiles, chunks, p, limits, stream);
}

// Larger tiles read x less often and fill the table less often; smaller ones keep more multiprocessors busy.
template <typename T, int kTiles, typename Params>
cudaError_t launch_decode(const Params& p, const DeviceLimits& limits, cudaStream_t stream) {
  if constexpr (kTiles == 1) {
    const bool large = p.n > static_cast<int64_t>(limits.multiprocessors) * 2 * kFragment;
    if (!large) return launch_decode_groups<T, kTiles, 1>(p, limits, stream);
  }
  return launch_decode_groups<T, kTiles, 2>(p, limits, stream);
}

template <typename T, int kBlockThreads, Storage kStorage, typename Params>
cudaError_t launch_project(const Params& p, bool shared, const DeviceLimits& limits, cudaStream_t stream) {
  Params side = p;
  if (p.dropped != nullptr) side.x = p.dropped;
  const auto ranks = static_cast<unsigned>(cut(p.r, kFragment)), tokens = static_cast<unsigned>(cut(p.m, kTokens));
  const int sharers = shared ? sharers_of(int64_t{ranks} * tokens, p.k, kBlockThreads, limits) : 1;
  return launch_few_rows(
      project_kernel<T, kBlockThreads, kStorage, Params>, dim3(ranks * sharers, tokens), kBlockThreads, 0, sharers,
      limits.clusters, stream, side, sharers);
}

template <typename T, int kBlockThreads, typename Params>
cudaError_t launch_project(const Params& p, bool shared, const DeviceLimits& limits, cudaStream_t stream) {
  if constexpr (kArePacked<Params>) {
    return p.packed_a.nf4 ? launch_project<T, kBlockThreads, Storage::kNF4>(p, shared, limits, stream)
                          : launch_project<T, kBlockThreads, Storage::kInt8>(p, shared, limits, stream);
  } else {
    return launch_project<T, kBlockThreads, Storage::kDense>(p, shared, limits, stream);
  }
}

template <typename T, typename Params>
cudaError_t launch(const Params& p, cudaStream_t stream) {
  DeviceLimits limits{};
  if (const cudaError_t status = current_limits(limits); status != cudaSuccess) return status;
  StreamPlan plan{};
  const bool streams = plan_stream(p, limits, plan);
  if (p.r > 0) {
    // The other products fill multiprocessors, so that more than one block of this one would keep theirs waiting.
    const cudaError_t status = streams ? launch_project<T, kBesideStream>(p, true, limits, stream)
                                       : launch_project<T, 2 * kBesideStream>(p, false, limits, stream);
    if (status != cudaSuccess) return status;
  }
  if (streams) return launch_stream(p, plan, limits, stream);
  if (p.m <= 8) return launch_decode<T, 1>(p, limits, stream);
  if (p.m <= 16) return launch_decode<T, 2>(p, limits, stream);
  if (p.m <= 32) return launch_linear<T, 4>(p, limits, stream);
  return launch_linear<T, 8>(p, limits, stream);
}

template <typename Params>
int launch_type(const Params& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::kFloat16) return launch<__half>(params, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int few_rows_forward_cuda(const FewRowsForward& params, void* stream) { return launch_type(params, stream); }

int few_rows_packed_cuda(const FewRowsPacked& params, void* stream) { return launch_type(params, stream); }

}  // namespace fastlora
