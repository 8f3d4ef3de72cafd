// A real agent and a real keeper, commanded by a controller that the test scripts. Workers are
// shell scripts: nothing here needs Python.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "tests/integration/fake_controller.h"
#include "worker/keeper/client.h"

namespace everstep::test {
namespace {

namespace fs = std::filesystem;
using Message = v1::AgentMessage;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kPatience = std::chrono::seconds(30);

// Polls a state that only the file system or the process table shows.
bool Eventually(const std::function<bool()>& state, milliseconds patience = kPatience) {
  const auto deadline = steady_clock::now() + patience;
  while (!state()) {
    if (steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

std::string Read(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

bool Alive(int pid) {
  if (pid <= 0) return false;
  const std::string stat = Read("/proc/" + std::to_string(pid) + "/stat");
  const auto end = stat.rfind(')');
  return end != std::string::npos && stat.size() > end + 2 && stat[end + 2] != 'Z';
}

int PidIn(const fs::path& path) {
  return std::atoi(Read(path).c_str());
}

class AgentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/everstep-agent-XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    state_ = path;
    node_ = state_ / "nodes/n1";
    controller_ = std::make_unique<FakeController>();
  }
  void TearDown() override {
    const int keeper = PidIn(node_ / "keeper.pid");
    if (agent_ > 0) {
      kill(agent_, SIGTERM);
      if (!Eventually([this] { return Ended(); }, milliseconds(10000))) {
        kill(agent_, SIGKILL);
        waitpid(agent_, nullptr, 0);
        ADD_FAILURE() << "the agent did not end";
      }
    }
    if (Alive(keeper)) {
      EXPECT_TRUE(Eventually([&] { return !Alive(keeper); }, milliseconds(10000)));
      if (Alive(keeper)) kill(keeper, SIGKILL);
    }
    controller_.reset();
    if (HasFailure()) {
      std::fprintf(stderr, "--- agent.log\n%s\n--- keeper.log\n%s\n",
                   Read(node_ / "agent.log").c_str(), Read(node_ / "keeper.log").c_str());
    }
    fs::remove_all(state_);
  }

  void StartAgent(std::vector<std::string> extra = {}) {
    std::vector<std::string> args = {std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-agent",
                                     "--node",
                                     "n1",
                                     "--state-dir",
                                     state_.string(),
                                     "--controller",
                                     controller_->address(),
                                     "--stop-grace",
                                     "0.5"};
    args.insert(args.end(), extra.begin(), extra.end());
    if (std::find(extra.begin(), extra.end(), "--leave-timeout") == extra.end()) {
      args.insert(args.end(), {"--leave-timeout", "0"});
    }
    agent_ = Spawn(args, &agent_output_);
  }
  int Spawn(const std::vector<std::string>& args, fs::path* output) {
    *output = state_ / ("output" + std::to_string(spawned_++));
    std::vector<char*> argv;
    argv.reserve(args.size() + 1);
    for (const std::string& a : args) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, output->c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                     0644);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t pid = -1;
    EXPECT_EQ(posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ), 0) << argv[0];
    posix_spawn_file_actions_destroy(&actions);
    return pid;
  }
  bool Ended() {
    if (agent_ <= 0) return true;
    int status = 0;
    if (waitpid(agent_, &status, WNOHANG) != agent_) return false;
    agent_status_ = status;
    agent_ = -1;
    return true;
  }
  void KillAgent() {
    kill(agent_, SIGKILL);
    waitpid(agent_, nullptr, 0);
    agent_ = -1;
  }

  // What the keeper holds.
  v1::KeeperState Look() {
    keeper::ClientOptions o;
    o.socket_path = node_ / "keeper.sock";
    o.owner = false;
    v1::KeeperState state;
    keeper::ConnectError error;
    EXPECT_NE(keeper::Client::Connect(o, &state, &error), nullptr) << error.message;
    return state;
  }

  std::optional<Message> Registration(std::size_t from = 0) {
    return controller_->Wait([](const Message& m) { return m.has_register_(); }, from);
  }

  static v1::Command Shell(const std::string& script) {
    v1::Command command;
    command.set_kind(v1::Command::PROGRAM);
    command.set_target("/bin/sh");
    command.add_args("-c");
    command.add_args(script);
    command.set_cwd("/");
    command.set_umask(022);
    (*command.mutable_env())["PATH"] = "/usr/bin:/bin";
    command.set_restart_grace_ms(200);
    command.set_stop_grace_ms(2000);
    command.set_run_id("run");
    command.set_role("default");
    return command;
  }

  // Prepares and activates generation `g` with `workers` ranks; the answer to Activate.
  std::optional<Message> RunGeneration(std::uint64_t g, const v1::Command& command,
                                       int workers = 2) {
    const std::size_t from = controller_->count();
    v1::ControllerMessage prepare;
    prepare.mutable_prepare()->set_job("job");
    prepare.mutable_prepare()->set_generation(g);
    *prepare.mutable_prepare()->mutable_command() = command;
    prepare.mutable_prepare()->set_nproc_per_node(workers);
    prepare.mutable_prepare()->set_failed(true);
    prepare.mutable_prepare()->set_data_key("key");
    EXPECT_TRUE(controller_->Send(prepare));
    const auto prepared = controller_->Wait(
        [&](const Message& m) { return m.has_prepared() && m.prepared().generation() == g; }, from);
    EXPECT_TRUE(prepared.has_value());
    if (!prepared) return std::nullopt;
    EXPECT_FALSE(prepared->prepared().refused()) << prepared->prepared().message();
    v1::ControllerMessage message;
    v1::Activate* a = message.mutable_activate();
    a->set_job("job");
    a->set_generation(g);
    a->set_world_size(workers);
    a->set_group_world_size(1);
    a->set_nproc_per_node(workers);
    a->set_master_addr("127.0.0.1");
    a->set_master_port(12345);
    a->set_restart_count(static_cast<std::uint32_t>(g - 1));
    *a->mutable_command() = command;
    a->set_data_key("key");
    a->set_committed_step(-1);
    a->mutable_plan()->set_node("n1");
    for (int i = 0; i < workers; ++i) {
      v1::WorkerPlan* w = a->mutable_plan()->add_workers();
      w->set_rank(i);
      w->set_local_rank(i);
      w->set_role_rank(i);
      w->mutable_restore()->set_step(-1);
    }
    EXPECT_TRUE(controller_->Send(message));
    auto activated = controller_->Wait(
        [&](const Message& m) { return m.has_activated() && m.activated().generation() == g; },
        from);
    EXPECT_TRUE(activated.has_value());
    if (activated) {
      EXPECT_FALSE(activated->activated().failed()) << activated->activated().message();
    }
    return activated;
  }
  fs::path Log(std::uint64_t g, int local_rank, const std::string& name) const {
    return node_ / "jobs/job" / ("attempt_" + std::to_string(g - 1)) / std::to_string(local_rank) /
           name;
  }
  std::optional<Message> Exit(int rank, std::size_t from = 0) {
    return controller_->Wait(
        [&](const Message& m) { return m.has_worker_exited() && m.worker_exited().rank() == rank; },
        from);
  }

  fs::path state_, node_, agent_output_;
  std::unique_ptr<FakeController> controller_;
  int agent_ = -1;
  int agent_status_ = -1;
  int spawned_ = 0;
};

const char* const kSleeper = "echo started $RANK of $WORLD_SIZE; exec sleep 1000";

TEST_F(AgentTest, RegistersBeatsAndRunsWorkersInTorchrunsEnvironment) {
  StartAgent({"--slots", "3", "--label", "rack=r7"});
  const auto r = Registration();
  ASSERT_TRUE(r);
  EXPECT_EQ(r->register_().node(), "n1");
  EXPECT_EQ(r->register_().slots(), 3u);
  EXPECT_EQ(r->register_().labels().at("rack"), "r7");
  EXPECT_EQ(r->register_().previous_incarnation(), 0u);
  EXPECT_EQ(r->register_().address(), "127.0.0.1");
  EXPECT_EQ(r->register_().keeper_pid(), PidIn(node_ / "keeper.pid"));
  EXPECT_EQ(PidIn(node_ / "agent.pid"), agent_);
  for (std::uint64_t n = 1; n <= 3; ++n) {
    EXPECT_TRUE(controller_->Wait([n](const Message& m) {
      return m.has_heartbeat() && m.heartbeat().sequence() == n && m.incarnation() == 1;
    }));
  }
  const auto activated = RunGeneration(1, Shell("env; exec sleep 1000"));
  ASSERT_TRUE(activated);
  ASSERT_EQ(activated->activated().workers_size(), 2);
  ASSERT_TRUE(Eventually(
      [&] { return Read(Log(1, 1, "stdout.log")).find("EVERSTEP_KEEPER=") != std::string::npos; }));
  const std::string env = Read(Log(1, 1, "stdout.log"));
  for (const char* line :
       {"RANK=1\n", "LOCAL_RANK=1\n", "WORLD_SIZE=2\n", "LOCAL_WORLD_SIZE=2\n", "GROUP_RANK=0\n",
        "MASTER_ADDR=127.0.0.1\n", "MASTER_PORT=12345\n", "TORCHELASTIC_RUN_ID=run\n",
        "EVERSTEP_JOB=job\n", "EVERSTEP_NODE=n1\n", "EVERSTEP_GENERATION=1\n"}) {
    EXPECT_NE(("\n" + env).find(std::string("\n") + line), std::string::npos) << line << "in\n"
                                                                              << env;
  }
  EXPECT_TRUE(controller_->Wait([](const Message& m) {
    return m.has_heartbeat() && m.heartbeat().jobs_size() == 1 &&
           m.heartbeat().jobs(0).running() == 2;
  }));
}

TEST_F(AgentTest, AKilledWorkerIsToldAndTheNextGenerationReplacesAll) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto first = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(first);
  const int victim = first->activated().workers(0).pid(),
            survivor = first->activated().workers(1).pid();
  ASSERT_TRUE(Alive(victim));
  kill(victim, SIGKILL);
  const auto exit = Exit(0);
  ASSERT_TRUE(exit);
  EXPECT_EQ(exit->worker_exited().exit().code(), -SIGKILL);
  EXPECT_FALSE(exit->worker_exited().exit().by_everstep());
  EXPECT_EQ(exit->worker_exited().pid(), victim);
  EXPECT_TRUE(Alive(survivor)) << "only the controller ends a survivor";
  const auto second = RunGeneration(2, Shell(kSleeper));
  ASSERT_TRUE(second);
  EXPECT_FALSE(Alive(survivor)) << "a node is prepared when the old workers are gone";
  EXPECT_TRUE(Alive(second->activated().workers(0).pid()));
  EXPECT_FALSE(controller_->Wait(
      [](const Message& m) { return m.has_worker_exited() && m.worker_exited().rank() == 1; }, 0,
      milliseconds(0)))
      << "an exit that a prepare asked for is no report";
}

TEST_F(AgentTest, AFailedWorkersOwnWordsAreTold) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(
      1,
      Shell("echo "
            "'{\"message\":{\"message\":\"boom\",\"extraInfo\":{\"timestamp\":\"1700000000\"}}}' > "
            "$TORCHELASTIC_ERROR_FILE; exit 3"),
      1));
  const auto exit = Exit(0);
  ASSERT_TRUE(exit);
  EXPECT_EQ(exit->worker_exited().exit().code(), 3);
  EXPECT_NE(exit->worker_exited().exit().error_json().find("boom"), std::string::npos);
  EXPECT_EQ(exit->worker_exited().exit().error_time_ns(), 1700000000ll * 1'000'000'000);
  EXPECT_EQ(exit->worker_exited().exit().error_file(), Log(1, 0, "error.json").string());
}

