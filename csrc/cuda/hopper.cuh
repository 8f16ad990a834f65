// What the tensor core products of compute capability 9.0 share: barriers, the tensor memory accelerator, descriptors.
#pragma once

#include <cuda.h>

#include "few_rows.cuh"
#include "wgmma.cuh"

// The instructions of this capability alone (sm_90a), not of later ones.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLORA_WGMMA 1
#endif

namespace fastlora {

constexpr int kWarpgroup = 128;  // threads

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What was initialized is there for the copies that this thread asks for, and for the block behind its next barrier.
__device__ __forceinline__ void publish_barriers() {
#if defined(FASTLORA_HOPPER)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once the copies that this thread has asked for by `copy_async` are there.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the barrier wait for `bytes` of copies besides.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of a matrix to shared memory, by its first column and row; zeros outside of the matrix.
__device__ __forceinline__ void copy_box(
    uint32_t target, const CUtensorMap& map, int column, int row, uint32_t barrier) {
#if defined(FASTLORA_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// A ring of `kSlots` buffers: the slot of the next one, and the parity of its round.
template <int kSlots>
struct Ring {
  uint32_t used = 0;
  __device__ __forceinline__ int slot() const { return static_cast<int>(used % kSlots); }
  __device__ __forceinline__ uint32_t parity() const { return used / kSlots % 2; }
};

// A table of 8 bytes for each byte of W, a copy for each lane. It lies where entry and lane are two bytes of an address
// and the other two are constant, so that one permutation makes the address.
constexpr int kLaneTableBytes = 256 * 32 * static_cast<int>(sizeof(uint2));
constexpr int kTableAt = 1 << 16;  // in shared memory
static_assert(kTableAt % kLaneTableBytes == 0);

// Fills it with all threads of the block: entry(high, low) of the values of both nibbles. The caller synchronises.
template <int kBlockThreads, typename Entry>
__device__ __forceinline__ void fill_lane_table(const PackedWeight& w, uint2* table, Entry entry) {
  const float* codes = kCodeValues + (w.quant_type == QuantType::kFP4 ? kCodes : 0);
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < 256 * 32; i += kBlockThreads) {
    table[i] = entry(codes[i / (32 * kCodes)], codes[i / 32 % kCodes]);
  }
}

struct LaneTable {
  uint32_t place;  // of the lane in the first entry

  // `window`: where the block's shared memory begins.
  __device__ __forceinline__ LaneTable(uint32_t window, int lane)
      : place(window + static_cast<uint32_t>(kTableAt + lane * static_cast<int>(sizeof(uint2)))) {}
  // What `look_up` takes to look up byte `byte` of a word.
  static __device__ __forceinline__ uint32_t select(int byte) { return 0x7604u | static_cast<uint32_t>(byte) << 4; }
  __device__ __forceinline__ uint2 look_up(uint32_t word, uint32_t selector) const {
    uint2 entry;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(entry.x), "=r"(entry.y) : "r"(__byte_perm(word, place, selector)));
    return entry;
  }
};

// An entry of two float32 values, both multiplied by `absmax`.
__device__ __forceinline__ float2 scaled(uint2 codes, float absmax) {
  return make_float2(__fmul_rn(__uint_as_float(codes.x), absmax), __fmul_rn(__uint_as_float(codes.y), absmax));
}

// The descriptor of a matrix in shared memory, 64 elements of two bytes a row, as a box with a swizzle of 128 bytes
// leaves it. 16 elements further: + 2.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (kEightRows << 32) |
         (kSwizzle128 << 62);
}

