// y = x W^T + scale * (u B^T) + bias for the fewest rows, where the bytes of W are the whole cost.
//
// One block of a multiprocessor owns a run of outputs and asks for all of their bytes at once: bulk copies to shared
// memory, a piece of a few rows of W each, that take no registers and no addresses. The warps wait for one piece after
// the other. A warp owns slices of 512 columns for all of the block's rows, so that its part of x stays in registers,
// a lane's 16 elements in 8 of them.
//
// A slice is eight segments of 64 columns, none of which crosses a block of statistics. They are the rows of
// mma.m16n8k16, two rows of W at once, and the segments of x are its columns: of the products of all segments with all
// others only the diagonal counts, but no operand is loaded twice, none is zero, and a sum has one statistic, which
// multiplies it behind the tensor core. What is decoded is then the code alone, a table of pairs indexed by byte.
//
// Both operands are float16, to which bfloat16 x is exact within a factor of 2^-28 of a segment's largest element after
// a multiplication by a power of two. The codes are rounded after a multiplication by the factor for which they err
// least; without it errors of their mean would add up over K.

#include "hopper.cuh"

namespace fastlora {
namespace {

constexpr int kWarps = 16;
constexpr int kConsumers = kWarps * 32;
constexpr int kStreamThreads = kConsumers + 32;  // and a warp that asks for copies
constexpr int kSegment = 64;
constexpr int kSegments = 8;
constexpr int kSlice = kSegment * kSegments;
constexpr int kPairs = 8;       // registers of x in a slice
// Bytes from one entry of the table to the next: a byte of W is then a byte of the entry's address.
constexpr int kEntry = 256;
constexpr int kTable = 256 * kEntry;
static_assert(kTableAt % kTable == 0);
constexpr int kReserved = 1024;  // of shared memory, at its start
constexpr int kMaxPieces = 32;  // in shared memory at once
constexpr int kRowLanes = 16;   // lanes that add the sums of one output
constexpr int kStatisticsAt = kReserved + (kMaxPieces * 2 + 2) * static_cast<int>(sizeof(uint64_t));

struct StreamPlan {
  int rows, more;      // of a block; the first `more` blocks have one besides
  int row_bytes, segments;  // of a row of W
  uint64_t group_of, row_group_of;  // of each warp, four bits each
  int slices;       // of K
  int groups;       // of warps, each with its slices: warp % groups, and then each `groups` further
  int row_groups;   // warps with the same slices, that share the rows
  int piece_rows;
  int slots;        // pieces that shared memory holds
  int capacity;     // rows of a block, and one that is never stored
  int pitch;        // float32 sums of a row
  int log2_units;   // segments to a block of statistics
  int ranks;        // blocks of a cluster, which share the making of u; 1: u comes from a launch before
  int chain;
  int absmax, sums, parts_u, all_u, ring;  // addresses in shared memory
};

// 8.0 * 2^-k and so on stay exact; see above.
__device__ __forceinline__ float code_factor(QuantType type) { return type == QuantType::kFP4 ? 1.5f : 1.3662109375f; }

__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, int bytes, uint32_t barrier) {
#if defined(FASTLORA_HOPPER)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Orders nothing but the initialisation of barriers before it.
__device__ __forceinline__ void arrive_cluster() {
#if defined(FASTLORA_HOPPER)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_cluster() {
#if defined(FASTLORA_HOPPER)
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// 16 neighbours of a row of x as float16 pairs. Returns what undoes their scaling, the same for the lanes of a segment.
template <typename T>
__device__ __forceinline__ float load_pairs(uint32_t (&pairs)[kPairs], const T* x, bool inside) {
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  if (inside) {
    // Not before a wait for the kernel that makes x, as a load of constants might be.
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(low.x), "=r"(low.y), "=r"(low.z), "=r"(low.w)
                 : "l"(x));
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(high.x), "=r"(high.y), "=r"(high.z), "=r"(high.w)
                 : "l"(x + kPairs));
  }
  pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
  pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
  if constexpr (Numeric<T>::kType == DType::kFloat16) {
    return 1.0f;
  } else {
    uint32_t largest = pairs[0] & 0x7fff7fffu;
#pragma unroll
    for (int i = 1; i < kPairs; ++i) largest = __vmaxu2(largest, pairs[i] & 0x7fff7fffu);
    largest = max(largest & 0xffffu, largest >> 16);
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // The largest becomes less than 2^15. Exponents as stored: 127 is that of 1.
    const int exponent = static_cast<int>(largest >> 7);
    const int scaling = exponent == 255 ? 127 : min(268 - exponent, 250);
    const float factor = __int_as_float(scaling << 23);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = Numeric<__half>::pack(
          __uint_as_float(pairs[i] << 16) * factor, __uint_as_float(pairs[i] & 0xffff0000u) * factor);
    }
    return __int_as_float((254 - scaling) << 23);
  }
}