// A directory on a disk that hangs, as a pipe that nobody writes to.
TEST_F(AgentTest, AnExitIsToldWhileItsLogDirectoryHangs) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell("mkfifo $TORCHELASTIC_ERROR_FILE; exit 3"), 1));
  const auto exit = Exit(0);
  const int freed = open(Log(1, 0, "error.json").c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  EXPECT_GE(freed, 0) << "the agent did not read there";
  if (freed >= 0) close(freed);
  ASSERT_TRUE(exit) << "a disk that hangs held the report back";
  EXPECT_EQ(exit->worker_exited().exit().code(), 3);
  EXPECT_TRUE(exit->worker_exited().exit().error_json().empty());
}

TEST_F(AgentTest, AGroupThatCouldNotConnectIsToldApartFromACrash) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1,
                            Shell("echo 'RuntimeError: Gloo connectFullMesh failed with "
                                  "[pair.cc:144] no error' >&2; exit 1"),
                            1));
  const auto stalled = controller_->Wait([](const Message& m) { return m.has_worker_stalled(); });
  ASSERT_TRUE(stalled);
  EXPECT_EQ(stalled->worker_stalled().kind(), v1::WorkerStalled::GROUP_NOT_FORMED);
  EXPECT_NE(stalled->worker_stalled().evidence().find("connectFullMesh"), std::string::npos);
  EXPECT_TRUE(Exit(0));
}

