// y = x W^T + scale * (u B^T) + bias and u = x A^T for a few rows of x, W decoded in the product.
//
// Two chained launches: the first makes u, the second starts beside it and waits for u only before its last step.
// The bytes of W are read once. A block owns `kRows` outputs and a part of K; its warps split that part again, and the
// blocks of a cluster add their sums through distributed shared memory, in a fixed order.

#include "few_rows.cuh"

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
  static constexpr int kResident = kTiles <= 4 ? 2 : 1;  // blocks on a multiprocessor
  using Result = Sums<kRows, kTiles * kTokens>;
  static_assert(kWarpsK * Result::kBytes <= kStages * kStageBytes);
};

// Adds scale * (u B^T) to the sums of a warp. The steps over R are dealt to `warps` warps, this one being number
// `warp`, whose sums are added anyway.
template <typename T, int kTiles, int kTileGroups>
__device__ __forceinline__ void add_lora(
    const FewRowsForward& p, float (&acc)[kTileGroups][kTiles][4], int64_t row0, int warp, int warps, bool wide) {
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
      const uint32_t a0 = pair<T>(p.lora_b, row, p.r, r, upper, wide);
      const uint32_t a1 = pair<T>(p.lora_b, row + 8, p.r, r, lower, wide);
      const uint32_t a2 = pair<T>(p.lora_b, row, p.r, r + 2, upper, wide);
      const uint32_t a3 = pair<T>(p.lora_b, row + 8, p.r, r + 2, lower, wide);
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

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, Shape<kTiles>::kResident)
    linear_kernel(const FewRowsForward p, int ranks, int chunks, int log2_blocksize) {
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
  if (p.r > 0) {
    const int64_t width = static_cast<int64_t>(p.r) * (wide ? sizeof(float) : sizeof(T));
    const int64_t rows = min(p.n - row0, static_cast<int64_t>(Layout::kRows));
    prefetch(static_cast<const char*>(p.lora_b) + row0 * width, rows * width);
  }

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

// The same for at most 16 tokens, where reading and decoding W is the whole cost. The bytes go straight to registers,
// several slabs ahead. The codes are multiplied as they are, each as the sum of two values of T, and the sums of a
// block are multiplied by its statistic: fewer instructions than scaling every element, and W is not rounded at all.
// All four lanes t of a row are then in one block, so blocks of fewer than 64 elements are left to `linear_kernel`.
constexpr int kBlock = 64;
constexpr int kBlocks = kSlab / kBlock;

template <int kTiles, int kTileGroups>
struct DecodeShape {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChunk = kWarps * kSlab;
  static constexpr int kRows = kTileGroups * kFragment;
  static constexpr int kAhead = kTileGroups == 1 ? 3 : kTiles == 1 ? 2 : 1;  // slabs that a warp has under way
  static constexpr bool kTokensAhead = kTiles == 1;  // whether the next tokens fit in the registers, too
  using Result = Sums<kRows, kTiles * kTokens>;
  static constexpr int kShared = kTableBytes + kStatisticsBytes;
  static_assert(kWarps * Result::kBytes <= kShared);
};

template <typename T, int kTiles, int kTileGroups>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const FewRowsForward p, int ranks, int chunks, int log2_blocksize) {
  using Layout = DecodeShape<kTiles, kTileGroups>;
  constexpr int kAhead = Layout::kAhead, kChunk = Layout::kChunk;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* table = shared;
  float* statistics = reinterpret_cast<float*>(shared + kTableBytes);

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(ranks)) * Layout::kRows;
  const int64_t k0 = static_cast<int64_t>(rank) * chunks * kChunk + warp * kSlab;
  // Of K from k0 on, for this warp; a multiple of a block.
  const int length =
      static_cast<int>(min(p.k - k0, static_cast<int64_t>(chunks) * kChunk - static_cast<int64_t>(warp) * kSlab));

  // The first of this lane's rows; the others are 8 rows apart.
  const uint8_t* source = p.w_packed + ((row0 + g) * p.k + k0) / 2 + 8 * t;
  const int64_t eight_rows = p.k * 4;
  const int rows = static_cast<int>(min(p.n - row0 - g, static_cast<int64_t>(Layout::kRows)));  // g being the first
  // The statistic that a lane looks after: row half t / 2, block t % 2 of a slab.
  const int64_t first = (row0 + t / 2 * 8 + g) * p.k + k0 + t % 2 * kBlock;
  struct Slab {
    uint2 word[kTileGroups][2][kBlocks];
    Statistic statistic[kTileGroups];
  };
  const auto load = [&](Slab& slab, int k) {
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* row = source + (2 * group + half) * eight_rows + k / 2;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          slab.word[group][half][i] = make_uint2(0, 0);
          if (group * kFragment + half * 8 < rows && k + i * kBlock < length) {
            asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                         : "=r"(slab.word[group][half][i].x), "=r"(slab.word[group][half][i].y)
                         : "l"(row + i * kBlock / 2));
          }
        }
      }
      const bool here = group * kFragment + t / 2 * 8 < rows && k + t % 2 * kBlock < length;
      slab.statistic[group] = load_statistic(p, first + 4 * group * eight_rows + k, log2_blocksize, here);
    }
  };
  const T* x = static_cast<const T*>(p.x) + g * p.k + k0 + 16 * t;
  using Tokens = uint4[kTiles][kBlocks][2];
  const auto load_tokens = [&](Tokens& b, int k) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          b[tile][i][j] = make_uint4(0, 0, 0, 0);
          if (tile * kTokens + g < p.m && k + i * kBlock < length) {
            b[tile][i][j] = __ldg(reinterpret_cast<const uint4*>(x + tile * kTokens * p.k + k + i * kBlock + j * 8));
          }
        }
      }
    }
  };

  Slab slabs[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(slabs[i], i * kChunk);
  Tokens next;
  if (Layout::kTokensAhead) load_tokens(next, 0);
  const float offset = p.nested ? __ldg(p.absmax_offset) : 0.0f;
  fill_exact_tables<T>(p, reinterpret_cast<uint2*>(table), statistics);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  if (p.r > 0) {
    const int64_t width = static_cast<int64_t>(p.r) * (wide ? sizeof(float) : sizeof(T));
    const int64_t rows = min(p.n - row0, static_cast<int64_t>(Layout::kRows));
    prefetch(static_cast<const char*>(p.lora_b) + row0 * width, rows * width);
  }
  __syncthreads();

  float acc[kTileGroups][kTiles][4] = {};
  const auto copy = static_cast<uint32_t>(lane % kCopies) * static_cast<uint32_t>(sizeof(uint2));
  for (int k = 0; k < length; k += kAhead * kChunk) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int at = k + ahead * kChunk;
      if (at >= length) break;
      Tokens b;
      if (Layout::kTokensAhead) {
        memcpy(b, next, sizeof(Tokens));
        load_tokens(next, at + kChunk);
      } else {
        load_tokens(b, at);
      }
      Slab& slab = slabs[ahead];
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        const float mine = absmax_of(p, slab.statistic[group], statistics, offset);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const float upper_absmax = __shfl_sync(0xffffffffu, mine, i, 4);
          const float lower_absmax = __shfl_sync(0xffffffffu, mine, 2 + i, 4);
          float near[kTiles][4], rest[kTiles][4];
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const uint2 &up = slab.word[group][0][i], &low = slab.word[group][1][i];
            const uint32_t upper = step < 2 ? up.x : up.y, lower = step < 2 ? low.x : low.y;
            // Two bytes of a row each: a lane's elements 4 step to 4 step + 3 of its 16.
            const uint2 u0 = step % 2 ? decode_exactly<2>(table, upper, copy) : decode_exactly<0>(table, upper, copy);
            const uint2 u1 = step % 2 ? decode_exactly<3>(table, upper, copy) : decode_exactly<1>(table, upper, copy);
            const uint2 l0 = step % 2 ? decode_exactly<2>(table, lower, copy) : decode_exactly<0>(table, lower, copy);
            const uint2 l1 = step % 2 ? decode_exactly<3>(table, lower, copy) : decode_exactly<1>(table, lower, copy);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const uint4 v = b[tile][i][step / 2];
              const uint32_t b0 = step % 2 ? v.z : v.x, b1 = step % 2 ? v.w : v.y;
              if (step == 0) {
                mma_onto_zero<T>(near[tile], u0.x, l0.x, u1.x, l1.x, b0, b1);
                mma_onto_zero<T>(rest[tile], u0.y, l0.y, u1.y, l1.y, b0, b1);
              } else {
                Numeric<T>::mma(near[tile], u0.x, l0.x, u1.x, l1.x, b0, b1);
                Numeric<T>::mma(rest[tile], u0.y, l0.y, u1.y, l1.y, b0, b1);
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float absmax = c < 2 ? upper_absmax : lower_absmax;
              acc[group][tile][c] = fmaf(absmax, near[tile][c] + rest[tile][c], acc[group][tile][c]);
            }
          }
        }
      }
      load(slab, at + kAhead * kChunk);
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

