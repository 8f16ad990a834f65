// Products with W decoded inside of them, for compute capability 9.0 and any number of tokens:
// y = x W^T + scale * (u B^T) + bias, u = x A^T, and dx = dy W + du A beside the launches of side_gradients.cu.
//
// A product is computed transposed, its result (outputs or inputs, tokens): a warpgroup decodes 64 rows of W, or
// columns backward, straight into the fragments of its tensor core instruction, whose other operand, the tokens, lies
// in shared memory. While one step is multiplied the next is decoded. One thread fetches the tiles; the LoRA factors
// are the last step. Where the tiles are too few for the device, the blocks of a cluster split the reduced side and add
// their sums in a fixed order.

#include <algorithm>

#include "hopper.cuh"
#include "side_gradients.cuh"

namespace fastlora {
namespace {

constexpr int kRows = 128;        // of the transposed result, in a tile: two warpgroups of 64
constexpr int kStep = 64;         // of the reduced side in a tile of tokens: a swizzled row
constexpr int kWeightStep = 128;  // and in a tile of W
constexpr int kWeightBytes = kRows * kWeightStep / 2;
constexpr int kWeightSteps = 4;                                                      // tiles of W under way
constexpr int kAbsmaxBytes = 4 * 2 * kWeightStep * static_cast<int>(sizeof(float));  // backward: two buffers a team

// Shared memory, by its addresses there: W and what is small, the table where `LaneTable` wants it, the tokens. The
// sums of other teams and blocks have a place of their own, or that of the tokens once those are done with.
template <int kTokensTile>
struct TileShape {
  static constexpr int kTokenBytes = kTokensTile * kStep * 2;
  static constexpr int kSteps = kTokensTile == 128 ? 6 : 8;  // tiles under way: four cost a fifth of the speed
  // Few tokens leave registers for twice the warps: two teams take turns at the steps.
  static constexpr int kTeams = kTokensTile <= 64 ? 2 : 1;
  static constexpr int kWarps = kTeams * kRows / 16;
  static constexpr int kThreads = kWarps * 32 + 32;
  static constexpr int kPitch = kRows + 4;
  static constexpr int kSumsBytes = kTokensTile * kPitch * static_cast<int>(sizeof(float));
  static constexpr int kTokensAt = kTableAt + kLaneTableBytes;
  static constexpr int kSumsAt = kTokensAt + (kTeams > 1 ? kSteps * kTokenBytes : 0);
  static constexpr int kShared =
      kSumsAt + (kSumsBytes > kSteps * kTokenBytes || kTeams > 1 ? kSumsBytes : kSteps * kTokenBytes);
};
static_assert(
    2 * 1024 + kWeightSteps * kWeightBytes + kStatisticsBytes + kAbsmaxBytes + 24 * sizeof(uint64_t) <= kTableAt);

// Forward, the fragments of 32 elements of K: a lane takes byte t of every word of its two rows.
template <typename T>
__device__ __forceinline__ void decode_rows(
    uint32_t (&fragment)[8],
    const LaneTable& table,
    uint32_t words_at,
    int unit,
    int row_a,
    int row_b,
    int t,
    float absmax_a,
    float absmax_b) {
  const auto words_of = [&](uint32_t (&words)[4], int row) {
    const uint32_t address = words_at + row * (kWeightStep / 2) + ((unit ^ (row >> 1 & 3)) * 16);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
  };
  uint32_t a[4], b[4];
  words_of(a, row_a);
  words_of(b, row_b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 of_a = scaled(table.look_up(a[i], LaneTable::select(t)), absmax_a);
    const float2 of_b = scaled(table.look_up(b[i], LaneTable::select(t)), absmax_b);
    fragment[2 * i] = Numeric<T>::pack(of_a.x, of_a.y);
    fragment[2 * i + 1] = Numeric<T>::pack(of_b.x, of_b.y);
  }
}

// Backward, those of 32 elements of N: a lane takes byte `column` of every pair of rows of W, whose two values belong
// to its two rows of the result. `absmax`: of the rows of W, from row 2 t on.
template <typename T>
__device__ __forceinline__ void decode_columns(
    uint32_t (&fragment)[8],
    const LaneTable& table,
    uint32_t words_at,
    int unit,
    int column,
    int t,
    const float* absmax) {
  const uint32_t address = words_at + 2 * t * (kWeightStep / 2) + ((column / 16 ^ t) * 16) + column % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = unit * 32 + i * 8;
    uint32_t first, second;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(first) : "r"(address + n * (kWeightStep / 2)));
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(second) : "r"(address + (n + 1) * (kWeightStep / 2)));
    const float2 scales = *reinterpret_cast<const float2*>(absmax + n);
    const float2 of_first = scaled(table.look_up(first, LaneTable::select(0)), scales.x);
    const float2 of_second = scaled(table.look_up(second, LaneTable::select(0)), scales.y);
    fragment[2 * i] = Numeric<T>::pack(of_first.x, of_second.x);
    fragment[2 * i + 1] = Numeric<T>::pack(of_first.y, of_second.y);
  }
}