TEST_F(AgentTest, WorkersRunOnWhileTheirAgentIsDeadAndTheNextOneAdoptsThem) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int keeper = PidIn(node_ / "keeper.pid");
  const int w0 = activated->activated().workers(0).pid(),
            w1 = activated->activated().workers(1).pid();
  KillAgent();
  EXPECT_TRUE(Alive(w0) && Alive(w1) && Alive(keeper));
  kill(w1, SIGKILL);  // while nobody looks
  ASSERT_TRUE(Eventually([&] { return !Alive(w1); }));
  const std::size_t from = controller_->count();
  StartAgent();
  const auto r = Registration(from);
  ASSERT_TRUE(r);
  EXPECT_EQ(r->register_().keeper_pid(), keeper);
  EXPECT_EQ(r->register_().previous_incarnation(), 1u);
  ASSERT_EQ(r->register_().jobs_size(), 1);
  const v1::JobOnNode& job = r->register_().jobs(0);
  EXPECT_EQ(job.generation(), 1u);
  EXPECT_TRUE(job.activated());
  ASSERT_EQ(job.workers_size(), 2);
  EXPECT_TRUE(job.workers(0).running());
  EXPECT_EQ(job.workers(0).pid(), w0);
  EXPECT_FALSE(job.workers(1).running());
  EXPECT_EQ(job.workers(1).exit().code(), -SIGKILL);
  EXPECT_TRUE(Alive(w0));
  // ... and it rules over them as the first did.
  const auto second = RunGeneration(2, Shell(kSleeper));
  ASSERT_TRUE(second);
  EXPECT_FALSE(Alive(w0));
}

