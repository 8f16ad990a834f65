// y = x W^T + scale * (u B^T) + bias for one or two rows of x, where the bytes of W are the whole cost.
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

#include "few_rows_stream.cuh"
#include "hopper.cuh"

namespace fastlora {
namespace {

using Plan = StreamPlan;

constexpr int kConsumers = Plan::kWarps * 32;
constexpr int kStreamThreads = kConsumers + 32;  // and a warp that asks for copies

#if defined(FASTLORA_HOPPER)
constexpr int kPairs = 8;                        // registers of x in a slice
constexpr int kRowLanes = 16;                    // lanes that add the sums of one output
constexpr int kAdders = kConsumers / kRowLanes;  // outputs that are added at once
constexpr int kHeld = 4;                         // outputs of a thread whose element of B is loaded at the start
static_assert(kFragment == 2 * Plan::kSegments && Plan::kSlice == 32 * 2 * kPairs);

// The factor of the codes, which their statistics are divided by. With both the errors of the 16 codes are the least.
__device__ __forceinline__ float code_factor(QuantType type) { return type == QuantType::kFP4 ? 1.5f : 1.3662109375f; }

__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// 16 neighbours of a row of x as they lie in memory.
__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[kPairs], const void* x, bool inside) {
#pragma unroll
  for (int i = 0; i < kPairs; i += 4) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (inside) v = static_cast<const uint4*>(x)[i / 4];
    pairs[i] = v.x, pairs[i + 1] = v.y, pairs[i + 2] = v.z, pairs[i + 3] = v.w;
  }
}

// The same as float16. Returns what undoes their scaling, the same for the lanes of a segment.
template <typename T>
__device__ __forceinline__ float scale_pairs(uint32_t (&pairs)[kPairs]) {
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

// An element of B as it lies in memory, so that nothing waits for it before `element_of`.
template <typename T>
__device__ __forceinline__ uint32_t load_element(const void* base, int64_t index, bool is_float) {
  return is_float ? static_cast<const uint32_t*>(base)[index] : static_cast<const uint16_t*>(base)[index];
}

template <typename T>
__device__ __forceinline__ float element_of(uint32_t bits, bool is_float) {
  if (is_float) return Numeric<T>::wide(Numeric<T>::narrow(__uint_as_float(bits)));
  const auto narrow = static_cast<uint16_t>(bits);
  return Numeric<T>::wide(*reinterpret_cast<const T*>(&narrow));
}

// The pair of codes of byte kByte of `word`. `place`: of the lane in the first entry.
template <int kByte>
__device__ __forceinline__ uint32_t look_up(uint32_t word, uint32_t place) {
  uint32_t pair;
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(word, place, 0x7604 | kByte << 4)));
  return pair;
}

__device__ __forceinline__ void look_up_word(uint32_t* pairs, uint32_t word, uint32_t place) {
  pairs[0] = look_up<0>(word, place);
  pairs[1] = look_up<1>(word, place);
  pairs[2] = look_up<2>(word, place);
  pairs[3] = look_up<3>(word, place);
}

// A copy of the pairs of a byte for each lane, which each read a bank of their own.
__device__ __forceinline__ void fill_table(unsigned char* table, const float* codes, float factor) {
  constexpr int kWriters = 8;  // threads that write an entry
  constexpr int kStep = kConsumers / kWriters;
  static_assert(kStep % kCodes == 0);
  const int entry = static_cast<int>(threadIdx.x) / kWriters;
  const float low = codes[entry % kCodes] * factor;
#pragma unroll
  for (int i = 0; i < 256; i += kStep) {
    const uint32_t pair = Numeric<__half>::pack(codes[(entry + i) / kCodes] * factor, low);
    *reinterpret_cast<uint4*>(table + (entry + i) * Plan::kEntry + threadIdx.x % kWriters * 16) =
        make_uint4(pair, pair, pair, pair);
  }
}

#endif

