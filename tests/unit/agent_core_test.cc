// The agent's core as stories: what a controller, a keeper and time do, and what the agent says.
#include "worker/agent/core/agent_core.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace everstep::agent {
namespace {

Timestamp At(std::int64_t ms) {
  return Timestamp{} + Milliseconds(ms);
}

class Node {
 public:
  AgentCore core{CoreOptions{}};
  std::int64_t now_ms = 0;
  Effects last;
  std::uint64_t sequence = 0;
  Incarnation incarnation = 0;

  void Do(const Event& e) {
    last.clear();
    core.Step(At(now_ms), e, &last);
  }
  template <typename T>
  const T* Find() const {
    for (const Effect& e : last) {
      if (const T* t = std::get_if<T>(&e)) return t;
    }
    return nullptr;
  }
  template <typename T>
  int Count() const {
    int n = 0;
    for (const Effect& e : last) n += std::holds_alternative<T>(e);
    return n;
  }
  Header Next() { return {incarnation, ++sequence}; }

  void Up(Incarnation i = 1, std::vector<JobId> known = {"j"}) {
    if (!core.registered()) Do(SessionOpened{});
    Answered(i, std::move(known));
  }
  void Answered(Incarnation i, std::vector<JobId> known = {"j"}) {
    incarnation = i;
    sequence = 0;
    Do(Registered{Next(), Milliseconds(250), Milliseconds(1500), std::move(known)});
  }
  void Attach() { Do(KeeperAttached{}); }
  void Boot() {
    Attach();
    Up();
  }
  // Generation 1 runs here and generation 2 is prepared: both workers park.
  void Parks() {
    Prepares(2, /*host=*/false, /*park=*/true);
    Do(WorkerParked{"j", 1, 0, 10});
    Do(WorkerParked{"j", 1, 1, 11});
  }
  void Prepares(Generation g, bool host = false, bool park = false, bool planned = false) {
    Do(Prepare{Next(), "j", g, {"cmd"}, host, Milliseconds(1000), "", {}, park, planned});
  }
  void Activates(Generation g, int workers = 2) {
    Activate a;
    a.header = Next();
    a.job = "j";
    a.generation = g;
    for (int r = 0; r < workers; ++r) a.plan.workers.push_back({r, r, {}});
    Do(a);
  }
  void Exits(Generation g, Rank r, std::int32_t pid, std::int32_t code) {
    WorkerExited e{"j", g, r, pid, {}};
    e.exit.code = code;
    Do(e);
  }
  // Generation g runs here with two workers, pids g*10 + rank.
  void Run(Generation g) {
    Prepares(g);
    Do(Surveyed{"j", g, {}});
    Activates(g);
    for (int r = 0; r < 2; ++r) Do(WorkerStarted{"j", g, r, r, static_cast<int>(g) * 10 + r});
  }
};

TEST(AgentCore, RegistersOnlyWhenBothStreamAndKeeperAreThere) {
  Node n;
  n.Do(SessionOpened{});
  EXPECT_EQ(n.Find<SendRegister>(), nullptr);
  n.Attach();
  ASSERT_NE(n.Find<SendRegister>(), nullptr);
  EXPECT_EQ(n.Find<SendRegister>()->previous, 0u);
}

TEST(AgentCore, BeatsAtThePaceTheControllerNamed) {
  Node n;
  n.Boot();
  ASSERT_NE(n.Find<SendHeartbeat>(), nullptr);
  EXPECT_EQ(n.Find<SendHeartbeat>()->sequence, 1u);
  ASSERT_TRUE(n.core.NextWakeup());
  EXPECT_EQ(*n.core.NextWakeup(), At(250));
  n.now_ms = 249;
  n.Do(Tick{});
  EXPECT_TRUE(n.last.empty());
  n.now_ms = 250;
  n.Do(Tick{});
  ASSERT_NE(n.Find<SendHeartbeat>(), nullptr);
  EXPECT_EQ(n.Find<SendHeartbeat>()->sequence, 2u);
  n.Do(SessionLost{"reset"});
  EXPECT_TRUE(n.Find<ControllerAway>()->away);
  EXPECT_FALSE(n.core.NextWakeup());
}

TEST(AgentCore, AControllerThatStopsAnsweringIsAwayThoughItsStreamIsOpen) {
  Node n;
  n.Boot();
  n.now_ms = 500;
  n.Do(Heard{n.Next()});
  EXPECT_TRUE(n.last.empty());
  n.now_ms = 1000;
  n.Do(Committed{n.Next(), "j", 1, 3, kNoStep});  // any word is an answer
  for (n.now_ms = 1250; n.now_ms < 2500; n.now_ms += 250) {
    n.Do(Tick{});
    EXPECT_EQ(n.Find<ControllerAway>(), nullptr) << n.now_ms;
  }
  n.now_ms = 2500;
  n.Do(Tick{});
  ASSERT_NE(n.Find<ControllerAway>(), nullptr);
  EXPECT_TRUE(n.Find<ControllerAway>()->away);
  EXPECT_NE(n.Find<SendHeartbeat>(), nullptr) << "the session stands";
  n.now_ms = 2750;
  n.Do(Tick{});
  EXPECT_EQ(n.Find<ControllerAway>(), nullptr) << "told once";
  n.now_ms = 5000;
  n.Do(Heard{n.Next()});
  ASSERT_NE(n.Find<ControllerAway>(), nullptr);
  EXPECT_FALSE(n.Find<ControllerAway>()->away);
  n.now_ms = 6500;
  n.Do(Tick{});
  ASSERT_NE(n.Find<ControllerAway>(), nullptr);
  EXPECT_TRUE(n.Find<ControllerAway>()->away);
}

TEST(AgentCore, AnAgentThatStoodStillReadsItsMailBeforeItJudges) {
  Node n;
  n.Boot();
  n.now_ms = 500;
  n.Do(Heard{n.Next()});
  n.now_ms = 9000;  // SIGSTOP, SIGCONT
  n.Do(Tick{});
  EXPECT_EQ(n.Find<ControllerAway>(), nullptr);
  n.now_ms = 9250;
  n.Do(Tick{});
  ASSERT_NE(n.Find<ControllerAway>(), nullptr) << "and nothing had come";
}

TEST(AgentCore, AControllerThatNeverAnswersBeatsIsNotJudgedByIt) {
  Node n;
  n.Boot();
  for (n.now_ms = 250; n.now_ms < 10000; n.now_ms += 250) {
    n.Do(Tick{});
    EXPECT_EQ(n.Find<ControllerAway>(), nullptr) << n.now_ms;
  }
}

TEST(AgentCore, PreparesActivatesAndReportsAnExit) {
  Node n;
  n.Boot();
  n.Prepares(1, /*host=*/true);
  EXPECT_EQ(n.Count<KillWorkers>(), 0);
  EXPECT_NE(n.Find<StartStore>(), nullptr);
  EXPECT_NE(n.Find<Survey>(), nullptr);
  HeldShard shard;
  shard.step = 7;
  n.Do(Surveyed{"j", 1, {shard}});
  EXPECT_EQ(n.Find<SendPrepared>(), nullptr) << "the store does not listen yet";
  n.Do(StoreReady{"j", 1, 4711});
  const SendPrepared* prepared = n.Find<SendPrepared>();
  ASSERT_NE(prepared, nullptr);
  EXPECT_FALSE(prepared->refused);
  EXPECT_EQ(prepared->store_port, 4711u);
  ASSERT_EQ(prepared->holds.shards.size(), 1u);
  EXPECT_EQ(prepared->holds.shards[0].step, 7);

  n.Activates(1);
  ASSERT_NE(n.Find<StartWorkers>(), nullptr);
  n.Do(WorkerStarted{"j", 1, 0, 0, 10});
  EXPECT_EQ(n.Find<SendActivated>(), nullptr);
  n.Do(WorkerStarted{"j", 1, 1, 1, 11});
  ASSERT_NE(n.Find<SendActivated>(), nullptr);
  EXPECT_FALSE(n.Find<SendActivated>()->failed);
  EXPECT_EQ(n.Find<SendActivated>()->workers.size(), 2u);

  n.Exits(1, 1, 11, -9);
  ASSERT_NE(n.Find<SendWorkerExited>(), nullptr);
  EXPECT_EQ(n.Find<SendWorkerExited>()->worker.exit.code, -9);
  n.Exits(1, 1, 11, -9);
  EXPECT_TRUE(n.last.empty()) << "one exit is told once";
}

TEST(AgentCore, NothingOfANewGenerationIsPreparedWhileAnOldWorkerLives) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2);
  ASSERT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_EQ(n.Find<KillWorkers>()->generation, 1u);
  EXPECT_EQ(n.Find<KillWorkers>()->grace, Milliseconds(1000));
  n.Exits(1, 0, 10, -15);
  EXPECT_TRUE(n.last.empty()) << "neither an exit report nor a survey: rank 1 lives";
  n.Exits(1, 1, 11, -9);
  ASSERT_NE(n.Find<Survey>(), nullptr);
  n.Do(Surveyed{"j", 2, {}});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_EQ(n.Find<SendPrepared>()->holds.generation, 2u);
}