TEST_F(AgentTest, WorkersRunOnWhileTheControllerIsAway) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int port = controller_->port();
  controller_->Stop();
  // Long enough for several dials that are refused.
  ASSERT_TRUE(Eventually(
      [&] { return Read(node_ / "agent.log").find("session_lost") != std::string::npos; }));
  EXPECT_TRUE(Alive(activated->activated().workers(0).pid()));
  controller_ = std::make_unique<FakeController>(port);
  ASSERT_EQ(controller_->port(), port);
  controller_->SetIncarnation(2);
  const auto before = steady_clock::now();
  const auto r = Registration();
  ASSERT_TRUE(r);
  EXPECT_LT(steady_clock::now() - before,
            std::chrono::seconds(4));  // 2 s, and room for a busy machine
  ASSERT_EQ(r->register_().jobs_size(), 1);
  EXPECT_EQ(r->register_().jobs(0).workers_size(), 2);
  EXPECT_EQ(r->register_().previous_incarnation(), 1u);
  EXPECT_TRUE(controller_->Wait(
      [](const Message& m) { return m.has_heartbeat() && m.incarnation() == 2; }));
  EXPECT_TRUE(Alive(activated->activated().workers(1).pid()));
}

TEST_F(AgentTest, FollowsAControllerThatMoved) {
  StartAgent();
  ASSERT_TRUE(Registration());
  FakeController second;
  second.SetIncarnation(2);
  std::ofstream(node_ / "controller") << second.address() << "\n";
  controller_->Stop();
  EXPECT_TRUE(second.Wait([](const Message& m) { return m.has_register_(); }));
}

TEST_F(AgentTest, AControllerWithOlderStateGetsNoPowerOverWorkers) {
  controller_->SetIncarnation(7);
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int port = controller_->port();
  controller_->Stop();
  controller_ = std::make_unique<FakeController>(port);
  controller_->SetIncarnation(3);
  controller_->SetKnownJobs({});
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(Eventually(
      [&] { return Read(node_ / "agent.log").find("session_refused") != std::string::npos; }));
  EXPECT_TRUE(Alive(activated->activated().workers(0).pid()));
}

TEST_F(AgentTest, ARefusedAgentSaysWhyAndKeepsTrying) {
  controller_->Refuse(
      grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "protocol 9 is wanted; upgrade"));
  StartAgent();
  ASSERT_TRUE(Eventually([&] { return controller_->dials() >= 3; }));
  EXPECT_NE(Read(node_ / "agent.log").find("protocol 9 is wanted"), std::string::npos);
  EXPECT_FALSE(Ended());
}

