// The Python module of one flavour of the emulator. Loading it also registers the operators.
#include "emulator.h"
#include "faults.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <utility>

namespace {

void configure(const std::string& order, uint64_t seed, bool late_copies, size_t shared_limit,
               bool dry) {
  cuda_host::launches.clear();
  auto& settings = cuda_host::settings;
  if (order == "forward") {
    settings.order = cuda_host::Order::kForward;
  } else if (order == "backward") {
    settings.order = cuda_host::Order::kBackward;
  } else if (order == "random") {
    settings.order = cuda_host::Order::kRandom;
  } else {
    throw std::invalid_argument("order must be forward, backward or random, got " + order);
  }
  settings.seed = seed;
  settings.late_copies = late_copies;
  settings.shared_limit = shared_limit;
  settings.dry = dry;
}

// (kernel, dynamic shared memory) of every launch since `configure`.
std::vector<std::pair<std::string, size_t>> launches() {
  std::map<const void*, std::string> names;
  std::vector<std::pair<std::string, size_t>> all;
  for (const auto& launch : cuda_host::launches) {
    std::string& name = names[launch.kernel];
    if (name.empty()) name = cuda_host::function_name(launch.kernel);
    all.emplace_back(name, launch.dynamic_bytes);
  }
  return all;
}

// What the kernel of a fault writes, on inputs 0, 1, 2, ...
std::vector<float> plant(const std::string& name, bool planted) {
  constexpr size_t kMargin = cuda_host::kMargin / sizeof(float);
  std::vector<float> in(faults::kInputs), out(faults::kOutputs + 2 * kMargin);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const size_t read = name == "unwaited_copy" ? in.size() : faults::kOutputs;
  const struct Forget {
    ~Forget() { cuda_host::forget_given(); }
  } forget;
  cuda_host::give(in.data(), read * sizeof(float), cuda_host::Given::kRead);
  cuda_host::give_fresh(out.data() + kMargin, faults::kOutputs * sizeof(float));
  faults::run(name, in.data(), out.data() + kMargin, planted);
  return {out.begin() + kMargin, out.end() - kMargin};
}

}  // namespace

PYBIND11_MODULE(XATTN_EMULATED_OPS, m) {
#if defined(CUDA_HOST_CHECKED)
  cuda_host::settings.checking = true;
#endif
  m.def("configure", configure, pybind11::arg("order"), pybind11::arg("seed"),
        pybind11::arg("late_copies"), pybind11::arg("shared_limit"), pybind11::arg("dry") = false);
  m.def("launches", launches);
  m.def("faults", faults::names);
  m.def("plant", plant);
}
