// A manifest that others wrote. Whole ones go both ways; the checksum at their end is made right
// for half of the inputs, so that the parser behind it is reached.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "checkpoint/files/manifest.h"
#include "proto/base/crc32c.h"
#include "tests/fuzz/files_fuzz.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
  if ((data[0] & 1) != 0) {
    text = fmt::format("{},\n \"crc32c\": \"{:08x}\"}}\n", text, everstep::Crc32c(text));
  }
  const auto manifest = ParseManifest(text);
  WantsText(manifest);
  if (!manifest.ok()) return 0;
  const auto again = ParseManifest(WriteManifest(manifest.value()));
  if (!again.ok() || !(again.value() == manifest.value())) __builtin_trap();
  return 0;
}