TEST_F(AgentTest, AJobThatTheControllerDoesNotKnowIsCleanedUp) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  KillAgent();
  controller_->SetKnownJobs({});
  StartAgent();
  EXPECT_TRUE(Eventually([&] { return !Alive(activated->activated().workers(0).pid()); }));
}

TEST_F(AgentTest, AKeepersDeathTakesItsWorkersAndIsTold) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int keeper = PidIn(node_ / "keeper.pid");
  ASSERT_GT(keeper, 1);
  kill(keeper, SIGKILL);
  const auto lost = controller_->Wait([](const Message& m) { return m.has_keeper_lost(); });
  ASSERT_TRUE(lost);
  EXPECT_NE(lost->keeper_lost().new_keeper_pid(), keeper);
  EXPECT_TRUE(Eventually([&] { return !Alive(activated->activated().workers(0).pid()); }));
  EXPECT_TRUE(RunGeneration(2, Shell(kSleeper)));
}

TEST_F(AgentTest, StopJobEndsTheWorkersAndForgetsTheJob) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell("trap '' TERM; while :; do sleep 0.1; done"));
  ASSERT_TRUE(activated);
  v1::ControllerMessage stop;
  stop.mutable_stop_job()->set_job("job");
  stop.mutable_stop_job()->set_generation(1);
  stop.mutable_stop_job()->set_forget(true);
  stop.mutable_stop_job()->set_failed(true);
  ASSERT_TRUE(controller_->Send(stop));
  ASSERT_TRUE(controller_->Wait(
      [](const Message& m) { return m.has_stopped() && m.stopped().generation() == 1; }));
  EXPECT_FALSE(Alive(activated->activated().workers(0).pid()));
  EXPECT_TRUE(Eventually([&] {
    const v1::KeeperState held = Look();
    return held.processes_size() == 0 && held.memory().size() == 1 &&
           held.memory().count("incarnation") == 1;
  })) << "the keeper holds "
      << Look().processes_size() << " processes and remembers " << Look().memory().size()
      << " keys";
}

TEST_F(AgentTest, LogsAreTailedAndFollowedIntoTheNextGeneration) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell(kSleeper), 1));
  ASSERT_TRUE(Eventually([&] { return !Read(Log(1, 0, "stdout.log")).empty(); }));
  v1::ControllerMessage tail;
  tail.mutable_tail_logs()->set_request(5);
  tail.mutable_tail_logs()->set_job("job");
  tail.mutable_tail_logs()->set_rank(-1);
  tail.mutable_tail_logs()->set_follow(true);
  tail.mutable_tail_logs()->set_tail_lines(-1);
  ASSERT_TRUE(controller_->Send(tail));
  for (const std::uint64_t g : {1, 2}) {
    const auto lines = controller_->Wait([&](const Message& m) {
      return m.has_log_lines() && m.log_lines().generation() == g && !m.log_lines().from_stderr();
    });
    ASSERT_TRUE(lines);
    EXPECT_EQ(lines->log_lines().data(), "started 0 of 1\n");
    EXPECT_EQ(lines->log_lines().request(), 5u);
    if (g == 1) {
      ASSERT_TRUE(RunGeneration(2, Shell(kSleeper), 1));
    }
  }
}

TEST_F(AgentTest, AFailedJobsLogsAreThereAfterItsEnd) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell("echo last words of $RANK >&2; exit 5")));
  ASSERT_TRUE(Exit(0) && Exit(1));
  v1::ControllerMessage message;
  message.mutable_stop_job()->set_job("job");
  message.mutable_stop_job()->set_generation(1);
  message.mutable_stop_job()->set_forget(true);
  ASSERT_TRUE(controller_->Send(message));
  ASSERT_TRUE(controller_->Wait([](const Message& m) { return m.has_stopped(); }));
  message.Clear();
  message.mutable_tail_logs()->set_request(9);
  message.mutable_tail_logs()->set_job("job");
  message.mutable_tail_logs()->set_rank(1);
  message.mutable_tail_logs()->set_tail_lines(10);
  ASSERT_TRUE(controller_->Send(message));
  const auto lines = controller_->Wait([](const Message& m) { return m.has_log_lines(); });
  ASSERT_TRUE(lines);
  EXPECT_EQ(lines->log_lines().data(), "last words of 1\n");
  EXPECT_TRUE(lines->log_lines().from_stderr());
  EXPECT_TRUE(
      controller_->Wait([](const Message& m) { return m.has_log_lines() && m.log_lines().end(); }));
}

