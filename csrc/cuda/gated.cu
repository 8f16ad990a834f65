// The activation of a gated MLP, h = act(gate) * up, and in the same pass what its adapters make of it. No torch.
//
// A block takes a strip of columns (strips.cuh) and walks down rows, so that what it multiplies by, A of down or B of
// gate and up, stays where it is. u and du are sums over columns, dB and dA sums over rows.
//
// In a fragment of the tensor core, lane (g, t), g = lane / 4 and t = lane % 4, has pairs of what is summed over. For
// sums over columns these are neighbours in memory. For sums over rows a lane has columns of the rows 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9, and packs results of two rows; where the same results are summed over columns as well, one
// instruction turns 8 x 8 of them.

#include "strips.cuh"

namespace fastlora {
namespace {

constexpr int kGroups = 8;  // of columns, of a fragment
constexpr int kInner = 2;   // gate and up

#if defined(FASTLORA_HOPPER)

// 1 / (1 + exp(-x)). An exponential too small for a normal number adds nothing to 1, so it may as well be zero.
__device__ __forceinline__ float sigmoid(float x) {
  float exponential, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + exponential));
  return s;
}

// act(g) and act'(g), as fastlora/kernels/gated.py says.
template <Activation kActivation>
__device__ __forceinline__ float2 activate(float g) {
  if constexpr (kActivation == Activation::kSilu) {
    const float s = sigmoid(g), a = g * s;
    return make_float2(a, s + a * (1.0f - s));
  } else if constexpr (kActivation == Activation::kGelu) {
    const float cdf = 0.5f * (1.0f + erff(g * 0.7071067811865476f));
    return make_float2(g * cdf, cdf + g * 0.3989422804014327f * __expf(-0.5f * g * g));
  } else {
    const float s = sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
    const float slope = 1.5957691216057308f * (1.0f + 0.134145f * g * g);
    return make_float2(g * s, s + g * s * (1.0f - s) * slope);
  }
}

__device__ __forceinline__ float2 unpack(__nv_bfloat16, uint32_t two) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(__half, uint32_t two) {
  return __half22float2(*reinterpret_cast<const __half2*>(&two));
}

template <int kWords>
using Words = std::conditional_t<kWords == 4, uint4, uint2>;

template <int kWords>
__device__ __forceinline__ void load(const void* source, uint32_t (&words)[kWords]) {
  *reinterpret_cast<Words<kWords>*>(words) = *static_cast<const Words<kWords>*>(source);
}

template <int kWords>
__device__ __forceinline__ void store(void* target, const uint32_t (&words)[kWords]) {
  *static_cast<Words<kWords>*>(target) = *reinterpret_cast<const Words<kWords>*>(words);
}

// An 8 x 8 matrix, of which a lane has two neighbours of the row lane / 4, turned.
__device__ __forceinline__ uint32_t turned(uint32_t two) {
  uint32_t other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(two));
  return other;
}

#endif

// The buffers of a warp for what it reads in a step, by the tensor memory accelerator: kSlots steps are under way.
template <int kSlots, int kBytes>
class Arriving {
 public:
  struct Shared {
    alignas(1024) unsigned char of[kSlots][kBytes];
  };
  struct Barriers {
    uint64_t there[kSlots], read[kSlots];
  };