template <typename T, int kTokensTile, bool kBackward, bool kNested>
__global__ void __launch_bounds__(TileShape<kTokensTile>::kThreads, 1) tile_kernel(
    const __grid_constant__ CUtensorMap rows_map,
    const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ CUtensorMap narrow_map,
    const TileParams p,
    int ranks,
    int log2_blocksize) {
#if defined(FASTLORA_WGMMA)
  using Layout = TileShape<kTokensTile>;
  constexpr int kSteps = Layout::kSteps;
  extern __shared__ unsigned char shared[];
  const uint32_t weights_at = (shared_address(shared) + 1023) / 1024 * 1024;
  const uint32_t statistics_at = weights_at + kWeightSteps * kWeightBytes, absmax_at = statistics_at + kStatisticsBytes;
  const uint32_t barriers = absmax_at + kAbsmaxBytes;
  // The high byte of an address in shared memory names the block of the cluster.
  const uint32_t window = shared_address(shared) & 0xff000000u, tokens_at = window + Layout::kTokensAt;
  // Generic pointers to such addresses.
  const auto pointer = [&](uint32_t address) { return shared + (address - shared_address(shared)); };
  float* statistics = reinterpret_cast<float*>(pointer(statistics_at));
  const auto full = [&](int slot) { return barriers + slot * 8; };
  const auto empty = [&](int slot) { return barriers + (kSteps + slot) * 8; };
  const auto full_weight = [&](int slot) { return barriers + (2 * kSteps + slot) * 8; };
  const auto empty_weight = [&](int slot) { return barriers + (2 * kSteps + kWeightSteps + slot) * 8; };

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);  // one value for the whole warp
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSteps; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), kRows / 16);
    }
    for (int i = 0; i < kWeightSteps; ++i) {
      init_barrier(full_weight(i), 1);
      init_barrier(empty_weight(i), kRows / 16);
    }
    publish_barriers();
  }
  if (warp < Layout::kWarps) {
    fill_lane_table<Layout::kWarps * 32>(
        p, reinterpret_cast<uint2*>(pointer(window + kTableAt)),
        [](float high, float low) { return make_uint2(__float_as_uint(high), __float_as_uint(low)); });
    if (kNested && threadIdx.x < 256) statistics[threadIdx.x] = __ldg(p.absmax_code + threadIdx.x);
  }
  __syncthreads();

  const int64_t side = kBackward ? p.k : p.n, reduced = kBackward ? p.n : p.k;
  const int row_tiles = static_cast<int>((side + kRows - 1) / kRows);
  const int tiles = row_tiles * ((p.m + kTokensTile - 1) / kTokensTile);
  const int steps = static_cast<int>((reduced + kWeightStep - 1) / kWeightStep), share = (steps + ranks - 1) / ranks;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int first_step = rank * share, stop_step = min(steps, first_step + share);
  const int lora_steps = rank == 0 ? (p.r + kStep - 1) / kStep : 0;
  const int first_tile = static_cast<int>(blockIdx.x) / ranks, tile_step = static_cast<int>(gridDim.x) / ranks;

  if (warp >= Layout::kWarps) {
    if (lane == 0) {
      Ring<kSteps> token;
      Ring<kWeightSteps> weight;
      bool waited = false;
      const auto fetch = [&](const CUtensorMap& map, int column, int row) {
        const int slot = token.slot();
        wait_barrier(empty(slot), token.parity() ^ 1);
        expect_bytes(full(slot), Layout::kTokenBytes);
        copy_box(tokens_at + slot * Layout::kTokenBytes, map, column, row, full(slot));
        ++token.used;
      };
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int row0 = tile % row_tiles * kRows, token0 = tile / row_tiles * kTokensTile;
        for (int step = first_step; step < stop_step; ++step) {
          const int slot = weight.slot();
          wait_barrier(empty_weight(slot), weight.parity() ^ 1);
          expect_bytes(full_weight(slot), kWeightBytes);
          const int column = kBackward ? row0 : step * kWeightStep, row = kBackward ? step * kWeightStep : row0;
          copy_box(weights_at + slot * kWeightBytes, w_map, column / 2, row, full_weight(slot));
          ++weight.used;
          fetch(rows_map, step * kWeightStep, token0);
          fetch(rows_map, step * kWeightStep + kStep, token0);
        }
        for (int step = 0; step < lora_steps; ++step) {
          if (!waited) wait_for_previous();
          waited = true;
          fetch(narrow_map, step * kStep, token0);
        }
      }
    }
    __syncwarp();
    if (ranks > 1) {
      meet_cluster();
      meet_cluster();
    }
    return;
  }

  const int g = lane / 4, t = lane % 4;
  const int team = warp / (kRows / 16), rows_at = warp % (kRows / 16) * 16;
  // A lane's two rows are neighbours, whose results it stores together. Forward, eight lanes' first rows lie in eight
  // different parts of a line of shared memory; backward, the two rows are those of one byte of W.
  const int twist = kBackward ? 0 : g >> 2;
  const int row_a = rows_at + 2 * g + twist, row_b = rows_at + 2 * g + 1 - twist;
  const LaneTable table(window, lane);
  const float offset = kNested ? __ldg(p.absmax_offset) : 0.0f;
  const bool wide = p.adapter_dtype == DType::kFloat32;
  // Offsets in units of half a step of W fit 32 bits. Beyond the matrix any statistic will do: those sums are not used,
  // or the rows are zero there.
  const uint32_t halves = static_cast<uint32_t>(p.k / kStep), last = static_cast<uint32_t>(p.n) * halves - 1;
  const int log2_halves = log2_blocksize - 6;
  const auto statistic = [&](uint32_t n, uint32_t half) {
    const uint32_t block = min(n * halves + half, last) >> log2_halves;
    Statistic s{0.0f, 0};
    if constexpr (kNested) {
      s.code = __ldg(p.absmax_q + block);
      s.value = __ldg(p.absmax_scale + block / static_cast<uint32_t>(kNestedBlocksize));
    } else {
      s.value = __ldg(p.absmax + block);
    }
    return s;
  };
  const auto absmax_of = [&](const Statistic& s) {
    return kNested ? nested_absmax(statistics[s.code], s.value, offset) : s.value;
  };

  Ring<kSteps> token;
  Ring<kWeightSteps> weight;
  float acc[kTokensTile / 2];
  uint32_t fragments[2][8];
  int buffered = 0;

  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    const int64_t row0 = static_cast<int64_t>(tile % row_tiles) * kRows;
    const int token0 = tile / row_tiles * kTokensTile;
    const uint32_t tokens_before = token.used, weights_before = weight.used;
    token.used += 2 * team;
    weight.used += team;