// The pair of codes of byte kByte of `word`. `place`: of the lane in the first entry.
template <int kByte>
__device__ __forceinline__ uint32_t look_up(uint32_t word, uint32_t place) {
  uint32_t pair;
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(word, place, 0x7604 | kByte << 4)));
  return pair;
}

// The pairs of a lane's bytes of one row: by the table, but the first kSelected words by permutation of registers, which
// takes more instructions and no shared memory.
template <int kSelected>
__device__ __forceinline__ void decode_bytes(
    uint32_t (&codes)[8], const BlockTable& registers, uint2 bytes, uint32_t place) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = i == 0 ? bytes.x : bytes.y;
    if (i < kSelected) {
      const uint4 v = registers.look_up(word);
      codes[4 * i] = v.x, codes[4 * i + 1] = v.y, codes[4 * i + 2] = v.z, codes[4 * i + 3] = v.w;
    } else {
      codes[4 * i] = look_up<0>(word, place);
      codes[4 * i + 1] = look_up<1>(word, place);
      codes[4 * i + 2] = look_up<2>(word, place);
      codes[4 * i + 3] = look_up<3>(word, place);
    }
  }
}

// The operands of a step of u: 32 columns of 16 rows of A and of all rows of x.
struct RankStep {
  uint4 upper, lower, x;
};

template <typename T>
__device__ __forceinline__ RankStep load_step(const FewRowsForward& p, int r0, int64_t first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4;
  const int64_t k = first_column + lane % 4 * 8;
  const bool wide = p.adapter_dtype == DType::kFloat32, inside = k < p.k;
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  return RankStep{
      inside && r0 + g < p.r ? eight<T>(p.lora_a, (r0 + g) * p.k + k, wide) : nothing,
      inside && r0 + 8 + g < p.r ? eight<T>(p.lora_a, (r0 + 8 + g) * p.k + k, wide) : nothing,
      inside && g < p.m ? eight<T>(p.x, g * p.k + k, false) : nothing};
}

