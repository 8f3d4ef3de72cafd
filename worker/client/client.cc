// The C ABI over Arena, SlotWriter and DecideCapture. Owns the handle; decides nothing itself.
#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/core/capture_policy.h"
#include "checkpoint/store/arena.h"
#include "checkpoint/store/fence.h"
#include "checkpoint/store/range_exchange.h"
#include "checkpoint/store/slot_writer.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"
#include "proto/base/version.h"
#include "worker/client/attach.h"
#include "worker/client/copier.h"
#include "worker/client/everstep.h"

namespace cp = everstep::checkpoint;
using everstep::KillPoint;

struct everstep_client {
  cp::Arena arena;
  int eventfd = -1;
  pid_t pid = 0;
  everstep::Rank rank = 0;
  std::int32_t world_size = 0;
  everstep::Generation generation = 0;
  std::uint32_t commit_wait_ms =
      2000;                          // longer than a lease: who is silent that long is lost anyway
  std::uint32_t wait_ms = 2000;      // what is left of it after waits in vain
  std::optional<cp::SlotView> base;  // what restore() gave
  std::uint64_t answered_seq = 0;    // of the catalog that a request answered; 0: none
  std::optional<cp::SlotWriter> writer;
  std::unique_ptr<everstep::client::Copier> copier;  // of overlapped captures
  bool copying =
      false;  // from capture_start to publish or abort; the table's size is in table_bytes
  std::uint64_t table_bytes = 0;
  cp::SlotFields fields;
  std::uint64_t begun_ns = 0;
  std::uint64_t payload_bytes = 0;  // that capture_begin was told
  std::string error;
  std::string last_skip;
};