__device__ __forceinline__ void fence_registers() {
#if defined(FASTLORA_WGMMA)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit_products() {
#if defined(FASTLORA_WGMMA)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPending>
__device__ __forceinline__ void wait_products() {
#if defined(FASTLORA_WGMMA)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(FASTLORA_WGMMA)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(FASTLORA_WGMMA)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// What this thread wrote to shared memory is seen by the tensor cores and the copies that a later barrier lets start.
__device__ __forceinline__ void publish_writes() {
#if defined(FASTLORA_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A box of shared memory to a matrix, what lies outside of it left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int column, int row, uint32_t source) {
#if defined(FASTLORA_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(source)
      : "memory");
#endif
}

// Until at most `kPending` of this thread's stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores() {
#if defined(FASTLORA_HOPPER)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 8 matrices in the fragments of the tensor core, transposed: a lane's address is that of a row of 16 bytes.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(FASTLORA_HOPPER)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
#endif
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// The values of the 16 codes.
struct Codes {
  float value[kCodes];
};

// The 16 values of a block, rounded once each: their low bytes in four registers and their high ones in four.
struct BlockTable {
  uint32_t low[4], high[4];

  template <typename T>
  static __device__ __forceinline__ BlockTable of(const Codes& codes, float absmax) {
    BlockTable table;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto value = [&](int j) { return __fmul_rn(codes.value[4 * i + j], absmax); };
      const uint32_t first = Numeric<T>::pack(value(0), value(1)), second = Numeric<T>::pack(value(2), value(3));
      table.low[i] = permute(first, second, 0x6420);
      table.high[i] = permute(first, second, 0x7531);
    }
    return table;
  }

  // The eight values of a word. Three bits of a nibble select among eight bytes of either half of the table, and the
  // fourth one between the two bytes found.
  __device__ __forceinline__ uint4 look_up(uint32_t word) const {
    const uint32_t three = word & 0x77777777u, fourth = (word >> 1 & 0x44444444u) | 0x32103210u;
    uint4 values;
    two_pairs(three, fourth, values.x, values.y);
    two_pairs(three >> 16, fourth >> 16, values.z, values.w);
    return values;
  }

 private:
  __device__ __forceinline__ void two_pairs(uint32_t three, uint32_t fourth, uint32_t& a, uint32_t& b) const {
    const uint32_t lows = permute(permute(low[0], low[1], three), permute(low[2], low[3], three), fourth);
    const uint32_t highs = permute(permute(high[0], high[1], three), permute(high[2], high[3], three), fourth);
    a = permute(lows, highs, 0x4051);  // the first element of a byte is its high nibble
    b = permute(lows, highs, 0x6273);
  }
};

// ---------------------------------------------------------------------------------------------------------------- host

// A map of a matrix (rows, columns), whose rows lie `stride` elements apart, for boxes of (box_rows, box_columns).
inline cudaError_t make_map(
    CUtensorMap& map,
    CUtensorMapDataType type,
    int element_bytes,
    const void* base,
    int64_t rows,
    int64_t columns,
    int64_t stride,
    int box_rows,
    int box_columns,
    CUtensorMapSwizzle swizzle) {
  using Encode = CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static std::atomic<Encode> known{nullptr};  // threads would find the same one
  Encode encode = known.load(std::memory_order_relaxed);
  if (encode == nullptr) {
    // Through the runtime, so that nothing links against the driver.
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) return status;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode>(function);
    known.store(encode, std::memory_order_relaxed);
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * static_cast<cuuint64_t>(element_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(
      &map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T>
constexpr CUtensorMapDataType tensor_map_type() {
  return Numeric<T>::kType == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Either product with W decoded inside of it. The side of the result that is no token is n, forward, or k; the other
// one is the reduced side.
struct TileParams : PackedWeight {
  const void* adapter;  // lora_b (n, r) or lora_a (r, k), of adapter_dtype
  const void* bias;     // of the result, of bias_dtype, or null
  void* out;            // (m, n) or (m, k) of out_dtype
  int32_t m;
  int32_t r;
  DType adapter_dtype;
  DType bias_dtype;
  DType out_dtype;
};

// What it multiplies: x and scale * u, or dy and du; the narrow one in rows of a multiple of 8.
struct TileOperands {
  const void* rows;
  const void* narrow;
};

// The maps of both for boxes of (tokens, columns), which are swizzled rows; without LoRA the second is left as it is.
template <typename T>
cudaError_t make_token_maps(
    CUtensorMap& rows_map,
    CUtensorMap& narrow_map,
    const TileParams& p,
    const TileOperands& operands,
    int64_t reduced,
    int tokens,
    int columns) {
  const cudaError_t status = make_map(
      rows_map, tensor_map_type<T>(), sizeof(T), operands.rows, p.m, reduced, reduced, tokens, columns,
      CU_TENSOR_MAP_SWIZZLE_128B);
  if (status != cudaSuccess || p.r == 0) return status;
  const int64_t width = cut(p.r, 8) * 8;
  return make_map(
      narrow_map, tensor_map_type<T>(), sizeof(T), operands.narrow, p.m, width, width, tokens, columns,
      CU_TENSOR_MAP_SWIZZLE_128B);
}

// The product by shared_tiles.cu. Forward it may start while the kernel before it still makes scale * u.
struct SharedTiles {
  static constexpr int kRows = 128;  // of the transposed result, in a tile
  static constexpr int kTokens = 256;
  // What a wave of tiles takes, as measured on an H200, in cycles of `Launcher::plan` of tiles.cu.
  static double wave_cycles(int64_t reduced) { return static_cast<double>(cut(reduced, 64) + 6) * 1430; }
  static cudaError_t launch(
      DType dtype,
      bool backward,
      const TileParams& p,
      const TileOperands& operands,
      const DeviceLimits& limits,
      cudaStream_t stream);
};

}  // namespace fastlora
