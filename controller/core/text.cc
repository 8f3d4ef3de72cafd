#include "controller/core/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace everstep::controller {
namespace {

// Words joined by one space; empty ones are left out.
class Line {
 public:
  explicit Line(std::string first) : text_(std::move(first)) {}
  template <typename... Args>
  Line& Add(fmt::format_string<Args...> format, Args&&... args) {
    const std::string word = fmt::format(format, std::forward<Args>(args)...);
    if (!word.empty()) text_ += " " + word;
    return *this;
  }
  template <typename... Args>
  Line& If(bool said, fmt::format_string<Args...> format, Args&&... args) {
    return said ? Add(format, std::forward<Args>(args)...) : *this;
  }
  operator std::string() const { return text_; }  // NOLINT: a line is its text

 private:
  std::string text_;
};

std::string Braced(const std::string& evidence) {
  return evidence.empty() ? "" : fmt::format("{{{}}}", evidence);
}

std::string ExitText(const ExitInfo& exit) {
  return Line(fmt::format("{}={}", exit.code < 0 ? "signal" : "exit_code", std::abs(exit.code)))
      .If(exit.oom_killed, "oom")
      .If(exit.by_everstep, "by_everstep")
      .If(exit.ran.count() > 0, "ran={}", DurationText(exit.ran));
}

std::string ShardText(const HeldShard& s) {
  return Line(fmt::format("rank={}/{}", s.rank, s.world_size))
      .Add("g={} step={} crc={}", s.generation, s.step, s.crc_root)
      .If(s.replica, "replica")
      .If(s.replicated_layout, "replicated_layout")
      .If(s.share, "share")
      .If(s.file, "file");
}

std::string HoldingText(const JobOnNode& holds) {
  Line line(fmt::format("{} g={}", holds.job, holds.generation));
  line.If(holds.activated, "activated");
  for (const WorkerOnNode& w : holds.workers) {
    if (w.running) {
      line.Add("[rank {} runs]", w.rank);
    } else {
      line.Add("[rank {} {}]", w.rank, ExitText(w.exit));
    }
  }
  for (const HeldShard& s : holds.shards) line.Add("[{}]", ShardText(s));
  return line;
}

std::string Ranks(const NodePlan& node) {
  std::string text;
  for (const WorkerPlan& w : node.workers) {
    text += fmt::format("{}{}", text.empty() ? "" : ",", w.rank);
  }
  return text;
}

// "rank 1's from n2" when some worker starts from another node's or another rank's slot; "by n3"
// when n3 passes it on.
std::string RestoreText(const NodePlan& node) {
  std::string text;
  for (const WorkerPlan& w : node.workers) {
    if (w.restore.step == kNoStep) continue;
    text += fmt::format(
        "{}rank {} {} {}", text.empty() ? "" : ", ", w.rank, w.restore.relay > 0 ? "by" : "from",
        w.restore.ranges                                             ? "all"
        : w.restore.file                                             ? "files"
        : w.restore.source_node == node.node && w.restore.relay == 0 ? "here"
                                                                     : w.restore.source_node);
    if (w.restore.shard_rank != w.rank) text += fmt::format("'s rank {}", w.restore.shard_rank);
  }
  return text.empty() ? "" : fmt::format("({})", text);
}

// "cut of g=2 world=3 {0 on n1 n2} {1 on n3 files} ..."
std::string CutText(const RestoreCut& cut) {
  if (cut.shards.empty()) return "";
  std::string text = fmt::format("cut of g={} world={}", cut.generation, cut.world_size);
  for (const CutShard& shard : cut.shards) {
    text += fmt::format(" {{{} on", shard.rank);
    for (const CutHolder& holder : shard.holders) text += " " + holder.node;
    text += shard.file ? " files}" : "}";
  }
  return text;
}

std::string Members(const GenerationPlan& plan) {
  std::string text = "[";
  for (const NodePlan& n : plan.nodes) {
    text += fmt::format("{}{}", n.group_rank == 0 ? "" : " ", n.node);
    if (!n.workers.empty()) text += ":" + Ranks(n);
    for (std::size_t i = 0; i < n.peers.size(); ++i) {
      text += (i == 0 ? ">" : "+") + n.peers[i].node;
    }
  }
  return text + "]";
}

// "g2/90,g1/50"
std::string CutsText(const std::vector<Cut>& cuts) {
  std::string text;
  for (const Cut& cut : cuts) {
    text += fmt::format("{}g{}/{}", text.empty() ? "" : ",", cut.generation, cut.step);
  }
  return text;
}

// The events.
struct EventText {
  std::string From(const char* name, const NodeId& node, Incarnation incarnation) const {
    return fmt::format("{} {}.{}", name, node, incarnation);
  }
  std::string operator()(const NodeRegistered& e) const {
    Line line(fmt::format("registered {} keeper={:x}", e.node, e.keeper_id));
    line.If(e.previous_incarnation != 0, "previous={}", e.previous_incarnation);
    for (const JobOnNode& job : e.jobs) line.Add("has {}", HoldingText(job));
    return line;
  }
  std::string operator()(const SessionClosed& e) const {
    return Line(From("session_closed", e.node, e.incarnation)).Add("{}", Braced(e.evidence));
  }
  std::string operator()(const NodeProcessDead& e) const {
    return Line(From("process_dead", e.node, e.incarnation)).Add("{}", Braced(e.evidence));
  }
  std::string operator()(const Heartbeat& e) const {
    Line line(From("heartbeat", e.node, e.incarnation));
    for (const JobProgress& p : e.jobs) line.Add("{} g={} step={}", p.job, p.generation, p.step);
    return line;
  }
  std::string operator()(const Prepared& e) const {
    return Line(From("prepared", e.node, e.incarnation))
        .Add("{}", HoldingText(e.holds))
        .If(e.refused, "refused \"{}\"", e.message);
  }
  std::string operator()(const Activated& e) const {
    return Line(From("activated", e.node, e.incarnation))
        .Add("{} g={}", e.job, e.generation)
        .If(e.failed, "failed \"{}\"", e.message);
  }
  std::string operator()(const WorkerExited& e) const {
    return Line(From("worker_exited", e.node, e.incarnation))
        .Add("{} g={} rank={} {}", e.job, e.generation, e.rank, ExitText(e.exit));
  }
  std::string operator()(const WorkerStalled& e) const {
    return Line(From("worker_stalled", e.node, e.incarnation))
        .Add("{} g={} rank={} {}", e.job, e.generation, e.rank, StallKindName(e.kind))
        .Add("{}", Braced(e.evidence));
  }
  std::string operator()(const ShardCopied& e) const {
    return Line(From("shard_copied", e.node, e.incarnation))
        .Add("{} {}", e.job, ShardText(e.shard));
  }
  std::string operator()(const ShardDamaged& e) const {
    return Line(From("shard_damaged", e.node, e.incarnation))
        .Add("{} {} chunk={} found_by={}", e.job, ShardText(e.shard), e.chunk, e.found_by);
  }
  std::string operator()(const Persisted& e) const {
    return Line(From("persisted", e.node, e.incarnation))
        .Add("{} g={} step={} bytes={}", e.job, e.generation, e.step, e.bytes)
        .If(e.sealed, "sealed")
        .If(!e.error.empty(), "error \"{}\"", e.error);
  }
  std::string operator()(const Notice& e) const {
    return Line(From("notice", e.node, e.incarnation))
        .Add("source={} deadline={}", e.source, DurationText(e.deadline));
  }
  std::string operator()(const NodeWarm& e) const {
    return Line(From("node_warm", e.node, e.incarnation))
        .Add("{} {}", e.job, e.warm ? "yes" : "no");
  }
  std::string operator()(const KeeperLost& e) const {
    return Line(From("keeper_lost", e.node, e.incarnation)).Add("now keeper={:x}", e.new_keeper_id);
  }
  std::string operator()(const Stopped& e) const {
    return Line(From("stopped", e.node, e.incarnation)).Add("{} g={}", e.job, e.generation);
  }
  std::string operator()(const Told& e) const {
    Line line(From("told", e.node, e.incarnation));
    line.Add("{} g={} rank={}", e.job, e.generation, e.rank);
    for (const ToldWord& word : e.words) line.Add("#{} \"{:.80}\"", word.sequence, word.body);
    return line;
  }
  std::string operator()(const SubmitJob& e) const {
    return fmt::format("submit {} nodes={}:{}", e.spec.job, e.spec.min_nodes, e.spec.max_nodes);
  }
  std::string operator()(const CancelJob& e) const {
    return Line("cancel " + e.job).If(e.forget, "forget").Add("{}", Braced(e.reason));
  }
  std::string operator()(const DrainNode& e) const {
    return Line("drain " + e.node).If(e.allow_pause, "allow_pause").Add("{}", Braced(e.reason));
  }
  std::string operator()(const UndrainNode& e) const { return "undrain " + e.node; }
  std::string operator()(const SaveCheckpoint& e) const { return "save_checkpoint " + e.job; }
  std::string operator()(const RollBack& e) const {
    return Line("roll_back " + e.job).Add("step={}", e.step);
  }
  std::string operator()(const ReportAnomaly& e) const {
    return Line("anomaly " + e.job).Add("{}", Braced(e.why));
  }
  std::string operator()(const Tick&) const { return "tick"; }
};

// The records.
struct RecordText {
  std::string operator()(const NodeRecord& r) const {
    return Line(fmt::format("node {} inc={} {}", r.node, r.incarnation, NodeHealthName(r.health)))
        .Add("keeper={:x}", r.keeper_id)
        .If(r.draining, "draining {}", Braced(r.drain_reason));
  }
  std::string operator()(const JobRecord& r) const {
    std::size_t open = 0;
    for (const Fault& f : r.faults) open += f.recovered.ns == 0 ? 1 : 0;
    return Line(fmt::format("job {} {} g={}", r.spec.job, JobStateName(r.state), r.generation))
        .If(r.restarts != 0, "restarts={}", r.restarts)
        .If(r.lost_capacity != 0, "lost_capacity={}", r.lost_capacity)
        .If(r.start_failures != 0, "start_failures={}", r.start_failures)
        .If(r.no_progress != 0, "no_progress={}", r.no_progress)
        .If(r.best_step != kNoStep, "best_step={}", r.best_step)
        .If(!r.faults.empty(), "faults={}", r.faults.size())
        .If(open != 0, "open={}", open)
        .If(!r.faults.empty(), "({}: {})", r.faults.empty() ? "" : r.faults.back().subject,
            r.faults.empty() ? "" : r.faults.back().action)
        .If(r.end_reason != Reason::kNone, "end={} exit_code={}", ReasonName(r.end_reason),
            r.exit_code)
        .If(r.end_reason != Reason::kNone && !r.memory_freed, "memory_kept")
        .If(r.shards_damaged != 0, "damaged={} repaired={}", r.shards_damaged, r.shards_repaired)
        .If(!r.given_up.empty(), "given_up={}", CutsText(r.given_up))
        .If(r.forgotten, "forgotten");
  }
  std::string operator()(const GenerationRecord& r) const {
    const GenerationPlan& p = r.plan;
    Line line(
        fmt::format("generation {}/{} {} {}", p.job, p.generation, PhaseName(p.phase), Members(p)));
    line.If(!p.master_addr.empty(), "master={}:{}", p.master_addr, p.master_port)
        .If(p.restart_count != 0, "restart_count={}", p.restart_count)
        .If(p.restore_step != kNoStep, "restore={}", p.restore_step)
        .Add("reason={}", ReasonName(p.reason));
    return line;
  }
  std::string operator()(const CommitRecord& r) const {
    Line line("commit " + r.job);
    for (const Commit& c : r.commits) {
      line.Add("[g={} step={} world={} copies={}]", c.generation, c.step, c.world_size, c.copies);
    }
    line.If(r.persisted.ns != 0, "persisted g={} step={}", r.persisted_generation,
            r.persisted_step);
    line.If(r.verified_at.ns != 0, "verified g={} step={}", r.verified.generation, r.verified.step);
    line.If(!r.files.empty(), "files={}", CutsText(r.files));
    line.If(r.anomalies != 0, "anomalies={} at={}", r.anomalies, r.anomaly_step);
    return line;
  }
  std::string operator()(const LedgerRecord& r) const {
    Line line(fmt::format("ledger {} g={} steps={}..{}", r.job, r.generation, r.first, r.next));
    line.If(r.folded_runs != 0, "folded={}/{}", r.folded_end, r.folded_runs);
    for (const LedgerRun& run : r.runs) {
      line.Add("[{}..{} g={}{}]", run.first, run.end, run.generation,
               run.parts.empty() ? "" : fmt::format(" parts={}", run.parts.size()));
    }
    line.If(r.retold != 0, "retold={}", r.retold).If(r.stale != 0, "stale={}", r.stale);
    line.If(r.taken_back != 0, "taken_back={}", r.taken_back);
    for (const LedgerFinding& f : r.findings) line.Add("{}@{}", f.kind, f.step);
    return line;
  }
  std::string operator()(const LayoutRecord& r) const {
    Line line(fmt::format("layout {}/{} from={} microbatches={}", r.job, r.generation, r.begin,
                          r.microbatches));
    for (const LayoutRecord::Pipeline& p : r.pipelines) {
      line.Add("{}-{}@{}", p.first, p.end,
               p.nodes.empty() ? fmt::format("{}", fmt::join(p.ranks, "."))
                               : fmt::format("{}", fmt::join(p.nodes, ".")));
    }
    return line;
  }
  std::string operator()(const ToldRecord& r) const {
    return Line(fmt::format("told {}/{} g={} rank={}", r.job, r.kind, r.generation, r.rank))
        .Add("bytes={} nodes={}", r.body.size(), fmt::join(r.nodes, ","));
  }
  std::string operator()(const JournalRecord& r) const {
    return Line(fmt::format("journal {} {} {}:", r.sequence, SeverityName(r.severity), r.type))
        .Add("{}", r.message)
        .Add("reason={}", ReasonName(r.reason))
        .Add("{}", Braced(r.evidence));
  }
};

// The commands.
struct CommandText {
  std::string operator()(const RegisteredCommand& c) const {
    Line line("registered");
    line.Add("lease={}", DurationText(c.lease));
    for (const JobId& job : c.known_jobs) line.Add("job={}", job);
    return line;
  }
  std::string operator()(const WarmCommand& c) const { return "warm " + c.job; }
  std::string operator()(const PrepareCommand& c) const {
    return Line(fmt::format("prepare {} g={}", c.job, c.generation))
        .If(c.host_store, "host_store")
        .If(c.failed, "failed")
        .If(!c.park, "no_park")
        .If(!c.given_up.empty(), "given_up={}", CutsText(c.given_up));
  }
  std::string operator()(const ActivateCommand& c) const {
    Line line(fmt::format("activate {} g={}", c.plan->job, c.plan->generation));
    for (const NodePlan& n : c.plan->nodes) {
      if (n.node == c.node) {
        line.Add("ranks={}", Ranks(n));
        line.If(c.plan->restore_step != kNoStep, "restore={}", c.plan->restore_step);
        line.Add("{}", RestoreText(n));
        line.Add("{}", CutText(c.plan->cut));
      }
    }
    return line;
  }
  std::string operator()(const StopJobCommand& c) const {
    return Line(fmt::format("stop {} g={}", c.job, c.generation))
        .If(c.forget, "forget")
        .If(c.failed, "failed")
        .Add("reason={}", ReasonName(c.reason));
  }
  std::string operator()(const CommittedCommand& c) const {
    Line line(fmt::format("committed {} g={} step={}", c.job, c.generation, c.step));
    line.If(c.released != kNoStep, "released={}", c.released);
    return line;
  }
  std::string operator()(const PersistCommand& c) const {
    return fmt::format("persist {} g={} step={} ranks={}", c.job, c.generation, c.step,
                       fmt::join(c.ranks, ","));
  }
  std::string operator()(const RepairShardCommand& c) const {
    return fmt::format("repair {} {} from {}", c.job, ShardText(c.shard), c.source_node);
  }
  std::string operator()(const ToldAckCommand& c) const {
    return fmt::format("told_ack {} g={} rank={} up to {}", c.job, c.generation, c.rank,
                       c.sequence);
  }
  std::string operator()(const BuildShardCommand& c) const {
    std::string from;
    for (const CutShard& s : c.build.sources) {
      from += fmt::format("{}{}@{}", from.empty() ? "" : ",", s.rank,
                          s.holders.empty() ? NodeId("?") : s.holders.front().node);
    }
    return fmt::format("build {} g={} {} from {}", c.job, c.generation, ShardText(c.build.shard),
                       from);
  }
};

std::string Names(const std::set<NodeId>& nodes) {
  return fmt::format("{}", fmt::join(nodes, ","));
}

std::string Names(const std::map<NodeId, Timestamp>& nodes) {
  std::set<NodeId> names;
  for (const auto& [node, since] : nodes) names.insert(node);
  return Names(names);
}

}  // namespace

