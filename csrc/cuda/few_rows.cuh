// Device functions of the products of a few rows (tokens) with a packed weight: tensor core, copies, decoding.
//
// Every product is computed transposed: the weight is the first operand of mma.m16n8k16, decoded straight into its
// fragments, and the tokens are its eight columns, so that one token wastes seven columns and not fifteen rows. The
// order of a sum is free, which lets a lane multiply the elements that its own wide load brought: lane (g, t) of the
// fragment, g = lane / 4 and t = lane % 4, needs no exchange with another lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <type_traits>

#include "../params.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTLORA_HOPPER 1
#endif

namespace fastlora {

constexpr int kThreads = 256;
constexpr int kFragment = 16;  // rows, and summands, of one tensor core instruction
constexpr int kTokens = 8;     // its columns
constexpr int kMaxRanks = 8;   // blocks of a cluster that every device of this kind allows

// The two values of a byte. A copy for each of 16 lanes: half a warp reads 16 different pairs of banks.
constexpr int kCopies = 16;
constexpr int kTableBytes = 256 * kCopies * sizeof(float2);
constexpr int kStatisticsBytes = 256 * sizeof(float);

template <typename T>
struct Numeric;

template <>
struct Numeric<__nv_bfloat16> {
  static constexpr DType kType = DType::kBFloat16;
  static __device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ void mma(
      float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

template <>
struct Numeric<__half> {
  static constexpr DType kType = DType::kFloat16;
  static __device__ __forceinline__ float wide(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ void mma(
      float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory behind the computation; zeros where `inside` is false.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool inside) {
  const uint32_t address = shared_address(target);
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start, and waits itself before it reads.
__device__ __forceinline__ void let_next_start() {
#if defined(FASTLORA_HOPPER)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if defined(FASTLORA_HOPPER)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(FASTLORA_HOPPER)
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The sum of the float32 that each of the `ranks` blocks of a cluster has at the same place of its shared memory, in
// the order of the blocks.
__device__ __forceinline__ float sum_of_cluster(uint32_t local, int ranks) {
  // All loads are under way before the first sum: each takes as long as one from the L2 cache.
  float value[kMaxRanks];
#pragma unroll
  for (int other = 0; other < kMaxRanks; ++other) {
    value[other] = 0.0f;
    if (other < ranks) {
      uint32_t remote;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(other));
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value[other]) : "r"(remote));
    }
  }
  float sum = value[0];
#pragma unroll
  for (int other = 1; other < kMaxRanks; ++other) sum += value[other];
  return sum;
}
#endif

// The sum of what the threads of one number have in the `ranks` blocks of a cluster, for those that `take` it. All
// threads call it.
template <int kBlockThreads>
__device__ __forceinline__ float sum_of_threads(float value, bool take, int ranks) {
#if defined(FASTLORA_HOPPER)
  __shared__ float values[kBlockThreads];
  float* own = values + threadIdx.x;
  if (take) *own = value;
  meet_cluster();
  if (take) value = sum_of_cluster(shared_address(own), ranks);
  meet_cluster();  // no block may leave while another still reads its memory
#endif
  return value;
}

// An element of a small operand that may be stored wider than it is multiplied.
template <typename T>
__device__ __forceinline__ float element(const void* base, int64_t index, bool is_float) {
  return is_float ? Numeric<T>::wide(Numeric<T>::narrow(static_cast<const float*>(base)[index]))
                  : Numeric<T>::wide(static_cast<const T*>(base)[index]);
}

// Two neighbours of such an operand as a fragment register; those from `stop` on are zero.
template <typename T>
__device__ __forceinline__ uint32_t
pair(const void* base, int64_t row, int stride, int column, int stop, bool is_float) {
  const int64_t index = row * stride + column;
  if (column + 1 < stop && stride % 2 == 0) {
    if (!is_float) return *reinterpret_cast<const uint32_t*>(static_cast<const T*>(base) + index);
    const float2 two = *reinterpret_cast<const float2*>(static_cast<const float*>(base) + index);
    return Numeric<T>::pack(two.x, two.y);
  }
  return Numeric<T>::pack(
      column < stop ? element<T>(base, index, is_float) : 0.0f,
      column + 1 < stop ? element<T>(base, index + 1, is_float) : 0.0f);
}

// Columns of a warp that multiplies a narrow matrix. Column c of tile i is the column 8 (c / 2) + 2 i + c % 2 of the
// warp, so that a lane holds 8 neighbours: those from 8 t on, of the rows g and g + 8.
constexpr int kSpan = 32;
constexpr int kSpanTiles = kSpan / kTokens;

// acc += narrow (m, r) times a matrix (r, kSpan), for the 16 rows from m0 on. right(r, column): the elements r .. r + 3
// of a column of that matrix as two fragment registers, zero from r on.
template <typename T, typename Right>
__device__ __forceinline__ void multiply_narrow(
    const void* narrow, int64_t m, int64_t m0, int r, Right right, float (&acc)[kSpanTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int r0 = 0; r0 < r; r0 += kFragment) {
    const int first = r0 + 4 * t, upper = m0 + g < m ? r : 0, lower = m0 + g + 8 < m ? r : 0;
    const uint32_t a0 = pair<T>(narrow, m0 + g, r, first, upper, false);
    const uint32_t a1 = pair<T>(narrow, m0 + g + 8, r, first, lower, false);
    const uint32_t a2 = pair<T>(narrow, m0 + g, r, first + 2, upper, false);
    const uint32_t a3 = pair<T>(narrow, m0 + g + 8, r, first + 2, lower, false);
#pragma unroll
    for (int tile = 0; tile < kSpanTiles; ++tile) {
      const uint2 b = right(first, 8 * (g / 2) + 2 * tile + g % 2);
      Numeric<T>::mma(acc[tile], a0, a1, a2, a3, b.x, b.y);
    }
  }
}

// The lower, or the upper, halves of two registers.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// Eight neighbours, 16-byte aligned, as four fragment registers.
template <typename T>
__device__ __forceinline__ uint4 eight(const void* base, int64_t index, bool is_float) {
  if (!is_float) return *reinterpret_cast<const uint4*>(static_cast<const T*>(base) + index);
  const float4* wide = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
  const float4 low = wide[0], high = wide[1];
  return make_uint4(
      Numeric<T>::pack(low.x, low.y), Numeric<T>::pack(low.z, low.w), Numeric<T>::pack(high.x, high.y),
      Numeric<T>::pack(high.z, high.w));
}

#define FASTLORA_CODES(type)                                                                                        \
  code_value(type, 0), code_value(type, 1), code_value(type, 2), code_value(type, 3), code_value(type, 4),          \
      code_value(type, 5), code_value(type, 6), code_value(type, 7), code_value(type, 8), code_value(type, 9),      \
      code_value(type, 10), code_value(type, 11), code_value(type, 12), code_value(type, 13), code_value(type, 14), \
      code_value(type, 15)
// In constant memory: an array inside a kernel would be copied to local memory by every thread.
static __constant__ float kCodeValues[2 * kCodes] = {FASTLORA_CODES(QuantType::kNF4), FASTLORA_CODES(QuantType::kFP4)};
#undef FASTLORA_CODES

// An element of a factor that is not dense, as it lies in memory: `index` counts all of them, `row` is where it is.
struct PackedElement {
  uint32_t byte;
  float scale;
};

__device__ __forceinline__ PackedElement
load_packed(const void* base, const PackedFactor& factor, int64_t row, int64_t index) {
  const int64_t at = factor.nf4 ? index / 2 : index, scale = factor.nf4 ? index / PackedFactor::kBlocksize : row;
  return {static_cast<const uint8_t*>(base)[at], factor.scales[scale]};
}

// The same rounded to T.
template <typename T>
__device__ __forceinline__ float unpacked(const PackedElement& e, const PackedFactor& factor, int64_t index) {
  const float value = factor.nf4 ? kCodeValues[index % 2 == 0 ? e.byte >> 4 : e.byte & 15]
                                 : static_cast<float>(static_cast<int8_t>(e.byte));
  return Numeric<T>::wide(Numeric<T>::narrow(value * e.scale));
}

// Eight neighbours of such a factor; `index` is a multiple of 8.
struct PackedEight {
  uint32_t low, high;
  float scale;
};

template <bool kNF4>
__device__ __forceinline__ PackedEight
load_eight(const void* base, const PackedFactor& factor, int64_t index, bool inside) {
  PackedEight e{0, 0, 0.0f};
  if (!inside) return e;
  if constexpr (kNF4) {
    e.low = __ldg(static_cast<const uint32_t*>(base) + index / 8);
    e.scale = __ldg(factor.scales + index / PackedFactor::kBlocksize);
  } else {
    const uint2 words = __ldg(static_cast<const uint2*>(base) + index / 8);
    e.low = words.x, e.high = words.y;
  }
  return e;
}

// Those as four fragment registers; integers without their scale. All lanes take part. `code`: kCodeValues[lane % 16].
template <typename T, bool kNF4>
__device__ __forceinline__ uint4 unpack_eight(const PackedEight& e, float code) {
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (kNF4) {
      const int nibble = static_cast<int>(e.low >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)) & 15);
      value[i] = __shfl_sync(0xffffffffu, code, nibble) * e.scale;
    } else {
      // The byte as the last one of 2^23 + (value + 128).
      const uint32_t word = (i < 4 ? e.low : e.high) ^ 0x80808080u;
      value[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + i % 4)) - 8388736.0f;
    }
  }
  return make_uint4(
      Numeric<T>::pack(value[0], value[1]), Numeric<T>::pack(value[2], value[3]), Numeric<T>::pack(value[4], value[5]),
      Numeric<T>::pack(value[6], value[7]));
}