  __device__ __forceinline__ Arriving(Shared& buffers, Barriers& barriers) : buffers_(buffers), barriers_(barriers) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        init_barrier(shared_address(&barriers_.there[slot]), 1);
        init_barrier(shared_address(&barriers_.read[slot]), 32);
      }
      publish_barriers();
    }
    __syncwarp();
  }
  // Asks for step `index`; copy(target, barrier) of one lane copies kBytes.
  template <typename Copy>
  __device__ __forceinline__ void ask(int index, Copy copy) {
    if (threadIdx.x % 32 != 0) return;
    const int slot = index % kSlots;
    const uint32_t barrier = shared_address(&barriers_.there[slot]);
    expect_bytes(barrier, kBytes);
    copy(shared_address(buffers_.of[slot]), barrier);
  }
  // Where step `index` is, once it is there.
  __device__ __forceinline__ const unsigned char* await(int index) {
    const int slot = index % kSlots;
    wait_barrier(shared_address(&barriers_.there[slot]), static_cast<uint32_t>(index / kSlots % 2));
    return buffers_.of[slot];
  }
  // By all lanes, once each has loaded what it needs of step `index`: its buffer may be asked for again. A load that
  // was issued may still wait behind stores, for longer than a copy takes, so that the order of instructions is not
  // enough: a barrier knows of loads that are done.
  __device__ __forceinline__ void release(int index) {
    const uint32_t barrier = shared_address(&barriers_.read[index % kSlots]);
    arrive(barrier);
    if (threadIdx.x % 32 == 0) wait_barrier(barrier, static_cast<uint32_t>(index / kSlots % 2));
  }

 private:
  Shared& buffers_;
  Barriers& barriers_;
};

// gate, up and, backward, dh.
template <int kCount>
struct Maps {
  CUtensorMap of[kCount];
};

// kTiles: of 16 ranks.
template <int kTiles>
struct Forward {
  static constexpr int kWords = 4;  // of a lane in a row of a box
  static constexpr int kBoxColumns = 8 * kWords;
  static constexpr int kBoxes = 2;  // of a warp, side by side
  static constexpr int kBoxBytes = kFragment * kBoxColumns * 2;
  static constexpr int kSpan = kBoxes * kBoxColumns;  // columns of a warp
  static constexpr int kSteps = 2;                    // of kFragment rows, between two sums over the warps
  static constexpr int kSlots = 2;                    // steps under way
  using Sums = WarpSums<kSteps * kFragment, kFragment * kTiles>;
  using Buffers = Arriving<kSlots, kInner * kBoxes * kBoxBytes>;

  struct Shared {
    typename Buffers::Shared arriving[kWarps];
    Sums u[2];
    typename Buffers::Barriers barriers[kWarps];
  };
};

// Rows [first, first + part), as many as there are, of one strip of h, and u over that strip.
template <typename T, Activation kActivation, int kTiles>
__global__ void __launch_bounds__(kStripThreads, 2)
    gated_forward_kernel(const __grid_constant__ Maps<kInner> maps, const GatedForward p, int part) {
#if defined(FASTLORA_HOPPER)
  using S = Forward<kTiles>;
  constexpr int kWords = S::kWords, kHalves = 2, kRankTiles = kFragment / kTokens * kTiles;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int span0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * S::kSpan;
  const int first = static_cast<int>(blockIdx.y) * part;
  const int last = p.m - first > part ? first + part : static_cast<int>(p.m);
  const int steps = (last - first + kFragment - 1) / kFragment;
  typename S::Buffers arriving(shared.arriving[warp], shared.barriers[warp]);
  const auto ask = [&](int index) {
    if (index >= steps) return;
    arriving.ask(index, [&](uint32_t target, uint32_t barrier) {
#pragma unroll
      for (int box = 0; box < kInner * S::kBoxes; ++box) {
        const int column = span0 + box % S::kBoxes * S::kBoxColumns;
        copy_box(target + box * S::kBoxBytes, maps.of[box / S::kBoxes], column, first + index * kFragment, barrier);
      }
    });
  };
#pragma unroll
  for (int index = 0; index < S::kSlots; ++index) ask(index);
  uint32_t a[S::kBoxes][kRankTiles][kWords] = {};
#pragma unroll
  for (int box = 0; box < S::kBoxes; ++box) {
    const int64_t column = span0 + box * S::kBoxColumns + 2 * kWords * t;
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      if (column < p.n) load(static_cast<const T*>(p.lora_a) + (tile * kTokens + g) * p.n + column, a[box][tile]);
    }
  }
  T* h_row = static_cast<T*>(p.h) + int64_t{first + g} * p.n + span0 + 2 * kWords * t;
  int buffer = 0, index = 0;
  for (int top = first; top < last; top += S::kSteps * kFragment, buffer ^= 1) {
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      if (index >= steps) break;
      const int row0 = top + step * kFragment;
      uint32_t h[S::kBoxes][kHalves][kWords], up[S::kBoxes][kHalves][kWords];
      const unsigned char* there = arriving.await(index) + (g * 4 + t) * 2 * kWords * 2;
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box) {
#pragma unroll
        for (int i = 0; i < kHalves; ++i) {
          const unsigned char* from = there + box * S::kBoxBytes + i * S::kBoxBytes / 2;
          load(from, h[box][i]);
          load(from + S::kBoxes * S::kBoxBytes, up[box][i]);
        }
      }
      arriving.release(index);
      ask(index++ + S::kSlots);
      float u[kRankTiles][4] = {};
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box) {
#pragma unroll
        for (int i = 0; i < kHalves; ++i) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            const float2 gates = unpack(T{}, h[box][i][w]), ups = unpack(T{}, up[box][i][w]);
            h[box][i][w] =
                Numeric<T>::pack(activate<kActivation>(gates.x).x * ups.x, activate<kActivation>(gates.y).x * ups.y);
          }
          const bool inside = span0 + box * S::kBoxColumns + 2 * kWords * t < p.n;
          if (inside && row0 + g + 8 * i < last) store(h_row + 8 * i * p.n + box * S::kBoxColumns, h[box][i]);
        }
