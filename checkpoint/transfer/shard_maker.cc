#include "checkpoint/transfer/shard_maker.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "checkpoint/core/parity_ranks.h"
#include "checkpoint/transfer/for_each.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/parity_base.h"
#include "checkpoint/transfer/peer_task.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;

constexpr int kGoneAfter = 5;     // answers of a source in a row that it has not got it
constexpr int kCorruptAfter = 3;  // ... that it came damaged
constexpr milliseconds kLook{20};
constexpr std::size_t kReaders = 4;  // sources that one order reads at a time

bool MakesParity(const ShardBuild& build) {
  return IsParity(build.shard.rank, build.shard.world_size);
}

std::string What(const ShardBuild& build) {
  return fmt::format("{} {} of step {}", MakesParity(build) ? "parity" : "lost rank",
                     build.shard.rank, build.shard.step);
}

// One source's chunks on their way into the payload. Lives through all attempts: what was added is
// never added again.
class Adder final : public ChunkTaker {
 public:
  // `kept`: chunks of the payload that need nothing.
  Adder(const ShardRecipe* recipe, std::size_t source, ShardSum* sum, const std::vector<bool>& kept,
        bool table, Traffic* traffic, const std::array<const std::atomic<bool>*, 2>& cancels)
      : recipe_(recipe),
        source_(source),
        sum_(sum),
        table_(table),
        traffic_(traffic),
        class_(recipe->makes_parity() ? TrafficClass::kCommit : TrafficClass::kRepair),
        cancels_(cancels) {
    const std::vector<std::uint32_t>& chunks = recipe->sources()[source].chunks;
    added_.reserve(chunks.size());
    for (const std::uint32_t chunk : chunks) {
      added_.push_back(kept[recipe->PayloadChunk(source, chunk)]);
    }
  }

  std::vector<std::uint32_t> Lacks(const SlotFields& fields) override {
    fields_ = fields;
    std::vector<std::uint32_t> out;
    const std::vector<std::uint32_t>& chunks = recipe_->sources()[source_].chunks;
    out.reserve(chunks.size() + 2);
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      if (!added_[i]) out.push_back(chunks[i]);
    }
    if (table_ && fields.table_bytes > 0 && fields.table_bytes <= kChunkBytes) {
      table_bytes_.resize(fields.table_bytes);
      const std::uint64_t first = fields.table_offset / kChunkBytes;
      const std::uint64_t last = (fields.payload_bytes - 1) / kChunkBytes;
      for (std::uint64_t i = first; i <= last; ++i) out.push_back(static_cast<std::uint32_t>(i));
      std::sort(out.begin(), out.end());
      out.erase(std::unique(out.begin(), out.end()), out.end());
    }
    return out;
  }

  bool Take(std::uint32_t chunk, const unsigned char* data, std::uint32_t bytes) override {
    if (!traffic_->Admit(class_, bytes, cancels_[0])) return false;
    const std::vector<std::uint32_t>& chunks = recipe_->sources()[source_].chunks;
    const auto at = std::lower_bound(chunks.begin(), chunks.end(), chunk);
    if (at != chunks.end() && *at == chunk &&
        !added_[static_cast<std::size_t>(at - chunks.begin())]) {
      sum_->Add(source_, chunk, {reinterpret_cast<const std::byte*>(data), bytes});
      added_[static_cast<std::size_t>(at - chunks.begin())] = true;
      if (recipe_->makes_parity()) KillPoint("parity.chunk_added");
      if (!recipe_->makes_parity()) KillPoint("rebuild.chunk_added");
    }
    TakeTable(std::uint64_t{chunk} * kChunkBytes, data, bytes);
    return !*cancels_[0] && !*cancels_[1];
  }

  const SlotFields& fields() const { return fields_; }
  const std::vector<unsigned char>& table() const { return table_bytes_; }

 private:
  // The part of the table that lies in these bytes, from `offset` of the payload.
  void TakeTable(std::uint64_t offset, const unsigned char* data, std::uint32_t bytes) {
    const std::uint64_t first = std::max(offset, fields_.table_offset);
    const std::uint64_t end = std::min(offset + bytes, fields_.table_offset + table_bytes_.size());
    if (table_bytes_.empty() || first >= end) return;
    std::memcpy(table_bytes_.data() + (first - fields_.table_offset), data + (first - offset),
                end - first);
  }

  const ShardRecipe* recipe_;
  const std::size_t source_;
  ShardSum* const sum_;
  const bool table_;  // wanted, too
  Traffic* traffic_;
  const TrafficClass class_;
  const std::array<const std::atomic<bool>*, 2> cancels_;
  std::vector<bool> added_;
  SlotFields fields_;
  std::vector<unsigned char> table_bytes_;
};

