// "sim", a kind of device for torch: its memory is the CPU's and its operations are the CPU's, but what CUDA refuses it
// refuses too (operands on different devices), and reading memory that was given back is an error, not a surprise.
// New memory is filled with 0x7f bytes: large numbers, which show where something is read before it is written.
// device.py is the Python side.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <sstream>

namespace {

constexpr auto SIM = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 8;
thread_local int current = 0, target = 0;  // device; and of the next allocation
std::atomic<int64_t> held{0}, most{0};  // bytes, of all devices

// ------------------------------------------------------------------------------------------------------ memory

struct Allocator final : c10::Allocator {
  struct alignas(64) Header { size_t bytes; };

  static void release(void* data) {
    auto* header = static_cast<Header*>(data) - 1;
    held -= header->bytes;
    free(header);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(SIM, target);
    if (!bytes) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    auto* header = static_cast<Header*>(aligned_alloc(64, sizeof(Header) + (bytes + 63) / 64 * 64));
    header->bytes = bytes;
    held += bytes;
    most = std::max(most.load(), held.load());
    return {memset(header + 1, 0x7f, bytes), header + 1, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(SIM, &allocator);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  target = storage.device().index();
  auto fresh = allocator.allocate(bytes);
  if (bytes && storage.nbytes()) memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

// ---------------------------------------------------------------------------- devices, streams (there is but one)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, {SIM, static_cast<c10::DeviceIndex>(current)});
  }
  c10::DeviceType type() const override { return SIM; }
  c10::Device getDevice() const override { return {SIM, static_cast<c10::DeviceIndex>(current)}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current, index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// -------------------------------------------------------------------------------------- making and viewing tensors

void use(std::optional<at::Device> device) { target = device && device->has_index() ? device->index() : current; }
at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  use(device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  use(device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}
at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto begin = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
}
at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = (self.numel() + self.storage_offset()) * self.itemsize();
  if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  return self;
}
// `parameter.data = parameter.to("sim")` may change the device, as it may for CUDA
bool may_become(const at::Tensor&, const at::Tensor&) { return true; }

// -------------------------------------------------------------------------------------------------- operations

void check_held(const at::Tensor& t, const std::string& who) {
  TORCH_CHECK(!t.numel() || t.storage().nbytes(), who, " reads memory that was given back");
}
at::Tensor on_cpu(const at::Tensor& t) {  // the same memory
  if (!t.is_privateuseone()) return t;
  check_held(t, "a copy");
  const auto options = at::TensorOptions().dtype(t.dtype());
  if (!t.numel()) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [](void*) {}, options);
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(self));
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Scalar local_scalar_dense(const at::Tensor& self) { return at::_local_scalar_dense(on_cpu(self)); }
bool is_pinned(const at::Tensor&, std::optional<at::Device>) { return false; }
void record_stream(at::Tensor&, c10::Stream) {}

// Everything else is done by the CPU's kernels on copies, after CUDA's check: all tensors on one device, but for single
// numbers, and indices, which CUDA takes from the CPU.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> indexing{"aten::index", "aten::_unsafe_index", "aten::index_put_",
                                              "aten::index_put", "aten::_index_put_impl_"};
  const auto& name = op.schema().operator_name().name;
  std::set<std::string> devices;
  std::ostringstream what;
  const auto see = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.is_privateuseone()) check_held(t, name);
    if (t.dim() || t.is_privateuseone()) devices.insert(t.device().str());
    what << ' ' << t.sizes() << t.device();
  };
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    const auto& value = (*stack)[i];
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList()) for (const auto& t : value.toTensorVector()) see(t);
    if (value.isOptionalTensorList()) for (const auto& t : value.toOptionalTensorVector()) if (t) see(*t);
  }
  TORCH_CHECK(devices.size() < 2 || indexing.count(name), name, ": tensors on different devices:", what.str());
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("resize_", resize);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("is_pinned", is_pinned);
  m.impl("record_stream", record_stream);
  m.impl("_has_compatible_shallow_copy_type", may_become);
}
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_has_compatible_shallow_copy_type", may_become); }

extern "C" int64_t sim_bytes_held() { return held; }
extern "C" int64_t sim_bytes_most() { return most; }
extern "C" void sim_forget_most() { most = held.load(); }
