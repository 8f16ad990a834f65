// Transposition one word at a time, for float32.

namespace fastlora {
namespace {

inline void transpose_floats(
    const void* source,
    int64_t row_bytes,
    int64_t rows,
    int64_t count,
    uint32_t* out,
    int64_t stride,
    int64_t out_rows) {
  const char* src = static_cast<const char*>(source);
  for (int64_t w = 0; w < count; ++w) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + w * stride + r, src + r * row_bytes + 4 * w, 4);
    for (int64_t r = rows > 0 ? rows : 0; r < out_rows; ++r) out[w * stride + r] = 0;
  }
}

}  // namespace
}  // namespace fastlora