TEST_F(AgentTest, AFollowerIsNotSentWhatAnEarlierLifeOfTheNodeSaid) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell("echo early; exec sleep 1000"), 1));
  ASSERT_TRUE(Eventually([&] { return !Read(Log(1, 0, "stdout.log")).empty(); }));
  const int keeper = PidIn(node_ / "keeper.pid");
  ASSERT_GT(keeper, 1);
  KillAgent();
  kill(keeper, SIGKILL);
  ASSERT_TRUE(Eventually([&] { return !Alive(keeper); }));
  const std::size_t from = controller_->count();
  StartAgent();
  ASSERT_TRUE(Registration(from));
  v1::ControllerMessage tail;
  tail.mutable_tail_logs()->set_request(6);
  tail.mutable_tail_logs()->set_job("job");
  tail.mutable_tail_logs()->set_rank(-1);
  tail.mutable_tail_logs()->set_follow(true);
  tail.mutable_tail_logs()->set_tail_lines(-1);
  ASSERT_TRUE(controller_->Send(tail));
  ASSERT_TRUE(RunGeneration(2, Shell("echo late; exec sleep 1000"), 1));
  const auto lines = controller_->Wait([](const Message& m) { return m.has_log_lines(); });
  ASSERT_TRUE(lines);
  EXPECT_EQ(lines->log_lines().data(), "late\n");
}

TEST_F(AgentTest, AStoppedWorkerIsNamed) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  kill(activated->activated().workers(1).pid(), SIGSTOP);
  const auto stalled = controller_->Wait([](const Message& m) { return m.has_worker_stalled(); });
  ASSERT_TRUE(stalled);
  EXPECT_EQ(stalled->worker_stalled().kind(), v1::WorkerStalled::STOPPED);
  EXPECT_EQ(stalled->worker_stalled().rank(), 1);
  EXPECT_TRUE(RunGeneration(2, Shell(kSleeper))) << "a stopped worker can be ended";
}

TEST_F(AgentTest, AStoppedKeeperIsWoken) {
  StartAgent();
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int keeper = PidIn(node_ / "keeper.pid");
  ASSERT_GT(keeper, 1);
  kill(keeper, SIGSTOP);
  kill(activated->activated().workers(0).pid(), SIGKILL);
  EXPECT_TRUE(Exit(0)) << "a stopped keeper would not see it";
  EXPECT_NE(Read(node_ / "agent.log").find("keeper_stopped"), std::string::npos);
}

TEST_F(AgentTest, ADrillIsARealSignal) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell(kSleeper)));
  v1::ControllerMessage drill;
  drill.mutable_kill_for_drill()->set_job("job");
  drill.mutable_kill_for_drill()->set_rank(1);
  drill.mutable_kill_for_drill()->set_signal(SIGKILL);
  ASSERT_TRUE(controller_->Send(drill));
  const auto exit = Exit(1);
  ASSERT_TRUE(exit);
  EXPECT_EQ(exit->worker_exited().exit().code(), -SIGKILL);
  EXPECT_FALSE(exit->worker_exited().exit().by_everstep());
}

TEST_F(AgentTest, AProgramThatIsNotThereFailsTheActivation) {
  StartAgent();
  ASSERT_TRUE(Registration());
  v1::Command command = Shell("");
  command.set_target("/nowhere/program");
  const std::size_t from = controller_->count();
  v1::ControllerMessage message;
  message.mutable_prepare()->set_job("job");
  message.mutable_prepare()->set_generation(1);
  *message.mutable_prepare()->mutable_command() = command;
  ASSERT_TRUE(controller_->Send(message));
  ASSERT_TRUE(controller_->Wait([](const Message& m) { return m.has_prepared(); }, from));
  message.Clear();
  message.mutable_activate()->set_job("job");
  message.mutable_activate()->set_generation(1);
  *message.mutable_activate()->mutable_command() = command;
  message.mutable_activate()->mutable_plan()->add_workers();
  ASSERT_TRUE(controller_->Send(message));
  const auto told = controller_->Wait([](const Message& m) {
    return (m.has_activated() && m.activated().failed()) || m.has_worker_exited();
  });
  ASSERT_TRUE(told);
  if (told->has_activated()) {
    EXPECT_NE(told->activated().message().find("/nowhere/program"), std::string::npos)
        << told->activated().message();
  } else {
    EXPECT_EQ(told->worker_exited().exit().code(), 127);
  }
}

