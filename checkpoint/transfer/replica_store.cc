#include "checkpoint/transfer/replica_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "checkpoint/store/fence.h"
#include "checkpoint/store/memory_limit.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/peer_task.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::chrono::milliseconds kLookForWhole{200};  // while a fetch waits for a relay

bool SameBytes(const SlotView& view, const SlotFields& fields, std::uint32_t root) {
  return view.crc_root == root && std::memcmp(&view.fields, &fields, sizeof fields) == 0;
}

// The table, and chunks [first, end). `checked`: kCorrupt, and the mark, at the first bad one.
Outcome SendRange(Connection* connection, Arena* arena, const SlotView& view,
                  const std::vector<std::uint32_t>& crcs, std::uint64_t first, std::uint64_t end,
                  bool checked) {
  if (auto ok = SendTable(connection, crcs); !ok.ok()) return ok;
  if (end == 0 || end > crcs.size()) end = crcs.size();
  const bool part = first > 0 || end < crcs.size();
  const bool map = checked || MappingPays(*connection, part);
  const unsigned char* data = map ? arena->Payload(view) : nullptr;
  for (std::uint64_t i = first; i < end; ++i) {
    if (connection->Readable()) return Done{};  // it has left
    if (checked && data != nullptr &&
        Crc32c(data + i * kChunkBytes, view.chunk_size(i)) != crcs[i]) {
      arena->MarkDamaged(view);
      return Error{ErrorCode::kCorrupt, fmt::format("{}: chunk {} of {} is damaged in this memory",
                                                    arena->Name(), i, view.chunks())};
    }
    if (auto ok = SendChunk(connection, *arena, view, data, i, crcs[i]); !ok.ok()) return ok;
    KillPoint("serve.chunk_sent");
  }
  return SendEndOfChunks(connection);
}

// The table, with what is the same in `older` if that is given; and the chunks that the peer then
// asks for.
Outcome SendPicked(Connection* connection, Arena* arena, const SlotView& view,
                   const std::vector<std::uint32_t>& crcs, const std::optional<SlotView>& older,
                   std::chrono::milliseconds patience) {
  const Bitmap same =
      older ? SameChunks(arena, view, crcs, *older, std::chrono::steady_clock::now() + patience / 2)
            : Bitmap{};
  if (auto ok = SendTable(connection, crcs, 0, same); !ok.ok()) return ok;
  WantFrame want;
  if (auto ok = connection->Receive(&want, sizeof want); !ok.ok()) return ok;
  const auto wanted = ReceiveWanted(connection, want, crcs.size());
  if (!wanted.ok()) return wanted.error();
  const unsigned char* data = MappingPays(*connection, true) ? arena->Payload(view) : nullptr;
  for (const std::uint32_t i : wanted.value()) {
    if (connection->Readable()) return Done{};  // it has left
    if (auto ok = SendChunk(connection, *arena, view, data, i, crcs[i]); !ok.ok()) return ok;
    KillPoint("ranges.chunk_sent");
  }
  return SendEndOfChunks(connection);
}

}  // namespace

std::uint32_t ChooseSlot(const Arena& arena, Generation committed_generation, Step committed_step) {
  std::optional<SlotView> views[kSlots];
  std::tuple<Step, Generation> age[kSlots];
  bool committed[kSlots] = {};
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    views[i] = arena.Look(i);
    if (!views[i] || arena.Damaged(*views[i])) return i;
    const SlotFields& f = views[i]->fields;
    age[i] = {f.step, f.generation};
    committed[i] = (f.generation == committed_generation && f.step == committed_step) ||
                   arena.header()->slot[i].committed_seq.load() == views[i]->seq;
  }
  const std::uint32_t older = age[0] <= age[1] ? 0 : 1;
  return committed[older] && !committed[1 - older] ? 1 - older : older;
}

