# Target moda_ext_torch: headers and libraries of the torch that Python imports, or that -DPython3_EXECUTABLE=... imports.
# find_package(Torch) is not used: with a CUDA torch it fails on a machine without a CUDA toolkit.
# Also sets MODA_EXT_MACHINE_ISA to what torch says of this CPU: DEFAULT, AVX2, AVX512, ...
find_package(Python3 3.10 REQUIRED COMPONENTS Interpreter)

execute_process(
  COMMAND
    ${CMAKE_COMMAND} -E env --unset=ATEN_CPU_CAPABILITY ${Python3_EXECUTABLE} -c
    "import runpy, torch
from torch.utils import cpp_extension as ext
target = runpy.run_path('${PROJECT_SOURCE_DIR}/moda_ext/_version.py')['TORCH_TARGET_VERSION']
print(torch.__version__, ','.join(ext.include_paths()), ext.library_paths()[0],
      torch.backends.cpu.get_cpu_capability(), target, sep=';', end='')"
  OUTPUT_VARIABLE answer
  ERROR_VARIABLE error
  RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${Python3_EXECUTABLE} cannot import torch. Fix: ${Python3_EXECUTABLE} -m pip install torch\n${error}")
endif()
list(GET answer 0 torch_version)
list(GET answer 1 torch_include)
list(GET answer 2 torch_lib)
list(GET answer 3 MODA_EXT_MACHINE_ISA)
list(GET answer 4 torch_target)
string(REPLACE "," ";" torch_include "${torch_include}")
message(STATUS "torch ${torch_version} in ${torch_lib}")

add_library(moda_ext_torch INTERFACE)
target_include_directories(moda_ext_torch SYSTEM INTERFACE ${torch_include})
target_compile_definitions(moda_ext_torch INTERFACE TORCH_TARGET_VERSION=${torch_target})
# --no-as-needed: operators register themselves, so tests name no symbol of the library and the linker would drop it.
target_link_options(moda_ext_torch INTERFACE LINKER:--no-as-needed)
target_link_libraries(moda_ext_torch INTERFACE ${torch_lib}/libtorch.so ${torch_lib}/libtorch_cpu.so ${torch_lib}/libc10.so)
target_link_options(moda_ext_torch INTERFACE LINKER:-rpath,${torch_lib})