// Sums of the columns from `first` on, each `stride` further, for 16 ranks: parts[rank][token]. `step`: the first one.
template <typename T, int kTokens>
__device__ __forceinline__ void part_of_u(
    const FewRowsForward& p, int r0, int64_t first, int stride, RankStep step, float* parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  float acc[4] = {};
  for (int64_t k = first; k < p.k; k += stride) {
    if (k != first) step = load_step<T>(p, r0, k);
    Numeric<T>::mma(acc, step.upper.x, step.lower.x, step.upper.y, step.lower.y, step.x.x, step.x.y);
    Numeric<T>::mma(acc, step.upper.z, step.lower.z, step.upper.w, step.lower.w, step.x.z, step.x.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 2 * t + i % 2;
    if (token < kTokens) parts[(g + i / 2 * 8) * kTokens + token] = acc[i];
  }
}

// kTokens: rows of x, or more. kSlices: slices of a warp. kUnits: pairs of rows that a warp multiplies at once.
template <typename T, int kTokens, int kSlices, int kUnits, int kSelected>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const FewRowsForward p, const StreamPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // one value for the whole warp
  // The high byte of an address names the block of the cluster.
  const uint32_t window = shared_address(shared) & 0xff000000u;
  const auto pointer = [&](int address) { return shared + (window + address - shared_address(shared)); };
  const int block = static_cast<int>(blockIdx.x);
  const int first = block * plan.rows + min(block, plan.more), rows = plan.rows + (block < plan.more ? 1 : 0);
  const int row_bytes = plan.row_bytes, segments = plan.segments;
  const int piece_bytes = plan.piece_rows * row_bytes;
  const bool again = rows > plan.slots * plan.piece_rows;  // some of the slots are filled more than once
  const uint32_t full = window + kReserved, empty = full + kMaxPieces * 8, u_ready = full + kMaxPieces * 16;
  float* statistics = reinterpret_cast<float*>(pointer(kStatisticsAt));
  float* absmax = reinterpret_cast<float*>(pointer(plan.absmax));
  float* sums = reinterpret_cast<float*>(pointer(plan.sums));
  const bool clustered = plan.ranks > 1;
  uint32_t rank = 0;
#if defined(FASTLORA_HOPPER)
  if (clustered) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  if (plan.chain > 1) let_next_start();

  if (warp == kWarps) {
    const auto ask = [&](int row, int slot) {
      const int bytes = min(plan.piece_rows, rows - row) * row_bytes;
      expect_bytes(full + slot * 8, bytes);
      copy_bulk(
          window + plan.ring + slot * piece_bytes, p.w_packed + static_cast<int64_t>(first + row) * row_bytes, bytes,
          full + slot * 8);
    };
    int row = 0;
    if (lane == 0) {
      for (int i = 0; i < plan.slots; ++i) init_barrier(full + i * 8, 1);
      if (again) {
        for (int i = 0; i < plan.slots; ++i) init_barrier(empty + i * 8, plan.groups * plan.row_groups);
      }
      if (clustered) {
        init_barrier(u_ready, 1);
        expect_bytes(u_ready, plan.ranks * ((p.r + kFragment - 1) / kFragment) * kFragment * kTokens * 4);
      }
#if defined(FASTLORA_HOPPER)
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
      for (int i = 0; i < plan.slots && row < rows; ++i, row += plan.piece_rows) ask(row, i);
    }
    __syncwarp();
    if (clustered) arrive_cluster();
    __syncthreads();
    __syncthreads();
    if (clustered) wait_cluster();
    if (again && lane == 0) {
      uint32_t parity = 0;
      for (int slot = 0; row < rows; row += plan.piece_rows) {
        wait_barrier(empty + slot * 8, parity);
        ask(row, slot);
        if (++slot == plan.slots) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
    __syncthreads();
    return;
  }
  if (clustered) arrive_cluster();

  const int g = lane / 4, t = lane % 4;
  const int group = static_cast<int>(plan.group_of >> 4 * warp & 15);
  const int row_group = static_cast<int>(plan.row_group_of >> 4 * warp & 15);
  const bool wide = p.adapter_dtype == DType::kFloat32;

  // Statistics, one a segment, in two steps as the first waits for memory: codes, then values.
  constexpr int kBatch = 4;
  const int count = rows * segments;
  Statistic found[kBatch];
  // Flat ones have no codes; what is read there is not used, and there is no branch.
  const uint8_t* first_codes = p.nested ? p.absmax_q : reinterpret_cast<const uint8_t*>(p.absmax);
  const float* first_values = p.nested ? p.absmax_scale : p.absmax;
  const int log2_values = p.nested ? 8 : 0;
  static_assert(kNestedBlocksize == 1 << 8);
  const auto load_statistics = [&](int from) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int segment = min(from + i * kConsumers + thread, count - 1);
      const uint32_t index = static_cast<uint32_t>(first * segments + segment) >> plan.log2_units;
      found[i].code = __ldg(first_codes + index);
      found[i].value = __ldg(first_values + (index >> log2_values));
    }
  };
  load_statistics(0);
  const float offset = p.nested ? __ldg(p.absmax_offset) : 0.0f;
  const float statistic = p.nested && thread < 256 ? __ldg(p.absmax_code + thread) : 0.0f;

  if (plan.chain > 0) wait_for_previous();
  uint32_t x[kTokens][kSlices][kPairs];
  float undo[kTokens][kSlices];
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int64_t column = static_cast<int64_t>(group + i * plan.groups) * kSlice + lane * 2 * kPairs;
      undo[token][i] = load_pairs<T>(
          x[token][i], static_cast<const T*>(p.x) + token * p.k + column, token < p.m && column < p.k);
    }
  }
  const int64_t rank_column = (static_cast<int>(rank) * kWarps + warp) * 32;
  RankStep rank_step{};
  if (clustered) rank_step = load_step<T>(p, 0, rank_column);
  // One element of B for the first outputs that this thread adds.
  const int adder = thread / kRowLanes, part = thread % kRowLanes;
  float first_b = 0.0f;
  if (adder < rows && part < p.r) first_b = element<T>(p.lora_b, static_cast<int64_t>(first + adder) * p.r + part, wide);

  const float* codes = kCodeValues + (p.quant_type == QuantType::kFP4 ? kCodes : 0);
  const float factor = code_factor(p.quant_type);
  {
    constexpr int kWriters = 8;  // threads that write an entry of 32 copies
    constexpr int kStep = kConsumers / kWriters;
    const int entry = thread / kWriters;
    const float low = codes[entry % kCodes] * factor;
#pragma unroll
    for (int i = 0; i < 256 / kStep; ++i) {
      const uint32_t pair = Numeric<__half>::pack(codes[(entry + i * kStep) / kCodes] * factor, low);
      *reinterpret_cast<uint4*>(pointer(kTableAt) + (entry + i * kStep) * kEntry + thread % kWriters * 16) =
          make_uint4(pair, pair, pair, pair);
    }
  }
  if (p.nested && thread < 256) statistics[thread] = statistic;
  float* parts_u = reinterpret_cast<float*>(pointer(plan.parts_u));
  float* all_u = reinterpret_cast<float*>(pointer(plan.all_u));
  if (clustered) {
    for (int r0 = 0; r0 < p.r; r0 += kFragment) {
      const RankStep step = r0 == 0 ? rank_step : load_step<T>(p, r0, rank_column);
      part_of_u<T, kTokens>(
          p, r0, rank_column, plan.ranks * kConsumers, step,
          parts_u + (r0 * kWarps + warp * kFragment) * kTokens);
    }
  }
  __syncthreads();

  const float inverse = 1.0f / factor;
  for (int from = 0; from < count; from += kBatch * kConsumers) {
    if (from > 0) load_statistics(from);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int segment = from + i * kConsumers + thread;
      if (segment < count) absmax[segment] = absmax_of(p, found[i], statistics, offset) * inverse;
    }
  }
  __syncthreads();
  if (clustered) {
    // Each block tells all others its part of u.
    wait_cluster();
    const int values = (p.r + kFragment - 1) / kFragment * kFragment * kTokens;
    for (int i = thread; i < values * plan.ranks; i += kConsumers) {
      const int target = i / values, value = i % values;
      const int r = value / kTokens, token = value % kTokens;
      const float* own = parts_u + r / kFragment * kFragment * kWarps * kTokens + r % kFragment * kTokens + token;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += own[j * kFragment * kTokens];
#if defined(FASTLORA_HOPPER)
      uint32_t remote, barrier;
      asm("mapa.shared::cluster.u32 %0, %1, %2;"
          : "=r"(remote)
          : "r"(shared_address(all_u + static_cast<int>(rank) * values + value)), "r"(target));
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(u_ready), "r"(target));
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(sum),
                   "r"(barrier)
                   : "memory");