// kSlices: slices of a warp.
template <typename T, int kTokens, int kSlices, typename Params>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const Params p, const StreamPlan plan) {
#if defined(FASTLORA_HOPPER)
  let_next_start();
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // one value for the whole warp
  // The high byte of an address names the block of a cluster.
  const uint32_t window = shared_address(shared) & 0xff000000u;
  const auto pointer = [&](int address) { return shared + (window + address - shared_address(shared)); };
  const int block = static_cast<int>(blockIdx.x);
  const int first = block * plan.rows + min(block, plan.more), rows = plan.rows + (block < plan.more ? 1 : 0);
  const int row_bytes = plan.row_bytes, segments = plan.segments;
  const int piece_bytes = plan.piece_rows * row_bytes;
  const bool again = rows > plan.slots * plan.piece_rows;  // some of the slots are filled more than once
  const uint32_t full = window + Plan::kBarriersAt, empty = full + Plan::kMaxPieces * 8;

  if (warp == Plan::kWarps) {
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
      publish_barriers();
      for (int i = 0; i < plan.slots && row < rows; ++i, row += plan.piece_rows) ask(row, i);
    }
    __syncthreads();
    __syncthreads();
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

  const int g = lane / 4, t = lane % 4;
  const int group = static_cast<int>(plan.group_of >> 4 * warp & 15);
  const int row_group = static_cast<int>(plan.row_group_of >> 4 * warp & 15);
  const bool wide = p.adapter_dtype == DType::kFloat32;
  float* statistics = reinterpret_cast<float*>(pointer(Plan::kStatisticsAt));
  float* absmax = reinterpret_cast<float*>(pointer(plan.absmax));
  float* sums = reinterpret_cast<float*>(pointer(plan.sums));

  // All loads come before the first use of one. Statistics, one a segment, take two steps: codes, then values.
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
  uint32_t x[kTokens][kSlices][kPairs];
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int64_t column = static_cast<int64_t>(group + i * plan.groups) * Plan::kSlice + lane * 2 * kPairs;
      load_pairs(x[token][i], static_cast<const T*>(p.x) + token * p.k + column, column < p.k);
    }
  }
  const int adder = thread / kRowLanes, part = thread % kRowLanes;
  uint32_t held[kHeld];
  float held_scale[kHeld] = {};  // of packed ones
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = adder + i * kAdders;
    held[i] = 0;
    if (row < rows && part < p.r) {
      const int64_t index = static_cast<int64_t>(first + row) * p.r + part;
      if constexpr (kArePacked<Params>) {
        const PackedElement e = load_packed(p.lora_b, p.packed_b, first + row, index);
        held[i] = e.byte, held_scale[i] = e.scale;
      } else {
        held[i] = load_element<T>(p.lora_b, index, wide);
      }
    }
  }

  const float* codes = kCodeValues + (p.quant_type == QuantType::kFP4 ? kCodes : 0);
  const float factor = code_factor(p.quant_type);
  fill_table(pointer(Plan::kTableAt), codes, factor);
  if (p.nested && thread < 256) statistics[thread] = statistic;
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

  if (row_group < plan.row_groups) {
    // Here and not before the barriers, where the compiler would have the table wait for x.
    float undo[kTokens][kSlices];
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) undo[token][i] = scale_pairs<T>(x[token][i]);
    }
    const uint32_t place = window + Plan::kTableAt + static_cast<uint32_t>(lane) * 4;
    const bool odd = g % 2 == 1, diagonal = t == g / 2;
    // Lanes behind the end of a row read its last bytes, and multiply them by zero.
    int at[kSlices], segment[kSlices];
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = group + i * plan.groups;
      at[i] = min(slice * (Plan::kSlice / 2) + lane * kPairs, row_bytes - kPairs);
      segment[i] = min(slice * Plan::kSegments + g, segments - 1);
    }
    const int lead = row_group * Plan::kUnits * 2;  // rows of a piece before this warp's
    int slot = 0;
    uint32_t parity = 0;
    const unsigned char* bytes = pointer(plan.ring) + lead * row_bytes;
    const float* absmax_row = absmax + lead * segments;
    float* target = sums + lead * plan.pitch + group * Plan::kSegments + g;
    for (int row0 = lead; row0 - lead < rows; row0 += plan.piece_rows) {
      wait_barrier(full + slot * 8, parity);
      uint2 words[Plan::kUnits][kSlices][2];
      float statistic_of[Plan::kUnits][kSlices][2];
#pragma unroll
      for (int unit = 0; unit < Plan::kUnits; ++unit) {
        if (row0 + unit * 2 < rows) {
#pragma unroll
          for (int i = 0; i < kSlices; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              words[unit][i][half] = *reinterpret_cast<const uint2*>(bytes + (unit * 2 + half) * row_bytes + at[i]);
              statistic_of[unit][i][half] = absmax_row[(unit * 2 + half) * segments + segment[i]];
            }
          }
        }
      }
