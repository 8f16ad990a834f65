// The operators: checks, device guard, stream, launch, status to exception. The only file that includes torch, beside
// autograd.cpp, which needs more of it.
//
// It uses torch's stable ABI at the level of 2.10 and Python's limited API, not pybind11 and not the C++ API of ATen:
// those tie a binary to one minor version of torch and one of Python, these let one `_C.abi3.so` serve every torch
// from 2.10 on and every Python from 3.10 on. Everything needed here (tensor geometry, parallel_for, device guard,
// current stream, operator registration) is in the stable surface of 2.10.

#include <Python.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#if defined(FASTLORA_WITH_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/cross_entropy.h"
#include "cpu/dropout.h"
#include "cpu/linear.h"
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
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

std::string shape_of(const Tensor& t) {
  std::string shape = "(";
  for (int64_t i = 0; i < t.dim(); ++i) shape += (i ? ", " : "") + std::to_string(t.sizes()[i]);
  return shape + ")";
}

std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

std::string layout_of(const Tensor& t) { return shape_of(t) + (t.is_contiguous() ? "" : ", not contiguous"); }

// An uninitialized contiguous tensor beside `like`. torch::stable::new_empty goes through the dispatcher, which takes
// the host nearly as long as a launch.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr size_t kMostSides = 2;
  int64_t strides[kMostSides], stride = 1;
  if (sizes.size() > kMostSides) fail("a new tensor has at most ", int64_t{kMostSides}, " sides");
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, device_type, device_index, &made));
  return Tensor(made);
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_empty(like, sizes, like.scalar_type());
}

void check_device(const char* name, const Tensor& t, const Tensor& beside) {
  if (t.device() != beside.device()) fail(name, " must be on ", device_of(beside), ", got ", device_of(t));
}

template <typename T>
const T* checked(const char* name, const Tensor& t, const Tensor& out, ScalarType type, int64_t numel) {
  if (t.scalar_type() != type || t.numel() != numel || !t.is_contiguous()) {
    fail(
        name, " must be a contiguous ", name_of(type), " tensor of ", numel, " elements, got ",
        name_of(t.scalar_type()), " of shape ", layout_of(t));
  }
  check_device(name, t, out);
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* checked(const char* name, const std::optional<Tensor>& t, const Tensor& out, ScalarType type, int64_t numel) {
  if (!t.has_value()) fail(name, " is missing");
  return checked<T>(name, *t, out, type, numel);
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, " must be float32, bfloat16 or float16, got ", name_of(t.scalar_type()));
  }
}

// The arguments of an operator as torch hands them over, in the order of its schema. Each is taken once. TORCH_BOX
// would do the same for a function of as many parameters, and most operators here have twenty.
class Stack {
 public:
  Stack(StableIValue* values, uint64_t count) : values_(values), count_(count) {}
  template <typename T>
  T take() {
    if (taken_ == count_) fail("the schema of an operator has fewer arguments than it takes");
    return torch::stable::detail::to<T>(values_[taken_++]);
  }
  std::optional<Tensor> take_optional() { return take<std::optional<Tensor>>(); }

  // Puts the results where the arguments were.
  template <typename... Tensors>
  void put(const std::tuple<Tensors...>& results) {
    if (taken_ != count_) fail("the schema of an operator has more arguments than it takes");
    StableIValue* next = values_;
    std::apply([&next](const auto&... result) { ((*next++ = torch::stable::detail::from(result)), ...); }, results);
  }

 private:
  StableIValue* values_;
  uint64_t count_, taken_ = 0;
};

// What an operator is given of a packed weight.
struct WeightArguments {
  Tensor w_packed;
  std::optional<Tensor> absmax, absmax_q, absmax_scale, absmax_code, absmax_offset;
  int64_t n, k, blocksize;
  bool fp4;
};

WeightArguments take_weight(Stack& in) {
  return {in.take<Tensor>(),  in.take_optional(), in.take_optional(), in.take_optional(), in.take_optional(),
          in.take_optional(), in.take<int64_t>(), in.take<int64_t>(), in.take<int64_t>(), in.take<bool>()};
}

// The same, checked; `beside` is a tensor on the device that it must be on.
PackedWeight make_weight(const WeightArguments& a, const Tensor& beside) {
  const int64_t n = a.n, k = a.k, blocksize = a.blocksize;
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)) != 0) {
    fail("blocksize must be a power of two from 32 to 4096, got ", blocksize);
  }
  if (a.absmax.has_value() == a.absmax_q.has_value()) {
    fail("exactly one of absmax (flat statistics) and absmax_q (nested statistics) must be given");
  }
  const int64_t blocks = (n * k + blocksize - 1) / blocksize;
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  PackedWeight w{};
  w.w_packed = checked<uint8_t>("w_packed", a.w_packed, beside, ScalarType::Byte, (n * k + 1) / 2);
  w.nested = a.absmax_q.has_value();
  if (w.nested) {
    w.absmax_q = checked<uint8_t>("absmax_q", a.absmax_q, beside, ScalarType::Byte, blocks);
    w.absmax_scale = checked<float>("absmax_scale", a.absmax_scale, beside, ScalarType::Float, groups);
    w.absmax_code = checked<float>("absmax_code", a.absmax_code, beside, ScalarType::Float, 256);
    w.absmax_offset = checked<float>("absmax_offset", a.absmax_offset, beside, ScalarType::Float, 1);
  } else {
    w.absmax = checked<float>("absmax", a.absmax, beside, ScalarType::Float, blocks);
  }
  w.n = n;
  w.k = k;
  w.blocksize = static_cast<int32_t>(blocksize);
  w.quant_type = a.fp4 ? QuantType::kFP4 : QuantType::kNF4;
  return w;
}

DequantizeParams make_params(const PackedWeight& w, const Tensor& out) {
  if (out.dim() != 2 || out.sizes()[0] != w.n || out.sizes()[1] != w.k) {
    fail("out must have shape (", w.n, ", ", w.k, "), got ", shape_of(out));
  }
  if (w.k > 1 && out.stride(1) != 1) fail("the last dimension of out must be contiguous, got stride ", out.stride(1));
  if (w.n > 1 && out.stride(0) < w.k) {
    fail("rows of out must not overlap: stride ", out.stride(0), " of ", w.k, " columns");
  }
  DequantizeParams p{w};
  p.dtype = dtype_of("out", out);
  p.out = out.mutable_data_ptr();
  p.out_stride = w.n > 1 ? out.stride(0) : w.k;
  return p;
}

