#include "worker/agent/error_file.h"

#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>

namespace everstep::agent {

Timestamp ErrorTime(std::string_view text) {
  constexpr std::int64_t kSecond = 1'000'000'000;
  constexpr std::int64_t kLatest = 9'000'000'000;  // seconds; beyond it nanoseconds overflow
  const nlohmann::json json =
      nlohmann::json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  const nlohmann::json* at = &json;
  for (const char* key : {"message", "extraInfo", "timestamp"}) {
    if (!at->is_object()) return {};
    const auto next = at->find(key);
    if (next == at->end()) return {};
    at = &*next;
  }
  std::int64_t seconds = 0;
  if (at->is_string()) {
    const std::string& s = at->get_ref<const std::string&>();
    std::from_chars(s.data(), s.data() + s.size(), seconds);
  } else if (at->is_number_integer()) {
    seconds = at->get<std::int64_t>();
  }
  if (seconds <= 0 || seconds > kLatest) return {};
  return Timestamp{seconds * kSecond};
}

void FillError(const std::string& fallback, ExitInfo* exit) {
  if (exit->code == 0) return;
  if (exit->error_file.empty()) exit->error_file = fallback;
  if (exit->error_file.empty()) return;
  const std::string folder = exit->error_file.substr(0, exit->error_file.rfind('/') + 1);
  if (std::ifstream refusal(folder + kRefusalFile, std::ios::binary); refusal) {
    std::string text(kMaxRefusal, '\0');
    refusal.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(refusal.gcount()));
    for (char& c : text) {  // one line of ASCII, whatever is in it: it goes into messages
      if (c < ' ' || c > '~') c = c == '\n' ? ' ' : '?';
    }
    exit->refused = std::move(text);
  }
  std::ifstream file(exit->error_file, std::ios::binary);
  if (!file) {
    exit->error_file.clear();  // the worker wrote none
    return;
  }
  std::string text(kMaxErrorFile, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  exit->error_time = ErrorTime(text);
  exit->error_json = std::move(text);
}

}  // namespace everstep::agent