bool Pause(milliseconds pause, const std::atomic<bool>& cancel, const std::atomic<bool>& stop) {
  for (milliseconds slept{0}; slept < pause && !cancel && !stop; slept += kLook) {
    std::this_thread::sleep_for(kLook);
  }
  return !cancel && !stop;
}

}  // namespace

void ShardMaker::Make(const JobId& job, Generation generation, const ShardBuild& build,
                      const std::string& own) {
  auto task = std::make_shared<Task>();
  task->job = job;
  task->generation = generation;
  task->build = build;
  task->own = own;
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  TaskPtr& current = tasks_[{job, build.shard.rank}];
  if (current != nullptr) {
    if (current->generation == generation && current->build == build) return;
    current->cancel = true;
  }
  current = task;
  if (pool_ == nullptr) pool_ = std::make_unique<TaskPool>(std::max(1, options_.push_threads));
  pool_->Submit([this, task] { Run(task); });
}

void ShardMaker::End(const JobId& job, Generation generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [key, task] : tasks_) {
    if (key.first == job && task->generation < generation) task->cancel = true;
  }
}

void ShardMaker::EndAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [key, task] : tasks_) task->cancel = true;
}

void ShardMaker::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    for (auto& [key, task] : tasks_) task->cancel = true;
  }
  if (pool_ != nullptr) pool_->Stop();
}