TEST_F(AgentTest, SigtermEndsTheWholeNode) {
  StartAgent({"--leave-timeout", "0.3"});
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int keeper = PidIn(node_ / "keeper.pid");
  kill(agent_, SIGTERM);
  EXPECT_TRUE(controller_->Wait([](const Message& m) { return m.has_notice(); }));
  ASSERT_TRUE(Eventually([this] { return Ended(); }));
  EXPECT_TRUE(WIFEXITED(agent_status_) && WEXITSTATUS(agent_status_) == 0);
  EXPECT_TRUE(Eventually(
      [&] { return !Alive(keeper) && !Alive(activated->activated().workers(0).pid()); }));
  EXPECT_FALSE(fs::exists(node_ / "agent.pid"));
}

TEST_F(AgentTest, ALauncherThatIsGoneTakesTheNodeWithIt) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(fcntl(ends[1], F_SETFD, FD_CLOEXEC), 0);
  StartAgent({"--lifeline", std::to_string(ends[0])});
  close(ends[0]);
  ASSERT_TRUE(Registration());
  const auto activated = RunGeneration(1, Shell(kSleeper));
  ASSERT_TRUE(activated);
  const int keeper = PidIn(node_ / "keeper.pid");
  close(ends[1]);
  ASSERT_TRUE(Eventually([this] { return Ended(); }));
  EXPECT_TRUE(Eventually(
      [&] { return !Alive(keeper) && !Alive(activated->activated().workers(0).pid()); }));
}

TEST_F(AgentTest, TwoAgentsDoNotShareANode) {
  StartAgent();
  ASSERT_TRUE(Registration());
  fs::path output;
  const int second =
      Spawn({std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-agent", "--node", "n1",
             "--state-dir", state_.string(), "--controller", controller_->address()},
            &output);
  int status = 0;
  ASSERT_EQ(waitpid(second, &status, 0), second);
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_NE(Read(output).find("another agent (pid " + std::to_string(agent_) + ")"),
            std::string::npos)
      << Read(output);
}

TEST_F(AgentTest, BadCommandLinesNameWhatIsWrong) {
  const struct {
    std::vector<std::string> args;
    std::string text;
  } cases[] = {
      {{"--node", "n1"}, "--state-dir"},
      {{"--node", "Bad Name", "--state-dir", "/tmp/x"}, "[a-z0-9.-]{1,63}"},
      {{"--node", "n1", "--state-dir", "/tmp/" + std::string(120, 'x')}, "107"},
      {{"--node", "n1", "--state-dir", "/tmp/x", "--controller", "nowhere"}, "host:port"},
      {{"--node", "n1", "--state-dir", "/tmp/x", "--frobnicate"}, "--frobnicate"},
  };
  for (const auto& c : cases) {
    std::vector<std::string> args = {EVERSTEP_BINARY_DIR "/bin/everstep-agent"};
    args.insert(args.end(), c.args.begin(), c.args.end());
    fs::path output;
    const int pid = Spawn(args, &output);
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(WEXITSTATUS(status), 2) << c.text;
    EXPECT_NE(Read(output).find(c.text), std::string::npos) << Read(output);
  }
}

TEST_F(AgentTest, StaysSmall) {
  StartAgent();
  ASSERT_TRUE(Registration());
  ASSERT_TRUE(RunGeneration(1, Shell(kSleeper)));
  const std::string status = Read("/proc/" + std::to_string(agent_) + "/status");
  const auto at = status.find("VmRSS:");
  ASSERT_NE(at, std::string::npos);
  const int kib = std::atoi(status.c_str() + at + 6);
  RecordProperty("resident_kib", kib);
  std::printf("resident memory of the agent: %d KiB\n", kib);
#if !defined(__SANITIZE_ADDRESS__)
  EXPECT_LT(kib, 30 * 1024);
#endif
}

}  // namespace
}  // namespace everstep::test
