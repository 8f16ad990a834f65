// The statistics of a weight that is decoded in registers.

namespace fastlora {
namespace {

// Whether every run of 32 elements of a row that begins at a multiple of 32 lies in bytes and a block of its own.
inline bool in_whole_blocks(const PackedWeight& w) { return w.k % 32 == 0; }

// Rows lie pages apart, which no prefetcher of the processor foresees.
constexpr int kRowsAhead = 16;

class Blocks {
 public:
  explicit Blocks(const PackedWeight& w)
      : w_(w), shift_(__builtin_ctz(static_cast<unsigned>(w.blocksize))), offset_(w.nested ? *w.absmax_offset : 0.0f) {
    for (int i = 0; i < kCodes; ++i) code_[i] = code_value(w.quant_type, i);
  }

  // Whether the run at `element` begins a block, if a block has more than one.
  bool begins_block(int64_t element) const { return (element & (w_.blocksize - 1)) == 0; }

  void prefetch(int64_t element) const { __builtin_prefetch(packed(element)); }

 protected:
  const uint8_t* packed(int64_t element) const { return w_.w_packed + element / 2; }

  float absmax(int64_t element) const {
    const int64_t block = element >> shift_;
    if (!w_.nested) return w_.absmax[block];
    return nested_absmax(w_.absmax_code[w_.absmax_q[block]], w_.absmax_scale[block / kNestedBlocksize], offset_);
  }

  alignas(64) float code_[kCodes];

 private:
  const PackedWeight& w_;
  int shift_;
  float offset_;
};

}  // namespace
}  // namespace fastlora
