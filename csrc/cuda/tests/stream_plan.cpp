// Holds the plans of few_rows_stream.cu to what the kernel relies on, over many sizes. Prints how many it looked at.

#include "../stream_plan.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

using fastlora::FewRowsForward;
using fastlora::StreamPlan;

namespace {

void require(bool holds, const char* what, const FewRowsForward& p, int64_t places, int64_t memory) {
  if (holds) return;
  std::fprintf(
      stderr, "%s: m %d, n %lld, k %lld, blocksize %d, %lld places of %lld bytes\n", what, p.m,
      static_cast<long long>(p.n), static_cast<long long>(p.k), p.blocksize, static_cast<long long>(places),
      static_cast<long long>(memory));
  std::exit(1);
}

bool check(const FewRowsForward& p, int64_t places, int64_t memory) {
  StreamPlan plan{};
  if (!make_plan(p, places, memory, plan)) return false;
  const auto must = [&](bool holds, const char* what) { require(holds, what, p, places, memory); };

  const int64_t most = plan.rows + (plan.more > 0 ? 1 : 0);
  must(plan.blocks > 0 && plan.rows > 0 && plan.more < plan.blocks, "blocks without rows");
  must(int64_t{plan.rows} * plan.blocks + plan.more == p.n, "rows left out");
  must(plan.capacity == most + 1, "no room for the row that is never stored");

  must(plan.warp_slices * p.m <= StreamPlan::kMaxSlices, "more of x than registers");
  must(plan.groups * plan.row_groups <= StreamPlan::kWarps, "more groups than warps");
  must(int64_t{plan.groups} * plan.warp_slices * StreamPlan::kSlice >= p.k, "columns left out");
  std::vector<int> owners(static_cast<size_t>(plan.groups * plan.row_groups), 0);
  for (int warp = 0; warp < StreamPlan::kWarps; ++warp) {
    const int group = static_cast<int>(plan.group_of >> 4 * warp & 15);
    const int row_group = static_cast<int>(plan.row_group_of >> 4 * warp & 15);
    must(group < plan.groups, "a warp without columns");
    if (row_group < plan.row_groups) ++owners[static_cast<size_t>(row_group * plan.groups + group)];
  }
  for (const int owner : owners) must(owner == 1, "a part without one owner");

  must(StreamPlan::kSegment << plan.log2_units == p.blocksize, "statistics of other segments");
  must(plan.pitch >= plan.groups * StreamPlan::kSegments && plan.pitch % 32 == 16, "sums that overlap");
  const int64_t piece = int64_t{plan.piece_rows} * plan.row_bytes,
                pieces = (most + plan.piece_rows - 1) / plan.piece_rows;
  must(plan.piece_rows == plan.row_groups * StreamPlan::kUnits * 2, "rows of a piece without a warp");
  must(plan.slots >= std::min<int64_t>(pieces, 2) && plan.slots <= StreamPlan::kMaxPieces, "slots");
  must(plan.row_bytes % 16 == 0 && plan.ring % 16 == 0, "copies that are not aligned");
  must(piece < 1 << 20, "more bytes than a barrier counts");

  std::array<std::pair<int64_t, int64_t>, 6> regions{{
      {StreamPlan::kBarriersAt, 2 * StreamPlan::kMaxPieces * 8},
      {StreamPlan::kStatisticsAt, StreamPlan::kStatistics},
      {StreamPlan::kTableAt, StreamPlan::kTable},
      {plan.sums, int64_t{p.m} * plan.capacity * plan.pitch * 4},
      {plan.absmax, int64_t{plan.capacity} * plan.segments * 4},
      {plan.ring, plan.slots * piece},
  }};
  std::sort(regions.begin(), regions.end());
  int64_t end = StreamPlan::kReserved;
  for (const auto& [start, bytes] : regions) {
    must(start >= end, "two things in one place");
    end = start + bytes;
  }
  must(end <= plan.shared && plan.shared <= memory, "more shared memory than there is");
  return true;
}

}  // namespace

int main() {
  int64_t plans = 0;
  FewRowsForward p{};
  for (const int64_t n : {1, 2, 7, 77, 131, 132, 133, 1024, 4096, 14336, 32001, 128256}) {
    for (int64_t k = 32; k <= 40000; k += k < 2048 ? 32 : 1056) {
      for (p.m = 1; p.m <= 3; ++p.m) {
        for (p.blocksize = 32; p.blocksize <= 4096; p.blocksize *= 2) {
          for (const int64_t places : {0, 1, 100, 132}) {
            for (const int64_t memory : {100 << 10, 227 << 10}) {
              p.n = n, p.k = k;
              const bool planned = check(p, places, memory);
              plans += planned;
              const bool never = p.m > 2 || k % 64 != 0 || p.blocksize < 64 || places == 0 || memory < 130 << 10;
              require(!(planned && never), "a plan for what the kernel does not take", p, places, memory);
              const bool always = k <= 8192 && n <= 32001 && places >= 100;
              require(planned || never || !always, "no plan", p, places, memory);
            }
          }
        }
      }
    }
  }
  std::printf("%lld plans\n", static_cast<long long>(plans));
  return 0;
}