constexpr int kProjectThreads = 512;

// u for 16 ranks and 8 tokens a block; the warps split K.
template <typename T>
__global__ void __launch_bounds__(kProjectThreads) project_kernel(const FewRowsForward p) {
  let_next_start();
  constexpr int kWarps = kProjectThreads / 32;
  __shared__ float sums[kWarps][kFragment][kTokens];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * kFragment, m0 = static_cast<int64_t>(blockIdx.y) * kTokens;
  const bool wide = p.adapter_dtype == DType::kFloat32;
  const bool upper = r0 + g < p.r, lower = r0 + 8 + g < p.r, token = m0 + g < p.m;
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  float acc[4] = {};
#pragma unroll 4
  for (int64_t k = warp * 32 + t * 8; k < p.k; k += kWarps * 32) {
    const uint4 a0 = upper ? eight<T>(p.lora_a, (r0 + g) * p.k + k, wide) : nothing;
    const uint4 a1 = lower ? eight<T>(p.lora_a, (r0 + 8 + g) * p.k + k, wide) : nothing;
    const uint4 b = token ? eight<T>(p.x, (m0 + g) * p.k + k, false) : nothing;
    Numeric<T>::mma(acc, a0.x, a1.x, a0.y, a1.y, b.x, b.y);
    Numeric<T>::mma(acc, a0.z, a1.z, a0.w, a1.w, b.z, b.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][g + i / 2 * 8][2 * t + i % 2] = acc[i];
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % kFragment, column = static_cast<int>(threadIdx.x) / kFragment;
  if (column >= kTokens || r0 + row >= p.r || m0 + column >= p.m) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i][row][column];
  static_cast<T*>(p.u)[(m0 + column) * p.r + r0 + row] = Numeric<T>::narrow(sum);
}

