// The nodes of a transcript's cluster: registrations, answers to commands, beats, workers, bytes.
#include "tests/datadriven/cluster.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <fmt/format.h>

#include "controller/core/text.h"

namespace everstep::datadriven {

using namespace everstep::controller;  // NOLINT: the vocabulary of every line below
using Words = everstep::datadriven::Command;

void Cluster::Register(const NodeId& id, Node* node) {
  node->inbox.clear();
  node->connected = true;
  NodeRegistered e{.node = id,
                   .session = 1,
                   .keeper_id = node->keeper,
                   .previous_incarnation = node->incarnation};
  e.facts.address = "10.0.0." + id.substr(1);
  e.facts.data_port = 4000;
  e.facts.slots = node->slots;
  e.facts.labels = node->labels;
  for (const auto& [job, holds] : node->jobs) e.jobs.push_back(holds);
  Do(e);
}

// A node that starts, or starts again with nothing.
void Cluster::Join(const Words& c) {
  for (const NodeId& id : c.words) {
    if (id == "quiet") continue;
    const Incarnation previous = nodes_.count(id) > 0 ? nodes_[id].incarnation : 0;
    Node node;
    node.keeper = next_keeper_++;
    node.slots = static_cast<std::uint32_t>(std::atoi(c.Get("slots", "0").c_str()));
    node.incarnation = c.Has("amnesiac") ? 0 : previous;
    for (const char* key : {"zone", "rack", "pool", "evict"}) {
      if (const std::string value = c.Get(key, ""); !value.empty()) node.labels[key] = value;
    }
    nodes_[id] = std::move(node);
    if (id != "amnesiac") Register(id, &nodes_[id]);
  }
}

// An agent that registers again: its keeper, workers and memory are what they were.
void Cluster::Rejoin(const Words& c) {
  for (const NodeId& id : c.words) {
    if (id == "quiet") continue;
    Node* node = FindNode(id);
    if (node == nullptr) return Print("error: no node " + id);
    Register(id, node);
  }
}

void Cluster::Settle(const Words& c) {
  std::vector<NodeId> who;
  for (const auto& [id, node] : nodes_) {
    if (c.words.empty() || c.words == std::vector<std::string>{"quiet"} || c.Has(id)) {
      who.push_back(id);
    }
  }
  for (bool more = true; std::exchange(more, false);) {
    for (const NodeId& id : who) {
      Node& node = nodes_[id];
      if (!node.connected || node.inbox.empty()) continue;
      const controller::Command order = std::move(node.inbox.front());
      node.inbox.pop_front();
      Answer(id, order);
      more = true;
    }
  }
}

JobOnNode Cluster::Prepare(Node* node, const JobId& job, Generation generation) {
  JobOnNode& holds = node->jobs[job];
  holds.job = job;
  holds.generation = std::max(holds.generation, generation);
  holds.activated = false;
  holds.workers.clear();
  JobOnNode answer = holds;
  answer.generation = generation;
  return answer;
}

std::vector<WorkerOnNode> Cluster::Fork(const NodeId& id, Node* node, const JobId& job,
                                        Generation generation) {
  JobOnNode& holds = node->jobs[job];
  holds.job = job;
  holds.generation = generation;
  holds.activated = true;
  holds.workers.clear();
  const JobStateView* view = FindJob(job);
  for (const NodePlan& member : view->plan.nodes) {
    if (member.node != id) continue;
    for (const WorkerPlan& w : member.workers) {
      // A process of its own in each generation, but for one that was parked.
      const auto fresh = static_cast<std::int32_t>(1000 * (generation - 1)) + 100 + w.rank;
      const auto parked = node->parked[job].find(w.local_rank);
      const std::int32_t pid = parked == node->parked[job].end() ? fresh : parked->second;
      holds.workers.push_back({w.rank, w.local_rank, pid, true, {}});
    }
  }
  node->parked.erase(job);
  return holds.workers;
}

void Cluster::Answer(const NodeId& id, const controller::Command& order) {
  Node& node = nodes_[id];
  const Incarnation incarnation = node.incarnation;
  if (const auto* prepare = std::get_if<PrepareCommand>(&order.body)) {
    std::map<std::int32_t, std::int32_t>& parked = node.parked[prepare->job];
    if (!prepare->park) parked.clear();
    for (const WorkerOnNode& worker : node.jobs[prepare->job].workers) {
      if (prepare->park && worker.running && sessions_.contains(prepare->job)) {
        parked[worker.local_rank] = worker.pid;
      }
    }
    Do(controller::Prepared{.node = id,
                            .incarnation = incarnation,
                            .holds = Prepare(&node, prepare->job, prepare->generation),
                            .store_port = prepare->host_store ? 29500u : 0u},
       true);
  } else if (const auto* activate = std::get_if<ActivateCommand>(&order.body)) {
    const JobId& job = activate->plan->job;
    const Generation generation = activate->plan->generation;
    Do(controller::Activated{id, incarnation, job, generation, Fork(id, &node, job, generation),
                             false, ""},
       true);
  } else if (const auto* repair = std::get_if<RepairShardCommand>(&order.body)) {
    Hold(id, repair->job, repair->shard);
    Do(ShardCopied{id, incarnation, repair->job, repair->shard}, true);
  } else if (const auto* build = std::get_if<BuildShardCommand>(&order.body)) {
    HeldShard shard = build->build.shard;
    if (shard.crc_root == 0) shard.crc_root = 5000u + static_cast<std::uint32_t>(shard.rank);
    Hold(id, build->job, shard);
    Do(ShardCopied{id, incarnation, build->job, shard}, true);
  } else if (const auto* stop = std::get_if<StopJobCommand>(&order.body)) {
    const auto job = node.jobs.find(stop->job);
    if (job != node.jobs.end() && job->second.generation <= stop->generation) {
      job->second.workers.clear();
      job->second.activated = false;
      node.parked.erase(stop->job);
      if (stop->forget) node.jobs.erase(job);
    }
    Do(controller::Stopped{id, incarnation, stop->job, stop->generation}, true);
  }
}

namespace {

// The first order of type Order for the job leaves the inbox: it is being answered by hand.
template <typename Order>
void Take(std::deque<controller::Command>* inbox, const JobId& job, Generation generation) {
  const auto about = [&](const controller::Command& command) {
    const auto* order = std::get_if<Order>(&command.body);
    if (order == nullptr) return false;
    if constexpr (std::is_same_v<Order, ActivateCommand>) {
      return order->plan->job == job && order->plan->generation == generation;
    } else {
      return order->job == job && order->generation == generation;
    }
  };
  const auto found = std::find_if(inbox->begin(), inbox->end(), about);
  if (found != inbox->end()) inbox->erase(found);
}

}  // namespace

void Cluster::Prepared(const Words& c) {
  Node* node = FindNode(First(c));
  if (node == nullptr || c.words.size() < 2) return Print("error: prepared NODE JOB");
  const JobId& job = c.words[1];
  const Generation generation = GenerationOf(c, job);
  Take<PrepareCommand>(&node->inbox, job, generation);
  controller::Prepared e{.node = First(c), .incarnation = IncarnationOf(c, First(c))};
  e.holds = Prepare(node, job, generation);
  e.store_port = 29500;
  e.refused = !c.Get("refused").empty();
  e.message = c.Get("refused");
  Do(e);
}

void Cluster::Activated(const Words& c) {
  Node* node = FindNode(First(c));
  if (node == nullptr || c.words.size() < 2) return Print("error: activated NODE JOB");
  const JobId& job = c.words[1];
  const Generation generation = GenerationOf(c, job);
  Take<ActivateCommand>(&node->inbox, job, generation);
  controller::Activated e{.node = First(c), .incarnation = IncarnationOf(c, First(c))};
  e.job = job;
  e.generation = generation;
  e.failed = !c.Get("failed").empty();
  e.message = c.Get("failed");
  if (!e.failed) e.workers = Fork(First(c), node, job, generation);
  Do(e);
}

void Cluster::Stopped(const Words& c) {
  Node* node = FindNode(First(c));
  if (node == nullptr || c.words.size() < 2) return Print("error: stopped NODE JOB");
  const JobId& job = c.words[1];
  Take<StopJobCommand>(&node->inbox, job, GenerationOf(c, job));
  Do(controller::Stopped{First(c), IncarnationOf(c, First(c)), job, GenerationOf(c, job)});
}

void Cluster::Beat(const NodeId& id) {
  Node* node = FindNode(id);
  if (node == nullptr) return Print("error: no node " + id);
  Heartbeat e{.node = id, .incarnation = node->incarnation, .sent = now_};
  for (const auto& [job, holds] : node->jobs) {
    if (holds.workers.empty()) continue;
    e.jobs.push_back({.job = job,
                      .generation = holds.generation,
                      .step = kNoStep,
                      .running = static_cast<std::uint32_t>(holds.workers.size())});
  }
  Do(e);
}

void Cluster::StepReached(const Words& c) {
  const JobStateView* job = FindJob(First(c));
  if (job == nullptr || c.words.size() < 2) return Print("error: step JOB NUMBER");
  const everstep::Step step = std::atoll(c.words[1].c_str());
  for (const NodePlan& member : std::vector<NodePlan>(job->plan.nodes)) {
    Heartbeat e{.node = member.node, .incarnation = nodes_[member.node].incarnation, .sent = now_};
    e.jobs.push_back({First(c), GenerationOf(c, First(c)), step, 1});
    Do(e);
  }
}

void Cluster::Exit(const Words& c) {
  const JobId job = First(c);
  const Rank rank = std::atoi(c.Get("rank", "0").c_str());
  const NodeId node = c.Get("node", NodeOfRank(job, rank));
  WorkerExited e{.node = node,
                 .incarnation = IncarnationOf(c, node),
                 .job = job,
                 .generation = GenerationOf(c, job),
                 .rank = rank,
                 .pid = 100 + rank};
  e.exit.code = c.values.count("signal") > 0 ? -std::atoi(c.Get("signal").c_str())
                                             : std::atoi(c.Get("code", "0").c_str());
  e.exit.oom_killed = c.Has("oom");
  e.exit.by_everstep = c.Has("by_everstep");
  e.exit.refused = c.Get("refused");
  e.exit.ran = Milliseconds(1000);
  e.exit.occurred = now_;
  if (Node* n = FindNode(node); n != nullptr && n->jobs.count(job) > 0) {
    for (WorkerOnNode& worker : n->jobs[job].workers) {
      if (worker.rank == rank) {
        worker.running = false;
        worker.exit = e.exit;
      }
    }
  }
  if (c.Has("unheard")) return;  // the report died with its stream: the next registration tells
  Do(e);
}

void Cluster::Stall(const Words& c) {
  const JobId job = First(c);
  const Rank rank = std::atoi(c.Get("rank", "0").c_str());
  const NodeId node = c.Get("node", NodeOfRank(job, rank));
  const bool stopped = c.Get("kind", "stopped") == "stopped";
  Do(WorkerStalled{.node = node,
                   .incarnation = IncarnationOf(c, node),
                   .job = job,
                   .generation = GenerationOf(c, job),
                   .rank = rank,
                   .kind = stopped ? StallKind::kStopped : StallKind::kGroupNotFormed,
                   .evidence = stopped ? "state=T for_ms=3000" : "connecting for_ms=30000"});
}

void Cluster::Hold(const NodeId& id, const JobId& job, const HeldShard& shard) {
  std::vector<HeldShard>& held = nodes_[id].jobs[job].shards;
  std::erase_if(held, [&shard](const HeldShard& s) {
    return s.rank == shard.rank && (s.step + 2 <= shard.step || s.step == shard.step);
  });
  held.push_back(shard);
}

// Every rank captured a step; its slot and, unless `local`, its peer's copy are verified.
void Cluster::Captured(const Words& c) {
  const JobStateView* job = FindJob(First(c));
  if (job == nullptr) return Print("error: no such job");
  const std::vector<NodePlan> members = job->plan.nodes;
  std::int32_t world = 0;
  for (const NodePlan& member : members) world += static_cast<std::int32_t>(member.workers.size());
  for (const NodePlan& member : members) {
    for (const WorkerPlan& worker : member.workers) {
      HeldShard shard{.rank = worker.rank,
                      .world_size = world,
                      .generation = GenerationOf(c, First(c)),
                      .step = std::atoll(c.Get("step", "0").c_str()),
                      .crc_root = 1000u + static_cast<std::uint32_t>(worker.rank),
                      .bytes = 64,
                      .replicated_layout = c.Has("replicated"),
                      .share = c.Has("shares")};
      Hold(member.node, First(c), shard);
      Do(ShardCopied{member.node, nodes_[member.node].incarnation, First(c), shard}, true);
      shard.replica = true;
      for (const PeerPlan& peer : member.peers) {
        if (c.Has("local")) break;
        Hold(peer.node, First(c), shard);
        Do(ShardCopied{peer.node, nodes_[peer.node].incarnation, First(c), shard}, true);
      }
    }
  }
}

// What the controller foretells of `if-lost JOB NODE...`; nothing happens.
void Cluster::IfLost(const Words& c) {
  if (FindJob(First(c)) == nullptr) return Print("error: no such job");
  const std::vector<NodeId> lost(c.words.begin() + 1, c.words.end());
  const Forecast f = controller_->IfLost(now_, First(c), lost);
  Print(fmt::format("{} restore_step={}{}", JobStateName(f.state), f.plan.restore_step,
                    f.message.empty() ? "" : fmt::format(" \"{}\"", f.message)));
  for (const NodePlan& member : f.plan.nodes) {
    for (const WorkerPlan& w : member.workers) {
      std::string peers;
      for (const PeerPlan& peer : member.peers) {
        peers.append(peers.empty() ? "" : "+").append(peer.node);
      }
      Print(fmt::format("rank {} on {} copy_on={} {} {}", w.rank, member.node,
                        peers.empty() ? "-" : peers, w.restore.relay > 0 ? "by" : "from",
                        w.restore.step == kNoStep ? "-"
                        : w.restore.ranges        ? "all"
                                                  : w.restore.source_node));
    }
  }
}

void Cluster::Copied(const Words& c) {
  const NodeId node = First(c);
  if (c.words.size() < 2) return Print("error: copied NODE JOB");
  HeldShard shard{.rank = std::atoi(c.Get("rank", "0").c_str()),
                  .world_size = std::atoi(c.Get("world", "2").c_str()),
                  .generation = GenerationOf(c, c.words[1]),
                  .step = std::atoll(c.Get("step", "0").c_str()),
                  .crc_root = static_cast<std::uint32_t>(std::atoi(c.Get("crc", "1000").c_str())),
                  .bytes = 64,
                  .replica = c.Has("replica"),
                  .replicated_layout = c.Has("replicated"),
                  .share = c.Has("shares")};
  Hold(node, c.words[1], shard);
  Do(ShardCopied{node, IncarnationOf(c, node), c.words[1], shard});
}

// A copy on the node fails its checksum; it is repaired when the node answers its commands.
void Cluster::Damaged(const Words& c) {
  const NodeId node = First(c);
  if (c.words.size() < 2) return Print("error: damaged NODE JOB");
  HeldShard shard{.rank = std::atoi(c.Get("rank", "0").c_str()),
                  .world_size = std::atoi(c.Get("world", "2").c_str()),
                  .generation = GenerationOf(c, c.words[1]),
                  .step = std::atoll(c.Get("step", "0").c_str()),
                  .bytes = 64,
                  .replica = c.Has("replica"),
                  .replicated_layout = c.Has("replicated"),
                  .share = c.Has("shares")};
  shard.crc_root = static_cast<std::uint32_t>(
      std::atoi(c.Get("crc", std::to_string(1000 + shard.rank)).c_str()));
  std::erase_if(nodes_[node].jobs[c.words[1]].shards, [&shard](const HeldShard& s) {
    return s.rank == shard.rank && s.step == shard.step && s.replica == shard.replica &&
           s.generation == shard.generation && !s.file;
  });
  Do(ShardDamaged{node, IncarnationOf(c, node), c.words[1], shard,
                  std::atoll(c.Get("chunk", "0").c_str()), c.Get("by", "scrub")});
}

// A worker says `words`, each up to a semicolon, the first one numbered `from`.
void Cluster::TellWords(const Words& c) {
  const NodeId node = First(c);
  if (c.words.size() < 2) return Print("error: told NODE JOB words=");
  const std::string kind = c.Get("kind", "ledger");
  Told e{.node = node, .incarnation = IncarnationOf(c, node), .job = c.words[1]};
  e.generation = GenerationOf(c, e.job);
  e.rank = std::atoi(c.Get("rank", "0").c_str());
  std::uint64_t sequence = std::strtoull(c.Get("from", "1").c_str(), nullptr, 10);
  const std::string text = c.Get("words");
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find("; ", begin), text.size());
    e.words.push_back({sequence++,
                       kind == "ledger"    ? ToldKind::kLedger
                       : kind == "profile" ? ToldKind::kProfile
                                           : ToldKind::kPlan,
                       text.substr(begin, end - begin)});
    begin = end + 2;
  }
  Do(e);
}