CpuCapability checked_capability(int64_t capability) {
  const auto best = static_cast<int64_t>(cpu_capability());
  if (capability < 0 || capability > best) fail("capability must be from 0 to ", best, " here, got ", capability);
  return static_cast<CpuCapability>(capability);
}

template <void (*kRun)(const DequantizeParams&, int64_t capability, const Tensor& out)>
void dequantize_operator(StableIValue* stack, uint64_t count, uint64_t) {
  Stack in(stack, count);
  const WeightArguments weight = take_weight(in);
  const auto capability = in.take<int64_t>();
  const auto out = in.take<Tensor>();
  kRun(make_params(make_weight(weight, out), out), capability, out);
  in.put(std::tuple<>());
}

void dequantize_on_cpu(const DequantizeParams& p, int64_t capability, const Tensor& /*out*/) {
  const CpuCapability path = checked_capability(capability);
  const int64_t numel = p.n * p.k, blocksize = p.blocksize;
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  torch::stable::parallel_for(0, blocks, kGrainElements / blocksize, [&](int64_t begin, int64_t end) {
    dequantize_cpu(p, path, begin * blocksize, std::min(end * blocksize, numel));
  });
}

DropoutMask mask_of(const Tensor& seed, int64_t threshold, double gain, const Tensor& beside) {
  return {
      checked<uint64_t>("seed", seed, beside, ScalarType::Long, 1), static_cast<uint32_t>(threshold),
      static_cast<float>(gain)};
}

// What an operator is given of a dropout: no seed, no dropout.
struct DropoutArguments {
  std::optional<Tensor> seed;
  int64_t threshold;
  double gain;
};

DropoutArguments take_dropout(Stack& in) { return {in.take_optional(), in.take<int64_t>(), in.take<double>()}; }

DropoutParams make_dropout(const Tensor& x, const DropoutMask& mask, Tensor& out) {
  if (x.dim() != 2) fail("x must have two dimensions, got shape ", shape_of(x));
  DropoutParams p{mask};
  p.dtype = dtype_of("x", x);
  p.m = x.sizes()[0];
  p.k = x.sizes()[1];
  p.x = checked<void>("x", x, out, x.scalar_type(), out.numel());
  checked<void>("out", out, x, x.scalar_type(), x.numel());
  p.out = out.mutable_data_ptr();
  return p;
}

void dropout_cpu_operator(Tensor x, Tensor seed, int64_t threshold, double gain, Tensor out) {
  const DropoutParams p = make_dropout(x, mask_of(seed, threshold, gain, x), out);
  if (p.dtype == DType::kFloat16) fail("x must be float32 or bfloat16, got float16");
  const CpuCapability path = cpu_capability();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / 4 / std::max<int64_t>(1, p.k));
  torch::stable::parallel_for(0, p.m, grain, [&](int64_t begin, int64_t end) { dropout_cpu(p, path, begin, end); });
}

void cross_entropy_cpu_operator(
    Tensor logits,
    Tensor labels,
    Tensor scale,
    int64_t ignore_index,
    double label_smoothing,
    bool gradient,
    int64_t capability,
    Tensor losses) {
  CrossEntropyParams p{};
  p.dtype = dtype_of("logits", logits);
  if (p.dtype == DType::kFloat16) fail("logits must be float32 or bfloat16, got float16");
  if (logits.dim() != 2) fail("logits must have two dimensions, got shape ", shape_of(logits));
  const int64_t m = logits.sizes()[0];
  p.v = logits.sizes()[1];
  if (p.v < 1) fail("logits must have columns, got shape ", shape_of(logits));
  checked<void>("logits", logits, losses, logits.scalar_type(), m * p.v);
  p.labels = checked<int64_t>("labels", labels, logits, ScalarType::Long, m);
  p.scale = checked<float>("scale", scale, logits, ScalarType::Float, 1);
  checked<float>("losses", losses, logits, ScalarType::Float, m);
  p.logits = logits.mutable_data_ptr();
  p.losses = static_cast<float*>(losses.mutable_data_ptr());
  p.ignored = ignore_index;
  p.smoothing = static_cast<float>(label_smoothing);
  p.gradient = gradient;
  const CpuCapability path = checked_capability(capability);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / p.v);
  torch::stable::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) { cross_entropy_cpu(p, path, begin, end); });
}

int64_t cpu_capability_operator() { return static_cast<int64_t>(cpu_capability()); }

#if defined(FASTLORA_WITH_CUDA)

// A device guard (the launch goes to the current device, which need not be the tensors' own) and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  void* stream() const { return stream_; }
  static void check(const char* name, int status) {
    if (status != 0) throw std::runtime_error(std::string(name) + ": " + take_cuda_error(status));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// `capability` speaks of the CPU; this twin ignores it so that both share one schema.
void dequantize_on_cuda(const DequantizeParams& p, int64_t /*capability*/, const Tensor& out) {
  const Launch launch(out);
  Launch::check("dequantize", dequantize_cuda(p, launch.stream()));
}

void dropout_cuda_operator(Tensor x, Tensor seed, int64_t threshold, double gain, Tensor out) {
  const DropoutParams p = make_dropout(x, mask_of(seed, threshold, gain, x), out);
  const Launch launch(x);
  Launch::check("dropout", dropout_cuda(p, launch.stream()));
}

#endif

// What the kernels for few rows ask of a pointer.
constexpr uintptr_t kAlignment = 16;

// A view into a larger buffer may start anywhere: it is then copied, and the copy kept in `t`.
void align(Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment != 0) t = torch::stable::clone(t);
}

const void* operand(const char* name, Tensor& t, const Tensor& beside, int64_t rows, int64_t columns) {
  if (t.dim() != 2 || t.sizes()[0] != rows || t.sizes()[1] != columns || !t.is_contiguous()) {
    fail(name, " must be contiguous, of shape (", rows, ", ", columns, "), got ", layout_of(t));
  }
  check_device(name, t, beside);
  align(t);
  return t.const_data_ptr();
}