namespace {

constexpr std::int64_t kAgentSilenceNs = 3'000'000'000;  // its beat is older: take it for dead
constexpr unsigned kVerifyThreads = 4;                   // more do not read memory any faster
constexpr std::uint64_t kFirstRoom =
    4096;  // the keeper makes the arena small, reserve makes it grow

std::uint64_t Nanos(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(t.tv_nsec);
}

int Code(cp::ErrorCode code) {
  switch (code) {
    case cp::ErrorCode::kInvalid: return EVERSTEP_EINVAL;
    case cp::ErrorCode::kNotFound: return EVERSTEP_NONE;
    case cp::ErrorCode::kNoMemory: return EVERSTEP_ENOMEM;
    case cp::ErrorCode::kCorrupt: return EVERSTEP_ECORRUPT;
    case cp::ErrorCode::kStale: return EVERSTEP_ESTALE;
    case cp::ErrorCode::kUnavailable: return EVERSTEP_EUNAVAILABLE;
    case cp::ErrorCode::kTimedOut: return EVERSTEP_ETIMEDOUT;
    case cp::ErrorCode::kRefused: return EVERSTEP_EREFUSED;
    case cp::ErrorCode::kInternal: return EVERSTEP_EINTERNAL;
  }
  return EVERSTEP_EINTERNAL;
}

int Fail(everstep_client* c, int code, std::string text) {
  c->error = std::move(text);
  return code;
}
int Fail(everstep_client* c, const cp::Error& error) {
  return Fail(c, Code(error.code), error.message);
}

// 0: the handle can be used here.
int Check(everstep_client* c) {
  if (c == nullptr) return EVERSTEP_EINVAL;
  if (!c->arena.open())
    return Fail(c, EVERSTEP_EINVAL, "this handle was never attached to an arena");
  if (c->pid != getpid()) {
    return Fail(c, EVERSTEP_EINVAL,
                fmt::format("{}: opened by process {}, used in its child {}; open one there",
                            c->arena.Name(), c->pid, getpid()));
  }
  return EVERSTEP_OK;
}

bool AgentAlive(const everstep_client& c) {
  const std::int64_t beat = c.arena.header()->agent.beat_ns.load(std::memory_order_relaxed);
  return beat != 0 && static_cast<std::int64_t>(Nanos(CLOCK_MONOTONIC)) - beat < kAgentSilenceNs;
}

int Fence(everstep_client* c) {
  const std::uint64_t fence =
      c->arena.header()->agent.fence_generation.load(std::memory_order_acquire);
  if (fence <= c->generation) return EVERSTEP_OK;
  return Fail(c, EVERSTEP_ESTALE,
              fmt::format("{}: this process is of generation {}, the job is at {}; it must end",
                          c->arena.Name(), c->generation, fence));
}

void Fill(const cp::SlotView& view, everstep_slot* out) {
  const std::uint32_t size = out->size;
  const everstep_slot full{.size = size,
                           .slot = view.slot,
                           .sequence = view.seq,
                           .step = view.fields.step,
                           .generation = view.fields.generation,
                           .rank = view.fields.rank,
                           .world_size = view.fields.world_size,
                           .flags = view.fields.flags,
                           .crc_root = view.crc_root,
                           .payload_bytes = view.fields.payload_bytes,
                           .table_offset = view.fields.table_offset,
                           .table_bytes = view.fields.table_bytes};
  std::memcpy(out, &full, std::min<std::size_t>(size, sizeof full));
}

cp::CaptureFacts Facts(const everstep_client& c, everstep::Step step, std::uint32_t flags,
                       bool waited) {
  const cp::ArenaHeader& header = *c.arena.header();
  cp::CaptureFacts facts{
      .step = step,
      .generation = c.generation,
      .slots = {},
      .base = -1,
      .replicated_layout = (flags & EVERSTEP_REPLICATED_LAYOUT) != 0,
      .has_peer = header.agent.has_peer.load(std::memory_order_relaxed) != 0,
      .agent_alive = AgentAlive(c),
      .controller_away = header.agent.controller_away.load(std::memory_order_relaxed) != 0,
      .waited = waited};
  for (std::uint32_t i = 0; i < cp::kSlots; ++i) {
    const auto view = c.arena.Look(i);
    if (!view || c.arena.Damaged(*view)) continue;
    const cp::SlotHeader& h = header.slot[i];
    facts.slots[i] = {
        .whole = true,
        .step = view->step(),
        .generation = view->fields.generation,
        .committed = h.committed_seq.load(std::memory_order_acquire) == view->seq,
        .replicated = h.replicated_seq.load(std::memory_order_acquire) == view->seq,
        .pushing = h.pushing_seq.load(std::memory_order_acquire) == view->seq,
        .released = h.released_seq.load(std::memory_order_acquire) == view->seq ||
                    (view->fields.generation == c.generation &&
                     view->step() <= header.agent.released_step.load(std::memory_order_acquire))};
    if (c.base && c.base->slot == i && c.base->seq == view->seq) facts.base = static_cast<int>(i);
  }
  return facts;
}

// The trainer waits for it: its cores have nothing else to do.
unsigned VerifyThreads() {
  return std::clamp(std::thread::hardware_concurrency(), 1u, kVerifyThreads);
}

int Verified(everstep_client* c, const cp::SlotView& view, everstep_slot* out,
             bool table_only = false) {
  auto ok = table_only
                ? c->arena.VerifyRange(view, view.fields.table_offset, view.fields.table_bytes)
                : c->arena.Verify(view, VerifyThreads());
  if (!ok.ok()) return Fail(c, ok.error());
  KillPoint("restore.verified");
  Fill(view, out);
  return EVERSTEP_OK;
}

void Ring(const everstep_client& c) {
  const std::uint64_t one = 1;
  // Full means that it rings already.
  [[maybe_unused]] const ssize_t n = write(c.eventfd, &one, sizeof one);
}

// Closes the slot whose bytes and table are written; ends the capture.
int Publish(everstep_client* c, std::uint64_t table_bytes) {
  if (int code = Fence(c); code != EVERSTEP_OK) return code;
  auto view = c->writer->Finish(c->fields, table_bytes);
  c->writer.reset();
  if (!view.ok()) return Fail(c, view.error());
  KillPoint("capture.published");
  cp::TrainerWord& t = c->arena.header()->trainer;
  t.captured.fetch_add(1, std::memory_order_relaxed);
  t.copy_ns.fetch_add(Nanos(CLOCK_MONOTONIC) - c->begun_ns, std::memory_order_relaxed);
  KillPoint("capture.counted");
  Ring(*c);
  KillPoint("capture.rung");
  return EVERSTEP_OK;
}

}  // namespace

