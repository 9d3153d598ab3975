// The Python module moda_ext._C: what this build is. No tensors enter here; operators are in torch.ops.moda_ext.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "moda_ext_build_info.h"  // written by setup.py

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

// "" stands for "not built for it" and becomes None.
pybind11::object text_or_none(const std::string& text) {
  if (text.empty()) return pybind11::none();
  return pybind11::str(text);
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = MODA_EXT_BUILD_VERSION;
  info["summary"] = MODA_EXT_BUILD_SUMMARY;
  info["torch"] = MODA_EXT_BUILD_TORCH;
  info["cuda"] = text_or_none(MODA_EXT_BUILD_CUDA);
  info["cuda_archs"] = words(MODA_EXT_BUILD_CUDA_ARCHS);
  info["isas"] = words(MODA_EXT_BUILD_ISAS);
  info["isa"] = moda_ext::cpu::isa_name(moda_ext::cpu::active_isa());
  info["compiler"] = kCompiler;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of moda_ext.";
  m.def("build_info", &build_info,
        "What this build is: versions, instruction sets, the instruction set in use, compiler.");
}
