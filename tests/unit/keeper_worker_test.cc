// A node's workers under a real keeper: start, end, kill, adoption by a new agent, no orphans.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "tests/unit/keeper_harness.h"
#include "worker/keeper/telling.h"

namespace everstep::keeper {
namespace {

using KeeperWorkers = KeeperTest;

TEST_F(KeeperWorkers, TellsTheExitCodeAndTheSignal) {
  Spawn(ShellSpawn(0, "echo out; echo err >&2; exit 3"));
  Spawn(ShellSpawn(1, "kill -ABRT $$"));
  Spawn(ShellSpawn(2, "exit 0"));
  const v1::KeeperExited exit = events_->WaitExit(0);
  EXPECT_EQ(exit.code(), 3);
  EXPECT_FALSE(exit.by_request());
  EXPECT_GT(exit.exit_ns(), 0);
  EXPECT_EQ(events_->WaitExit(1).code(), -SIGABRT);
  EXPECT_EQ(events_->WaitExit(2).code(), 0);
  EXPECT_GT(events_->WaitExit(2).pid(), 0);
  EXPECT_EQ(Slurp(folder_ + "/out0"), "out\n");
  EXPECT_EQ(Slurp(folder_ + "/err0"), "err\n");
}

TEST_F(KeeperWorkers, GivesAWorkerWhatAFreshProgramExpects) {
  auto request = ShellSpawn(
      0,
      "pwd; umask; ls /proc/self/fd | tr '\\n' ' '; grep -E 'Sig(Blk|Ign)' /proc/self/status; "
      "env | sort; readlink /proc/self/fd/0; ps -o sid= -p $$ | tr -d ' '; echo $$");
  request.mutable_spawn()->set_umask(027);
  (*request.mutable_spawn()->mutable_env())["LOCAL_RANK"] = "0";
  const pid_t pid = Spawn(request);
  EXPECT_EQ(events_->WaitExit(0).code(), 0) << Slurp(folder_ + "/err0");
  const std::string text = Slurp(folder_ + "/out0");
  EXPECT_NE(text.find(folder_ + "\n0027\n0 1 2 3 "), std::string::npos) << text;  // 3: ls itself
  EXPECT_NE(text.find("SigBlk:\t0000000000000000"), std::string::npos) << text;
  EXPECT_NE(text.find("SigIgn:\t0000000000000000"), std::string::npos) << text;
  EXPECT_NE(text.find("LOCAL_RANK=0\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("HOME="), std::string::npos)
      << "the keeper's own environment leaks: " << text;
  EXPECT_NE(text.find("/dev/null\n" + std::to_string(pid) + "\n" + std::to_string(pid) + "\n"),
            std::string::npos)
      << text;
}

TEST_F(KeeperWorkers, SaysWhyAWorkerCannotStart) {
  auto request = ShellSpawn(0, "true");
  request.mutable_spawn()->set_target("/no/such/program");
  Reply reply = client_->Call(request, Seconds(10));
  EXPECT_EQ(reply.message.error(), ECHILD);
  EXPECT_NE(reply.message.message().find("/no/such/program"), std::string::npos)
      << reply.message.message();
  request = ShellSpawn(0, "true");
  request.mutable_spawn()->set_cwd(folder_ + "/gone");
  reply = client_->Call(request, Seconds(10));
  EXPECT_NE(reply.message.message().find(folder_ + "/gone"), std::string::npos)
      << reply.message.message();
  // A failed start leaves the rank free.
  EXPECT_GT(Spawn(ShellSpawn(0, "true")), 0);
  EXPECT_EQ(client_->Call(ShellSpawn(0, "true"), Seconds(10)).message.error(), EEXIST);
}

TEST_F(KeeperWorkers, EndsTheObedientAtOnceAndTheDeafAfterTheGrace) {
  Spawn(ShellSpawn(0, "exec sleep 1000"));
  Spawn(ShellSpawn(1, "trap '' TERM; echo ready; while :; do sleep 0.1; done"));
  ASSERT_TRUE(Eventually([&] { return Slurp(folder_ + "/out1") == "ready\n"; }));
  const std::int64_t asked = MonotonicNanos();
  EXPECT_EQ(Kill(1, 500).error(), 0);
  const v1::KeeperExited obedient = events_->WaitExit(0);
  EXPECT_EQ(obedient.code(), -SIGTERM);
  EXPECT_TRUE(obedient.by_request());
  const v1::KeeperExited deaf = events_->WaitExit(1);
  EXPECT_EQ(deaf.code(), -SIGKILL);
  EXPECT_TRUE(deaf.by_request());
  EXPECT_FALSE(deaf.oom_killed());
  EXPECT_GE(MonotonicNanos() - asked, 490'000'000);
}

TEST_F(KeeperWorkers, KillsTheGroupAndWhatLeftIt) {
  Spawn(ShellSpawn(0, "sleep 1000 & echo $! >child; setsid sleep 1000 & echo $! >stranger; wait"));
  ASSERT_TRUE(Eventually(
      [&] { return !Slurp(folder_ + "/stranger").empty() && !Slurp(folder_ + "/child").empty(); }));
  const pid_t child = std::stoi(Slurp(folder_ + "/child"));
  const pid_t stranger = std::stoi(Slurp(folder_ + "/stranger"));
  ASSERT_TRUE(Alive(child));
  Kill(1, 0);
  EXPECT_TRUE(Eventually([&] { return !Alive(child) && !Alive(stranger); }));
}

TEST_F(KeeperWorkers, AFencedGenerationNeverStarts) {
  Kill(4, 0);
  const v1::KeeperReply late = client_->Call(ShellSpawn(0, "true", 4), Seconds(10)).message;
  EXPECT_EQ(late.error(), ESTALE);
  EXPECT_NE(late.message().find("up to 4"), std::string::npos) << late.message();
  EXPECT_GT(Spawn(ShellSpawn(0, "true", 5)), 0);
}

TEST_F(KeeperWorkers, ADrillIsNotItsOwnRequest) {
  Spawn(ShellSpawn(0, "exec sleep 1000"));
  EXPECT_EQ(Kill(1, 0, 0, SIGKILL).error(), 0);
  const v1::KeeperExited exit = events_->WaitExit(0);
  EXPECT_EQ(exit.code(), -SIGKILL);
  EXPECT_FALSE(exit.by_request());
  EXPECT_EQ(Kill(1, 0, 0, SIGKILL).error(), ESRCH);
}

TEST_F(KeeperWorkers, TellsAStoppedWorkerAndStillEndsIt) {
  const pid_t pid = Spawn(ShellSpawn(0, "exec sleep 1000"));
  ::kill(pid, SIGSTOP);
  const v1::KeeperStalled stalled =
      events_->Wait([](const v1::KeeperReply& r) { return r.has_stalled(); }).stalled();
  EXPECT_EQ(stalled.rank(), 0);
  EXPECT_EQ(stalled.kind(), 1u);
  EXPECT_NE(stalled.evidence().find("state T"), std::string::npos) << stalled.evidence();
  Kill(1, 5000);
  EXPECT_EQ(events_->WaitExit(0).code(), -SIGTERM);
}

// The first word may be lost: no agent is there, or it has no controller.
TEST_F(KeeperWorkers, TellsAStoppedWorkerAgainUntilItGoesOn) {
  const pid_t pid = Spawn(ShellSpawn(0, "exec sleep 1000"));
  client_.reset();
  ::kill(pid, SIGSTOP);
  ASSERT_TRUE(Eventually([&] {
    return Slurp(folder_ + "/keeper.log").find("worker_stopped") != std::string::npos;
  })) << Slurp(folder_ + "/keeper.log");
  client_ = Connect();
  ASSERT_NE(client_, nullptr) << error_.message;
  const v1::KeeperStalled stalled =
      events_->Wait([](const v1::KeeperReply& r) { return r.has_stalled(); }).stalled();
  EXPECT_EQ(stalled.rank(), 0);
  EXPECT_GE(stalled.stalled_ms(), 2000);
}

TEST(KeeperTelling, ComesAgainEverMoreSeldom) {
  Telling telling;
  EXPECT_TRUE(telling.Due(0));
  std::int64_t now = 0;
  for (const std::int64_t pause : {2, 4, 8, 16, 32, 60, 60}) {
    telling.Told(now);
    now += pause * 1'000'000'000;
    EXPECT_FALSE(telling.Due(now - 1));
    EXPECT_TRUE(telling.Due(now));
  }
  telling.Reset();
  EXPECT_TRUE(telling.Due(0));
}

TEST_F(KeeperWorkers, ANewAgentAdoptsWhatTheDeadOneLeft) {
  const pid_t pid = Spawn(ShellSpawn(0, "exec sleep 1000"));
  Spawn(ShellSpawn(1, "while [ ! -e go ]; do sleep 0.01; done; exit 7"));
  v1::KeeperRequest remember;
  remember.mutable_remember()->set_key("k");
  remember.mutable_remember()->set_value("v");
  ASSERT_EQ(client_->Call(remember, Seconds(5)).message.error(), 0);
  client_.reset();
  std::ofstream(folder_ + "/go") << "go";
  // It ends while nobody listens; the next agent finds it.
  ASSERT_TRUE(Eventually([&] {
    auto look = Connect(false);
    for (const auto& p : state_.processes()) {
      if (p.rank() == 1 && !p.running()) return true;
    }
    return false;
  }));
  client_ = Connect();
  ASSERT_NE(client_, nullptr) << error_.message;
  ASSERT_EQ(state_.processes_size(), 2);
  EXPECT_EQ(state_.processes(0).pid(), pid);
  EXPECT_TRUE(state_.processes(0).running());
  EXPECT_EQ(state_.processes(1).exit().code(), 7);
  EXPECT_EQ(state_.memory().at("k"), "v");
  EXPECT_EQ(state_.node(), "n0");
  ::kill(pid, SIGKILL);
  EXPECT_EQ(events_->WaitExit(0).code(), -SIGKILL);
}

TEST_F(KeeperWorkers, NothingOutlivesAKilledKeeper) {
  const pid_t direct = Spawn(
      ShellSpawn(0, "sleep 1000 & echo $! >child; setsid setsid sleep 1000 & echo $! >far; wait"));
  ASSERT_TRUE(Eventually(
      [&] { return !Slurp(folder_ + "/far").empty() && !Slurp(folder_ + "/child").empty(); }));
  const pid_t child = std::stoi(Slurp(folder_ + "/child"));
  const pid_t far = std::stoi(Slurp(folder_ + "/far"));
  ASSERT_EQ(::kill(keeper_pid_, SIGKILL), 0);
  EXPECT_TRUE(Eventually([&] { return !Alive(direct) && !Alive(child) && !Alive(far); }));
  EXPECT_TRUE(Eventually([&] { return !Lost().empty(); }));
  EXPECT_EQ(client_->Call(ShellSpawn(1, "true"), Seconds(5)).message.error(), ENOTCONN);
  // Its place can be taken at once.
  client_.reset();
  std::string error;
  EXPECT_TRUE(StartKeeper({.program = std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-keeper",
                           .socket_path = socket(),
                           .node = "n0",
                           .log_file = folder_ + "/keeper.log"},
                          &error))
      << error;
}

TEST_F(KeeperWorkers, ForgettingAJobEndsItAndForgetsItsExits) {
  const pid_t pid = Spawn(ShellSpawn(0, "exec sleep 1000"));
  v1::KeeperRequest request;
  request.mutable_forget()->set_job("job");
  EXPECT_EQ(client_->Call(request, Seconds(5)).message.error(), 0);
  EXPECT_TRUE(Eventually([&] { return !Alive(pid); }));
  auto look = Connect(false);
  EXPECT_EQ(state_.processes_size(), 0);
}

}  // namespace
}  // namespace everstep::keeper
