// The controller's brain against a cluster of nodes that answer (or do not): each rung of the
// recovery ladder and the races in it.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include "controller/core/bugs.h"
#include "controller/core/controller.h"

namespace everstep::controller {
namespace {

class ControllerTest : public ::testing::Test {
 protected:
  void SetUp() override { controller_ = std::make_unique<Controller>(options_); }

  Decisions Do(const Event& event) {
    Decisions out;
    controller_->Step(now_, event, &out);
    for (const Record& record : out.records) Store(record);
    return out;
  }
  void Store(const Record& record) {
    if (const auto* r = std::get_if<NodeRecord>(&record)) store_["node/" + r->node] = record;
    if (const auto* r = std::get_if<JobRecord>(&record)) store_["job/" + r->spec.job] = record;
    if (const auto* r = std::get_if<GenerationRecord>(&record)) {
      store_[fmt::format("generation/{}/{}", r->plan.job, r->plan.generation)] = record;
    }
    if (const auto* r = std::get_if<CommitRecord>(&record)) store_["commit/" + r->job] = record;
    if (const auto* r = std::get_if<JournalRecord>(&record)) {
      store_[fmt::format("journal/{:09}", r->sequence)] = record;
    }
  }
  Decisions Join(const NodeId& node, std::uint64_t keeper = 0, std::vector<JobOnNode> jobs = {}) {
    if (keeper == 0) keeper = std::hash<std::string>()(node);
    NodeRegistered e{.node = node, .session = 1, .keeper_id = keeper, .jobs = std::move(jobs)};
    e.facts.address = "10.0.0." + node.substr(1);
    e.facts.data_port = 4000;
    return Do(e);
  }
  Incarnation Inc(const NodeId& node) {
    return controller_->state().nodes.at(node).record.incarnation;
  }
  const JobStateView& Job() { return controller_->state().jobs.at("j"); }
  Generation G() { return Job().record.generation; }

  void Submit(std::uint32_t min, std::uint32_t max, int restarts = 0) {
    SubmitJob e{.request = 1, .data_key = "key"};
    e.spec.job = "j";
    e.spec.min_nodes = min;
    e.spec.max_nodes = max;
    e.spec.max_restarts = restarts;
    const Decisions out = Do(e);
    ASSERT_EQ(out.replies.size(), 1u);
    ASSERT_EQ(out.replies[0].code, ReplyCode::kOk) << out.replies[0].message;
  }
  Decisions Prepare(const NodeId& node, Generation g, std::vector<HeldShard> shards = {}) {
    Prepared e{.node = node, .incarnation = Inc(node), .store_port = 29500};
    e.holds.job = "j";
    e.holds.generation = g;
    e.holds.shards = std::move(shards);
    return Do(e);
  }
  Decisions Activate(const NodeId& node, Generation g) {
    Activated e{.node = node, .incarnation = Inc(node), .job = "j", .generation = g};
    for (const NodePlan& n : Job().plan.nodes) {
      if (n.node != node) continue;
      for (const WorkerPlan& w : n.workers)
        e.workers.push_back({w.rank, w.local_rank, 100 + w.rank, true, {}});
    }
    return Do(e);
  }
  void RunAll() {
    const auto waiting = Job().waiting_for;
    for (const NodeId& n : waiting) Prepare(n, G());
    ASSERT_EQ(Job().record.state, JobState::kActivating);
    const auto starting = Job().waiting_for;
    for (const NodeId& n : starting) Activate(n, G());
    ASSERT_EQ(Job().record.state, JobState::kRunning);
  }
  Decisions Exit(const NodeId& node, Rank rank, int code, Generation g) {
    WorkerExited e{.node = node,
                   .incarnation = Inc(node),
                   .job = "j",
                   .generation = g,
                   .rank = rank,
                   .pid = 100};
    e.exit.code = code;
    return Do(e);
  }
  Decisions Copied(const NodeId& node, Rank rank, Step step, std::uint32_t crc, bool replica) {
    ShardCopied e{.node = node, .incarnation = Inc(node), .job = "j"};
    e.shard = {.rank = rank,
               .world_size = 2,
               .generation = G(),
               .step = step,
               .crc_root = crc,
               .bytes = 8,
               .replica = replica};
    return Do(e);
  }
  void Beat(const NodeId& node, Step step = kNoStep) {
    Heartbeat e{.node = node, .incarnation = Inc(node)};
    e.jobs.push_back({"j", G(), step, 1});
    Do(e);
  }
  void Advance(Duration d) { now_ = now_ + d; }
  // Time in which every node that is not lost beats and every wake-up comes when it is due.
  void Pass(Duration d) {
    const Timestamp until = now_ + d;
    for (Timestamp beat = now_;; beat = beat + Milliseconds(250)) {
      for (auto due = controller_->NextWakeup(); due && *due <= std::min(beat, until);
           due = controller_->NextWakeup()) {
        now_ = std::max(now_, *due);
        Do(Tick{});
      }
      now_ = std::min(beat, until);
      for (const auto& [id, node] : controller_->state().nodes) {
        if (node.record.health != NodeHealth::kLost && node.connected) Beat(id);
      }
      if (beat >= until) return;
    }
  }
  Decisions Warm(const NodeId& node, bool warm = true) {
    return Do(NodeWarm{node, Inc(node), "j", warm, warm ? "" : "it ended while it started"});
  }
  std::vector<NodeId> Members() {
    std::vector<NodeId> names;
    for (const NodePlan& member : Job().plan.nodes) names.push_back(member.node);
    return names;
  }
  bool Warming(const NodeId& node) { return Job().newcomers.contains(node); }
  void Recover() {
    std::vector<Record> records;
    for (const auto& [key, record] : store_) records.push_back(record);
    controller_ = std::make_unique<Controller>(options_);
    Decisions out;
    controller_->Recover(now_, records, &out);
  }
  template <typename T>
  static int Count(const Decisions& out) {
    int n = 0;
    for (const Command& c : out.commands) n += std::holds_alternative<T>(c.body);
    return n;
  }

