// One slot from a peer, in ranges over as many connections as pay.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint64_t kStreamPays = 32;  // chunks a stream must have to be worth its connection

struct Range {
  std::uint64_t first = 0;
  std::uint64_t end = 0;  // 0: to the last
};

// The chunks that lack, and none else, in ranges for about `parts` streams of equal work.
std::vector<Range> Lacking(const std::vector<std::uint8_t>& have, std::uint64_t parts) {
  const auto lacking = static_cast<std::uint64_t>(std::count(have.begin(), have.end(), 0));
  if (lacking == 0) return {{0, 1}};  // the fields alone
  parts = std::clamp<std::uint64_t>(lacking / kStreamPays, 1, parts);
  const std::uint64_t most = (lacking + parts - 1) / parts;
  std::vector<Range> out;
  for (std::uint64_t i = 0; i < have.size(); ++i) {
    if (have[i] != 0) continue;
    if (out.empty() || out.back().end != i || i - out.back().first == most) out.push_back({i, i});
    out.back().end = i + 1;
  }
  return out;
}

class Fetcher {
 public:
  Fetcher(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root, FetchSink* sink,
          FetchProgress* progress)
      : task_(task), wanted_(wanted), crc_root_(crc_root), sink_(sink), progress_(progress) {}

  Result<SlotView> Run();

 private:
  Outcome Bring(Range range);
  Outcome Begin(const PeerConversation& talk);
  void Table(const std::vector<std::uint32_t>& crcs);

  const PeerTask& task_;
  const SlotFields& wanted_;
  const std::uint32_t crc_root_;
  FetchSink* const sink_;
  FetchProgress* const progress_;
  std::mutex mutex_;  // guards the rest; elements of `have` have one stream each
  SlotWriter* writer_ = nullptr;
  bool tabled_ = false;
  SlotFields fields_;
};

// The first answer makes the writer; the others must be of the same slot.
Outcome Fetcher::Begin(const PeerConversation& talk) {
  const SlotFields& fields = talk.response.fields;
  const std::string& peer = talk.connection.peer();
  if (auto ok = CheckFields(fields); !ok.ok()) {
    return Error{ErrorCode::kInvalid, fmt::format("peer {}: {}", peer, ok.error().message)};
  }
  if (fields.step != wanted_.step || fields.rank != wanted_.rank ||
      fields.generation != wanted_.generation || talk.response.crc_root != crc_root_ ||
      (wanted_.payload_bytes != 0 && fields.payload_bytes != wanted_.payload_bytes)) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: offers step {} of rank {}, {} bytes; asked was step {} of "
                             "rank {}, {} bytes",
                             peer, fields.step, fields.rank, fields.payload_bytes, wanted_.step,
                             wanted_.rank, wanted_.payload_bytes)};
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (writer_ != nullptr) return Done{};
  writer_ = sink_->Begin(fields);
  if (writer_ == nullptr) return Error{ErrorCode::kNoMemory, sink_->Why()};
  fields_ = fields;
  progress_->have.resize(ChunkCount(fields.payload_bytes));
  return Done{};
}

void Fetcher::Table(const std::vector<std::uint32_t>& crcs) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!tabled_) sink_->Table(crcs, progress_->have);
  tabled_ = true;
}

Outcome Fetcher::Bring(Range range) {
  auto talk = Converse(task_,
                       {.op = task_.relay     ? Op::kFetchRelay
                              : task_.checked ? Op::kFetchChecked
                                              : Op::kFetch,
                        .first_chunk = range.first,
                        .end_chunk = range.end,
                        .fields = wanted_,
                        .crc_root = crc_root_},
                       DeadlineFor(task_.limits, wanted_.payload_bytes));
  if (!talk.ok()) return talk.error();
  if (auto ok = Begin(talk.value()); !ok.ok()) return ok;
  Connection& connection = talk.value().connection;
  const SlotFields& fields = talk.value().response.fields;
  connection.set_deadline(DeadlineFor(task_.limits, fields.payload_bytes));
  KillPoint("restore.fetch_answered");
  const auto table = ReceiveTable(&connection, fields, crc_root_);
  if (!table.ok()) return table.error();
  Table(table.value().crcs);
  const std::uint64_t end = range.end == 0 ? table.value().crcs.size() : range.end;
  std::uint64_t next = range.first;
  for (;; ++next) {
    const auto frame = ReceiveChunkFrame(&connection, fields, table.value().crcs);
    if (!frame.ok()) return frame.error();
    const bool over = frame.value().index == kEndOfChunks;
    if (over ? next < end : frame.value().index != next || next >= end) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("peer {}: sends chunk {} where {} of [{}, {}) was due",
                               connection.peer(), frame.value().index, next, range.first, end)};
    }
    if (over) return Done{};
    if (task_.cancel != nullptr && *task_.cancel) {
      return Error{ErrorCode::kStale,
                   fmt::format("peer {}: receiving: given up here", connection.peer())};
    }
    if (progress_->have[next] != 0) {  // it may be passed on just now
      if (auto ok = SkipChunk(&connection, frame.value()); !ok.ok()) return ok;
      continue;
    }
    writer_->TouchChunk(next);
    if (auto ok = ReceiveChunk(&connection, fields, frame.value(), writer_); !ok.ok()) return ok;
    progress_->have[next] = 1;
    sink_->Verified(next);
    KillPoint("restore.chunk_fetched");
  }
}

Result<SlotView> Fetcher::Run() {
  if (progress_->have.empty() && wanted_.payload_bytes <= kMaxPayloadBytes) {
    progress_->have.resize(ChunkCount(wanted_.payload_bytes));
  }
  std::vector<Range> ranges{{0, 0}};
  if (!progress_->have.empty()) {
    ranges = Lacking(progress_->have, static_cast<std::uint64_t>(std::max(1, task_.streams)));
  }
  std::vector<Outcome> done(ranges.size(), Outcome(Done{}));
  std::atomic<std::size_t> next{0};
  const auto bring = [&] {
    for (std::size_t i; (i = next++) < ranges.size();) {
      done[i] = Bring(ranges[i]);
      if (!done[i].ok()) return;
    }
  };
  const auto streams = static_cast<std::size_t>(std::max(1, task_.streams));
  std::vector<std::thread> further;
  while (further.size() + 1 < std::min(streams, ranges.size())) {
    try {
      further.emplace_back([&bring] {
        BlockSigpipe();
        bring();
      });
    } catch (const std::system_error&) {
      break;  // no thread is free: the others do the rest
    }
  }
  bring();
  for (std::thread& t : further) t.join();
  for (const Outcome& outcome : done) {
    if (!outcome.ok()) return outcome.error();
  }
  KillPoint("restore.all_fetched");
  auto view = writer_->Publish(fields_, crc_root_);
  if (!view.ok()) {
    sink_->Lost();
    progress_->have.assign(progress_->have.size(), 0);
  }
  return view;
}

}  // namespace

Result<SlotView> FetchSlot(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root,
                           FetchSink* sink, FetchProgress* progress) {
  return Fetcher(task, wanted, crc_root, sink, progress).Run();
}

}  // namespace everstep::checkpoint