void MarkSlots(const Arena& arena, Generation generation, Step step) {
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (view && view->fields.generation == generation && view->fields.step == step) {
      arena.header()->slot[i].committed_seq.store(view->seq, std::memory_order_release);
      KillPoint("commit.slot_marked");
    }
  }
  std::atomic<std::int64_t>& newest = arena.header()->agent.committed_step;
  if (step > newest.load(std::memory_order_relaxed)) newest.store(step, std::memory_order_relaxed);
}

std::optional<SipKey> ReplicaStore::KeyOf(const JobId& job) {
  const auto facts = jobs_->Find(job);
  if (!facts) return std::nullopt;
  return facts->key;
}

void ReplicaStore::Serve(PeerSession* session) {
  const RequestFrame& request = session->request();
  const auto facts = jobs_->Find(session->job());
  if (!facts) {
    (void)session->Refuse(Status::kUnknown,
                          fmt::format("job {} is over on this node", session->job()));
    return;
  }
  if (request.generation < facts->generation) {
    (void)session->Refuse(Status::kStale,
                          fmt::format("generation {} of job {} is over; this node is at {}",
                                      request.generation, session->job(), facts->generation));
    return;
  }
  switch (request.op) {
    case Op::kPush:
    case Op::kAhead: return Push(session, *facts);
    case Op::kJoin: return Join(session);
    case Op::kFetch:
    case Op::kFetchChecked:
    case Op::kFetchRelay:
    case Op::kPick:
    case Op::kPickChanged: return Fetch(session);
  }
}

ReplicaStore::ReplicaPtr ReplicaStore::Get(const JobId& job, Rank rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  ReplicaPtr& replica = replicas_[{job, rank}];
  if (replica == nullptr) replica = std::make_shared<Replica>();
  return replica;
}

Outcome ReplicaStore::OpenArena(const JobId& job, Rank rank, std::uint64_t payload_bytes,
                                Replica* replica) {
  if (replica->arena.open()) return Done{};
  // 0 would mean "only when it is there".
  const std::uint64_t room = std::max<std::uint64_t>(payload_bytes, 1);
  auto fds = host_->Open(job, {.rank = rank, .replica = true}, room);
  if (!fds.ok()) return fds.error();
  if (fds.value().eventfd >= 0) close(fds.value().eventfd);
  const ArenaSpec blank{.job = job, .rank = rank, .replica = true};
  auto arena = Arena::Open(fds.value().memfd, &blank);
  if (!arena.ok()) return arena.error();
  KillPoint("arrive.arena_opened");
  replica->arena = std::move(arena.value());
  return Done{};
}

Result<SlotView> ReplicaStore::Keep(const JobId& job, Rank rank, Generation received,
                                    std::uint64_t payload_bytes,
                                    const std::function<Result<Filled>(SlotWriter*)>& fill) {
  const Error over{ErrorCode::kStale, fmt::format("job {} is over on this node", job)};
  const ReplicaPtr replica = Get(job, rank);
  std::lock_guard<std::mutex> busy(replica->busy);
  {
    std::lock_guard<std::mutex> lock(replica->state);
    if (replica->gone) return over;
    replica->received = std::max(replica->received, received);
    replica->arrival.reset();  // its slot may be the one that is taken
  }
  if (auto ok = OpenArena(job, rank, payload_bytes, replica.get()); !ok.ok()) return ok.error();
  const JobFacts facts = jobs_->Find(job).value_or(JobFacts{});
  if (facts.committed_step != kNoStep) {
    MarkSlots(replica->arena, facts.committed_generation, facts.committed_step);
  }
  const std::uint32_t slot =
      ChooseSlot(replica->arena, facts.committed_generation, facts.committed_step);
  auto writer = SlotWriter::Begin(&replica->arena, slot, payload_bytes);
  if (!writer.ok()) return writer.error();
  auto filled = fill(&writer.value());
  if (!filled.ok()) return filled.error();
  {
    std::lock_guard<std::mutex> lock(replica->state);
    if (replica->gone) return over;
  }
  return writer.value().Publish(filled.value().fields, filled.value().crc_root);
}