std::string DurationText(Duration d) {
  const std::int64_t ms = ToMilliseconds(d);
  if (ms == 0) return "0";
  if (ms % 1000 == 0) return fmt::format("{}s", ms / 1000);
  return ms < 1000 ? fmt::format("{}ms", ms) : fmt::format("{}s", static_cast<double>(ms) / 1000);
}

const char* SeverityName(Severity severity) {
  switch (severity) {
    case Severity::kInfo: return "info";
    case Severity::kWarning: return "warning";
    case Severity::kError: return "error";
  }
  return "unknown";
}

const char* ReplyCodeName(ReplyCode code) {
  switch (code) {
    case ReplyCode::kOk: return "ok";
    case ReplyCode::kNotFound: return "not_found";
    case ReplyCode::kAlreadyExists: return "already_exists";
    case ReplyCode::kFailedPrecondition: return "failed_precondition";
    case ReplyCode::kInvalid: return "invalid";
  }
  return "unknown";
}

const char* TableName(Deletion::Table table) {
  switch (table) {
    case Deletion::Table::kNode: return "node";
    case Deletion::Table::kJob: return "job";
    case Deletion::Table::kGeneration: return "generation";
    case Deletion::Table::kCommit: return "commit";
    case Deletion::Table::kJournal: return "journal";
    case Deletion::Table::kLedger: return "ledger";
    case Deletion::Table::kLayout: return "layout";
    case Deletion::Table::kTold: return "told";
  }
  return "unknown";
}