// float32, or the type computed in, which is that of `rows`.
DType narrow_or_wide(const char* name, const Tensor& t, const Tensor& rows) {
  const auto type = t.scalar_type(), compute = rows.scalar_type();
  if (type != compute && type != ScalarType::Float) {
    const char* either = compute == ScalarType::Float ? "" : "float32 or ";
    fail(name, " must be ", either, name_of(compute), ", the type computed in; got ", name_of(type));
  }
  return dtype_of(name, t);
}

// Checks and takes what every forward and backward share: the size and type of x or dy (m, columns), the adapters.
template <typename Params>
void take_operands(
    Params& p,
    const char* name,
    Tensor& rows,
    int64_t columns,
    std::optional<Tensor>& lora_a,
    std::optional<Tensor>& lora_b) {
  if (rows.dim() != 2 || rows.sizes()[0] < 1) fail(name, " must have rows, got shape ", shape_of(rows));
  operand(name, rows, rows, rows.sizes()[0], columns);
  p.m = static_cast<decltype(p.m)>(rows.sizes()[0]);
  p.dtype = dtype_of(name, rows);
  if (rows.is_cpu() ? p.dtype == DType::kFloat16 : p.dtype == DType::kFloat32) {
    fail(
        name, " must be ", rows.is_cpu() ? "bfloat16 or float32" : "bfloat16 or float16", ", got ",
        name_of(rows.scalar_type()));
  }
  p.adapter_dtype = p.dtype;
  if (lora_a.has_value() != lora_b.has_value()) {
    fail("lora_a and lora_b must be given together, got only ", lora_a.has_value() ? "lora_a" : "lora_b");
  }
  if (!lora_a.has_value()) return;
  const int64_t r = lora_a->dim() == 2 ? lora_a->sizes()[0] : 0;
  if (r < 1 || r > INT32_MAX) fail("lora_a must be (R, ", p.k, "), got ", shape_of(*lora_a));
  p.r = static_cast<decltype(p.r)>(r);
  p.lora_a = operand("lora_a", *lora_a, rows, r, p.k);
  p.lora_b = operand("lora_b", *lora_b, rows, p.n, r);
  p.adapter_dtype = narrow_or_wide("lora_a", *lora_a, rows);
  if (lora_b->scalar_type() != lora_a->scalar_type()) {
    fail(
        "lora_b must have the type of lora_a, ", name_of(lora_a->scalar_type()), ", got ",
        name_of(lora_b->scalar_type()));
  }
}

// What the operators of a forward pass are given. Some take a copy of a tensor, which is then kept here.
struct ForwardArguments {
  Tensor x;
  WeightArguments weight;
  std::optional<Tensor> lora_a, lora_b, bias;
  double scale;
  bool float_out;
  int64_t capability;  // on a CPU
  DropoutArguments dropout;
};

using Outputs = std::tuple<Tensor, Tensor>;  // y and u

template <Outputs (*kRun)(ForwardArguments&), bool kOnCpu = false>
void forward_operator(StableIValue* stack, uint64_t count, uint64_t) {
  Stack in(stack, count);
  ForwardArguments a{in.take<Tensor>(),  take_weight(in),   in.take_optional(), in.take_optional(),
                     in.take_optional(), in.take<double>(), in.take<bool>(),    kOnCpu ? in.take<int64_t>() : 0,
                     take_dropout(in)};
  in.put(kRun(a));
}

// All that a forward pass reads, checked.
template <typename Params>
Params prepare_forward(ForwardArguments& a) {
  Params p{};
  static_cast<PackedWeight&>(p) = make_weight(a.weight, a.x);
  take_operands(p, "x", a.x, p.k, a.lora_a, a.lora_b);
  p.x = a.x.const_data_ptr();
  p.scale = static_cast<float>(a.scale);
  p.out_dtype = a.float_out ? DType::kFloat32 : p.dtype;
  p.bias_dtype = p.dtype;
  if (!a.bias.has_value()) return p;
  const Tensor& bias = *a.bias;
  p.bias_dtype = narrow_or_wide("bias", bias, a.x);
  if (bias.dim() != 1 || bias.sizes()[0] != p.n || !bias.is_contiguous()) {
    fail("bias must be contiguous, of shape (", p.n, "), got ", layout_of(bias));
  }
  check_device("bias", bias, a.x);
  p.bias = bias.const_data_ptr();
  return p;
}

// To be filled.
template <typename Params>
Outputs new_outputs(Params& p, const Tensor& x) {
  Tensor y = new_empty(x, {p.m, p.n}, p.out_dtype == DType::kFloat32 ? ScalarType::Float : x.scalar_type());
  Tensor u = new_empty(x, {p.m, p.r});
  p.y = y.mutable_data_ptr();
  p.u = u.mutable_data_ptr();
  return {y, u};
}

// Which gradients a backward pass makes; those of absent adapters never.
struct Needs {
  bool dx, da, db;
};

// What the operators of a backward pass are given.
struct BackwardArguments {
  Tensor dy;
  std::optional<Tensor> x, u;
  WeightArguments weight;
  std::optional<Tensor> lora_a, lora_b;
  double scale;
  Needs needs;
  int64_t capability;  // on a CPU
  DropoutArguments dropout;
};

using Results = std::tuple<Tensor, Tensor, Tensor>;  // dx, dA and dB

template <Results (*kRun)(BackwardArguments&), bool kOnCpu = false>
void backward_operator(StableIValue* stack, uint64_t count, uint64_t) {
  Stack in(stack, count);
  BackwardArguments a{
      in.take<Tensor>(),
      in.take_optional(),
      in.take_optional(),
      take_weight(in),
      in.take_optional(),
      in.take_optional(),
      in.take<double>(),
      Needs{in.take<bool>(), in.take<bool>(), in.take<bool>()},
      kOnCpu ? in.take<int64_t>() : 0,
      take_dropout(in)};
  in.put(kRun(a));
}

// All that a backward pass reads, checked: x only for dA, u only for dB.
template <typename Params>
Params prepare_backward(BackwardArguments& a) {
  Params p{};
  static_cast<PackedWeight&>(p) = make_weight(a.weight, a.dy);
  const Tensor& dy = a.dy;
  take_operands(p, "dy", a.dy, p.n, a.lora_a, a.lora_b);
  p.dy = dy.const_data_ptr();
  p.scale = static_cast<float>(a.scale);
  a.needs.da = a.needs.da && p.r > 0;
  a.needs.db = a.needs.db && p.r > 0;
  const auto beside_dy = [&](const char* name, std::optional<Tensor>& t, int64_t columns) {
    if (!t.has_value()) fail(name, " is missing");
    if (t->scalar_type() != dy.scalar_type()) {
      fail(name, " must have the type of dy, ", name_of(dy.scalar_type()), ", got ", name_of(t->scalar_type()));
    }
    return operand(name, *t, dy, p.m, columns);
  };
  if (a.needs.da) p.x = beside_dy("x", a.x, p.k);
  if (a.needs.db) p.u = beside_dy("u", a.u, p.r);
  return p;
}

