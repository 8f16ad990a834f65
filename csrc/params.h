// What a launcher takes: plain data, so that kernels and bindings share no other header. No torch.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace fastlora {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct DequantizeParams {
  const uint8_t* w_packed;  // (ceil(n * k / 2),)

  const float* absmax;         // (blocks,), flat statistics, or null
  const uint8_t* absmax_q;     // (blocks,), nested statistics, or null
  const float* absmax_scale;   // (ceil(blocks / 256),)
  const float* absmax_code;    // (256,)
  const float* absmax_offset;  // one value

  void* out;           // (n, k), rows out_stride elements apart
  int64_t n;           // out_features
  int64_t k;           // in_features
  int64_t out_stride;  // in elements
  int32_t blocksize;   // a power of two from 32 to 4096
  QuantType quant_type;
  DType dtype;
  bool nested;
};

enum class CpuCapability : int32_t { kPlain = 0, kAVX2 = 1, kAVX512 = 2 };

// The most capable path that this processor runs.
CpuCapability cpu_capability();

// Dequantizes the elements [start, stop) of the flattened matrix. Calls for disjoint ranges may run at once.
void dequantize_cpu(const DequantizeParams& params, CpuCapability capability, int64_t start, int64_t stop);

// One launch on `stream` (a cudaStream_t). Returns a cudaError_t.
int dequantize_cuda(const DequantizeParams& params, void* stream);
const char* cuda_error_string(int status);

}  // namespace fastlora
