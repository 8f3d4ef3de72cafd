// A local cluster's life with small real processes in place of the programs (cli_fake_part.cc): the
// supervisor restarts what dies, a drill holds it down, and taking down leaves nothing, whatever is
// left.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include <gtest/gtest.h>

#include "controller/cli/local_cluster.h"
#include "controller/cli/proc.h"
#include "controller/cli/registry.h"
#include "controller/cli/supervisor.h"

namespace everstep::cli {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

bool Await(const std::function<bool()>& condition, milliseconds limit = milliseconds(20'000)) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

class CliCluster : public ::testing::Test {
 protected:
  void SetUp() override {
    char dir[] = "/tmp/cli_cluster_XXXXXX";
    ASSERT_NE(::mkdtemp(dir), nullptr);
    root_ = dir;
    programs_ = root_ + "/bin";
    fs::create_directories(programs_);
    for (const char* name :
         {"everstep", "everstep-controller", "everstep-agent", "everstep-keeper"}) {
      fs::copy_file(std::string(EVERSTEP_BINARY_DIR) + "/tests/cli_fake_part",
                    programs_ + "/" + name);
    }
    plan_.name = "t";
    plan_.programs = programs_;
    plan_.listen = "127.0.0.1:0";
    plan_.nodes = {"n0", "n1"};
  }
  void TearDown() override {
    for (const ClusterInfo& cluster : registry().List()) {
      TakeDown(registry(), cluster, false, milliseconds(5'000));
    }
    fs::remove_all(root_);
  }

  Registry registry() const { return Registry({{"XDG_STATE_HOME", root_ + "/state"}}); }
  std::string dir() const { return root_ + "/c"; }
  std::string node(const std::string& name) const { return dir() + "/nodes/" + name; }

  std::vector<ProcessFacts> Find(const std::string& where, const std::string& program) const {
    std::vector<ProcessFacts> found;
    for (ProcessFacts& process : ProcessesOf(where)) {
      if (process.program == program) found.push_back(std::move(process));
    }
    return found;
  }
  ProcessId One(const std::string& where, const std::string& program) const {
    const std::vector<ProcessFacts> found = Find(where, program);
    return found.size() == 1 ? found[0].id : ProcessId{};
  }
  bool Complete() const {
    return One(dir() + "/controller", "everstep-controller").pid > 0 &&
           One(node("n0"), "everstep-keeper").pid > 0 &&
           One(node("n1"), "everstep-keeper").pid > 0 && One(node("n0"), "sleep").pid > 0 &&
           One(node("n1"), "sleep").pid > 0;
  }
  void Up() {
    const Outcome up = LayOut(registry(), plan_, dir());
    ASSERT_TRUE(up.ok()) << up.error().message;
    ASSERT_TRUE(Await([&] { return Complete(); })) << ReadSmallFile(dir() + "/supervisor.log");
    ASSERT_TRUE(WriteSmallFile(dir() + "/ready", "").ok());
  }
  ClusterInfo Info() const { return ReadCluster("t", dir()); }
  std::size_t Starts(const std::string& part) const {
    return ReadSmallFile(part + "/starts").size();
  }
  void ExpectNothingLeft(const TakenDown& down) {
    EXPECT_TRUE(down.survivors.empty());
    EXPECT_TRUE(ProcessesOf(dir()).empty());
    EXPECT_FALSE(fs::exists(dir()));
    EXPECT_FALSE(fs::exists(root_ + "/state/everstep"));
    EXPECT_TRUE(registry().List().empty());
  }

  std::string root_;
  std::string programs_;
  ClusterPlan plan_;
};

TEST_F(CliCluster, ComesUpInSessionsOfItsOwnAndGoesDownWithoutATrace) {
  Up();
  const ClusterInfo info = Info();
  EXPECT_TRUE(info.running);
  EXPECT_NE(::getsid(info.supervisor.pid), ::getsid(0)) << "it survives the shell";
  const pid_t agent = One(node("n0"), "everstep-agent").pid;
  EXPECT_EQ(::getpgid(agent), agent) << "a process group of its own";
  EXPECT_EQ(ReadSmallFile(node("n0") + "/controller"), info.controller + "\n");
  const TakenDown down = TakeDown(registry(), info, false, milliseconds(10'000));
  EXPECT_EQ(down.killed, 0u) << "it ends in order";
  ExpectNothingLeft(down);
}

TEST_F(CliCluster, ADeadControllerComesBackAtItsAddress) {
  Up();
  const std::string address = Info().controller;
  const ProcessId before = One(dir() + "/controller", "everstep-controller");
  ASSERT_TRUE(SendSignal(before, SIGKILL));
  ASSERT_TRUE(Await([&] { return Starts(dir() + "/controller") == 2; }));
  ASSERT_TRUE(Await([&] { return One(dir() + "/controller", "everstep-controller").pid > 0; }));
  EXPECT_EQ(Info().controller, address);
  EXPECT_EQ(Starts(node("n0")), 1u) << "nobody else was touched";
}

TEST_F(CliCluster, ADeadAgentComesBackAtOnceAndItsKeeperStays) {
  Up();
  const pid_t keeper = One(node("n0"), "everstep-keeper").pid;
  const auto began = std::chrono::steady_clock::now();
  ASSERT_TRUE(SendSignal(One(node("n0"), "everstep-agent"), SIGKILL));
  ASSERT_TRUE(Await([&] { return Starts(node("n0")) == 2; }));
  EXPECT_LT(std::chrono::steady_clock::now() - began, kNodeReturn);
  EXPECT_EQ(One(node("n0"), "everstep-keeper").pid, keeper);
}

TEST_F(CliCluster, ADeadNodeComesBackAfterAWhileOrWhenToldTo) {
  Up();
  const auto died = std::chrono::steady_clock::now();
  for (const char* program : {"everstep-agent", "everstep-keeper"}) {
    ASSERT_TRUE(SendSignal(One(node("n1"), program), SIGKILL));
  }
  ASSERT_TRUE(Await([&] { return ProcessesOf(node("n1")).empty(); })) << "its worker died with it";
  ASSERT_TRUE(Await([&] { return Starts(node("n1")) == 2; }));
  EXPECT_GT(std::chrono::steady_clock::now() - died, kNodeReturn - milliseconds(500));
  ASSERT_TRUE(Await([&] { return Complete(); }));
  for (const char* program : {"everstep-agent", "everstep-keeper"}) {
    ASSERT_TRUE(SendSignal(One(node("n1"), program), SIGKILL));
  }
  const auto again = std::chrono::steady_clock::now();
  // Until the supervisor has seen it die, the signal is early: it is sent until it works.
  ASSERT_TRUE(Await([&] {
    SendSignal(Info().supervisor, SIGHUP);
    return Starts(node("n1")) == 3;
  }));
  EXPECT_LT(std::chrono::steady_clock::now() - again, kNodeReturn);
}

TEST_F(CliCluster, WhatIsHeldDownStaysDownUntilItsTime) {
  Up();
  ASSERT_TRUE(WriteHold(dir() + "/controller", {.ever = true}).ok());
  ASSERT_TRUE(WriteHold(node("n0"), {.until_ms = WallMilliseconds() + 700}).ok());
  const auto began = std::chrono::steady_clock::now();
  ASSERT_TRUE(SendSignal(One(dir() + "/controller", "everstep-controller"), SIGKILL));
  ASSERT_TRUE(SendSignal(One(node("n0"), "everstep-agent"), SIGKILL));
  ASSERT_TRUE(Await([&] { return Starts(node("n0")) == 2; }));
  EXPECT_GE(std::chrono::steady_clock::now() - began, milliseconds(600));
  EXPECT_EQ(Starts(dir() + "/controller"), 1u);
  EXPECT_TRUE(ReadHold(dir() + "/controller")->ever);
  RemoveHold(dir() + "/controller");
  EXPECT_TRUE(Await([&] { return Starts(dir() + "/controller") == 2; }));
}

TEST_F(CliCluster, AStaleOneIsTakenDownToo) {
  Up();
  const ClusterInfo info = Info();
  ASSERT_TRUE(SendSignal(info.supervisor, SIGKILL));
  ASSERT_TRUE(WaitGone({info.supervisor}, milliseconds(5'000)));
  EXPECT_FALSE(Info().running);
  EXPECT_GE(ProcessesOf(dir()).size(), 7u) << "the cluster itself lives";
  const Outcome again = LayOut(registry(), plan_, root_ + "/other");
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().message, "a stale cluster is named \"t\": its supervisor is gone");
  ExpectNothingLeft(TakeDown(registry(), Info(), false, milliseconds(5'000)));
}

TEST_F(CliCluster, StoppedProcessesDoNotHoldItUp) {
  Up();
  for (const ProcessFacts& process : ProcessesOf(dir())) SendSignal(process.id, SIGSTOP);
  ExpectNothingLeft(TakeDown(registry(), Info(), false, milliseconds(10'000)));
}

TEST_F(CliCluster, AControllerThatCannotStartIsReportedWithItsLastWords) {
  std::ofstream(root_ + "/broken") << "";
  ASSERT_TRUE(LayOut(registry(), plan_, dir()).ok());
  ASSERT_TRUE(Await([&] { return fs::exists(dir() + "/failure"); }));
  EXPECT_EQ(ReadSmallFile(dir() + "/failure"),
            "everstep-controller exited with code 3: the store is broken\n");
  ASSERT_TRUE(Await([&] { return !Info().running; })) << "a supervisor without a cluster ends";
  ExpectNothingLeft(TakeDown(registry(), Info(), false, milliseconds(5'000)));
}

TEST_F(CliCluster, ForeignFilesAndOtherClustersAreLeftAlone) {
  Up();
  std::ofstream(dir() + "/mine") << "precious";
  // Another cluster whose directory begins with the same letters.
  ClusterPlan other = plan_;
  other.name = "t2";
  ASSERT_TRUE(LayOut(registry(), other, dir() + "2").ok());
  ASSERT_TRUE(Await([&] { return Find(dir() + "2", "everstep-keeper").size() == 2; }));
  const TakenDown down = TakeDown(registry(), Info(), false, milliseconds(5'000));
  EXPECT_TRUE(down.files_left);
  EXPECT_EQ(ReadSmallFile(dir() + "/mine"), "precious");
  EXPECT_EQ(Find(dir() + "2", "everstep-keeper").size(), 2u);
}

TEST_F(CliCluster, RefusesWhatCannotWorkAndLeavesNothing) {
  const Outcome long_path = LayOut(registry(), plan_, "/tmp/" + std::string(100, 'x'));
  ASSERT_FALSE(long_path.ok());
  EXPECT_NE(long_path.error().message.find("the limit is 107"), std::string::npos);
  EXPECT_NE(long_path.error().hint.find("--state-dir"), std::string::npos);
  fs::create_directories(dir() + "/something");
  const Outcome not_empty = LayOut(registry(), plan_, dir());
  ASSERT_FALSE(not_empty.ok());
  EXPECT_EQ(not_empty.error().exit, ExitCode::kConflict);
  std::ofstream(root_ + "/file") << "";
  EXPECT_FALSE(LayOut(registry(), plan_, root_ + "/file").ok());
  EXPECT_FALSE(LayOut(registry(), plan_, root_ + "/file/below").ok());
  plan_.programs = root_ + "/nowhere";
  EXPECT_FALSE(LayOut(registry(), plan_, root_ + "/c3").ok());
  EXPECT_TRUE(registry().List().empty());
  EXPECT_FALSE(fs::exists(root_ + "/state/everstep"));
}

TEST(CliProc, KnowsItselfAndNeverSignalsAReusedPid) {
  const ProcessId self = Identify(::getpid());
  EXPECT_TRUE(Alive(self));
  EXPECT_FALSE(Alive({self.pid, self.start_time + 1}));
  EXPECT_FALSE(SendSignal({self.pid, self.start_time + 1}, SIGKILL));
  EXPECT_FALSE(SendSignal({1, 0}, SIGKILL));
  EXPECT_EQ(Identify(0).pid, 0);
  EXPECT_TRUE(ProcessesOf("/nonexistent/directory").empty());
}

}  // namespace
}  // namespace everstep::cli