TEST(AgentCore, AWorkerWhoseForkIsUnderWayIsAwaitedToo) {
  Node n;
  n.Boot();
  n.Prepares(1);
  n.Do(Surveyed{"j", 1, {}});
  n.Activates(1, 1);
  n.Prepares(2);
  EXPECT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_EQ(n.Find<Survey>(), nullptr);
  n.Do(WorkerStarted{"j", 1, 0, 0, 99});
  EXPECT_TRUE(n.last.empty());
  n.Exits(1, 0, 99, -15);
  EXPECT_NE(n.Find<Survey>(), nullptr);
}

TEST(AgentCore, PreparedMeansThatEachOldWorkerIsParkedOrDead) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2, /*host=*/false, /*park=*/true);
  ASSERT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_EQ(n.Find<KillWorkers>()->park, CoreOptions{}.park_limit);
  n.Do(WorkerParked{"j", 1, 0, 10});
  EXPECT_EQ(n.Find<Survey>(), nullptr) << "rank 1 lives";
  n.Do(WorkerParked{"j", 1, 1, 99});
  EXPECT_EQ(n.Find<Survey>(), nullptr) << "that is not the process which is awaited";
  n.Exits(1, 1, 11, -9);
  EXPECT_NE(n.Find<Survey>(), nullptr);
}