void ShardMaker::Run(const TaskPtr& task) {
  if (!task->cancel) {
    Result<SlotView> made = Error{};
    if (const auto held = Held(*task)) {
      made = *held;
    } else {
      const Traffic::Turn turn(
          traffic_, MakesParity(task->build) ? TrafficClass::kCommit : TrafficClass::kRepair);
      made = Bring(task.get());
    }
    if (made.ok()) {
      const bool parity = MakesParity(task->build);
      if (parity) KillPoint("parity.published");
      if (!parity) KillPoint("rebuild.published");
      listener_->OnCopied(task->job, ToShard(made.value(), true));
      if (parity) KillPoint("parity.told");
      if (!parity) KillPoint("rebuild.told");
    } else if (!task->cancel) {
      listener_->OnTrouble(task->job,
                           fmt::format("making {}: {}", What(task->build), made.error().message));
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = tasks_.find({task->job, task->build.shard.rank});
  if (it != tasks_.end() && it->second == task) tasks_.erase(it);
}

std::optional<SlotView> ShardMaker::Held(const Task& task) {
  const HeldShard& wanted = task.build.shard;
  auto opened = OpenHeld(host_, task.job, {.rank = wanted.rank, .replica = true});
  if (!opened.ok()) return std::nullopt;
  Arena& arena = opened.value();
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (!view || view->fields.rank != wanted.rank || view->fields.step != wanted.step ||
        view->fields.generation != wanted.generation || view->fields.built != wanted.built ||
        (wanted.crc_root != 0 && view->crc_root != wanted.crc_root) || !arena.Verify(*view).ok()) {
      continue;
    }
    if (wanted.crc_root != 0) return view;
    // A parity of these very shards?
    const unsigned char* data = arena.Payload(*view);
    if (data == nullptr) continue;
    const auto table =
        ReadParityTable({data + view->fields.table_offset, view->fields.table_bytes});
    if (!table.ok() || table.value().size() != task.build.sources.size()) continue;
    const bool same = std::all_of(
        task.build.sources.begin(), task.build.sources.end(), [&table](const CutShard& source) {
          return std::any_of(table.value().begin(), table.value().end(),
                             [&source](const ParityMember& m) {
                               return m.fields.rank == source.rank && m.crc_root == source.crc_root;
                             });
        });
    if (same) return view;
  }
  return std::nullopt;
}

Result<SlotView> ShardMaker::Bring(Task* task) {
  ShardBuild build = task->build;
  if (build.shard.built > UINT32_MAX) {
    return Error{ErrorCode::kInvalid, fmt::format("generation {} of its groups is beyond {}",
                                                  build.shard.built, UINT32_MAX)};
  }
  for (Error last;;) {
    const auto recipe = ShardRecipe::Of(build);
    if (!recipe.ok()) {
      if (last.message.empty()) return recipe.error();
      return Error{last.code, fmt::format("{}; {}", last.message, recipe.error().message)};
    }
    Rank failed = -1;
    const Generation received = recipe.value().makes_parity() ? task->generation : 0;
    auto kept = replicas_->Keep(
        task->job, build.shard.rank, received, recipe.value().payload_bytes(),
        [&](SlotWriter* writer) { return Fill(task, recipe.value(), writer, &failed); });
    if (kept.ok() || failed < 0) return kept;
    last = kept.error();
    std::erase_if(build.sources, [failed](const CutShard& s) { return s.rank == failed; });
  }
}

PeerTask ShardMaker::Asking(const Task& task, const JobFacts& facts, const std::string& address,
                            TrafficClass of) const {
  PeerTask asking = TaskFor(options_, task.job, facts, task.generation, of, &task.cancel);
  asking.address = address;
  return asking;
}

// One attempt to bring what lacks of a source.
Outcome ShardMaker::Read(const Task& task, const JobFacts& facts, const SlotName& name,
                         const std::string& address, TrafficClass of, ChunkTaker* taker) {
  if (address != task.own) return PickChunks(Asking(task, facts, address, of), name, taker);
  Outcome read = Error{ErrorCode::kNotFound, "this node has no such arena (any more)"};
  SearchShard(host_, task.job, name.fields.rank, [&](const ArenaName&, Arena* arena) {
    auto done = ReadChunks(arena, name, taker);
    // What an arena that has it says of it is worth more than that another one has not got it.
    if (done.ok() || done.error().code != ErrorCode::kNotFound) read = done;
    return done.ok();
  });
  return read;
}

// Chunks of the payload that are as in an older parity here: copied from it.
std::vector<bool> ShardMaker::KeepUnchanged(const Task& task, const ShardRecipe& recipe,
                                            SlotWriter* writer, ShardSum* sum) {
  std::vector<bool> kept(ChunkCount(recipe.payload_bytes()));
  const auto facts = jobs_->Find(task.job);
  auto base = ParityBase::Find(host_, task.job, task.build, recipe);
  if (!base || !facts) return kept;
  std::vector<Bitmap> same(recipe.sources().size());
  (void)ForEach(same.size(), kReaders, [&](std::size_t s) -> Outcome {
    const SlotName name = NameOf(task, recipe.sources()[s].shard);
    const SlotName older = base->Older(task.job, s);
    const std::string& address = recipe.sources()[s].shard.holders.front().address;
    if (address != task.own) {
      auto picked = PickSame(Asking(task, *facts, address, TrafficClass::kCommit), name, older);
      if (picked.ok()) same[s] = std::move(picked.value());  // else all of it is brought
      return Done{};
    }
    SearchShard(host_, task.job, name.fields.rank, [&](const ArenaName&, Arena* arena) {
      auto found = FindSame(arena, name, older);
      if (found.ok()) same[s] = std::move(found.value());
      return found.ok();
    });
    return Done{};
  });
  KillPoint("parity.compared");
  std::uint64_t spared = 0;
  for (const std::uint64_t chunk : base->Copy(recipe, same, writer)) {
    kept[chunk] = true;
    sum->Keep(chunk);
  }
  for (std::size_t s = 0; s < same.size(); ++s) {
    for (const std::uint32_t chunk : recipe.sources()[s].chunks) {
      if (!kept[recipe.PayloadChunk(s, chunk)]) continue;
      spared += std::min<std::uint64_t>(
          kChunkBytes, recipe.sources()[s].shard.bytes - std::uint64_t{chunk} * kChunkBytes);
    }
  }
  traffic_->Spared(spared);
  return kept;
}

SlotName ShardMaker::NameOf(const Task& task, const CutShard& shard) {
  SlotName name{.job = task.job, .fields = {}, .crc_root = shard.crc_root};
  name.fields.rank = shard.rank;
  name.fields.generation = task.build.shard.generation;
  name.fields.step = task.build.shard.step;
  name.fields.payload_bytes = shard.bytes;
  return name;
}

// A source's part, in as many attempts as it takes. *gone: it is to be left out.
Outcome ShardMaker::BringSource(const Task& task, const ShardRecipe& recipe, std::size_t s,
                                SteadyTime deadline, const std::atomic<bool>& stop,
                                ChunkTaker* taker, bool* gone) {
  const Error over{ErrorCode::kStale, "its generation is over, or a newer order came"};
  const CutShard& shard = recipe.sources()[s].shard;
  const SlotName name = NameOf(task, shard);
  const TrafficClass of = recipe.makes_parity() ? TrafficClass::kCommit : TrafficClass::kRepair;
  auto pause = options_.retry_first;
  int lacked = 0, corrupt = 0;
  for (std::size_t attempt = 0;; ++attempt) {
    const auto facts = jobs_->Find(task.job);
    if (task.cancel || stop || !facts || facts->generation > task.generation) return over;
    const std::string& address = shard.holders[attempt % shard.holders.size()].address;
    const Outcome read = Read(task, *facts, name, address, of, taker);
    if (read.ok()) return read;
    if (task.cancel || stop) return over;
    const ErrorCode code = read.error().code;
    lacked += code == ErrorCode::kNotFound || code == ErrorCode::kStale ? 1 : 0;
    corrupt += code == ErrorCode::kCorrupt ? 1 : 0;
    const bool late = std::chrono::steady_clock::now() + pause >= deadline;
    if (lacked >= kGoneAfter || corrupt >= kCorruptAfter || late) {
      *gone = !late;
      return Error{code, fmt::format("rank {} at {}: {} (attempt {})", shard.rank, address,
                                     read.error().message, attempt + 1)};
    }
    if (!Pause(pause, task.cancel, stop)) return over;
    pause = std::min(pause * 2, options_.retry_last);
  }
}

// Every source's part, several sources at a time. *failed: one that is to be left out.
Result<ReplicaStore::Filled> ShardMaker::Fill(Task* task, const ShardRecipe& recipe,
                                              SlotWriter* writer, Rank* failed) {
  auto* payload = reinterpret_cast<std::byte*>(writer->Chunk(0));
  if (recipe.makes_parity()) KillPoint("parity.begun");
  if (!recipe.makes_parity()) KillPoint("rebuild.begun");
  const SteadyTime deadline = std::chrono::steady_clock::now() + options_.restore_timeout +
                              milliseconds(RestoreMillis(recipe.payload_bytes()));
  ShardSum sum(recipe, payload);
  const std::vector<bool> kept = recipe.makes_parity()
                                     ? KeepUnchanged(*task, recipe, writer, &sum)
                                     : std::vector<bool>(ChunkCount(recipe.payload_bytes()));
  std::vector<ParityMember> members(recipe.sources().size());
  std::vector<unsigned char> table;
  std::atomic<bool> stop{false};  // one failed: the others are not needed
  std::mutex mutex;
  std::optional<Error> why;
  (void)ForEach(members.size(), kReaders, [&](std::size_t s) -> Outcome {
    const bool with_table = !recipe.makes_parity() && s == recipe.table_source();
    Adder adder(&recipe, s, &sum, kept, with_table, traffic_, {&task->cancel, &stop});
    bool gone = false;
    auto brought = BringSource(*task, recipe, s, deadline, stop, &adder, &gone);
    if (!brought.ok()) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!why) {
        why = brought.error();
        if (gone) *failed = recipe.sources()[s].shard.rank;
      }
      stop = true;
      return brought;
    }
    members[s] = {adder.fields(), recipe.sources()[s].shard.crc_root};
    if (with_table) table = adder.table();  // no other source's
    if (recipe.makes_parity()) KillPoint("parity.source_added");
    if (!recipe.makes_parity()) KillPoint("rebuild.source_added");
    return brought;
  });
  if (why) return *why;
  sum.Finish();
  auto fields = recipe.makes_parity() ? ParityFields(*task, recipe, members, payload)
                                      : LostFields(*task, table);
  if (!fields.ok()) return fields.error();
  auto sealed = Seal(fields.value(), task->build.shard.crc_root, writer);
  if (recipe.makes_parity()) KillPoint("parity.sealed");
  if (!recipe.makes_parity()) KillPoint("rebuild.sealed");
  return sealed;
}