void ReplicaStore::Push(PeerSession* session, const JobFacts& facts) {
  const RequestFrame& request = session->request();
  const SlotFields& fields = request.fields;
  if (auto ok = CheckFields(fields); !ok.ok()) {
    (void)session->Refuse(Status::kInvalid, ok.error().message);
    return;
  }
  const JobId job = session->job();
  if ((fields.flags & kFlagsExchange) != 0) {
    (void)session->Refuse(Status::kInvalid, "an exchange between an agent and its trainer");
    return;
  }
  if (fields.job_crc != Crc32c(job.data(), job.size())) {
    (void)session->Refuse(Status::kInvalid, fmt::format("the slot is of another job than {}", job));
    return;
  }
  if (fields.payload_bytes > options_.max_payload_bytes) {
    (void)session->Refuse(Status::kNoMemory, fmt::format("{} for a slot; this node's limit is {}",
                                                         HumanBytes(fields.payload_bytes),
                                                         HumanBytes(options_.max_payload_bytes)));
    return;
  }
  const ReplicaPtr replica = Get(job, fields.rank);
  const auto order = std::pair(fields.step, fields.generation);
  {
    std::lock_guard<std::mutex> lock(replica->state);
    if (replica->active_fd >= 0) {
      if (request.op == Op::kAhead) {  // what is whole goes first
        (void)session->Refuse(Status::kBusy, fmt::format("step {} of rank {} is arriving",
                                                         replica->active_step, fields.rank));
        return;
      }
      if (order < std::pair(replica->active_step, replica->active_generation) &&
          request.generation <= replica->received) {
        (void)session->Refuse(Status::kStale,
                              fmt::format("step {} of rank {} is arriving, newer than {}",
                                          replica->active_step, fields.rank, fields.step));
        return;
      }
      shutdown(replica->active_fd, SHUT_RDWR);  // it hangs, or is of an older try
      if (replica->arrival != nullptr) replica->arrival->Break();
    }
  }
  std::lock_guard<std::mutex> busy(replica->busy);
  {
    std::lock_guard<std::mutex> lock(replica->state);
    if (replica->gone) return;
    replica->active_fd = session->connection()->fd();
    replica->active_generation = fields.generation;
    replica->active_step = fields.step;
    replica->received = std::max(replica->received, request.generation);
  }
  bool answered = false;
  std::uint64_t chunk = 0;
  const bool ahead = request.op == Op::kAhead;
  const auto taken = ahead ? TakeAhead(session, facts, replica.get(), &answered, &chunk)
                           : Take(session, facts, replica.get(), &answered, &chunk);
  {
    std::lock_guard<std::mutex> lock(replica->state);
    replica->active_fd = -1;
    if (replica->gone) return;
  }
  if (!ahead) traffic_->Arrived(taken.ok() ? PeerOutcome::kDone : OutcomeOf(taken.error()));
  if (taken.ok()) return;
  if (answered) {
    (void)session->AcknowledgeError(taken.error(), chunk);
  } else {
    (void)session->Refuse(ToStatus(taken.error().code), taken.error().message);
  }
  // Nothing is lost with what came ahead: the push brings it again.
  const bool counts = !ahead || taken.error().code == ErrorCode::kInvalid;
  if (counts && taken.error().code != ErrorCode::kStale) {
    listener_->OnTrouble(job, fmt::format("taking step {} of rank {}: {}", fields.step, fields.rank,
                                          taken.error().message));
  }
}

// The replica's arena is open and knows the newest commit that either side knows: which one.
Result<JobFacts> ReplicaStore::Prepare(const PeerSession& session, const JobFacts& facts,
                                       Replica* replica) {
  const RequestFrame& request = session.request();
  const SlotFields& fields = request.fields;
  if (auto ok = OpenArena(session.job(), fields.rank, fields.payload_bytes, replica); !ok.ok()) {
    return ok.error();
  }
  JobFacts newest = facts;
  if (std::pair(request.committed_generation, request.committed_step) >
      std::pair(newest.committed_generation, newest.committed_step)) {
    newest.committed_generation = request.committed_generation;
    newest.committed_step = request.committed_step;
  }
  if (newest.committed_step != kNoStep) {
    MarkSlots(replica->arena, newest.committed_generation, newest.committed_step);
  }
  return newest;
}