extern "C" {

uint32_t everstep_abi_version(void) {
  return EVERSTEP_ABI_VERSION;
}
const char* everstep_version(void) {
  return everstep::kVersion;
}

int everstep_open(const everstep_options* options, everstep_client** out) {
  if (out == nullptr) return EVERSTEP_EINVAL;
  auto* c = new (std::nothrow) everstep_client;
  *out = c;
  if (c == nullptr) return EVERSTEP_ENOMEM;
  if (options == nullptr || options->size < sizeof(everstep_options) || options->job == nullptr ||
      options->keeper == nullptr || options->rank < 0 || options->world_size <= options->rank) {
    return Fail(c, EVERSTEP_EINVAL,
                "everstep_open: size, job, keeper, rank and world_size must be given");
  }
  c->pid = getpid();
  c->rank = options->rank;
  c->world_size = options->world_size;
  c->generation = options->generation;
  if (options->commit_wait_ms != 0) c->commit_wait_ms = options->commit_wait_ms;
  c->wait_ms = c->commit_wait_ms;
  const std::chrono::milliseconds timeout(
      options->connect_timeout_ms == 0 ? 5000 : options->connect_timeout_ms);
  auto attached = everstep::client::Attach(options->keeper, options->job, c->rank, c->generation,
                                           kFirstRoom, timeout);
  if (!attached.ok()) return Fail(c, attached.error());
  c->eventfd = attached.value().eventfd;
  const cp::ArenaSpec blank{.job = options->job, .rank = c->rank};
  KillPoint("capture.attached");
  auto arena = cp::Arena::Open(attached.value().memfd, &blank);
  if (!arena.ok()) return Fail(c, arena.error());
  c->arena = std::move(arena.value());
  if (int code = Fence(c); code != EVERSTEP_OK) {
    c->arena = {};
    return code;
  }
  cp::TrainerWord& t = c->arena.header()->trainer;
  t.captured = 0;
  t.skipped = 0;
  t.replaced = 0;
  t.waited_ns = 0;
  t.copy_ns = 0;
  t.step = everstep::kNoStep;
  KillPoint("capture.opened");
  t.pid = c->pid;
  t.generation = c->generation;
  return EVERSTEP_OK;
}

void everstep_close(everstep_client* c) {
  if (c == nullptr) return;
  // The thread is not in a forked child; what it would have ended is left alone there.
  if (c->pid != getpid()) static_cast<void>(c->copier.release());
  if (c->eventfd >= 0) close(c->eventfd);
  delete c;
}

const char* everstep_last_error(const everstep_client* c) {
  return c == nullptr ? "everstep: no handle (out of memory?)" : c->error.c_str();
}

int everstep_reserve(everstep_client* c, uint64_t payload_bytes) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (c->writer) return Fail(c, EVERSTEP_EINVAL, "everstep_reserve inside a capture");
  for (std::uint32_t i = 0; i < cp::kSlots; ++i) {
    const auto view = c->arena.Look(i);
    if (view && cp::ExtentCapacity(view->extent_bytes) < payload_bytes) continue;
    if (auto ok = cp::SlotWriter::Reserve(&c->arena, i, payload_bytes); !ok.ok()) {
      return Fail(c, ok.error());
    }
  }
  return EVERSTEP_OK;
}

// Between two looks at the agent's word: nothing is waited for much longer than it takes.
static void Pause(std::uint64_t began_ns) {
  const std::uint64_t waited_ms = (Nanos(CLOCK_MONOTONIC) - began_ns) / 1'000'000;
  poll(nullptr, 0, static_cast<int>(std::clamp<std::uint64_t>(waited_ms / 16, 1, 20)));
}