#pragma unroll
        for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
          for (int w = 0; w < kWords; w += 2) {
            Numeric<T>::mma(
                u[tile], h[box][0][w], h[box][1][w], h[box][0][w + 1], h[box][1][w + 1], a[box][tile][w],
                a[box][tile][w + 1]);
          }
        }
      }
      h_row += kFragment * p.n;
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        shared.u[buffer].put(warp, step * kFragment, tile * kTokens, u[tile]);
      }
    }
    // What the other buffer held was added up before the threads meet here, so the next steps may fill it.
    __syncthreads();
    shared.u[buffer].add_up(last - top, p.rd, p.parts + (blockIdx.x * p.m + top) * p.rd);
  }
#endif
}

// kTiles: of 16 ranks. A lane has fewer columns where there are more, since it keeps sums over rows for all of them.
template <int kTiles>
struct Backward {
  static constexpr int kColumns = 8 / kTiles;  // of a lane
  static constexpr int kWords = kColumns / 2;
  static constexpr int kSpan = kGroups * kColumns;  // of a warp
  static constexpr int kBoxBytes = kFragment * kSpan * 2;
  static constexpr int kRanks = kFragment * kTiles;
  static constexpr int kSteps = 2 / kTiles;  // of kFragment rows, between two sums of du over the warps
  static constexpr int kSlots = kTiles + 1;  // steps of rows under way
  using Sums = GroupSums<kSteps * kFragment, kInner * kRanks>;
  static constexpr int kAhead = 2;  // groups whose narrow rows are under way
  static constexpr int kNarrowSlots = kAhead + Sums::kBuffers;
  static constexpr int kFactors = kInner * kWords * kTiles;  // 16-byte words of B that a lane multiplies
  static constexpr int kNarrow = (kInner + 1) * kRanks;      // u of gate and of up, du of down, side by side
  static constexpr int kNarrowPitch = kNarrow + 8;           // eight rows of 16 bytes lie on different banks
  using Buffers = Arriving<kSlots, (kInner + 1) * kBoxBytes>;
  static constexpr CUtensorMapSwizzle kSwizzle = kTiles == 1 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;

  // Where the columns of group g begin in a row of a box.
  static __device__ __forceinline__ int place(int row, int g) {
    if constexpr (kTiles == 1) return row * 128 + (g ^ row % 8) * 16;
    return row * 64 + ((g / 2) ^ row / 2 % 4) * 16 + g % 2 * 8;
  }

