#include "worker/agent/keeper_door.h"

#include <fmt/format.h>

#include <cerrno>
#include <utility>

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

checkpoint::ErrorCode CodeOf(int error) {
  switch (error) {
    case ENOENT: return checkpoint::ErrorCode::kNotFound;
    case ENOMEM:
    case ENOSPC: return checkpoint::ErrorCode::kNoMemory;
    case ETIMEDOUT: return checkpoint::ErrorCode::kTimedOut;
    case ENOTCONN: return checkpoint::ErrorCode::kUnavailable;
    case ESTALE: return checkpoint::ErrorCode::kStale;
    case EINVAL: return checkpoint::ErrorCode::kInvalid;
    default: return checkpoint::ErrorCode::kInternal;
  }
}

keeper::Reply NotConnected(std::uint64_t id) {
  keeper::Reply reply;
  reply.message.set_id(id);
  reply.message.set_error(ENOTCONN);
  reply.message.set_message("the keeper is not attached");
  return reply;
}

}  // namespace

KeeperDoor::KeeperDoor(KeeperDoorOptions options, KeeperCallbacks callbacks)
    : options_(std::move(options)), callbacks_(std::move(callbacks)) {}

KeeperDoor::~KeeperDoor() {
  worker_.Stop();
  Replace(nullptr);
}

void KeeperDoor::Attach() {
  if (!worker_.Post([this] { AttachNow(); })) callbacks_.on_failed("the agent ends", true);
}

std::unique_ptr<keeper::Client> KeeperDoor::Connect(std::uint64_t link, v1::KeeperState* state,
                                                    keeper::ConnectError* error) {
  keeper::ClientOptions o;
  o.socket_path = options_.socket;
  o.on_event = [this, link](keeper::Reply reply) {
    callbacks_.on_event(link, std::move(reply.message));
  };
  o.on_lost = [this, link](std::string why) { callbacks_.on_lost(link, std::move(why)); };
  return keeper::Client::Connect(std::move(o), state, error);
}

void KeeperDoor::AttachNow() {
  Replace(nullptr);
  const std::uint64_t link = ++last_link_;
  v1::KeeperState state;
  keeper::ConnectError error;
  bool started = false;
  auto client = Connect(link, &state, &error);
  if (client == nullptr && error.kind == keeper::ConnectError::kNoKeeper) {
    keeper::StartOptions o;
    o.program = options_.program;
    o.socket_path = options_.socket;
    o.node = options_.node;
    o.log_file = options_.log_file;
    o.lifeline = options_.lifeline;
    std::string why;
    if (!keeper::StartKeeper(o, &why)) return callbacks_.on_failed(std::move(why), true);
    started = true;
    client = Connect(link, &state, &error);
  }
  if (client == nullptr) {
    return callbacks_.on_failed(error.message, error.kind == keeper::ConnectError::kRefused);
  }
  Replace(std::move(client));
  callbacks_.on_attached(link, std::move(state), started);
}

std::shared_ptr<keeper::Client> KeeperDoor::client() {
  std::lock_guard<std::mutex> lock(mutex_);
  return client_;
}

void KeeperDoor::Replace(std::shared_ptr<keeper::Client> client) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    client.swap(client_);
  }
  client.reset();  // outside the lock: it joins its reader
}

void KeeperDoor::Send(v1::KeeperRequest request, std::function<void(keeper::Reply)> done) {
  const auto c = client();
  if (c != nullptr) return c->Send(std::move(request), std::move(done));
  if (done) done(NotConnected(request.id()));
}

checkpoint::Result<std::vector<checkpoint::ArenaName>> KeeperDoor::List(const JobId& job) {
  // A look on a connection of its own: the hello's answer is the keeper's whole state.
  keeper::ClientOptions o;
  o.socket_path = options_.socket;
  o.owner = false;
  o.timeout = kArenaTimeout;
  v1::KeeperState state;
  keeper::ConnectError error;
  if (keeper::Client::Connect(std::move(o), &state, &error) == nullptr) {
    return checkpoint::Error{checkpoint::ErrorCode::kUnavailable, error.message};
  }
  std::vector<checkpoint::ArenaName> out;
  for (const v1::KeeperArenaInfo& a : state.arenas()) {
    if (a.job() == job) out.push_back({a.rank(), a.replica()});
  }
  return out;
}

checkpoint::Result<checkpoint::ArenaFds> KeeperDoor::Open(const JobId& job,
                                                          const checkpoint::ArenaName& name,
                                                          std::uint64_t slot_bytes) {
  const auto c = client();
  if (c == nullptr) {
    return checkpoint::Error{checkpoint::ErrorCode::kUnavailable, "the keeper is not attached"};
  }
  v1::KeeperRequest request;
  v1::KeeperArena* arena = request.mutable_arena();
  arena->set_job(job);
  arena->set_rank(name.rank);
  arena->set_replica(name.replica);
  arena->set_slot_bytes(slot_bytes);
  keeper::Reply reply = c->Call(std::move(request), kArenaTimeout);
  if (reply.message.error() != 0) {
    return checkpoint::Error{CodeOf(reply.message.error()), reply.message.message()};
  }
  if (reply.descriptors.size() != 2) {
    return checkpoint::Error{
        checkpoint::ErrorCode::kInternal,
        fmt::format("the keeper answered with {} descriptors for the arena of rank "
                    "{}, not 2; do agent and keeper have the same version?",
                    reply.descriptors.size(), name.rank)};
  }
  return checkpoint::ArenaFds{reply.descriptors[0].Release(), reply.descriptors[1].Release()};
}

void KeeperDoor::Drop(const JobId& job, const checkpoint::ArenaName& name) {
  v1::KeeperRequest request;
  v1::KeeperArena* arena = request.mutable_arena();
  arena->set_job(job);
  arena->set_rank(name.rank);
  arena->set_replica(name.replica);
  arena->set_drop(true);
  Send(std::move(request), nullptr);
}

}  // namespace everstep::agent