const char* StallKindName(StallKind kind) {
  switch (kind) {
    case StallKind::kStopped: return "stopped";
    case StallKind::kGroupNotFormed: return "group_not_formed";
  }
  return "unknown";
}

std::string ToText(const Event& event) {
  return std::visit(EventText{}, event);
}
std::string ToText(const Record& record) {
  return std::visit(RecordText{}, record);
}

std::string ToText(const Deletion& deletion) {
  if (deletion.table != Deletion::Table::kJournal) {
    return fmt::format("{} {}", TableName(deletion.table), deletion.key);
  }
  std::uint64_t sequence = 0;
  for (const char c : deletion.key) sequence = (sequence << 8) | static_cast<unsigned char>(c);
  return fmt::format("journal {}", sequence);
}

std::string ToText(const Command& command) {
  return fmt::format("{}.{} #{} {}", command.node, command.incarnation, command.sequence,
                     std::visit(CommandText{}, command.body));
}

std::string ToText(const Reply& reply) {
  return Line(fmt::format("{}: {}", ReplyCodeName(reply.code), reply.message))
      .If(!reply.hint.empty(), "({})", reply.hint);
}

std::vector<std::string> ToLines(const Decisions& decisions) {
  std::vector<std::string> lines;
  for (const Record& r : decisions.records) lines.push_back("put " + ToText(r));
  for (const Deletion& d : decisions.deletions) lines.push_back("delete " + ToText(d));
  for (const NodeId& n : decisions.close_sessions) lines.push_back("close " + n);
  for (const Command& c : decisions.commands) lines.push_back("send " + ToText(c));
  for (const Reply& r : decisions.replies) lines.push_back("reply " + ToText(r));
  return lines;
}

