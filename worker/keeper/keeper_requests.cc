// What the keeper is asked for, request by request.
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/kill_point.h"
#include "proto/base/log.h"
#include "proto/base/process_stat.h"
#include "proto/base/told.h"
#include "worker/keeper/attach_protocol.h"
#include "worker/keeper/client.h"
#include "worker/keeper/keeper.h"
#include "worker/keeper/process.h"

namespace everstep::keeper {

namespace v1 = everstep::v1;

void Keeper::OnRequest(Connection* connection, const v1::KeeperRequest& request) {
  const std::uint64_t id = request.id();
  if (request.has_hello()) {
    OnHello(connection, id, request.hello());
    return;
  }
  if (!connection->owner || connection->token != owner_) {
    v1::KeeperReply reply = Refusal(
        EPERM, fmt::format(
                   "the keeper of node {} takes this from its agent only; pid {} is not (say hello "
                   "as owner first, or another agent took over)",
                   options_.node, connection->peer()));
    reply.set_id(id);
    connection->Send(reply);
    return;
  }
  const Loop::Token token = connection->token;
  const Done done = [this, token, id](v1::KeeperReply reply) {
    const auto it = connections_.find(token);
    if (it == connections_.end()) return;
    reply.set_id(id);
    it->second->Send(reply);
  };
  if (shutting_down_ && !request.has_shutdown()) {
    done(Refusal(ESHUTDOWN, fmt::format("the keeper of node {} is ending", options_.node)));
    return;
  }
  switch (request.body_case()) {
    case v1::KeeperRequest::kForkServer:
      fork_servers_.Configure(request.fork_server(), done);
      break;
    case v1::KeeperRequest::kStoreHost: stores_.Start(request.store_host(), done); break;
    case v1::KeeperRequest::kSpawn: workers_.Spawn(request.spawn(), done); break;
    case v1::KeeperRequest::kKill:
      workers_.Kill(request.kill(), done);
      if (request.kill().stores()) stores_.Kill(request.kill().job(), request.kill().generation());
      break;
    case v1::KeeperRequest::kToldAck: workers_.OnToldAck(request.told_ack(), done); break;
    case v1::KeeperRequest::kArena: OnArena(connection, id, request.arena()); break;
    case v1::KeeperRequest::kForget: OnForget(request.forget(), done); break;
    case v1::KeeperRequest::kRemember: OnRemember(request.remember(), done); break;
    case v1::KeeperRequest::kShutdown:
      done({});
      BeginShutdown(request.shutdown().grace_ms(), "asked by the agent");
      break;
    default:
      done(Refusal(
          ENOSYS, fmt::format("the keeper of node {} does not know this request; it speaks version "
                              "{} of the protocol",
                              options_.node, kKeeperProtocolVersion)));
  }
}

void Keeper::OnHello(Connection* connection, std::uint64_t id, const v1::KeeperHello& hello) {
  if (hello.protocol_version() != kKeeperProtocolVersion) {
    Refuse(
        connection, id, EPROTO,
        fmt::format(
            "the keeper of node {} speaks version {} of its protocol, pid {} version {}; drain "
            "the node and restart its keeper to upgrade it",
            options_.node, kKeeperProtocolVersion, connection->peer(), hello.protocol_version()));
    return;
  }
  if (hello.owner()) {
    const auto current = connections_.find(owner_);
    if (current != connections_.end() && current->second.get() != connection) {
      const pid_t pid = current->second->peer();
      const auto stat = ReadProcessStat(pid);
      const bool alive = stat && stat->state != 'Z' && stat->state != 'X';
      const bool stopped = stat && (stat->state == 'T' || stat->state == 't');
      if (alive && !stopped && !current->second->broken && pid != connection->peer()) {
        Refuse(connection, id, EBUSY,
               fmt::format(
                   "node {} has an agent already (pid {}); stop it first, or give this one another "
                   "--node name",
                   options_.node, pid));
        return;
      }
      Refuse(current->second.get(), 0, ESTALE,
             fmt::format("agent pid {} took over node {}'s keeper", connection->peer(),
                         options_.node));
      current->second->owner = false;
    }
    owner_ = connection->token;
    connection->owner = true;
    LogInfo("agent_attached", {{"node", options_.node}, {"pid", connection->peer()}});
  }
  connection->greeted = true;
  v1::KeeperReply reply;
  reply.set_id(id);
  *reply.mutable_state() = State();
  connection->Send(reply);
}

v1::KeeperState Keeper::State() const {
  v1::KeeperState state;
  state.set_keeper_pid(::getpid());
  if (const auto stat = ReadProcessStat(::getpid())) state.set_keeper_start_time(stat->start_time);
  state.set_node(options_.node);
  workers_.Describe(&state);
  arenas_.Describe(&state);
  fork_servers_.Describe(&state);
  stores_.Describe(&state);
  for (const auto& [key, value] : memory_) (*state.mutable_memory())[key] = value;
  return state;
}

void Keeper::OnArena(Connection* connection, std::uint64_t id, const v1::KeeperArena& request) {
  v1::KeeperReply reply;
  reply.set_id(id);
  const ArenaKey key{request.job(), request.rank(), request.replica()};
  if (request.drop()) {
    arenas_.Drop(key);
    reply.mutable_arena();
    connection->Send(reply);
    return;
  }
  int error = 0;
  std::string text;
  bool created = false;
  ArenaEntry* entry = arenas_.Get(key, request.slot_bytes(), &created, &error, &text);
  if (entry == nullptr) {
    reply.set_error(error);
    reply.set_message(text);
    connection->Send(reply);
    return;
  }
  reply.mutable_arena()->set_slot_bytes(entry->slot_bytes);
  reply.mutable_arena()->set_total_bytes(entry->total_bytes());
  reply.mutable_arena()->set_created(created);
  connection->Send(reply, {entry->memory.get(), entry->bell.get()});
  KillPoint("keeper.arena_sent");
}

// A trainer: one fixed-size request, one reply (attach_protocol.h).
void Keeper::OnAttach(Connection* connection) {
  AttachRequest request;
  std::memcpy(static_cast<void*>(&request), connection->reader().pending().data(), sizeof(request));
  request.job[sizeof(request.job) - 1] = '\0';
  AttachReply reply;
  std::vector<int> descriptors;
  std::string text;
  if (request.version != kAttachVersion) {
    reply.error = EPROTO;
    text = fmt::format(
        "the keeper of node {} speaks attach version {}, this process {}; use one release "
        "of everstep on the node",
        options_.node, kAttachVersion, request.version);
  } else if (workers_.Stale(request.job, request.generation)) {
    reply.error = ESTALE;
    text = fmt::format("generation {} of job {} is over on node {}", request.generation,
                       request.job, options_.node);
  } else {
    bool created = false;
    ArenaEntry* entry = arenas_.Get({request.job, request.rank, false}, request.slot_bytes,
                                    &created, &reply.error, &text);
    if (entry != nullptr) {
      reply.slot_bytes = entry->slot_bytes;
      reply.total_bytes = entry->total_bytes();
      descriptors = {entry->memory.get(), entry->bell.get()};
    }
  }
  std::memcpy(reply.message, text.data(), std::min(text.size(), sizeof(reply.message) - 1));
  connection->SendRaw(std::string(reinterpret_cast<const char*>(&reply), sizeof(reply)),
                      descriptors);
  KillPoint("keeper.attach_answered");
  connection->closing = true;
}

// A worker that may be parked: its connection stays open.
void Keeper::OnSession(Connection* connection) {
  SessionRequest request;
  std::memcpy(static_cast<void*>(&request), connection->reader().pending().data(), sizeof(request));
  connection->reader().Skip(sizeof(request));
  request.job[sizeof(request.job) - 1] = '\0';
  AttachReply reply;
  std::string text;
  if (request.version != kSessionVersion) {
    reply.error = EPROTO;
    text = fmt::format(
        "the keeper of node {} speaks session version {}, this process {}; use one release of "
        "everstep on the node",
        options_.node, kSessionVersion, request.version);
  } else {
    const Loop::Token token = connection->token;
    const auto send = [this, token](std::string bytes) {
      const auto it = connections_.find(token);
      if (it != connections_.end()) it->second->SendRaw(std::move(bytes));
    };
    reply.error = workers_.OpenSession({request.job, request.generation, request.rank},
                                       connection->peer(), token, send, &text);
  }
  std::memcpy(reply.message, text.data(), std::min(text.size(), sizeof(reply.message) - 1));
  connection->SendRaw(std::string(reinterpret_cast<const char*>(&reply), sizeof(reply)));
  connection->session = reply.error == 0;
  connection->closing = reply.error != 0;
}

void Keeper::OnSessionWords(Connection* connection) {
  SessionWord word;
  while (connection->reader().pending().size() >= sizeof(word)) {
    const std::string_view pending = connection->reader().pending();
    std::memcpy(static_cast<void*>(&word), pending.data(), sizeof(word));
    const bool parked = word.kind == SessionWordKind::kParked && word.bytes == 0;
    const bool told = word.kind == SessionWordKind::kTold && word.bytes <= kMaxToldBytes;
    if (word.magic != kSessionMagic || (!parked && !told)) {
      LogWarning("session_refused",
                 {{"pid", connection->peer()}, {"why", "no word of a worker's"}});
      connection->broken = true;
      return;
    }
    if (pending.size() < sizeof(word) + word.bytes) return;
    if (told) {
      workers_.OnTold(connection->token, word.generation, pending.substr(sizeof(word), word.bytes));
    } else {
      workers_.OnParked(connection->token, word.generation);
    }
    connection->reader().Skip(sizeof(word) + word.bytes);
  }
}

void Keeper::OnRemember(const v1::KeeperRemember& request, const Done& done) {
  const auto it = memory_.find(request.key());
  const std::size_t before = it == memory_.end() ? 0 : it->first.size() + it->second.size();
  const std::size_t after =
      request.value().empty() ? 0 : request.key().size() + request.value().size();
  if (memory_bytes_ - before + after > kMaxMemoryBytes) {
    done(Refusal(ENOSPC,
                 fmt::format("the keeper of node {} remembers {} bytes; {} more for '{}' pass its "
                             "limit of {}; forget ended jobs",
                             options_.node, memory_bytes_, after, request.key(), kMaxMemoryBytes)));
    return;
  }
  memory_bytes_ = memory_bytes_ - before + after;
  if (request.value().empty()) {
    memory_.erase(request.key());
  } else {
    memory_[request.key()] = request.value();
  }
  KillPoint("keeper.remembered");
  done({});
}

void Keeper::OnForget(const v1::KeeperForget& request, const Done& done) {
  LogInfo("job_forgotten", {{"job", request.job()}});
  workers_.Forget(request.job());
  stores_.Forget(request.job());
  fork_servers_.Forget(request.job());
  if (!request.keep_arenas()) arenas_.DropJob(request.job());
  done({});
}

}  // namespace everstep::keeper