// A gradient that is not needed has no elements.
struct Gradients {
  Tensor dx, da, db, du;
};

// The gradients to be filled, and du where one of them is made from it.
template <typename Params>
Gradients new_gradients(Params& p, const BackwardArguments& a) {
  const Needs& needs = a.needs;
  const auto make = [](bool needed, int64_t rows, int64_t columns, const Tensor& like, void*& data) {
    if (!needed) return new_empty(like, {0});
    Tensor t = new_empty(like, {rows, columns});
    data = t.mutable_data_ptr();
    return t;
  };
  return {
      make(needs.dx, p.m, p.k, a.dy, p.dx), make(needs.da, p.r, p.k, needs.da ? *a.lora_a : a.dy, p.da),
      make(needs.db, p.n, p.r, needs.db ? *a.lora_b : a.dy, p.db),
      make(p.r > 0 && (needs.dx || needs.da), p.m, p.r, a.dy, p.du)};
}

// The dropout of an operator that was given a seed; of one without adapters there is none.
class Dropping {
 public:
  Dropping(const DropoutArguments& a, bool adapted, const Tensor& beside) {
    if (a.seed.has_value() && adapted) mask_ = mask_of(*a.seed, a.threshold, a.gain, beside);
  }
  explicit operator bool() const { return mask_.seed != nullptr; }
  const DropoutMask& mask() const { return mask_; }

  // dropout(x), to be filled by `fill(DropoutParams)`.
  template <typename Fill>
  Tensor apply(const Tensor& x, Fill fill) const {
    Tensor out = new_empty(x, {x.sizes()[0], x.sizes()[1]});
    fill(make_dropout(x, mask_, out));
    return out;
  }

 private:
  DropoutMask mask_{};
};

// Threads take the next piece when they have done one: a core that others use, too, would hold up an even share.
Threads pool() {
  const int64_t threads = torch::stable::get_num_threads();
  return {threads, [threads](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
            std::atomic<int64_t> next{0};
            torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
              for (int64_t i = next++; i < count; i = next++) body(i, i + 1);
            });
          }};
}

Tensor dropped_cpu(const Tensor& x, const Dropping& dropping, CpuCapability path, const Threads& threads) {
  return dropping.apply(x, [&](const DropoutParams& p) {
    threads.run(p.m, [&](int64_t begin, int64_t end) { dropout_cpu(p, path, begin, end); });
  });
}

void check_elements(const WeightArguments& w) {
  if (w.n < 1 || w.k < 1) fail("the weight must have elements, got shape (", w.n, ", ", w.k, ")");
}

Outputs linear_forward(ForwardArguments& a) {
  check_elements(a.weight);
  auto p = prepare_forward<CpuForward>(a);
  const CpuCapability path = checked_capability(a.capability);
  const auto outputs = new_outputs(p, a.x);
  const Threads threads = pool();
  const Dropping dropping(a.dropout, p.r > 0, a.x);
  std::optional<Tensor> dropped;
  if (dropping) p.dropped = dropped.emplace(dropped_cpu(a.x, dropping, path, threads)).const_data_ptr();
  linear_forward_cpu(p, path, threads);
  return outputs;
}

Results linear_backward(BackwardArguments& a) {
  check_elements(a.weight);
  auto p = prepare_backward<CpuBackward>(a);
  const CpuCapability path = checked_capability(a.capability);
  const Gradients g = new_gradients(p, a);
  const Threads threads = pool();
  const Dropping dropping(a.dropout, p.r > 0, a.dy);
  p.dropout = dropping.mask();
  std::optional<Tensor> dropped;
  if (dropping && a.needs.da) p.x = dropped.emplace(dropped_cpu(*a.x, dropping, path, threads)).const_data_ptr();
  linear_backward_cpu(p, path, threads);
  return {g.dx, g.da, g.db};
}

#if defined(FASTLORA_WITH_CUDA)

Tensor dropped_cuda(const Tensor& x, const Dropping& dropping, const Launch& launch) {
  return dropping.apply(
      x, [&launch](const DropoutParams& p) { Launch::check("dropout", dropout_cuda(p, launch.stream())); });
}

// dx += dropout(du A), from what a backward pass has taken.
template <typename Params>
void add_dropped(const Params& p, const Tensor& du, Tensor& dx, const Dropping& dropping, const Launch& launch) {
  DroppedGradient term{dropping.mask()};
  term.du = du.const_data_ptr();
  term.lora_a = p.lora_a;
  term.dx = dx.mutable_data_ptr();
  term.m = p.m;
  term.k = p.k;
  term.r = static_cast<int32_t>(p.r);
  term.dtype = p.dtype;
  term.adapter_dtype = p.adapter_dtype;
  Launch::check("dropped_gradient", dropped_gradient_cuda(term, launch.stream()));
}

// What the kernels for few rows ask for besides; `name` is x or dy.
template <typename Params>
void check_few_rows(Params& p, const char* name, const Tensor& rows, Tensor& w_packed) {
  if (rows.sizes()[0] > kMaxFewRows) {
    fail(name, " must have at most ", int64_t{kMaxFewRows}, " rows, got shape ", shape_of(rows));
  }
  if (p.k % 32 != 0) fail("in_features must be a multiple of 32, got ", p.k);
  align(w_packed);
  p.w_packed = static_cast<const uint8_t*>(w_packed.const_data_ptr());
}

// What the tiles that decode W in the product ask for.
template <typename Params>
void check_tiles(Params& p, const char* name, const Tensor& rows, Tensor& w_packed) {
  if (rows.sizes()[0] > INT32_MAX) fail(name, " must have at most ", int64_t{INT32_MAX}, " rows");
  if (p.k % 64 != 0) fail("in_features must be a multiple of 64, got ", p.k);
  if (p.n % 8 != 0) fail("out_features must be a multiple of 8, got ", p.n);
  if (p.blocksize % 64 != 0) fail("blocksize must be a multiple of 64, got ", int64_t{p.blocksize});
  align(w_packed);
  p.w_packed = static_cast<const uint8_t*>(w_packed.const_data_ptr());
}

