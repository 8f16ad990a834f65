// The eager autograd node of one layer: what a call costs the host, without Python between the layer and the kernels.
//
// torch's stable ABI has no autograd nodes, so this module is built against the C++ API of one version of torch and one
// of Python, whose numbers its file name carries. It holds no mathematics: it calls the operators that bindings.cpp
// registers. Where it is missing, or declines a call by returning None, `fastlora/ops.py` does the same in Python.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

namespace fastlora {
namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr const char* kCapabilityVariable = "FASTLORA_CPU_CAPABILITY";

// The arguments that stand for a packed weight in every operator.
struct BaseWeight {
  Tensor w_packed, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset;
  int64_t n = 0, k = 0, blocksize = 0;
  bool fp4 = false;

  void push(torch::jit::Stack& stack) const {
    const auto optional = [&stack](const Tensor& t) {
      stack.emplace_back(t.defined() ? c10::IValue(t) : c10::IValue());
    };
    stack.emplace_back(w_packed);
    optional(absmax);
    optional(absmax_q);
    optional(absmax_scale);
    optional(absmax_code);
    optional(absmax_offset);
    stack.emplace_back(n);
    stack.emplace_back(k);
    stack.emplace_back(blocksize);
    stack.emplace_back(fp4);
  }
};

// Dropout of the adapter's input, or none. The numbers are those of fastlora/dropout.py.
struct Dropout {
  double p = 0.0;
  Tensor seed;

  void push(torch::jit::Stack& stack) const {
    const bool on = seed.defined();
    stack.emplace_back(on ? c10::IValue(seed) : c10::IValue());
    stack.emplace_back(on ? std::min<int64_t>(std::llrint(p * 4294967296.0), 0xffffffff) : int64_t{0});
    stack.emplace_back(!on ? 1.0 : p >= 1.0 ? 0.0 : 1.0 / (1.0 - p));
  }
};

// From the device's default generator, as fastlora.dropout.draw_seed does.
Tensor draw_seed(const Tensor& x) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), {1}, x.options().dtype(at::kLong).requires_grad(false));
}

// The operators that compute a layer at one size; an absent one is none of those that this module calls.
struct Form {
  std::optional<c10::OperatorHandle> forward, backward;
  std::optional<int64_t> capability;  // the last argument of the operators for CPUs
};

void push_optional(torch::jit::Stack& stack, const Tensor& t) {
  stack.emplace_back(t.defined() ? c10::IValue(t) : c10::IValue());
}

// The adapters as the operators read them: contiguous, both float32 or both of the type computed in.
std::pair<Tensor, Tensor> readable(const Tensor& a, const Tensor& b, ScalarType compute) {
  if (!a.defined()) return {a, b};
  const auto type = a.scalar_type();
  if (type != b.scalar_type() || (type != compute && type != at::kFloat)) {
    return {a.to(at::kFloat).contiguous(), b.to(at::kFloat).contiguous()};
  }
  return {a.contiguous(), b.contiguous()};
}

// Inside, nothing is recorded, and autocast does not choose again for the products.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

constexpr const char* kNoSecondDerivative =
    "the backward of a fused LoRA layer cannot be differentiated again; "
    "fastlora.reference.lora_linear computes the same layer with derivatives of any order";

// Nodes are counted by std::shared_ptr or by c10::intrusive_ptr, as the version of torch has it.
using NodePointer = decltype(torch::autograd::Edge::function);

template <typename T, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    // Found by the type of its argument, since only the versions that come here have it.
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

class LoraLinearBackward : public Node {
 public:
  std::string name() const override { return "LoraLinearBackward"; }

