#include "controller/store/convert.h"

#include <utility>

#include <fmt/format.h>

#include "proto/base/crc32c.h"
#include "proto/wire/convert.h"

namespace everstep::controller {
namespace {

// Accepts [0, last].
template <typename Enum>
bool ToEnum(std::uint32_t number, Enum last, Enum* to) {
  if (number > static_cast<std::uint32_t>(last)) return false;
  *to = static_cast<Enum>(number);
  return true;
}

bool ToReason(std::uint32_t number, Reason* to) {
  return number < static_cast<std::uint32_t>(Reason::kCount) && ToEnum(number, Reason::kCount, to);
}

template <typename Enum>
std::uint32_t Number(Enum e) {
  return static_cast<std::uint32_t>(e);
}

void ToProto(const Fault& from, v1::FaultSummary* to) {
  to->set_id(from.id);
  to->set_reason(Number(from.reason));
  to->set_subject(from.subject);
  to->set_evidence(from.evidence);
  to->set_action(from.action);
  to->set_detected_ns(from.detected.ns);
  to->set_occurred_ns(from.occurred.ns);
  to->set_recovered_ns(from.recovered.ns);
  to->set_generation_before(from.generation_before);
  to->set_generation_after(from.generation_after);
  to->set_step_before(from.step_before);
  to->set_step_after(from.step_after);
}

bool FromProto(const v1::FaultSummary& from, Fault* to) {
  to->id = from.id();
  to->subject = from.subject();
  to->evidence = from.evidence();
  to->action = from.action();
  to->detected = {from.detected_ns()};
  to->occurred = {from.occurred_ns()};
  to->recovered = {from.recovered_ns()};
  to->generation_before = from.generation_before();
  to->generation_after = from.generation_after();
  to->step_before = from.step_before();
  to->step_after = from.step_after();
  return ToReason(from.reason(), &to->reason);
}

std::uint32_t Milliseconds32(Duration d) {
  return static_cast<std::uint32_t>(ToMilliseconds(d));
}

template <typename Proto, typename Value>
StoreStatus Parse(const RecordKey& key, std::string_view payload, Record* out) {
  Proto proto;
  Value value;
  if (!proto.ParseFromArray(payload.data(), static_cast<int>(payload.size())) ||
      !FromProto(proto, &value)) {
    return {StoreCode::kCorrupt,
            fmt::format("record {} of the store has a good checksum but does not parse: it was "
                        "written by another version; start that version, or restore the state "
                        "directory from a copy",
                        key.table == Deletion::Table::kJournal ? "journal" : key.key)};
  }
  *out = std::move(value);
  return {};
}

std::uint32_t RecordCrc(const RecordKey& key, std::string_view payload) {
  const char table = static_cast<char>(key.table);
  return Crc32cExtend(Crc32cExtend(Crc32c(&table, 1), key.key), payload);
}

}  // namespace

void ToProto(const NodeRecord& from, v1::NodeRecord* to) {
  to->set_node(from.node);
  to->set_incarnation(from.incarnation);
  to->set_keeper_id(from.keeper_id);
  to->set_health(Number(from.health));
  to->set_draining(from.draining);
  to->set_drain_reason(from.drain_reason);
  to->set_address(from.facts.address);
  to->set_data_port(from.facts.data_port);
  to->set_slots(from.facts.slots);
  to->set_leave_by_ns(from.leave_by.ns);
  for (const auto& [name, value] : from.facts.labels) (*to->mutable_labels())[name] = value;
}

bool FromProto(const v1::NodeRecord& from, NodeRecord* to) {
  to->node = from.node();
  to->incarnation = from.incarnation();
  to->keeper_id = from.keeper_id();
  to->draining = from.draining();
  to->drain_reason = from.drain_reason();
  to->facts.address = from.address();
  to->facts.data_port = from.data_port();
  to->facts.slots = from.slots();
  to->leave_by = {from.leave_by_ns()};
  for (const auto& [name, value] : from.labels()) to->facts.labels[name] = value;
  return ToEnum(from.health(), NodeHealth::kLost, &to->health);
}

void ToProto(const JobSpec& from, v1::JobSpec* to) {
  to->set_job(from.job);
  to->set_min_nodes(from.min_nodes);
  to->set_max_nodes(from.max_nodes);
  to->set_nproc_per_node(from.nproc_per_node);
  to->set_spares(from.spares);
  to->set_max_restarts(from.max_restarts);
  to->set_strict_restarts(from.strict_restarts);
  to->set_join_timeout_ms(Milliseconds32(from.join_timeout));
  to->set_last_call_ms(Milliseconds32(from.last_call));
  to->set_max_no_progress(from.max_no_progress);
  to->set_max_start_failures(from.max_start_failures);
  to->set_master_port(from.master_port);
  to->set_only_nodes(fmt::format("{}", fmt::join(from.only_nodes, ",")));
  to->set_submitted_ns(from.submitted.ns);
  to->set_ckpt_dir(from.ckpt_dir);
  to->set_ckpt_every_steps(from.ckpt_every_steps);
  to->set_ckpt_every_ms(Milliseconds32(from.ckpt_every));
  to->set_copies(from.copies);
  to->set_parity_states(from.parity_states);
  to->set_verify_after_steps(from.verify_after);
  // An unreadable command was refused at submission.
  wire::ToProto(from.command, to->mutable_command());
}

void FromProto(const v1::JobSpec& from, JobSpec* to) {
  to->job = from.job();
  to->min_nodes = from.min_nodes();
  to->max_nodes = from.max_nodes();
  to->nproc_per_node = from.nproc_per_node();
  to->spares = from.spares();
  to->max_restarts = from.max_restarts();
  to->strict_restarts = from.strict_restarts();
  to->join_timeout = Milliseconds(from.join_timeout_ms());
  to->last_call = Milliseconds(from.last_call_ms());
  to->max_no_progress = from.max_no_progress();
  to->max_start_failures = from.max_start_failures();
  to->master_port = from.master_port();
  to->only_nodes.clear();
  const std::string& nodes = from.only_nodes();
  for (std::size_t begin = 0; begin < nodes.size();) {
    std::size_t end = nodes.find(',', begin);
    if (end == std::string::npos) end = nodes.size();
    if (end > begin) to->only_nodes.push_back(nodes.substr(begin, end - begin));
    begin = end + 1;
  }
  to->submitted = {from.submitted_ns()};
  to->ckpt_dir = from.ckpt_dir();
  to->ckpt_every_steps = from.ckpt_every_steps();
  to->ckpt_every = Milliseconds(from.ckpt_every_ms());
  to->copies = from.copies();
  to->parity_states = from.parity_states();
  to->verify_after = from.verify_after_steps();
  to->command = wire::FromProto(from.command());
}

void ToProto(const JobRecord& from, v1::JobRecord* to) {
  ToProto(from.spec, to->mutable_spec());
  to->set_state(Number(from.state));
  to->set_generation(from.generation);
  to->set_restarts(from.restarts);
  to->set_lost_capacity(from.lost_capacity);
  to->set_start_failures(from.start_failures);
  to->set_no_progress(from.no_progress);
  to->set_best_step(from.best_step);
  to->set_end_reason(Number(from.end_reason));
  to->set_end_message(from.end_message);
  to->set_exit_code(from.exit_code);
  to->set_started_ns(from.started.ns);
  to->set_ended_ns(from.ended.ns);
  to->set_data_key(from.data_key);
  to->set_earlier_runs(from.earlier_runs);
  to->set_memory_freed(from.memory_freed);
  to->set_forgotten(from.forgotten);
  to->set_shards_damaged(from.shards_damaged);
  to->set_shards_repaired(from.shards_repaired);
  for (const Cut& cut : from.given_up) wire::ToProto(cut, to->add_given_up());
  for (const Fault& fault : from.faults) ToProto(fault, to->add_faults());
  for (const WorkerOnNode& worker : from.failures) wire::ToProto(worker, to->add_failures());
}

bool FromProto(const v1::JobRecord& from, JobRecord* to) {
  FromProto(from.spec(), &to->spec);
  to->generation = from.generation();
  to->restarts = from.restarts();
  to->lost_capacity = from.lost_capacity();
  to->start_failures = from.start_failures();
  to->no_progress = from.no_progress();
  to->best_step = from.best_step();
  to->end_message = from.end_message();
  to->exit_code = from.exit_code();
  to->started = {from.started_ns()};
  to->ended = {from.ended_ns()};
  to->data_key = from.data_key();
  to->earlier_runs = from.earlier_runs();
  to->memory_freed = from.memory_freed();
  to->forgotten = from.forgotten();
  to->shards_damaged = from.shards_damaged();
  to->shards_repaired = from.shards_repaired();
  for (const v1::Cut& cut : from.given_up()) to->given_up.push_back(wire::FromProto(cut));
  for (const v1::FaultSummary& fault : from.faults()) {
    if (!FromProto(fault, &to->faults.emplace_back())) return false;
  }
  for (const v1::WorkerOnNode& worker : from.failures())
    to->failures.push_back(wire::FromProto(worker));
  return ToEnum(from.state(), JobState::kCancelled, &to->state) &&
         ToReason(from.end_reason(), &to->end_reason);
}

void ToProto(const GenerationRecord& from, v1::GenerationRecord* to) {
  const GenerationPlan& plan = from.plan;
  to->set_job(plan.job);
  to->set_generation(plan.generation);
  to->set_phase(Number(plan.phase));
  for (const NodePlan& node : plan.nodes) wire::ToProto(node, to->add_nodes());
  to->set_master_addr(plan.master_addr);
  to->set_master_port(plan.master_port);
  to->set_restart_count(plan.restart_count);
  to->set_restore_step(plan.restore_step);
  to->set_reason(Number(plan.reason));
  to->set_evidence(plan.evidence);
  if (!plan.cut.shards.empty()) wire::ToProto(plan.cut, to->mutable_cut());
  if (!plan.parity.groups.empty()) wire::ToProto(plan.parity, to->mutable_parity());
}

bool FromProto(const v1::GenerationRecord& from, GenerationRecord* to) {
  GenerationPlan& plan = to->plan;
  plan.job = from.job();
  plan.generation = from.generation();
  for (const v1::NodePlan& node : from.nodes()) plan.nodes.push_back(wire::FromProto(node));
  plan.master_addr = from.master_addr();
  plan.master_port = from.master_port();
  plan.restart_count = from.restart_count();
  plan.restore_step = from.restore_step();
  plan.evidence = from.evidence();
  if (from.has_cut()) plan.cut = wire::FromProto(from.cut());
  if (from.has_parity()) plan.parity = wire::FromProto(from.parity());
  return ToEnum(from.phase(), Phase::kEnded, &plan.phase) && ToReason(from.reason(), &plan.reason);
}

void ToProto(const CommitRecord& from, v1::CommitRecord* to) {
  to->set_job(from.job);
  for (const Commit& commit : from.commits) {
    v1::CommitRecord::Commit* c = to->add_commits();
    c->set_generation(commit.generation);
    c->set_step(commit.step);
    c->set_world_size(static_cast<std::uint32_t>(commit.world_size));
    c->set_copies(commit.copies);
    c->set_replicated_layout(commit.replicated_layout);
    for (const HeldShard& shard : commit.shards) wire::ToProto(shard, c->add_shards());
    for (const HeldShard& shard : commit.parities) wire::ToProto(shard, c->add_parities());
    if (!commit.parity.groups.empty()) wire::ToProto(commit.parity, c->mutable_parity());
  }
  to->set_persisted_generation(from.persisted_generation);
  to->set_persisted_step(from.persisted_step);
  to->set_persisted_ns(from.persisted.ns);
  for (const Cut& cut : from.files) wire::ToProto(cut, to->add_files());
  if (from.verified_at.ns != 0) wire::ToProto(from.verified, to->mutable_verified());
  to->set_verified_ns(from.verified_at.ns);
  to->set_anomalies(from.anomalies);
  to->set_anomaly_step(from.anomaly_step);
  to->set_anomaly_why(from.anomaly_why);
}

bool FromProto(const v1::CommitRecord& from, CommitRecord* to) {
  to->job = from.job();
  for (const v1::CommitRecord::Commit& c : from.commits()) {
    Commit& commit = to->commits.emplace_back();
    commit.generation = c.generation();
    commit.step = c.step();
    commit.world_size = static_cast<std::int32_t>(c.world_size());
    commit.copies = c.copies();
    commit.replicated_layout = c.replicated_layout();
    for (const v1::HeldShard& shard : c.shards()) commit.shards.push_back(wire::FromProto(shard));
    for (const v1::HeldShard& s : c.parities()) commit.parities.push_back(wire::FromProto(s));
    if (c.has_parity()) commit.parity = wire::FromProto(c.parity());
  }
  to->persisted_generation = from.persisted_generation();
  to->persisted_step = from.persisted_ns() == 0 ? kNoStep : from.persisted_step();
  to->persisted = {from.persisted_ns()};
  for (const v1::Cut& cut : from.files()) to->files.push_back(wire::FromProto(cut));
  if (from.has_verified()) to->verified = wire::FromProto(from.verified());
  to->verified_at = {from.verified_ns()};
  to->anomalies = from.anomalies();
  to->anomaly_step = from.anomalies() == 0 ? kNoStep : from.anomaly_step();
  to->anomaly_why = from.anomaly_why();
  return true;
}

void ToProto(const JournalRecord& from, v1::JournalRecord* to) {
  to->set_sequence(from.sequence);
  to->set_time_ns(from.time.ns);
  to->set_type_name(from.type);
  to->set_severity(Number(from.severity));
  to->set_reason(Number(from.reason));
  to->set_job(from.job);
  to->set_node(from.node);
  to->set_rank(from.rank);
  to->set_generation(from.generation);
  to->set_message(from.message);
  to->set_evidence(from.evidence);
}

bool FromProto(const v1::JournalRecord& from, JournalRecord* to) {
  to->sequence = from.sequence();
  to->time = {from.time_ns()};
  to->type = from.type_name();
  to->job = from.job();
  to->node = from.node();
  to->rank = from.rank();
  to->generation = from.generation();
  to->message = from.message();
  to->evidence = from.evidence();
  return ToEnum(from.severity(), Severity::kError, &to->severity) &&
         ToReason(from.reason(), &to->reason);
}

std::string EncodeRecord(const Record& record) {
  std::string payload;
  const auto serialise = [&payload](const auto& proto) { proto.SerializeToString(&payload); };
  struct {
    decltype(serialise)& out;
    void operator()(const NodeRecord& r) const {
      v1::NodeRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const JobRecord& r) const {
      v1::JobRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const GenerationRecord& r) const {
      v1::GenerationRecord p;
      ToProto(r, &p);
      p.set_plan_crc(PlanCrc(r.plan));
      out(p);
    }
    void operator()(const CommitRecord& r) const {
      v1::CommitRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const JournalRecord& r) const {
      v1::JournalRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const LedgerRecord& r) const {
      v1::LedgerRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const LayoutRecord& r) const {
      v1::LayoutRecord p;
      ToProto(r, &p);
      out(p);
    }
    void operator()(const ToldRecord& r) const {
      v1::ToldRecord p;
      ToProto(r, &p);
      out(p);
    }
  } encode{serialise};
  std::visit(encode, record);
  const std::uint32_t crc = RecordCrc(KeyOf(record), payload);
  std::string value(5, '\0');
  value[0] = static_cast<char>(kRecordFormat);
  for (std::size_t i = 0; i < 4; ++i) value[1 + i] = static_cast<char>((crc >> (8 * i)) & 0xFF);
  return value + payload;
}

StoreStatus DecodeRecord(const RecordKey& key, std::string_view value, Record* out) {
  const std::string_view name =
      key.table == Deletion::Table::kJournal ? std::string_view("journal") : key.key;
  if (value.size() < 5) {
    return {StoreCode::kCorrupt,
            fmt::format("record {} of the store is {} bytes long, at least 5 are needed: restore "
                        "the state directory from a copy",
                        name, value.size())};
  }
  if (static_cast<unsigned char>(value[0]) > kRecordFormat) {
    return {StoreCode::kTooNew,
            fmt::format("record {} has format {}, this version reads up to {}: "
                        "start the newer version",
                        name, static_cast<unsigned char>(value[0]), kRecordFormat)};
  }
  std::uint32_t crc = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    crc |= static_cast<std::uint32_t>(static_cast<unsigned char>(value[1 + i])) << (8 * i);
  }
  const std::string_view payload = value.substr(5);
  if (crc != RecordCrc(key, payload)) {
    return {StoreCode::kCorrupt,
            fmt::format("record {} of the store fails its checksum: the disk or a program changed "
                        "it; restore the state directory from a copy",
                        name)};
  }
  switch (key.table) {
    case Deletion::Table::kNode: return Parse<v1::NodeRecord, NodeRecord>(key, payload, out);
    case Deletion::Table::kJob: return Parse<v1::JobRecord, JobRecord>(key, payload, out);
    case Deletion::Table::kGeneration:
      return Parse<v1::GenerationRecord, GenerationRecord>(key, payload, out);
    case Deletion::Table::kCommit: return Parse<v1::CommitRecord, CommitRecord>(key, payload, out);
    case Deletion::Table::kJournal:
      return Parse<v1::JournalRecord, JournalRecord>(key, payload, out);
    case Deletion::Table::kLedger: return Parse<v1::LedgerRecord, LedgerRecord>(key, payload, out);
    case Deletion::Table::kLayout: return Parse<v1::LayoutRecord, LayoutRecord>(key, payload, out);
    case Deletion::Table::kTold: return Parse<v1::ToldRecord, ToldRecord>(key, payload, out);
  }
  return {StoreCode::kCorrupt, fmt::format("record {} is in an unknown table", name)};
}