static int TimedOut(everstep_client* c, std::uint64_t waited_ms, bool pending) {
  return Fail(c, EVERSTEP_ETIMEDOUT,
              fmt::format("{}: the agent did not say within {} ms what generation {} starts from "
                          "({}); is it running?",
                          c->arena.Name(), waited_ms, c->generation,
                          pending ? "bytes are on their way" : "no word for it"));
}

static int RestoreWord(everstep_client* c, uint32_t timeout_ms, everstep_slot* slot,
                       bool table_only) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot == nullptr || slot->size < sizeof(uint32_t)) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_restore: slot and its size must be given");
  }
  const std::uint64_t began = Nanos(CLOCK_MONOTONIC);
  for (;;) {
    if (int code = Fence(c); code != EVERSTEP_OK) return code;
    const cp::RestoreView restore = c->arena.Restore();
    if (restore.generation == c->generation) {
      if (restore.state == cp::RestoreState::kFresh) return EVERSTEP_NONE;
      if (restore.state == cp::RestoreState::kFailed) {
        return Fail(c, EVERSTEP_EREFUSED,
                    fmt::format("{}: step {} could not be brought here: {}", c->arena.Name(),
                                restore.step, restore.message));
      }
      if (restore.state == cp::RestoreState::kAsk && restore.slot_seq != c->answered_seq) {
        return Fail(c, EVERSTEP_EREFUSED,
                    fmt::format("{}: step {} was captured by a world of another size; it is put "
                                "together by everstep_catalog and everstep_request",
                                c->arena.Name(), restore.step));
      }
      if (restore.state == cp::RestoreState::kReady) {
        const auto view =
            restore.slot < cp::kSlots ? c->arena.LookRestored(restore.slot) : std::nullopt;
        if (view && view->seq == restore.slot_seq) {
          KillPoint("restore.told");
          c->base = *view;
          return Verified(c, *view, slot, table_only);
        }
        // This process (or one before it of this generation) has captured over it since.
        if (auto newest = c->arena.Newest(); newest && newest->fields.generation == c->generation) {
          return Verified(c, *newest, slot, table_only);
        }
        return Fail(c, EVERSTEP_ECORRUPT,
                    fmt::format("{}: step {} was announced and its slot is not there any more",
                                c->arena.Name(), restore.step));
      }
    }
    const bool pending =
        restore.generation == c->generation && restore.state == cp::RestoreState::kPending;
    const std::uint64_t patience_ms =
        timeout_ms + (pending ? cp::RestoreMillis(restore.slot_seq) : 0);
    if (Nanos(CLOCK_MONOTONIC) - began >= patience_ms * 1'000'000) {
      return TimedOut(c, patience_ms, pending);
    }
    Pause(began);
  }
}

int everstep_restore(everstep_client* c, uint32_t timeout_ms, everstep_slot* slot) {
  return RestoreWord(c, timeout_ms, slot, false);
}

int everstep_restore_table(everstep_client* c, uint32_t timeout_ms, everstep_slot* slot) {
  return RestoreWord(c, timeout_ms, slot, true);
}

int everstep_load(everstep_client* c, const everstep_slot* slot, const everstep_target* targets,
                  uint32_t count) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot == nullptr || slot->size < sizeof(everstep_slot) || slot->slot >= cp::kSlots ||
      (targets == nullptr && count > 0)) {
    return Fail(c, EVERSTEP_EINVAL,
                "everstep_load: a slot from restore_table and its targets must be given");
  }
  const auto view = c->arena.LookRestored(slot->slot);
  if (!view || view->seq != slot->sequence) {
    return Fail(c, EVERSTEP_ESTALE,
                fmt::format("{}: step {} was overwritten", c->arena.Name(), slot->step));
  }
  std::vector<cp::LoadTarget> wanted;
  wanted.reserve(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    wanted.push_back({targets[i].offset, targets[i].bytes, targets[i].to});
  }
  if (auto ok = c->arena.Load(*view, wanted, VerifyThreads()); !ok.ok()) return Fail(c, ok.error());
  return EVERSTEP_OK;
}