#endif
    }
  }

  if (row_group < plan.row_groups) {
    BlockTable registers{};
    if constexpr (kSelected > 0) {
      Codes all;
#pragma unroll
      for (int i = 0; i < kCodes; ++i) all.value[i] = codes[i];
      registers = BlockTable::of<__half>(all, factor);
    }
    const uint32_t place = window + kTableAt + static_cast<uint32_t>(lane) * 4;
    const bool odd = g % 2 == 1, diagonal = t == g / 2;
    // Lanes behind the end of a row read its last bytes, and multiply them by zero.
    int at[kSlices], segment[kSlices];
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = group + i * plan.groups;
      at[i] = min(slice * (kSlice / 2) + lane * kPairs, row_bytes - kPairs);
      segment[i] = min(slice * kSegments + g, segments - 1);
    }
    const int lead = row_group * kUnits * 2;  // rows of a piece before this warp's
    int slot = 0;
    uint32_t parity = 0;
    const unsigned char* bytes = pointer(plan.ring) + lead * row_bytes;
    const float* absmax_row = absmax + lead * segments;
    float* target = sums + lead * plan.pitch + group * kSegments + g;
    for (int row0 = lead; row0 - lead < rows; row0 += plan.piece_rows) {
      wait_barrier(full + slot * 8, parity);
      uint2 words[kUnits][kSlices][2];
      float statistic_of[kUnits][kSlices][2];
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if (row0 + unit * 2 < rows) {
#pragma unroll
          for (int i = 0; i < kSlices; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              words[unit][i][half] =
                  *reinterpret_cast<const uint2*>(bytes + (unit * 2 + half) * row_bytes + at[i]);
              statistic_of[unit][i][half] = absmax_row[(unit * 2 + half) * segments + segment[i]];
            }
          }
        }
      }
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if (row0 + unit * 2 >= rows) break;
        float sum[kTokens][2] = {};
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          if (kSlices > 1 && group + i * plan.groups >= plan.slices) break;
#if defined(DECODE6_PROBE)
          if constexpr (kSelected < 0) {
            sum[0][0] += __uint_as_float(words[unit][i][0].x ^ words[unit][i][0].y) * statistic_of[unit][i][0];
            sum[0][1] += __uint_as_float(words[unit][i][1].x ^ words[unit][i][1].y) * statistic_of[unit][i][1];
            continue;
          }
