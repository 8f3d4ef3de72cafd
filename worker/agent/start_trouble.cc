#include "worker/agent/start_trouble.h"

#include <algorithm>
#include <fstream>

namespace everstep::agent {
namespace {

constexpr std::string_view kFullMesh = "connectFullMesh failed";
constexpr std::size_t kMaxEvidence = 300;

}  // namespace

std::string FullMeshFailure(std::string_view text) {
  const auto at = text.find(kFullMesh);
  if (at == std::string_view::npos) return "";
  const auto newline = text.rfind('\n', at);
  const auto begin = newline == std::string_view::npos ? 0 : newline + 1;
  std::string_view line = text.substr(std::max(begin, at > 120 ? at - 120 : 0));
  line = line.substr(0, std::min(line.find('\n'), kMaxEvidence));
  return std::string(line);
}

std::string StartTrouble(const ExitInfo& exit, const std::string& stderr_log) {
  if (exit.code <= 0) return "";  // a signal is no exception of the process group
  std::string found = FullMeshFailure(exit.error_json);
  if (!found.empty() || stderr_log.empty()) return found;
  std::ifstream file(stderr_log, std::ios::binary | std::ios::ate);
  if (!file) return "";
  const auto size = static_cast<std::size_t>(file.tellg());
  const std::size_t from = size > kStderrTail ? size - kStderrTail : 0;
  file.seekg(static_cast<std::streamoff>(from));
  std::string text(size - from, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  return FullMeshFailure(text);
}

}  // namespace everstep::agent
