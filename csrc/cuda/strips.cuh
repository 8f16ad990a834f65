// Passes over wide matrices that walk down strips of columns: what the kernels of the gated activation and of the
// adapters' gradients share. For compute capability 9.0. No torch.
//
// What is read goes to shared memory, each warp's own columns a few steps ahead: a multiprocessor has more bytes under
// way than its registers could take. Sums over columns are added up by the warps of a block, those of its strips by a
// second launch. Sums over rows stay in registers until a block ends, and the same launch adds up the blocks. The order
// of every sum is fixed, so two runs give the same bits.
#pragma once

#include "hopper.cuh"

namespace fastlora {

constexpr int kStripThreads = 256;
constexpr int kWarps = kStripThreads / 32;

// Four 8 x 8 matrices in shared memory: lane l gives where the row l % 8 of matrix l / 8 begins, and gets two
// neighbours of the row lane / 4 of each; turned, of the column.
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row));
}
__device__ __forceinline__ void load_turned(uint32_t row, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row));
}

// What the warps of a block have of kRowsOfSum rows of a sum over columns, at most kColumns wide.
template <int kRowsOfSum, int kColumns>
struct WarpSums {
  static constexpr int kPitch = kColumns + 8;  // rows that a warp stores at once lie on different banks
  float of[kWarps][kRowsOfSum][kPitch];

  // What a lane has of a fragment: two neighbours of the rows g and g + 8.
  __device__ __forceinline__ void put(int warp, int row, int column, const float (&sums)[4]) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
    *reinterpret_cast<float2*>(&of[warp][row + g][column + 2 * t]) = make_float2(sums[0], sums[1]);
    *reinterpret_cast<float2*>(&of[warp][row + g + 8][column + 2 * t]) = make_float2(sums[2], sums[3]);
  }

  // out (rows, width) is the sum over the warps, by all threads; width is a power of two.
  __device__ __forceinline__ void add_up(int rows, int width, float* out) const {
    const int pairs = width / 2, shift = __ffs(pairs) - 1;
    const int count = (rows < kRowsOfSum ? rows : kRowsOfSum) * pairs;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kStripThreads) {
      const int row = i >> shift, column = (i & (pairs - 1)) * 2;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float2 one = *reinterpret_cast<const float2*>(&of[warp][row][column]);
        sum.x += one.x, sum.y += one.y;
      }
      reinterpret_cast<float2*>(out)[i] = sum;
    }
  }
};

// The same for one group of rows after the other, without a meeting of the warps: one may be kBuffers groups ahead of
// another. A warp opens a group, puts its sums, closes it, and adds up its share of the group before, for which it
// hardly waits. Each thread arrives for itself: the sanitizer does not see that one may do so for its warp.
template <int kRowsOfSum, int kColumns>
class GroupSums {
 public:
  static constexpr int kBuffers = 2;
  struct Shared {
    WarpSums<kRowsOfSum, kColumns> of[kBuffers];
    uint64_t there[kBuffers], read[kBuffers];
  };

  // By all threads, which meet before they use it.
  __device__ __forceinline__ explicit GroupSums(Shared& shared) : shared_(shared) {
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) {
      init_barrier(shared_address(&shared.there[i]), kStripThreads);
      init_barrier(shared_address(&shared.read[i]), kStripThreads);
    }
  }
  __device__ __forceinline__ WarpSums<kRowsOfSum, kColumns>& of(int group) { return shared_.of[group % kBuffers]; }
  __device__ __forceinline__ void open(int group) {
    if (group < kBuffers) return;
    wait_barrier(shared_address(&shared_.read[group % kBuffers]), static_cast<uint32_t>((group / kBuffers - 1) % 2));
  }
  __device__ __forceinline__ void close(int group) { arrive(shared_address(&shared_.there[group % kBuffers])); }
  __device__ __forceinline__ void add_up(int group, int rows, int width, float* out) {
    const int slot = group % kBuffers;
    wait_barrier(shared_address(&shared_.there[slot]), static_cast<uint32_t>(group / kBuffers % 2));
    shared_.of[slot].add_up(rows, width, out);
    arrive(shared_address(&shared_.read[slot]));
  }

 private:
  Shared& shared_;
};

// A matrix of rows of `width` elements, `out_stride` apart: scale * the sum of `count` such matrices without gaps,
// `stride` elements apart. `scale` of the upper half is its own.
struct PartsOf {
  const float* parts;
  void* out;
  int64_t numel;  // a multiple of width, which is one of 8
  int64_t stride;
  int32_t count;
  DType dtype;
  float lower, upper;
  int64_t width, out_stride;
};

// One that lies without gaps.
inline PartsOf whole_parts(
    const float* parts,
    void* out,
    int64_t numel,
    int64_t stride,
    int32_t count,
    DType dtype,
    float lower = 1.0f,
    float upper = 1.0f) {
  return {parts, out, numel, stride, count, dtype, lower, upper, numel, numel};
}

template <int kOutputs>
struct AllParts {
  PartsOf of[kOutputs];
};

constexpr int kQuad = 4;     // elements of a thread
constexpr int kSharers = 4;  // threads, side by side, each of which adds every fourth part