  template <typename T>
  struct Shared {
    typename Buffers::Shared arriving[kWarps];
    typename Sums::Shared du;
    uint4 b[kWarps][kFactors][32];
    T narrow[kNarrowSlots][kSteps * kFragment][kNarrowPitch];
    typename Buffers::Barriers barriers[kWarps];
    uint64_t narrow_there[kNarrowSlots];
  };
};

// Rows [first, first + part), as many as there are, of one strip: dgate and dup, and what the adapters get of them.
template <typename T, Activation kActivation, int kTiles>
__global__ void __launch_bounds__(kStripThreads, 1)
    gated_gradients_kernel(const __grid_constant__ Maps<kInner + 1> maps, const GatedGradients p, int part) {
#if defined(FASTLORA_HOPPER)
  using S = Backward<kTiles>;
  constexpr int kWords = S::kWords, kColumns = S::kColumns, kRowsOfSum = S::kSteps * kFragment;
  constexpr int kRankTiles = S::kRanks / kTokens;  // of du
  constexpr int kRows = 4;                         // of a lane, in a step
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename S::template Shared<T>*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int span0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * S::kSpan, column0 = span0 + g * kColumns;
  const int first = static_cast<int>(blockIdx.y) * part;
  const int last = p.m - first > part ? first + part : static_cast<int>(p.m);
  const int steps = (last - first + kFragment - 1) / kFragment;
  const int up_column = p.shared ? 0 : p.r, width = p.shared ? p.r : kInner * p.r;
  const bool inside = column0 < p.n;

  typename S::Buffers arriving(shared.arriving[warp], shared.barriers[warp]);
  const auto ask = [&](int index) {
    if (index >= steps) return;
    arriving.ask(index, [&](uint32_t target, uint32_t barrier) {
      const int row0 = first + index * kFragment;
#pragma unroll
      for (int which = 0; which <= kInner; ++which) {
        copy_box(target + which * S::kBoxBytes, maps.of[which], span0, row0, barrier);
      }
    });
  };
#pragma unroll
  for (int index = 0; index < S::kSlots; ++index) ask(index);

  typename S::Sums of_du(shared.du);
  if (threadIdx.x == 0) {
#pragma unroll
    for (uint64_t& barrier : shared.narrow_there) init_barrier(shared_address(&barrier), kStripThreads);
  }
  __syncthreads();
  const auto copy_narrow = [&](int group) {
    const int slot = group % S::kNarrowSlots, top = first + group * kRowsOfSum;
    if (top >= last) return;
    constexpr int kPieces = S::kRanks * static_cast<int>(sizeof(T)) / 16;  // of a row of one of three
    for (int i = static_cast<int>(threadIdx.x); i < kRowsOfSum * (kInner + 1) * kPieces; i += kStripThreads) {
      const int piece = i % kPieces, which = i / kPieces % (kInner + 1), row = i / (kPieces * (kInner + 1));
      const int rank = piece * 8, ranks = which < kInner ? p.r : p.rd;
      const bool there = rank < ranks && top + row < last;
      const T* from =
          which < kInner ? static_cast<const T*>(p.u) + which * up_column : static_cast<const T*>(p.du_down);
      from += there ? int64_t{top + row} * (which < kInner ? width : p.rd) + rank : 0;
      copy_async(&shared.narrow[slot][row][which * S::kRanks + rank], from, there);
    }
    arrive_after_copies(shared_address(&shared.narrow_there[slot]));
  };
#pragma unroll
  for (int group = 0; group < S::kAhead; ++group) copy_narrow(group);

  // The rows of B that this warp multiplies: pairs of columns of dgate and dup that lie in neighbouring groups.
  const auto of_b = [&](int inner, int tile, int word) {
    T two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t column = span0 + (2 * t + i) * kColumns + word;
      const int rank = tile * kTokens + g;
      const bool there = column < p.n && rank < p.r;
      const T* b = static_cast<const T*>(p.lora_b) + (inner * p.n + column) * width + inner * up_column + rank;
      two[i] = there ? *b : Numeric<T>::narrow(0.0f);
    }
    return *reinterpret_cast<const uint32_t*>(two);
  };