  void save(const Tensor& x, const Tensor& u, const Tensor& a, const Tensor& b, const Dropout& dropout) {
    x_ = SavedVariable(x, false);
    u_ = SavedVariable(u, false);
    lora_a_ = SavedVariable(a, false);
    lora_b_ = SavedVariable(b, false);
    seed_ = SavedVariable(dropout.seed, false);
    p_ = dropout.p;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    for (SavedVariable* saved : {&x_, &u_, &lora_a_, &lora_b_, &seed_}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list out(4);
    const Tensor& given = grads[0];
    if (!given.defined()) return out;
    const bool dx = task_should_compute_output(0), da = task_should_compute_output(1),
               db = task_should_compute_output(2);
    if (dx || da || db) {
      const Tensor x = x_.unpack(), u = u_.unpack(), a = lora_a_.unpack(), b = lora_b_.unpack();
      compute(out, given, x, u, a, b, Dropout{p_, seed_.unpack()}, dx, da, db);
      if (at::GradMode::is_enabled()) refuse_second_derivative(out, given, x, a, b);
    }
    if (task_should_compute_output(3)) out[3] = given.reshape({-1, weight->n}).sum(0, false, bias_type);
    return out;
  }

  std::shared_ptr<const BaseWeight> weight;
  Form form;
  double scale = 1.0;
  ScalarType compute_type = at::kFloat, bias_type = at::kFloat;
  std::vector<int64_t> sizes;  // of x

 private:
  void compute(
      variable_list& out,
      const Tensor& given,
      const Tensor& x,
      const Tensor& u,
      const Tensor& lora_a,
      const Tensor& lora_b,
      const Dropout& dropout,
      bool dx,
      bool da,
      bool db) const {
    const BelowAutograd below;
    const Tensor dy = given.reshape({-1, weight->n}).to(compute_type).contiguous();
    const auto [a, b] = readable(lora_a, lora_b, compute_type);
    torch::jit::Stack stack;
    stack.reserve(23);
    stack.emplace_back(dy);
    push_optional(stack, x.defined() ? x.reshape({-1, weight->k}).contiguous() : x);
    push_optional(stack, u);
    weight->push(stack);
    push_optional(stack, a);
    push_optional(stack, b);
    stack.emplace_back(scale);
    stack.emplace_back(dx);
    stack.emplace_back(da);
    stack.emplace_back(db);
    if (form.capability) stack.emplace_back(*form.capability);
    dropout.push(stack);
    form.backward->callBoxed(&stack);
    if (dx) out[0] = stack[0].toTensor().view(sizes);
    if (da) out[1] = stack[1].toTensor().to(lora_a.scalar_type());
    if (db) out[2] = stack[2].toTensor().to(lora_b.scalar_type());
  }

  static void refuse_second_derivative(
      variable_list& out, const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b) {
    auto edges = torch::autograd::collect_next_edges(dy, x, a, b);
    bool differentiable = false;
    for (const auto& edge : edges) differentiable = differentiable || edge.is_valid();
    if (!differentiable) return;
    const auto refusal = make_node<torch::autograd::Error>(kNoSecondDerivative, std::move(edges));
    for (Tensor& grad : out) {
      if (grad.defined()) torch::autograd::create_gradient_edge(grad, refusal);
    }
  }

  SavedVariable x_, u_, lora_a_, lora_b_, seed_;
  double p_ = 0.0;
  bool released_ = false;
};

// A plain tensor in the sense of every check below: no subclass, no wrapper of a transform, no lazy negation.
bool plain(const Tensor& t) {
  static const c10::DispatchKeySet known =
      c10::DispatchKeySet(
          {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
           c10::DispatchKey::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  return (t.key_set().raw_repr() & ~known.raw_repr()) == 0 && t.layout() == at::kStrided;
}

// Somebody who is to see the registered operator instead: a dispatch mode, a transform, a tracer.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::jit::tracer::isTracing();
}

// x in the type that autocast wants a linear layer to compute in.
Tensor autocast(const Tensor& x) {
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_enabled(device) || x.scalar_type() == at::kDouble) return x;
  return x.to(at::autocast::get_autocast_dtype(device));
}

bool differentiated_forward(const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }

struct Operands {
  Tensor x, lora_a, lora_b, bias;

  // Whether the layer is one that this module computes: any other is left to Python, whose messages say what is wrong.
  bool fit(const BaseWeight& w) const {
    if (!x.is_floating_point() || x.dim() < 1 || x.size(-1) != w.k || x.numel() == 0) return false;
    if (lora_a.defined() != lora_b.defined()) return false;
    if (lora_a.defined()) {
      if (lora_a.dim() != 2 || lora_a.size(0) < 1 || lora_a.size(1) != w.k) return false;
      if (lora_b.dim() != 2 || lora_b.size(0) != w.n || lora_b.size(1) != lora_a.size(0)) return false;
      if (!lora_a.is_floating_point() || !lora_b.is_floating_point()) return false;
    }
    if (bias.defined() && (bias.dim() != 1 || bias.size(0) != w.n)) return false;
    const auto device = w.w_packed.device();
    for (const Tensor* t : {&x, &lora_a, &lora_b, &bias}) {
      if (t->defined() && (t->device() != device || !plain(*t) || differentiated_forward(*t))) return false;
    }
    return true;
  }