  Options options_;
  std::unique_ptr<Controller> controller_;
  Timestamp now_{1'000'000'000};
  std::map<std::string, Record> store_;
};

TEST_F(ControllerTest, JobRunsThroughBothPhasesAndSucceeds) {
  Join("n1");
  Join("n2");
  Submit(2, 2);
  EXPECT_EQ(Job().record.state, JobState::kPreparing);
  Prepare("n1", 1);
  EXPECT_EQ(Job().record.state, JobState::kPreparing) << "n2 has not stopped its workers yet";
  const Decisions out = Prepare("n2", 1);
  EXPECT_EQ(Count<ActivateCommand>(out), 2);
  EXPECT_EQ(Job().plan.master_addr, "10.0.0.1");
  EXPECT_EQ(Job().plan.master_port, 29500u);
  Activate("n1", 1);
  Activate("n2", 1);
  EXPECT_EQ(Job().record.state, JobState::kRunning);
  Exit("n1", 0, 0, 1);
  EXPECT_EQ(Job().record.state, JobState::kRunning);
  EXPECT_EQ(Count<StopJobCommand>(Exit("n2", 1, 0, 1)), 2);
  Do(Stopped{"n1", Inc("n1"), "j", 1});
  Do(Stopped{"n2", Inc("n2"), "j", 1});
  EXPECT_EQ(Job().record.state, JobState::kSucceeded);
  EXPECT_EQ(Job().record.exit_code, 0);
}

TEST_F(ControllerTest, TheBatchComesWithTheCommands) {
  Join("n1");
  Submit(1, 1);
  const Decisions out = Prepare("n1", 1);
  bool plan = false;
  for (const Record& r : out.records) {
    if (const auto* g = std::get_if<GenerationRecord>(&r)) plan = g->plan.phase == Phase::kActivate;
  }
  EXPECT_TRUE(plan) << "the plan is persisted in the batch before it is carried out";
  EXPECT_EQ(Count<ActivateCommand>(out), 1);
}

TEST_F(ControllerTest, KilledWorkerRestartsInPlaceWithoutChargingTheScript) {
  Join("n1");
  Submit(1, 1);
  RunAll();
  Beat("n1", 5);
  const Decisions out = Exit("n1", 0, -9, 1);
  EXPECT_EQ(Count<PrepareCommand>(out), 1);
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(Job().record.restarts, 0u);
  EXPECT_EQ(Job().record.lost_capacity, 1u);
  ASSERT_EQ(Job().record.faults.size(), 1u);
  EXPECT_EQ(Job().record.faults[0].reason, Reason::kWorkerKilled);
  EXPECT_EQ(Job().record.faults[0].action, "restart in place");
  RunAll();
  EXPECT_EQ(Job().record.faults[0].recovered.ns, 0)
      << "recovered at the next step, not at the fork";
  Beat("n1", 6);
  EXPECT_EQ(Job().record.faults[0].step_after, 6);
  EXPECT_EQ(Job().plan.restart_count, 1u);
}

TEST_F(ControllerTest, ScriptFailureSpendsTheBudgetThenEndsTheJob) {
  Join("n1");
  Submit(1, 1, /*restarts=*/1);
  RunAll();
  Exit("n1", 0, 3, 1);
  EXPECT_EQ(G(), 2u);
  RunAll();
  Exit("n1", 0, 3, 2);
  EXPECT_EQ(Job().record.state, JobState::kStopping);
  Do(Stopped{"n1", Inc("n1"), "j", 2});
  EXPECT_EQ(Job().record.state, JobState::kFailed);
  EXPECT_EQ(Job().record.end_reason, Reason::kCrashAtStart);
  EXPECT_EQ(Job().record.exit_code, 1);
  ASSERT_EQ(Job().record.failures.size(), 1u);
}

TEST_F(ControllerTest, NoProgressEndsWithItsOwnCode) {
  Join("n1");
  Submit(1, 1);
  for (Generation g = 1; g <= 5; ++g) {
    RunAll();
    Exit("n1", 0, -9, g);
  }
  EXPECT_EQ(Job().record.end_reason, Reason::kNoProgress);
  EXPECT_EQ(Job().record.exit_code, 93);
}

TEST_F(ControllerTest, SpareTakesTheLostNodesRank) {
  for (const char* n : {"n1", "n2", "n3"}) Join(n);
  Submit(2, 2);
  RunAll();
  const Decisions out = Do(NodeProcessDead{"n1", Inc("n1"), "keeper pid 7 is gone"});
  EXPECT_EQ(Count<PrepareCommand>(out), 2);
  ASSERT_EQ(Job().plan.nodes.size(), 2u);
  EXPECT_EQ(Job().plan.nodes[0].node, "n3");
  EXPECT_EQ(Job().plan.nodes[1].node, "n2");
  EXPECT_EQ(Job().record.faults[0].action, "a spare takes over");
}

TEST_F(ControllerTest, SilentNodeIsLostAfterItsLeaseAndTheJobShrinks) {
  Join("n1");
  Join("n2");
  Submit(1, 2);
  RunAll();
  Do(SessionClosed{"n2", Inc("n2"), "connection reset"});
  EXPECT_EQ(controller_->state().nodes.at("n2").record.health, NodeHealth::kSuspect);
  EXPECT_EQ(Job().record.state, JobState::kRunning);
  for (int i = 0; i < 6; ++i) {
    Advance(Milliseconds(250));
    Beat("n1", i);
    Do(Tick{});
  }
  EXPECT_EQ(controller_->state().nodes.at("n2").record.health, NodeHealth::kLost);
  EXPECT_EQ(Job().plan.nodes.size(), 1u);
  EXPECT_EQ(controller_->state().nodes.at("n1").record.health, NodeHealth::kAlive);
}

TEST_F(ControllerTest, BelowMinimumTheJobWaitsAndComesBack) {
  Join("n1");
  Join("n2");
  Submit(2, 2);
  RunAll();
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(Job().record.state, JobState::kWaiting);
  Join("n3");
  EXPECT_EQ(Job().record.state, JobState::kPreparing);
  RunAll();
}

TEST_F(ControllerTest, LossDuringPrepareSupersedesTheSwitch) {
  for (const char* n : {"n1", "n2", "n3"}) Join(n);
  Submit(1, 2);
  Prepare("n1", 1);
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(Job().record.state, JobState::kPreparing);
  EXPECT_EQ(Count<ActivateCommand>(Prepare("n1", 1)), 0) << "an answer to generation 1 is stale";
  RunAll();
}

TEST_F(ControllerTest, LossDuringActivateSupersedesTheSwitch) {
  for (const char* n : {"n1", "n2", "n3"}) Join(n);
  Submit(2, 2);
  Prepare("n1", 1);
  Prepare("n2", 1);
  Activate("n1", 1);
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(G(), 2u);
  RunAll();
  EXPECT_EQ(Job().plan.nodes[1].node, "n3");
}

TEST_F(ControllerTest, LateReportsOfAnOldGenerationOrIncarnationDie) {
  Join("n1");
  Submit(1, 1, 3);
  RunAll();
  Exit("n1", 0, 1, 1);
  const auto dropped = controller_->state().stale_dropped;
  Exit("n1", 0, 1, 1);
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(controller_->state().stale_dropped, dropped + 1);
  Do(Heartbeat{.node = "n1", .incarnation = Inc("n1") + 7});
  EXPECT_EQ(controller_->state().stale_dropped, dropped + 2);
}

TEST_F(ControllerTest, RestartedAgentIsAdoptedAndNothingRestarts) {
  Join("n1", 42);
  Submit(1, 1);
  RunAll();
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  JobOnNode holds{.job = "j", .generation = 1, .activated = true};
  holds.workers.push_back({0, 0, 100, true, {}});
  const Decisions out = Join("n1", 42, {holds});
  EXPECT_EQ(Count<PrepareCommand>(out) + Count<ActivateCommand>(out) + Count<StopJobCommand>(out),
            0);
  EXPECT_EQ(Job().record.state, JobState::kRunning);
  EXPECT_EQ(controller_->state().nodes.at("n1").reattached, 1u);
}

TEST_F(ControllerTest, ExitDuringTheAgentsAbsenceIsSeenAtReattach) {
  Join("n1", 42);
  Submit(1, 1);
  RunAll();
  JobOnNode holds{.job = "j", .generation = 1, .activated = true};
  WorkerOnNode dead{0, 0, 100, false, {}};
  dead.exit.code = -9;
  holds.workers.push_back(dead);
  Join("n1", 42, {holds});
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(Job().record.faults.at(0).reason, Reason::kWorkerKilled);
}

TEST_F(ControllerTest, NewKeeperIsANodeLost) {
  Join("n1", 42);
  Submit(1, 1);
  RunAll();
  Join("n1", 43);
  EXPECT_EQ(Job().record.faults.at(0).reason, Reason::kNodeReturned);
  EXPECT_EQ(G(), 2u);
  RunAll();
}

TEST_F(ControllerTest, CommitNeedsTwoEqualCopiesOfEveryRank) {
  Join("n1");
  Join("n2");
  Submit(2, 2);
  RunAll();
  Copied("n1", 0, 7, 1, false);
  Copied("n2", 0, 7, 1, true);
  Copied("n2", 1, 7, 2, false);
  EXPECT_TRUE(Job().commits.commits.empty());
  Copied("n1", 1, 7, 99, true);
  EXPECT_TRUE(Job().commits.commits.empty()) << "the copies of rank 1 differ";
  const Decisions out = Copied("n1", 1, 7, 2, true);
  EXPECT_EQ(Count<CommittedCommand>(out), 2);
  ASSERT_EQ(Job().commits.commits.size(), 1u);
  EXPECT_EQ(Job().commits.commits[0].step, 7);
}

TEST_F(ControllerTest, RestoreTakesTheNewestCompleteStepFromThePeer) {
  for (const char* n : {"n1", "n2", "n3"}) Join(n);
  Submit(2, 2);
  RunAll();
  for (const Step s : {7, 8}) {
    Copied("n1", 0, s, 1, false);
    Copied("n2", 1, s, 2, false);
  }
  Copied("n2", 0, 7, 1, true);
  Copied("n1", 1, 7, 2, true);
  Do(NodeProcessDead{"n1", Inc("n1"), "gone"});
  Prepare("n2", 2,
          {{.rank = 1, .world_size = 2, .generation = 1, .step = 8, .crc_root = 2, .bytes = 8},
           {.rank = 1, .world_size = 2, .generation = 1, .step = 7, .crc_root = 2, .bytes = 8},
           {.rank = 0,
            .world_size = 2,
            .generation = 1,
            .step = 7,
            .crc_root = 1,
            .bytes = 8,
            .replica = true}});
  Prepare("n3", 2);
  EXPECT_EQ(Job().plan.restore_step, 7) << "step 8 of rank 0 died with its node";
  EXPECT_EQ(Job().plan.nodes[0].node, "n3");
  EXPECT_EQ(Job().plan.nodes[0].workers[0].restore.source_node, "n2");
  EXPECT_EQ(Job().plan.nodes[0].workers[0].restore.source_address, "10.0.0.2:4000");
}

TEST_F(ControllerTest, RecoveryInEachPhaseContinues) {
  for (int phase = 0; phase < 3; ++phase) {
    SCOPED_TRACE(phase);
    store_.clear();
    controller_ = std::make_unique<Controller>(options_);
    Join("n1", 42);
    Submit(1, 1);
    JobOnNode holds{.job = "j", .generation = 1};
    if (phase >= 1) Prepare("n1", 1);
    if (phase >= 2) {
      Activate("n1", 1);
      holds.activated = true;
      holds.workers.push_back({0, 0, 100, true, {}});
    }
    std::vector<Record> records;
    for (const auto& [key, record] : store_) records.push_back(record);
    controller_ = std::make_unique<Controller>(options_);
    Decisions out;
    controller_->Recover(now_, records, &out);
    EXPECT_EQ(controller_->state().nodes.at("n1").record.health, NodeHealth::kSuspect);
    const Decisions join = Join("n1", 42, {holds});
    EXPECT_EQ(Count<PrepareCommand>(join), phase == 0 ? 1 : 0);
    EXPECT_EQ(Count<ActivateCommand>(join), phase == 1 ? 1 : 0);
    if (phase == 0) Prepare("n1", 1);
    if (phase <= 1) Activate("n1", 1);
    EXPECT_EQ(Job().record.state, JobState::kRunning);
    EXPECT_EQ(G(), 1u);
  }
}

TEST_F(ControllerTest, PhaseThatIsNeverAnsweredEndsAtItsDeadline) {
  Join("n1");
  Join("n2");
  Submit(1, 2);
  Prepare("n1", 1);
  for (int i = 0; i < 121; ++i) {  // n2 beats but never answers
    Advance(Milliseconds(250));
    Beat("n1");
    if (controller_->state().nodes.at("n2").record.health != NodeHealth::kLost) Beat("n2");
    Do(Tick{});
  }
  EXPECT_EQ(controller_->state().nodes.at("n2").record.health, NodeHealth::kLost);
  EXPECT_EQ(controller_->state().nodes.at("n2").reason, Reason::kPrepareTimeout);
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(Job().plan.nodes.size(), 1u);
}

TEST_F(ControllerTest, DrainMovesTheJobOrSaysWhyNot) {
  Join("n1");
  Join("n2");
  Submit(2, 2);
  RunAll();
  Decisions out = Do(DrainNode{.request = 9, .node = "n1", .reason = "disk"});
  ASSERT_EQ(out.replies.size(), 1u);
  EXPECT_EQ(out.replies[0].code, ReplyCode::kFailedPrecondition);
  EXPECT_EQ(G(), 1u);
  Join("n3");
  Warm("n3");
  out = Do(DrainNode{.request = 10, .node = "n1", .reason = "disk"});
  EXPECT_EQ(out.replies[0].code, ReplyCode::kOk);
  EXPECT_EQ(Job().plan.nodes[0].node, "n3");
  EXPECT_EQ(Job().waiting_for.count("n1"), 1u) << "the leaving node stops its workers first";
  RunAll();
}

TEST_F(ControllerTest, ElasticJobGrowsAfterTheDelay) {
  Join("n1");
  Submit(1, 2);
  Advance(Seconds(1));
  Beat("n1");
  Do(Tick{});
  RunAll();
  Join("n2");
  Warm("n2");
  EXPECT_EQ(G(), 1u);
  Advance(options_.grow_settle);
  Beat("n1");
  Beat("n2");
  Do(Tick{});
  EXPECT_EQ(G(), 2u);
  EXPECT_EQ(Job().plan.nodes.size(), 2u);
  RunAll();
}

// A job that runs does not stand while a newcomer imports PyTorch.
class ControllerNewcomers : public ControllerTest {
 protected:
  using Names = std::vector<NodeId>;
  void SetUp() override {
    ControllerTest::SetUp();
    Join("n1");
    Join("n2");
    Submit(2, 4);
    Pass(Seconds(1));
    RunAll();
    Warm("n1");
    Warm("n2");
    ASSERT_EQ(G(), 1u);
  }
};

TEST_F(ControllerNewcomers, OneThatImportsIsWaitedForWhileTheJobTrainsOn) {
  EXPECT_EQ(Count<WarmCommand>(Join("n3")), 1);
  EXPECT_TRUE(Warming("n3"));
  Pass(Seconds(6));
  EXPECT_EQ(G(), 1u);
  Warm("n3");
  Pass(Milliseconds(1));
  EXPECT_EQ(G(), 2u) << "at once: it came more than grow_delay ago";
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
  EXPECT_FALSE(Warming("n3"));
  EXPECT_EQ(Job().plan.reason, Reason::kNodeJoined);
}

TEST_F(ControllerNewcomers, OneThatIsNeverReadyIsTakenAsItIsAfterItsPatience) {
  Join("n3");
  Pass(options_.warm_patience - Milliseconds(1));
  EXPECT_EQ(G(), 1u);
  Pass(Milliseconds(1));
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
}

TEST_F(ControllerNewcomers, OneWithoutAForkServerIsTakenAtOnce) {
  Join("n3");
  Warm("n3", false);
  Pass(options_.grow_settle);
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
}

// Its ranks form their group, and one that is left in the middle of that is the harder to leave.
TEST_F(ControllerNewcomers, AGenerationThatJustBeganIsNotLeftForOneThatIsReady) {
  Join("n3");
  Warm("n3");
  Pass(options_.grow_delay + options_.grow_settle);
  ASSERT_EQ(G(), 2u);
  Join("n4");
  Warm("n4");  // ready while generation 2 is prepared
  Pass(options_.grow_delay);
  RunAll();
  Pass(options_.grow_settle - Milliseconds(1));
  EXPECT_EQ(G(), 2u);
  Pass(Milliseconds(1));
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3", "n4"}));
}

TEST_F(ControllerNewcomers, TwoThatImportAreOneSwitchAndALateOneIsTheNext) {
  Join("n3");
  Pass(Seconds(2));
  Join("n4");
  Pass(Seconds(4));
  Warm("n3");
  Pass(Seconds(1));
  EXPECT_EQ(G(), 1u) << "n4 is nearly there";
  Warm("n4");
  Pass(Milliseconds(1));
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3", "n4"}));
}

TEST_F(ControllerNewcomers, TheFirstWaitsForTheOthersNoLongerThanForItself) {
  Join("n3");
  Warm("n3");
  Pass(Milliseconds(400));
  Join("n4");
  Pass(options_.warm_patience - Milliseconds(400));
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
  RunAll();
  EXPECT_TRUE(Warming("n4"));
  Pass(options_.grow_settle);
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3", "n4"})) << "its patience ran on over the switch";
}

TEST_F(ControllerNewcomers, ALossUsesThoseThatAreReadyAndLeavesOutTheOthers) {
  Join("n3");
  Join("n4");
  Warm("n3");
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(Members(), (Names{"n1", "n3"}));
  RunAll();
  EXPECT_TRUE(Warming("n4"));
  Warm("n4");
  Pass(options_.grow_settle);
  EXPECT_EQ(Members(), (Names{"n1", "n3", "n4"}));
}

TEST_F(ControllerNewcomers, ALossTakesOneThatImportsRatherThanWaitForNodes) {
  Join("n3");
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(Members(), (Names{"n1", "n3"})) << "two are the minimum";
}

TEST_F(ControllerNewcomers, AJobThatWaitsForNodesStartsAtOnce) {
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  EXPECT_EQ(Job().record.state, JobState::kWaiting);
  Join("n3");
  Pass(options_.grow_delay);
  EXPECT_EQ(Members(), (Names{"n1", "n3"}));
}

TEST_F(ControllerNewcomers, OneThatDrainsOrDiesOrFallsSilentIsForgotten) {
  Join("n3");
  Do(DrainNode{.request = 1, .node = "n3", .reason = "disk"});
  EXPECT_FALSE(Warming("n3"));
  EXPECT_EQ(Job().record.state, JobState::kRunning);
  Do(UndrainNode{.request = 2, .node = "n3"});
  EXPECT_TRUE(Warming("n3"));
  Do(SessionClosed{"n3", Inc("n3"), "reset"});
  EXPECT_FALSE(Warming("n3"));
  Pass(options_.warm_patience);
  EXPECT_EQ(G(), 1u);
  Join("n3", 77);
  EXPECT_TRUE(Warming("n3"));
  Do(NodeProcessDead{"n3", Inc("n3"), "gone"});
  EXPECT_FALSE(Warming("n3"));
}

TEST_F(ControllerNewcomers, ANewKeeperOrAgentWarmsAnew) {
  Join("n3");
  Pass(options_.warm_patience - Seconds(1));
  Do(KeeperLost{"n3", Inc("n3"), 78, "killed"});
  Pass(Seconds(2));
  EXPECT_EQ(G(), 1u) << "its imports began anew";
  EXPECT_EQ(Count<WarmCommand>(Join("n3", 78)), 1) << "an agent that restarted is told again";
  Warm("n3");
  Pass(options_.grow_delay);
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
}

TEST_F(ControllerNewcomers, AControllerThatRestartsWaitsForThemAnew) {
  Join("n3");
  Pass(Seconds(3));
  Recover();
  for (const NodeId node : {"n1", "n2"}) {
    JobOnNode holds{.job = "j", .generation = 1, .activated = true, .workers = {}, .shards = {}};
    Join(node, 0, {holds});
    Warm(node);
  }
  EXPECT_EQ(Count<WarmCommand>(Join("n3")), 1);
  EXPECT_TRUE(Warming("n3"));
  Pass(Seconds(5));
  EXPECT_EQ(G(), 1u);
  Warm("n3");
  Pass(Milliseconds(1));
  EXPECT_EQ(Members(), (Names{"n1", "n2", "n3"}));
}

TEST_F(ControllerNewcomers, ANodeThatDrainsStaysUntilItsSuccessorIsReady) {
  Join("n3");
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  RunAll();  // n1, n3
  Join("n4");
  const Decisions out = Do(DrainNode{.request = 1, .node = "n1", .reason = "disk"});
  EXPECT_EQ(out.replies.at(0).code, ReplyCode::kOk);
  EXPECT_EQ(Job().record.state, JobState::kRunning) << "two are the minimum, and n4 imports";
  Pass(Seconds(3));
  Warm("n4");
  Pass(Milliseconds(1));
  EXPECT_EQ(Members(), (Names{"n4", "n3"}));
  EXPECT_EQ(Job().plan.reason, Reason::kNodeDrained);
}

TEST_F(ControllerNewcomers, ARefusalEndsTheJobOnceUnlessItIsANewcomers) {
  Beat("n1", 5);
  Join("n3");
  Warm("n3");
  Pass(options_.grow_settle);
  RunAll();
  WorkerExited e{.node = "n3", .incarnation = Inc("n3"), .job = "j", .generation = G(), .rank = 2};
  e.exit.code = 1;
  e.exit.refused = "Pipeline: seed is 0 on rank 0 and 1 on rank 2";
  Do(e);
  EXPECT_EQ(Members(), (Names{"n1", "n2"})) << "its two others trained before it came";
  EXPECT_EQ(Job().plan.reason, Reason::kInputRefused);
  RunAll();
  e.node = "n2";
  e.incarnation = Inc("n2");
  e.generation = G();
  e.rank = 1;
  Do(e);
  EXPECT_EQ(Job().record.state, JobState::kStopping);
  EXPECT_EQ(Job().record.end_reason, Reason::kInputRefused);
  EXPECT_NE(Job().record.end_message.find("seed is 0"), std::string::npos);
  EXPECT_EQ(Job().record.restarts, 0u);
}

TEST_F(ControllerNewcomers, NothingIsKnownOfAnEarlierJobsForkServers) {
  Do(CancelJob{.request = 1, .job = "j", .reason = "enough"});
  for (const NodeId node : {"n1", "n2"}) Do(Stopped{node, Inc(node), "j", G()});
  ASSERT_EQ(Job().record.state, JobState::kCancelled);
  SubmitJob again{.request = 2, .data_key = "key"};
  again.spec.job = "j";
  EXPECT_EQ(Count<WarmCommand>(Do(again)), 2);
  EXPECT_EQ(controller_->state().nodes.at("n1").warm.at("j"), Warmth::kAsked);
}

TEST_F(ControllerTest, StoppedControllerBlamesNobody) {
  Join("n1");
  Submit(1, 1);
  RunAll();
  Advance(Seconds(60));
  Do(Tick{});
  EXPECT_EQ(controller_->state().nodes.at("n1").record.health, NodeHealth::kAlive);
}

// Found by the simulator: such a node was told to stop the very generation it had prepared.
TEST_F(ControllerTest, ANodeThatComesBackWhileOthersPrepareIsAskedAgain) {
  Join("n1");
  Join("n2");
  Submit(2, 2);
  Prepare("n1", 1);
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  const Decisions out = Join("n1", 0, {{.job = "j", .generation = 1}});
  EXPECT_EQ(Count<StopJobCommand>(out), 0);
  EXPECT_EQ(Count<PrepareCommand>(out), 1);
  Prepare("n2", 1);
  EXPECT_EQ(Job().record.state, JobState::kPreparing) << "n1 may have lost its store";
  Prepare("n1", 1);
  EXPECT_EQ(Job().record.state, JobState::kActivating);
}

TEST_F(ControllerTest, WorkersMayParkOnNodesThatStayAndAllBeginAnewAfterTwoStartsThatFailed) {
  for (const char* node : {"n1", "n2", "n3"}) Join(node);
  Submit(2, 2);
  RunAll();
  Warm("n3");
  const auto parks = [](const Decisions& out) {
    std::map<NodeId, bool> found;
    for (const Command& c : out.commands) {
      if (const auto* p = std::get_if<PrepareCommand>(&c.body)) found[c.node] = p->park;
    }
    return found;
  };
  const std::map<NodeId, bool> moved = {{"n1", false}, {"n2", true}, {"n3", true}};
  EXPECT_EQ(parks(Do(DrainNode{.request = 2, .node = "n1", .reason = "disk"})), moved);
  for (const bool park : {true, false}) {
    for (const NodeId& n : std::set<NodeId>(Job().waiting_for)) Prepare(n, G());
    Activated failed{.node = "n3", .incarnation = Inc("n3"), .job = "j", .generation = G()};
    failed.failed = true;
    const std::map<NodeId, bool> again = {{"n2", park}, {"n3", park}};
    EXPECT_EQ(parks(Do(failed)), again);
  }
}

// Found by the simulator: a job waited for ever for a node that had refused once.
TEST_F(ControllerTest, ANodeThatRefusedIsAskedAgainLaterAndLater) {
  Join("n1");
  Submit(1, 1);
  Prepared no{.node = "n1", .incarnation = Inc("n1"), .refused = true, .message = "no port"};
  no.holds.job = "j";
  for (const int seconds : {10, 20, 40}) {
    no.holds.generation = G();
    Do(no);
    ASSERT_EQ(Job().record.state, JobState::kWaiting);
    for (int i = 0; i < 4 * seconds - 1; ++i) {
      Advance(Milliseconds(250));
      Beat("n1");
      Do(Tick{});
      ASSERT_EQ(Job().record.state, JobState::kWaiting) << i;
    }
    ASSERT_TRUE(controller_->NextWakeup());
    Advance(Milliseconds(250));
    Beat("n1");
    ASSERT_LE(*controller_->NextWakeup(), now_);
    Do(Tick{});
    ASSERT_EQ(Job().record.state, JobState::kPreparing);
  }
  RunAll();
}

TEST_F(ControllerTest, ANodeThatCameBackFromItsEndIsNotDrainedAnyMore) {
  Join("n1", 1);
  Submit(1, 1);
  RunAll();
  Do(Notice{.node = "n1", .incarnation = Inc("n1"), .source = "spot"});
  EXPECT_TRUE(controller_->state().nodes.at("n1").record.draining);
  Join("n1", 2);
  EXPECT_FALSE(controller_->state().nodes.at("n1").record.draining);
  Do(DrainNode{.request = 9, .node = "n1", .reason = "disk", .allow_pause = true});
  Join("n1", 3);
  EXPECT_TRUE(controller_->state().nodes.at("n1").record.draining) << "a person said so";
}

// The next three were found by the simulator: a report or a command that died with its stream left
// a generation without commits for ever, since a trainer keeps what is not committed.
class ControllerCopies : public ControllerTest {
 protected:
  void Run() {
    Join("n1");
    Join("n2");
    Submit(2, 2);
    RunAll();
  }
  HeldShard Shard(Rank rank, Step step, bool replica) {
    return {.rank = rank,
            .world_size = 2,
            .generation = G(),
            .step = step,
            .crc_root = 7u + static_cast<std::uint32_t>(rank),
            .bytes = 8,
            .replica = replica};
  }
  JobOnNode Holds(Rank rank, Rank peer, Step step) {
    JobOnNode holds{.job = "j", .generation = G(), .activated = true};
    holds.workers.push_back({rank, 0, 100 + rank, true, {}});
    holds.shards = {Shard(rank, step, false), Shard(peer, step, true)};
    return holds;
  }
};

TEST_F(ControllerCopies, CopiesNamedByARegistrationCount) {
  Run();
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  Copied("n2", 1, 5, 8, false);
  Copied("n2", 0, 5, 7, true);
  EXPECT_TRUE(Job().commits.commits.empty());
  const Decisions out = Join("n1", 0, {Holds(0, 1, 5)});
  ASSERT_EQ(Job().commits.commits.size(), 1u);
  EXPECT_EQ(Job().commits.commits[0].step, 5);
  EXPECT_GE(Count<CommittedCommand>(out), 2);
}

TEST_F(ControllerCopies, ACommitIsToldAgainToANodeThatComesBack) {
  Run();
  for (const auto& [node, rank, replica] : std::vector<std::tuple<NodeId, Rank, bool>>{
           {"n1", 0, false}, {"n1", 1, true}, {"n2", 1, false}, {"n2", 0, true}}) {
    Copied(node, rank, 5, 7u + static_cast<std::uint32_t>(rank), replica);
  }
  ASSERT_EQ(Job().commits.commits.size(), 1u);
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  const Decisions out = Join("n1", 0, {Holds(0, 1, 5)});
  ASSERT_EQ(Count<CommittedCommand>(out), 1);
}

TEST_F(ControllerCopies, CopiesOfAJobThatJustEndedAreNotCommitted) {
  Run();
  Copied("n2", 1, 5, 8, false);
  Copied("n2", 0, 5, 7, true);
  Exit("n2", 1, 0, G());
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  JobOnNode holds = Holds(0, 1, 5);
  holds.workers[0].running = false;
  Join("n1", 0, {holds});
  EXPECT_EQ(Job().record.state, JobState::kStopping);
  EXPECT_TRUE(Job().commits.commits.empty()) << "the job is over: its bytes are forgotten";
}

const CommittedCommand* LastCommitted(const Decisions& out) {
  const CommittedCommand* last = nullptr;
  for (const Command& c : out.commands) {
    if (const auto* found = std::get_if<CommittedCommand>(&c.body)) last = found;
  }
  return last;
}

// A rank that skipped a step would make the others keep it for ever; a rank that overwrote one by
// itself would break a commit that is under way. So the controller says which steps are given up.
TEST_F(ControllerCopies, AStepThatARankWentPastIsReleasedAndNeverCommitted) {
  Run();
  EXPECT_EQ(LastCommitted(Copied("n1", 0, 5, 7, false)), nullptr);
  Copied("n2", 0, 5, 7, true);
  const Decisions out = Copied("n2", 1, 6, 8, false);
  EXPECT_EQ(Count<CommittedCommand>(out), 2);
  ASSERT_NE(LastCommitted(out), nullptr);
  EXPECT_EQ(LastCommitted(out)->step, kNoStep);
  EXPECT_EQ(LastCommitted(out)->released, 5);
  Copied("n2", 1, 5, 8, false);
  Copied("n1", 1, 5, 8, true);
  EXPECT_TRUE(Job().commits.commits.empty()) << "rank 1 may have overwritten it already";
  Copied("n1", 1, 6, 8, true);
  Copied("n1", 0, 6, 7, false);
  Copied("n2", 0, 6, 7, true);
  ASSERT_EQ(Job().commits.commits.size(), 1u);
  EXPECT_EQ(Job().commits.commits[0].step, 6);
}

TEST_F(ControllerCopies, AStepThatLacksCopiesForLongIsReleased) {
  Run();
  Copied("n1", 0, 5, 7, false);
  Heartbeat beat{.node = "n1", .incarnation = Inc("n1")};
  beat.jobs.push_back({"j", G(), 5, 1});
  Advance(options_.commit_patience - Milliseconds(1));
  EXPECT_EQ(LastCommitted(Do(beat)), nullptr);
  Advance(Milliseconds(1));
  const Decisions out = Do(beat);
  ASSERT_NE(LastCommitted(out), nullptr);
  EXPECT_EQ(LastCommitted(out)->released, 5);
}

// Found by the simulator: a generation began from a newer step than the committed one, which had
// fewer copies; captures pushed out the committed step here and the base's copies there.
TEST_F(ControllerCopies, WhatAGenerationStartsFromIsCommittedWhenItHasItsCopies) {
  Run();
  for (const auto& [node, rank, replica] : std::vector<std::tuple<NodeId, Rank, bool>>{
           {"n1", 0, false}, {"n1", 1, true}, {"n2", 1, false}, {"n2", 0, true}}) {
    Copied(node, rank, 5, 7u + static_cast<std::uint32_t>(rank), replica);
  }
  const Generation first = G();
  std::vector<HeldShard> on_n1 = {Shard(0, 6, false), Shard(0, 5, false), Shard(1, 5, true)};
  std::vector<HeldShard> on_n2 = {Shard(1, 6, false), Shard(1, 5, false), Shard(0, 5, true)};
  Exit("n1", 0, -9, G());
  Prepare("n1", G(), on_n1);
  const Decisions begun = Prepare("n2", G(), on_n2);
  EXPECT_EQ(Job().plan.restore_step, 6);
  ASSERT_NE(LastCommitted(begun), nullptr);
  EXPECT_EQ(LastCommitted(begun)->step, 5) << "every member hears what is committed";
  Activate("n1", G());
  Activate("n2", G());
  const auto replica_of = [&](const NodeId& node, Rank rank) {
    ShardCopied e{.node = node, .incarnation = Inc(node), .job = "j"};
    e.shard = Shard(rank, 6, true);
    e.shard.generation = first;
    return Do(e);
  };
  replica_of("n2", 0);
  EXPECT_EQ(Job().commits.commits[0].step, 5);
  const Decisions out = replica_of("n1", 1);
  EXPECT_EQ(Job().commits.commits[0].step, 6);
  EXPECT_EQ(Job().commits.commits[0].generation, first);
  ASSERT_NE(LastCommitted(out), nullptr);
  EXPECT_EQ(LastCommitted(out)->generation, first);
}

// Found by the simulator: a node outside the job was named as the source of a slot that it had no
// more, again and again.
TEST_F(ControllerCopies, ASourceOutsideTheGenerationIsAskedBeforeItIsNamed) {
  Run();
  const Generation first = G();
  HeldShard both = Shard(0, 5, false);
  both.replicated_layout = true;
  Exit("n1", 0, -9, G());
  Prepare("n1", G(), {both});
  Prepare("n2", G());
  Activate("n1", G());
  Activate("n2", G());
  Join("n3");
  Join("n4");
  Warm("n3");
  Do(DrainNode{.request = 2, .node = "n1", .reason = "disk"});
  Prepare("n1", G(), {both});  // it leaves, and holds the only copy
  Prepare("n2", G());
  Prepare("n3", G());
  Do(NodeProcessDead{"n2", Inc("n2"), "gone"});
  Prepare("n3", G());
  const Decisions asked = Prepare("n4", G());
  EXPECT_EQ(Job().record.state, JobState::kPreparing);
  ASSERT_EQ(asked.commands.size(), 1u);
  EXPECT_EQ(asked.commands[0].node, "n1");
  ASSERT_TRUE(std::holds_alternative<PrepareCommand>(asked.commands[0].body));
  Prepare("n1", G(), {both});
  EXPECT_EQ(Job().record.state, JobState::kActivating);
  EXPECT_EQ(Job().plan.restore_step, 5);
  EXPECT_EQ(Job().plan.nodes[0].workers[0].restore.source_node, "n1");
  EXPECT_EQ(Job().plan.nodes[0].workers[0].restore.shard_generation, first);
}

// Found by the simulator: a restarted controller started a generation from nothing while the node
// with the committed step was about to register.
TEST_F(ControllerCopies, AfterARestartTheCommittedStepIsWaitedFor) {
  Join("n1");
  Submit(1, 1);
  RunAll();
  Copied("n1", 0, 5, 7, false);
  ASSERT_EQ(Job().commits.commits.size(), 1u);
  JobOnNode memory{.job = "j", .generation = G(), .shards = {Shard(0, 5, false)}};
  memory.shards[0].world_size = 1;
  Join("n2");
  Warm("n2");
  Do(DrainNode{.request = 2, .node = "n1", .reason = "disk"});
  std::vector<Record> records;
  for (const auto& [key, record] : store_) records.push_back(record);
  controller_ = std::make_unique<Controller>(options_);
  Decisions out;
  controller_->Recover(now_, records, &out);
  ASSERT_EQ(Job().waiting_for, (std::set<NodeId>{"n2"})) << "n1 is no member any more";
  Join("n2");
  Prepare("n2", G());
  EXPECT_EQ(Job().record.state, JobState::kPreparing);
  Join("n1", 0, {memory});
  Prepare("n1", G(), memory.shards);
  EXPECT_EQ(Job().record.state, JobState::kActivating);
  EXPECT_EQ(Job().plan.restore_step, 5);
}

// Found by the simulator: a node that was away when a job was cancelled came back with its slots,
// and the next job of that name began where the cancelled one had been.
TEST_F(ControllerCopies, ARunStartsFromNothingOfACancelledRunUnderItsName) {
  Join("n1");
  Submit(1, 1);
  RunAll();
  JobOnNode memory{.job = "j", .generation = G(), .shards = {Shard(0, 5, false)}};
  memory.shards[0].world_size = 1;
  Do(NodeProcessDead{"n1", Inc("n1"), "gone"});
  Do(CancelJob{.request = 2, .job = "j", .reason = "enough"});
  ASSERT_EQ(Job().record.state, JobState::kCancelled);
  Submit(1, 1);
  Join("n1", 0, {memory});
  Prepare("n1", G(), memory.shards);
  ASSERT_EQ(Job().record.state, JobState::kActivating);
  EXPECT_EQ(Job().plan.restore_step, kNoStep);
}

// Found by the simulator: a node that came back after a job had failed was told to forget its
// slots, and the job handed in again began from nothing.
TEST_F(ControllerCopies, WhatAFailedJobLeftSurvivesARegistration) {
  Join("n1");
  Submit(1, 1);
  RunAll();
  JobOnNode memory{.job = "j", .generation = G(), .shards = {Shard(0, 5, false)}};
  memory.shards[0].world_size = 1;
  Do(ShardCopied{"n1", Inc("n1"), "j", memory.shards[0]});
  Exit("n1", 0, 1, G());
  Do(Stopped{"n1", Inc("n1"), "j", G()});
  ASSERT_EQ(Job().record.state, JobState::kFailed);
  Do(SessionClosed{"n1", Inc("n1"), "reset"});
  const Decisions out = Join("n1", 0, {memory});
  for (const Command& c : out.commands) {
    if (const auto* r = std::get_if<RegisteredCommand>(&c.body)) {
      EXPECT_EQ(r->known_jobs, std::vector<JobId>{"j"});
    }
    if (const auto* stop = std::get_if<StopJobCommand>(&c.body)) {
      EXPECT_FALSE(stop->forget);
    }
  }
  Submit(1, 1);
  Prepare("n1", G(), memory.shards);
  EXPECT_EQ(Job().plan.restore_step, 5);
}

TEST_F(ControllerTest, WhatIsLeftOfAJobWithoutItsRecordIsNoJob) {
  JobRecord stub;
  stub.spec.job = "j";
  stub.state = JobState::kCancelled;
  stub.generation = 3;
  stub.forgotten = true;
  GenerationPlan plan{.job = "k", .generation = 2};
  const std::vector<Record> records = {stub, GenerationRecord{plan},
                                       CommitRecord{.job = "j", .persisted_step = 9}};
  Decisions out;
  controller_->Recover(now_, records, &out);
  EXPECT_TRUE(controller_->state().jobs.empty());
  EXPECT_EQ(out.deletions.size(), 2u) << "they come back with each restart";
  Join("n1");  // nothing is started for nobody
  EXPECT_TRUE(controller_->state().jobs.empty());
}

}  // namespace
}  // namespace everstep::controller