#pragma unroll
  for (int inner = 0; inner < kInner; ++inner) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        shared.b[warp][(inner * kWords + w) * kTiles + i][lane] = make_uint4(
            of_b(inner, 2 * i, 2 * w), of_b(inner, 2 * i, 2 * w + 1), of_b(inner, 2 * i + 1, 2 * w),
            of_b(inner, 2 * i + 1, 2 * w + 1));
      }
    }
  }

  const int64_t row_of_lane = first + 2 * t;
  T* dgate_row = static_cast<T*>(p.dgate) + row_of_lane * p.stride_d + column0;
  T* dup_row = static_cast<T*>(p.dup) + row_of_lane * p.stride_d + column0;
  float sums[kInner + 1][kColumns][kTiles][4] = {};  // dB of gate and of up, dA

  // The matrices of 8 ranks and 8 rows that make a fragment of turned ranks.
  const int narrow_row = lane % 8 + lane / 16 * 8, narrow_rank = lane / 8 % 2 * 8;
  const auto add_up = [&](int group) {
    const int top = first + group * kRowsOfSum;
    of_du.add_up(group, last - top, width, p.du_parts + (blockIdx.x * p.m + top) * width);
  };
  int group = 0, index = 0;
  for (int top = first; top < last; top += kRowsOfSum, ++group) {
    copy_narrow(group + S::kAhead);
    const int narrow_slot = group % S::kNarrowSlots;
    wait_barrier(shared_address(&shared.narrow_there[narrow_slot]), static_cast<uint32_t>(group / S::kNarrowSlots % 2));
#pragma unroll 1
    for (int step = 0; step < S::kSteps; ++step) {
      if (index >= steps) break;
      const int row0 = top + step * kFragment;
      uint32_t gate[kRows][kWords], up[kRows][kWords], dh[kRows][kWords];
      const unsigned char* there = arriving.await(index);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const unsigned char* from = there + S::place(2 * t + i % 2 + i / 2 * 8, g);
        load(from, gate[i]);
        load(from + S::kBoxBytes, up[i]);
        load(from + 2 * S::kBoxBytes, dh[i]);
      }
      arriving.release(index);
      ask(index++ + S::kSlots);
      float du[kInner][kRankTiles][4] = {};
      uint32_t of_rows[kInner + 1][kTiles][4];  // ranks, of pairs of rows
#pragma unroll
      for (int which = 0; which <= kInner; ++which) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const T* from = &shared.narrow[narrow_slot][step * kFragment + narrow_row]
                                        [which * S::kRanks + tile * kFragment + narrow_rank];
          load_turned(shared_address(from), of_rows[which][tile]);
        }
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t pairs[kInner + 1][2][2];  // of rows: dgate, dup and h; of the column 2 w and the next; from 0 and 8
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float of_gate[2][2], of_up[2][2], of_h[2][2];  // of a row and a column
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 gates = unpack(T{}, gate[2 * half + i][w]), ups = unpack(T{}, up[2 * half + i][w]);
            const float2 dhs = unpack(T{}, dh[2 * half + i][w]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float2 active = activate<kActivation>(j == 0 ? gates.x : gates.y);
              const float one_up = j == 0 ? ups.x : ups.y, one_dh = j == 0 ? dhs.x : dhs.y;
              of_gate[i][j] = one_dh * one_up * active.y;
              of_up[i][j] = one_dh * active.x;
              of_h[i][j] = active.x * one_up;
            }
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            pairs[0][j][half] = Numeric<T>::pack(of_gate[0][j], of_gate[1][j]);
            pairs[1][j][half] = Numeric<T>::pack(of_up[0][j], of_up[1][j]);
            pairs[2][j][half] = Numeric<T>::pack(of_h[0][j], of_h[1][j]);
          }
          gate[2 * half][w] = lower_halves(pairs[0][0][half], pairs[0][1][half]);
          gate[2 * half + 1][w] = upper_halves(pairs[0][0][half], pairs[0][1][half]);
          up[2 * half][w] = lower_halves(pairs[1][0][half], pairs[1][1][half]);
          up[2 * half + 1][w] = upper_halves(pairs[1][0][half], pairs[1][1][half]);
        }