template <int kOutputs>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const AllParts<kOutputs> p) {
  const int thread = static_cast<int>(threadIdx.x), sharer = thread % kSharers;
  int64_t index = (static_cast<int64_t>(blockIdx.x) * (kThreads / kSharers) + thread / kSharers) * kQuad;
#pragma unroll
  for (int which = 0; which < kOutputs; ++which) {
    const PartsOf& of = p.of[which];
    if (index >= of.numel) {
      index -= of.numel;
      continue;
    }
    const float* from = of.parts + index + sharer * of.stride;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int i = sharer; i < of.count; i += kSharers) {
      const float4 one = __ldg(reinterpret_cast<const float4*>(from));
      sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
      from += kSharers * of.stride;
    }
    // The sharers of an element have come here together, not all of their warp.
    const unsigned sharers = ((1u << kSharers) - 1) << (thread % 32 / kSharers * kSharers);
#pragma unroll
    for (int apart = 1; apart < kSharers; apart *= 2) {
      sum.x += __shfl_xor_sync(sharers, sum.x, apart), sum.y += __shfl_xor_sync(sharers, sum.y, apart);
      sum.z += __shfl_xor_sync(sharers, sum.z, apart), sum.w += __shfl_xor_sync(sharers, sum.w, apart);
    }
    if (sharer > 0) return;
    const float scale = index < of.numel / 2 ? of.lower : of.upper;
    sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
    const int64_t place = of.width == of.numel ? index : index / of.width * of.out_stride + index % of.width;
    if (of.dtype == DType::kFloat32) {
      reinterpret_cast<float4*>(of.out)[place / kQuad] = sum;
    } else if (of.dtype == DType::kBFloat16) {
      reinterpret_cast<uint2*>(of.out)[place / kQuad] =
          make_uint2(Numeric<__nv_bfloat16>::pack(sum.x, sum.y), Numeric<__nv_bfloat16>::pack(sum.z, sum.w));
    } else {
      reinterpret_cast<uint2*>(of.out)[place / kQuad] =
          make_uint2(Numeric<__half>::pack(sum.x, sum.y), Numeric<__half>::pack(sum.z, sum.w));
    }
    return;
  }
}

// ---------------------------------------------------------------------------------------------------------------- host

template <int kOutputs>
cudaError_t add_parts(const AllParts<kOutputs>& p, cudaStream_t stream) {
  int64_t numel = 0;
  for (const PartsOf& of : p.of) numel += of.numel;
  if (numel == 0) return cudaSuccess;
  add_parts_kernel<kOutputs>
      <<<static_cast<unsigned>(cut(numel * kSharers, kThreads * kQuad)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// `kernel` on the grid of `plan`, with `Shared` as its shared memory; it takes the rows of a part last.
// slots_of_kernel: its own.
template <typename Shared, typename... Parameters, typename... Arguments>
cudaError_t launch_strips(
    Slots& slots_of_kernel,
    void (*kernel)(Parameters...),
    const StripPlan& plan,
    cudaStream_t stream,
    const Arguments&... arguments) {
  constexpr int kShared = sizeof(Shared);
  static_assert(kShared <= 227 * 1024);
  DeviceLimits limits{};
  cudaError_t status = current_limits(limits);
  if (status != cudaSuccess) return status;
  if (!limits.hopper || kShared > limits.shared_memory) return cudaErrorInvalidConfiguration;
  const int* slots = nullptr;  // asked for what the query sets: how much shared memory a block may have
  status = slots_of_kernel.find(kernel, kStripThreads, kShared, limits, slots);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(plan.strips), static_cast<unsigned>(plan.parts));
  kernel<<<grid, kStripThreads, kShared, stream>>>(arguments..., static_cast<int>(plan.rows));
  return cudaGetLastError();
}

// How m rows of `strips` strips are cut into parts of steps of `step` rows. In bytes of a multiprocessor: what a step
// moves, what starting and ending a block takes meanwhile, and what each part leaves to be added up, of which all
// multiprocessors move their share.
inline cudaError_t plan_strips(
    int64_t m, int64_t strips, int64_t step, int64_t of_step, int64_t of_part, StripPlan& plan) {
  DeviceLimits limits{};
  if (const cudaError_t status = current_limits(limits); status != cudaSuccess) return status;
  const int64_t steps = cut(m, step);
  constexpr int64_t kOfBlock = 1 << 17, kMostParts = 64;
  int64_t best = INT64_MAX;
  for (int64_t parts = 1; parts <= kMostParts && parts <= steps; ++parts) {
    const int64_t waves = cut(strips * parts, limits.multiprocessors);
    const int64_t bytes = waves * (cut(steps, parts) * of_step + kOfBlock) + parts * of_part / limits.multiprocessors;
    if (bytes >= best) continue;
    best = bytes;
    plan.rows = cut(steps, parts) * step;
  }
  plan.strips = static_cast<int32_t>(strips);
  plan.parts = static_cast<int32_t>(cut(m, plan.rows));
  return cudaSuccess;
}

}  // namespace fastlora