Outputs few_rows_forward(ForwardArguments& a) {
  auto p = prepare_forward<FewRowsForward>(a);
  check_few_rows(p, "x", a.x, a.weight.w_packed);
  const auto outputs = new_outputs(p, a.x);
  const Launch launch(a.x);
  const Dropping dropping(a.dropout, p.r > 0, a.x);
  std::optional<Tensor> dropped;
  if (dropping) p.dropped = dropped.emplace(dropped_cuda(a.x, dropping, launch)).const_data_ptr();
  Launch::check("few_rows_forward", few_rows_forward_cuda(p, launch.stream()));
  return outputs;
}

// A or B (rows, columns) as it is stored, in int8 or in bytes of two NF4 codes.
const void* take_packed(
    const char* name,
    Tensor& values,
    const Tensor& scales,
    int64_t rows,
    int64_t columns,
    const Tensor& beside,
    PackedFactor& factor) {
  const int64_t numel = rows * columns;
  factor.nf4 = values.scalar_type() == ScalarType::Byte;
  checked<void>(
      name, values, beside, factor.nf4 ? ScalarType::Byte : ScalarType::Char, factor.nf4 ? (numel + 1) / 2 : numel);
  const int64_t count = factor.nf4 ? (numel + PackedFactor::kBlocksize - 1) / PackedFactor::kBlocksize : rows;
  factor.scales = checked<float>((std::string(name) + "_scales").c_str(), scales, beside, ScalarType::Float, count);
  align(values);
  return values.const_data_ptr();
}

void few_rows_packed_operator(StableIValue* stack, uint64_t count, uint64_t) {
  Stack in(stack, count);
  auto x = in.take<Tensor>();
  WeightArguments weight = take_weight(in);
  auto lora_a = in.take<Tensor>();
  const auto lora_a_scales = in.take<Tensor>();
  auto lora_b = in.take<Tensor>();
  const auto lora_b_scales = in.take<Tensor>();
  const auto r = in.take<int64_t>();
  ForwardArguments a{x, weight, {}, {}, in.take_optional(), in.take<double>(), in.take<bool>(), 0, {}};
  auto p = prepare_forward<FewRowsPacked>(a);
  check_few_rows(p, "x", a.x, a.weight.w_packed);
  if (r < 1 || r > INT32_MAX) fail("r must be from 1 to ", int64_t{INT32_MAX}, ", got ", r);
  p.r = static_cast<int32_t>(r);
  p.lora_a = take_packed("lora_a", lora_a, lora_a_scales, r, p.k, a.x, p.packed_a);
  p.lora_b = take_packed("lora_b", lora_b, lora_b_scales, p.n, r, a.x, p.packed_b);
  const auto outputs = new_outputs(p, a.x);
  const Launch launch(a.x);
  Launch::check("few_rows_packed", few_rows_packed_cuda(p, launch.stream()));
  in.put(outputs);
}

Outputs tile_forward(ForwardArguments& a) {
  auto p = prepare_forward<FewRowsForward>(a);
  check_tiles(p, "x", a.x, a.weight.w_packed);
  const auto outputs = new_outputs(p, a.x);
  Tensor scaled_u = new_empty(a.x, {p.m, (p.r + 7) / 8 * 8});
  const Launch launch(a.x);
  const Dropping dropping(a.dropout, p.r > 0, a.x);
  std::optional<Tensor> dropped;
  if (dropping) p.dropped = dropped.emplace(dropped_cuda(a.x, dropping, launch)).const_data_ptr();
  Launch::check("tile_forward", tile_forward_cuda(p, scaled_u.mutable_data_ptr(), launch.stream()));
  return outputs;
}

// The gradients by one of the launches that decode W in the product.
Results fused_gradients(
    FewRowsBackward& p,
    const BackwardArguments& a,
    const Dropping& dropping,
    const char* name,
    int (*run)(const FewRowsBackward&, void*)) {
  const Gradients g = new_gradients(p, a);
  const Launch launch(a.dy);
  std::optional<Tensor> dropped;
  if (dropping && a.needs.da) p.x = dropped.emplace(dropped_cuda(*a.x, dropping, launch)).const_data_ptr();
  if (dropping && a.needs.dx) {
    FewRowsBackward base = p;  // dy W alone
    base.r = 0;
    base.du = base.da = base.db = nullptr;
    p.dx = nullptr;
    Launch::check(name, run(base, launch.stream()));
  }
  Launch::check(name, run(p, launch.stream()));
  if (dropping && a.needs.dx) {
    Tensor dx = g.dx;
    add_dropped(p, g.du, dx, dropping, launch);
  }
  return {g.dx, g.da, g.db};
}

Results few_rows_backward(BackwardArguments& a) {
  auto p = prepare_backward<FewRowsBackward>(a);
  check_few_rows(p, "dy", a.dy, a.weight.w_packed);
  if (p.n % 8 != 0) fail("out_features must be a multiple of 8, got ", p.n);
  const Dropping dropping(a.dropout, p.r > 0, a.dy);
  return fused_gradients(p, a, dropping, "few_rows_backward", few_rows_backward_cuda);
}

// Library products, called without Python in between.

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor of_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// out = alpha * (a b) + beta * out
void add_product(Tensor& out, const Tensor& a, const Tensor& b, double alpha, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

// a b of 16-bit matrices, its sums not rounded.
Tensor wide_product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// scale * (a b) as a gradient of the type of `like`, rounded once.
Tensor gradient(const Tensor& a, const Tensor& b, double scale, const Tensor& like) {
  if (like.scalar_type() == a.scalar_type()) {
    Tensor out = new_empty(like, {a.sizes()[0], b.sizes()[1]});
    add_product(out, a, b, scale, 0.0);
    return out;
  }
  Tensor out = wide_product(a, b);
  if (scale != 1.0) {
    AtenTensorHandle scaled = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mul_Scalar(out.get(), scale, &scaled));
    out = Tensor(scaled);
  }
  return out;
}

