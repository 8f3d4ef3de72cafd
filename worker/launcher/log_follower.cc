#include "worker/launcher/log_follower.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <system_error>

#include <fmt/format.h>

namespace everstep::launcher {

struct LogFollower::File {
  std::string path;
  std::int32_t local_rank = 0;
  bool tee = false;      // false: bytes pass as they are
  std::string prefix;    // made with the first line
  std::string filtered;  // file for the lines that a filter picks; empty: none
  bool from_stderr = false;
  int descriptor = -1;
  std::string line;  // unfinished
  int quiet = 0;     // Polls that found no more of it
};

LogFollower::LogFollower(FollowOptions options, Sink sink)
    : options_(std::move(options)), sink_(std::move(sink)) {}

LogFollower::~LogFollower() {
  for (auto& [attempt, files] : attempts_) {
    for (File& file : files) {
      if (file.descriptor >= 0) ::close(file.descriptor);
    }
  }
}

void LogFollower::FindAttempts() {
  constexpr std::string_view kPrefix = "attempt_";
  std::vector<std::uint64_t> found;
  std::error_code error;
  std::filesystem::directory_iterator entries(options_.dir, error);
  for (; !error && entries != std::filesystem::directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().string();
    if (name.rfind(kPrefix, 0) != 0) continue;
    std::uint64_t attempt = 0;
    const char* end = name.data() + name.size();
    const std::from_chars_result read = std::from_chars(name.data() + kPrefix.size(), end, attempt);
    if (read.ec != std::errc() || read.ptr != end) continue;
    if (!any_ || attempt > newest_) found.push_back(attempt);
  }
  std::sort(found.begin(), found.end());
  for (const std::uint64_t attempt : found) Open(attempt);
}

void LogFollower::Open(std::uint64_t attempt) {
  any_ = true;
  newest_ = attempt;
  std::vector<File>& files = attempts_[attempt];
  for (std::int32_t rank = 0; rank < static_cast<std::int32_t>(options_.workers); ++rank) {
    const auto& filter = options_.local_ranks_filter;
    if (!filter.empty() && std::find(filter.begin(), filter.end(), rank) == filter.end()) continue;
    const std::uint8_t tee = options_.tee.For(rank);
    const std::uint8_t redirects = options_.redirects.For(rank);
    for (const std::uint8_t bit : {kStreamOut, kStreamErr}) {
      if ((tee & bit) == 0 && (redirects & bit) != 0) continue;
      File file;
      file.from_stderr = bit == kStreamErr;
      file.path = fmt::format("{}/attempt_{}/{}/{}.log", options_.dir, attempt, rank,
                              file.from_stderr ? "stderr" : "stdout");
      file.local_rank = rank;
      file.tee = (tee & bit) != 0;
      const auto& filters = file.from_stderr ? options_.stderr_filters : options_.stdout_filters;
      if (file.tee && !filters.empty()) {
        file.filtered = fmt::format("{}/attempt_{}/filtered_{}.log", options_.dir, attempt,
                                    file.from_stderr ? "stderr" : "stdout");
      }
      files.push_back(std::move(file));
    }
  }
}

const std::string& LogFollower::Prefix(File* file) {
  if (!file->prefix.empty()) return file->prefix;
  const std::int32_t rank =
      options_.rank_of == nullptr ? file->local_rank : options_.rank_of(file->local_rank);
  file->prefix = options_.prefix_template.empty() ? std::string("[${role_name}${local_rank}]:")
                                                  : options_.prefix_template;
  const std::pair<std::string_view, std::string> values[] = {
      {"${role_name}", options_.role},
      {"${local_rank}", std::to_string(file->local_rank)},
      {"${rank}", std::to_string(rank)}};
  for (const auto& [name, value] : values) {
    for (std::size_t at = file->prefix.find(name); at != std::string::npos;
         at = file->prefix.find(name, at + value.size())) {
      file->prefix.replace(at, name.size(), value);
    }
  }
  return file->prefix;
}

// `line` without its end.
void LogFollower::ShowLine(File* file, std::string_view line, std::string* lines) {
  const std::string whole = fmt::format("{}{}\n", Prefix(file), line);
  *lines += whole;
  if (file->filtered.empty()) return;
  const auto& filters = file->from_stderr ? options_.stderr_filters : options_.stdout_filters;
  const bool picked = std::any_of(
      filters.begin(), filters.end(),
      [line](const std::string& needle) { return line.find(needle) != std::string_view::npos; });
  if (!picked) return;
  const int out = ::open(file->filtered.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (out < 0) return;  // a full disk must not end the console
  [[maybe_unused]] const ssize_t written = ::write(out, whole.data(), whole.size());
  ::close(out);
}

void LogFollower::Emit(File* file, std::string_view bytes) {
  if (!file->tee) {
    // Python writes a line and its end apart: another worker's line must not come between.
    file->line += bytes;
    const std::size_t end = file->line.rfind('\n');
    if (end == std::string::npos && file->line.size() < kMaxLine) return;
    const std::size_t whole = end == std::string::npos ? file->line.size() : end + 1;
    sink_(file->from_stderr, std::string_view(file->line).substr(0, whole));
    file->line.erase(0, whole);
    return;
  }
  std::string lines;
  while (!bytes.empty()) {
    const std::size_t end = bytes.find('\n');
    file->line += bytes.substr(0, end);
    if (end == std::string_view::npos && file->line.size() < kMaxLine) break;
    ShowLine(file, file->line, &lines);
    file->line.clear();
    bytes.remove_prefix(end == std::string_view::npos ? bytes.size() : end + 1);
  }
  if (!lines.empty()) sink_(file->from_stderr, lines);
}

std::size_t LogFollower::Read(File* file) {
  if (file->descriptor < 0) {
    file->descriptor = ::open(file->path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file->descriptor < 0) return 0;
  }
  std::array<char, std::size_t{32} * 1024> buffer;
  std::size_t total = 0;
  while (total < kMaxReadPerPoll) {
    const ssize_t count = ::read(file->descriptor, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    total += static_cast<std::size_t>(count);
    Emit(file, {buffer.data(), static_cast<std::size_t>(count)});
  }
  return total;
}

void LogFollower::ShowBegunLine(File* file) {
  if (file->line.empty()) return;
  std::string lines = file->line;
  if (file->tee) {
    lines.clear();
    ShowLine(file, file->line, &lines);
  }
  sink_(file->from_stderr, lines);
  file->line.clear();
}

void LogFollower::Close(File* file) {
  // No more than there is by now: a process that got away from its worker may write for ever.
  struct stat now = {};
  std::size_t left =
      ::stat(file->path.c_str(), &now) == 0 ? static_cast<std::size_t>(now.st_size) : 0;
  while (left > 0) {
    const std::size_t count = Read(file);
    if (count == 0) break;
    left -= std::min(left, count);
  }
  ShowBegunLine(file);
  if (file->descriptor >= 0) ::close(file->descriptor);
  file->descriptor = -1;
}

std::size_t LogFollower::Poll() {
  FindAttempts();
  std::size_t total = 0;
  for (auto it = attempts_.begin(); it != attempts_.end();) {
    if (it->first < newest_) {
      for (File& file : it->second) Close(&file);
      it = attempts_.erase(it);
      continue;
    }
    for (File& file : it->second) {
      const std::size_t count = Read(&file);
      file.quiet = count == 0 ? file.quiet + 1 : 0;
      // A prompt or a progress bar: no end of line comes.
      if (file.quiet >= kPollsForALinesEnd && !file.tee) ShowBegunLine(&file);
      total += count;
    }
    ++it;
  }
  return total;
}

void LogFollower::Finish() {
  FindAttempts();
  for (auto& [attempt, files] : attempts_) {
    for (File& file : files) Close(&file);
  }
  attempts_.clear();
}

}  // namespace everstep::launcher