#pragma unroll
    for (int i = 0; i < kTokensTile / 2; ++i) acc[i] = 0.0f;
    // The statistics of the next step. Forward, of a lane's two rows and both halves of the step. Backward a lane meets
    // every row of W: each thread of a team fetches one for all.
    Statistic next[kBackward ? 1 : 4];
    const int mine = static_cast<int>(threadIdx.x) % (2 * kRows);
    const auto load_statistics = [&](int step) {
      if constexpr (kBackward) {
        next[0] = statistic(
            static_cast<uint32_t>(step * kWeightStep + mine % kWeightStep),
            static_cast<uint32_t>(row0 / kStep + mine / kWeightStep));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          next[i] = statistic(static_cast<uint32_t>(row0) + (i % 2 == 0 ? row_a : row_b), 2 * step + i / 2);
        }
      }
    };
    if (first_step + team < stop_step) load_statistics(first_step + team);
    int pending = -1;  // slot of the tokens that may still be read
    // Starts the products with 32 of the 64 elements of a tile of tokens, and waits for those before. `half`: which.
    const auto multiply = [&](const uint32_t (&fragment)[8], int half) {
      const int slot = token.slot();
      if (half == 0) wait_barrier(full(slot), token.parity());
      const uint64_t b = matrix_descriptor(tokens_at + slot * Layout::kTokenBytes) + 4 * half;
      fence_registers();
      Warpgroup<T>::multiply(Size<kTokensTile>{}, acc, fragment[0], fragment[1], fragment[2], fragment[3], b);
      Warpgroup<T>::multiply(Size<kTokensTile>{}, acc, fragment[4], fragment[5], fragment[6], fragment[7], b + 2);
      commit_products();
      wait_products<1>();
      if (half == 0) {
        if (pending >= 0 && lane == 0) arrive(empty(pending));
        pending = -1;
      } else {
        pending = slot;
        ++token.used;
      }
    };
    for (int step = first_step + team; step < stop_step; step += Layout::kTeams) {
      float absmax[4];
      const float* shared_absmax = nullptr;
      if constexpr (kBackward) {
        float* buffer = reinterpret_cast<float*>(pointer(absmax_at)) + (2 * team + buffered) * 2 * kWeightStep;
        buffered ^= 1;  // the other one may still be read
        buffer[mine] = absmax_of(next[0]);
        asm volatile("bar.sync %0, %1;" ::"r"(team + 2), "n"(2 * kRows) : "memory");
        shared_absmax = buffer + rows_at / kStep * kWeightStep + 2 * t;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) absmax[i] = absmax_of(next[i]);
      }
      if (step + Layout::kTeams < stop_step) load_statistics(step + Layout::kTeams);
      wait_barrier(full_weight(weight.slot()), weight.parity());
      const uint32_t words_at = weights_at + weight.slot() * kWeightBytes;
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) {
        uint32_t (&fragment)[8] = fragments[unit % 2];
        if constexpr (kBackward) {
          decode_columns<T>(fragment, table, words_at, unit, rows_at / 2 + g, t, shared_absmax);
        } else {
          decode_rows<T>(
              fragment, table, words_at, unit, row_a, row_b, t, absmax[unit / 2 * 2], absmax[unit / 2 * 2 + 1]);
        }
        if (unit == 3) {
          __syncwarp();
          if (lane == 0) arrive(empty_weight(weight.slot()));
          weight.used += Layout::kTeams;
        }
        multiply(fragment, unit % 2);
      }
      token.used += 2 * (Layout::kTeams - 1);
    }
    // Both rings go on where the steps of all teams end.
    token.used = tokens_before + 2 * max(0, stop_step - first_step);
    weight.used = weights_before + max(0, stop_step - first_step);
    if (team > 0) token.used += lora_steps;
    for (int step = 0; team == 0 && step < lora_steps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t (&fragment)[8] = fragments[half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = step * kStep + half * 32 + i * 8 + 2 * t;
          if constexpr (kBackward) {
            // Columns of A: its rows bring the values of both of the lane's rows.
            const int64_t k = row0 + row_a;
            const int stop = k < p.k ? static_cast<int>(p.k) : 0;
            const uint32_t first =
                r < p.r ? pair<T>(p.adapter, r, static_cast<int>(p.k), static_cast<int>(k), stop, wide) : 0;
            const uint32_t second =
                r + 1 < p.r ? pair<T>(p.adapter, r + 1, static_cast<int>(p.k), static_cast<int>(k), stop, wide) : 0;
            fragment[2 * i] = __byte_perm(first, second, 0x5410);
            fragment[2 * i + 1] = __byte_perm(first, second, 0x7632);
          } else {
            const int64_t a = row0 + row_a, b = row0 + row_b;
            fragment[2 * i] = pair<T>(p.adapter, a, p.r, r, a < p.n ? p.r : 0, wide);
            fragment[2 * i + 1] = pair<T>(p.adapter, b, p.r, r, b < p.n ? p.r : 0, wide);
          }
        }
        multiply(fragment, half);
      }
    }
    wait_products<0>();
    if (pending >= 0 && lane == 0) arrive(empty(pending));

    const bool bias_wide = p.bias_dtype == DType::kFloat32, out_wide = p.out_dtype == DType::kFloat32;
    const auto store = [&](int local, int token_in_tile, float first, float second) {
      const int64_t row = row0 + local, m = token0 + token_in_tile;
      if (row >= side || m >= p.m) return;
      if (p.bias != nullptr) {
        first += element<T>(p.bias, row, bias_wide);
        second += element<T>(p.bias, row + 1, bias_wide);
      }
      if (out_wide) {
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + m * side + row) = make_float2(first, second);
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + m * side + row) = Numeric<T>::pack(first, second);
      }
    };
    const bool swapped = twist != 0;
    const auto meet = [&] { asm volatile("bar.sync 1, %0;" ::"n"(Layout::kWarps * 32) : "memory"); };
    // visit(row, token, sum of the row, sum of the next row), all counted from those of the tile.
    const auto each_pair = [&](auto visit) {
#pragma unroll
      for (int i = 0; i < kTokensTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float &a = acc[4 * i + j], &b = acc[4 * i + 2 + j];
          visit(rows_at + 2 * g, 8 * i + 2 * t + j, swapped ? b : a, swapped ? a : b);
        }
      }
    };
    {
      constexpr int kPitch = Layout::kPitch;
      float* sums = reinterpret_cast<float*>(pointer(window + Layout::kSumsAt));
      const auto at = [&](int local, int token_in_tile) {
        return reinterpret_cast<float2*>(sums + token_in_tile * kPitch + local);
      };
      const auto put = [&](int local, int token_in_tile, float first, float second) {
        *at(local, token_in_tile) = make_float2(first, second);
      };
      if constexpr (Layout::kTeams > 1) {
        if (team == 1) each_pair(put);
        meet();
        if (team == 0) {
          each_pair([&](int local, int token_in_tile, float first, float second) {
            float2* other = at(local, token_in_tile);
            first += other->x;
            second += other->y;
            if (ranks == 1) {
              store(local, token_in_tile, first, second);
            } else {
              *other = make_float2(first, second);
            }
          });
        }
        meet();
      } else if (ranks > 1) {
        meet();  // no warp may still read tokens where the sums go
        each_pair(put);
      }
      if (ranks > 1) {
        meet_cluster();
        const int share_tokens = (kTokensTile + ranks - 1) / ranks;
        const int stop_token = min(kTokensTile, (rank + 1) * share_tokens);
        for (int i = static_cast<int>(threadIdx.x);; i += Layout::kWarps * 32) {
          const int token_in_tile = rank * share_tokens + i / (kRows / 2), local = i % (kRows / 2) * 2;
          if (token_in_tile >= stop_token) break;
          const uint32_t mine = shared_address(at(local, token_in_tile));
          float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
          for (int other = 0; other < kMaxRanks; ++other) {
            if (other < ranks) {
              uint32_t remote;
              float2 value;
              asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(mine), "r"(other));
              asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(remote));
              sum.x += value.x;
              sum.y += value.y;
            }
          }
          store(local, token_in_tile, sum.x, sum.y);
        }
        // No block may leave while another still reads its memory.
        meet_cluster();
      }
    }
    if constexpr (Layout::kTeams == 1) {
      if (ranks == 1) each_pair(store);
    }
  }
