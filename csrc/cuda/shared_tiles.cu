// Products with W decoded inside of them, for compute capability 9.0 and many tokens: y = x W^T + u B^T + bias, where
// u comes scaled, and dx = dy W + du A.
//
// A product is computed transposed, its result (outputs or inputs, tokens). Two warpgroups multiply, 64 rows of the
// result each, both operands from shared memory; the others, the teams, decode W there, a step of 64 of the reduced
// side at a time, while earlier steps are multiplied. A thread of a team decodes 64 elements that share a statistic:
// it rounds their 16 possible values once, keeps them in registers and selects from those by byte permutations. The
// LoRA factors are the last step of a tile.

#include <algorithm>

#include "hopper.cuh"

namespace fastlora {
namespace {

constexpr int kRows = SharedTiles::kRows;  // of the transposed result, in a tile: two warpgroups of 64
constexpr int kTokensTile = SharedTiles::kTokens;
constexpr int kStep = 64;  // of the reduced side: a swizzled row
constexpr int kConsumers = 2;
constexpr int kWeightBytes = kRows * kStep * 2;  // decoded
constexpr int kPackedBytes = kRows * kStep / 2;
constexpr int kPackedSlots = 4;  // packed tiles under way, of all teams
constexpr int kStoreTokens = 32;
constexpr int kStoreBytes = kStoreTokens * kStep * 2;  // of a part of the result: 64 rows

constexpr int kTeams = 2;
constexpr int kTokenBytes = kTokensTile * kStep * 2;
constexpr int kStages = 4;
constexpr int kTeamStages = kStages / kTeams;  // each team has stages of its own: only it ever writes to them
static_assert(kTeamStages * kTeams == kStages && kPackedSlots % kTeams == 0);
constexpr int kProductThreads = (kConsumers + kTeams) * kWarpgroup;
// Shared memory, by distances from its first multiple of 1024.
constexpr int kWeightsAt = kStages * kTokenBytes;
constexpr int kPackedAt = kWeightsAt + kStages * kWeightBytes;
constexpr int kStoresAt = kPackedAt + kPackedSlots * kPackedBytes;
constexpr int kStatisticsAt = kStoresAt + kConsumers * 2 * kStoreBytes;
constexpr int kBarriersAt = kStatisticsAt + kStatisticsBytes;
constexpr int kShared = 1024 + kBarriersAt + 2 * (kStages + kPackedSlots) * static_cast<int>(sizeof(uint64_t));

template <typename T, bool kBackward, bool kNested>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(
    const __grid_constant__ CUtensorMap rows_map,
    const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ CUtensorMap narrow_map,
    const __grid_constant__ CUtensorMap out_map,
    const __grid_constant__ TileParams p,
    const __grid_constant__ Codes codes_of_type,
    int log2_blocksize) {
#if defined(FASTLORA_WGMMA)
  constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
  constexpr int kSlots = kPackedSlots / kTeams;                 // of a team
  constexpr int kGroup = 4;                                     // steps whose statistics lie together, forward
  constexpr int kConsumerRegisters = 168, kTeamRegisters = 88;  // of a thread: 65536 for all
  extern __shared__ unsigned char shared[];
  const uint32_t tokens_at = (shared_address(shared) + 1023) / 1024 * 1024;
  const uint32_t weights_at = tokens_at + kWeightsAt, packed_at = tokens_at + kPackedAt;
  const uint32_t barriers = tokens_at + kBarriersAt;
  float* statistics = reinterpret_cast<float*>(shared + (tokens_at - shared_address(shared)) + kStatisticsAt);
  const auto full = [&](int slot) { return barriers + slot * 8; };
  const auto empty = [&](int slot) { return barriers + (kStages + slot) * 8; };
  const auto full_packed = [&](int slot) { return barriers + (2 * kStages + slot) * 8; };
  const auto empty_packed = [&](int slot) { return barriers + (2 * kStages + kPackedSlots + slot) * 8; };

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);  // one value for the whole warp
  const int warpgroup = warp / 4, thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full(i), kWarpgroup / 32 + 1);
      init_barrier(empty(i), kConsumerWarps);
    }
    for (int i = 0; i < kPackedSlots; ++i) {
      init_barrier(full_packed(i), 1);
      init_barrier(empty_packed(i), kWarpgroup / 32);
    }
    publish_barriers();
  }
  if (kNested && threadIdx.x < 256) statistics[threadIdx.x] = __ldg(p.absmax_code + threadIdx.x);
  __syncthreads();

  const int64_t side = kBackward ? p.k : p.n, reduced = kBackward ? p.n : p.k;
  const int row_tiles = static_cast<int>((side + kRows - 1) / kRows);
  const int tiles = row_tiles * ((p.m + kTokensTile - 1) / kTokensTile);
  const int steps = static_cast<int>((reduced + kStep - 1) / kStep), all_steps = steps + (p.r + kStep - 1) / kStep;
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  const auto row_of = [&](int tile) { return tile % row_tiles * kRows; };
  const auto token_of = [&](int tile) { return tile / row_tiles * kTokensTile; };
  // The stage of a step, after `done` tiles, and the parity of its round.
  struct Stage {
    int slot;
    uint32_t parity;
  };
  const auto stage_of = [&](int done, int step) {
    const int team = step % kTeams, of_tile = (all_steps - team + kTeams - 1) / kTeams;
    const Ring<kTeamStages> ring{static_cast<uint32_t>(done * of_tile + step / kTeams)};
    return Stage{team * kTeamStages + ring.slot(), ring.parity()};
  };

  if (warpgroup >= kConsumers) {
    give_registers<kTeamRegisters>();
    const int team = warpgroup - kConsumers;
    const bool fetches = thread == 0;
    const bool wide = p.adapter_dtype == DType::kFloat32;
    const float offset = kNested ? __ldg(p.absmax_offset) : 0.0f;
    const int slot0 = team * kSlots;
    const int chunks = static_cast<int>(p.k / kStep);  // of 64 elements in a row of W
    // Whether the statistics of a group are one aligned word, or one vector.
    const bool aligned = kNested ? reinterpret_cast<uintptr_t>(p.absmax_q) % sizeof(uint32_t) == 0
                                 : reinterpret_cast<uintptr_t>(p.absmax) % sizeof(float4) == 0;
    const bool grouped = !kBackward && aligned && log2_blocksize == 6 && chunks % kGroup == 0;
    // Forward the first half of the threads has rows 0 to 63 of the tile of W and the second one the others; backward
    // the first half has columns 0 to 63 of all of its rows.
    const int half = thread / kStep, place = thread % kStep;

    // The packed tiles of this team, ahead of their decoding.
    int ahead_tile = first_tile, ahead_step = team, ahead_row = row_of(first_tile);
    const auto fetch_packed = [&](int slot) {
      if (ahead_step >= steps) {
        ahead_step = team;
        ahead_tile += tile_step;
        ahead_row = row_of(ahead_tile);
      }
      if (ahead_tile >= tiles || ahead_step >= steps) return;
      const int row0 = ahead_row, step = ahead_step;
      expect_bytes(full_packed(slot), kPackedBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = kBackward ? row0 + i * kStep : step * kStep,
                  row = kBackward ? step * kStep : row0 + i * kStep;
        copy_box(packed_at + slot * kPackedBytes + i * kPackedBytes / 2, w_map, column / 2, row, full_packed(slot));
      }
      ahead_step += kTeams;
    };
    if (fetches) {
      for (int i = 0; i < kSlots; ++i) fetch_packed(slot0 + i);
    }

    // Beyond the matrix any statistic will do: those sums are not used, or the rows are zero there.
    const auto block_of = [&](int tile, int step) {
      const int row = kBackward ? step * kStep + place : row_of(tile) + thread;
      const int chunk = kBackward ? row_of(tile) / kStep + half : step;
      const int64_t n = min(static_cast<int64_t>(row), p.n - 1);
      return (n * chunks + min(chunk, chunks - 1)) >> (log2_blocksize - 6);
    };
    const auto statistic = [&](int64_t block) {
      Statistic s{0.0f, 0};
      if constexpr (kNested) {
        s.code = __ldg(p.absmax_q + block);
        s.value = __ldg(p.absmax_scale + block / kNestedBlocksize);
      } else {
        s.value = __ldg(p.absmax + block);
      }
      return s;
    };
    const auto absmax_of = [&](const Statistic& s) {
      return kNested ? nested_absmax(statistics[s.code], s.value, offset) : s.value;
    };
    // Of the next group of steps, backward of the next step.
    float4 next_values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    uint32_t next_codes = 0;
    const auto load_next = [&](int tile, int step) {
      if (tile >= tiles) return;
      const int64_t block = block_of(tile, step);
      if (!grouped) {
        const Statistic s = statistic(block);
        next_values.x = s.value;
        next_codes = s.code;
      } else if constexpr (kNested) {
        next_codes = __ldg(reinterpret_cast<const uint32_t*>(p.absmax_q + block));
        next_values.x = __ldg(p.absmax_scale + block / kNestedBlocksize);
      } else {
        next_values = __ldg(reinterpret_cast<const float4*>(p.absmax + block));
      }
    };
    if (team < steps) load_next(first_tile, grouped ? 0 : team);

    Ring<kSlots> packed;
    float4 values = next_values;
    uint32_t codes = 0;
    bool waited = false;
    int done = 0;
    for (int tile = first_tile; tile < tiles; tile += tile_step, ++done) {
      const int row0 = row_of(tile), token0 = token_of(tile);
      for (int step = team; step < all_steps; step += kTeams) {
        const Stage stage = stage_of(done, step);
        const int slot = stage.slot;
        const uint32_t row_at = weights_at + slot * kWeightBytes + thread * kStep * 2;
        const auto put = [&](int i, uint4 v) { store_shared(row_at + ((i ^ (thread & 7)) * 16), v); };
        wait_barrier(empty(slot), stage.parity ^ 1);
        if (fetches) {
          if (step >= steps && !waited) wait_for_previous();
          waited |= step >= steps;
          expect_bytes(full(slot), kTokenBytes);
          const CUtensorMap& map = step < steps ? rows_map : narrow_map;
          const int column = (step < steps ? step : step - steps) * kStep;
          copy_box(tokens_at + slot * kTokenBytes, map, column, token0, full(slot));
        }
        if (step < steps) {
          if (!grouped || (step & (kGroup - 1)) == team) {
            values = next_values;
            codes = next_codes;
            const int next = grouped ? step - team + kGroup : step + kTeams;
            if (next < steps) {
              load_next(tile, next);
            } else {
              load_next(tile + tile_step, grouped ? 0 : team);
            }
          }
          float absmax = values.x;
          if (!kBackward && grouped) {
            const int j = step & (kGroup - 1);
            if constexpr (kNested) {
              absmax = absmax_of(Statistic{values.x, codes >> (8 * j) & 255});
            } else {
              absmax = j == 0 ? values.x : j == 1 ? values.y : j == 2 ? values.z : values.w;
            }
          } else {
            absmax = absmax_of(Statistic{values.x, codes});
          }
          const BlockTable table = BlockTable::of<T>(codes_of_type, absmax);
          const int from = slot0 + packed.slot();
          wait_barrier(full_packed(from), packed.parity());
          // Of 32 bytes a thread, the two halves are swapped in every other four.
          const uint32_t bytes_at = packed_at + from * kPackedBytes + thread * (kStep / 2);
          const uint32_t swap = (thread & 4) * 4;
          const uint4 a = load_shared(bytes_at + swap), b = load_shared(bytes_at + (swap ^ 16));
          __syncwarp();
          if (lane == 0) arrive(empty_packed(from));
          put(0, table.look_up(a.x));
          put(1, table.look_up(a.y));
          put(2, table.look_up(a.z));
          put(3, table.look_up(a.w));
          put(4, table.look_up(b.x));
          put(5, table.look_up(b.y));
          put(6, table.look_up(b.z));
          put(7, table.look_up(b.w));
        } else {
          const int rank0 = (step - steps) * kStep, ranks = (min(kStep, p.r - rank0) + 15) / 16 * 16;
          if constexpr (kBackward) {
            const int64_t column = row0 + half * kStep;
            const int r = rank0 + place;
            const bool inside = r < p.r && column < p.k;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              if (place >= ranks) break;
              put(i, inside ? eight<T>(p.adapter, r * p.k + column + 8 * i, wide) : make_uint4(0, 0, 0, 0));
            }
          } else {
            const int64_t n = row0 + thread;
            const int stop = n < p.n ? p.r : 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int r = rank0 + 8 * i;
              if (8 * i >= ranks) break;
              if (p.r % 8 == 0) {
                put(i, r < stop ? eight<T>(p.adapter, n * p.r + r, wide) : make_uint4(0, 0, 0, 0));
              } else {
                const auto two = [&](int j) { return pair<T>(p.adapter, n, p.r, r + 2 * j, stop, wide); };
                put(i, make_uint4(two(0), two(1), two(2), two(3)));
              }
            }
          }
        }
        publish_writes();
        __syncwarp();
        if (lane == 0) arrive(full(slot));
        if (step < steps) {
          if (fetches) {
            const int from = slot0 + packed.slot();
            wait_barrier(empty_packed(from), packed.parity());
            fetch_packed(from);
          }
          __syncwarp();
          ++packed.used;
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int g = lane / 4, t = lane % 4;
    const bool bias_wide = p.bias_dtype == DType::kFloat32, out_wide = p.out_dtype == DType::kFloat32;
    // 16 elements further along the reduced side.
    constexpr uint64_t kFurther = (kBackward ? 16 * kStep * 2 : 16 * 2) >> 4;
    const uint32_t stores_at = tokens_at + kStoresAt + warpgroup * 2 * kStoreBytes;
    const auto meet = [&] { asm volatile("bar.sync %0, %1;" ::"r"(warpgroup + 1), "n"(kWarpgroup) : "memory"); };

    // Two instructions of 128 tokens: the registers that a thread has at the launch would not do for one of 256.
    constexpr int kParts = 2, kPart = kTokensTile / kParts;
    float acc[kParts][kPart / 2];
    const auto multiply = [&](uint64_t a, uint64_t b) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        multiply_shared<kBackward>(T{}, Size<kPart>{}, acc[i], a, b + i * (kPart * kStep * 2 >> 4));
      }
    };
    const auto sum = [&](int i) -> float& { return acc[i / (kPart / 2)][i % (kPart / 2)]; };
    int done = 0, stored = 0;  // tiles; parts of them, which take the two buffers in turn
    for (int tile = first_tile; tile < tiles; tile += tile_step, ++done) {
#pragma unroll
      for (int i = 0; i < kTokensTile / 2; ++i) sum(i) = 0.0f;
      int pending = -1;  // slot that may still be read
      const auto a_of = [&](int slot) {
        return matrix_descriptor(weights_at + slot * kWeightBytes + warpgroup * kWeightBytes / 2);
      };
      const auto b_of = [&](int slot) { return matrix_descriptor(tokens_at + slot * kTokenBytes); };
      const auto release = [&](int slot) {
        if (pending >= 0 && lane == 0) arrive(empty(pending));
        pending = slot;
      };
      for (int step = 0; step < steps; ++step) {
        const Stage stage = stage_of(done, step);
        const int slot = stage.slot;
        wait_barrier(full(slot), stage.parity);
        const uint64_t a = a_of(slot), b = b_of(slot);
        fence_registers();
#pragma unroll
        for (int i = 0; i < kStep / 16; ++i) multiply(a + i * kFurther, b + i * 2);
        commit_products();
        wait_products<1>();
        release(slot);
      }
      wait_products<0>();
      for (int step = steps; step < all_steps; ++step) {
        const Stage stage = stage_of(done, step);
        const int slot = stage.slot, ranks = min(kStep, p.r - (step - steps) * kStep);
        wait_barrier(full(slot), stage.parity);
        for (int i = 0; i < (ranks + 15) / 16; ++i) {
          fence_registers();
          multiply(a_of(slot) + i * kFurther, b_of(slot) + i * 2);
          commit_products();
          wait_products<0>();
        }
        release(slot);
      }
      if (lane == 0) arrive(empty(pending));

      const int64_t column0 = row_of(tile) + warpgroup * kStep;
      const int token0 = token_of(tile), row_a = warp % 4 * 16 + g;
      float bias_a = 0.0f, bias_b = 0.0f;
      if (p.bias != nullptr) {
        if (column0 + row_a < side) bias_a = element<T>(p.bias, column0 + row_a, bias_wide);
        if (column0 + row_a + 8 < side) bias_b = element<T>(p.bias, column0 + row_a + 8, bias_wide);
      }
      if (out_wide) {
        float* out = static_cast<float*>(p.out);
#pragma unroll
        for (int i = 0; i < kTokensTile / 2; ++i) {
          const int m = token0 + i / 4 * 8 + 2 * t + i % 2;
          const int64_t column = column0 + row_a + i / 2 % 2 * 8;
          if (m < p.m && column < side) out[m * side + column] = sum(i) + (i / 2 % 2 == 0 ? bias_a : bias_b);
        }
        continue;
      }
#pragma unroll
      for (int part = 0; part < kTokensTile / kStoreTokens; ++part) {
        const int m = token0 + part * kStoreTokens;
        // What is not stored must not be written either: its buffer may still be read for the store before.
        if (m >= p.m || column0 >= side) break;
        const uint32_t buffer = stores_at + stored++ % 2 * kStoreBytes;
        if (thread == 0) wait_stores<1>();  // the one before the last used this buffer
        meet();
#pragma unroll
        for (int i = 0; i < kStoreTokens / 16; ++i) {
          const auto pack = [&](int j, float bias) {
            const int at = (part * kStoreTokens / 16 + i) * 8 + j;
            return Numeric<T>::pack(sum(at) + bias, sum(at + 1) + bias);
          };
          const int token = 16 * i + lane / 16 * 8 + lane % 8, unit = warp % 4 * 2 + lane / 8 % 2;
          store_transposed(
              buffer + token * kStep * 2 + ((unit ^ (token & 7)) * 16), pack(0, bias_a), pack(2, bias_b),
              pack(4, bias_a), pack(6, bias_b));
        }
        publish_writes();
        meet();
        if (thread == 0) store_box(out_map, static_cast<int>(column0), m, buffer);
      }
    }
    if (thread == 0) wait_stores<0>();
  }