  bool require_grad() const {
    if (!at::GradMode::is_enabled()) return false;
    return x.requires_grad() || (lora_a.defined() && (lora_a.requires_grad() || lora_b.requires_grad())) ||
           (bias.defined() && bias.requires_grad());
  }
};

Tensor forward(
    const std::shared_ptr<const BaseWeight>& weight,
    const Form& form,
    const Operands& o,
    double scale,
    double p,
    bool wide) {
  const BaseWeight& w = *weight;
  const ScalarType compute = o.x.scalar_type();
  Tensor y, u;
  Dropout dropout{p, {}};
  {
    const BelowAutograd below;
    if (p > 0.0) dropout.seed = draw_seed(o.x);
    const auto [a, b] = readable(o.lora_a, o.lora_b, compute);
    const Tensor& bias = o.bias;
    torch::jit::Stack stack;
    stack.reserve(20);
    stack.emplace_back((o.x.dim() == 2 ? o.x : o.x.reshape({-1, w.k})).contiguous());
    w.push(stack);
    push_optional(stack, a);
    push_optional(stack, b);
    push_optional(
        stack, bias.defined() ? (bias.scalar_type() == compute ? bias : bias.to(at::kFloat)).contiguous() : bias);
    stack.emplace_back(scale);
    stack.emplace_back(wide);
    if (form.capability) stack.emplace_back(*form.capability);
    dropout.push(stack);
    form.forward->callBoxed(&stack);
    y = stack[0].toTensor();
    u = stack[1].toTensor();
    if (o.x.dim() != 2) {
      std::vector<int64_t> sizes = o.x.sizes().vec();
      sizes.back() = w.n;
      y = y.view(sizes);
    }
  }
  if (!o.require_grad()) return y;
  const auto node = make_node<LoraLinearBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(o.x, o.lora_a, o.lora_b, o.bias));
  node->save(
      node->should_compute_output(1) ? o.x : Tensor(), node->should_compute_output(2) ? u : Tensor(), o.lora_a,
      o.lora_b, dropout);
  node->weight = weight;
  node->form = form;
  node->scale = scale;
  node->compute_type = compute;
  if (o.bias.defined()) node->bias_type = o.bias.scalar_type();
  node->sizes = o.x.sizes().vec();
  torch::autograd::create_gradient_edge(y, node);
  return y;
}

// -- Python ----------------------------------------------------------------------------------------------------------

// What the choice of the operators depends on. `backend` is kept alive, so that its address stays its own.
struct Key {
  int64_t m, r, state;
  PyObject* backend;
  ScalarType type;
  bool dropout;

  bool operator==(const Key& other) const {
    return m == other.m && r == other.r && state == other.state && backend == other.backend && type == other.type &&
           dropout == other.dropout;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = std::hash<PyObject*>()(key.backend);
    for (const int64_t part : {key.m, key.r, key.state, static_cast<int64_t>(key.type), int64_t{key.dropout}}) {
      hash = hash * 1000003 ^ static_cast<size_t>(part);
    }
    return hash;
  }
};

// Batches of ever new lengths must not fill the memory.
constexpr size_t kMostForms = 4096;

struct Layer {
  PyObject_HEAD std::shared_ptr<const BaseWeight> weight;
  std::unordered_map<Key, Form, Hash> forms;
  PyObject* choose;
};

Layer* as_layer(PyObject* object) { return reinterpret_cast<Layer*>(object); }

void forget(Layer* layer) {
  for (const auto& entry : layer->forms) Py_DECREF(entry.first.backend);
  layer->forms.clear();
}

void dealloc(PyObject* self) {
  Layer* layer = as_layer(self);
  PyTypeObject* type = Py_TYPE(self);
  forget(layer);
  Py_XDECREF(layer->choose);
  layer->forms.~unordered_map();
  layer->weight.~shared_ptr();
  type->tp_free(self);
  Py_DECREF(type);
}

// A tensor, or none for None. False for anything else, subclasses included.
bool take(PyObject* object, Tensor& t) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return true;
}

// Layer(w_packed, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset, n, k, blocksize, fp4, choose)
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* /*keywords*/) {
  HANDLE_TH_ERRORS
  std::array<PyObject*, 6> tensors{};
  long long n = 0, k = 0, blocksize = 0;
  int fp4 = 0;
  PyObject* choose = nullptr;
  if (!PyArg_ParseTuple(
          arguments, "OOOOOOLLLpO", &tensors[0], &tensors[1], &tensors[2], &tensors[3], &tensors[4], &tensors[5], &n,
          &k, &blocksize, &fp4, &choose)) {
    return nullptr;
  }
  auto w = std::make_shared<BaseWeight>();
  const std::array<Tensor*, 6> fields{&w->w_packed,     &w->absmax,      &w->absmax_q,
                                      &w->absmax_scale, &w->absmax_code, &w->absmax_offset};
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!take(tensors[i], *fields[i]) || (fields[i]->defined() && !plain(*fields[i]))) {
      PyErr_SetString(PyExc_TypeError, "the base weight is not made of plain tensors");
      return nullptr;
    }
  }
  w->n = n;
  w->k = k;
  w->blocksize = blocksize;
  w->fp4 = fp4 != 0;
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  Layer* layer = as_layer(self);
  new (&layer->weight) std::shared_ptr<const BaseWeight>(std::move(w));
  new (&layer->forms) std::unordered_map<Key, Form, Hash>();
  Py_INCREF(choose);
  layer->choose = choose;
  return self;
  END_HANDLE_TH_ERRORS
}