// Fills both tables with all threads of the block. The caller synchronises.
__device__ __forceinline__ void fill_tables(const PackedWeight& w, float2* bytes, float* statistics) {
  const float* codes = kCodeValues + (w.quant_type == QuantType::kFP4 ? kCodes : 0);
  // Entry e = 16 i + threadIdx / 16: i is its high nibble.
  const float low = codes[threadIdx.x / kCopies];
#pragma unroll
  for (int i = 0; i < kCodes; ++i) bytes[i * kThreads + threadIdx.x] = make_float2(codes[i], low);
  if (w.nested) statistics[threadIdx.x] = __ldg(w.absmax_code + threadIdx.x);
}

// Asks for `bytes` from `base` on, so that they wait in the cache for a step that will need them late.
__device__ __forceinline__ void prefetch(const void* base, int64_t bytes) {
  constexpr int kLine = 128;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kLine; i < bytes; i += kThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(base) + i));
  }
}

// How A is stored.
enum class Storage { kDense, kInt8, kNF4 };

// Whether A and B are not dense.
template <typename Params>
constexpr bool kArePacked = std::is_same<Params, FewRowsPacked>::value;

// An element of B, rounded to T.
template <typename T, typename Params>
__device__ __forceinline__ float element_of_b(const Params& p, int64_t row, int column, bool wide) {
  const int64_t index = row * p.r + column;
  if constexpr (kArePacked<Params>) {
    return unpacked<T>(load_packed(p.lora_b, p.packed_b, row, index), p.packed_b, index);
  } else {
    return element<T>(p.lora_b, index, wide);
  }
}