int everstep_catalog(everstep_client* c, uint32_t timeout_ms, everstep_slot* slot) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot == nullptr || slot->size < sizeof(everstep_slot)) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_catalog: slot and its size must be given");
  }
  const std::uint64_t began = Nanos(CLOCK_MONOTONIC);
  const std::uint64_t deadline = began + std::uint64_t{timeout_ms} * 1'000'000;
  for (;;) {
    if (int code = Fence(c); code != EVERSTEP_OK) return code;
    const cp::RestoreView restore = c->arena.Restore();
    const bool ours = restore.generation == c->generation;
    if (ours && restore.state == cp::RestoreState::kAsk && restore.slot_seq != c->answered_seq) {
      const auto view = restore.slot < cp::kSlots
                            ? c->arena.LookExchange(restore.slot, cp::kFlagCatalog)
                            : std::nullopt;
      if (view && view->seq == restore.slot_seq) return Verified(c, *view, slot);
      return Fail(c, EVERSTEP_ECORRUPT,
                  fmt::format("{}: a catalog for step {} was announced and is not there",
                              c->arena.Name(), restore.step));
    }
    // Only who has answered must wait for the end: the agent may ask anew.
    const bool pending = ours && restore.state == cp::RestoreState::kPending;
    const bool under_way = !ours || pending || restore.state == cp::RestoreState::kNone ||
                           restore.state == cp::RestoreState::kAsk;
    if (!under_way) return EVERSTEP_NONE;
    if (Nanos(CLOCK_MONOTONIC) >= deadline) {
      return pending ? EVERSTEP_NONE : TimedOut(c, timeout_ms, false);
    }
    Pause(began);
  }
}

int everstep_request(everstep_client* c, const everstep_slot* catalog, const everstep_range* ranges,
                     uint32_t count, uint64_t data_bytes, uint32_t flags, const void* table,
                     uint64_t table_bytes) {
  static_assert(sizeof(everstep_range) == sizeof(cp::WantedRange));
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (catalog == nullptr || catalog->size < sizeof(everstep_slot) || catalog->slot >= cp::kSlots ||
      (ranges == nullptr && count > 0) || (table == nullptr && table_bytes > 0) || c->writer) {
    return Fail(c, EVERSTEP_EINVAL,
                "everstep_request: the catalog, the ranges and the table must be given, outside of "
                "a capture");
  }
  if (int code = Fence(c); code != EVERSTEP_OK) return code;
  const cp::RestoreView restore = c->arena.Restore();
  if (restore.generation != c->generation || restore.state != cp::RestoreState::kAsk ||
      restore.slot != catalog->slot || restore.slot_seq != catalog->sequence) {
    return Fail(c, EVERSTEP_ESTALE,
                fmt::format("{}: that catalog is not asked about any more", c->arena.Name()));
  }
  const cp::RequestHead head{.ranges = count,
                             .data_bytes = data_bytes,
                             .table_bytes = table_bytes,
                             .catalog_seq = catalog->sequence,
                             .flags = flags & (EVERSTEP_REPLICATED_LAYOUT | EVERSTEP_ASSEMBLED)};
  const std::uint64_t range_bytes = std::uint64_t{count} * sizeof(everstep_range);
  auto writer =
      cp::SlotWriter::Begin(&c->arena, catalog->slot, sizeof head + range_bytes + table_bytes);
  if (!writer.ok()) return Fail(c, writer.error());
  auto ok = writer.value().Append(&head, sizeof head);
  if (ok.ok()) ok = writer.value().Append(ranges, range_bytes);
  if (ok.ok()) ok = writer.value().Append(table, table_bytes);
  if (!ok.ok()) return Fail(c, ok.error());
  auto view = writer.value().Finish({.generation = c->generation,
                                     .step = restore.step,
                                     .rank = c->rank,
                                     .world_size = c->world_size,
                                     .flags = cp::kFlagRequest,
                                     .captured_ns = Nanos(CLOCK_REALTIME)},
                                    0);
  if (!view.ok()) return Fail(c, view.error());
  c->answered_seq = catalog->sequence;
  KillPoint("ranges.asked");
  Ring(*c);
  return EVERSTEP_OK;
}