// Writes a parity's table; its slot's fields.
Result<SlotFields> ShardMaker::ParityFields(const Task& task, const ShardRecipe& recipe,
                                            const std::vector<ParityMember>& members,
                                            std::byte* payload) {
  const HeldShard& wanted = task.build.shard;
  const std::vector<unsigned char> table = PrintParityTable(members);
  const std::uint64_t offset = recipe.payload_bytes() - table.size();
  std::memcpy(payload + offset, table.data(), table.size());
  SlotFields fields{.generation = wanted.generation,
                    .step = wanted.step,
                    .rank = wanted.rank,
                    .world_size = wanted.world_size,
                    .payload_bytes = recipe.payload_bytes(),
                    .table_offset = offset,
                    .table_bytes = table.size(),
                    .job_crc = Crc32c(task.job.data(), task.job.size()),
                    .built = static_cast<std::uint32_t>(wanted.built)};
  for (const ParityMember& m : members) {
    fields.captured_ns = std::max(fields.captured_ns, m.fields.captured_ns);
  }
  return fields;
}

// A lost slot's fields, out of the table of a parity that covered it.
Result<SlotFields> ShardMaker::LostFields(const Task& task,
                                          const std::vector<unsigned char>& table) {
  const HeldShard& wanted = task.build.shard;
  const auto members = ReadParityTable(table);
  if (!members.ok()) return members.error();
  for (const ParityMember& m : members.value()) {
    if (m.fields.rank == wanted.rank && m.crc_root == wanted.crc_root &&
        m.fields.payload_bytes == wanted.bytes) {
      return m.fields;
    }
  }
  return Error{ErrorCode::kInvalid,
               fmt::format("its parity covers other bytes of rank {} than those with checksum "
                           "{:08x}",
                           wanted.rank, wanted.crc_root)};
}

// The checksums of what lies there. A lost shard's must give the one that was committed.
Result<ReplicaStore::Filled> ShardMaker::Seal(const SlotFields& fields, std::uint32_t wanted,
                                              SlotWriter* writer) {
  SlotView shape;
  shape.fields = fields;
  std::vector<std::uint32_t> crcs(shape.chunks());
  for (std::uint64_t i = 0; i < shape.chunks(); ++i) {
    crcs[i] = Crc32c(writer->Chunk(i), shape.chunk_size(i));
    writer->SetChunkCrc(i, crcs[i]);
  }
  const std::uint32_t root = CrcRoot(fields, crcs.data());
  if (wanted != 0 && root != wanted) {
    return Error{
        ErrorCode::kCorrupt,
        fmt::format("what was made has checksum {:08x}, {:08x} was committed", root, wanted)};
  }
  return ReplicaStore::Filled{fields, root};
}

}  // namespace everstep::checkpoint
