// Structured log lines: a stable event name and key=value fields, at state changes only.
//
//   LogInfo("node_lost", {{"node", "n7"}, {"incarnation", 3}, {"reason", "lease_expired"}});
//   -> 2026-01-31T14:02:11.482Z info  controller node_lost node=n7 incarnation=3
//   reason=lease_expired
//
// Names are listed in docs/reference/events.md. Human lines by default; one JSON object a line with
// Options::json. Thread-safe after LogInit; before it, lines go to stderr.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace everstep {

struct LogField {
  std::string_view key;
  std::string value;

  LogField(std::string_view k, std::string_view v) : key(k), value(v) {}
  LogField(std::string_view k, const std::string& v) : key(k), value(v) {}
  LogField(std::string_view k, const char* v) : key(k), value(v) {}
  LogField(std::string_view k, bool v) : key(k), value(v ? "true" : "false") {}
  LogField(std::string_view k, std::int32_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, std::int64_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, std::uint32_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, std::uint64_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, double v) : key(k), value(std::to_string(v)) {}
};

using LogFields = std::initializer_list<LogField>;

enum class LogLevel { kDebug, kInfo, kWarning, kError };

struct LogOptions {
  std::string process;  // "controller", "agent", ...: third column
  std::string file;     // empty: stderr. Appended to, reopened on LogReopen.
  bool json = false;
  LogLevel level = LogLevel::kInfo;
};

// Call once, before threads start. A file that cannot be opened falls back to stderr and says so.
void LogInit(const LogOptions& options);

void Log(LogLevel level, std::string_view event, LogFields fields);

inline void LogDebug(std::string_view e, LogFields f = {}) {
  Log(LogLevel::kDebug, e, f);
}
inline void LogInfo(std::string_view e, LogFields f = {}) {
  Log(LogLevel::kInfo, e, f);
}
inline void LogWarning(std::string_view e, LogFields f = {}) {
  Log(LogLevel::kWarning, e, f);
}
inline void LogError(std::string_view e, LogFields f = {}) {
  Log(LogLevel::kError, e, f);
}

}  // namespace everstep
