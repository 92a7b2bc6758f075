# The LibTorch stable ABI of an installed torch wheel: its headers and libtorch.so, nothing else.
# find_package(Torch) is avoided: it brings Caffe2 targets and, for a CUDA wheel, demands a CUDA toolkit.
#
# Input:  TORCH_DIR (cache or environment), the installed torch package, for builds in another interpreter's environment.
# Output: TorchStable::TorchStable, TorchStable_INCLUDE_DIR, TorchStable_VERSION.
if(NOT TORCH_DIR)
  set(TORCH_DIR "$ENV{TORCH_DIR}")
endif()
if(NOT TORCH_DIR)
  # pip's build isolation hides site-packages from sys.path, not from sysconfig. uv's is an environment of its own, which
  # knows nothing of the one it builds for: that is the .venv of the project, or activated and so on PATH. A torch of
  # another environment does no harm: the ABI is stable.
  set(_torch_pythons "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
  string(REPLACE ":" ";" _torch_path "$ENV{PATH}")
  list(TRANSFORM _torch_path APPEND "/python")
  foreach(_python IN LISTS _torch_pythons _torch_path)
    if(EXISTS "${_python}")
      execute_process(COMMAND "${_python}" -c "import sysconfig; print(sysconfig.get_path('platlib'))"
        OUTPUT_VARIABLE _torch_site OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _torch_failed)
      if(NOT _torch_failed AND EXISTS "${_torch_site}/torch/include/torch/csrc/stable/library.h")
        set(TORCH_DIR "${_torch_site}/torch")
        break()
      endif()
    endif()
  endforeach()
endif()

find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h HINTS "${TORCH_DIR}/include" NO_DEFAULT_PATH)
find_library(TorchStable_LIBRARY torch HINTS "${TORCH_DIR}/lib" NO_DEFAULT_PATH)
find_library(TorchStable_CPU_LIBRARY torch_cpu HINTS "${TORCH_DIR}/lib" NO_DEFAULT_PATH)
set(_torch_version "${TorchStable_INCLUDE_DIR}/torch/headeronly/version.h")
if(EXISTS "${_torch_version}")
  file(READ "${_torch_version}" _torch_version)
  foreach(_part MAJOR MINOR PATCH)
    string(REGEX MATCH "define TORCH_VERSION_${_part} ([0-9]+)" _ "${_torch_version}")
    list(APPEND _torch_parts "${CMAKE_MATCH_1}")
  endforeach()
  list(JOIN _torch_parts "." TorchStable_VERSION)
endif()

if(TORCH_DIR)
  set(_torch_where "in TORCH_DIR='${TORCH_DIR}'")
else()
  set(_torch_where "for '${Python_EXECUTABLE}', in .venv, or for a python on PATH")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable
  REQUIRED_VARS TorchStable_LIBRARY TorchStable_CPU_LIBRARY TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "no torch >= 2.10 ${_torch_where}: install torch first. Where it is: activate its environment, or \
set TORCH_DIR=<site-packages>/torch, or build without isolation (--no-build-isolation, with scikit-build-core and pybind11 installed)")

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable INTERFACE IMPORTED)
  target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  # libtorch.so must stay in DT_NEEDED although no symbol is taken from it: on a CUDA wheel it brings libtorch_cuda in.
  target_link_options(TorchStable::TorchStable INTERFACE
    LINKER:--push-state,--no-as-needed "${TorchStable_LIBRARY}" "${TorchStable_CPU_LIBRARY}" LINKER:--pop-state)
endif()
