// A CUDA device for builds of torch without CUDA, as far as tensors without data need one: a device to be current, a
// default stream, and generators. `tests/train/fake_gpu.py` says what for. Preloaded, so that torch finds it when it starts.

#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <mutex>
#include <set>

namespace {

const c10::Device kDevice{c10::kCUDA, 0};

// Draws nothing: tensors have no data. Operators check that its device is theirs.
struct FakeGenerator : c10::GeneratorImpl {
  FakeGenerator() : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_state(const c10::TensorImpl&) override {}
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return {}; }
  GeneratorImpl* clone_impl() const override { return new FakeGenerator(); }

 private:
  uint64_t seed_ = 0;
};

// Page-locked memory: ordinary memory that is remembered.
std::mutex pinned_mutex;
std::set<const void*> pinned;

struct FakePinnedAllocator : c10::Allocator {
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(pointer);
    }
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t num_bytes) override {
    void* pointer = std::aligned_alloc(64, (num_bytes + 64) / 64 * 64);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(pointer);
    return {pointer, pointer, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }
};

struct FakeHooks : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(pointer) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static FakePinnedAllocator allocator;
    return &allocator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<FakeGenerator>(); }
};

struct FakeGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
}