// Chunks of a capture that is not finished there. Only into a slot that is surplus: torn, or older
// than the newest commit, so that for as long as it is torn as much can be restored as before.
Outcome ReplicaStore::TakeAhead(PeerSession* session, const JobFacts& facts, Replica* replica,
                                bool* answered, std::uint64_t* chunk) {
  const RequestFrame& request = session->request();
  const SlotFields& fields = request.fields;
  auto newest = Prepare(*session, facts, replica);
  if (!newest.ok()) return newest.error();
  Arena& arena = replica->arena;
  const std::uint32_t slot =
      ChooseSlot(arena, newest.value().committed_generation, newest.value().committed_step);
  const auto surplus = arena.Look(slot);
  const auto kept = arena.Look(1 - slot);
  const auto newer = [&](const SlotView& view) {
    return std::pair(view.fields.generation, view.step()) >=
           std::pair(fields.generation, fields.step);
  };
  if ((surplus && newer(*surplus)) || (kept && newer(*kept))) {
    return Error{ErrorCode::kStale, fmt::format("step {} of rank {} is here, or a newer one",
                                                fields.step, fields.rank)};
  }
  const bool committed = kept && arena.header()->slot[kept->slot].committed_seq.load() == kept->seq;
  if (surplus && !arena.Damaged(*surplus) && !(committed && kept->step() > surplus->step())) {
    return Error{ErrorCode::kUnavailable,
                 fmt::format("no slot of rank {} is surplus yet", fields.rank)};
  }
  std::shared_ptr<Arrival> arrival;
  {
    std::lock_guard<std::mutex> lock(replica->state);
    replica->arrival.reset();
    auto writer = SlotWriter::Begin(&arena, slot, fields.payload_bytes);
    if (!writer.ok()) return writer.error();
    arrival = Arrival::Ahead(fields, writer.value());
    replica->arrival = arrival;
  }
  KillPoint("arrive.ahead_begun");
  if (auto ok = session->Respond({}); !ok.ok()) return ok;
  *answered = true;
  session->connection()->set_deadline(DeadlineFor(LimitsOf(options_), fields.payload_bytes));
  if (auto ok = ReceiveAhead(session->connection(), arrival.get(), chunk); !ok.ok()) return ok;
  (void)session->Acknowledge(0);  // heard or not: the push asks for what lacks
  return Done{};
}

Outcome ReplicaStore::Take(PeerSession* session, const JobFacts& facts, Replica* replica,
                           bool* answered, std::uint64_t* chunk) {
  const RequestFrame& request = session->request();
  const SlotFields& fields = request.fields;
  const JobId job = session->job();
  auto prepared = Prepare(*session, facts, replica);
  if (!prepared.ok()) return prepared.error();
  const JobFacts& newest = prepared.value();
  Arena& arena = replica->arena;

  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (!view) continue;
    if (SameBytes(*view, fields, request.crc_root)) {
      if (auto ok = arena.Verify(*view); !ok.ok()) continue;  // taken again into the same slot
      if (auto ok = session->Respond({.status = Status::kHave}); !ok.ok()) return ok;
      *answered = true;
      listener_->OnCopied(job, ToShard(*view, true));
      return Done{};
    }
    // A step of a generation before the sender's may be one that was passed over: it gives way.
    if (view->fields.generation > request.generation ||
        (view->fields.generation == request.generation && view->fields.step > fields.step)) {
      return Error{
          ErrorCode::kStale,
          fmt::format("holds step {} of generation {} of rank {}, newer than step {} of {}",
                      view->fields.step, view->fields.generation, fields.rank, fields.step,
                      fields.generation)};
    }
  }

  auto begun = Begin(request, newest, replica);
  if (!begun.ok()) return begun.error();
  const std::shared_ptr<Arrival> arrival = begun.value();
  KillPoint("arrive.begun");
  *answered = true;  // from here on errors are acks
  if (auto ok = Bring(session, replica, arrival.get(), chunk); !ok.ok()) return ok;
  const auto now = jobs_->Find(job);  // the fence may have moved while bytes came
  if (!now || request.generation < now->generation) {
    return Error{
        ErrorCode::kStale,
        fmt::format("generation {} of job {} ended while its bytes came", request.generation, job)};
  }
  KillPoint("arrive.complete");
  auto view = arrival->writer()->Publish(fields, request.crc_root);
  {
    std::lock_guard<std::mutex> lock(replica->state);
    replica->arrival.reset();
  }
  if (!view.ok()) return view.error();
  KillPoint("arrive.published");
  // Heard or not, it is here: a sender that did not hear asks again and is told so.
  (void)session->Acknowledge(view.value().crc_root);
  KillPoint("arrive.acknowledged");
  listener_->OnCopied(job, ToShard(view.value(), true));
  KillPoint("arrive.told");
  return Done{};
}

