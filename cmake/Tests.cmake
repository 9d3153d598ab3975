# Unit tests, one ctest case for each GoogleTest case, in up to four programs: core code, kernels and emulated CUDA kernels, which
# link no torch and start at once, and operators. Kernel tests run once for each instruction set of this machine: the cap in ATEN_CPU_CAPABILITY is what the
# library's own dispatcher obeys.
include(FindOrFetchGTest)
include(GoogleTest)

set(environment "UBSAN_OPTIONS=print_stacktrace=1")

# moda_ext_test_program(name library sources...): `library` is what the tests exercise.
function(moda_ext_test_program name library)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE moda_ext_flags ${library} GTest::gtest_main)
endfunction()

if(MODA_EXT_TEST_CORE_SOURCES)
  moda_ext_test_program(moda_ext_core_tests moda_ext_kernels ${MODA_EXT_TEST_CORE_SOURCES})
  gtest_discover_tests(moda_ext_core_tests DISCOVERY_TIMEOUT 60 PROPERTIES ENVIRONMENT "${environment}")
endif()

# The CUDA kernels on the CPU (csrc/cuda/emulation). Variables that nobody set hold a pattern, as registers would hold anything.
# Its threads switch stacks by themselves, which the sanitizers cannot follow. They are the same on every processor, so one that is
# emulated itself need not run them.
if(MODA_EXT_TEST_CUDA_EMULATION_SOURCES AND NOT MODA_EXT_SANITIZE AND NOT CMAKE_CROSSCOMPILING)
  add_library(moda_ext_cuda_emulation INTERFACE)
  target_compile_definitions(moda_ext_cuda_emulation INTERFACE MODA_EXT_CUDA_EMULATION)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-ftrivial-auto-var-init=pattern MODA_EXT_HAS_AUTO_VAR_INIT)
  target_compile_options(
    moda_ext_cuda_emulation INTERFACE -O1 -Wno-unknown-pragmas # compiling takes longer than running
                                      $<$<BOOL:${MODA_EXT_HAS_AUTO_VAR_INIT}>:-ftrivial-auto-var-init=pattern>)
  moda_ext_test_program(moda_ext_cuda_tests moda_ext_cuda_emulation ${MODA_EXT_TEST_CUDA_EMULATION_SOURCES})
  gtest_discover_tests(moda_ext_cuda_tests DISCOVERY_TIMEOUT 60 PROPERTIES ENVIRONMENT "${environment}" TIMEOUT 600)
endif()

if(MODA_EXT_TEST_OPERATOR_SOURCES AND MODA_EXT_TORCH)
  moda_ext_test_program(moda_ext_operator_tests moda_ext_operators ${MODA_EXT_TEST_OPERATOR_SOURCES})
  gtest_discover_tests(moda_ext_operator_tests DISCOVERY_TIMEOUT 60 PROPERTIES ENVIRONMENT "${environment}")
endif()

if(MODA_EXT_TEST_PER_ISA_SOURCES)
  moda_ext_test_program(moda_ext_isa_tests moda_ext_kernels ${MODA_EXT_TEST_PER_ISA_SOURCES})
  # What torch calls the instruction sets: the machine's, and in ATEN_CPU_CAPABILITY each of ours.
  set(machine_isas baseline)
  if(MODA_EXT_MACHINE_ISA MATCHES "^AVX(2|512)")
    list(APPEND machine_isas avx2)
  endif()
  if(MODA_EXT_MACHINE_ISA MATCHES "^AVX512")
    list(APPEND machine_isas avx512)
  endif()
  if(EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo avx512_bf16 REGEX "^flags.* avx512_bf16" LIMIT_COUNT 1)
    if(avx512_bf16)
      list(APPEND machine_isas avx512_bf16)
    endif()
    file(STRINGS /proc/cpuinfo neon_bf16 REGEX "^Features.* bf16" LIMIT_COUNT 1)
    if(MODA_EXT_AARCH64 AND CMAKE_CROSSCOMPILING) # qemu has BF16 since 6.1
      list(GET CMAKE_CROSSCOMPILING_EMULATOR 0 emulator)
      execute_process(COMMAND ${emulator} --version OUTPUT_VARIABLE version)
      string(REGEX MATCH "[0-9]+\\.[0-9]+" version "${version}")
      if(version VERSION_GREATER_EQUAL 6.1)
        set(neon_bf16 ON)
      endif()
    endif()
    if(neon_bf16)
      list(APPEND machine_isas neon_bf16)
    endif()
    file(STRINGS /proc/cpuinfo amx REGEX "^flags.* amx_bf16" LIMIT_COUNT 1)
    if(amx)
      list(APPEND machine_isas amx)
    endif()
  endif()
  foreach(isa ${MODA_EXT_ISAS})
    if(NOT isa IN_LIST machine_isas)
      message(STATUS "Kernel tests for ${isa} are not registered: the instruction set of this machine is ${MODA_EXT_MACHINE_ISA}")
      continue()
    endif()
    set(filter "-Amx.*")
    string(REPLACE baseline default capability "set:${isa}")
    if(isa STREQUAL "amx")
      set(filter "*")
    endif()
    if(isa MATCHES "^(amx|neon_bf16)$") # the best instruction set is what runs without a cap
      set(capability "unset:")
    endif()
    if(isa STREQUAL "baseline" AND MODA_EXT_AARCH64)
      set(isa neon)
    endif()
    gtest_discover_tests(
      moda_ext_isa_tests
      TEST_PREFIX "${isa}/"
      TEST_LIST moda_ext_isa_tests_${isa}
      TEST_FILTER "${filter}"
      DISCOVERY_TIMEOUT 60
      PROPERTIES ENVIRONMENT "${environment};MODA_EXT_TEST_ISA=${isa}" ENVIRONMENT_MODIFICATION
                 "ATEN_CPU_CAPABILITY=${capability}")
  endforeach()
endif()
