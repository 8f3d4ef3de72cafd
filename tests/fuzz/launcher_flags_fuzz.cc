// Any command line and any PET_ environment gives flags or one sentence of error.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "proto/base/check.h"
#include "worker/launcher/flags.h"

using everstep::launcher::Environment;
using everstep::launcher::ParseFlags;
using everstep::launcher::ParseKind;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // NUL separates arguments; one that begins with "PET_" and holds '=' goes to the environment.
  std::vector<std::string> arguments;
  Environment environment;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  while (!rest.empty()) {
    std::size_t end = rest.find('\0');
    std::string_view word = rest.substr(0, end);
    std::size_t equals = word.find('=');
    if (word.starts_with("PET_") && equals != std::string_view::npos) {
      environment[std::string(word.substr(0, equals))] = std::string(word.substr(equals + 1));
    } else {
      arguments.emplace_back(word);
    }
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
  }
  everstep::launcher::ParseResult result = ParseFlags(arguments, environment);
  EVERSTEP_CHECK(result.kind != ParseKind::kError || !result.error.empty());
  if (result.kind == ParseKind::kRun) {
    EVERSTEP_CHECK(result.flags.min_nodes >= 1 && result.flags.min_nodes <= result.flags.max_nodes);
    EVERSTEP_CHECK(result.flags.max_nodes <= everstep::launcher::kMaxNodes);
  }
  return 0;
}
