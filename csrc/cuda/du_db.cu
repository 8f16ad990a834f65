// du = dy B and dB = scale * dy^T u from one read of dy. No torch.
//
// A block takes a strip of columns (strips.cuh) and walks down rows, so that the rows of B that it multiplies by stay
// in registers. Both products take their fragments from the same rows in shared memory, for dB turned as they are
// loaded. Threads ask for these copies, which on an H200 come sooner than boxes of the tensor memory accelerator.

#include "strips.cuh"

namespace fastlora {
namespace {

constexpr int kSpan = 64;  // columns of a warp
constexpr int kStrip = kWarps * kSpan;
constexpr int kStepRows = 32;
constexpr int kSlots = 3;  // steps whose rows are there or under way
constexpr int kRowBytes = kSpan * 2;
constexpr int kStepBytes = kStepRows * kRowBytes;

// kTiles: of 16 ranks.
template <int kTiles>
struct Shared {
  using Sums = GroupSums<kStepRows, kFragment * kTiles>;
  static constexpr int kRankBytes = kFragment * kTiles * 2;
  static constexpr int kPitch = kRankBytes + 16;  // eight rows of 16 bytes lie on different banks
  static constexpr int kAhead = 2;                // steps whose rows of u are under way
  static constexpr int kNarrowSlots = kAhead + Sums::kBuffers;
  alignas(128) unsigned char dy[kWarps][kSlots][kStepBytes];
  alignas(128) unsigned char u[kNarrowSlots][kStepRows * kPitch];
  typename Sums::Shared du;
  uint64_t u_there[kNarrowSlots];
};

#if defined(FASTLORA_HOPPER)

// Where 16 bytes of a row of dy lie: eight rows on different banks.
__device__ __forceinline__ int place(int row, int chunk) { return row * kRowBytes + (chunk ^ row % 8) * 16; }

#endif

// Rows [first, first + part), as many as there are, of one strip of one dy.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kStripThreads, 1) du_db_kernel(const __grid_constant__ DuDb p, int part) {
#if defined(FASTLORA_HOPPER)
  constexpr int kRanks = kFragment * kTiles, kRankTiles = kRanks / kTokens;
  constexpr int kInnerTiles = kSpan / kFragment, kColumnTiles = kSpan / kTokens;
  using S = Shared<kTiles>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<S*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  int which = 0, strip = static_cast<int>(blockIdx.x);
  int64_t above = 0;  // columns of the projections before it
  while (which + 1 < p.count && strip * int64_t{kStrip} >= p.n[which]) {
    strip -= static_cast<int>((p.n[which] + kStrip - 1) / kStrip);
    above += p.n[which++];
  }
  const int64_t n = p.n[which], width = int64_t{p.count} * kRanks;
  const int span0 = strip * kStrip + warp * kSpan;
  const int first = static_cast<int>(blockIdx.y) * part;
  const int last = p.m - first > part ? first + part : static_cast<int>(p.m);
  const int steps = (last - first + kStepRows - 1) / kStepRows;

  // A warp copies its columns of dy, a lane 16 bytes of every fourth row.
  constexpr int kCopies = kStepRows / 4;
  auto& buffers = shared.dy[warp];
  const int chunk = lane % 8, row = lane / 8, column = span0 + chunk * 8;
  const int64_t stride = p.stride[which];
  const T* dy_row = static_cast<const T*>(p.dy[which]) + int64_t{first + row} * stride + column;
  int asked = 0;
  const auto ask = [&] {
    if (asked < steps) {
      unsigned char* target = buffers[asked % kSlots];
      const int row0 = first + asked * kStepRows;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool inside = column < n && row0 + row + 4 * i < p.m;
        copy_async(target + place(row + 4 * i, chunk), inside ? dy_row : p.dy[which], inside);
        dy_row += 4 * stride;
      }
    }
    ++asked;
    commit_copies();  // an empty group where there is no such step
  };
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) ask();

  if (threadIdx.x == 0) {
#pragma unroll
    for (uint64_t& barrier : shared.u_there) init_barrier(shared_address(&barrier), kStripThreads);
  }
  typename S::Sums du(shared.du);
  __syncthreads();
  // All warps read the same rows of u, and copy them together. The buffer that step `index` takes was last read in one
  // of which this warp has added up du: all have read it.
  const auto copy_u = [&](int index) {
    if (index >= steps) return;
    constexpr int kPieces = S::kRankBytes / 16;
    const int slot = index % S::kNarrowSlots, piece = static_cast<int>(threadIdx.x) % kPieces;
    const int of_step = static_cast<int>(threadIdx.x) / kPieces, of_u = first + index * kStepRows + of_step;
    if (of_step < kStepRows) {
      const bool inside = of_u < p.m;
      const T* from = static_cast<const T*>(p.u) + (inside ? of_u * width + which * kRanks + piece * 8 : 0);
      copy_async(&shared.u[slot][of_step * S::kPitch + piece * 16], from, inside);
    }
    arrive_after_copies(shared_address(&shared.u_there[slot]));
  };
#pragma unroll
  for (int index = 0; index < S::kAhead; ++index) copy_u(index);

  uint32_t b[kInnerTiles][kRankTiles][2] = {};