TEST(AgentCore, WhereNobodyIsLostWorkersMayEndTheirStepAndThoseThatLeaveEndAfterIt) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2, /*host=*/false, /*park=*/false, /*planned=*/true);
  ASSERT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_TRUE(n.Find<KillWorkers>()->planned);
  EXPECT_EQ(n.Find<KillWorkers>()->park, CoreOptions{}.boundary_limit);
  n.Do(WorkerParked{"j", 1, 0, 10});
  ASSERT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_EQ(n.Find<KillWorkers>()->park, Duration{});
  EXPECT_EQ(n.Find<KillWorkers>()->grace, Milliseconds(1000));
  n.Exits(1, 0, 10, -15);
  EXPECT_EQ(n.Find<Survey>(), nullptr) << "rank 1 lives";
  // Somebody is lost meanwhile: rank 1 has no time any more, and stays.
  n.Prepares(3, /*host=*/false, /*park=*/true);
  ASSERT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_FALSE(n.Find<KillWorkers>()->planned);
  EXPECT_EQ(n.Find<KillWorkers>()->park, CoreOptions{}.park_limit);
  n.Do(WorkerParked{"j", 1, 1, 11});
  EXPECT_EQ(n.Find<KillWorkers>(), nullptr);
  EXPECT_NE(n.Find<Survey>(), nullptr);
}

