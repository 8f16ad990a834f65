// What a launcher takes: plain data, so that kernels and bindings share no other header. No torch.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace fastlora {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A packed matrix (n, k) and its statistics.
struct PackedWeight {
  const uint8_t* w_packed;  // (ceil(n * k / 2),)

  const float* absmax;         // (blocks,), flat statistics, or null
  const uint8_t* absmax_q;     // (blocks,), nested statistics, or null
  const float* absmax_scale;   // (ceil(blocks / 256),)
  const float* absmax_code;    // (256,)
  const float* absmax_offset;  // one value

  int64_t n;          // out_features
  int64_t k;          // in_features
  int32_t blocksize;  // a power of two from 32 to 4096
  QuantType quant_type;
  bool nested;
};

struct DequantizeParams : PackedWeight {
  void* out;           // (n, k), rows out_stride elements apart
  int64_t out_stride;  // in elements
  DType dtype;
};

// Which elements of a matrix are dropped, as fastlora/dropout.py says.
struct DropoutMask {
  const uint64_t* seed;  // one word, where the kernel runs; null: no dropout
  uint32_t threshold;    // words below it are dropped
  float gain;            // what the others are multiplied by; 0: all are dropped
};

// out = dropout(x), (m, k) each, contiguous; out may be x.
struct DropoutParams : DropoutMask {
  const void* x;
  void* out;
  int64_t m;
  int64_t k;
  DType dtype;
};

// dx += dropout(du A), the sum rounded once. Contiguous; r is at least 1.
struct DroppedGradient : DropoutMask {
  const void* du;      // (m, r) of dtype
  const void* lora_a;  // (r, k) of adapter_dtype
  void* dx;            // (m, k) of dtype, 16-byte aligned
  int64_t m;
  int64_t k;
  int32_t r;
  DType dtype;
  DType adapter_dtype;  // dtype or float32
};

// The most rows of x or dy that the kernels for few rows take.
constexpr int32_t kMaxFewRows = 64;

// y = x W^T + scale * (u B^T) + bias, u = dropout(x) A^T. Matrices are contiguous; m is at least 1. r may be 0, and
// lora_a, lora_b and u null. `Count` holds m and r: 32 bits where kernels compute with them on a GPU.
template <typename Count>
struct LinearForward : PackedWeight {
  const void* x;        // (m, k) of dtype
  const void* dropped;  // (m, k) of dtype: dropout(x), of which u is made; null without dropout
  const void* lora_a;   // (r, k) of adapter_dtype
  const void* lora_b;   // (n, r) of adapter_dtype
  const void* bias;     // (n,) of bias_dtype, or null
  void* y;              // (m, n) of out_dtype
  void* u;              // (m, r) of dtype
  float scale;
  Count m;
  Count r;
  DType dtype;
  DType adapter_dtype;  // dtype or float32, as bias_dtype and out_dtype
  DType bias_dtype;
  DType out_dtype;
};

// du = scale * (dy B), dx = dy W + du A, dA = du^T x, dB = scale * (dy^T u). The same conditions; dx, da and db may be
// null where they are not needed, x and da together, u and db together. du is needed for dx and for da.
template <typename Count>
struct LinearBackward : PackedWeight {
  const void* dy;      // (m, n) of dtype
  const void* x;       // (m, k) of dtype
  const void* u;       // (m, r) of dtype
  const void* lora_a;  // (r, k) of adapter_dtype
  const void* lora_b;  // (n, r) of adapter_dtype
  void* du;            // (m, r) of dtype
  void* dx;            // (m, k) of dtype
  void* da;            // (r, k) of adapter_dtype
  void* db;            // (n, r) of adapter_dtype
  float scale;
  Count m;
  Count r;
  DType dtype;
  DType adapter_dtype;
};

// How A or B is stored where it is not dense: elements value * scale, row after row.
struct PackedFactor {
  static constexpr int kBlocksize = 64;
  const float* scales;  // of each row; with nf4 of each kBlocksize elements. Null: the factor is dense
  bool nf4;             // two elements to a byte, the first in its upper half; otherwise int8
};

// On a GPU, in bfloat16 or float16: m is at most kMaxFewRows, k a multiple of 32, backward n a multiple of 8; pointers
// are 16-byte aligned.
using FewRowsForward = LinearForward<int32_t>;
using FewRowsBackward = LinearBackward<int32_t>;

// A type of its own, so that kernels of dense adapters are not told of others: with more parameters they start later.
struct FewRowsPacked : FewRowsForward {
  PackedFactor packed_a, packed_b;
};

// On a CPU, in bfloat16 or float32: n and k are at least 1.
using CpuForward = LinearForward<int64_t>;
struct CpuBackward : LinearBackward<int64_t> {
  DropoutMask dropout;  // of du A in dx; x is dropped already
};

// y = sums + scale * (u B^T) + bias, from float32 sums of a product. Contiguous; y may be sums. r may be 0.
struct FinishParams {
  const float* sums;   // (m, n), 16-byte aligned as y
  const void* u;       // (m, r) of dtype
  const void* lora_b;  // (n, r) of adapter_dtype
  const void* bias;    // (n,) of bias_dtype, or null
  void* y;             // (m, n) of out_dtype
  int64_t m;
  int64_t n;
  int32_t r;
  float scale;
  DType dtype;
  DType adapter_dtype;
  DType bias_dtype;
  DType out_dtype;
};

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// h = act(gate) * up, and u = h A^T of down.
struct GatedForward {
  const void* gate;  // (m, n) of dtype, rows `stride` elements apart, as up
  const void* up;
  const void* lora_a;  // (rd, n) of dtype
  void* h;             // (m, n) of dtype
  void* u;             // (m, rd) of dtype
  float* parts;        // (strips, m, rd): u of a strip of columns
  int64_t m;
  int64_t n;
  int64_t stride;
  int32_t rd;  // 16 or 32
  Activation activation;
  DType dtype;
};

