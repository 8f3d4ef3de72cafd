// Random lives of the controller: whatever nodes do, generations only grow, a plan is carried out
// only when every node it needs has stopped its old workers, the store rebuilds the state and holds
// one plan a job, every line of history has a known name and a reason, and once the faults stop the
// job runs or is over.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <iterator>

#include "controller/core/bugs.h"
#include "controller/core/controller.h"
#include "controller/core/vocabulary.h"

namespace everstep::controller {
namespace {

constexpr int kNodes = 4;

class Life {
 public:
  explicit Life(std::uint64_t seed, std::uint32_t bugs = 0)
      : state_(seed * 0x9E3779B97F4A7C15ull + 1), controller_(Options{.bugs = bugs}) {
    SubmitJob e{.request = 1};
    e.spec.job = "j";
    e.spec.min_nodes = 1 + static_cast<std::uint32_t>(Draw(2));
    e.spec.max_nodes = e.spec.min_nodes + static_cast<std::uint32_t>(Draw(2));
    e.spec.max_restarts = 1000;
    e.spec.max_no_progress = 0;  // no limit: the liveness phase must find the job alive
    e.spec.max_start_failures = 1000;
    Do(e);
  }

  void Fault() {
    const NodeId node = fmt::format("n{}", Draw(kNodes));
    now_ = now_ + Milliseconds(static_cast<std::int64_t>(Draw(300)));
    switch (Draw(12)) {
      case 0: Join(node, Draw(3) == 0); break;
      case 1: Do(SessionClosed{node, Inc(node), "reset"}); break;
      case 2: Do(NodeProcessDead{node, Inc(node) - Draw(2), "gone"}); break;
      case 3: Do(Tick{}); break;
      case 4: Exit(Draw(2) == 0 ? -9 : 1); break;
      case 5: Do(KeeperLost{node, Inc(node), ++keeper_, "gone"}); break;
      case 6: {
        const auto deadline = Milliseconds(static_cast<std::int64_t>(Draw(3) * 4000));
        Do(Notice{node, Inc(node), "spot", deadline});
        break;
      }
      case 7: Do(DrainNode{.request = 2, .node = node, .allow_pause = Draw(2) == 0}); break;
      case 8: Do(UndrainNode{.request = 3, .node = node}); break;
      case 9: Do(NodeWarm{node, Inc(node), "j", Draw(3) != 0, ""}); break;
      default: AnswerOne(); break;
    }
  }

  // Everything answers. True when the job runs with all it may have.
  bool Settle() {
    for (int n = 0; n < kNodes; ++n) Do(UndrainNode{.request = 4, .node = fmt::format("n{}", n)});
    for (int i = 0; i < 400; ++i) {
      now_ = now_ + Milliseconds(100);
      for (int n = 0; n < kNodes; ++n) {
        const NodeId node = fmt::format("n{}", n);
        const auto it = controller_.state().nodes.find(node);
        if (it == controller_.state().nodes.end() || !it->second.connected) Join(node, false);
        Do(Heartbeat{.node = node, .incarnation = Inc(node)});
      }
      AnswerOne();
      Do(Tick{});
      if (Job().record.state == JobState::kRunning &&
          Job().plan.nodes.size() == Job().record.spec.max_nodes) {
        return true;
      }
    }
    return false;
  }

  void CheckRecovery() {
    std::vector<Record> records;
    for (const auto& [key, record] : store_) records.push_back(record);
    Controller again{Options{}};
    Decisions out;
    again.Recover(now_, records, &out);
    const JobStateView& was = Job();
    const JobStateView& is = again.state().jobs.at("j");
    ASSERT_EQ(is.record.generation, was.record.generation);
    ASSERT_EQ(is.record.state, was.record.state);
    ASSERT_TRUE(is.plan == was.plan) << "the plan in the store is not the plan in memory";
    for (const auto& [id, node] : controller_.state().nodes) {
      ASSERT_EQ(again.state().nodes.at(id).record.incarnation, node.record.incarnation);
      ASSERT_EQ(again.state().nodes.at(id).record.draining, node.record.draining);
    }
  }

  const JobStateView& Job() const { return controller_.state().jobs.at("j"); }
  std::string broken;