int everstep_find(everstep_client* c, int64_t max_step, everstep_slot* slot) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot == nullptr || slot->size < sizeof(uint32_t)) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_find: slot and its size must be given");
  }
  int worst = EVERSTEP_NONE;
  while (const auto view = c->arena.Newest(max_step)) {
    const int code = Verified(c, *view, slot);
    if (code == EVERSTEP_OK) return code;
    worst = code;
    max_step = view->step() - 1;  // the older one may be whole
  }
  return worst;
}

int everstep_payload(everstep_client* c, const everstep_slot* slot, const void** data) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot == nullptr || slot->size < sizeof(everstep_slot) || data == nullptr ||
      slot->slot >= cp::kSlots) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_payload: a slot from restore or find must be given");
  }
  auto view = c->arena.LookRestored(slot->slot);
  if (!view) view = c->arena.LookExchange(slot->slot, cp::kFlagCatalog);
  if (!view || view->seq != slot->sequence) {
    return Fail(c, EVERSTEP_ESTALE,
                fmt::format("{}: step {} was overwritten", c->arena.Name(), slot->step));
  }
  *data = c->arena.Payload(*view);
  KillPoint("restore.mapped");
  if (*data == nullptr) return Fail(c, EVERSTEP_ENOMEM, c->arena.Name() + ": cannot map the slot");
  return EVERSTEP_OK;
}

void everstep_copy(void* to, const void* from, uint64_t bytes) {
  everstep::Crc32cCopy(0, to, from, bytes);  // its checksum costs nothing beside the memory
  cp::StoreFence();
}

uint32_t everstep_crc32c(uint32_t crc, const void* data, uint64_t bytes) {
  return everstep::Crc32cExtend(crc, data, bytes);
}

int everstep_capture_begin(everstep_client* c, int64_t step, uint64_t payload_bytes,
                           uint32_t flags) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (c->writer) return Fail(c, EVERSTEP_EINVAL, "everstep_capture_begin inside a capture");
  if (step < 0) return Fail(c, EVERSTEP_EINVAL, fmt::format("step {} is negative", step));
  if (const cp::RestoreView restore = c->arena.Restore();
      c->answered_seq != 0 && restore.generation == c->generation &&
      (restore.state == cp::RestoreState::kPending || restore.state == cp::RestoreState::kAsk)) {
    return Fail(c, EVERSTEP_EINVAL,
                fmt::format("{}: the agent brings step {} into the arena; call everstep_restore",
                            c->arena.Name(), restore.step));
  }
  cp::TrainerWord& t = c->arena.header()->trainer;
  t.step.store(step, std::memory_order_relaxed);
  const std::uint64_t began = Nanos(CLOCK_MONOTONIC);
  std::uint64_t now = began;
  cp::CaptureDecision decision;
  for (;;) {
    if (int code = Fence(c); code != EVERSTEP_OK) return code;
    const bool waited = now - began >= std::uint64_t{c->wait_ms} * 1'000'000;
    decision = cp::DecideCapture(Facts(*c, step, flags, waited));
    if (decision.action != cp::CaptureAction::kWait) {
      // In vain: wait less for the next one. A commit came: full patience again.
      c->wait_ms = waited ? std::max(c->wait_ms / 2, 1u) : c->commit_wait_ms;
      break;
    }
    KillPoint("capture.waiting");
    poll(nullptr, 0, 1);
    now = Nanos(CLOCK_MONOTONIC);
  }
  t.waited_ns.fetch_add(now - began, std::memory_order_relaxed);
  if (decision.action == cp::CaptureAction::kSkip) {
    t.skipped.fetch_add(1, std::memory_order_relaxed);
    c->last_skip = decision.reason;
    Ring(*c);
    return EVERSTEP_SKIPPED;
  }
  KillPoint("capture.decided");
  if (decision.replaces) t.replaced.fetch_add(1, std::memory_order_relaxed);
  if ((flags & EVERSTEP_SHARE) != 0) {  // the whole state may have lain there for a restore
    cp::SlotWriter::Trim(&c->arena, decision.slot, payload_bytes);
  }
  auto writer = cp::SlotWriter::Begin(&c->arena, decision.slot, payload_bytes);
  if (!writer.ok()) return Fail(c, writer.error());
  KillPoint("capture.begun");
  c->writer.emplace(writer.value());
  c->begun_ns = now;
  c->payload_bytes = payload_bytes;
  c->fields = {.generation = c->generation,
               .step = step,
               .rank = c->rank,
               .world_size = c->world_size,
               .flags = flags & (EVERSTEP_REPLICATED_LAYOUT | EVERSTEP_SHARE),
               .captured_ns = Nanos(CLOCK_REALTIME)};
  return EVERSTEP_OK;
}