#endif
          uint32_t upper[8], lower[8];
          decode_bytes<kSelected>(upper, registers, words[unit][i][0], place);
          decode_bytes<0>(lower, registers, words[unit][i][1], place);
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            float acc[4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              Numeric<__half>::mma(
                  acc, upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1], x[token][i][2 * j],
                  x[token][i][2 * j + 1]);
            }
            const float a = odd ? acc[1] : acc[0], b = odd ? acc[3] : acc[2];
            sum[token][0] += a * (statistic_of[unit][i][0] * undo[token][i]);
            sum[token][1] += b * (statistic_of[unit][i][1] * undo[token][i]);
          }
        }
        if (diagonal) {
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            target[(token * plan.capacity + unit * 2) * plan.pitch] = sum[token][0];
            target[(token * plan.capacity + unit * 2 + 1) * plan.pitch] = sum[token][1];
          }
        }
      }
      if (again) {
        __syncwarp();
        if (lane == 0) arrive(empty + slot * 8);
      }
      bytes += piece_bytes;
      absmax_row += plan.piece_rows * segments;
      target += plan.piece_rows * plan.pitch;
      if (++slot == plan.slots) slot = 0, parity ^= 1, bytes -= plan.slots * piece_bytes;
    }
  }
  __syncwarp();
  if (clustered) {
    wait_barrier(u_ready, 0);
  } else if (p.r > 0) {
    wait_for_previous();
  }
  __syncthreads();

  // The sums of a row, kRowLanes lanes each.
  const int columns = plan.groups * kSegments;
  const int values = (p.r + kFragment - 1) / kFragment * kFragment * kTokens;
  for (int token = 0; token < min(p.m, kTokens); ++token) {
    for (int row = adder; row - adder < rows; row += kConsumers / kRowLanes) {
      const int64_t n = static_cast<int64_t>(first) + row;
      float sum = 0.0f;
      if (row < rows) {
        for (int i = part; i < columns; i += kRowLanes) sum += sums[(token * plan.capacity + row) * plan.pitch + i];
        float lora = 0.0f;
        for (int r = part; r < p.r; r += kRowLanes) {
          float u = 0.0f;
          if (clustered) {
            for (int i = 0; i < plan.ranks; ++i) u += all_u[i * values + r * kTokens + token];
            u = Numeric<T>::wide(Numeric<T>::narrow(u));
          } else {
            u = Numeric<T>::wide(static_cast<const T*>(p.u)[token * p.r + r]);
          }
          const float b = r == part && row == adder ? first_b : element<T>(p.lora_b, n * p.r + r, wide);
          lora += u * b;
        }
        sum += p.scale * lora;
      }
#pragma unroll
      for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (row < rows && part == 0) {
        if (p.bias != nullptr) sum += element<T>(p.bias, n, p.bias_dtype == DType::kFloat32);
        store_as<T>(p.y, token * p.n + n, sum, p.out_dtype == DType::kFloat32);
      }
    }
  }
  if (clustered && block == 0) {
    for (int i = thread; i < p.m * p.r; i += kConsumers) {
      const int token = i / p.r, r = i % p.r;
      float u = 0.0f;
      for (int j = 0; j < plan.ranks; ++j) u += all_u[j * values + r * kTokens + token];
      static_cast<T*>(p.u)[i] = Numeric<T>::narrow(u);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- host

// Which of the forms: what does not follow from the sizes.
struct StreamOptions {
  int units;      // pairs of rows to a warp at once
  int selected;   // words of four that are decoded without the table
  int ranks;      // of a cluster, 1: u is made by a launch before
  int chain;
};

struct StreamChoice {
  StreamPlan plan;
  int slices;  // of a warp
  int blocks;
  int shared;
};

// False where the shape does not fit.
inline bool plan_stream(
    const FewRowsForward& p, const StreamOptions& o, int tokens, int64_t places, int limit, StreamChoice& c) {
  if (p.k % kSegment != 0 || p.blocksize < kSegment || p.n * p.k / kSegment > INT32_MAX) return false;
  StreamPlan& plan = c.plan;
  plan.slices = static_cast<int>(cut(p.k, kSlice));
  int best = 0;
  for (int slices = 1; slices * tokens <= 8 && slices <= 4; slices *= 2) {
    const int groups = static_cast<int>(cut(plan.slices, slices));
    const int row_groups = groups <= kWarps ? kWarps / groups : 0;
    if (groups * row_groups > best) {
      best = groups * row_groups;
      c.slices = slices;
      plan.groups = groups;
      plan.row_groups = row_groups;
    }
  }
  if (best == 0) return false;
  plan.piece_rows = plan.row_groups * o.units * 2;
  plan.row_bytes = static_cast<int>(p.k / 2);
  plan.segments = static_cast<int>(p.k / kSegment);
  plan.group_of = plan.row_group_of = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    plan.group_of |= static_cast<uint64_t>(warp % plan.groups) << 4 * warp;
    plan.row_group_of |= static_cast<uint64_t>(warp / plan.groups) << 4 * warp;
  }
  plan.pitch = (plan.groups * kSegments + 15) / 32 * 32 + 16;
  plan.log2_units = log2_of(p.blocksize) - 6;
  plan.ranks = p.r > 0 ? o.ranks : 1;
  plan.chain = o.chain;
  const int64_t row_bytes = p.k / 2, piece_bytes = row_bytes * plan.piece_rows;
  for (int64_t blocks = p.n < places ? p.n : places;; blocks *= 2) {
    if (plan.ranks > 1) blocks = cut(blocks, plan.ranks) * plan.ranks;
    const int64_t rows = cut(p.n, blocks);
    const auto rounded = [](int64_t bytes) { return cut(bytes, 128) * 128; };
    // Below the table what fits there, the rest behind it.
    int64_t low = kStatisticsAt + kStatisticsBytes, high = kTableAt + kTable;
    const auto take = [&](int64_t bytes) {
      bytes = cut(bytes, 128) * 128;
      int64_t& at = low + bytes <= kTableAt ? low : high;
      at += bytes;
      return static_cast<int>(at - bytes);
    };
    const int64_t ranked = plan.ranks > 1 ? cut(p.r, kFragment) * kFragment * tokens * 4 : 0;
    plan.capacity = static_cast<int>(rows) + 1;
    plan.all_u = take(ranked * plan.ranks);
    plan.parts_u = take(ranked * kWarps);
    plan.sums = take(tokens * (rows + 1) * plan.pitch * 4);
    plan.absmax = take((rows + 1) * (p.k / kSegment) * 4);
    plan.ring = static_cast<int>(high);
    const int64_t pieces = cut(rows, plan.piece_rows);
    int64_t slots = high < limit ? (limit - high) / piece_bytes : 0;
    slots = slots < pieces ? slots : pieces;
    slots = slots < kMaxPieces ? slots : kMaxPieces;
    if (slots >= (pieces < 2 ? pieces : 2)) {
      plan.slots = static_cast<int>(slots);
      c.blocks = static_cast<int>(blocks);
      plan.rows = static_cast<int>(p.n / blocks);
      plan.more = static_cast<int>(p.n % blocks);
      c.shared = static_cast<int>(high + slots * piece_bytes);
      return true;
    }
    if (rows <= plan.piece_rows) return false;
  }
}

template <typename T, int kTokens, int kSlices, int kUnits, int kSelected>
cudaError_t launch_stream(
    const FewRowsForward& p, const StreamChoice& c, bool overlap, cudaStream_t stream) {
  return launch_few_rows(
      stream_kernel<T, kTokens, kSlices, kUnits, kSelected>, dim3(static_cast<unsigned>(c.blocks)), kStreamThreads,
      c.shared, c.plan.ranks, overlap, stream, p, c.plan);
}

}  // namespace
}  // namespace fastlora
