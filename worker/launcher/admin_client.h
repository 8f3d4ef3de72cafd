// The launcher's end of AdminService: hand in a job, follow it, cancel it.
//
// Thread-safe. Every call has a deadline. gRPC's headers stay in admin_client.cc.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "admin.pb.h"
#include "proto/wire/job_status.h"

namespace everstep::launcher {

struct CallResult {
  enum class Kind : std::uint8_t {
    kOk,
    kUnreachable,  // nobody answers; worth another try
    kExists,
    kNotFound,
    kRefused,  // understood and refused: `message` says why
  };
  Kind kind = Kind::kOk;
  std::string message;
  bool ok() const { return kind == Kind::kOk; }
};

class AdminClient {
 public:
  // "host:port[,host:port...]": tried in turn.
  explicit AdminClient(const std::string& addresses);
  // Ends a Follow under way and waits for its thread.
  ~AdminClient();
  AdminClient(const AdminClient&) = delete;
  AdminClient& operator=(const AdminClient&) = delete;

  // Calls go here from now on; a Follow moves over.
  void SetAddresses(const std::string& addresses);
  // Breaks what is under way, which may hang on a machine that vanished, and goes on at `address`;
  // empty: at the next one.
  void Redial(const std::string& address);
  // The one of them that is in use.
  std::string address() const;

  CallResult Status(v1::ClusterStatus* status, std::chrono::milliseconds limit);
  CallResult Submit(const v1::JobSpec& spec, std::string* job, std::chrono::milliseconds limit);
  CallResult List(v1::JobList* jobs, std::chrono::milliseconds limit);
  CallResult Cancel(const std::string& job, const std::string& reason,
                    std::chrono::milliseconds limit);
  CallResult Shutdown(std::chrono::milliseconds limit);

  // Status after status to `take`, on a thread of the client; dials again, forever, when the stream
  // breaks (`lost` is told why, once for each break). One job at a time; ends after a terminal
  // state.
  void Follow(const std::string& job, bool with_snapshot,
              std::function<void(v1::JobStatus status)> take,
              std::function<void(const CallResult& why)> lost);
  // The log lines of one rank (-1: all) from the beginning; the same way, until EndFollow.
  void Tail(const std::string& job, std::function<void(const v1::JobLogLines& lines)> take);
  // Tail's stream was ended by the controller: the job is over and nothing more will come.
  bool TailEnded() const;
  void EndFollow();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace everstep::launcher
