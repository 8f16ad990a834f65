// The CPU kernels against plain loops in double precision, over many odd sizes, on every path of this processor. Built
// with -fsanitize=address,undefined. Every operand ends where a page begins that nobody may touch, since the sanitizer
// does not see what vector instructions under a mask read.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../convert.h"
#include "../cross_entropy.h"
#include "../dropout.h"
#include "../linear.h"

namespace {

using namespace fastlora;
using Values = std::vector<double>;

std::mt19937 generator(1);

int64_t random_integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Memory that ends where a page without access begins.
template <typename T>
struct Guarded {
  using value_type = T;
  static constexpr size_t kPage = size_t{1} << 16;  // at least that of the machine

  static size_t mapped(size_t count) { return (count * sizeof(T) + kPage - 1) / kPage * kPage; }
  static T* allocate(size_t count) {
    const size_t bytes = mapped(count);
    void* memory = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    char* end = static_cast<char*>(memory) + bytes;
    if (mprotect(end, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    return reinterpret_cast<T*>(end) - count;
  }
  static void deallocate(T* data, size_t count) {
    munmap(reinterpret_cast<char*>(data + count) - mapped(count), mapped(count) + kPage);
  }
  bool operator==(const Guarded&) const { return true; }
  bool operator!=(const Guarded&) const { return false; }
};

template <typename T>
using Buffer = std::vector<T, Guarded<T>>;

// A matrix in the type of the kernels, and its values.
struct Tensor {
  Buffer<float> wide;
  Buffer<uint16_t> narrow;
  DType dtype;

  Tensor(int64_t count, DType type) : dtype(type) {
    if (type == DType::kFloat32) {
      wide.resize(count);
    } else {
      narrow.resize(count);
    }
  }

  static Tensor random(int64_t count, DType type, float size) {
    Tensor t(count, type);
    std::normal_distribution<float> normal(0.0f, size);
    for (int64_t i = 0; i < count; ++i) {
      const float x = normal(generator);
      if (type == DType::kFloat32) {
        t.wide[i] = x;
      } else {
        t.narrow[i] = to_bfloat16(x);
      }
    }
    return t;
  }

  void* data() { return dtype == DType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  int64_t size() const { return static_cast<int64_t>(dtype == DType::kFloat32 ? wide.size() : narrow.size()); }
  double at(int64_t i) const { return dtype == DType::kFloat32 ? wide[i] : from_bfloat16(narrow[i]); }

  // The values as the kernels multiply them.
  Values values(DType compute) const {
    Values out(size());
    for (int64_t i = 0; i < size(); ++i) {
      out[i] = compute == DType::kFloat32 ? at(i) : from_bfloat16(to_bfloat16(static_cast<float>(at(i))));
    }
    return out;
  }
};

struct Weight {
  Buffer<uint8_t> packed, absmax_q;
  Buffer<float> absmax, absmax_scale, absmax_code;
  float absmax_offset = 0.4f;
  PackedWeight params{};

  Weight(int64_t n, int64_t k, int32_t blocksize, QuantType type, bool nested) {
    const int64_t blocks = (n * k + blocksize - 1) / blocksize;
    packed.resize((n * k + 1) / 2);
    for (auto& byte : packed) byte = static_cast<uint8_t>(random_integer(0, 255));
    std::uniform_real_distribution<float> real(0.05f, 0.5f);
    params.w_packed = packed.data();
    if (nested) {
      absmax_q.resize(blocks);
      absmax_scale.resize((blocks + kNestedBlocksize - 1) / kNestedBlocksize);
      absmax_code.resize(256);
      for (auto& q : absmax_q) q = static_cast<uint8_t>(random_integer(0, 255));
      for (auto& scale : absmax_scale) scale = real(generator);
      for (auto& code : absmax_code) code = real(generator);
      params.absmax_q = absmax_q.data();
      params.absmax_scale = absmax_scale.data();
      params.absmax_code = absmax_code.data();
      params.absmax_offset = &absmax_offset;
    } else {
      absmax.resize(blocks);
      for (auto& value : absmax) value = real(generator);
      params.absmax = absmax.data();
    }
    params.n = n;
    params.k = k;
    params.blocksize = blocksize;
    params.quant_type = type;
    params.nested = nested;
  }

  Values values(DType compute) const {
    Values out(params.n * params.k);
    for (int64_t i = 0; i < params.n * params.k; ++i) {
      const int64_t block = i / params.blocksize;
      const float a =
          params.nested
              ? nested_absmax(absmax_code[absmax_q[block]], absmax_scale[block / kNestedBlocksize], absmax_offset)
              : absmax[block];
      const float x = code_value(params.quant_type, nibble_at(packed.data(), i)) * a;
      out[i] = compute == DType::kFloat32 ? x : from_bfloat16(to_bfloat16(x));
    }
    return out;
  }
};

// a (m, k) times b, which is (n, k), or (k, n) if `down`.
Values product(const Values& a, const Values& b, int64_t m, int64_t n, int64_t k, bool down) {
  Values out(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a[i * k + l] * (down ? b[l * n + j] : b[j * k + l]);
      out[i * n + j] = sum;
    }
  }
  return out;
}

Values transposed(const Values& a, int64_t rows, int64_t columns) {
  Values out(a.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = a[i * columns + j];
  }
  return out;
}

void compare(const char* name, const Tensor& got, const Values& want, const std::string& where, int roundings = 1) {
  double largest = 0, worst = 0;
  for (const double x : want) largest = std::max(largest, std::abs(x));
  for (int64_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got.at(i) - want[i]);
    if (!(error <= worst)) worst = error;
  }
  const double allowed = roundings * (got.dtype == DType::kFloat32 ? 4e-6 : 4e-3) * largest;
  if (worst <= allowed) return;
  std::printf("%s: %s errs by %g, allowed %g\n", where.c_str(), name, worst, allowed);
  std::exit(1);
}

void check(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t r,
    int32_t blocksize,
    QuantType type,
    bool nested,
    DType dtype,
    DType adapter_dtype,
    CpuCapability capability) {
  const std::string where = "m " + std::to_string(m) + " n " + std::to_string(n) + " k " + std::to_string(k) + " r " +
                            std::to_string(r) + " blocksize " + std::to_string(blocksize) + " type " +
                            std::to_string(static_cast<int>(dtype)) + " path " +
                            std::to_string(static_cast<int>(capability));
  // In three parts, the last one first.
  const Threads threads{3, [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
                          for (int64_t i = 2; i >= 0; --i) {
                            const int64_t begin = count * i / 3, end = count * (i + 1) / 3;
                            if (begin < end) body(begin, end);
                          }
                        }};
  const float scale = 0.5f;
  Weight weight(n, k, blocksize, type, nested);
  Tensor x = Tensor::random(m * k, dtype, 1), dy = Tensor::random(m * n, dtype, 1);
  Tensor a = Tensor::random(r * k, adapter_dtype, 0.1f), b = Tensor::random(n * r, adapter_dtype, 0.5f);
  Tensor bias = Tensor::random(n, adapter_dtype, 1);
  Tensor u(m * r, dtype), y(m * n, dtype), du(m * r, dtype), dx(m * k, dtype);
  Tensor da(r * k, adapter_dtype), db(n * r, adapter_dtype);
  const bool dropping = r > 0 && random_integer(0, 1) == 1;
  const uint64_t seed = 0xfedcba9876543210ull;
  const DropoutMask mask{&seed, 0x40000000u, 4.0f / 3};
  Tensor dropped(m * k, dtype), keep(m * k, DType::kFloat32);
  for (float& one : keep.wide) one = 1;
  dropout_cpu({mask, x.data(), dropped.data(), m, k, dtype}, capability, 0, m);
  dropout_cpu({mask, keep.data(), keep.data(), m, k, DType::kFloat32}, capability, 0, m);

  CpuForward f{weight.params};
  f.x = x.data();
  f.dropped = dropping ? dropped.data() : nullptr;
  f.lora_a = r > 0 ? a.data() : nullptr;
  f.lora_b = r > 0 ? b.data() : nullptr;
  f.bias = bias.data();
  f.y = y.data();
  f.u = u.data();
  f.scale = scale;
  f.m = m;
  f.r = r;
  f.dtype = f.out_dtype = dtype;
  f.adapter_dtype = f.bias_dtype = adapter_dtype;
  linear_forward_cpu(f, capability, threads);

  CpuBackward g{{weight.params}};
  g.dy = dy.data();
  g.dx = dx.data();
  g.scale = scale;
  g.m = m;
  g.r = r;
  g.dtype = dtype;
  g.adapter_dtype = adapter_dtype;
  if (r > 0) {
    g.x = dropping ? dropped.data() : x.data();
    if (dropping) g.dropout = mask;
    g.u = u.data();
    g.lora_a = a.data();
    g.lora_b = b.data();
    g.du = du.data();
    g.da = da.data();
    g.db = db.data();
  }
  linear_backward_cpu(g, capability, threads);

  // Each step from the rounded results of the one before, so that only its own error is seen.
  const Values w = weight.values(dtype), xs = x.values(dtype), dys = dy.values(dtype);
  const Values as = a.values(dtype), bs = b.values(dtype), us = u.values(dtype), dus = du.values(dtype);
  Values want = product(xs, w, m, n, k, false);
  const Values lora = product(us, bs, m, n, r, false);
  for (int64_t i = 0; i < m * n; ++i) want[i] += scale * lora[i] + bias.at(i % n);
  compare("y", y, want, where);
  want = product(dys, w, m, k, n, true);
  const Values dx_lora = product(dus, as, m, k, r, true);
  for (int64_t i = 0; i < m * k; ++i) want[i] += dropping ? keep.at(i) * dx_lora[i] : dx_lora[i];
  compare("dx", dx, want, where, dropping ? 3 : 1);  // du A, dropped, and the sum
  if (r == 0) return;
  const Values side = dropping ? dropped.values(dtype) : xs;
  compare("u", u, product(side, as, m, r, k, false), where);
  want = product(dys, bs, m, r, n, true);
  for (double& value : want) value *= scale;
  compare("du", du, want, where);
  compare("da", da, product(transposed(dus, m, r), side, r, k, m, true), where);
  want = transposed(product(transposed(us, m, r), dys, r, n, m, true), r, n);
  for (double& value : want) value *= scale;
  compare("db", db, want, where);
}

// The dense matrix, block by block in parts of any size, into rows with a gap between them, which nobody may touch.
template <typename T>
void check_dequantize(
    int64_t n,
    int64_t k,
    int32_t blocksize,
    QuantType type,
    bool nested,
    DType dtype,
    T (*round)(float),
    CpuCapability capability) {
  const Weight weight(n, k, blocksize, type, nested);
  const int64_t stride = k + random_integer(0, 3), count = n * k, blocks = (count + blocksize - 1) / blocksize;
  const T untouched = 77;
  Buffer<T> out(stride * (n - 1) + k, untouched);
  const DequantizeParams p{weight.params, out.data(), stride, dtype};
  for (int64_t block = 0, next; block < blocks; block = next) {
    next = std::min(blocks, block + random_integer(1, 5));
    dequantize_cpu(p, capability, block * blocksize, std::min(next * blocksize, count));
  }
  const Values want = weight.values(DType::kFloat32);
  for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
    const int64_t row = i / stride, column = i % stride;
    if (out[i] == (column < k ? round(static_cast<float>(want[row * k + column])) : untouched)) continue;
    std::printf(
        "dequantize %lld x %lld, blocksize %d, path %d, type %d: wrong at %lld, %lld\n", static_cast<long long>(n),
        static_cast<long long>(k), blocksize, static_cast<int>(capability), static_cast<int>(dtype),
        static_cast<long long>(row), static_cast<long long>(column));
    std::exit(1);
  }
}

// Dropout against the definition of Philox, one element at a time.
void check_dropout(int64_t m, int64_t k, DType dtype, CpuCapability capability) {
  const std::string where = " in dropout of " + std::to_string(m) + " x " + std::to_string(k);
  Tensor x = Tensor::random(m * k, dtype, 1.0f), out(m * k, dtype);
  const uint64_t seed = 0x0123456789abcdefull;
  const DropoutParams p{{&seed, 0x40000000u, 4.0f / 3}, x.data(), out.data(), m, k, dtype};
  dropout_cpu(p, capability, 0, m);
  const Values xs = x.values(dtype);
  Values want(m * k);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      uint32_t c[4] = {static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), 0, 0};
      uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
      for (int round = 0; round < 10; ++round) {
        const uint64_t low = uint64_t{c[0]} * 0xD2511F53u, high = uint64_t{c[2]} * 0xCD9E8D57u;
        const uint32_t next[4] = {
            static_cast<uint32_t>(high >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(high),
            static_cast<uint32_t>(low >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(low)};
        std::copy(next, next + 4, c);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
      }
      want[row * k + column] = c[column % 4] >= p.threshold ? xs[row * k + column] * p.gain : 0.0;
    }
  }
  compare("dropout", out, want, where);
}