// dgate and dup of h = act(gate) * up, and what the adapters around it get: du of gate and up, dB of both, dA of down.
struct GatedGradients {
  const void* gate;  // (m, n) of dtype, rows `stride` elements apart, as up
  const void* up;
  const void* dh;       // (m, n) of dtype, contiguous
  void* dgate;          // (m, n) of dtype, rows `stride_d` elements apart, as dup; may be gate
  void* dup;            // may be up
  const void* u;        // (m, 2 r) of dtype: of gate, and of up; where `shared` (m, r), of both
  const void* du_down;  // (m, rd) of dtype
  const void* lora_b;   // (2 n, columns of u) of dtype, multiplied by the scales: of gate, and below it of up
  void* du;             // (m, columns of u) of dtype
  void* db;             // (2 n, r) of db_dtype: of gate, and below it of up
  void* da;             // (rd, n) of da_dtype
  float* parts;         // (parts, 2 n r + rd n): dB and dA of a part of the rows
  float* du_parts;      // (strips, m, columns of u): du of a strip of columns
  float scale_gate;
  float scale_up;
  int64_t m;
  int64_t n;
  int64_t stride;
  int64_t stride_d;
  int32_t r;  // 16 or 32, as rd
  int32_t rd;
  bool shared;
  Activation activation;
  DType dtype;
  DType db_dtype;
  DType da_dtype;
};

// du_i = dy_i B_i and dB_i = scale_i * dy_i^T u_i of up to four projections.
struct DuDb {
  static constexpr int32_t kMost = 4;
  const void* dy[kMost];  // (m, n[i]) of dtype, rows stride[i] elements apart
  int64_t n[kMost];
  int64_t stride[kMost];
  float scale[kMost];
  const void* u;       // (m, count r) of dtype
  const void* lora_b;  // (total, count r) of dtype, block diagonal, multiplied by the scales
  void* joined;        // (m, total) of dtype: all dy side by side; or null
  void* du;            // (m, count r) of dtype
  void* db;            // (total, r) of db_dtype
  float* du_parts;     // (strips, m, r): du of a strip of columns
  float* db_parts;     // (parts, total r): dB of a part of the rows
  int64_t m;
  int64_t total;  // the sum of n
  int32_t count;
  int32_t r;  // 16 or 32
  DType dtype;
  DType db_dtype;
};

// How the work is cut: `parts` of at most `rows` rows, and `strips` of columns.
struct StripPlan {
  int64_t rows;
  int32_t parts;
  int32_t strips;
};

enum class CpuCapability : int32_t { kPlain = 0, kAVX2 = 1, kAVX512 = 2, kAVX512BF16 = 3 };

// The most capable path that this processor runs.
CpuCapability cpu_capability();

// Dequantizes the elements [start, stop) of the flattened matrix. Calls for disjoint ranges may run at once.
void dequantize_cpu(const DequantizeParams& params, CpuCapability capability, int64_t start, int64_t stop);

// One launch on `stream` (a cudaStream_t). Returns a cudaError_t.
int dequantize_cuda(const DequantizeParams& params, void* stream);

// Chained launches on `stream`, on the current device. Return a cudaError_t.
int few_rows_forward_cuda(const FewRowsForward& params, void* stream);
int few_rows_packed_cuda(const FewRowsPacked& params, void* stream);
int few_rows_backward_cuda(const FewRowsBackward& params, void* stream);
// Any m, for compute capability 9.0: k a multiple of 64, n of 8, blocksize of 64. `scaled_u`, filled: (m, r rounded up
// to a multiple of 8) of dtype. Backward r is a multiple of 8; without `sides` du is there, and dx alone is made.
int tile_forward_cuda(const FewRowsForward& params, void* scaled_u, void* stream);
int tile_backward_cuda(const FewRowsBackward& params, bool sides, void* stream);
int finish_cuda(const FinishParams& params, void* stream);
// One launch each, of any dtype and of bfloat16 or float16.
int dropout_cuda(const DropoutParams& params, void* stream);
int dropped_gradient_cuda(const DroppedGradient& params, void* stream);
// On the current device, which a plan is for. m is at most 2^30, n is a multiple of 8, rows and pointers are 16-byte
// aligned.
int gated_forward_plan(int64_t m, int64_t n, StripPlan& plan);
int gated_forward_cuda(const GatedForward& params, const StripPlan& plan, void* stream);
int gated_gradients_plan(int64_t m, int64_t n, int r, int rd, StripPlan& plan);
int gated_gradients_cuda(const GatedGradients& params, const StripPlan& plan, void* stream);
int du_db_plan(const DuDb& params, StripPlan& plan);
int du_db_cuda(const DuDb& params, const StripPlan& plan, void* stream);

// Whether there is code for compute capability 9.0, without which what asks for it fails to launch there.
bool has_hopper_code();

// What a status means. The runtime forgets it: the next launch, of whomever, would be said to have failed.
const char* take_cuda_error(int status);

}  // namespace fastlora
