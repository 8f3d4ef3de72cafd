// Sends workers' log files to whoever asked through the controller (`everstep logs`). One thread.
//
// Whole lines, at most 64 KiB a message; a line longer than that is cut in pieces. Files that are
// not there yet are waited for while a request follows. Bounded: kMaxRequests, and nothing is read
// while the wire holds more than kMaxWaiting bytes: logs must not crowd out reports.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::agent {

struct TailFile {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  bool from_stderr = false;
  std::string path;
};

struct TailChunk {
  std::uint64_t request = 0;
  TailFile file;  // path is empty in the last chunk of a request
  std::string data;
  bool end = false;  // nothing more comes for this request
};

class LogTailer {
 public:
  static constexpr std::size_t kMaxRequests = 32;
  static constexpr std::size_t kMaxFiles = 1024;  // of one request
  static constexpr std::size_t kMaxChunk = 64u << 10;
  static constexpr std::size_t kMaxWaiting = 1u << 20;
  static constexpr std::size_t kMaxBackwardScan = 4u << 20;  // for the last N lines of a file

  // `emit` runs on the tailer's thread. `waiting`: bytes that the wire holds already.
  LogTailer(std::function<void(TailChunk)> emit, std::function<std::size_t()> waiting);
  ~LogTailer();
  LogTailer(const LogTailer&) = delete;
  LogTailer& operator=(const LogTailer&) = delete;

  // Thread-safe, all. `lines`: the last N lines of each file first; -1: all.
  // False: too many requests; an end is not sent.
  bool Start(std::uint64_t request, std::vector<TailFile> files, bool follow, std::int64_t lines);
  // Files of a new generation, from their beginning, for a request that follows.
  void Add(std::uint64_t request, std::vector<TailFile> files);
  void Cancel(std::uint64_t request);
  void CancelAll();

 private:
  struct Open;
  struct Request;

  void Run();
  // True: something was read.
  bool Pump(std::uint64_t id, Request* request);
  bool PumpFile(std::uint64_t id, Request* request, Open* open);

  const std::function<void(TailChunk)> emit_;
  const std::function<std::size_t()> waiting_;
  std::mutex mutex_;  // held while pumping: Cancel returns after the last emit of the request
  std::condition_variable wake_;
  bool stop_ = false;
  std::map<std::uint64_t, std::unique_ptr<Request>> requests_;
  std::thread thread_;
};

}  // namespace everstep::agent
