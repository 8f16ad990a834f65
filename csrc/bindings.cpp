// The only file that includes torch: checks, device guard, stream, launch, status to exception.
//
// It uses torch's stable ABI at the level of 2.10 and Python's limited API, not pybind11 and not the C++ API of ATen:
// those tie a binary to one minor version of torch and one of Python, these let one `_C.abi3.so` serve every torch
// from 2.10 on and every Python from 3.10 on. Everything needed here (tensor geometry, parallel_for, device guard,
// current stream, operator registration) is in the stable surface of 2.10.

#include <Python.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "params.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 1 << 16;

std::string text(const char* part) { return part; }
std::string text(const std::string& part) { return part; }
std::string text(int64_t part) { return std::to_string(part); }

// Strings instead of streams: the C++ runtimes of torch and of this module may differ, and streams do not survive that.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((text(parts) + ...));
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    default:
      return "another type";
  }
}

std::string shape_of(const Tensor& t) {
  std::string shape = "(";
  for (int64_t i = 0; i < t.dim(); ++i) shape += (i ? ", " : "") + std::to_string(t.sizes()[i]);
  return shape + ")";
}

template <typename T>
const T* checked(const char* name, const Tensor& t, const Tensor& out, ScalarType type, int64_t numel) {
  if (t.scalar_type() != type || t.numel() != numel || !t.is_contiguous()) {
    fail(
        name, " must be a contiguous ", name_of(type), " tensor of ", numel, " elements, got ",
        name_of(t.scalar_type()), " of shape ", shape_of(t), t.is_contiguous() ? "" : ", not contiguous");
  }
  if (t.device() != out.device()) fail(name, " must be on the device of out");
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* checked(const char* name, const std::optional<Tensor>& t, const Tensor& out, ScalarType type, int64_t numel) {
  if (!t.has_value()) fail(name, " is missing");
  return checked<T>(name, *t, out, type, numel);
}

DType dtype_of(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail("out must be float32, bfloat16 or float16, got ", name_of(out.scalar_type()));
  }
}

DequantizeParams make_params(
    const Tensor& w_packed,
    const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& absmax_q,
    const std::optional<Tensor>& absmax_scale,
    const std::optional<Tensor>& absmax_code,
    const std::optional<Tensor>& absmax_offset,
    int64_t n,
    int64_t k,
    int64_t blocksize,
    bool fp4,
    const Tensor& out) {
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)) != 0) {
    fail("blocksize must be a power of two from 32 to 4096, got ", blocksize);
  }
  if (out.dim() != 2 || out.sizes()[0] != n || out.sizes()[1] != k) {
    fail("out must have shape (", n, ", ", k, "), got ", shape_of(out));
  }
  if (k > 1 && out.stride(1) != 1) fail("the last dimension of out must be contiguous, got stride ", out.stride(1));
  if (n > 1 && out.stride(0) < k) {
    fail("rows of out must not overlap: stride ", out.stride(0), " of ", k, " columns");
  }
  if (absmax.has_value() == absmax_q.has_value()) {
    fail("exactly one of absmax (flat statistics) and absmax_q (nested statistics) must be given");
  }

  const int64_t blocks = (n * k + blocksize - 1) / blocksize;
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  DequantizeParams p{};
  p.w_packed = checked<uint8_t>("w_packed", w_packed, out, ScalarType::Byte, (n * k + 1) / 2);
  p.nested = absmax_q.has_value();
  if (p.nested) {
    p.absmax_q = checked<uint8_t>("absmax_q", absmax_q, out, ScalarType::Byte, blocks);
    p.absmax_scale = checked<float>("absmax_scale", absmax_scale, out, ScalarType::Float, groups);
    p.absmax_code = checked<float>("absmax_code", absmax_code, out, ScalarType::Float, 256);
    p.absmax_offset = checked<float>("absmax_offset", absmax_offset, out, ScalarType::Float, 1);
  } else {
    p.absmax = checked<float>("absmax", absmax, out, ScalarType::Float, blocks);
  }
  p.dtype = dtype_of(out);
  p.out = out.mutable_data_ptr();
  p.n = n;
  p.k = k;
  p.out_stride = n > 1 ? out.stride(0) : k;
  p.blocksize = static_cast<int32_t>(blocksize);
  p.quant_type = fp4 ? QuantType::kFP4 : QuantType::kNF4;
  return p;
}

void dequantize_cpu_op(
    Tensor w_packed,
    std::optional<Tensor> absmax,
    std::optional<Tensor> absmax_q,
    std::optional<Tensor> absmax_scale,
    std::optional<Tensor> absmax_code,
    std::optional<Tensor> absmax_offset,
    int64_t n,
    int64_t k,
    int64_t blocksize,
    bool fp4,
    int64_t capability,
    Tensor out) {
  const DequantizeParams p =
      make_params(w_packed, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset, n, k, blocksize, fp4, out);
  const auto best = static_cast<int64_t>(cpu_capability());
  if (capability < 0 || capability > best) fail("capability must be from 0 to ", best, " here, got ", capability);
  const int64_t numel = n * k;
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  torch::stable::parallel_for(0, blocks, kGrainElements / blocksize, [&](int64_t begin, int64_t end) {
    dequantize_cpu(p, static_cast<CpuCapability>(capability), begin * blocksize, std::min(end * blocksize, numel));
  });
}

int64_t cpu_capability_op() { return static_cast<int64_t>(cpu_capability()); }

#if defined(FASTLORA_WITH_CUDA)

// `capability` speaks of the CPU; this twin ignores it so that both share one schema.
void dequantize_cuda_op(
    Tensor w_packed,
    std::optional<Tensor> absmax,
    std::optional<Tensor> absmax_q,
    std::optional<Tensor> absmax_scale,
    std::optional<Tensor> absmax_code,
    std::optional<Tensor> absmax_offset,
    int64_t n,
    int64_t k,
    int64_t blocksize,
    bool fp4,
    int64_t /*capability*/,
    Tensor out) {
  const DequantizeParams p =
      make_params(w_packed, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset, n, k, blocksize, fp4, out);
  const int32_t device = out.get_device_index();
  // The launch goes to the current device, which need not be the tensors' own.
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int status = dequantize_cuda(p, stream);
  if (status != 0) throw std::runtime_error(std::string("dequantize: ") + cuda_error_string(status));
}

#endif

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY(fastlora_native, m) {
  m.def(
      "dequantize(Tensor w_packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_code, "
      "Tensor? absmax_offset, int n, int k, int blocksize, bool fp4, int capability, Tensor(a!) out) -> ()");
  m.def("cpu_capability() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CPU, m) { m.impl("dequantize", TORCH_BOX(&fastlora::dequantize_cpu_op)); }

STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastlora::cpu_capability_op));
}

#if defined(FASTLORA_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CUDA, m) { m.impl("dequantize", TORCH_BOX(&fastlora::dequantize_cuda_op)); }
#endif

// Importing the module registers the operators above; the module says only what it was built with.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#if defined(FASTLORA_WITH_CUDA)
  constexpr long with_cuda = 1;
#else
  constexpr long with_cuda = 0;
#endif
  if (module != nullptr && PyModule_AddIntConstant(module, "WITH_CUDA", with_cuda) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