TEST(AgentCore, AParkedWorkerIsResumedByActivateUnderItsOldPid) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Parks();
  n.Do(Surveyed{"j", 2, {}});
  n.Activates(2);
  n.Do(WorkerStarted{"j", 2, 1, 1, 11});
  n.Do(WorkerStarted{"j", 2, 0, 0, 10});
  ASSERT_NE(n.Find<SendActivated>(), nullptr);
  EXPECT_TRUE(n.core.jobs().at("j").parked.empty());
  n.Exits(2, 1, 11, -9);
  EXPECT_NE(n.Find<SendWorkerExited>(), nullptr);
}

TEST(AgentCore, ASecondPrepareFindsTheParkedOnesParked) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2, /*host=*/false, /*park=*/true);
  n.Do(WorkerParked{"j", 1, 0, 10});
  n.Prepares(3, /*host=*/false, /*park=*/true);
  EXPECT_EQ(n.Find<Survey>(), nullptr) << "rank 1 lives";
  n.Do(WorkerParked{"j", 1, 0, 10});  // the keeper says it again
  n.Do(WorkerParked{"j", 1, 1, 11});
  ASSERT_NE(n.Find<Survey>(), nullptr);
  EXPECT_EQ(n.Find<Survey>()->generation, 3u);
}

// Found by the simulator: a stop waited for the end of a process that had ended under another rank.
TEST(AgentCore, AWorkerResumedByAGenerationThatIsOverIsParkedNoMore) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Parks();
  n.Do(Surveyed{"j", 2, {}});
  n.Activates(2);
  n.Prepares(3, /*host=*/false, /*park=*/true);
  n.Do(WorkerStarted{"j", 2, 0, 0, 10});
  n.Do(WorkerStarted{"j", 2, 1, 1, 11});
  n.Do(StopJob{n.Next(), "j", 3, false, Milliseconds(1000)});
  n.Exits(2, 0, 10, -15);
  EXPECT_EQ(n.Find<SendStopped>(), nullptr) << "rank 1 lives";
  n.Exits(2, 1, 11, -15);
  EXPECT_NE(n.Find<SendStopped>(), nullptr);
}

// Found by the simulator: the same, with the stop on its way while the keeper resumed.
TEST(AgentCore, AStopThatMeetsAResumeWaitsForTheProcessOnce) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Parks();
  n.Do(Surveyed{"j", 2, {}});
  n.Activates(2);
  n.Do(WorkerStarted{"j", 2, 0, 0, 10});
  n.Do(StopJob{n.Next(), "j", 2, false, Milliseconds(1000)});
  n.Do(WorkerStarted{"j", 2, 1, 1, 11});
  n.Exits(2, 0, 10, -15);
  EXPECT_EQ(n.Find<SendStopped>(), nullptr) << "rank 1 lives";
  n.Exits(2, 1, 11, -15);
  EXPECT_NE(n.Find<SendStopped>(), nullptr);
}

TEST(AgentCore, ANodeThatLeavesAndAJobThatStopsEndTheParkedOnesToo) {
  for (const bool leaves : {true, false}) {
    Node n;
    n.Boot();
    n.Run(1);
    n.Prepares(2, /*host=*/false, /*park=*/true);
    n.Do(WorkerParked{"j", 1, 0, 10});
    n.Do(WorkerParked{"j", 1, 1, 11});
    n.Do(Surveyed{"j", 2, {}});
    if (leaves) {
      n.Prepares(3);
    } else {
      n.Do(StopJob{n.Next(), "j", 2, false, Milliseconds(1000)});
    }
    ASSERT_NE(n.Find<KillWorkers>(), nullptr);
    EXPECT_EQ(n.Find<KillWorkers>()->park, Duration{});
    n.Exits(1, 0, 10, -15);
    EXPECT_EQ(n.Find<Survey>(), nullptr);
    EXPECT_EQ(n.Find<SendStopped>(), nullptr) << "rank 1 lives";
    n.Exits(1, 1, 11, -15);
    EXPECT_EQ(n.Find<Survey>() != nullptr, leaves);
    EXPECT_EQ(n.Find<SendStopped>() != nullptr, !leaves);
  }
}