// The arrival to go on with, or a new one in the slot that may be overwritten.
Result<std::shared_ptr<Arrival>> ReplicaStore::Begin(const RequestFrame& request,
                                                     const JobFacts& newest, Replica* replica) {
  const SlotFields& fields = request.fields;
  std::lock_guard<std::mutex> lock(replica->state);
  if (replica->arrival != nullptr && replica->arrival->Is(fields, request.crc_root)) {
    return replica->arrival;
  }
  if (replica->arrival != nullptr && replica->arrival->IsAheadOf(fields)) {
    replica->arrival = std::make_shared<Arrival>(fields, request.crc_root, *replica->arrival);
    KillPoint("arrive.ahead_adopted");
    return replica->arrival;
  }
  replica->arrival.reset();
  Arena& arena = replica->arena;
  std::uint32_t slot = ChooseSlot(arena, newest.committed_generation, newest.committed_step);
  for (std::uint32_t i = 0; i < kSlots;
       ++i) {  // these very bytes, damaged since: repaired in place
    const auto view = arena.Look(i);
    if (view && SameBytes(*view, fields, request.crc_root)) slot = i;
  }
  auto writer = SlotWriter::Begin(&arena, slot, fields.payload_bytes);
  if (!writer.ok()) return writer.error();
  replica->arrival = std::make_shared<Arrival>(fields, request.crc_root, writer.value());
  return replica->arrival;
}

// The conversation of a push from the response on: every chunk is there and verified, or why not.
Outcome ReplicaStore::Bring(PeerSession* session, Replica* replica, Arrival* arrival,
                            std::uint64_t* chunk) {
  Connection* connection = session->connection();
  const SlotFields& fields = arrival->fields();
  ResponseFrame response;
  std::uint64_t held_seq[kSlots] = {};
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = replica->arena.Look(i);
    if (!view || view->seq == replica->damaged[i]) continue;
    held_seq[i] = view->seq;
    response.held[i] = ToHeld(*view);
  }
  if (auto ok = session->Respond(response); !ok.ok()) return ok;
  KillPoint("arrive.responded");
  connection->set_deadline(DeadlineFor(LimitsOf(options_), fields.payload_bytes));
  auto table = ReceiveTable(connection, fields, arrival->crc_root());
  if (!table.ok()) return table.error();
  arrival->SetTable(table.value().crcs);
  const std::uint64_t resumed = arrival->verified();
  CopyUnchanged(table.value(), response.held, held_seq, replica, arrival);
  KillPoint("arrive.unchanged_copied");
  const Bitmap lacking = arrival->Lacking();
  const std::uint64_t chunks = arrival->crcs().size();
  arrival->Open();
  auto done = SendWant(connection, chunks, lacking, resumed);
  KillPoint("arrive.want_sent");
  if (done.ok()) done = ReceiveInto(connection, arrival, chunk);
  arrival->Close(!done.ok());
  if (!done.ok()) return done;
  const std::uint64_t missing = chunks - arrival->verified();
  if (missing == 0) return Done{};
  return Error{ErrorCode::kUnavailable,
               fmt::format("{} of {} chunks of step {} of rank {} did not arrive", missing, chunks,
                           fields.step, fields.rank)};
}