// Rows of logits, of which one in three has a label that is ignored.
void check_cross_entropy(int64_t m, int64_t v, float smoothing, DType dtype, CpuCapability capability) {
  const std::string where = " in the cross-entropy of " + std::to_string(m) + " x " + std::to_string(v) + " path " +
                            std::to_string(static_cast<int>(capability));
  Tensor logits = Tensor::random(m * v, dtype, 3.0f), losses(m, DType::kFloat32);
  Buffer<int64_t> labels(m);
  for (auto& label : labels) label = random_integer(0, 2) == 0 ? -100 : random_integer(0, v - 1);
  const float scale = 0.25f;
  const Values z = logits.values(dtype);
  Values want(m * v), want_losses(m);
  for (int64_t row = 0; row < m; ++row) {
    if (labels[row] == -100) continue;
    double total = 0, plain = 0;
    for (int64_t i = row * v; i < (row + 1) * v; ++i) {
      total += std::exp(z[i]);
      plain += z[i];
    }
    const double lse = std::log(total), eps = smoothing, count = static_cast<double>(v);
    want_losses[row] = (1 - eps) * (lse - z[row * v + labels[row]]) + eps * (lse - plain / count);
    for (int64_t i = 0; i < v; ++i) {
      want[row * v + i] = scale * (std::exp(z[row * v + i] - lse) - (i == labels[row] ? 1 - eps : 0) - eps / count);
    }
  }
  CrossEntropyParams p{logits.data(), labels.data(), losses.wide.data(), &scale, v, -100, smoothing, true, dtype};
  cross_entropy_cpu(p, capability, 0, m);
  compare("losses", losses, want_losses, where);
  compare("gradient", logits, want, where);
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 40;
  int64_t checks = 0;
  for (int path = 0; path <= static_cast<int>(cpu_capability()); ++path) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (int i = 0; i < count; ++i, ++checks) {
        // One size in three is a multiple of 32, as the vector paths like it.
        const int64_t unit = i % 3 == 0 ? 32 : 1;
        const int64_t n = unit * random_integer(1, 96 / unit), k = unit * random_integer(1, 160 / unit);
        check(
            random_integer(1, 45), n, k, random_integer(0, 19), 32 << random_integer(0, 3),
            i % 2 == 0 ? QuantType::kNF4 : QuantType::kFP4, random_integer(0, 1) == 0, dtype,
            random_integer(0, 1) == 0 ? dtype : DType::kFloat32, static_cast<CpuCapability>(path));
      }
      // More than one block of the reduction, and of rows.
      check(3, 5, 2083, 3, 64, QuantType::kNF4, true, dtype, dtype, static_cast<CpuCapability>(path));
      check(2, 1091, 7, 3, 64, QuantType::kNF4, false, dtype, dtype, static_cast<CpuCapability>(path));
      check(1027, 3, 5, 2, 32, QuantType::kFP4, true, dtype, dtype, static_cast<CpuCapability>(path));
      checks += 3;
      for (int i = 0; i < count; ++i) {
        const auto dequantize = [&](DType to, auto round) {
          check_dequantize(
              random_integer(1, 20), random_integer(1, 300), 32 << random_integer(0, 7),
              i % 2 == 0 ? QuantType::kNF4 : QuantType::kFP4, random_integer(0, 1) == 0, to, +round,
              static_cast<CpuCapability>(path));
        };
        dequantize(DType::kFloat32, [](float x) { return x; });
        dequantize(DType::kBFloat16, [](float x) { return to_bfloat16(x); });
        dequantize(DType::kFloat16, [](float x) { return to_float16(x); });
        check_dropout(random_integer(1, 9), random_integer(1, 200), dtype, static_cast<CpuCapability>(path));
        check_cross_entropy(
            random_integer(1, 4), random_integer(2, 200), i % 2 == 0 ? 0.0f : 0.1f, dtype,
            static_cast<CpuCapability>(path));
      }
    }
  }
  std::printf("%lld layers, forward and backward: clean\n", static_cast<long long>(checks));
}
