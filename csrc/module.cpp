// fairkernels._C tells what this build contains. It alone knows Python; the operators live in fairkernels/_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

pybind11::object cuda_archs() {
#ifdef FK_CUDA_ARCHS
  return pybind11::cast(std::vector<std::string>{FK_CUDA_ARCHS});
#else
  return pybind11::none();
#endif
}

pybind11::object cuda_version() {
#ifdef FK_CUDA_VERSION
  return pybind11::str(FK_CUDA_VERSION);
#else
  return pybind11::none();
#endif
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
  return pybind11::dict("version"_a = FK_VERSION, "torch_target"_a = FK_TORCH_TARGET, "compiler"_a = kCompiler,
                        "cuda_archs"_a = cuda_archs(), "cuda_version"_a = cuda_version());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info,
             "Version, targeted torch, compiler, and for a build with CUDA its architectures and toolkit version.");
}
