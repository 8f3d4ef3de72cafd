// One slot from a peer, in ranges over as many connections as pay.
#include <fmt/format.h>

#include <algorithm>
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

// The chunks that lack, in at most `parts` ranges of about equal work.
std::vector<Range> Lacking(const std::vector<std::uint8_t>& have, std::uint64_t parts) {
  std::vector<std::uint64_t> lacking;
  for (std::uint64_t i = 0; i < have.size(); ++i) {
    if (have[i] == 0) lacking.push_back(i);
  }
  if (lacking.empty()) return {{0, 1}};  // the fields alone
  parts = std::clamp<std::uint64_t>(lacking.size() / kStreamPays, 1, parts);
  std::vector<Range> out;
  for (std::uint64_t p = 0; p < parts; ++p) {
    const std::uint64_t from = lacking.size() * p / parts;
    const std::uint64_t to = lacking.size() * (p + 1) / parts;
    out.push_back({lacking[from], lacking[to - 1] + 1});
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

  const PeerTask& task_;
  const SlotFields& wanted_;
  const std::uint32_t crc_root_;
  FetchSink* const sink_;
  FetchProgress* const progress_;
  std::mutex mutex_;  // guards the rest; elements of `have` have one stream each
  SlotWriter* writer_ = nullptr;
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

Outcome Fetcher::Bring(Range range) {
  auto talk = Converse(task_,
                       {.op = task_.checked ? Op::kFetchChecked : Op::kFetch,
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
    progress_->have[next] = 0;
    if (auto ok = ReceiveChunk(&connection, fields, frame.value(), writer_); !ok.ok()) return ok;
    progress_->have[next] = 1;
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
  std::vector<std::thread> further;
  std::size_t started = 1;
  for (; started < ranges.size(); ++started) {
    try {
      further.emplace_back([this, &done, &ranges, started] {
        BlockSigpipe();
        done[started] = Bring(ranges[started]);
      });
    } catch (const std::system_error&) {
      break;  // no thread is free: this one does the rest
    }
  }
  done[0] = Bring(ranges[0]);
  for (std::size_t i = started; i < ranges.size() && done[0].ok(); ++i) done[0] = Bring(ranges[i]);
  for (std::thread& t : further) t.join();
  for (const Outcome& outcome : done) {
    if (!outcome.ok()) return outcome.error();
  }
  KillPoint("restore.all_fetched");
  auto view = writer_->Publish(fields_, crc_root_);
  if (!view.ok()) progress_->have.assign(progress_->have.size(), 0);
  return view;
}

}  // namespace

Result<SlotView> FetchSlot(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root,
                           FetchSink* sink, FetchProgress* progress) {
  return Fetcher(task, wanted, crc_root, sink, progress).Run();
}

}  // namespace everstep::checkpoint