// What the sender compared byte for byte with a slot that both have is taken from there. A chunk
// that fails its CRC here is asked for, and that slot is no base any more.
void ReplicaStore::CopyUnchanged(const ChunkTable& table, const HeldFrame* held,
                                 const std::uint64_t* held_seq, Replica* replica,
                                 Arrival* arrival) {
  if (table.base == kNoBase || held[table.base].step < 0) return;
  const auto base = replica->arena.Look(table.base);
  if (!base || base->seq != held_seq[table.base]) return;
  const unsigned char* data = replica->arena.Payload(*base);
  if (data == nullptr) return;
  SlotView shape;
  shape.fields = arrival->fields();
  for (std::uint64_t i = 0; i < table.crcs.size() && i < base->chunks(); ++i) {
    if (!BitOf(table.same, i) || base->chunk_size(i) != shape.chunk_size(i) || !arrival->Claim(i)) {
      continue;
    }
    const std::uint32_t crc =
        Crc32cCopy(0, arrival->writer()->Chunk(i), data + i * kChunkBytes, shape.chunk_size(i));
    if (crc != table.crcs[i]) {
      replica->damaged[table.base] = base->seq;
      arrival->Unclaim(i);
      listener_->OnTrouble(
          GetText(replica->arena.header()->job),
          fmt::format("{}: chunk {} of step {} has CRC {:08x}, not {:08x}; the peer sends it again",
                      replica->arena.Name(), i, base->step(), crc, table.crcs[i]));
      continue;
    }
    arrival->writer()->SetChunkCrc(i, crc);
    arrival->Verified(i);
  }
  StoreFence();
}

// A further stream of a push that runs.
void ReplicaStore::Join(PeerSession* session) {
  const RequestFrame& request = session->request();
  Connection* connection = session->connection();
  std::shared_ptr<Arrival> arrival;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = replicas_.find({session->job(), request.fields.rank});
    if (it != replicas_.end()) {
      std::lock_guard<std::mutex> state(it->second->state);
      if (!it->second->gone) arrival = it->second->arrival;
    }
  }
  if (arrival == nullptr || !arrival->Is(request.fields, request.crc_root) ||
      !arrival->Join(connection->fd())) {
    (void)session->Refuse(Status::kUnknown, fmt::format("no push of step {} of rank {} runs here",
                                                        request.fields.step, request.fields.rank));
    return;
  }
  KillPoint("arrive.stream_joined");
  std::uint64_t chunk = 0;
  connection->set_deadline(DeadlineFor(LimitsOf(options_), request.fields.payload_bytes));
  auto done = session->Respond({});
  if (done.ok()) done = ReceiveInto(connection, arrival.get(), &chunk);
  arrival->Leave(connection->fd());
  if (done.ok()) {
    (void)session->Acknowledge(request.crc_root);
  } else {
    (void)session->AcknowledgeError(done.error(), chunk);
    if (done.error().code == ErrorCode::kCorrupt || done.error().code == ErrorCode::kInvalid) {
      listener_->OnTrouble(session->job(), done.error().message);
    }
  }
}

void ReplicaStore::Fetch(PeerSession* session) {
  const RequestFrame& request = session->request();
  const RelayKey wanted{session->job(), request.fields.rank, request.fields.generation,
                        request.fields.step, request.crc_root};
  bool damaged = false;
  const auto began = std::chrono::steady_clock::now();
  const SteadyTime until = began + options_.io_timeout;
  for (SteadyTime now = began;; now = std::chrono::steady_clock::now()) {
    if (FetchWhole(session, &damaged)) return;
    if (request.op != Op::kFetchRelay || now >= until || session->connection()->Readable()) break;
    if (const auto relay = relays_->Await(wanted, std::min(now + kLookForWhole, until))) {
      const auto sent =
          ServeRelay(session, relay.get(),
                     DeadlineFor(LimitsOf(options_), relay->view().fields.payload_bytes));
      if (!sent.ok()) {
        listener_->OnTrouble(session->job(),
                             fmt::format("passing on step {} of rank {}: {}", request.fields.step,
                                         request.fields.rank, sent.error().message));
      }
      return;
    }
  }
  (void)session->Refuse(
      damaged ? Status::kCorrupt : Status::kUnknown,
      fmt::format("step {} of rank {} with checksum {:08x} is {}", request.fields.step,
                  request.fields.rank, request.crc_root,
                  damaged ? "damaged in this node's memory" : "not here (any more)"));
}

