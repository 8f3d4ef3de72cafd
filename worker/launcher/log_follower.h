// Shows what the workers of this node print: follows the log files below one job's log directory,
//
//   DIR/attempt_G/LOCAL_RANK/{stdout.log,stderr.log}
//
// generation after generation, and hands new bytes to a sink. A generation's directory is made
// after the workers of the one before were reaped, so its appearance says that older files are
// complete: they are read to their end, then closed.
//
// One thread. Poll never blocks; the owner calls it again soon (20 ms) while it returns 0, at once
// otherwise. Files and directories that are not there yet are no error. Bounded: kMaxReadPerPoll
// bytes of each file per Poll, kMaxLine bytes of an unfinished line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/launcher/flags.h"

namespace everstep::launcher {

inline constexpr std::size_t kMaxReadPerPoll = std::size_t{256} * 1024;
inline constexpr std::size_t kMaxLine = std::size_t{64} * 1024;
// A begun line is shown once so many Polls (a fifth of a second) found no more of it.
inline constexpr int kPollsForALinesEnd = 10;

struct FollowOptions {
  std::string dir;
  std::uint32_t workers = 1;  // local ranks 0 .. workers-1
  StreamSpec redirects;       // these streams go to files only
  StreamSpec tee;             // these are shown with a prefix, whatever `redirects` says
  std::vector<std::int32_t> local_ranks_filter;  // empty: all
  std::string role = "default";                  // of the prefix "[default0]:"
  // TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE: ${role_name}, ${local_rank}, ${rank}; empty: "[ROLE
  // LOCAL_RANK]:".
  std::string prefix_template;
  std::function<std::int32_t(std::int32_t local_rank)> rank_of;  // null: the ranks are equal
  // --duplicate-stdout-filters: lines of tee'd streams with one of these go to
  // attempt_G/filtered_stdout.log, too.
  std::vector<std::string> stdout_filters;
  std::vector<std::string> stderr_filters;
};

class LogFollower {
 public:
  // Whole prefixed lines where tee is on. Elsewhere bytes as they were written, whole lines if
  // their end comes within kPollsForALinesEnd.
  using Sink = std::function<void(bool from_stderr, std::string_view bytes)>;

  LogFollower(FollowOptions options, Sink sink);
  ~LogFollower();
  LogFollower(const LogFollower&) = delete;
  LogFollower& operator=(const LogFollower&) = delete;

  // Bytes read; 0: nothing new now.
  std::size_t Poll();
  // The run is over: reads everything to its end, unfinished lines too.
  void Finish();

 private:
  struct File;
  void FindAttempts();
  void Open(std::uint64_t attempt);
  std::size_t Read(File* file);
  void Emit(File* file, std::string_view bytes);
  // What of a line is there, with no end yet.
  void ShowBegunLine(File* file);
  void ShowLine(File* file, std::string_view line, std::string* lines);
  const std::string& Prefix(File* file);
  void Close(File* file);

  FollowOptions options_;
  Sink sink_;
  std::map<std::uint64_t, std::vector<File>> attempts_;  // open ones
  std::uint64_t newest_ = 0;
  bool any_ = false;
};

}  // namespace everstep::launcher