// The packed weight as a matrix of the type of `like`, in a transient buffer.
Tensor dense_weight(const PackedWeight& w, const Tensor& like, const Launch& launch) {
  Tensor out = new_empty(like, {w.n, w.k});
  Launch::check("dequantize", dequantize_cuda(make_params(w, out), launch.stream()));
  return out;
}

// A matrix (m, n) with rows of neighbours, at any distance, that a kernel reads or writes 16 bytes at a time.
int64_t stride_of_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& like) {
  if (t.dim() != 2 || t.sizes()[0] != rows || t.sizes()[1] != columns) {
    fail(name, " must have shape (", rows, ", ", columns, "), got ", shape_of(t));
  }
  if (t.scalar_type() != like.scalar_type()) {
    fail(name, " must be ", name_of(like.scalar_type()), ", got ", name_of(t.scalar_type()));
  }
  check_device(name, t, like);
  const int64_t n = t.sizes()[1], stride = t.sizes()[0] > 1 ? t.stride(0) : n;
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0 && stride % 8 == 0;
  if (t.stride(1) != 1 || stride < n || n % 8 != 0 || !aligned) {
    fail(name, " must have contiguous rows of a multiple of 8 elements, each 16-byte aligned");
  }
  return stride;
}

int64_t stride_of_rows(const char* name, const Tensor& t, const Tensor& like) {
  return stride_of_rows(name, t, like.sizes()[0], like.sizes()[1], like);
}

int32_t narrow_side(const char* name, int64_t ranks) {
  if (ranks != 16 && ranks != 32) fail(name, " must be 16 or 32, got ", ranks);
  return static_cast<int32_t>(ranks);
}

// The rows of a 16-bit matrix that a kernel walks down.
int64_t check_rows(const char* name, const Tensor& t) {
  if (dtype_of(name, t) == DType::kFloat32) fail(name, " must be bfloat16 or float16, got float32");
  if (t.dim() != 2 || t.sizes()[0] < 1) fail(name, " must have rows, got shape ", shape_of(t));
  constexpr int64_t kMostRows = 1 << 30;
  if (t.sizes()[0] > kMostRows) fail(name, " must have at most ", kMostRows, " rows, got ", t.sizes()[0]);
  return t.sizes()[0];
}

// What both directions of a gated MLP's activation take: gate and up, what the activation is.
template <typename Params>
void take_gated(Params& p, const Tensor& gate, const Tensor& up, int64_t activation) {
  p.dtype = dtype_of("gate", gate);
  p.m = check_rows("gate", gate);
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kGeluTanh)) {
    fail("activation must be from 0 to 2, got ", activation);
  }
  p.n = gate.sizes()[1];
  p.stride = stride_of_rows("gate", gate, gate);
  if (stride_of_rows("up", up, gate) != p.stride) fail("the rows of up must be as far apart as those of gate");
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.activation = static_cast<Activation>(activation);
}

void gated_forward_operator(Tensor gate, Tensor up, Tensor lora_a, int64_t activation, Tensor h, Tensor u) {
  GatedForward p{};
  take_gated(p, gate, up, activation);
  const ScalarType type = gate.scalar_type();
  p.rd = narrow_side("the rank of down", lora_a.dim() == 2 ? lora_a.sizes()[0] : 0);
  align(lora_a);
  p.lora_a = checked<void>("lora_a", lora_a, gate, type, p.rd * p.n);
  checked<void>("h", h, gate, type, p.m * p.n);
  checked<void>("u", u, gate, type, p.m * p.rd);
  p.h = h.mutable_data_ptr();
  p.u = u.mutable_data_ptr();
  const Launch launch(gate);
  StripPlan plan{};
  Launch::check("gated_forward", gated_forward_plan(p.m, p.n, plan));
  Tensor parts = new_empty(gate, {plan.strips * p.m * p.rd}, ScalarType::Float);
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  Launch::check("gated_forward", gated_forward_cuda(p, plan, launch.stream()));
}

void gated_gradients_operator(
    Tensor gate,
    Tensor up,
    Tensor dh,
    Tensor u,
    Tensor du_down,
    Tensor lora_b,
    double scale_gate,
    double scale_up,
    bool shared,
    int64_t activation,
    Tensor dgate,
    Tensor dup,
    Tensor du,
    Tensor db,
    Tensor da) {
  GatedGradients p{};
  take_gated(p, gate, up, activation);
  const ScalarType type = gate.scalar_type();
  if (stride_of_rows("dh", dh, gate) != p.n) fail("dh must be contiguous");
  p.stride_d = stride_of_rows("dgate", dgate, gate);
  if (stride_of_rows("dup", dup, gate) != p.stride_d) fail("the rows of dup must be as far apart as those of dgate");
  const int64_t width = u.dim() == 2 ? u.sizes()[1] : 0;
  p.shared = shared;
  p.r = narrow_side("the rank of gate and up", shared ? width : width / 2);
  p.rd = narrow_side("the rank of down", du_down.dim() == 2 ? du_down.sizes()[1] : 0);
  p.dh = dh.const_data_ptr();
  align(u);
  align(du_down);
  p.u = checked<void>("u", u, gate, type, p.m * width);
  p.du_down = checked<void>("du_down", du_down, gate, type, p.m * p.rd);
  p.lora_b = checked<void>("lora_b", lora_b, gate, type, 2 * p.n * width);
  checked<void>("du", du, gate, type, p.m * width);
  checked<void>("db", db, gate, db.scalar_type(), 2 * p.n * p.r);
  checked<void>("da", da, gate, da.scalar_type(), p.rd * p.n);
  p.dgate = dgate.mutable_data_ptr();
  p.dup = dup.mutable_data_ptr();
  p.du = du.mutable_data_ptr();
  p.db = db.mutable_data_ptr();
  p.da = da.mutable_data_ptr();
  p.db_dtype = dtype_of("db", db);
  p.da_dtype = dtype_of("da", da);
  p.scale_gate = static_cast<float>(scale_gate);
  p.scale_up = static_cast<float>(scale_up);
  const Launch launch(gate);
  StripPlan plan{};
  Launch::check("gated_gradients", gated_gradients_plan(p.m, p.n, p.r, p.rd, plan));
  const int64_t of_parts = plan.parts * p.n * (2 * p.r + p.rd), of_strips = plan.strips * p.m * width;
  Tensor sums = new_empty(gate, {of_parts + of_strips}, ScalarType::Float);
  p.parts = static_cast<float*>(sums.mutable_data_ptr());
  p.du_parts = p.parts + of_parts;
  Launch::check("gated_gradients", gated_gradients_cuda(p, plan, launch.stream()));
}