#endif
}

// u, and scale * u in rows of a multiple of 8, which the product reads: 16 ranks and 8 kGroups tokens a block.
constexpr int kProjectThreads = 512;
constexpr int kMostGroups = 4;
constexpr int kManyRows = 2048;  // from here on the device is full of blocks that read A for more tokens at once

template <typename T, int kGroups>
__global__ void __launch_bounds__(kProjectThreads) project_kernel(const FewRowsForward p, T* scaled_u, int width) {
  let_next_start();
  project<T, kProjectThreads, kGroups>(p, [&](int64_t token, int r, float sum) {
    if (r < width) scaled_u[token * width + r] = Numeric<T>::narrow(p.scale * sum);
    if (r < p.r) static_cast<T*>(p.u)[token * p.r + r] = Numeric<T>::narrow(sum);
  });
}

template <typename T, int kGroups>
cudaError_t launch_project(const FewRowsForward& p, T* scaled_u, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 65535;  // of the second axis of a grid
  const int width = static_cast<int>(cut(p.r, 8)) * 8;
  const int64_t blocks = cut(p.m, kTokens * kGroups);
  for (int64_t first = 0; first < blocks; first += kMostBlocks) {
    FewRowsForward part = p;
    const int64_t row = first * kTokens * kGroups;
    part.m = static_cast<int32_t>(p.m - row);
    part.x = static_cast<const T*>(p.dropped != nullptr ? p.dropped : p.x) + row * p.k;
    part.u = static_cast<T*>(p.u) + row * p.r;
    const dim3 grid(
        static_cast<unsigned>(cut(width, kFragment)), static_cast<unsigned>(std::min(blocks - first, kMostBlocks)));
    project_kernel<T, kGroups><<<grid, kProjectThreads, 0, stream>>>(part, scaled_u + row * width, width);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T, bool kBackward>
struct Launcher {
  struct Plan {
    int ranks;
    double cycles;
  };

  template <int kTokensTile>
  static auto kernel(const TileParams& p) {
    return p.nested ? tile_kernel<T, kTokensTile, kBackward, true> : tile_kernel<T, kTokensTile, kBackward, false>;
  }

  static int64_t tiles(const TileParams& p, int tokens) { return cut(kBackward ? p.k : p.n, kRows) * cut(p.m, tokens); }

  // The split of the reduced side whose waves take the fewest cycles of a multiprocessor, by what was measured on an
  // H200: a step takes 1500 cycles, and 14 a token beyond 64; what comes before and after, as long as three steps.
  template <int kTokensTile>
  static cudaError_t plan(const TileParams& p, const DeviceLimits& limits, Plan& best) {
    using Layout = TileShape<kTokensTile>;
    static Slots slots_of_kernel[2];
    const int* slots = nullptr;
    const cudaError_t status =
        slots_of_kernel[p.nested].find(kernel<kTokensTile>(p), Layout::kThreads, Layout::kShared, limits, slots);
    if (status != cudaSuccess) return status;
    const int64_t steps = cut(kBackward ? p.n : p.k, kWeightStep);
    best = Plan{1, 1e30};
    for (int ranks = 1; ranks <= kMaxRanks && ranks <= steps; ++ranks) {
      if (slots[ranks] == 0) continue;
      const int64_t waves = cut(tiles(p, kTokensTile) * ranks, std::min(slots[ranks], limits.multiprocessors));
      const double cycles =
          static_cast<double>(waves * (cut(steps, ranks) + 3)) * (1500 + 14 * std::max(0, kTokensTile - 64));
      if (cycles < best.cycles) best = Plan{ranks, cycles};
    }
    return cudaSuccess;
  }

  template <int kTokensTile>
  static cudaError_t launch(
      const TileParams& p, const TileOperands& operands, int ranks, const DeviceLimits& limits, cudaStream_t stream) {
    CUtensorMap rows_map{}, w_map{}, narrow_map{};
    cudaError_t status =
        make_token_maps<T>(rows_map, narrow_map, p, operands, kBackward ? p.n : p.k, kTokensTile, kStep);
    if (status != cudaSuccess) return status;
    status = make_map(
        w_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.w_packed, p.n, p.k / 2, p.k / 2, kRows, kWeightStep / 2,
        CU_TENSOR_MAP_SWIZZLE_64B);
    if (status != cudaSuccess) return status;
    const int64_t all = tiles(p, kTokensTile);
    const int64_t blocks = ranks > 1 ? all * ranks : std::min<int64_t>(all, limits.multiprocessors);
    using Layout = TileShape<kTokensTile>;
    return launch_few_rows(
        kernel<kTokensTile>(p), dim3(static_cast<unsigned>(blocks)), Layout::kThreads, Layout::kShared, ranks, p.r > 0,
        stream, rows_map, w_map, narrow_map, p, ranks, log2_of(p.blocksize));
  }

  static cudaError_t run(
      const TileParams& p, const TileOperands& operands, const DeviceLimits& limits, cudaStream_t stream) {
    Plan narrow{}, wide{};
    if (p.m <= 32) {
      if (const cudaError_t status = plan<32>(p, limits, narrow); status != cudaSuccess) return status;
      return launch<32>(p, operands, narrow.ranks, limits, stream);
    }
    if (const cudaError_t status = plan<64>(p, limits, narrow); status != cudaSuccess) return status;
    if (const cudaError_t status = plan<128>(p, limits, wide); status != cudaSuccess) return status;
    // Tiles of more tokens, decoded by warps that do nothing else, gain where they fill the device.
    const int64_t waves = cut(tiles(p, SharedTiles::kTokens), limits.multiprocessors);
    const double shared_cycles = static_cast<double>(waves) * SharedTiles::wave_cycles(kBackward ? p.n : p.k);
    if (p.m > 128 && shared_cycles < std::min(narrow.cycles, wide.cycles)) {
      return SharedTiles::launch(Numeric<T>::kType, kBackward, p, operands, limits, stream);
    }
    if (p.m <= 64 || narrow.cycles <= wide.cycles) return launch<64>(p, operands, narrow.ranks, limits, stream);
    return launch<128>(p, operands, wide.ranks, limits, stream);
  }
};

cudaError_t hopper_limits(DeviceLimits& limits) {
  const cudaError_t status = current_limits(limits);
  return status == cudaSuccess && !limits.hopper ? cudaErrorNoKernelImageForDevice : status;
}

template <typename T>
cudaError_t forward(const FewRowsForward& p, void* scaled_u, cudaStream_t stream) {
  DeviceLimits limits{};
  if (const cudaError_t status = hopper_limits(limits); status != cudaSuccess) return status;
  if (p.r > 0) {
    T* target = static_cast<T*>(scaled_u);
    const cudaError_t status =
        p.m < kManyRows ? launch_project<T, 1>(p, target, stream) : launch_project<T, kMostGroups>(p, target, stream);
    if (status != cudaSuccess) return status;
  }
  const TileParams tile{p, p.lora_b, p.bias, p.y, p.m, p.r, p.adapter_dtype, p.bias_dtype, p.out_dtype};
  return Launcher<T, false>::run(tile, TileOperands{p.x, scaled_u}, limits, stream);
}

template <typename T>
cudaError_t backward(const FewRowsBackward& p, bool sides, cudaStream_t stream) {
  DeviceLimits limits{};
  if (const cudaError_t status = hopper_limits(limits); status != cudaSuccess) return status;
  if (sides && p.r > 0) {
    if (const cudaError_t status = launch_side_gradients(p, limits, stream); status != cudaSuccess) return status;
  }
  if (p.dx == nullptr) return cudaSuccess;
  const TileParams tile{p, p.lora_a, nullptr, p.dx, p.m, p.r, p.adapter_dtype, p.dtype, p.dtype};
  return Launcher<T, true>::run(tile, TileOperands{p.dy, p.du}, limits, stream);
}

}  // namespace

int tile_forward_cuda(const FewRowsForward& params, void* scaled_u, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return forward<__nv_bfloat16>(params, scaled_u, cuda_stream);
  if (params.dtype == DType::kFloat16) return forward<__half>(params, scaled_u, cuda_stream);
  return cudaErrorInvalidValue;
}

int tile_backward_cuda(const FewRowsBackward& params, bool sides, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::kBFloat16) return backward<__nv_bfloat16>(params, sides, cuda_stream);
  if (params.dtype == DType::kFloat16) return backward<__half>(params, sides, cuda_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