// Bits of r elements of `factor`, A or B.
template <typename Params>
__device__ __forceinline__ int64_t bits_of_ranks(const Params& p, PackedFactor FewRowsPacked::* factor, bool wide) {
  if constexpr (kArePacked<Params>) {
    return p.r * ((p.*factor).nf4 ? 4 : 8);
  } else {
    return p.r * (wide ? 32 : 16);
  }
}

// Asks for what a block will read of B: `rows` of its rows.
template <typename Params>
__device__ __forceinline__ void prefetch_b(const Params& p, int64_t row0, int64_t rows, bool wide) {
  const int64_t bits = bits_of_ranks(p, &FewRowsPacked::packed_b, wide);
  prefetch(static_cast<const char*>(p.lora_b) + row0 * bits / 8, rows * bits / 8);
}

// Of all of A, what falls to a block of the first axis of the grid.
template <typename Params>
__device__ __forceinline__ void prefetch_a(const Params& p, bool wide) {
  const int64_t bytes = bits_of_ranks(p, &FewRowsPacked::packed_a, wide) * p.k / 8;
  const int64_t first = blockIdx.x * bytes / gridDim.x;
  prefetch(static_cast<const char*>(p.lora_a) + first, (blockIdx.x + 1) * bytes / gridDim.x - first);
}