// All dy side by side in `joined`, where that is given, and du and dB of them.
void du_db_operator(StableIValue* stack, uint64_t count, uint64_t) {
  Stack in(stack, count);
  DuDb p{};
  const auto first = in.take<Tensor>();
  Tensor dys[DuDb::kMost] = {first, first, first, first};
  p.count = 1;
  for (int i = 1; i < DuDb::kMost; ++i) {
    if (auto other = in.take_optional(); other.has_value()) dys[p.count++] = *other;
  }
  for (float& scale : p.scale) scale = static_cast<float>(in.take<double>());
  auto u = in.take<Tensor>(), lora_b = in.take<Tensor>();
  const auto joined = in.take_optional();
  const auto du = in.take<Tensor>(), db = in.take<Tensor>();
  const ScalarType type = first.scalar_type();
  p.dtype = dtype_of("dy", first);
  p.m = check_rows("dy", first);
  for (int i = 0; i < p.count; ++i) {
    p.n[i] = dys[i].dim() == 2 ? dys[i].sizes()[1] : 0;
    p.stride[i] = stride_of_rows("dy", dys[i], p.m, p.n[i], first);
    p.dy[i] = dys[i].const_data_ptr();
    p.total += p.n[i];
  }
  const int64_t width = u.dim() == 2 ? u.sizes()[1] : 0;
  p.r = narrow_side("the rank", width / p.count);
  align(u);
  p.u = checked<void>("u", u, first, type, p.m * p.count * p.r);
  p.lora_b = checked<void>("lora_b", lora_b, first, type, p.total * width);
  checked<void>("du", du, first, type, p.m * width);
  checked<void>("db", db, first, db.scalar_type(), p.total * p.r);
  if (joined.has_value()) {
    if (stride_of_rows("joined", *joined, p.m, p.total, first) != p.total) fail("joined must be contiguous");
    p.joined = joined->mutable_data_ptr();
  }
  p.du = du.mutable_data_ptr();
  p.db = db.mutable_data_ptr();
  p.db_dtype = dtype_of("db", db);
  const Launch launch(first);
  StripPlan plan{};
  Launch::check("du_db", du_db_plan(p, plan));
  const int64_t of_du = plan.strips * p.m * p.r, of_db = plan.parts * p.total * p.r;
  Tensor sums = new_empty(first, {of_du + of_db}, ScalarType::Float);
  p.du_parts = static_cast<float*>(sums.mutable_data_ptr());
  p.db_parts = p.du_parts + of_du;
  Launch::check("du_db", du_db_cuda(p, plan, launch.stream()));
  in.put(std::tuple<>());
}

Outputs library_forward(ForwardArguments& a) {
  const auto p = prepare_forward<LinearForward<int64_t>>(a);
  const Tensor& x = a.x;
  const Launch launch(x);
  const Tensor dense = dense_weight(p, x, launch);
  Tensor u = new_empty(x, {p.m, p.r});
  if (p.r == 0 && !a.bias.has_value() && !a.float_out) {
    Tensor y = new_empty(x, {p.m, p.n});
    add_product(y, x, transposed(dense), 1.0, 0.0);
    return {y, u};
  }
  if (p.r > 0) {
    const Dropping dropping(a.dropout, true, x);
    const Tensor side = dropping ? dropped_cuda(x, dropping, launch) : x;
    add_product(u, side, transposed(of_type(*a.lora_a, x.scalar_type())), 1.0, 0.0);
  }
  Tensor sums = wide_product(x, transposed(dense));
  Tensor y = a.float_out ? sums : new_empty(x, {p.m, p.n});
  FinishParams finish{};
  finish.sums = static_cast<const float*>(sums.const_data_ptr());
  finish.u = u.const_data_ptr();
  finish.lora_b = p.lora_b;
  finish.bias = p.bias;
  finish.y = y.mutable_data_ptr();
  finish.m = p.m;
  finish.n = p.n;
  finish.r = static_cast<int32_t>(p.r);
  finish.scale = p.scale;
  finish.dtype = p.dtype;
  finish.adapter_dtype = p.adapter_dtype;
  finish.bias_dtype = p.bias_dtype;
  finish.out_dtype = p.out_dtype;
  Launch::check("finish", finish_cuda(finish, launch.stream()));
  return {y, u};
}

// du and the gradients of the adapters, by library products. One that is not needed has no elements.
struct AdapterGradients {
  Tensor du, da, db;
};

AdapterGradients adapter_gradients(const BackwardArguments& a, const Dropping& dropping, const Launch& launch) {
  const Tensor& dy = a.dy;
  const Needs& needs = a.needs;
  const Tensor nothing = new_empty(dy, {0});
  AdapterGradients g{nothing, nothing, nothing};
  if (a.lora_b.has_value() && (needs.dx || needs.da)) {
    g.du = gradient(dy, of_type(*a.lora_b, dy.scalar_type()), a.scale, dy);
  }
  if (needs.db) g.db = gradient(transposed(dy), *a.u, a.scale, *a.lora_b);
  if (needs.da) {
    g.da = gradient(transposed(g.du), dropping ? dropped_cuda(*a.x, dropping, launch) : *a.x, 1.0, *a.lora_a);
  }
  return g;
}

Results library_backward(BackwardArguments& a) {
  const auto p = prepare_backward<LinearBackward<int64_t>>(a);
  const Tensor& dy = a.dy;
  const Launch launch(dy);
  const Dropping dropping(a.dropout, p.r > 0, dy);
  AdapterGradients g = adapter_gradients(a, dropping, launch);
  Tensor dx = new_empty(dy, {0});
  if (a.needs.dx) {
    dx = new_empty(dy, {p.m, p.k});
    const bool joined = p.r > 0 && !dropping;
    if (joined) add_product(dx, g.du, of_type(*a.lora_a, dy.scalar_type()), 1.0, 0.0);
    add_product(dx, dy, dense_weight(p, dy, launch), 1.0, joined ? 1.0 : 0.0);
    if (dropping) add_dropped(p, g.du, dx, dropping, launch);
  }
  return {dx, g.da, g.db};
}