#pragma unroll
        for (int which = 0; which <= kInner; ++which) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const uint32_t (&a)[4] = of_rows[which][tile];
              Numeric<T>::mma(
                  sums[which][2 * w + j][tile], a[0], a[1], a[2], a[3], pairs[which][j][0], pairs[which][j][1]);
            }
          }
        }
#pragma unroll
        for (int inner = 0; inner < kInner; ++inner) {
          const uint32_t a0 = turned(pairs[inner][0][0]), a1 = turned(pairs[inner][0][1]);
          const uint32_t a2 = turned(pairs[inner][1][0]), a3 = turned(pairs[inner][1][1]);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint4 b = shared.b[warp][(inner * kWords + w) * kTiles + i][lane];
            Numeric<T>::mma(du[inner][2 * i], a0, a1, a2, a3, b.x, b.y);
            Numeric<T>::mma(du[inner][2 * i + 1], a0, a1, a2, a3, b.z, b.w);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int down = i % 2 + i / 2 * 8;
        if (!inside || row0 + 2 * t + down >= last) continue;
        store(dgate_row + down * p.stride_d, gate[i]);
        store(dup_row + down * p.stride_d, up[i]);
      }
      dgate_row += kFragment * p.stride_d;
      dup_row += kFragment * p.stride_d;
      if (step == 0) of_du.open(group);
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        if (tile * kTokens >= p.r) break;
        if (p.shared) {
#pragma unroll
          for (int i = 0; i < 4; ++i) du[0][tile][i] += du[1][tile][i];
        } else {
          of_du.of(group).put(warp, step * kFragment, p.r + tile * kTokens, du[1][tile]);
        }
        of_du.of(group).put(warp, step * kFragment, tile * kTokens, du[0][tile]);
      }
    }
    of_du.close(group);
    if (group > 0) add_up(group - 1);
  }
  add_up(group - 1);

  // Column n of a fragment is a group, of which the lane has two, so 2 kColumns neighbours of the ranks g and g + 8.
  float* parts = p.parts + blockIdx.y * (kInner * p.n * p.r + p.rd * p.n);
#pragma unroll
  for (int neighbour = 0; neighbour < 2 * kColumns; ++neighbour) {
    const int64_t column = span0 + 2 * t * kColumns + neighbour;
    const int side = neighbour / kColumns, i = neighbour % kColumns;
    if (column >= p.n) break;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int rank = tile * kFragment + second * 8 + g;
        if (rank < p.r) {
#pragma unroll
          for (int inner = 0; inner < kInner; ++inner) {
            parts[(inner * p.n + column) * p.r + rank] = sums[inner][i][tile][2 * second + side];
          }
        }
        if (rank < p.rd) parts[kInner * p.n * p.r + rank * p.n + column] = sums[kInner][i][tile][2 * second + side];
      }
    }
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------- host

int tiles_of(int ranks) { return ranks / kFragment; }