#pragma unroll
  for (int inner = 0; inner < kInnerTiles; ++inner) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = span0 + inner * kFragment + half * 8 + 2 * t;
      if (at >= n) continue;  // of columns that are not there dy is zero
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        const T* from = static_cast<const T*>(p.lora_b) + (above + at) * width + which * kRanks + tile * kTokens + g;
        const T two[2] = {from[0], from[width]};
        b[inner][tile][half] = *reinterpret_cast<const uint32_t*>(two);
      }
    }
  }
  const auto add_up = [&](int index) {
    const int top = first + index * kStepRows;
    du.add_up(index, last - top, kRanks, p.du_parts + (blockIdx.x * p.m + top) * kRanks);
  };

  float db[kColumnTiles][kTiles][4] = {};
  T* joined_row = static_cast<T*>(p.joined) + int64_t{first + row} * p.total + above + column;
  // Where this lane's row of four matrices begins: of 16 rows and 16 columns of dy, of 16 rows and ranks of u.
  const uint32_t dy_place = place(lane % 16, lane / 16);
  const uint32_t u_place = (lane % 8 + lane / 16 * 8) * S::kPitch + lane / 8 % 2 * 16;
  for (int index = 0; index < steps; ++index) {
    copy_u(index + S::kAhead);
    ask();  // into the buffer of the step before
    wait_copies<kSlots - 1>();
    __syncwarp();
    const unsigned char* of_step = buffers[index % kSlots];
    if (p.joined != nullptr) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const auto eight = *reinterpret_cast<const uint4*>(of_step + place(row + 4 * i, chunk));
        const bool inside = column < n && first + index * kStepRows + row + 4 * i < p.m;
        if (inside) *reinterpret_cast<uint4*>(joined_row) = eight;
        joined_row += 4 * p.total;
      }
    }
    const int u_slot = index % S::kNarrowSlots;
    wait_barrier(shared_address(&shared.u_there[u_slot]), static_cast<uint32_t>(index / S::kNarrowSlots % 2));
    du.open(index);
    const uint32_t dy_there = shared_address(of_step) + dy_place, u_there = shared_address(shared.u[u_slot]) + u_place;
#pragma unroll
    for (int half = 0; half < kStepRows / kFragment; ++half) {
      uint32_t u[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load_turned(u_there + half * kFragment * S::kPitch + tile * kFragment * 2, u[tile]);
      }
      float products[kRankTiles][4] = {};
#pragma unroll
      for (int inner = 0; inner < kInnerTiles; ++inner) {
        // Two chunks further: no carry beyond the bits of a chunk.
        const uint32_t from = (dy_there + half * kFragment * kRowBytes) ^ (inner * 32);
        uint32_t dy[4];
        load_matrices(from, dy);
#pragma unroll
        for (int tile = 0; tile < kRankTiles; ++tile) {
          Numeric<T>::mma(products[tile], dy[0], dy[1], dy[2], dy[3], b[inner][tile][0], b[inner][tile][1]);
        }
        load_turned(from, dy);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t (&ranks)[4] = u[tile];
          Numeric<T>::mma(db[2 * inner][tile], ranks[0], ranks[1], ranks[2], ranks[3], dy[0], dy[1]);
          Numeric<T>::mma(db[2 * inner + 1][tile], ranks[0], ranks[1], ranks[2], ranks[3], dy[2], dy[3]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        du.of(index).put(warp, half * kFragment, tile * kTokens, products[tile]);
      }
    }
    du.close(index);
    if (index > 0) add_up(index - 1);
    __syncwarp();  // all lanes have read the rows of this step
  }
  add_up(steps - 1);

  float* parts = p.db_parts + (blockIdx.y * p.total + above) * kRanks;
#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile) {
    const int64_t at = span0 + tile * kTokens + 2 * t;
    if (at >= n) break;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        parts[(at + j % 2) * kRanks + i * kFragment + j / 2 * 8 + g] = p.scale[which] * db[tile][i][j];
      }
    }
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------- host

template <typename T, int kTiles>
cudaError_t launch(const DuDb& p, const StripPlan& plan, cudaStream_t stream) {
  static Slots slots;
  const cudaError_t status = launch_strips<Shared<kTiles>>(slots, du_db_kernel<T, kTiles>, plan, stream, p);
  if (status != cudaSuccess) return status;
  AllParts<1 + DuDb::kMost> all{};
  const int64_t of_db = p.total * p.r, of_du = p.m * p.r;
  all.of[0] = whole_parts(p.db_parts, p.db, of_db, of_db, plan.parts, p.db_dtype);
  int64_t strip = 0;
  for (int i = 0; i < p.count; ++i) {
    const auto strips = static_cast<int32_t>(cut(p.n[i], kStrip));
    PartsOf& of = all.of[1 + i];
    of = whole_parts(p.du_parts + strip * of_du, static_cast<T*>(p.du) + i * p.r, of_du, of_du, strips, p.dtype);
    of.width = p.r;
    of.out_stride = int64_t{p.count} * p.r;
    strip += strips;
  }
  return add_parts(all, stream);
}

template <typename T>
cudaError_t launch(const DuDb& p, const StripPlan& plan, cudaStream_t stream) {
  return p.r == kFragment ? launch<T, 1>(p, plan, stream) : launch<T, 2>(p, plan, stream);
}

}  // namespace

int du_db_plan(const DuDb& p, StripPlan& plan) {
  int64_t strips = 0;
  for (int i = 0; i < p.count; ++i) strips += cut(p.n[i], kStrip);
  const int64_t of_step = kStepRows * kStrip * 2 * (p.joined == nullptr ? 1 : 2);
  return plan_strips(p.m, strips, kStepRows, of_step, p.total * p.r * 8, plan);
}

int du_db_cuda(const DuDb& p, const StripPlan& plan, void* stream) {
  const auto of_stream = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(p, plan, of_stream);
  if (p.dtype == DType::kFloat16) return launch<__half>(p, plan, of_stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastlora
