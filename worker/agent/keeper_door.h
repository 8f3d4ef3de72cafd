// The agent's way to its keeper: finds the one that runs or starts one, becomes its owner, and does
// so again when the link breaks. Also the checkpoint plane's way to the keeper's arenas.
//
// Thread-safe. Callbacks run on the door's own thread or on the link's reader; they must only push
// to a mailbox. Connecting and starting may block (a stopped keeper), so they happen on a thread of
// the door.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "checkpoint/transfer/transfer_service.h"
#include "keeper.pb.h"
#include "worker/agent/serial_worker.h"
#include "worker/keeper/client.h"

namespace everstep::agent {

struct KeeperDoorOptions {
  std::string socket;
  std::string program;  // empty: beside this program
  std::string node;
  std::string log_file;
  int lifeline = -1;  // handed to a keeper that is started
};

// `link` numbers the connections, from 1. Events of a link may come before its on_attached.
struct KeeperCallbacks {
  std::function<void(std::uint64_t link, everstep::v1::KeeperState state, bool started)>
      on_attached;
  std::function<void(std::uint64_t link, everstep::v1::KeeperReply event)> on_event;
  std::function<void(std::uint64_t link, std::string why)> on_lost;
  // An Attach failed; call Attach again later. `hopeless`: it will fail the same way (another
  // owner, another version, no program to start).
  std::function<void(std::string why, bool hopeless)> on_failed;
};

class KeeperDoor final : public checkpoint::ArenaHost {
 public:
  KeeperDoor(KeeperDoorOptions options, KeeperCallbacks callbacks);
  ~KeeperDoor() override;

  // Returns at once; one of on_attached, on_failed follows. An older link is dropped first.
  void Attach();

  // `done` as Client::Send's; with ENOTCONN when there is no link.
  void Send(everstep::v1::KeeperRequest request, std::function<void(keeper::Reply)> done);

  // ArenaHost. Each call waits at most kArenaTimeout.
  static constexpr Duration kArenaTimeout = Seconds(5);
  checkpoint::Result<std::vector<checkpoint::ArenaName>> List(const JobId& job) override;
  checkpoint::Result<checkpoint::ArenaFds> Open(const JobId& job, const checkpoint::ArenaName& name,
                                                std::uint64_t slot_bytes) override;
  void Drop(const JobId& job, const checkpoint::ArenaName& name) override;

 private:
  void AttachNow();
  std::unique_ptr<keeper::Client> Connect(std::uint64_t link, everstep::v1::KeeperState* state,
                                          keeper::ConnectError* error);
  std::shared_ptr<keeper::Client> client();
  void Replace(std::shared_ptr<keeper::Client> client);

  const KeeperDoorOptions options_;
  const KeeperCallbacks callbacks_;
  std::mutex mutex_;
  std::shared_ptr<keeper::Client> client_;
  std::uint64_t last_link_ = 0;  // the door's thread alone
  SerialWorker worker_;          // last: ends before what it uses
};

}  // namespace everstep::agent