template <typename T, typename Params, int kCount>
cudaError_t make_maps(
    Maps<kCount>& maps,
    const Params& p,
    const void* const (&sources)[kCount],
    int box_columns,
    CUtensorMapSwizzle swizzle) {
  for (int i = 0; i < kCount; ++i) {
    const cudaError_t status = make_map(
        maps.of[i], tensor_map_type<T>(), sizeof(T), sources[i], p.m, p.n, i < kInner ? p.stride : p.n, kFragment,
        box_columns, swizzle);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T, Activation kActivation, int kTiles>
cudaError_t launch(const GatedForward& p, const StripPlan& plan, cudaStream_t stream) {
  using S = Forward<kTiles>;
  static Slots slots;
  Maps<kInner> maps{};
  cudaError_t status = make_maps<T>(maps, p, {p.gate, p.up}, S::kBoxColumns, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (status != cudaSuccess) return status;
  status =
      launch_strips<typename S::Shared>(slots, gated_forward_kernel<T, kActivation, kTiles>, plan, stream, maps, p);
  if (status != cudaSuccess) return status;
  const int64_t numel = p.m * p.rd;
  return add_parts<1>({{whole_parts(p.parts, p.u, numel, numel, plan.strips, p.dtype)}}, stream);
}

template <typename T, Activation kActivation, int kTiles>
cudaError_t launch(const GatedGradients& p, const StripPlan& plan, cudaStream_t stream) {
  using S = Backward<kTiles>;
  static Slots slots;
  Maps<kInner + 1> maps{};
  cudaError_t status = make_maps<T>(maps, p, {p.gate, p.up, p.dh}, S::kSpan, S::kSwizzle);
  if (status != cudaSuccess) return status;
  status = launch_strips<typename S::template Shared<T>>(
      slots, gated_gradients_kernel<T, kActivation, kTiles>, plan, stream, maps, p);
  if (status != cudaSuccess) return status;
  const int64_t of_b = kInner * p.n * p.r, of_a = p.n * p.rd, of_du = p.m * (p.shared ? 1 : kInner) * p.r;
  const AllParts<3> all{
      {whole_parts(p.parts, p.db, of_b, of_b + of_a, plan.parts, p.db_dtype, p.scale_gate, p.scale_up),
       whole_parts(p.parts + of_b, p.da, of_a, of_b + of_a, plan.parts, p.da_dtype),
       whole_parts(p.du_parts, p.du, of_du, of_du, plan.strips, p.dtype)}};
  return add_parts(all, stream);
}

int ranks_of(const GatedForward& p) { return p.rd; }
int ranks_of(const GatedGradients& p) { return p.r > p.rd ? p.r : p.rd; }

template <typename T, Activation kActivation, typename Params>
cudaError_t launch(const Params& p, const StripPlan& plan, cudaStream_t stream) {
  return tiles_of(ranks_of(p)) == 1 ? launch<T, kActivation, 1>(p, plan, stream)
                                    : launch<T, kActivation, 2>(p, plan, stream);
}

template <typename T, typename Params>
cudaError_t launch(const Params& p, const StripPlan& plan, cudaStream_t stream) {
  switch (p.activation) {
    case Activation::kSilu:
      return launch<T, Activation::kSilu>(p, plan, stream);
    case Activation::kGelu:
      return launch<T, Activation::kGelu>(p, plan, stream);
    case Activation::kGeluTanh:
      return launch<T, Activation::kGeluTanh>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Params>
cudaError_t launch(const Params& p, const StripPlan& plan, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(p, plan, stream);
  if (p.dtype == DType::kFloat16) return launch<__half>(p, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int gated_forward_plan(int64_t m, int64_t n, StripPlan& plan) {
  static_assert(Forward<1>::kSpan == Forward<2>::kSpan);
  constexpr int64_t kStrip = kWarps * Forward<1>::kSpan;
  return plan_strips(m, cut(n, kStrip), kFragment, kFragment * kStrip * 6, 0, plan);
}

int gated_gradients_plan(int64_t m, int64_t n, int r, int rd, StripPlan& plan) {
  const int64_t strip = kWarps * (tiles_of(r > rd ? r : rd) == 1 ? Backward<1>::kSpan : Backward<2>::kSpan);
  return plan_strips(m, cut(n, strip), kFragment, kFragment * strip * 10, (kInner * r + rd) * n * 8, plan);
}

int gated_forward_cuda(const GatedForward& params, const StripPlan& plan, void* stream) {
  return launch(params, plan, static_cast<cudaStream_t>(stream));
}

int gated_gradients_cuda(const GatedGradients& params, const StripPlan& plan, void* stream) {
  return launch(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace fastlora