TEST(AgentCore, AWorkerThatDiesParkedHoldsNothingUp) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2, /*host=*/false, /*park=*/true);
  n.Do(WorkerParked{"j", 1, 0, 10});
  n.Exits(1, 0, 10, -9);
  EXPECT_TRUE(n.last.empty());
  n.Do(WorkerParked{"j", 1, 1, 11});
  EXPECT_NE(n.Find<Survey>(), nullptr);
}

TEST(AgentCore, RefusesWhenAWorkerOutlivesSigkill) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2);
  n.now_ms = 11'000;
  n.Do(Tick{});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_TRUE(n.Find<SendPrepared>()->refused);
  EXPECT_NE(n.Find<SendPrepared>()->message.find("pid 10"), std::string::npos);
}

TEST(AgentCore, StaleCommandsDieAtTheDoor) {
  Node n;
  n.Boot();
  n.Run(3);
  n.Prepares(2);  // an older generation
  EXPECT_EQ(n.Count<Dropped>(), 1);
  EXPECT_EQ(n.Count<KillWorkers>(), 0);
  n.Activates(2);
  EXPECT_EQ(n.Count<Dropped>(), 1);
  Header old{n.incarnation + 1, 99};  // another registration
  n.Do(StopJob{old, "j", 3, true, {}});
  EXPECT_EQ(n.Count<Dropped>(), 1);
  EXPECT_EQ(n.Count<KillWorkers>(), 0);
  Header seen{n.incarnation, n.sequence};  // a number that was seen
  n.Do(StopJob{seen, "j", 3, true, {}});
  EXPECT_EQ(n.Count<Dropped>(), 1);
  EXPECT_EQ(n.Count<KillWorkers>(), 0);
}

TEST(AgentCore, AControllerWithOlderStateIsRefused) {
  Node n;
  n.Do(KeeperAttached{false, 5, {}});
  n.Do(SessionOpened{});
  EXPECT_EQ(n.Find<SendRegister>()->previous, 5u);
  n.Do(Registered{{5, 1}, Milliseconds(250), {}, {}});
  EXPECT_NE(n.Find<CloseSession>(), nullptr);
  EXPECT_FALSE(n.core.registered());
  n.Do(SessionLost{"closed"});
  n.Up(6);
  EXPECT_TRUE(n.core.registered());
}

TEST(AgentCore, AfterABrokenStreamTheRegistrationCarriesEverything) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(SessionLost{"reset"});
  n.Exits(1, 0, 10, 3);
  EXPECT_EQ(n.Find<SendWorkerExited>(), nullptr) << "nobody listens";
  n.Do(SessionOpened{});
  const SendRegister* r = n.Find<SendRegister>();
  ASSERT_NE(r, nullptr);
  EXPECT_EQ(r->previous, 1u);
  ASSERT_EQ(r->jobs.size(), 1u);
  EXPECT_TRUE(r->jobs[0].activated);
  ASSERT_EQ(r->jobs[0].workers.size(), 2u);
  EXPECT_FALSE(r->jobs[0].workers[0].running);
  EXPECT_EQ(r->jobs[0].workers[0].exit.code, 3);
  EXPECT_TRUE(r->jobs[0].workers[1].running);
}

// Found by the simulator, seed 68: the job waited for ever for an exit that nobody told.
TEST(AgentCore, WhatHappensWhileARegistrationIsAnsweredIsToldAfterIt) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(SessionLost{"reset"});
  n.Do(SessionOpened{});
  ASSERT_NE(n.Find<SendRegister>(), nullptr);
  n.Exits(1, 0, 10, 0);
  EXPECT_TRUE(n.last.empty()) << "nothing is said on a stream that is not registered";
  n.Answered(2);
  ASSERT_EQ(n.Count<SendWorkerExited>(), 1);
  EXPECT_EQ(n.Find<SendWorkerExited>()->worker.rank, 0);

  n.Do(SessionLost{"reset"});
  n.Do(SessionOpened{});
  n.Exits(1, 1, 11, 0);
  n.Do(SessionLost{"reset"});
  n.Do(SessionOpened{});
  ASSERT_NE(n.Find<SendRegister>(), nullptr);
  EXPECT_FALSE(n.Find<SendRegister>()->jobs[0].workers[1].running);
  n.Answered(3);
  EXPECT_EQ(n.Count<SendWorkerExited>(), 0) << "the second registration said it";
}

