// Readers of single flag values. Each returns an error text that fits after "--flag=value: ", empty
// when the value is good. Pure, thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/core/redundancy.h"
#include "worker/launcher/flags.h"

namespace everstep::launcher {

// A decimal number within [low, high]; spaces around it are allowed, as Python's int() allows them.
std::string ReadInteger(std::string_view text, std::int64_t low, std::int64_t high,
                        std::int64_t* out);
std::string ReadSeconds(std::string_view text, double* out);
// "600": seconds; "100steps": steps. The other one is 0.
std::string ReadInterval(std::string_view text, double* seconds, std::uint64_t* steps);
std::string ReadNodes(std::string_view text, std::uint32_t* min_nodes, std::uint32_t* max_nodes);
std::string ReadWorkerCount(std::string_view text, WorkerCount* out);
std::string ReadStreams(std::string_view text, StreamSpec* out);
std::string ReadConfig(std::string_view text, std::map<std::string, std::string>* out);
std::string ReadRanks(std::string_view text, std::vector<std::int32_t>* out);
std::string ReadSignals(std::string_view text, std::vector<std::string>* out);
std::string ReadJobName(std::string_view text, std::string* out);
// "rs(4+2)"; checkpoint/core/redundancy.h.
std::string ReadRedundancy(std::string_view text, std::optional<checkpoint::Redundancy>* out);
// "a,b" with ",," standing for a comma in an item.
std::vector<std::string> ReadFilters(std::string_view text);

}  // namespace everstep::launcher