// The statistic of a block, in two steps so that the loads of the first can be long under way at the second.
struct Statistic {
  float value;
  uint32_t code;
};

__device__ __forceinline__ Statistic
load_statistic(const PackedWeight& w, int64_t element, int log2_blocksize, bool inside) {
  Statistic s{0.0f, 0};
  if (inside) {
    const int64_t block = element >> log2_blocksize;
    if (w.nested) {
      s.code = __ldg(w.absmax_q + block);
      s.value = __ldg(w.absmax_scale + block / kNestedBlocksize);
    } else {
      s.value = __ldg(w.absmax + block);
    }
  }
  return s;
}

__device__ __forceinline__ float absmax_of(
    const PackedWeight& w, const Statistic& s, const float* statistics, float offset) {
  return w.nested ? nested_absmax(statistics[s.code], s.value, offset) : s.value;
}

// The values of byte kByte of `word`, both multiplied by `absmax`. `copy` is 8 * (lane % 16).
template <int kByte>
__device__ __forceinline__ float2 decode(const unsigned char* table, uint32_t word, uint32_t copy, float absmax) {
  constexpr uint32_t kMask = 0xffu * kCopies * sizeof(float2);
  const uint32_t shifted = kByte == 0 ? word << 7 : word >> (8 * kByte - 7);
  const float2 code = *reinterpret_cast<const float2*>(table + ((shifted & kMask) | copy));
  return make_float2(__fmul_rn(code.x, absmax), __fmul_rn(code.y, absmax));
}

// The eight elements of `word`, rounded once each, as four fragment registers.
template <typename T>
__device__ __forceinline__ void decode_word(
    uint32_t (&fragment)[4], const unsigned char* table, uint32_t word, uint32_t copy, float absmax) {
  const float2 v0 = decode<0>(table, word, copy, absmax), v1 = decode<1>(table, word, copy, absmax);
  const float2 v2 = decode<2>(table, word, copy, absmax), v3 = decode<3>(table, word, copy, absmax);
  fragment[0] = Numeric<T>::pack(v0.x, v0.y);
  fragment[1] = Numeric<T>::pack(v1.x, v1.y);
  fragment[2] = Numeric<T>::pack(v2.x, v2.y);
  fragment[3] = Numeric<T>::pack(v3.x, v3.y);
}

// Sums of split reductions. A warp of part `part` leaves its sums in shared memory, [part][token][row]; `finish_sums`
// adds the parts of the block and then those of the cluster, always in the same order, and hands each sum to
// `store(token, row, sum)`, row counted from the block's first. All threads of the cluster call it.
template <int kRows, int kTileTokens>
struct Sums {
  static constexpr int kPitch = kRows + 4;  // a warp's two axes then fall on different banks
  static constexpr int kBytes = kTileTokens * kPitch * static_cast<int>(sizeof(float));
  float* parts;