template <typename T, int kTiles>
cudaError_t launch_linear(const FewRowsForward& p, const DeviceLimits& limits, cudaStream_t stream) {
  using Layout = Shape<kTiles>;
  if (Layout::kShared > limits.shared_memory) return cudaErrorInvalidConfiguration;
  const int64_t tiles = (p.n + Layout::kRows - 1) / Layout::kRows;
  const int64_t chunks = (p.k + Layout::kChunk - 1) / Layout::kChunk;
  static Slots slots_of_kernel;
  const int* slots = nullptr;
  const auto kernel = linear_kernel<T, kTiles>;
  if (const cudaError_t status = slots_of_kernel.find(kernel, Layout::kShared, limits, slots); status != cudaSuccess) {
    return status;
  }
  const int ranks = split_of(tiles, chunks, slots, 2);
  const auto grid = static_cast<unsigned>(tiles * ranks);
  return launch_few_rows(
      kernel, dim3(grid), kThreads, Layout::kShared, ranks, p.r > 0 && limits.clusters, stream, p, ranks,
      static_cast<int>((chunks + ranks - 1) / ranks), log2_of(p.blocksize));
}

template <typename T, int kTiles, int kTileGroups>
cudaError_t launch_decode_groups(const FewRowsForward& p, const DeviceLimits& limits, cudaStream_t stream) {
  using Layout = DecodeShape<kTiles, kTileGroups>;
  static Slots slots_of_kernel;
  const int* slots = nullptr;
  const auto kernel = decode_kernel<T, kTiles, kTileGroups>;
  if (const cudaError_t status = slots_of_kernel.find(kernel, Layout::kShared, limits, slots); status != cudaSuccess) {
    return status;
  }
  const int64_t tiles = (p.n + Layout::kRows - 1) / Layout::kRows;
  const int64_t chunks = (p.k + Layout::kChunk - 1) / Layout::kChunk;
  const int ranks = split_of(tiles, chunks, slots, 2);
  return launch_few_rows(
      kernel, dim3(static_cast<unsigned>(tiles * ranks)), kThreads, Layout::kShared, ranks, p.r > 0 && limits.clusters,
      stream, p, ranks, static_cast<int>((chunks + ranks - 1) / ranks), log2_of(p.blocksize));
}

// Larger tiles read x less often and fill the table less often; smaller ones keep more multiprocessors busy.
template <typename T, int kTiles>
cudaError_t launch_decode(const FewRowsForward& p, const DeviceLimits& limits, cudaStream_t stream) {
  if constexpr (kTiles == 1) {
    const bool small = p.n <= static_cast<int64_t>(limits.multiprocessors) * 2 * kFragment;
    if (small) return launch_decode_groups<T, kTiles, 1>(p, limits, stream);
  }
  return launch_decode_groups<T, kTiles, 2>(p, limits, stream);
}

template <typename T>
cudaError_t launch(const FewRowsForward& p, cudaStream_t stream) {
  DeviceLimits limits{};
  if (const cudaError_t status = current_limits(limits); status != cudaSuccess) return status;
  if (p.r > 0) {
    const dim3 grid((p.r + kFragment - 1) / kFragment, (p.m + kTokens - 1) / kTokens);
    project_kernel<T><<<grid, kProjectThreads, 0, stream>>>(p);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  const bool whole_blocks = p.blocksize >= kBlock && p.k % kBlock == 0;
  if (p.m <= 8 && whole_blocks) return launch_decode<T, 1>(p, limits, stream);
  if (p.m <= 16) return whole_blocks ? launch_decode<T, 2>(p, limits, stream) : launch_linear<T, 2>(p, limits, stream);
  if (p.m <= 32) return launch_linear<T, 4>(p, limits, stream);
  return launch_linear<T, 8>(p, limits, stream);
}

}  // namespace

int few_rows_forward_cuda(const FewRowsForward& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::kFloat16) return launch<__half>(params, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
