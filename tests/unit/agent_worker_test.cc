// What a worker is given by its agent: environment, arguments, log files.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "worker/agent/log_index.h"
#include "worker/agent/log_layout.h"
#include "worker/agent/worker_env.h"

namespace everstep::agent {
namespace {

namespace fs = std::filesystem;

WorkerIdentity Second() {
  WorkerIdentity id;
  id.rank = 3;
  id.local_rank = 1;
  id.role_rank = 3;
  id.group_rank = 1;
  id.world_size = 4;
  id.group_world_size = 2;
  id.local_world_size = 2;
  id.master_addr = "127.0.0.1";
  id.master_port = 29511;
  id.restart_count = 2;
  id.max_restarts = 3;
  id.run_id = "run7";
  id.error_file = "/tmp/e/error.json";
  id.job = "j";
  id.node = "n2";
  id.generation = 9;
  id.keeper_socket = "/tmp/k.sock";
  id.holders = 2;
  return id;
}

TEST(WorkerEnvironment, IsTorchrunsBlockAndOurFive) {
  const Environment expected = {
      {"EVERSTEP_GENERATION", "9"},
      {"EVERSTEP_HOLDERS", "2"},
      {"EVERSTEP_JOB", "j"},
      {"EVERSTEP_KEEPER", "/tmp/k.sock"},
      {"EVERSTEP_NODE", "n2"},
      {"GROUP_RANK", "1"},
      {"GROUP_WORLD_SIZE", "2"},
      {"LOCAL_RANK", "1"},
      {"LOCAL_WORLD_SIZE", "2"},
      {"MASTER_ADDR", "127.0.0.1"},
      {"MASTER_PORT", "29511"},
      {"OMP_NUM_THREADS", "1"},
      {"RANK", "3"},
      {"ROLE_NAME", "default"},
      {"ROLE_RANK", "3"},
      {"ROLE_WORLD_SIZE", "4"},
      {"TORCHELASTIC_ERROR_FILE", "/tmp/e/error.json"},
      {"TORCHELASTIC_MAX_RESTARTS", "3"},
      {"TORCHELASTIC_RESTART_COUNT", "2"},
      {"TORCHELASTIC_RUN_ID", "run7"},
      {"TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"},
      {"TORCHELASTIC_USE_AGENT_STORE", "True"},
      {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"},
      {"WORLD_SIZE", "4"},
  };
  EXPECT_EQ(WorkerEnvironment({}, Second()), expected);
}

TEST(WorkerEnvironment, TheSubmittersChoicesStayAndTheBlockWinsOverLeftovers) {
  const Environment env = WorkerEnvironment({{"OMP_NUM_THREADS", "6"},
                                             {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"},
                                             {"CUDA_VISIBLE_DEVICES", "4,5"},
                                             {"RANK", "77"},
                                             {"HOME", "/home/u"}},
                                            Second());
  EXPECT_EQ(env.at("OMP_NUM_THREADS"), "6");
  EXPECT_EQ(env.at("TORCH_NCCL_ASYNC_ERROR_HANDLING"), "3");
  EXPECT_EQ(env.at("CUDA_VISIBLE_DEVICES"), "4,5");
  EXPECT_EQ(env.at("RANK"), "3");
  EXPECT_EQ(env.at("HOME"), "/home/u");
}

TEST(WorkerEnvironment, OneWorkerPerNodeKeepsAllThreads) {
  WorkerIdentity id = Second();
  id.local_world_size = 1;
  EXPECT_EQ(WorkerEnvironment({}, id).count("OMP_NUM_THREADS"), 0u);
}

TEST(WorkerEnvironment, AVirtualLocalRankSeesItsOneDeviceAsDeviceZero) {
  WorkerIdentity id = Second();
  id.virtual_local_rank = true;
  Environment env = WorkerEnvironment({{"CUDA_VISIBLE_DEVICES", "4, 5"}}, id);
  EXPECT_EQ(env.at("LOCAL_RANK"), "0");
  EXPECT_EQ(env.at("CUDA_VISIBLE_DEVICES"), "5");
  EXPECT_EQ(WorkerEnvironment({}, id).at("CUDA_VISIBLE_DEVICES"), "1");
  const std::string one = "4";
  EXPECT_EQ(VisibleDevice(&one, 1), "") << "there is no second device";
}

TEST(ExpandLocalRank, FollowsPythonsSafeSubstitute) {
  EXPECT_EQ(ExpandLocalRank("--log=r${local_rank}.txt", 3), "--log=r3.txt");
  EXPECT_EQ(ExpandLocalRank("$local_rank/$local_rank", 0), "0/0");
  EXPECT_EQ(ExpandLocalRank("$local_ranks", 1), "$local_ranks");
  EXPECT_EQ(ExpandLocalRank("$$local_rank costs 5$ ${HOME}", 1), "$local_rank costs 5$ ${HOME}");
  EXPECT_EQ(ExpandLocalRank("", 1), "");
  EXPECT_EQ(ExpandLocalRank("$", 1), "$");
}

TEST(LogLayout, OneDirectoryForEachGenerationAndLocalRank) {
  const std::string root = JobLogRoot("/s/nodes/n1", "", "j", "n1");
  EXPECT_EQ(root, "/s/nodes/n1/jobs/j");
  EXPECT_EQ(WorkerLogPaths(root, 4, 1).error_json, "/s/nodes/n1/jobs/j/attempt_3/1/error.json");
  EXPECT_EQ(JobLogRoot("/s/nodes/n1", "/logs", "j", "n1"), "/logs/j_n1");
}

class LogDirectory : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "agent_logs_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  std::string root_;
};

TEST_F(LogDirectory, AnErrorFileOfAnEarlierTryDoesNotSpeakForThisOne) {
  const LogPaths paths = WorkerLogPaths(root_, 1, 0);
  std::string error;
  ASSERT_TRUE(MakeLogDirectory(paths, &error)) << error;
  std::ofstream(paths.error_json) << "{}";
  ASSERT_TRUE(MakeLogDirectory(paths, &error)) << error;
  EXPECT_FALSE(std::filesystem::exists(paths.error_json));
}

TEST_F(LogDirectory, AFileInTheWayIsNamed) {
  std::ofstream(root_ + "/attempt_0") << "in the way";
  std::string error;
  EXPECT_FALSE(MakeLogDirectory(WorkerLogPaths(root_, 1, 0), &error));
  EXPECT_NE(error.find(root_ + "/attempt_0/0"), std::string::npos) << error;
}

TEST_F(LogDirectory, OnlyTheNewestAttemptsAreKept) {
  std::string error;
  for (Generation g : {2, 9, 10, 11}) {
    ASSERT_TRUE(MakeLogDirectory(WorkerLogPaths(root_, g, 0), &error)) << error;
  }
  std::filesystem::create_directories(root_ + "/attempt_mine");
  EXPECT_EQ(PruneAttempts(root_, 2), 2u);
  EXPECT_FALSE(std::filesystem::exists(root_ + "/attempt_8"));
  EXPECT_TRUE(std::filesystem::exists(root_ + "/attempt_9"));
  EXPECT_TRUE(std::filesystem::exists(root_ + "/attempt_mine"));
  EXPECT_EQ(PruneAttempts(root_ + "/absent", 2), 0u);
}

TEST_F(LogDirectory, AJobsNewestOutputIsFoundAfterTheJob) {
  EXPECT_EQ(ReadLogIndex(root_, "j").generation, 0u);
  WriteLogIndex(root_, "j", {"/logs/j_n1", 3, {{0, 4}, {1, 5}}});
  const LogIndex index = ReadLogIndex(root_, "j");
  EXPECT_EQ(index.root, "/logs/j_n1");
  EXPECT_EQ(index.generation, 3u);
  EXPECT_EQ(index.workers, (std::vector<std::pair<std::int32_t, Rank>>{{0, 4}, {1, 5}}));
  std::ofstream(root_ + "/jobs/j/last") << "\nx\n";
  EXPECT_EQ(ReadLogIndex(root_, "j").generation, 0u);
}

TEST_F(LogDirectory, OnlyTheNewestJobsAreKeptAndThoseThatRun) {
  for (const char* job : {"a", "b", "c", "d"}) WriteLogIndex(root_, job, {"/x", 1, {}});
  const auto now = fs::file_time_type::clock::now();
  int age = 4;
  for (const char* job : {"a", "b", "c", "d"}) {
    fs::last_write_time(root_ + "/jobs/" + job + "/last", now - std::chrono::hours(age--));
  }
  EXPECT_EQ(PruneJobs(root_, {"a"}, 1), 2u);
  EXPECT_TRUE(fs::exists(root_ + "/jobs/a")) << "it runs";
  EXPECT_FALSE(fs::exists(root_ + "/jobs/b"));
  EXPECT_TRUE(fs::exists(root_ + "/jobs/d"));
}

}  // namespace
}  // namespace everstep::agent
