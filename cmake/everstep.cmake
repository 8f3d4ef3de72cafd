# House rules of the build, in one place.

# Designated initialisers name what matters; the rest has defaults.
set(EVERSTEP_WARNINGS -Wall -Wextra -Wno-missing-field-initializers -Wshadow -Werror)

if(EVERSTEP_SANITIZE)
  add_compile_options(-fsanitize=${EVERSTEP_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${EVERSTEP_SANITIZE})
  if(EVERSTEP_SANITIZE STREQUAL "address")
    add_compile_options(-fsanitize=undefined -fno-sanitize-recover=undefined)
    add_link_options(-fsanitize=undefined)
  endif()
endif()

# everstep_library(NAME SOURCES ... [LINK ...])
function(everstep_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${EVERSTEP_WARNINGS})
  target_link_libraries(${name} PUBLIC ${ARG_LINK})
endfunction()

# A pure core: links only proto/base and other cores (DESIGN section 3). The rule is kept here and by
# tests/house_rules.
function(everstep_core name)
  everstep_library(${name} ${ARGN})
  target_compile_options(${name} PRIVATE -Wconversion)
endfunction()

# everstep_program(NAME SOURCES ... [LINK ...]): a binary in build/*/bin.
function(everstep_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${EVERSTEP_WARNINGS})
  target_link_libraries(${name} PRIVATE ${ARG_LINK})
endfunction()

# everstep_test(NAME SOURCES ... [LINK ...] [LABELS unit|datadriven|property|integration ...]
#               [TIMEOUT seconds])
# One GoogleTest binary = one ctest entry (case discovery would start each binary at build time).
function(everstep_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LINK;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${EVERSTEP_WARNINGS})
  target_compile_definitions(${name} PRIVATE EVERSTEP_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
                                             EVERSTEP_BINARY_DIR="${CMAKE_BINARY_DIR}")
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gtest GTest::gtest_main)
  set_target_properties(${name} PROPERTIES
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
endfunction()
