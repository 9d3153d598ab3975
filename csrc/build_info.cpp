// The library moda_ext._build_info: what this build is, as JSON. It links neither torch nor Python, so that it can be
// asked under any torch and any Python, and before the operators are loaded (moda_ext/_ops/library.py).
#include <string>

#include "cpu/isa.h"
#include "moda_ext_build_info.h"  // written by setup.py

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

// The caller does not free the text.
extern "C" __attribute__((visibility("default"))) const char* moda_ext_build_info() {
  using namespace moda_ext::cpu;
  static const std::string json = std::string("{" MODA_EXT_BUILD_FIELDS ", \"isas\": [\"") + isa_name(Isa::baseline) +
                                  "\"" MODA_EXT_OTHER_ISAS "], \"isa\": \"" + isa_name(active_isa()) +
                                  "\", \"compiler\": \"" + kCompiler + "\"}";
  return json.c_str();
}