std::vector<std::string> ToLines(const ClusterState& state) {
  std::vector<std::string> lines;
  for (const auto& [id, node] : state.nodes) {
    lines.push_back(Line(fmt::format("node {} inc={}", id, node.record.incarnation))
                        .Add("{}", NodeHealthName(node.record.health))
                        .Add("reason={}", ReasonName(node.reason))
                        .If(!node.connected, "disconnected")
                        .If(node.record.draining, "draining")
                        .If(node.lease.count() > 0, "lease={}", DurationText(node.lease))
                        .Add("{}", Braced(node.evidence)));
  }
  for (const auto& [id, job] : state.jobs) {
    lines.push_back(
        Line(fmt::format("job {} {}", id, JobStateName(job.record.state)))
            .Add("g={}", job.record.generation)
            .If(job.plan.generation != 0, "{} {}", PhaseName(job.plan.phase), Members(job.plan))
            .Add("reason={}", ReasonName(job.reason))
            .If(job.step != kNoStep, "step={}", job.step)
            .If(!job.waiting_for.empty(), "waits_for={}", Names(job.waiting_for))
            .If(!job.newcomers.empty(), "newcomers={}", Names(job.newcomers))
            .If(!job.message.empty(), "\"{}\"", job.message));
  }
  return lines;
}

}  // namespace everstep::controller
