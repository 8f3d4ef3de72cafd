// What a launcher brings and supervises: this node's agent (which brings the keeper) and, on the
// node that owns the endpoint, the controller. One that dies is started again, at the same address;
// workers run on meanwhile.
//
// One owner thread, the same for all calls. Every wait is bounded.
#pragma once

#include <poll.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "worker/launcher/process.h"
#include "worker/launcher/state_dir.h"

namespace everstep::launcher {

inline constexpr std::chrono::seconds kControllerStartLimit{20};
inline constexpr std::chrono::seconds kControllerStopLimit{5};
// An agent that ended this often in a row, each time within kShortLife, is not started again; a
// controller is, since workers run on without it.
inline constexpr int kMaxShortLives = 5;
inline constexpr std::chrono::seconds kShortLife{3};
// A program that is stopped (SIGSTOP) for this long is replaced.
inline constexpr std::chrono::milliseconds kStoppedLimit{1'000};
inline constexpr std::chrono::milliseconds kStoppedLook{250};

struct BroughtOptions {
  std::string programs;  // folder of everstep-controller and everstep-agent
  Environment environment;
  const StateDir* state = nullptr;    // outlives this
  std::string address = "127.0.0.1";  // of this node, for the others
  std::string local_command;          // a file for the agent's --local-command; empty: none
  std::chrono::milliseconds leave_timeout{0};        // SIGTERM: time to move workers away
  std::chrono::milliseconds stop_grace{30'000};      // then, workers' SIGTERM to SIGKILL
  std::function<void(const std::string& line)> say;  // one sentence for the person
};

class Brought {
 public:
  explicit Brought(BroughtOptions options);
  // Ends everything, hard.
  ~Brought();
  Brought(const Brought&) = delete;
  Brought& operator=(const Brought&) = delete;

  struct Start {
    std::string listen;      // host:port, port 0: any
    std::string snapshot;    // a file with a StoreSnapshot to start from; empty: none
    std::string known_dead;  // a node of the snapshot that is known to be dead; empty: none
  };
  // Starts a controller and waits until it answers at an address. Empty on success, else a
  // sentence.
  std::string StartController(const Start& start);
  // The newest controller could not bind its address.
  bool controller_address_taken() const { return address_taken_; }
  // Starts the agent, which dials `controllers` ("host:port,..."). Does not wait.
  std::string StartAgent(const std::string& controllers,
                         const std::map<std::string, std::string>& labels);
  // The agent finds its controllers here from its next dial on.
  std::string SetControllers(const std::string& controllers);

  bool has_controller() const { return controller_.wanted; }
  const std::string& controller_address() const { return controller_address_; }

  // Readable when a program ended: then call Tend.
  void AddTo(std::vector<pollfd>* polled) const;
  // Starts again what ended or is stopped; called at least every kStoppedLook. Empty, or the
  // sentence that says why there is no more trying.
  std::string Tend();

  // How an end is brought about.
  enum class How : std::uint8_t {
    kAtOnce,
    kIdle,     // in order; no worker is left, so nothing takes long
    kInOrder,  // in order; the controller may move workers away, and they have their grace
  };
  // Ends the node (agent, keeper, workers). False: it took force where order was asked for.
  bool StopNode(How how);
  bool StopController(How how);

 private:
  struct Program {
    std::string name;
    std::vector<std::string> argv;
    std::string log;
    bool wanted = false;
    Process process;
    std::chrono::steady_clock::time_point started;
    std::chrono::steady_clock::time_point again;  // not running: when to start it
    int short_lives = 0;
    std::optional<std::chrono::steady_clock::time_point> stopped_since;
    std::chrono::steady_clock::time_point look_again;  // for its being stopped
  };

  std::string Launch(Program* program);
  std::string Mind(Program* program);
  void MindStopped(Program* program, std::chrono::steady_clock::time_point now);
  std::string WaitForAddress();
  std::string Trouble(const Program& program, const std::string& what) const;
  void EndKeeper();

  const BroughtOptions options_;
  Environment environment_;
  Program controller_;
  Program agent_;
  std::string controller_address_;
  bool address_taken_ = false;
  std::string controller_meaning_;  // of its exit code, when it did not come up
  int lifeline_read_ = -1;
  int lifeline_write_ = -1;
};

}  // namespace everstep::launcher
