// Any command line of `everstep` gives a command, help, or one error with a hint; any half-typed
// one gives candidates that begin with what was typed.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "controller/cli/command.h"
#include "controller/cli/manual.h"
#include "controller/cli/tree.h"
#include "proto/base/check.h"

using namespace everstep::cli;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // NUL separates words.
  std::vector<std::string> words;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  while (!rest.empty()) {
    const std::size_t end = rest.find('\0');
    words.emplace_back(rest.substr(0, end));
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
  }
  const Result<Parsed> parsed = Parse(Program(), words);
  if (!parsed.ok()) {
    EVERSTEP_CHECK(parsed.error().exit == ExitCode::kUsage);
    EVERSTEP_CHECK(!parsed.error().message.empty() && !parsed.error().hint.empty());
    EVERSTEP_CHECK(!FormatError(parsed.error()).empty() &&
                   !FormatErrorJson(parsed.error()).empty());
  } else if (parsed.value().help) {
    EVERSTEP_CHECK(parsed.value().path.empty() ||
                   !CommandHelp(Program(), parsed.value().path).empty());
  } else {
    EVERSTEP_CHECK(parsed.value().command() != nullptr);
    EVERSTEP_CHECK(parsed.value().command()->verb != Verb::kGroup);
  }
  Names names = Names::kNone;
  for (const std::string& candidate : Candidates(Program(), Topics(), words, &names)) {
    EVERSTEP_CHECK(candidate.rfind(words.back(), 0) == 0);
  }
  for (const std::string& word : words) {
    const auto duration = ParseDuration("it", word);
    EVERSTEP_CHECK(!duration.ok() || duration.value().count() >= 0);
  }
  return 0;
}