  __device__ __forceinline__ float& at(int part, int token, int row) const {
    return parts[(part * kTileTokens + token) * kPitch + row];
  }

  template <int kParts, typename Store>
  __device__ __forceinline__ void finish(int tokens, int ranks, Store store) const {
    __syncthreads();
    const auto total = [&](int token, int row) {
      float sum = at(0, token, row);
#pragma unroll
      for (int part = 1; part < kParts; ++part) sum += at(part, token, row);
      return sum;
    };
    if (ranks == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < tokens * kRows; i += kThreads) {
        store(i / kRows, i % kRows, total(i / kRows, i % kRows));
      }
      return;
    }
#if defined(FASTLORA_HOPPER)
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < tokens * kRows; i += kThreads) {
      at(0, i / kRows, i % kRows) = total(i / kRows, i % kRows);
    }
    meet_cluster();
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int share = kRows / ranks;  // both are powers of two
    const int log2_share = 31 - __clz(share);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < tokens * share; i += kThreads) {
      const int token = i >> log2_share, row = static_cast<int>(rank) * share + (i & (share - 1));
      const uint32_t local = shared_address(&at(0, token, row));
      const float sum = sum_of_cluster(local, ranks);
      store(token, row, sum);
    }
    // No block may leave while another still reads its memory.
    meet_cluster();
#endif
  }
};

// Sums u = x A^T for the 16 ranks and the 8 kGroups tokens of a block, whose warps split K, as do `sharers` blocks of a
// cluster, and hands each to `store(token, rank, sum)`; ranks from r on are zero.
template <
    typename T,
    int kBlockThreads,
    int kGroups = 1,
    Storage kStorage = Storage::kDense,
    typename Params,
    typename Store>
__device__ __forceinline__ void project(const Params& p, Store store, int sharers = 1) {
  constexpr bool kPacked = kStorage != Storage::kDense, kNF4 = kStorage == Storage::kNF4;
  constexpr int kWarps = kBlockThreads / 32, kTileTokens = kTokens * kGroups;
  static_assert(kFragment * kTileTokens <= kBlockThreads);
  __shared__ float sums[kWarps][kFragment][kTileTokens];
  const int block = static_cast<int>(blockIdx.x) / sharers, sharer = static_cast<int>(blockIdx.x) % sharers;
  const int step = sharers * kWarps * 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t r0 = static_cast<int64_t>(block) * kFragment, m0 = static_cast<int64_t>(blockIdx.y) * kTileTokens;
  const int64_t first = (sharer * kWarps + warp) * 32 + t * 8;
  const bool wide = p.adapter_dtype == DType::kFloat32;
  const bool upper = r0 + g < p.r, lower = r0 + 8 + g < p.r;
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  float acc[kGroups][4] = {};
  const auto of_x = [&](int group, int64_t k) {
    const int64_t token = m0 + group * kTokens + g;
    return token < p.m ? eight<T>(p.x, token * p.k + k, false) : nothing;
  };
  const auto multiply = [&](const uint4& a0, const uint4& a1, int group, const uint4& b) {
    Numeric<T>::mma(acc[group], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
    Numeric<T>::mma(acc[group], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
  };
  if constexpr (kPacked) {
    static_assert(kGroups == 1);
    constexpr int kBatch = 4;  // steps whose loads are all under way before the first is decoded
    const float code = kCodeValues[lane % kCodes];
    for (int64_t from = first; from < p.k; from += kBatch * step) {
      PackedEight a[kBatch][2];
      uint4 b[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t k = from + i * step, index = (r0 + g) * p.k + k;
        const bool inside = k < p.k;
        a[i][0] = load_eight<kNF4>(p.lora_a, p.packed_a, index, inside && upper);
        a[i][1] = load_eight<kNF4>(p.lora_a, p.packed_a, index + 8 * p.k, inside && lower);
        b[i] = inside ? of_x(0, k) : nothing;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        multiply(unpack_eight<T, kNF4>(a[i][0], code), unpack_eight<T, kNF4>(a[i][1], code), 0, b[i]);
      }
    }
  } else {
#pragma unroll(kGroups == 1 ? 4 : 2)
    for (int64_t k = first; k < p.k; k += step) {
      const uint4 a0 = upper ? eight<T>(p.lora_a, (r0 + g) * p.k + k, wide) : nothing;
      const uint4 a1 = lower ? eight<T>(p.lora_a, (r0 + 8 + g) * p.k + k, wide) : nothing;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) multiply(a0, a1, i, of_x(i, k));
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kGroups; ++i) {
    sums[warp][g + i % 4 / 2 * 8][i / 4 * kTokens + 2 * t + i % 2] = acc[i / 4][i % 4];
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % kFragment, column = static_cast<int>(threadIdx.x) / kFragment;
  const bool here = column < kTileTokens && m0 + column < p.m;
  float sum = 0.0f;
  if (here) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i][row][column];
  }
  if (sharers > 1) sum = sum_of_threads<kBlockThreads>(sum, here, sharers);
  if (!here || sharer > 0) return;
  if constexpr (kStorage == Storage::kInt8) {
    if (r0 + row < p.r) sum *= p.packed_a.scales[r0 + row];
  }
  store(m0 + column, static_cast<int>(r0) + row, sum);
}

template <typename T>
__device__ __forceinline__ void store_as(void* base, int64_t index, float value, bool is_float) {
  if (is_float) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<T*>(base)[index] = Numeric<T>::narrow(value);
  }
}

