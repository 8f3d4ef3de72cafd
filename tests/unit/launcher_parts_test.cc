// The parts a run is made of: the job it hands in, the directory it takes, the programs it starts,
// what it tells.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "worker/launcher/endpoint.h"
#include "worker/launcher/job_spec.h"
#include "worker/launcher/machine.h"
#include "worker/launcher/process.h"
#include "worker/launcher/state_dir.h"
#include "worker/launcher/story.h"

namespace everstep::launcher {
namespace {

namespace fs = std::filesystem;

bool Has(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

class Folder : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "launcher_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string folder_;
};

LaunchFlags Flags(std::vector<std::string> arguments, const Environment& environment = {}) {
  arguments.insert(arguments.end(), {"dir/train.py", "--lr", "1"});
  const ParseResult parsed = ParseFlags(arguments, environment);
  EXPECT_EQ(parsed.kind, ParseKind::kRun) << parsed.error;
  return parsed.flags;
}

v1::JobSpec SpecOf(const LaunchFlags& flags, SubmitterFacts facts = {}) {
  facts.cwd = "/home/me";
  facts.python = "/usr/bin/python3";
  facts.random = "abc123";
  v1::JobSpec spec;
  EXPECT_EQ(MakeJobSpec(flags, facts, &spec), "");
  return spec;
}

// --- the job ---

TEST(JobSpec, ItsNameIsTheUsersElseTheRendezvousIdElseMade) {
  EXPECT_EQ(JobName(Flags({"--name", "mine", "--rdzv-id", "r"}), "abc"), "mine");
  EXPECT_EQ(JobName(Flags({"--rdzv-id", "r7"}), "abc"), "r7");
  EXPECT_EQ(JobName(Flags({}), "abc"), "train-abc");
  EXPECT_EQ(JobName(Flags({"--rdzv-id", "has space"}), "abc"), "train-abc");
  EXPECT_EQ(JobName(Flags({"--standalone", "--rdzv-id", "r7"}), "abc"), "train-abc");
}

TEST(JobSpec, OnlyAGivenZeroIsStrict) {
  EXPECT_FALSE(SpecOf(Flags({"--standalone"})).strict_restarts());
  EXPECT_TRUE(SpecOf(Flags({"--standalone", "--max-restarts", "0"})).strict_restarts());
  EXPECT_FALSE(SpecOf(Flags({"--standalone", "--max-restarts", "3"})).strict_restarts());
}

TEST(JobSpec, AChosenPortIsTheStoresWithOneNodeAndTheControllersWithMore) {
  EXPECT_EQ(SpecOf(Flags({"--master-port", "29512"})).master_port(), 29512U);
  EXPECT_EQ(SpecOf(Flags({"--master-port", "29512", "--nnodes", "2"})).master_port(), 0U);
  EXPECT_EQ(SpecOf(Flags({"--standalone", "--master-port", "29512"})).master_port(), 0U);
}

TEST(JobSpec, TimesComeFromTheRendezvousConfiguration) {
  const v1::JobSpec spec = SpecOf(Flags({"--rdzv-conf", "join_timeout=2.5,last_call_timeout=3"}));
  EXPECT_EQ(spec.join_timeout_ms(), 2500U);
  EXPECT_EQ(spec.last_call_ms(), 3000U);
  EXPECT_EQ(SpecOf(Flags({})).join_timeout_ms(), kDefaultJoinTimeoutMs);
}

TEST(JobSpec, ARelativeLogDirectoryIsOfTheSubmittersFolder) {
  EXPECT_EQ(SpecOf(Flags({"--log-dir", "../logs"})).command().log_dir(), "/home/logs");
}

TEST(JobSpec, AShortShutdownTimeoutShortensTheGraceOfARestart) {
  const v1::JobSpec spec = SpecOf(Flags({"--shutdown-timeout", "0"}));
  EXPECT_EQ(spec.command().stop_grace_ms(), 0U);
  EXPECT_EQ(spec.command().restart_grace_ms(), 0U);
}

TEST(JobSpec, AnEnvironmentBeyondTheLimitIsRefusedWithBothNumbers) {
  SubmitterFacts facts;
  facts.environment["BIG"] = std::string(kMaxEnvironmentBytes, 'x');
  v1::JobSpec spec;
  const std::string wrong = MakeJobSpec(Flags({}), facts, &spec);
  EXPECT_TRUE(Has(wrong, "1048581 bytes")) << wrong;
  EXPECT_TRUE(Has(wrong, "at most 1048576")) << wrong;
}

TEST(JobSpec, SeveralWorkersGetOneThreadEachUnlessTheUserChose) {
  SubmitterFacts facts;
  facts.workers = 2;
  EXPECT_EQ(SpecOf(Flags({}), facts).command().env().at("OMP_NUM_THREADS"), "1");
  facts.environment["OMP_NUM_THREADS"] = "3";
  EXPECT_EQ(SpecOf(Flags({}), facts).command().env().at("OMP_NUM_THREADS"), "3");
  facts.environment.clear();
  facts.workers = 1;
  EXPECT_EQ(SpecOf(Flags({}), facts).command().env().count("OMP_NUM_THREADS"), 0U);
}

TEST(JobSpec, JsonKeepsTheEnvironmentToItself) {
  SubmitterFacts facts;
  facts.environment["TOKEN"] = "secret";
  const std::string json = JobSpecJson(SpecOf(Flags({}), facts));
  EXPECT_FALSE(Has(json, "secret"));
  EXPECT_TRUE(Has(json, "dir/train.py"));
}

// --- the machine ---

TEST(Machine, DevicesAreCountedAsTheDriverCountsThem) {
  EXPECT_EQ(VisibleDevices("0,1", 4), 2U);
  EXPECT_EQ(VisibleDevices("0,9,1", 4), 1U);  // the list ends at what is not there
  EXPECT_EQ(VisibleDevices("-1", 4), 0U);
  EXPECT_EQ(VisibleDevices("", 4), 0U);
  EXPECT_EQ(VisibleDevices("GPU-1f,GPU-2e", 4), 2U);
}

TEST_F(Folder, TheInterpreterIsTheUsers) {
  const std::string venv = folder_ + "/venv";
  fs::create_directories(venv + "/bin");
  const std::string python = venv + "/bin/python";
  std::ofstream(python) << "#!/bin/sh\n";
  fs::permissions(python, fs::perms::owner_all);
  std::string error;
  EXPECT_EQ(FindPython({{"VIRTUAL_ENV", venv}}, "/nowhere/everstep-run", &error), python);
  EXPECT_EQ(FindPython({{"PYTHON_EXEC", python}}, "/nowhere/everstep-run", &error), python);
  EXPECT_EQ(FindPython({{"PYTHON_EXEC", "/no/python"}}, "/nowhere/everstep-run", &error), "");
  EXPECT_TRUE(Has(error, "PYTHON_EXEC=/no/python")) << error;
}

// --- the state directory ---

TEST_F(Folder, AStateDirectoryServesOneRun) {
  StateDir first;
  StateDir second;
  EXPECT_EQ(first.Open(folder_ + "/s", "n1", {}, "r"), "");
  EXPECT_TRUE(fs::is_directory(first.node_dir()));
  EXPECT_TRUE(Has(second.Open(folder_ + "/s", "n1", {}, "r"), "in use by another run"));
  second.Clean();  // not its own: nothing goes
  EXPECT_TRUE(fs::is_directory(first.node_dir()));
}

TEST_F(Folder, WhatACutOffRunLeftIsClearedWhatAClusterHasIsNot) {
  {
    StateDir run;
    ASSERT_EQ(run.Open(folder_ + "/s", "n1", {}, "r"), "");
    std::ofstream(run.controller() + "/db") << "old";
  }
  StateDir again;
  ASSERT_EQ(again.Open(folder_ + "/s", "n1", {}, "r"), "");
  EXPECT_FALSE(fs::exists(again.controller() + "/db"));

  fs::create_directories(folder_ + "/c/controller");
  StateDir cluster;
  EXPECT_TRUE(Has(cluster.Open(folder_ + "/c", "n1", {}, "r"), "cluster"));
}

TEST_F(Folder, ATemporaryOneIsTakenAway) {
  StateDir run;
  ASSERT_EQ(run.Open("", "n1", {{"TMPDIR", folder_}}, "abc"), "");
  EXPECT_EQ(run.path(), folder_ + "/everstep-abc");
  run.Clean();
  EXPECT_FALSE(fs::exists(run.path()));
}

TEST_F(Folder, ALongPathIsRefusedWithTheLimit) {
  StateDir run;
  const std::string wrong = run.Open(folder_ + "/" + std::string(100, 'd'), "n1", {}, "r");
  EXPECT_TRUE(Has(wrong, "107")) << wrong;
  EXPECT_TRUE(Has(wrong, "--state-dir")) << wrong;
}

// --- processes ---

TEST_F(Folder, AProcessIsStartedWatchedAndReaped) {
  Process process;
  ASSERT_EQ(
      process.Start({.argv = {"/bin/sh", "-c", "echo said; exit 3"}, .output = folder_ + "/out"}),
      "");
  const auto status = process.Wait(std::chrono::seconds(10));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(StatusText(*status), "exited with code 3");
  EXPECT_FALSE(process.running());
  EXPECT_EQ(LastLines(folder_ + "/out", 3), "said");
}

TEST_F(Folder, AProgramThatIsNotThereIsAnErrorAtTheStart) {
  Process process;
  const std::string wrong =
      process.Start({.argv = {"/nowhere/program"}, .output = folder_ + "/out"});
  EXPECT_TRUE(Has(wrong, "/nowhere/program")) << wrong;
  EXPECT_TRUE(Has(wrong, "No such file")) << wrong;
  EXPECT_FALSE(process.running());
}

TEST_F(Folder, AProcessDoesNotOutliveItsOwner) {
  pid_t pid = 0;
  {
    Process process;
    ASSERT_EQ(process.Start({.argv = {"/bin/sleep", "1000"}, .output = folder_ + "/out"}), "");
    pid = process.pid();
  }
  EXPECT_EQ(::kill(pid, 0), -1);
}

TEST_F(Folder, APidFileOfAnotherProgramSignalsNobody) {
  Process process;
  ASSERT_EQ(process.Start({.argv = {"/bin/sleep", "1000"}, .output = folder_ + "/out"}), "");
  std::ofstream(folder_ + "/pid") << process.pid() << "\n";
  EXPECT_FALSE(SignalByPidFile(folder_ + "/pid", "everstep-keeper", SIGKILL));
  EXPECT_FALSE(process.Reap().has_value());
  EXPECT_TRUE(SignalByPidFile(folder_ + "/pid", "sleep", SIGKILL));
  const auto status = process.Wait(std::chrono::seconds(10));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(StatusText(*status), "was ended by signal 9 (SIGKILL)");
  EXPECT_FALSE(SignalByPidFile(folder_ + "/absent", "sleep", SIGKILL));
}

TEST_F(Folder, TheLastLinesOfALogAreItsEnd) {
  std::ofstream(folder_ + "/log") << "a\nb\nc\nd\n";
  EXPECT_EQ(LastLines(folder_ + "/log", 2), "c\nd");
  EXPECT_EQ(LastLines(folder_ + "/log", 9), "a\nb\nc\nd");
  EXPECT_EQ(LastLines(folder_ + "/absent", 9), "");
}

// --- endpoints ---

TEST(Endpoint, IsReadAsTorchrunReadsIt) {
  const Endpoint c10d =
      FindEndpoint(Flags({"--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1"}));
  EXPECT_EQ(c10d.text(), "127.0.0.1:29400");
  EXPECT_TRUE(c10d.here);
  EXPECT_TRUE(c10d.loopback);
  const Endpoint node1 =
      FindEndpoint(Flags({"--nnodes", "2", "--node-rank", "1", "--master-port", "7000"}));
  EXPECT_EQ(node1.text(), "127.0.0.1:7000");
  EXPECT_FALSE(node1.here);
  const Endpoint told = FindEndpoint(Flags({"--rdzv-backend", "c10d", "--rdzv-endpoint",
                                            "127.0.0.1:7000", "--rdzv-conf", "is_host=false"}));
  EXPECT_FALSE(told.here);
}

TEST(Endpoint, ErrorsNameTheFlag) {
  EXPECT_TRUE(Has(FindEndpoint(Flags({"--rdzv-backend", "c10d"})).error, "--rdzv-endpoint"));
  EXPECT_TRUE(
      Has(FindEndpoint(Flags({"--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:x"})).error,
          "the port must be a number"));
}

TEST(Endpoint, SplitsHostAndPort) {
  std::string host;
  std::uint16_t port = 0;
  EXPECT_TRUE(SplitHostPort("[::1]:80", &host, &port));
  EXPECT_EQ(host, "::1");
  EXPECT_EQ(port, 80);
  for (const char* bad : {"host", ":80", "host:", "host:99999", "host:8x"}) {
    EXPECT_FALSE(SplitHostPort(bad, &host, &port)) << bad;
  }
}

TEST(Endpoint, AProbeTellsAListenerFromARefusal) {
  const int listener = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  ASSERT_EQ(::bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
  ASSERT_EQ(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
  const std::uint16_t port = ntohs(address.sin_port);
  EXPECT_EQ(ProbeTcp("127.0.0.1", port, 1000), Probe::kRefused);
  ASSERT_EQ(::listen(listener, 1), 0);
  EXPECT_EQ(ProbeTcp("127.0.0.1", port, 1000), Probe::kListens);
  ::close(listener);
}

// --- the story ---

v1::JobStatus Running() {
  v1::JobStatus status;
  status.set_job("j");
  status.set_state("RUNNING");
  status.set_generation(1);
  status.set_nodes(1);
  status.set_world_size(2);
  status.set_step(-1);
  status.set_committed_step(-1);
  return status;
}

TEST(Story, AFaultIsToldOnceAndItsRecoveryOnce) {
  Story story;
  EXPECT_TRUE(story.News(Running()).empty());
  v1::JobStatus status = Running();
  v1::FaultStatus* fault = status.add_faults();
  fault->set_id(1);
  fault->set_subject("rank 1 on n1");
  fault->set_reason("worker_killed");
  fault->set_evidence("signal=9");
  fault->set_action("restart in place");
  fault->set_recovery_seconds(-1);
  EXPECT_EQ(story.News(status),
            std::vector<std::string>{"rank 1 on n1: worker_killed (signal=9); restart in place"});
  EXPECT_TRUE(story.News(status).empty());
  fault->set_recovery_seconds(0.123);
  fault->set_generation_after(2);
  fault->set_step_after(-1);
  EXPECT_EQ(story.News(status),
            std::vector<std::string>{"rank 1 on n1: recovered in 0.12 s, generation 2"});
  EXPECT_TRUE(story.News(status).empty());
}

TEST(Story, TheFirstWaitIsNoNewsALaterOneIs) {
  Story story;
  v1::JobStatus status = Running();
  status.set_state("WAITING");
  status.set_generation(0);
  status.set_nodes(0);
  status.set_min_nodes(2);
  EXPECT_TRUE(story.News(status).empty());
  status.set_nodes(1);
  EXPECT_EQ(story.News(status), std::vector<std::string>{"waiting for nodes: 1 of 2"});
}

TEST(Story, EnoughNodesAreNoWait) {
  Story story;
  v1::JobStatus status = Running();
  status.set_state("WAITING");
  status.set_generation(0);
  status.set_min_nodes(1);
  status.set_message("0 of at least 1 nodes");
  EXPECT_TRUE(story.News(status).empty());
  status.set_message("1 of at least 1 nodes");
  EXPECT_TRUE(story.News(status).empty());
  status.set_generation(3);
  status.set_message("0 of at least 1 nodes");
  EXPECT_EQ(story.News(status),
            std::vector<std::string>{"waiting for nodes: 0 of at least 1 nodes"});
}

TEST(Story, TheLiveLineSaysHowTheJobStands) {
  v1::JobStatus status = Running();
  EXPECT_EQ(LiveLine(status), "everstep: j RUNNING  2 workers on 1 node  generation 1");
  status.set_step(120);
  status.set_committed_step(119);
  status.add_faults()->set_id(1);
  status.set_seconds_lost(0.4);
  EXPECT_EQ(LiveLine(status),
            "everstep: j RUNNING  2 workers on 1 node  generation 1  step 120 (119 safe)  1 fault, "
            "0.40 s lost");
}

TEST(Story, LinesFromElsewhereAreShownByTheSameFlags) {
  v1::JobLogLines lines;
  lines.set_rank(3);
  lines.set_data("one\ntwo\n");
  EXPECT_EQ(ShownLines(Flags({}), 2, lines), "one\ntwo\n");
  EXPECT_EQ(ShownLines(Flags({"-t", "1"}), 2, lines), "[default3]:one\n[default3]:two\n");
  EXPECT_EQ(ShownLines(Flags({"-r", "1:1"}), 2, lines), "");
  EXPECT_EQ(ShownLines(Flags({"--local-ranks-filter", "0"}), 2, lines), "");
  EXPECT_EQ(ShownLines(Flags({"--local-ranks-filter", "1"}), 2, lines), "one\ntwo\n");
}

TEST(Story, TimesAreTorchruns) {
  ::setenv("TZ", "UTC", 1);  // NOLINT(concurrency-mt-unsafe): one thread
  ::tzset();
  EXPECT_EQ(LocalTime("2026-01-31T14:02:11.482Z"), "2026-01-31_14:02:11");
  EXPECT_EQ(LocalTime("soon"), "soon");
}

}  // namespace
}  // namespace everstep::launcher
