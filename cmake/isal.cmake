# isal::isal: ISA-L, the arithmetic of parity (checkpoint/codec). It brings no CMake package of its own.
find_path(ISAL_INCLUDE_DIR isa-l/erasure_code.h)
find_library(ISAL_LIBRARY isal)
if(NOT ISAL_INCLUDE_DIR OR NOT ISAL_LIBRARY)
  message(FATAL_ERROR "ISA-L is missing (isa-l/erasure_code.h, libisal): apt-get install libisal-dev, "
                      "or run deploy/setup.sh, which installs all that is needed")
endif()
add_library(isal::isal INTERFACE IMPORTED)
target_include_directories(isal::isal INTERFACE ${ISAL_INCLUDE_DIR})
target_link_libraries(isal::isal INTERFACE ${ISAL_LIBRARY})