Results tile_backward(BackwardArguments& a) {
  auto p = prepare_backward<FewRowsBackward>(a);
  check_tiles(p, "dy", a.dy, a.weight.w_packed);
  if (p.r % 8 != 0) fail("the rank must be a multiple of 8, got ", int64_t{p.r});
  const Dropping dropping(a.dropout, p.r > 0, a.dy);
  // Of more rows library products are faster than launches that read narrow strips of dy and x.
  constexpr int32_t kMostSideRows = 512;
  if (p.m <= kMostSideRows) {
    const auto run = [](const FewRowsBackward& params, void* stream) {
      return tile_backward_cuda(params, true, stream);
    };
    return fused_gradients(p, a, dropping, "tile_backward", run);
  }
  const Launch launch(a.dy);
  AdapterGradients g = adapter_gradients(a, dropping, launch);
  Tensor dx = new_empty(a.dy, {0});
  if (a.needs.dx) {
    dx = new_empty(a.dy, {p.m, p.k});
    p.dx = dx.mutable_data_ptr();
    p.du = g.du.mutable_data_ptr();
    FewRowsBackward product = p;
    if (dropping) product.r = 0;
    Launch::check("tile_backward", tile_backward_cuda(product, false, launch.stream()));
    if (dropping) add_dropped(p, g.du, dx, dropping, launch);
  }
  return {dx, g.da, g.db};
}

#endif

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY(fastlora_native, m) {
  const std::string weight =
      "Tensor w_packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_code, "
      "Tensor? absmax_offset, int n, int k, int blocksize, bool fp4";
  const std::string adapters = ", Tensor? lora_a, Tensor? lora_b";
  const std::string forward = "_forward(Tensor x, " + weight + adapters + ", Tensor? bias, float scale, bool float_out";
  const std::string backward = "_backward(Tensor dy, Tensor? x, Tensor? u, " + weight + adapters +
                               ", float scale, bool need_dx, bool need_da, bool need_db";
  const std::string dropout = ", Tensor? seed=None, int threshold=0, float gain=1.0";
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  define("cpu_capability() -> int");
  define("dequantize(" + weight + ", int capability, Tensor(a!) out) -> ()");
  define(
      "cross_entropy(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore_index, float label_smoothing, "
      "bool gradient, int capability, Tensor(b!) losses) -> ()");
  define("dropout(Tensor x, Tensor seed, int threshold, float gain, Tensor(a!) out) -> ()");
  define("gated_forward(Tensor gate, Tensor up, Tensor lora_a, int activation, Tensor(a!) h, Tensor(b!) u) -> ()");
  define(
      "gated_gradients(Tensor gate, Tensor up, Tensor dh, Tensor u, Tensor du_down, Tensor lora_b, float scale_gate, "
      "float scale_up, bool shared, int activation, Tensor(a!) dgate, Tensor(b!) dup, Tensor(c!) du, Tensor(d!) db, "
      "Tensor(e!) da) -> ()");
  define(
      "du_db(Tensor dy0, Tensor? dy1, Tensor? dy2, Tensor? dy3, float scale0, float scale1, float scale2, "
      "float scale3, Tensor u, Tensor lora_b, Tensor(a!)? joined, Tensor(b!) du, Tensor(c!) db) -> ()");
  define("linear" + forward + ", int capability" + dropout + ") -> (Tensor, Tensor)");
  define("linear" + backward + ", int capability" + dropout + ") -> (Tensor, Tensor, Tensor)");
  define(
      "few_rows_packed(Tensor x, " + weight +
      ", Tensor lora_a, Tensor lora_a_scales, Tensor lora_b, Tensor lora_b_scales, int r, Tensor? bias, float scale, "
      "bool float_out) -> (Tensor, Tensor)");
  for (const std::string& name : {std::string("few_rows"), std::string("tile"), std::string("library")}) {
    define(name + forward + dropout + ") -> (Tensor, Tensor)");
    define(name + backward + dropout + ") -> (Tensor, Tensor, Tensor)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CPU, m) {
  m.impl("dequantize", &fastlora::dequantize_operator<fastlora::dequantize_on_cpu>);
  m.impl("cross_entropy", TORCH_BOX(&fastlora::cross_entropy_cpu_operator));
  m.impl("dropout", TORCH_BOX(&fastlora::dropout_cpu_operator));
  m.impl("linear_forward", &fastlora::forward_operator<fastlora::linear_forward, true>);
  m.impl("linear_backward", &fastlora::backward_operator<fastlora::linear_backward, true>);
}

STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastlora::cpu_capability_operator));
}

#if defined(FASTLORA_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastlora_native, CUDA, m) {
  m.impl("dequantize", &fastlora::dequantize_operator<fastlora::dequantize_on_cuda>);
  m.impl("dropout", TORCH_BOX(&fastlora::dropout_cuda_operator));
  m.impl("gated_forward", TORCH_BOX(&fastlora::gated_forward_operator));
  m.impl("gated_gradients", TORCH_BOX(&fastlora::gated_gradients_operator));
  m.impl("du_db", &fastlora::du_db_operator);
  m.impl("few_rows_forward", &fastlora::forward_operator<fastlora::few_rows_forward>);
  m.impl("few_rows_packed", &fastlora::few_rows_packed_operator);
  m.impl("tile_forward", &fastlora::forward_operator<fastlora::tile_forward>);
  m.impl("tile_backward", &fastlora::backward_operator<fastlora::tile_backward>);
  m.impl("few_rows_backward", &fastlora::backward_operator<fastlora::few_rows_backward>);
  m.impl("library_forward", &fastlora::forward_operator<fastlora::library_forward>);
  m.impl("library_backward", &fastlora::backward_operator<fastlora::library_backward>);
}
#endif

// Importing the module registers the operators above; the module says only what it was built with.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#if defined(FASTLORA_WITH_CUDA)
  constexpr long with_cuda = 1;
  const long with_hopper = fastlora::has_hopper_code() ? 1 : 0;
#else
  constexpr long with_cuda = 0, with_hopper = 0;
#endif
  if (module == nullptr || (PyModule_AddIntConstant(module, "WITH_CUDA", with_cuda) == 0 &&
                            PyModule_AddIntConstant(module, "WITH_HOPPER", with_hopper) == 0)) {
    return module;
  }
  Py_DECREF(module);
  return nullptr;
}