#pragma unroll
      for (int unit = 0; unit < Plan::kUnits; ++unit) {
        if (row0 + unit * 2 >= rows) break;
        float sum[kTokens][2] = {};
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          if (kSlices > 1 && group + i * plan.groups >= plan.slices) break;
          uint32_t upper[kPairs], lower[kPairs];
          look_up_word(upper, words[unit][i][0].x, place);
          look_up_word(upper + 4, words[unit][i][0].y, place);
          look_up_word(lower, words[unit][i][1].x, place);
          look_up_word(lower + 4, words[unit][i][1].y, place);
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            float acc[4] = {};
#pragma unroll
            for (int j = 0; j < kPairs; j += 2) {
              Numeric<__half>::mma(
                  acc, upper[j], lower[j], upper[j + 1], lower[j + 1], x[token][i][j], x[token][i][j + 1]);
            }
            sum[token][0] += (odd ? acc[1] : acc[0]) * (statistic_of[unit][i][0] * undo[token][i]);
            sum[token][1] += (odd ? acc[3] : acc[2]) * (statistic_of[unit][i][1] * undo[token][i]);
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
  float u[kTokens];
  if (p.r > 0) wait_for_previous();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    u[token] = part < p.r ? p.scale * Numeric<T>::wide(static_cast<const T*>(p.u)[token * p.r + part]) : 0.0f;
  }
  __syncthreads();

  // The sums of a row, kRowLanes lanes each, which share the ranks of its LoRA term, too.
  const int columns = plan.groups * Plan::kSegments;
  for (int row0 = adder; row0 - adder < rows; row0 += kHeld * kAdders) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int row = row0 + i * kAdders;
      if (row - adder >= rows) break;
      const int64_t n = static_cast<int64_t>(first) + row;
      float sum[kTokens] = {};
      if (row < rows) {
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float* of_row = sums + (token * plan.capacity + row) * plan.pitch;
          for (int column = part; column < columns; column += kRowLanes) sum[token] += of_row[column];
        }
        const bool later = row0 != adder;  // than what was loaded at the start
        float b;
        if constexpr (kArePacked<Params>) {
          PackedElement e{held[i], held_scale[i]};
          if (later && part < p.r) e = load_packed(p.lora_b, p.packed_b, n, n * p.r + part);
          b = unpacked<T>(e, p.packed_b, n * p.r + part);
        } else {
          uint32_t bits = held[i];
          if (later) bits = part < p.r ? load_element<T>(p.lora_b, n * p.r + part, wide) : 0;
          b = element_of<T>(bits, wide);
        }
#pragma unroll
        for (int token = 0; token < kTokens; ++token) sum[token] += u[token] * b;
        for (int r = part + kRowLanes; r < p.r; r += kRowLanes) {
          const float other = p.scale * element_of_b<T>(p, n, r, wide);
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            sum[token] += Numeric<T>::wide(static_cast<const T*>(p.u)[token * p.r + r]) * other;
          }
        }
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
#pragma unroll
        for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
          sum[token] += __shfl_xor_sync(0xffffffffu, sum[token], distance);
        }
        if (row < rows && part == token) {
          if (p.bias != nullptr) sum[token] += element<T>(p.bias, n, p.bias_dtype == DType::kFloat32);
          store_as<T>(p.y, token * p.n + n, sum[token], p.out_dtype == DType::kFloat32);
        }
      }
    }
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------- host

template <typename T, int kTokens, int kSlices, typename Params>
cudaError_t launch(const Params& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream) {
  static Slots slots_of_kernel;
  const int* slots = nullptr;
  const auto kernel = stream_kernel<T, kTokens, kSlices, Params>;
  const cudaError_t status = slots_of_kernel.find(kernel, kStreamThreads, limits.shared_memory, limits, slots);
  if (status != cudaSuccess) return status;
  return launch_few_rows(
      kernel, dim3(static_cast<unsigned>(plan.blocks)), kStreamThreads, plan.shared, 1, p.r > 0, stream, p, plan);
}

template <typename T, typename Params>
cudaError_t launch_form(const Params& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream) {
  static_assert(Plan::kMaxRows == 2 && Plan::kMaxSlices == 4);
  const int slices = plan.warp_slices;
  if (p.m == 2)
    return slices == 1 ? launch<T, 2, 1>(p, plan, limits, stream) : launch<T, 2, 2>(p, plan, limits, stream);
  if (slices == 1) return launch<T, 1, 1>(p, plan, limits, stream);
  return slices == 2 ? launch<T, 1, 2>(p, plan, limits, stream) : launch<T, 1, 4>(p, plan, limits, stream);
}

template <typename Params>
cudaError_t launch_type(const Params& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_form<__half>(p, plan, limits, stream)
                                    : launch_form<__nv_bfloat16>(p, plan, limits, stream);
}

}  // namespace

cudaError_t launch_stream(
    const FewRowsForward& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream) {
  return launch_type(p, plan, limits, stream);
}

cudaError_t launch_stream(
    const FewRowsPacked& p, const StreamPlan& plan, const DeviceLimits& limits, cudaStream_t stream) {
  return launch_type(p, plan, limits, stream);
}

}  // namespace fastlora
