#include "tests/datadriven/cluster.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <fmt/format.h>

#include "controller/core/text.h"
#include "controller/core/vocabulary.h"

namespace everstep::datadriven {

using namespace everstep::controller;  // NOLINT: the vocabulary of every line below
using Words = everstep::datadriven::Command;

namespace {

// "1500ms", "2s", "0".
Duration ParseDuration(const std::string& text) {
  const std::int64_t number = std::strtoll(text.c_str(), nullptr, 10);
  return text.ends_with("ms") ? Milliseconds(number) : Seconds(number);
}

std::uint32_t ParseNumber(const std::string& text) {
  return static_cast<std::uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
}

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace

Cluster::Cluster() : controller_(std::make_unique<Controller>(options_)) {}

std::vector<std::string> Cluster::Run(const Words& c) {
  lines_.clear();
  quiet_ = c.Has("quiet");
  const NodeId node = First(c);
  using Verb = std::function<void(const Words&)>;
  const auto bound = [this](void (Cluster::*verb)(const Words&)) {
    return Verb([this, verb](const Words& words) { (this->*verb)(words); });
  };
  const std::map<std::string, Verb> verbs = {
      {"options", bound(&Cluster::SetOptions)},
      {"join", bound(&Cluster::Join)},
      {"rejoin", bound(&Cluster::Rejoin)},
      {"submit", bound(&Cluster::Submit)},
      {"settle", bound(&Cluster::Settle)},
      {"prepared", bound(&Cluster::Prepared)},
      {"activated", bound(&Cluster::Activated)},
      {"stopped", bound(&Cluster::Stopped)},
      {"exit", bound(&Cluster::Exit)},
      {"stall", bound(&Cluster::Stall)},
      {"step", bound(&Cluster::StepReached)},
      {"captured", bound(&Cluster::Captured)},
      {"copied", bound(&Cluster::Copied)},
      {"damaged", bound(&Cluster::Damaged)},
      {"rollback",
       [this, node](const Words& words) {
         Do(RollBack{1, node, std::atoll(words.Get("step", "-1").c_str())});
       }},
      {"anomaly",
       [this, node](const Words& words) {
         Do(ReportAnomaly{1, node, words.Get("why", "")});
       }},
      {"told", bound(&Cluster::TellWords)},
      {"files", bound(&Cluster::Files)},
      {"persisted", bound(&Cluster::Written)},
      {"save",
       [this, node](const Words&) {
         Do(SaveCheckpoint{1, node});
       }},
      {"advance", bound(&Cluster::Advance)},
      {"restart", bound(&Cluster::Restart)},
      {"snapshot", bound(&Cluster::Snapshot)},
      {"stand-still", bound(&Cluster::StandStill)},
      {"records", bound(&Cluster::PrintRecords)},
      {"faults", bound(&Cluster::PrintFaults)},
      {"journal", bound(&Cluster::PrintJournal)},
      {"if-lost", bound(&Cluster::IfLost)},
      {"state",
       [this](const Words&) {
         for (const std::string& line : ToLines(controller_->state())) Print(line);
       }},
      {"close",
       [this, node](const Words& words) {
         const Incarnation incarnation = IncarnationOf(words, node);
         if (Node* n = FindNode(node); n != nullptr && incarnation == n->incarnation) {
           n->connected = false;
           n->inbox.clear();
         }
         Do(SessionClosed{node, incarnation, words.Get("evidence", "connection reset")});
       }},
      {"dead",
       [this, node](const Words& words) {
         if (Node* n = FindNode(node); n != nullptr) {
           n->connected = false;
           n->inbox.clear();
         }
         Do(NodeProcessDead{node, IncarnationOf(words, node), "keeper pid 4711 is gone"});
       }},
      {"keeper-lost",
       [this, node](const Words& words) {
         Node& n = nodes_[node];
         n.keeper = next_keeper_++;
         n.jobs.clear();
         n.parked.clear();
         Do(KeeperLost{node, IncarnationOf(words, node), n.keeper, "keeper pid 4711 ended by 9"});
       }},
      {"warm",
       [this, node](const Words& words) {
         Do(NodeWarm{node, IncarnationOf(words, node), words.words.at(1), !words.Has("never"), ""});
       }},
      {"notice",
       [this, node](const Words& words) {
         Do(Notice{node, IncarnationOf(words, node), words.Get("source", "spot"),
                   ParseDuration(words.Get("deadline", "0"))});
       }},
      {"drain",
       [this, node](const Words& words) {
         Do(DrainNode{1, node, words.Get("reason", "maintenance"), words.Has("allow_pause")});
       }},
      {"undrain",
       [this, node](const Words&) {
         Do(UndrainNode{1, node});
       }},
      {"cancel",
       [this, node](const Words& words) {
         Do(CancelJob{1, node, words.Get("reason"), words.Has("forget")});
       }},
      {"beat",
       [this](const Words& words) {
         for (const NodeId& id : words.words) {
           if (id != "quiet") Beat(id);
         }
       }},
      {"tick", [this](const Words&) { Do(Tick{}); }},
  };
  const auto verb = verbs.find(c.name);
  if (verb == verbs.end()) return {fmt::format("error: no command '{}'", c.name)};
  verb->second(c);
  const std::uint64_t stale = controller_->state().stale_dropped;
  if (stale < stale_) stale_ = 0;  // a new controller
  if (stale != stale_) lines_.push_back(fmt::format("(stale: {} dropped)", stale - stale_));
  stale_ = stale;
  if (lines_.empty()) lines_.emplace_back(quiet_ ? "ok" : "(nothing)");
  return lines_;
}

void Cluster::Print(std::string line) {
  if (!quiet_ || line.starts_with("error")) lines_.push_back(std::move(line));
}

void Cluster::Do(const Event& event, bool announce) {
  Decisions decisions;
  controller_->Step(now_, event, &decisions);
  if (announce && !(decisions.empty() && std::holds_alternative<Tick>(event))) {
    const std::string text = ToText(event);
    Print(text == "tick" ? fmt::format("> at {}", DurationText(now_ - began_)) : "> " + text);
  }
  Apply(decisions);
}

void Cluster::Apply(const Decisions& decisions) {
  for (const std::string& line : ToLines(decisions)) Print(line);
  for (const Record& record : decisions.records) {
    const auto* line = std::get_if<JournalRecord>(&record);
    if (line == nullptr) continue;
    if (!IsEventName(line->type)) Print("error: no event is called " + line->type);
    if (line->reason == Reason::kNone) Print("error: without a reason: " + line->type);
  }
  const StoreStatus written = store_.Write(decisions.records, decisions.deletions);
  if (!written.ok()) Print("error: " + written.message);
  for (const controller::Command& command : decisions.commands) {
    Node* node = FindNode(command.node);
    if (node == nullptr) continue;
    if (std::holds_alternative<RegisteredCommand>(command.body)) {
      node->incarnation = command.incarnation;
    } else if (command.incarnation == node->incarnation) {
      node->inbox.push_back(command);
    } else {
      Print(fmt::format("error: sent to incarnation {} of {}, which is {}", command.incarnation,
                        command.node, node->incarnation));
    }
  }
}

Cluster::Node* Cluster::FindNode(const NodeId& id) {
  const auto found = nodes_.find(id);
  return found == nodes_.end() ? nullptr : &found->second;
}

const JobStateView* Cluster::FindJob(const JobId& id) {
  const auto found = controller_->state().jobs.find(id);
  return found == controller_->state().jobs.end() ? nullptr : &found->second;
}

Incarnation Cluster::IncarnationOf(const Words& c, const NodeId& id) {
  const Node* node = FindNode(id);
  const std::string given = c.Get("inc");
  return !given.empty() ? ParseNumber(given) : node != nullptr ? node->incarnation : 0;
}

Generation Cluster::GenerationOf(const Words& c, const JobId& id) {
  const JobStateView* job = FindJob(id);
  const std::string given = c.Get("g");
  return !given.empty() ? ParseNumber(given) : job != nullptr ? job->record.generation : 0;
}

NodeId Cluster::NodeOfRank(const JobId& id, Rank rank) {
  const JobStateView* job = FindJob(id);
  if (job == nullptr) return "";
  for (const NodePlan& node : job->plan.nodes) {
    for (const WorkerPlan& worker : node.workers) {
      if (worker.rank == rank) return node.node;
    }
  }
  return "";
}

NodeId Cluster::First(const Words& c) {
  return c.words.empty() || c.words[0] == "quiet" ? "" : c.words[0];
}

void Cluster::SetOptions(const Words& c) {
  for (const auto& [key, value] : c.values) {
    if (key == "journal_limit") options_.journal_limit = ParseNumber(value);
    if (key == "max_nodes") options_.max_nodes = ParseNumber(value);
    if (key == "max_jobs") options_.max_jobs = ParseNumber(value);
    if (key == "progress_age") options_.progress_age = ParseDuration(value);
    if (key == "prepare_timeout") options_.prepare_timeout = ParseDuration(value);
    if (key == "activate_timeout") options_.activate_timeout = ParseDuration(value);
    if (key == "failed_retention") options_.failed_retention = ParseDuration(value);
    if (key == "stop_timeout") options_.stop_timeout = ParseDuration(value);
    if (key == "warm_patience") options_.warm_patience = ParseDuration(value);
  }
  controller_ = std::make_unique<Controller>(options_);
}

void Cluster::Submit(const Words& c) {
  SubmitJob e{.request = 1, .data_key = "key"};
  JobSpec& spec = e.spec;
  spec.job = First(c);
  const std::string nodes = c.Get("nodes", "1");
  const std::size_t colon = nodes.find(':');
  spec.min_nodes = ParseNumber(nodes);
  spec.max_nodes =
      colon == std::string::npos ? spec.min_nodes : ParseNumber(nodes.substr(colon + 1));
  spec.nproc_per_node = ParseNumber(c.Get("nproc", "1"));
  spec.spares = ParseNumber(c.Get("spares", "0"));
  spec.max_restarts = std::atoi(c.Get("restarts", "3").c_str());
  spec.strict_restarts = c.Has("strict");
  if (c.Has("sessions")) sessions_.insert(spec.job);
  spec.last_call = ParseDuration(c.Get("last_call", "1s"));
  spec.join_timeout = ParseDuration(c.Get("join_timeout", "0"));
  spec.max_no_progress = ParseNumber(c.Get("max_no_progress", "5"));
  spec.max_start_failures = ParseNumber(c.Get("max_start_failures", "5"));
  spec.only_nodes = Split(c.Get("only"));
  spec.copies = ParseNumber(c.Get("copies", "0"));
  spec.parity_states = ParseNumber(c.Get("parity", "0"));
  spec.verify_after = ParseNumber(c.Get("verify_after", "0"));
  spec.ckpt_dir = c.Get("ckpt");
  spec.ckpt_every_steps = ParseNumber(c.Get("every_steps", "0"));
  spec.ckpt_every = ParseDuration(c.Get("every", "0"));
  spec.submitted = now_;
  Do(e);
}

void Cluster::Advance(const Words& c) {
  const Timestamp end = now_ + ParseDuration(First(c));
  std::vector<NodeId> beating = Split(c.Get("beat"));
  if (c.Get("beat") == "all") {
    beating.clear();
    for (const auto& [id, node] : nodes_) {
      if (node.connected) beating.push_back(id);
    }
  }
  Timestamp beat = now_ + options_.heartbeat_interval;
  for (int turns = 0; turns < 100000; ++turns) {
    const std::optional<Timestamp> wakeup = controller_->NextWakeup();
    Timestamp next = end;
    if (!beating.empty()) next = std::min(next, beat);
    if (wakeup) next = std::min(next, std::max(*wakeup, now_));
    now_ = next;
    if (!beating.empty() && now_ == beat) {
      for (const NodeId& id : beating) Beat(id);
      beat = beat + options_.heartbeat_interval;
    }
    if (wakeup && *wakeup <= now_) {
      Do(Tick{}, true);
    } else if (now_ >= end) {
      return;
    }
  }
  Print("error: the controller wakes itself for ever");
}

void Cluster::Snapshot(const Words&) {
  const StoreStatus loaded = store_.Load(&snapshot_);
  Print(loaded.ok() ? "ok" : "error: " + loaded.message);
}

// Nobody woke the controller for that long: its own process was stopped, messages wait.
void Cluster::StandStill(const Words& c) {
  now_ = now_ + ParseDuration(First(c));
  Do(Tick{});
}

void Cluster::Restart(const Words& c) {
  std::vector<Record> records;
  const StoreStatus loaded = store_.Load(&records);
  if (!loaded.ok()) Print("error: " + loaded.message);
  if (c.Has("from_snapshot")) {
    store_ = MemoryStore();
    records = snapshot_;
    if (!store_.Write(records, {}).ok()) Print("error: the store");
  }
  for (auto& [id, node] : nodes_) {
    node.connected = false;
    node.inbox.clear();
  }
  controller_ = std::make_unique<Controller>(options_);
  Decisions decisions;
  controller_->Recover(now_, records, &decisions);
  Apply(decisions);
}

void Cluster::PrintRecords(const Words& c) {
  std::vector<Record> records;
  const StoreStatus loaded = store_.Load(&records);
  if (!loaded.ok()) Print("error: " + loaded.message);
  for (const Record& record : records) {
    const std::string table = TableName(KeyOf(record).table);
    if (c.words.empty() ? table != "journal" : c.Has(table)) Print(ToText(record));
  }
}

void Cluster::PrintFaults(const Words& c) {
  const JobStateView* job = FindJob(First(c));
  if (job == nullptr) return Print("error: no such job");
  for (const Fault& f : job->record.faults) {
    Print(fmt::format("#{} {} {} {{{}}}: {}, g {} -> {}, step {} -> {}, {}", f.id,
                      ReasonName(f.reason), f.subject, f.evidence, f.action, f.generation_before,
                      f.generation_after, f.step_before, f.step_after,
                      f.recovered.ns == 0
                          ? "not recovered"
                          : "recovered after " + DurationText(f.recovered - f.detected)));
  }
}

void Cluster::PrintJournal(const Words& c) {
  const auto& journal = controller_->state().journal;
  const std::size_t wanted = std::min<std::size_t>(ParseNumber(First(c)), journal.size());
  for (auto it = journal.end() - static_cast<std::ptrdiff_t>(wanted); it != journal.end(); ++it) {
    Print(ToText(Record(*it)));
  }
}

}  // namespace everstep::datadriven