int everstep_capture_write(everstep_client* c, const everstep_piece* pieces, uint32_t count,
                           uint64_t* offsets) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (!c->writer || c->copying) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_capture_write outside a capture");
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    if (auto ok = c->writer->Align(); !ok.ok()) return Fail(c, ok.error());
    if (offsets != nullptr) offsets[i] = c->writer->offset();
    auto ok = pieces[i].data == nullptr ? c->writer->Adopt(pieces[i].bytes)
                                        : c->writer->Append(pieces[i].data, pieces[i].bytes);
    if (!ok.ok()) return Fail(c, ok.error());
  }
  return EVERSTEP_OK;
}

int everstep_capture_place(everstep_client* c, const everstep_piece* pieces, uint32_t count,
                           void* image, uint64_t* offsets, void** to) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (!c->writer || c->copying || c->writer->offset() != 0) {
    return Fail(c, EVERSTEP_EINVAL,
                "everstep_capture_place is for the beginning of a capture, before any write");
  }
  auto* base = image != nullptr ? static_cast<unsigned char*>(image) : c->writer->Beginning();
  std::uint64_t at = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint64_t next = cp::RoundUp(at, cp::kTensorAlignment);
    if (next > c->payload_bytes || pieces[i].bytes > c->payload_bytes - next) {
      return Fail(c, EVERSTEP_EINVAL,
                  fmt::format("{}: {} bytes at {} do not fit in the {} that everstep_capture_begin "
                              "was told",
                              c->arena.Name(), pieces[i].bytes, next, c->payload_bytes));
    }
    if (next > at) std::memset(base + at, 0, next - at);
    if (offsets != nullptr) offsets[i] = next;
    if (pieces[i].data != nullptr && pieces[i].bytes > 0) {
      std::memcpy(base + next, pieces[i].data, pieces[i].bytes);
    }
    at = next + pieces[i].bytes;
  }
  if (to != nullptr) *to = base;
  return EVERSTEP_OK;
}

int everstep_capture_mapped(everstep_client* c, uint32_t slot, uint64_t payload_bytes,
                            uint32_t flags, void** data, uint64_t* bytes) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (slot >= cp::kSlots || data == nullptr || bytes == nullptr) {
    return Fail(c, EVERSTEP_EINVAL,
                "everstep_capture_mapped: slot is 0 or 1; data, bytes are given");
  }
  const auto room =
      cp::SlotWriter::Mapped(c->arena, slot, payload_bytes, (flags & EVERSTEP_SHARE) != 0);
  *data = room.data();
  *bytes = room.size();
  return room.empty() ? EVERSTEP_NONE : EVERSTEP_OK;
}

int everstep_capture_commit(everstep_client* c, const void* table, uint64_t table_bytes) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (!c->writer || c->copying) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_capture_commit outside a capture");
  }
  if (auto ok = c->writer->Align(); !ok.ok()) return Fail(c, ok.error());
  if (auto ok = c->writer->Append(table, table_bytes); !ok.ok()) return Fail(c, ok.error());
  KillPoint("capture.table_written");
  return Publish(c, table_bytes);
}