std::uint32_t PlanCrc(const GenerationPlan& plan) {
  v1::GenerationRecord proto;
  ToProto(GenerationRecord{plan}, &proto);
  proto.clear_phase();  // a plan keeps its number as it goes from activate to run
  return Crc32c(proto.SerializeAsString());
}

void ToSnapshot(const std::vector<Record>& records, v1::StoreSnapshot* to) {
  for (const Record& record : records) {
    if (const auto* node = std::get_if<NodeRecord>(&record)) ToProto(*node, to->add_nodes());
    if (const auto* job = std::get_if<JobRecord>(&record)) ToProto(*job, to->add_jobs());
    if (const auto* plan = std::get_if<GenerationRecord>(&record)) {
      ToProto(*plan, to->add_generations());
    }
    if (const auto* commit = std::get_if<CommitRecord>(&record))
      ToProto(*commit, to->add_commits());
    if (const auto* ledger = std::get_if<LedgerRecord>(&record)) {
      ToProto(*ledger, to->add_ledgers());
    }
    if (const auto* layout = std::get_if<LayoutRecord>(&record)) {
      ToProto(*layout, to->add_layouts());
    }
    if (const auto* told = std::get_if<ToldRecord>(&record)) ToProto(*told, to->add_told());
  }
}

bool FromSnapshot(const v1::StoreSnapshot& from, std::vector<Record>* out) {
  out->clear();
  const auto all = [out](const auto& items, auto value) {
    for (const auto& item : items) {
      auto one = value;
      if (!FromProto(item, &one)) return false;
      out->push_back(std::move(one));
    }
    return true;
  };
  return all(from.nodes(), NodeRecord{}) && all(from.jobs(), JobRecord{}) &&
         all(from.generations(), GenerationRecord{}) && all(from.commits(), CommitRecord{}) &&
         all(from.ledgers(), LedgerRecord{}) && all(from.layouts(), LayoutRecord{}) &&
         all(from.told(), ToldRecord{});
}

}  // namespace everstep::controller