TEST(AgentCore, AnAnswerThatABrokenStreamSwallowedIsGivenAgain) {
  Node n;
  n.Boot();
  n.Prepares(1);
  n.Do(SessionLost{"reset"});
  n.Do(Surveyed{"j", 1, {}});
  EXPECT_EQ(n.Find<SendPrepared>(), nullptr);
  n.Do(SessionOpened{});
  n.Up(2);
  ASSERT_NE(n.Find<Survey>(), nullptr);
  n.Do(Surveyed{"j", 1, {}});
  EXPECT_NE(n.Find<SendPrepared>(), nullptr);
}

TEST(AgentCore, RepeatedCommandsAreAnsweredNotObeyedTwice) {
  Node n;
  n.Boot();
  n.Prepares(1);
  n.Do(Surveyed{"j", 1, {}});
  n.Prepares(1);
  EXPECT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_EQ(n.Find<Survey>(), nullptr);
  n.Activates(1);
  n.Activates(1);
  EXPECT_TRUE(n.last.empty()) << "under way";
  n.Do(WorkerStarted{"j", 1, 0, 0, 10});
  n.Do(WorkerStarted{"j", 1, 1, 1, 11});
  n.Activates(1);
  EXPECT_EQ(n.Find<StartWorkers>(), nullptr);
  EXPECT_NE(n.Find<SendActivated>(), nullptr);
}

TEST(AgentCore, ActivateWithoutPrepareFails) {
  Node n;
  n.Boot();
  n.Activates(4);
  ASSERT_NE(n.Find<SendActivated>(), nullptr);
  EXPECT_TRUE(n.Find<SendActivated>()->failed);
  EXPECT_EQ(n.Find<StartWorkers>(), nullptr);
}

TEST(AgentCore, AFailedStartIsToldOnceAndTheNextPrepareClearsIt) {
  Node n;
  n.Boot();
  n.Prepares(1);
  n.Do(Surveyed{"j", 1, {}});
  n.Activates(1);
  n.Do(WorkerStarted{"j", 1, 0, 0, 10});
  n.Do(WorkerStartFailed{"j", 1, 1, "no such file"});
  ASSERT_NE(n.Find<SendActivated>(), nullptr);
  EXPECT_TRUE(n.Find<SendActivated>()->failed);
  EXPECT_NE(n.Find<SendActivated>()->message.find("no such file"), std::string::npos);
  n.Prepares(2);
  EXPECT_NE(n.Find<KillWorkers>(), nullptr);
  n.Exits(1, 0, 10, -15);
  n.Do(Surveyed{"j", 2, {}});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_FALSE(n.Find<SendPrepared>()->refused);
}

// Found by the simulator: the second worker that did not start was waited for by every later
// prepare.
TEST(AgentCore, TwoFailedStartsLeaveNobodyToWaitFor) {
  Node n;
  n.Boot();
  n.Prepares(1);
  n.Do(Surveyed{"j", 1, {}});
  n.Activates(1);
  n.Do(WorkerStartFailed{"j", 1, 1, "fork: no memory"});
  n.Do(WorkerStartFailed{"j", 1, 0, "fork: no memory"});
  n.Prepares(2);
  n.Do(Surveyed{"j", 2, {}});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_FALSE(n.Find<SendPrepared>()->refused);
}

TEST(AgentCore, AStoreThatCannotStartRefusesTheGeneration) {
  Node n;
  n.Boot();
  n.Prepares(1, true);
  n.Do(StoreFailed{"j", 1, "address in use"});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_TRUE(n.Find<SendPrepared>()->refused);
  n.Prepares(1, true);  // asked again: tries again
  EXPECT_NE(n.Find<StartStore>(), nullptr);
}

