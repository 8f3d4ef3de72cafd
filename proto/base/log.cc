#include "proto/base/log.h"

#include <memory>

#include <fmt/format.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include "proto/base/clock.h"

namespace everstep {
namespace {

struct Logger {
  std::shared_ptr<spdlog::logger> sink = spdlog::stderr_logger_mt("everstep-early");
  std::string process = "-";
  bool json = false;
  RealClock clock;

  Logger() { sink->set_pattern("%v"); }
};

Logger& Instance() {
  static Logger* logger = new Logger;  // never destroyed: threads may log while the process exits
  return *logger;
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return spdlog::level::debug;
    case LogLevel::kInfo: return spdlog::level::info;
    case LogLevel::kWarning: return spdlog::level::warn;
    case LogLevel::kError: return spdlog::level::err;
  }
  return spdlog::level::info;
}

const char* LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return "debug";
    case LogLevel::kInfo: return "info";
    case LogLevel::kWarning: return "warn";
    case LogLevel::kError: return "error";
  }
  return "info";
}

// Quotes and backslash-escapes control characters, quotes and backslashes: valid inside JSON.
std::string Quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(static_cast<unsigned char>(c)));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

bool NeedsQuotes(std::string_view text) {
  if (text.empty()) return true;
  for (const char c : text) {
    if (c == ' ' || c == '"' || c == '=' || static_cast<unsigned char>(c) < 0x20) return true;
  }
  return false;
}

}  // namespace

void LogInit(const LogOptions& options) {
  Logger& logger = Instance();
  logger.process = options.process;
  logger.json = options.json;
  if (!options.file.empty()) {
    try {
      logger.sink = spdlog::basic_logger_mt("everstep", options.file);
    } catch (const spdlog::spdlog_ex& error) {
      fmt::print(stderr, "warning: cannot open log file {}: {}; logging to stderr instead\n",
                 options.file, error.what());
    }
  }
  logger.sink->set_pattern("%v");
  logger.sink->set_level(ToSpdlog(options.level));
  logger.sink->flush_on(spdlog::level::info);
}

void Log(LogLevel level, std::string_view event, LogFields fields) {
  Logger& logger = Instance();
  if (!logger.sink->should_log(ToSpdlog(level))) return;
  const std::string now = FormatTimestamp(logger.clock.Now());
  std::string line;
  if (logger.json) {
    line = fmt::format(R"({{"ts":"{}","level":"{}","process":{},"event":"{}")", now,
                       LevelName(level), Quoted(logger.process), event);
    for (const LogField& f : fields) line += fmt::format(",\"{}\":{}", f.key, Quoted(f.value));
    line += '}';
  } else {
    line = fmt::format("{} {:5} {} {}", now, LevelName(level), logger.process, event);
    for (const LogField& f : fields) {
      line += fmt::format(" {}={}", f.key, NeedsQuotes(f.value) ? Quoted(f.value) : f.value);
    }
  }
  logger.sink->log(ToSpdlog(level), line);
}

}  // namespace everstep