#endif
}

template <typename T, bool kBackward>
cudaError_t launch_product(
    const TileParams& p, const TileOperands& operands, const DeviceLimits& limits, cudaStream_t stream) {
  const auto kernel = p.nested ? product_kernel<T, kBackward, true> : product_kernel<T, kBackward, false>;
  static Slots slots_of_kernel[2];
  const int* slots = nullptr;
  cudaError_t status = slots_of_kernel[p.nested].find(kernel, kProductThreads, kShared, limits, slots);
  if (status != cudaSuccess) return status;
  const int64_t side = kBackward ? p.k : p.n;
  CUtensorMap rows_map{}, w_map{}, narrow_map{}, out_map{};
  status = make_token_maps<T>(rows_map, narrow_map, p, operands, kBackward ? p.n : p.k, kTokensTile, kStep);
  if (status != cudaSuccess) return status;
  status = make_map(
      w_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.w_packed, p.n, p.k / 2, p.k / 2, kStep, kStep / 2,
      CU_TENSOR_MAP_SWIZZLE_32B);
  if (status != cudaSuccess) return status;
  if (p.out_dtype != DType::kFloat32) {
    status = make_map(
        out_map, tensor_map_type<T>(), sizeof(T), p.out, p.m, side, side, kStoreTokens, kStep,
        CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
  }
  Codes codes{};
  for (int i = 0; i < kCodes; ++i) codes.value[i] = code_value(p.quant_type, i);
  const int64_t tiles = cut(side, kRows) * cut(p.m, kTokensTile);
  const int64_t blocks = std::min<int64_t>(tiles, limits.multiprocessors);
  return launch_few_rows(
      kernel, dim3(static_cast<unsigned>(blocks)), kProductThreads, kShared, 1, p.r > 0, stream, rows_map, w_map,
      narrow_map, out_map, p, codes, log2_of(p.blocksize));
}

}  // namespace

cudaError_t SharedTiles::launch(
    DType dtype,
    bool backward,
    const TileParams& p,
    const TileOperands& operands,
    const DeviceLimits& limits,
    cudaStream_t stream) {
  if (dtype == DType::kBFloat16) {
    return backward ? launch_product<__nv_bfloat16, true>(p, operands, limits, stream)
                    : launch_product<__nv_bfloat16, false>(p, operands, limits, stream);
  }
  return backward ? launch_product<__half, true>(p, operands, limits, stream)
                  : launch_product<__half, false>(p, operands, limits, stream);
}

}  // namespace fastlora