 private:
  std::uint64_t Draw(std::uint64_t below) {  // SplitMix64 step
    state_ += 0x9E3779B97F4A7C15ull;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (z ^ (z >> 31)) % below;
  }
  Incarnation Inc(const NodeId& node) const {
    const auto it = controller_.state().nodes.find(node);
    return it == controller_.state().nodes.end() ? 0 : it->second.record.incarnation;
  }
  void Join(const NodeId& node, bool new_keeper) {
    if (new_keeper || keepers_.count(node) == 0) keepers_[node] = ++keeper_;
    NodeRegistered e{.node = node, .session = 1, .keeper_id = keepers_[node]};
    e.facts.address = "127.0.0.1";
    Do(e);
  }
  void AnswerOne() {
    const auto owed = Job().waiting_for;
    for (const NodeId& node : owed) {
      if (!controller_.state().nodes.at(node).connected) continue;
      const Generation g = Job().record.generation;
      if (Job().record.state == JobState::kPreparing) {
        Prepared e{.node = node, .incarnation = Inc(node), .store_port = 1};
        e.holds.job = "j";
        e.holds.generation = g;
        stopped_[g].insert(node);
        Do(e);
      } else if (Job().record.state == JobState::kActivating) {
        Activated e{.node = node, .incarnation = Inc(node), .job = "j", .generation = g};
        for (const NodePlan& n : Job().plan.nodes) {
          if (n.node == node) e.workers.push_back({n.workers[0].rank, 0, 1, true, {}});
        }
        Do(e);
      }
    }
  }
  void Exit(int code) {
    if (Job().plan.nodes.empty()) return;
    const NodePlan& n = Job().plan.nodes[Draw(Job().plan.nodes.size())];
    WorkerExited e{.node = n.node,
                   .incarnation = Inc(n.node),
                   .job = "j",
                   .generation = Job().record.generation - Draw(2),
                   .rank = n.group_rank};
    e.exit.code = code;
    Do(e);
  }
  void Do(const Event& event) {
    Decisions out;
    controller_.Step(now_, event, &out);
    for (const Record& record : out.records) {
      if (const auto* n = std::get_if<NodeRecord>(&record)) store_["n/" + n->node] = record;
      if (std::holds_alternative<JobRecord>(record)) store_["j"] = record;
      if (const auto* line = std::get_if<JournalRecord>(&record)) {
        if (!IsEventName(line->type)) broken = "no event is called " + line->type;
        if (line->reason == Reason::kNone) broken = "no reason for " + line->type;
      }
      if (const auto* g = std::get_if<GenerationRecord>(&record)) {
        store_[fmt::format("g/{:09}", g->plan.generation)] = record;
      }
    }
    for (const Deletion& deletion : out.deletions) {
      if (deletion.table != Deletion::Table::kGeneration) continue;
      store_.erase(fmt::format("g/{:09}", std::stoull(deletion.key.substr(2))));
    }
    const auto plans = std::distance(store_.lower_bound("g/"), store_.lower_bound("g0"));
    if (plans > 1) broken = fmt::format("{} plans of one job in the store", plans);
    if (std::holds_alternative<Tick>(event)) {
      const std::optional<Timestamp> next = controller_.NextWakeup();
      if (next && *next <= now_) broken = "a tick left something due: the controller would spin";
    }
    if (controller_.state().jobs.count("j") == 0) return;
    const JobStateView& job = Job();
    if (job.record.generation < newest_) broken = "the generation went back";
    newest_ = job.record.generation;
    for (const Command& c : out.commands) {
      const auto* activate = std::get_if<ActivateCommand>(&c.body);
      if (activate == nullptr) continue;
      for (const NodePlan& n : activate->plan->nodes) {
        if (stopped_[activate->plan->generation].count(n.node) == 0) {
          broken = fmt::format("generation {} was activated before {} had stopped",
                               activate->plan->generation, n.node);
        }
      }
    }
  }

  std::uint64_t state_;
  Controller controller_;
  Timestamp now_{1'000'000'000};
  std::map<std::string, Record> store_;
  std::map<NodeId, std::uint64_t> keepers_;
  std::uint64_t keeper_ = 0;
  std::map<Generation, std::set<NodeId>> stopped_;
  Generation newest_ = 0;
};

TEST(ControllerProperty, RandomLivesStaySafeAndEndAlive) {
  const char* only = std::getenv("EVERSTEP_SEED");  // NOLINT(concurrency-mt-unsafe): one thread
  const std::uint64_t first = only != nullptr ? std::strtoull(only, nullptr, 10) : 1;
  const std::uint64_t last = only != nullptr ? first : 1000;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    SCOPED_TRACE(
        fmt::format("replay: EVERSTEP_SEED={} tests/run.sh unit -R controller_property", seed));
    Life life(seed);
    for (int i = 0; i < 200; ++i) {
      life.Fault();
      ASSERT_EQ(life.broken, "");
      if (i % 20 == 0) {
        life.CheckRecovery();
        if (HasFatalFailure()) return;
      }
    }
    ASSERT_TRUE(life.Settle()) << "state " << JobStateName(life.Job().record.state)
                               << " generation " << life.Job().record.generation;
    ASSERT_EQ(life.broken, "");
  }
}

TEST(ControllerProperty, FindsADoubleActivation) {
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    Life life(seed, kBugDoubleActivation);
    for (int i = 0; i < 200 && life.broken.empty(); ++i) life.Fault();
    if (!life.broken.empty()) return;
  }
  FAIL() << "100 lives and the switched-on bug was not seen";
}

}  // namespace
}  // namespace everstep::controller
