#include "dropout.h"

#include <algorithm>

#include "convert.h"

namespace fastlora {
namespace {

constexpr int64_t kLanes = 16;  // counters at a time, so that the rounds below become vector instructions

// The four words of kLanes counters that follow each other in a row.
void philox(uint64_t seed, uint32_t first, uint32_t row, uint32_t words[4 * kLanes]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    c0[i] = first + static_cast<uint32_t>(i);
    c1[i] = row;
    c2[i] = c3[i] = 0;
  }
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t low = uint64_t{c0[i]} * 0xD2511F53u, high = uint64_t{c2[i]} * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(high >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(low >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(high);
      c3[i] = static_cast<uint32_t>(low);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

float widened(float x) { return x; }
float widened(uint16_t x) { return from_bfloat16(x); }
void narrow(float x, float& out) { out = x; }
void narrow(float x, uint16_t& out) { out = to_bfloat16(x); }

template <typename T>
void rows(const DropoutParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.k;
    T* out = static_cast<T*>(p.out) + row * p.k;
    for (int64_t start = 0; start < p.k; start += 4 * kLanes) {
      uint32_t words[4 * kLanes];
      philox(*p.seed, static_cast<uint32_t>(start / 4), static_cast<uint32_t>(row), words);
      const int64_t count = std::min(4 * kLanes, p.k - start);
      for (int64_t i = 0; i < count; ++i) {
        const float kept = words[i] >= p.threshold && p.gain > 0 ? widened(x[start + i]) : 0.0f;
        narrow(kept * p.gain, out[start + i]);
      }
    }
  }
}

}  // namespace

void dropout_cpu(const DropoutParams& params, int64_t begin, int64_t end) {
  params.dtype == DType::kFloat32 ? rows<float>(params, begin, end) : rows<uint16_t>(params, begin, end);
}

}  // namespace fastlora
