// The pure and the small parts of the agent's shell.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>

#include "proto/wire/convert.h"
#include "worker/agent/convert.h"
#include "worker/agent/dial_backoff.h"
#include "worker/agent/error_file.h"
#include "worker/agent/held_shards.h"
#include "worker/agent/keeper_convert.h"
#include "worker/agent/log_tail.h"
#include "worker/agent/node_dir.h"
#include "worker/agent/start_trouble.h"

namespace everstep::agent {
namespace {

namespace fs = std::filesystem;
namespace v1 = everstep::v1;

class Directory {
 public:
  Directory() {
    char path[] = "/tmp/everstep-shell-XXXXXX";
    path_ = mkdtemp(path);
  }
  ~Directory() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

HeldShard ShardOf(Rank rank, Generation g, Step step, bool replica = false) {
  HeldShard s;
  s.rank = rank;
  s.generation = g;
  s.step = step;
  s.replica = replica;
  return s;
}

TEST(HeldShards, AnArenaHoldsItsNewestTwo) {
  HeldShards held;
  for (Step step = 1; step <= 4; ++step) held.Note("j", ShardOf(0, 1, step));
  held.Note("j", ShardOf(0, 1, 4));  // told twice
  held.Note("j", ShardOf(0, 1, 2, /*replica=*/true));
  const auto all = held.Of("j");
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].step, 4);
  EXPECT_EQ(all[1].step, 3);
  EXPECT_TRUE(all[2].replica);
  // A later generation went back to an earlier step.
  held.Note("j", ShardOf(0, 2, 3));
  EXPECT_EQ(held.Of("j")[0].generation, 2u);
  held.Forget("j");
  EXPECT_TRUE(held.Of("j").empty());
}

TEST(StartTrouble, FindsTheLineOfGloosFailure) {
  EXPECT_EQ(FullMeshFailure(""), "");
  EXPECT_EQ(FullMeshFailure("RuntimeError: Connection reset by peer"), "");
  EXPECT_EQ(FullMeshFailure("a\nRuntimeError: Gloo connectFullMesh failed with [x] no error\nb"),
            "RuntimeError: Gloo connectFullMesh failed with [x] no error");
  EXPECT_LE(
      FullMeshFailure(std::string(5000, 'x') + "connectFullMesh failed" + std::string(5000, 'y'))
          .size(),
      300u);
}

TEST(StartTrouble, LooksAtTheErrorFileThenAtTheEndOfStderr) {
  Directory d;
  const std::string log = d / "stderr.log";
  std::ofstream(log) << std::string(100'000, '.') << "\nGloo connectFullMesh failed with [y]\n";
  ExitInfo exit;
  exit.code = 1;
  EXPECT_EQ(StartTrouble(exit, log), "Gloo connectFullMesh failed with [y]");
  EXPECT_EQ(StartTrouble(exit, d / "absent"), "");
  exit.error_json = "{\"message\": \"Gloo connectFullMesh failed with [z]\"}";
  EXPECT_NE(StartTrouble(exit, "").find("[z]"), std::string::npos);
  exit.code = -9;
  EXPECT_EQ(StartTrouble(exit, log), "") << "a killed worker did not fail to connect";
}

TEST(ErrorFile, OnlyWhatAFailedWorkerWrote) {
  Directory d;
  std::ofstream(d / "error.json") << R"({"message": {"extraInfo": {"timestamp": "12"}}})";
  ExitInfo exit;
  exit.code = 0;
  FillError(d / "error.json", &exit);
  EXPECT_TRUE(exit.error_json.empty());
  exit.code = 1;
  FillError(d / "error.json", &exit);
  EXPECT_EQ(exit.error_time.ns, 12'000'000'000);
  EXPECT_EQ(exit.error_file, d / "error.json");
  EXPECT_TRUE(exit.refused.empty());
  std::ofstream(d / "refused.txt")
      << "Pipeline: a batch of 7\ndoes not divide \xff" << std::string(9000, 'x');
  FillError(d / "error.json", &exit);
  EXPECT_EQ(exit.refused.substr(0, 40), "Pipeline: a batch of 7 does not divide ?");
  EXPECT_EQ(exit.refused.size(), kMaxRefusal);
  fs::remove(d / "refused.txt");
  ExitInfo silent;
  silent.code = 1;
  FillError(d / "absent", &silent);
  EXPECT_TRUE(silent.error_file.empty());
  for (const char* damaged :
       {"", "{", "[]", "{\"message\": 3}", "{\"message\":{\"extraInfo\":{\"timestamp\":{}}}}",
        "{\"message\":{\"extraInfo\":{\"timestamp\":\"99999999999999999999\"}}}"}) {
    EXPECT_EQ(ErrorTime(damaged).ns, 0) << damaged;
  }
}

TEST(NodeDir, OneAgentHoldsIt) {
  Directory d;
  std::string error;
  {
    NodeDirLock first, second;
    ASSERT_TRUE(first.Take(d / "n1", &error)) << error;
    EXPECT_FALSE(second.Take(d / "n1", &error));
    EXPECT_NE(error.find(std::to_string(getpid())), std::string::npos) << error;
    EXPECT_NE(error.find("--node"), std::string::npos) << error;
  }
  EXPECT_FALSE(fs::exists(d / "n1/agent.pid"));
  NodeDirLock third;
  EXPECT_TRUE(third.Take(d / "n1", &error)) << error;
}

TEST(NodeDir, AddressesAreReadAsTheyWereWritten) {
  Directory d;
  EXPECT_TRUE(ReadControllers(d.path()).empty());
  std::string error;
  ASSERT_TRUE(WriteControllers(d.path(), {"h1:1", "h2:2"}, &error)) << error;
  EXPECT_EQ(ReadControllers(d.path()), (std::vector<std::string>{"h1:1", "h2:2"}));
  EXPECT_FALSE(WriteControllers(d / "absent", {"h1:1"}, &error));
  EXPECT_NE(error.find(d / "absent"), std::string::npos);
}

TEST(NodeDir, AProcessIsKnownByItsStartTime) {
  EXPECT_GT(ProcessStartTime(getpid()), 0u);
  EXPECT_EQ(ProcessStartTime(0), 0u);
  const pid_t child = fork();
  if (child == 0) _exit(0);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_EQ(ProcessStartTime(child), 0u) << "a zombie is dead";
  EXPECT_EQ(ProcessState(child), 'Z');
  EXPECT_EQ(ProcessState(0), '\0');
  waitpid(child, nullptr, 0);
  EXPECT_FALSE(BootId().empty());
  EXPECT_GT(PidNamespace(), 0u);
}

TEST(NodeDir, TheAddressIsTheOneThatReachesTheController) {
  EXPECT_EQ(LocalAddressTowards("127.0.0.1:99"), "127.0.0.1");
  EXPECT_EQ(LocalAddressTowards("no such host.invalid:1"), "127.0.0.1");
  EXPECT_GT(FreePort("127.0.0.1"), 0u);
  EXPECT_EQ(FreePort("192.0.2.1"), 0u) << "not an address of this machine";
}

TEST(DialBackoff, AtOnceThenDoublingUpToTheLimit) {
  DialBackoff backoff({.first = Milliseconds(50), .max = Seconds(2)}, 7);
  EXPECT_EQ(backoff.Next(1).wait, Duration{});
  Duration last = {};
  for (int i = 0; i < 2000; ++i) {
    const DialBackoff::Dial dial = backoff.Next(1);
    EXPECT_EQ(dial.index, 0u);
    last = dial.wait;
    EXPECT_GT(last, Duration{});
    EXPECT_LE(last, Seconds(2));
  }
  EXPECT_GE(last, Milliseconds(900));
  backoff.Succeeded();
  EXPECT_EQ(backoff.Next(1).wait, Duration{});
}

// Eight launchers of a job are eight addresses; a controller that starts again at the first one
// waits two seconds for its nodes.
TEST(DialBackoff, TheOneThatStoodComesEveryRoundAndTheOthersInTurn) {
  DialBackoff backoff({}, 7);
  std::vector<std::size_t> dialled;
  for (int i = 0; i < 12; ++i) {
    const DialBackoff::Dial dial = backoff.Next(8);
    dialled.push_back(dial.index);
    EXPECT_EQ(dial.wait > Duration{}, i > 0 && dial.index == 0) << i;
    EXPECT_LE(dial.wait, Milliseconds(500));
    EXPECT_EQ(dial.patience, dial.index == 0 ? Seconds(10) : Milliseconds(300 * (1 + i / 4)));
  }
  EXPECT_EQ(dialled, (std::vector<std::size_t>{0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 1, 2}));
  backoff.Succeeded();
  EXPECT_EQ(backoff.Next(8).index, 0u);
  for (int i = 0; i < 2000; ++i) EXPECT_LE(backoff.Next(8).patience, Seconds(10));
}

TEST(DialBackoff, TwoAddressesTakeTurns) {
  DialBackoff backoff({}, 7);
  for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(backoff.Next(2).index, i % 2);
  EXPECT_EQ(backoff.Next(1).index, 0u) << "fewer than before";
}

TEST(ParseAddresses, NamesWhatIsNoAddress) {
  std::vector<std::string> bad;
  EXPECT_EQ(ParseAddresses("a:1, [::1]:2\n# note\nb:3", &bad),
            (std::vector<std::string>{"a:1", "[::1]:2", "b:3"}));
  EXPECT_TRUE(bad.empty());
  EXPECT_TRUE(ParseAddresses("a,a:0,a:65536,:1,a:x", &bad).empty());
  EXPECT_EQ(bad.size(), 5u);
}

v1::Command ACommand() {
  v1::Command c;
  c.set_kind(v1::Command::SCRIPT);
  c.set_python("/usr/bin/python3");
  c.set_target("train.py");
  c.add_args("--r=${local_rank}");
  c.set_run_id("r");
  (*c.mutable_env())["HOME"] = "/root";
  return c;
}

Activate AnActivate(Generation g) {
  Activate a;
  a.job = "j";
  a.generation = g;
  a.command.opaque = ACommand().SerializeAsString();
  a.plan.node = "n1";
  a.plan.workers.resize(2);
  a.plan.workers[1].rank = 1;
  a.plan.workers[1].local_rank = 1;
  a.world_size = 2;
  a.group_world_size = 1;
  a.nproc_per_node = 2;
  a.master_addr = "127.0.0.1";
  a.master_port = 7;
  a.data_key = "secret";
  return a;
}

void Keep(const v1::KeeperRemember& remember, v1::KeeperState* state) {
  (*state->mutable_memory())[remember.key()] = remember.value();
}

void AddProcess(v1::KeeperState* state, Generation g, Rank rank, int pid, bool running) {
  v1::KeeperProcess* p = state->add_processes();
  p->set_job("j");
  p->set_generation(g);
  p->set_rank(rank);
  p->set_local_rank(rank);
  p->set_pid(pid);
  p->set_running(running);
  if (!running) p->mutable_exit()->set_code(-9);
}

//  the keeper remembers: registration 4, prepare 3, activate 3; runs rank 0 of it; rank 1 was
//  killed
TEST(Adopt, FindsWhatTheDeadAgentLeft) {
  v1::KeeperState state;
  Keep(Remember(RememberIncarnation{4}), &state);
  Keep(Remember(RememberPrepared{"j", 3, CommandSpec{ACommand().SerializeAsString()}, "secret"}),
       &state);
  Keep(Remember(RememberActivated{AnActivate(3)}), &state);
  AddProcess(&state, 2, 0, 90, true);  // still ending
  AddProcess(&state, 3, 0, 100, true);
  AddProcess(&state, 3, 1, 101, false);
  const Adopted adopted = Adopt(state);
  EXPECT_EQ(adopted.attached.remembered, 4u);
  ASSERT_EQ(adopted.attached.jobs.size(), 1u);
  const AdoptedJob& job = adopted.attached.jobs[0];
  EXPECT_EQ(job.holds.generation, 3u);
  EXPECT_TRUE(job.holds.activated);
  ASSERT_EQ(job.holds.workers.size(), 2u);
  EXPECT_TRUE(job.holds.workers[0].running);
  EXPECT_EQ(job.holds.workers[1].exit.code, -9);
  ASSERT_EQ(job.old_workers.size(), 1u);
  EXPECT_EQ(job.old_workers[0].second.pid, 90);
  EXPECT_EQ(adopted.activates.at("j").data_key, "secret");
  EXPECT_EQ(adopted.begun.at("j").second, "secret");
  v1::Command command;
  ASSERT_TRUE(wire::ToProto(job.command, &command));
  EXPECT_EQ(command.target(), "train.py");
}

TEST(Adopt, APrepareThatIsNewerThanTheActivateWins) {
  v1::KeeperState state;
  Keep(Remember(RememberActivated{AnActivate(3)}), &state);
  Keep(Remember(RememberPrepared{"j", 4, CommandSpec{ACommand().SerializeAsString()}, ""}), &state);
  AddProcess(&state, 3, 0, 100, true);
  const Adopted adopted = Adopt(state);
  const AdoptedJob& job = adopted.attached.jobs[0];
  EXPECT_EQ(job.holds.generation, 4u);
  EXPECT_FALSE(job.holds.activated);
  ASSERT_EQ(job.old_workers.size(), 1u);
  EXPECT_EQ(job.old_workers[0].first, 3u);
  EXPECT_TRUE(adopted.activates.empty());
}

TEST(Adopt, DamagedMemoryIsNoState) {
  v1::KeeperState state;
  (*state.mutable_memory())["incarnation"] = "x";
  (*state.mutable_memory())["job/j/activated"] = "\xff\xff";
  (*state.mutable_memory())["job/other/prepared"] =
      Remember(RememberPrepared{"j", 3, {}, ""}).value();
  const Adopted adopted = Adopt(state);
  EXPECT_EQ(adopted.attached.remembered, 0u);
  EXPECT_TRUE(adopted.attached.jobs.empty());
}

TEST(BuildSpawns, OneForEachRankWithItsOwnFilesAndArguments) {
  std::string error;
  const auto spawns =
      BuildSpawns(AnActivate(3), ACommand(), {"n1", "/s/nodes/n1", "/s/k.sock"}, 7, &error);
  ASSERT_EQ(spawns.size(), 2u) << error;
  const v1::KeeperSpawn& s = spawns[1].request;
  EXPECT_EQ(s.args(0), "--r=1");
  EXPECT_EQ(s.stdout_path(), "/s/nodes/n1/jobs/j/attempt_2/1/stdout.log");
  EXPECT_EQ(s.env().at("RANK"), "1");
  EXPECT_EQ(s.env().at("HOME"), "/root");
  EXPECT_EQ(s.env().at("EVERSTEP_KEEPER"), "/s/k.sock");
  EXPECT_EQ(s.env().at("TORCHELASTIC_USE_AGENT_STORE"), "True");
  const auto own =
      BuildSpawns(AnActivate(3), ACommand(), {"n1", "/s/nodes/n1", "/s/k.sock"}, 0, &error);
  EXPECT_EQ(own[0].request.env().at("TORCHELASTIC_USE_AGENT_STORE"), "False")
      << "rank 0 serves MASTER_PORT itself";
}

TEST(BuildForkServer, HasTheEnvironmentOfItsWorkers) {
  const v1::KeeperForkServer server = BuildForkServer("j", ACommand(), 2);
  std::string error;
  const auto spawns =
      BuildSpawns(AnActivate(3), ACommand(), {"n1", "/s/nodes/n1", "/s/k.sock"}, 7, &error);
  for (const char* key : {"HOME", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}) {
    EXPECT_EQ(server.env().at(key), spawns[0].request.env().at(key)) << key;
  }
  EXPECT_EQ(server.env().count("RANK"), 0u);
  EXPECT_EQ(BuildForkServer("j", ACommand(), 1).env().count("OMP_NUM_THREADS"), 0u);
  EXPECT_EQ(server.args(0), "--r=0");
}

struct Collector {
  std::mutex mutex;
  std::string text;
  std::promise<void> end;
};

TEST(LogTailer, LastLinesThenTheEnd) {
  Directory d;
  std::ofstream(d / "log") << "one\ntwo\nthree\n";
  Collector got;
  LogTailer tailer(
      [&](const TailChunk& chunk) {
        std::lock_guard<std::mutex> lock(got.mutex);
        got.text += chunk.data;
        if (chunk.end) got.end.set_value();
      },
      [] { return std::size_t{0}; });
  ASSERT_TRUE(
      tailer.Start(1, {{"j", 1, 0, false, d / "log"}, {"j", 1, 0, true, d / "absent"}}, false, 2));
  ASSERT_EQ(got.end.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
  std::lock_guard<std::mutex> lock(got.mutex);
  EXPECT_EQ(got.text, "two\nthree\n");
}

TEST(LogTailer, RefusesMoreRequestsThanItsLimit) {
  LogTailer tailer([](const TailChunk&) {}, [] { return std::size_t{0}; });
  for (std::uint64_t i = 0; i < LogTailer::kMaxRequests; ++i) {
    ASSERT_TRUE(tailer.Start(i + 1, {{"j", 1, 0, false, "/nowhere"}}, true, -1));
  }
  EXPECT_FALSE(tailer.Start(1000, {}, true, -1));
  tailer.Cancel(1);
  EXPECT_TRUE(tailer.Start(1000, {}, true, -1));
}

}  // namespace
}  // namespace everstep::agent