std::optional<c10::OperatorHandle> operator_named(PyObject* name) {
  if (name == Py_None) return std::nullopt;
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) throw python_error();
  return c10::Dispatcher::singleton().findSchemaOrThrow(text, "");
}

// What `choose(m, r, dtype, dropout, backend)` says: (forward, backward, capability), each of them or None.
Form chosen(Layer* layer, const Key& key) {
  PyObject* dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(key.type));
  PyObject* dropout = key.dropout ? Py_True : Py_False;
  THPObjectPtr answer(
      PyObject_CallFunction(layer->choose, "LLOOO", (long long)key.m, (long long)key.r, dtype, dropout, key.backend));
  PyObject *forward = nullptr, *backward = nullptr, *capability = nullptr;
  if (!answer || !PyArg_ParseTuple(answer.get(), "OOO", &forward, &backward, &capability)) throw python_error();
  Form form{operator_named(forward), operator_named(backward), std::nullopt};
  if (capability != Py_None) form.capability = PyLong_AsLongLong(capability);
  return form;
}

const Form& form_of(Layer* layer, const Key& key) {
  const auto known = layer->forms.find(key);
  if (known != layer->forms.end()) return known->second;
  Form form = chosen(layer, key);
  if (layer->forms.size() >= kMostForms) forget(layer);
  const auto [entry, added] = layer->forms.emplace(key, std::move(form));
  if (added) Py_INCREF(key.backend);
  return entry->second;
}

// call(x, lora_a, lora_b, bias, scale, p, out_dtype, autocast, backend, state) -> y, or None where Python is to compute
// the layer
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 10) {
    PyErr_SetString(PyExc_TypeError, "call takes 10 arguments");
    return nullptr;
  }
  Layer* layer = as_layer(self);
  Operands o;
  if (!take(arguments[0], o.x) || !take(arguments[1], o.lora_a) || !take(arguments[2], o.lora_b) ||
      !take(arguments[3], o.bias) || !o.x.defined() || watched() || !o.fit(*layer->weight)) {
    Py_RETURN_NONE;
  }
  if (!PyFloat_Check(arguments[4]) && !PyLong_Check(arguments[4])) Py_RETURN_NONE;  // a tensor, which may change
  const double scale = PyFloat_AsDouble(arguments[4]);
  double p = PyFloat_AsDouble(arguments[5]);
  const long long state = PyLong_AsLongLong(arguments[9]);
  if (PyErr_Occurred()) return nullptr;
  if (!(p >= 0.0 && p <= 1.0)) Py_RETURN_NONE;
  if (!o.lora_a.defined()) p = 0.0;
  if (arguments[7] == Py_True) o.x = autocast(o.x);
  bool wide = false;
  if (arguments[6] != Py_None) {
    if (!THPDtype_Check(arguments[6])) Py_RETURN_NONE;
    const ScalarType type = reinterpret_cast<THPDtype*>(arguments[6])->scalar_type;
    wide = type != o.x.scalar_type();
    if (wide && type != at::kFloat) Py_RETURN_NONE;
  }
  const Key key{
      o.x.numel() / layer->weight->k,
      o.lora_a.defined() ? o.lora_a.size(0) : 0,
      state,
      arguments[8],
      o.x.scalar_type(),
      p > 0.0};
  const Form form = form_of(layer, key);
  if (!form.forward || (!form.backward && o.require_grad())) Py_RETURN_NONE;
  if (form.capability && std::getenv(kCapabilityVariable) != nullptr) Py_RETURN_NONE;
  const std::shared_ptr<const BaseWeight> weight = layer->weight;
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = forward(weight, form, o, scale, p, wide);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
     "call(x, lora_a, lora_b, bias, scale, p, out_dtype, autocast, backend, state) -> y (..., N), or None"},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(&create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr}};

PyType_Spec spec = {"fastlora.Layer", sizeof(Layer), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fastlora

#define FASTLORA_INIT_OF(name) PyInit_##name
#define FASTLORA_INIT(name) FASTLORA_INIT_OF(name)

PyMODINIT_FUNC FASTLORA_INIT(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&fastlora::definition);
  if (module == nullptr) return nullptr;
  PyObject* layer = PyType_FromSpec(&fastlora::spec);
  if (layer == nullptr || PyModule_AddObject(module, "Layer", layer) != 0) {
    Py_XDECREF(layer);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
