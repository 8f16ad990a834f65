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

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
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

// ---------------------------------------------------------------------------------------------------------------- host

// A map of a contiguous matrix (rows, columns) for boxes of (box_rows, box_columns).
inline cudaError_t make_map(
    CUtensorMap& map,
    CUtensorMapDataType type,
    int element_bytes,
    const void* base,
    int64_t rows,
    int64_t columns,
    int box_rows,
    int box_columns,
    CUtensorMapSwizzle swizzle) {
  using Encode = CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = nullptr;
  if (encode == nullptr) {
    // Through the runtime, so that nothing links against the driver.
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) return status;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode>(function);
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * static_cast<cuuint64_t>(element_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(
      &map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastlora
