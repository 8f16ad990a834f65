// How few_rows_stream.cu divides a product: the rows of W among blocks, a block's among its warps, shared memory among
// what lies there. Host code without CUDA.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastlora {

struct StreamPlan {
  static constexpr int kWarps = 16;   // that multiply
  static constexpr int kMaxRows = 2;  // of x
  static constexpr int kSegment = 64;
  static constexpr int kSegments = 8;
  static constexpr int kSlice = kSegment * kSegments;  // columns that a warp multiplies at once
  static constexpr int kMaxSlices = 4;   // of all rows of x to a warp, whose part of them stays in registers
  static constexpr int kUnits = 2;       // pairs of rows of W that a warp multiplies at once
  static constexpr int kMaxPieces = 32;  // in shared memory at once
  // A table of pairs of codes, by byte of W. Entries lie 256 bytes apart, so that a byte of W is a byte of an address.
  static constexpr int kEntry = 256;
  static constexpr int kTable = 256 * kEntry;
  static constexpr int kTableAt = kTable;
  static constexpr int kReserved = 1024;  // the system's, or nobody's
  static constexpr int kBarriersAt = kReserved;
  static constexpr int kStatisticsAt = kBarriersAt + 2 * kMaxPieces * 8;
  static constexpr int kStatistics = 256 * 4;

  int blocks;
  int rows, more;                   // of W to a block; the first `more` blocks have one besides
  int capacity;                     // the most rows of a block, and one that is never stored
  int row_bytes;                    // of W
  int segments;                     // of a row of W
  int slices;                       // of a row of W
  int warp_slices;                  // 1, 2 or 4: slices of a warp, `groups` apart
  int groups;                       // of warps, by their first slice
  int row_groups;                   // warps with the same slices, which share the rows
  uint64_t group_of, row_group_of;  // of each warp, four bits each
  int piece_rows;                   // of one copy
  int slots;                        // pieces that shared memory holds
  int pitch;                        // float32 sums of an output, from one to the next
  int log2_units;                   // segments to a block of statistics
  int absmax, sums, ring, shared;   // addresses in shared memory, and their end
};

// The plan for p and `places` blocks at once with `shared_memory` bytes each; false where the kernel does not take p.
inline bool make_plan(const FewRowsForward& p, int64_t places, int64_t shared_memory, StreamPlan& plan) {
  using Plan = StreamPlan;
  const auto cut = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  if (p.m > Plan::kMaxRows || p.k % Plan::kSegment != 0 || p.blocksize < Plan::kSegment) return false;
  if (p.n < 1 || p.k < 1 || p.n * p.k / Plan::kSegment > INT32_MAX || places < 1) return false;
  plan.slices = static_cast<int>(cut(p.k, Plan::kSlice));
  // Rows that are multiplied at once, for each slice of a warp: the most, and of equals the fewest slices.
  int best = 0;
  for (int slices = 1; slices * p.m <= Plan::kMaxSlices; slices *= 2) {
    const int64_t groups = cut(plan.slices, slices);
    if (groups > Plan::kWarps) continue;
    const int row_groups = Plan::kWarps / static_cast<int>(groups);
    const int rate = row_groups * Plan::kMaxSlices / slices;
    if (rate <= best) continue;
    plan.warp_slices = slices;
    plan.groups = static_cast<int>(groups);
    plan.row_groups = row_groups;
    best = rate;
  }
  if (best == 0) return false;
  plan.group_of = plan.row_group_of = 0;
  for (int warp = 0; warp < Plan::kWarps; ++warp) {
    plan.group_of |= static_cast<uint64_t>(warp % plan.groups) << 4 * warp;
    plan.row_group_of |= static_cast<uint64_t>(warp / plan.groups) << 4 * warp;
  }
  plan.piece_rows = plan.row_groups * Plan::kUnits * 2;
  plan.row_bytes = static_cast<int>(p.k / 2);
  plan.segments = static_cast<int>(p.k / Plan::kSegment);
  plan.pitch = (plan.groups * Plan::kSegments + 15) / 32 * 32 + 16;  // neighbours on different halves of the banks
  plan.log2_units = 0;
  while (Plan::kSegment << plan.log2_units < p.blocksize) ++plan.log2_units;

  const int64_t piece_bytes = int64_t{plan.row_bytes} * plan.piece_rows;
  for (int64_t blocks = p.n < places ? p.n : places;; blocks *= 2) {
    const int64_t rows = cut(p.n, blocks), pieces = cut(rows, plan.piece_rows);
    // Below the table what fits there, the rest behind it.
    int64_t low = Plan::kStatisticsAt + Plan::kStatistics, high = Plan::kTableAt + Plan::kTable;
    const auto take = [&](int64_t bytes) {
      bytes = cut(bytes, 128) * 128;
      int64_t& at = low + bytes <= Plan::kTableAt ? low : high;
      at += bytes;
      return static_cast<int>(at - bytes);
    };
    plan.sums = take(p.m * (rows + 1) * plan.pitch * 4);
    plan.absmax = take((rows + 1) * plan.segments * 4);
    const int64_t room = high < shared_memory ? (shared_memory - high) / piece_bytes : 0;
    const int64_t most = pieces < Plan::kMaxPieces ? pieces : Plan::kMaxPieces;
    const int64_t slots = room < most ? room : most;
    if (slots >= (pieces < 2 ? pieces : 2)) {
      plan.blocks = static_cast<int>(blocks);
      plan.rows = static_cast<int>(p.n / blocks);
      plan.more = static_cast<int>(p.n % blocks);
      plan.capacity = static_cast<int>(rows) + 1;
      plan.slots = static_cast<int>(slots);
      plan.ring = static_cast<int>(high);
      plan.shared = static_cast<int>(high + slots * piece_bytes);
      return true;
    }
    if (rows <= plan.piece_rows) return false;
  }
}

}  // namespace fastlora
