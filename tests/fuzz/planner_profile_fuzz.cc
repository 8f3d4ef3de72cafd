// Any text gives a profile that is written and read again as the same, or one sentence of refusal;
// a small one also gives templates or a refusal.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "controller/planner/library.h"
#include "proto/base/check.h"

using everstep::planner::Answer;
using everstep::planner::ParseProfile;
using everstep::planner::Profile;
using everstep::planner::ProfileText;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Answer<Profile> read =
      ParseProfile(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!read.ok()) {
    EVERSTEP_CHECK(!read.refusal().what.empty());
    return 0;
  }
  const Answer<Profile> again = ParseProfile(ProfileText(read.value()));
  EVERSTEP_CHECK(again.ok() && again.value() == read.value());
  if (read.value().layers.size() <= 12) {
    const auto made = everstep::planner::MakeLibrary(read.value(), {.nodes = 6, .faults = 1});
    EVERSTEP_CHECK(made.ok() || !made.refusal().what.empty());
  }
  return 0;
}