// ---------------------------------------------------------------------------------------------------------------- host

// Of how many parts: the last one may be smaller.
inline int64_t cut(int64_t size, int64_t part) { return (size + part - 1) / part; }

// What the kernels may use of a device, as they were compiled.
struct DeviceLimits {
  int device;
  int multiprocessors;
  int shared_memory;  // bytes of a block
  bool clusters;      // and launches that begin before the one before them has ended
  bool hopper;        // compute capability 9.0
};

// Of the current device.
cudaError_t current_limits(DeviceLimits& limits);

// Into how many blocks of a cluster a sum over `length` is split for each of `tiles`: while the device has room for
// them, and each of their `threads` an element. One where there are no tiles.
inline int sharers_of(int64_t tiles, int64_t length, int threads, const DeviceLimits& limits) {
  int sharers = 1;
  while (limits.clusters && tiles > 0 && sharers < kMaxRanks && 2 * sharers * tiles <= limits.multiprocessors &&
         int64_t{sharers} * threads < length) {
    sharers *= 2;
  }
  return sharers;
}

inline int log2_of(int32_t blocksize) {
  int log2 = 0;
  while ((1 << log2) < blocksize) ++log2;
  return log2;
}

// A launch with `ranks` blocks to a cluster; `overlap`: it may start before the previous kernel has ended.
struct LaunchConfig {
  LaunchConfig(dim3 grid, int threads, int shared, int ranks, bool overlap, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = attributes;
    if (ranks > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
    }
    if (overlap) {
      cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
      dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      dependent.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];
};

// What is found once for each device and kept, since the queries take longer than a launch. Threads may ask at once.
template <typename Value>
class PerDevice {
 public:
  // `find(Value&)` where `device` has not been asked for.
  template <typename Find>
  cudaError_t get(int device, Find find, const Value*& value) {
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    Known& known = known_[device];
    value = &known.value;
    if (known.ready.load(std::memory_order_acquire)) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(finding_);
    if (known.ready.load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t status = find(known.value);
    if (status == cudaSuccess) known.ready.store(true, std::memory_order_release);
    return status;
  }

 private:
  static constexpr int kDevices = 64;
  struct Known {
    std::atomic<bool> ready{false};
    Value value{};
  };
  Known known_[kDevices];
  std::mutex finding_;
};

// How many blocks of a kernel a device runs at once, by the blocks to a cluster: fewer for larger clusters, which must
// lie in one part of the device. One object per kernel.
class Slots {
 public:
  template <typename... Parameters>
  cudaError_t find(
      void (*kernel)(Parameters...), int threads, int shared, const DeviceLimits& limits, const int*& slots) {
    const Blocks* blocks = nullptr;
    const cudaError_t status = known_.get(
        limits.device, [&](Blocks& found) { return query(kernel, threads, shared, limits, found.of_ranks); }, blocks);
    if (status == cudaSuccess) slots = blocks->of_ranks;
    return status;
  }