int everstep_capture_start(everstep_client* c, const everstep_piece* late, uint32_t late_count,
                           const everstep_piece* early, uint32_t early_count, const void* table,
                           uint64_t table_bytes, uint64_t* offsets) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (!c->writer || c->copying) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_capture_start outside a capture");
  }
  if (!c->copier) {
    auto copier = everstep::client::Copier::Start();
    if (!copier.ok()) return Fail(c, copier.error());
    c->copier = std::move(copier.value());
  }
  if (c->writer->offset() == 0) c->writer->Announce(c->fields, c->payload_bytes);
  if (auto ok = c->copier->Copy(&*c->writer, late, late_count, early, early_count, table,
                                table_bytes, offsets);
      !ok.ok()) {
    return Fail(c, ok.error());
  }
  Ring(*c);  // the agent may follow
  c->table_bytes = table_bytes;
  c->copying = true;
  return EVERSTEP_OK;
}

int everstep_capture_wait(everstep_client* c, uint32_t timeout_ms) {
  if (c == nullptr || c->pid != getpid() || !c->copier) return EVERSTEP_EINVAL;
  return c->copier->Wait(std::chrono::milliseconds(timeout_ms)) ? EVERSTEP_OK : EVERSTEP_ETIMEDOUT;
}

int everstep_capture_watch(everstep_client* c, uint64_t* count, uint32_t timeout_ms) {
  if (c == nullptr || count == nullptr || c->pid != getpid() || !c->copier) return EVERSTEP_EINVAL;
  return c->copier->Watch(count, std::chrono::milliseconds(timeout_ms)) ? EVERSTEP_OK
                                                                        : EVERSTEP_ETIMEDOUT;
}

int everstep_capture_publish(everstep_client* c) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (!c->writer || !c->copying) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_capture_publish without everstep_capture_start");
  }
  if (!c->copier->Wait(std::chrono::milliseconds(0))) {
    return Fail(
        c, EVERSTEP_EINVAL,
        "everstep_capture_publish while bytes are being copied; everstep_capture_wait tells "
        "when they are");
  }
  c->copying = false;
  if (const auto& ok = c->copier->outcome(); !ok.ok()) {
    c->writer->Withdraw();
    c->writer.reset();
    return Fail(c, ok.error());
  }
  return Publish(c, c->table_bytes);
}

void everstep_capture_abort(everstep_client* c) {
  if (c == nullptr) return;
  if (c->copier && c->pid == getpid()) c->copier->GiveUp();
  c->copying = false;
  if (c->writer && c->pid == getpid()) c->writer->Withdraw();
  c->writer.reset();
}

int everstep_report_step(everstep_client* c, int64_t step) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  c->arena.header()->trainer.step.store(step, std::memory_order_relaxed);
  Ring(*c);
  return EVERSTEP_OK;
}

int everstep_get_stats(everstep_client* c, everstep_stats* stats) {
  if (int code = Check(c); code != EVERSTEP_OK) return code;
  if (stats == nullptr || stats->size < sizeof(uint32_t)) {
    return Fail(c, EVERSTEP_EINVAL, "everstep_get_stats: stats and its size must be given");
  }
  const cp::TrainerWord& t = c->arena.header()->trainer;
  everstep_stats full{};
  full.size = stats->size;
  full.agent_alive = AgentAlive(*c) ? 1 : 0;
  full.captured = t.captured;
  full.skipped = t.skipped;
  full.replaced = t.replaced;
  full.waited_ns = t.waited_ns;
  full.copy_ns = t.copy_ns;
  const auto newest = c->arena.Newest();
  full.newest_step = newest ? newest->step() : everstep::kNoStep;
  full.committed_step = c->arena.header()->agent.committed_step;
  std::memcpy(full.last_skip, c->last_skip.data(),
              std::min(c->last_skip.size(), sizeof full.last_skip - 1));
  std::memcpy(stats, &full, std::min<std::size_t>(stats->size, sizeof full));
  return EVERSTEP_OK;
}

}  // extern "C"