// Found by the simulator, seed 2604: a node that was drained and came back was told to stop, and
// then asked what it holds: it never answered.
TEST(AgentCore, ItAnswersAPrepareWhileItStopsTheSameGeneration) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2);
  n.Do(StopJob{n.Next(), "j", 2, false, Milliseconds(500)});
  n.Prepares(2);
  n.Exits(1, 0, 10, -9);
  n.Exits(1, 1, 11, -9);
  EXPECT_NE(n.Find<SendStopped>(), nullptr);
  EXPECT_NE(n.Find<Survey>(), nullptr);
  n.Do(Surveyed{"j", 2, {}});
  ASSERT_NE(n.Find<SendPrepared>(), nullptr);
  EXPECT_FALSE(n.Find<SendPrepared>()->refused);
}

TEST(AgentCore, StopsAndForgetsWhenTheLastProcessIsGone) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(StopJob{n.Next(), "j", 1, true, Milliseconds(500)});
  EXPECT_NE(n.Find<KillWorkers>(), nullptr);
  EXPECT_EQ(n.Find<SendStopped>(), nullptr);
  n.Exits(1, 0, 10, -15);
  EXPECT_TRUE(n.last.empty());
  n.Exits(1, 1, 11, -15);
  ASSERT_NE(n.Find<SendStopped>(), nullptr);
  EXPECT_NE(n.Find<ForgetJob>(), nullptr);
  EXPECT_TRUE(n.core.jobs().empty());
  n.Do(StopJob{n.Next(), "j", 1, true, {}});
  EXPECT_NE(n.Find<SendStopped>(), nullptr) << "asked again, answered again";
}

TEST(AgentCore, AStopOfAnOldGenerationLeavesTheNewOneAlone) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Prepares(2);
  n.Do(StopJob{n.Next(), "j", 1, false, {}});
  EXPECT_EQ(n.Find<SendStopped>(), nullptr);
  n.Exits(1, 0, 10, -9);
  n.Exits(1, 1, 11, -9);
  EXPECT_NE(n.Find<SendStopped>(), nullptr);
  n.Do(Surveyed{"j", 2, {}});
  EXPECT_NE(n.Find<SendPrepared>(), nullptr);
}

TEST(AgentCore, AJobTheControllerDoesNotKnowIsCleanedUp) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(SessionLost{"reset"});
  n.Do(SessionOpened{});
  n.Up(2, {});
  EXPECT_NE(n.Find<KillWorkers>(), nullptr);
  n.Exits(1, 0, 10, -15);
  n.Exits(1, 1, 11, -15);
  EXPECT_NE(n.Find<ForgetJob>(), nullptr);
}

TEST(AgentCore, ARestartedAgentAdoptsWhatItsKeeperHolds) {
  Node n;
  AdoptedJob job;
  job.holds.job = "j";
  job.holds.generation = 4;
  job.holds.activated = true;
  WorkerOnNode w;
  w.rank = 2;
  w.pid = 42;
  w.running = true;
  job.holds.workers = {w};
  n.Do(SessionOpened{});
  n.Do(KeeperAttached{false, 9, {job}});
  const SendRegister* r = n.Find<SendRegister>();
  ASSERT_NE(r, nullptr);
  EXPECT_EQ(r->previous, 9u);
  ASSERT_EQ(r->jobs.size(), 1u);
  EXPECT_TRUE(r->jobs[0].activated);
  EXPECT_EQ(r->jobs[0].workers[0].pid, 42);
  n.Up(10);
  EXPECT_EQ(n.Count<KillWorkers>(), 0);
  n.Exits(4, 2, 42, -11);
  EXPECT_NE(n.Find<SendWorkerExited>(), nullptr);
}