// What these nodes see in the job's checkpoint directory, besides what they saw before.
void Cluster::Files(const Words& c) {
  if (c.words.size() < 2) return Print("error: files JOB NODE...");
  const std::int32_t world = std::atoi(c.Get("world", "2").c_str());
  for (std::size_t i = 1; i < c.words.size(); ++i) {
    if (FindNode(c.words[i]) == nullptr) continue;
    for (Rank rank = 0; rank < world; ++rank) {
      nodes_[c.words[i]].jobs[First(c)].shards.push_back(
          {.rank = rank,
           .world_size = world,
           .generation = std::strtoull(c.Get("g", "1").c_str(), nullptr, 10),
           .step = std::atoll(c.Get("step", "0").c_str()),
           .crc_root = 1000u + static_cast<std::uint32_t>(rank),
           .bytes = 64,
           .replicated_layout = c.Has("replicated"),
           .file = true,
           .share = c.Has("shares")});
    }
  }
  Print("ok");
}

void Cluster::Written(const Words& c) {
  const NodeId node = First(c);
  if (c.words.size() < 2) return Print("error: persisted NODE JOB");
  Do(controller::Persisted{.node = node,
                           .incarnation = IncarnationOf(c, node),
                           .job = c.words[1],
                           .generation = GenerationOf(c, c.words[1]),
                           .step = std::atoll(c.Get("step", "0").c_str()),
                           .sealed = c.Has("sealed"),
                           .bytes = 64,
                           .took = Milliseconds(3),
                           .error = c.Get("error"),
                           .missing = c.Has("sealed") ? "" : "1 of 2 ranks' files are there"});
}

}  // namespace everstep::datadriven
