# Target GTest::gtest_main from the first of: an installed GoogleTest, the sources Debian puts in /usr/src/googletest, Debian's
# package unpacked without root rights into the build folder, the internet.
find_package(GTest QUIET)
if(TARGET GTest::gtest_main)
  message(STATUS "GoogleTest: installed")
  return()
endif()

if(EXISTS /usr/src/googletest/CMakeLists.txt)
  message(STATUS "GoogleTest: /usr/src/googletest")
  add_subdirectory(/usr/src/googletest googletest EXCLUDE_FROM_ALL SYSTEM)
  return()
endif()

set(debian_dir ${PROJECT_BINARY_DIR}/debian-gtest)
set(package libgtest-dev)
if(CMAKE_CROSSCOMPILING) # its libraries are this machine's: the sources
  set(package googletest)
endif()
find_program(apt_get apt-get)
find_program(dpkg_deb dpkg-deb)
if(apt_get AND dpkg_deb)
  # A machine that never ran `apt-get update` knows no packages: then ask for the lists, into this folder.
  file(
    WRITE ${debian_dir}/download.sh
    [[
      own_lists="-o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache -o APT::Sandbox::User=$(id -un)"
      apt-get download $1 || {
        mkdir -p lists/partial cache/archives/partial
        apt-get $own_lists update && apt-get $own_lists download $1
      }
      dpkg-deb -x $1_*.deb .
    ]])
  execute_process(
    COMMAND sh download.sh ${package}
    WORKING_DIRECTORY ${debian_dir}
    TIMEOUT 120
    OUTPUT_QUIET ERROR_QUIET)
  if(EXISTS ${debian_dir}/usr/src/googletest/CMakeLists.txt)
    message(STATUS "GoogleTest: sources of Debian's package unpacked in ${debian_dir}")
    add_subdirectory(${debian_dir}/usr/src/googletest googletest EXCLUDE_FROM_ALL SYSTEM)
    return()
  endif()
  find_package(GTest QUIET CONFIG PATHS ${debian_dir}/usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/cmake NO_DEFAULT_PATH)
  if(TARGET GTest::gtest_main)
    message(STATUS "GoogleTest: Debian package unpacked in ${debian_dir}")
    return()
  endif()
endif()

message(STATUS "GoogleTest: fetching v1.17.0 (or install it, or pass -DGTest_ROOT=...)")
include(FetchContent)
FetchContent_Declare(
  googletest
  GIT_REPOSITORY https://github.com/google/googletest.git
  GIT_TAG 52eb8108c5bdec04579160ae17225d66034bd723) # v1.17.0
set(INSTALL_GTEST OFF)
FetchContent_MakeAvailable(googletest)