TEST(AgentCore, ALostKeeperIsToldWithItsSuccessor) {
  Node n;
  n.Boot();
  n.Do(Warm{n.Next(), "j", {"cmd"}});
  EXPECT_NE(n.Find<StartForkServer>(), nullptr);
  n.Run(1);
  n.Do(KeeperGone{"pid 5 ended by signal 9"});
  EXPECT_EQ(n.Find<SendKeeperLost>(), nullptr);
  n.Attach();
  ASSERT_NE(n.Find<SendKeeperLost>(), nullptr);
  EXPECT_EQ(n.Find<SendKeeperLost>()->message, "pid 5 ended by signal 9");
  EXPECT_NE(n.Find<StartForkServer>(), nullptr) << "warm again without being asked";
  n.Prepares(2);
  EXPECT_NE(n.Find<Survey>(), nullptr) << "no worker is left to wait for";
}

TEST(AgentCore, DrillsKillOnlyWhatRunsHere) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(KillForDrill{n.Next(), "j", 1, 9});
  ASSERT_NE(n.Find<KillRank>(), nullptr);
  EXPECT_EQ(n.Find<KillRank>()->generation, 1u);
  n.Do(KillForDrill{n.Next(), "j", 5, 9});
  EXPECT_EQ(n.Find<KillRank>(), nullptr);
  EXPECT_NE(n.Find<Dropped>(), nullptr);
}

TEST(AgentCore, TailNamesTheLocalWorkersAsked) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(TailLogs{n.Next(), 7, "j", -1, true, 10, false});
  ASSERT_NE(n.Find<Tail>(), nullptr);
  EXPECT_EQ(n.Find<Tail>()->workers.size(), 2u);
  n.Do(TailLogs{n.Next(), 8, "j", 5, true, 10, false});
  EXPECT_TRUE(n.Find<Tail>()->workers.empty());
}

TEST(AgentCore, ANoticeIsRepeatedToANewSessionWithTheTimeThatIsLeft) {
  Node n;
  n.Boot();
  n.Do(Notice{"sigterm", Seconds(30)});
  EXPECT_NE(n.Find<SendNotice>(), nullptr);
  n.Do(SessionLost{"reset"});
  n.Do(SessionOpened{});
  n.now_ms = 10'000;
  n.Up(2);
  ASSERT_NE(n.Find<SendNotice>(), nullptr);
  EXPECT_EQ(n.Find<SendNotice>()->notice.deadline, Seconds(20));
}

TEST(AgentCore, HeartbeatsCarryStepsOfTheCurrentGenerationOnly) {
  Node n;
  n.Boot();
  n.Run(1);
  n.Do(StepCaptured{"j", 1, 5});
  n.Do(StepCaptured{"j", 9, 50});
  n.now_ms = 250;
  n.Do(Tick{});
  const SendHeartbeat* beat = n.Find<SendHeartbeat>();
  ASSERT_NE(beat, nullptr);
  ASSERT_EQ(beat->jobs.size(), 1u);
  EXPECT_EQ(beat->jobs[0].step, 5);
  EXPECT_EQ(beat->jobs[0].running, 2u);
}

TEST(AgentCore, DamageIsToldAndARepairIsCarriedOut) {
  Node n;
  n.Boot();
  n.Run(1);
  const HeldShard shard{.rank = 1, .generation = 1, .step = 7, .crc_root = 9, .replica = true};
  n.Do(ShardDamaged{"j", shard, 3, "scrub"});
  ASSERT_NE(n.Find<SendShardDamaged>(), nullptr);
  EXPECT_EQ(n.Find<SendShardDamaged>()->damaged.chunk, 3);
  n.Do(RepairShard{n.Next(), "j", shard, "n2", "10.0.0.2:4000"});
  ASSERT_NE(n.Find<MendShard>(), nullptr);
  EXPECT_EQ(n.Find<MendShard>()->shard, shard);
  EXPECT_EQ(n.Find<MendShard>()->source_address, "10.0.0.2:4000");
  n.Do(RepairShard{n.Next(), "other", shard, "n2", "10.0.0.2:4000"});
  EXPECT_EQ(n.Find<MendShard>(), nullptr);
  EXPECT_NE(n.Find<Dropped>(), nullptr);
}

}  // namespace
}  // namespace everstep::agent