 private:
  struct Blocks {
    int of_ranks[kMaxRanks + 1];
  };

  template <typename... Parameters>
  static cudaError_t query(
      void (*kernel)(Parameters...), int threads, int shared, const DeviceLimits& limits, int* found) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    // Otherwise the cache may be left so large that a second block does not fit.
    status =
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
    int blocks = 0;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared));
    if (status != cudaSuccess) return status;
    found[1] = blocks * limits.multiprocessors;
    for (int ranks = 2; limits.clusters && ranks <= kMaxRanks; ++ranks) {
      const LaunchConfig launch(dim3(static_cast<unsigned>(ranks)), threads, shared, ranks, false, nullptr);
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
        clusters = 0;
        cudaGetLastError();  // or the next launch would be said to have failed
      }
      found[ranks] = clusters * ranks;
    }
    return cudaSuccess;
  }

  PerDevice<Blocks> known_;
};

// Into how many blocks of a cluster the reduction of each tile is split: the split whose waves over the device take
// the fewest steps, `chunks` steps for a whole tile and `overhead` more for starting and finishing a block.
inline int split_of(int64_t tiles, int64_t chunks, const int* slots, int overhead) {
  int best = 1;
  int64_t best_steps = INT64_MAX;
  for (int ranks = 1; ranks <= kMaxRanks && ranks <= chunks; ranks *= 2) {
    if (slots[ranks] == 0) continue;
    const int64_t steps = cut(tiles * ranks, slots[ranks]) * (cut(chunks, ranks) + overhead);
    if (steps < best_steps) {
      best = ranks;
      best_steps = steps;
    }
  }
  return best;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_few_rows(
    void (*kernel)(Parameters...),
    dim3 grid,
    int threads,
    int shared,
    int ranks,
    bool overlap,
    cudaStream_t stream,
    Arguments... arguments) {
  const LaunchConfig launch(grid, threads, shared, ranks, overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// A product of `tiles` tiles of the output, each of `chunks` steps that the blocks of a cluster share; `shared`: bytes
// of a block. Where there is an adapter it may start beside the kernel before it, which makes u or du.
// `slots_of_kernel` is that kernel's own.
template <typename Params>
cudaError_t launch_split(
    Slots& slots_of_kernel,
    void (*kernel)(Params, int, int, int),
    int shared,
    int64_t tiles,
    int64_t chunks,
    const Params& p,
    const DeviceLimits& limits,
    cudaStream_t stream) {
  if (shared > limits.shared_memory) return cudaErrorInvalidConfiguration;
  const int* slots = nullptr;
  if (const cudaError_t status = slots_of_kernel.find(kernel, kThreads, shared, limits, slots); status != cudaSuccess) {
    return status;
  }
  const int ranks = split_of(tiles, chunks, slots, 2);
  return launch_few_rows(
      kernel, dim3(static_cast<unsigned>(tiles * ranks)), kThreads, shared, ranks, p.r > 0 && limits.clusters, stream,
      p, ranks, static_cast<int>(cut(chunks, ranks)), log2_of(p.blocksize));
}

}  // namespace fastlora
