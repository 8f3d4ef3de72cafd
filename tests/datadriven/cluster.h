// What the transcripts' commands act on: the production Controller, its store in memory, and nodes
// that answer only when a command tells them to. Virtual time, no thread, no I/O.
//
// Commands (docs in tests/datadriven/README.md); each prints the decisions it led to.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "controller/core/controller.h"
#include "controller/store/memory_store.h"
#include "tests/datadriven/transcript.h"

namespace everstep::datadriven {

class Cluster {
 public:
  Cluster();

  // One command; the lines it prints. An unknown or wrong one prints "error: ...".
  std::vector<std::string> Run(const Command& command);

 private:
  // A node's agent and keeper as the controller knows them: they do what a command says, no more.
  struct Node {
    std::uint64_t keeper = 0;
    Incarnation incarnation = 0;
    std::uint32_t slots = 0;
    std::map<std::string, std::string> labels;
    bool connected = false;
    std::map<JobId, JobOnNode> jobs;
    std::map<JobId, std::map<std::int32_t, std::int32_t>> parked;  // local rank -> process id
    std::deque<controller::Command> inbox;
  };

  // nodes
  void Join(const Command& c);
  void Rejoin(const Command& c);
  void Register(const NodeId& id, Node* node);
  void Settle(const Command& c);
  void Answer(const NodeId& id, const controller::Command& order);
  void Prepared(const Command& c);
  void Activated(const Command& c);
  void Stopped(const Command& c);
  JobOnNode Prepare(Node* node, const JobId& job, Generation generation);
  std::vector<WorkerOnNode> Fork(const NodeId& id, Node* node, const JobId& job,
                                 Generation generation);
  void Beat(const NodeId& id);
  // workers and bytes
  void Exit(const Command& c);
  void Stall(const Command& c);
  void StepReached(const Command& c);
  void Captured(const Command& c);
  void Copied(const Command& c);
  void Damaged(const Command& c);
  void TellWords(const Command& c);
  void Files(const Command& c);
  void Written(const Command& c);
  void Hold(const NodeId& id, const JobId& job, const HeldShard& shard);
  // people, time, the controller itself
  void Submit(const Command& c);
  void Advance(const Command& c);
  void StandStill(const Command& c);
  void Snapshot(const Command& c);
  void Restart(const Command& c);
  void SetOptions(const Command& c);
  void PrintRecords(const Command& c);
  void PrintFaults(const Command& c);
  void PrintJournal(const Command& c);
  void IfLost(const Command& c);

  void Do(const controller::Event& event, bool announce = false);
  void Apply(const controller::Decisions& decisions);
  void Print(std::string line);
  const controller::JobStateView* FindJob(const JobId& id);
  Node* FindNode(const NodeId& id);
  Incarnation IncarnationOf(const Command& c, const NodeId& id);
  Generation GenerationOf(const Command& c, const JobId& id);
  NodeId NodeOfRank(const JobId& id, Rank rank);
  static NodeId First(const Command& c);

  controller::Options options_;
  controller::MemoryStore store_;
  std::unique_ptr<controller::Controller> controller_;
  Timestamp now_{1'000'000'000'000};
  Timestamp began_ = now_;
  std::map<NodeId, Node> nodes_;
  std::uint64_t next_keeper_ = 1;
  std::uint64_t stale_ = 0;
  std::set<JobId> sessions_;  // jobs whose workers can park
  std::vector<controller::Record> snapshot_;
  std::vector<std::string> lines_;
  bool quiet_ = false;
};

}  // namespace everstep::datadriven
