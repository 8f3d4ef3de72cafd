// Any bytes from a controller become a command of the core, or an error text; names in it are safe
// as file names.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "proto/base/check.h"
#include "worker/agent/convert.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  everstep::v1::ControllerMessage message;
  if (!message.ParseFromArray(data, static_cast<int>(size))) return 0;
  std::string error;
  std::optional<everstep::agent::Event> event = everstep::agent::FromWire(message, &error);
  EVERSTEP_CHECK(event.has_value() || !error.empty());
  return 0;
}