// From an arena that has all of it. False: none does.
bool ReplicaStore::FetchWhole(PeerSession* session, bool* damaged) {
  const RequestFrame& request = session->request();
  const JobId job = session->job();
  return SearchShard(host_, job, request.fields.rank, [&](const ArenaName&, Arena* arena) {
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena->Look(i);
      if (!view || view->fields.step != request.fields.step ||
          view->fields.generation != request.fields.generation ||
          view->crc_root != request.crc_root) {
        continue;
      }
      if (arena->Damaged(*view)) {
        *damaged = true;
        continue;
      }
      auto crcs = ReadChunkCrcs(*arena, *view);
      if (!crcs.ok() || CrcRoot(view->fields, crcs.value().data()) != view->crc_root) continue;
      ResponseFrame response{.fields = view->fields, .crc_root = view->crc_root};
      const auto older =
          request.op == Op::kPickChanged ? arena->Look(1 - i) : std::optional<SlotView>();
      if (older) response.held[0] = ToHeld(*older);
      if (!session->Respond(response).ok()) return true;
      session->connection()->set_deadline(
          DeadlineFor(LimitsOf(options_), view->fields.payload_bytes));
      KillPoint("serve.responded");
      const auto sent =
          request.op == Op::kPick || request.op == Op::kPickChanged
              ? SendPicked(session->connection(), arena, *view, crcs.value(), older,
                           options_.io_timeout)
              : SendRange(session->connection(), arena, *view, crcs.value(), request.first_chunk,
                          request.end_chunk, request.op == Op::kFetchChecked);
      if (!sent.ok()) {
        listener_->OnTrouble(job, fmt::format("sending step {} of rank {}: {}", view->step(),
                                              view->fields.rank, sent.error().message));
      }
      return true;
    }
    return false;
  });
}

void ReplicaStore::MarkCommitted(const JobId& job, Generation generation, Step step) {
  std::vector<ReplicaPtr> of_job;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [key, replica] : replicas_) {
      if (key.first == job) of_job.push_back(replica);
    }
  }
  for (const ReplicaPtr& replica : of_job) {
    // While a connection writes, the next push brings the mark: it is in the job table.
    std::unique_lock<std::mutex> busy(replica->busy, std::try_to_lock);
    if (busy.owns_lock() && replica->arena.open()) MarkSlots(replica->arena, generation, step);
  }
}

std::set<Rank> ReplicaStore::Received(const JobId& job, Generation generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::set<Rank> out;
  for (const auto& [key, replica] : replicas_) {
    if (key.first != job) continue;
    std::lock_guard<std::mutex> state(replica->state);
    if (replica->received >= generation) out.insert(key.second);
  }
  return out;
}

void ReplicaStore::End(const ReplicaPtr& replica) {
  std::lock_guard<std::mutex> lock(replica->state);
  replica->gone = true;
  if (replica->active_fd >= 0) shutdown(replica->active_fd, SHUT_RDWR);
  if (replica->arrival != nullptr) replica->arrival->Break();
}

void ReplicaStore::Forget(const JobId& job) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = replicas_.begin(); it != replicas_.end();) {
    if (it->first.first == job) {
      End(it->second);
      it = replicas_.erase(it);
    } else {
      ++it;
    }
  }
}

void ReplicaStore::Drop(const JobId& job, Rank rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = replicas_.find({job, rank});
  if (it == replicas_.end()) return;
  End(it->second);
  replicas_.erase(it);
}

void ReplicaStore::Clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [key, replica] : replicas_) End(replica);
  replicas_.clear();
}

}  // namespace everstep::checkpoint
