// What the console shows of the workers' log files.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "worker/launcher/log_follower.h"

namespace everstep::launcher {
namespace {

class LauncherLogs : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "everstep_logs_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(int attempt, int rank, const std::string& stream, const std::string& text) {
    const std::filesystem::path folder =
        dir_ / ("attempt_" + std::to_string(attempt)) / std::to_string(rank);
    std::filesystem::create_directories(folder);
    std::ofstream(folder / (stream + ".log"), std::ios::app) << text;
  }
  LogFollower Follow(FollowOptions options) {
    options.dir = dir_.string();
    return {std::move(options), [this](bool from_stderr, std::string_view bytes) {
              (from_stderr ? err_ : out_) += bytes;
            }};
  }

  std::filesystem::path dir_;
  std::string out_;
  std::string err_;
};

TEST_F(LauncherLogs, BytesPassAsTheyAreWritten) {
  LogFollower follower = Follow({.workers = 1});
  EXPECT_EQ(follower.Poll(), 0U);  // nothing there yet
  Write(1, 0, "stdout", "step 1\rste");
  Write(1, 0, "stderr", "warning\n");
  EXPECT_GT(follower.Poll(), 0U);
  for (int quiet = 0; quiet < kPollsForALinesEnd; ++quiet) {
    EXPECT_EQ(out_, "") << "its end may be on the way, and nobody else's line may come before it";
    EXPECT_EQ(follower.Poll(), 0U);
  }
  EXPECT_EQ(out_, "step 1\rste") << "a progress bar has no end of line";
  EXPECT_EQ(err_, "warning\n");
  Write(1, 0, "stdout", "p 2\n");
  follower.Poll();
  EXPECT_EQ(out_, "step 1\rstep 2\n");
  EXPECT_EQ(follower.Poll(), 0U);
}

// Python writes a line and its end with two calls when it is unbuffered.
TEST_F(LauncherLogs, ALineInTwoPiecesIsNotMixedWithAnothers) {
  LogFollower follower = Follow({.workers = 2});
  follower.Poll();
  Write(1, 0, "stdout", "rank 0");
  Write(1, 1, "stdout", "rank 1");
  follower.Poll();
  Write(1, 0, "stdout", " ends\n");
  Write(1, 1, "stdout", " ends\nand");
  follower.Poll();
  follower.Finish();
  EXPECT_EQ(out_, "rank 0 ends\nrank 1 ends\nand");
}

TEST_F(LauncherLogs, TeeShowsWholePrefixedLines) {
  LogFollower follower =
      Follow({.workers = 2, .tee = {.all = 3, .by_local_rank = {}}, .role = "rank"});
  Write(1, 1, "stdout", "one\ntw");
  follower.Poll();
  EXPECT_EQ(out_, "[rank1]:one\n");
  Write(1, 1, "stdout", "o\n");
  Write(1, 0, "stderr", "unfinished");
  follower.Poll();
  follower.Finish();
  EXPECT_EQ(out_, "[rank1]:one\n[rank1]:two\n");
  EXPECT_EQ(err_, "[rank0]:unfinished\n");
}

TEST_F(LauncherLogs, RedirectedAndFilteredStreamsStayInTheirFiles) {
  FollowOptions options{.workers = 3};
  options.redirects.by_local_rank = {{0, kStreamOut}};
  options.local_ranks_filter = {0, 1};
  LogFollower follower = Follow(options);
  for (int rank = 0; rank < 3; ++rank) {
    Write(1, rank, "stdout", "out" + std::to_string(rank) + "\n");
    Write(1, rank, "stderr", "err" + std::to_string(rank) + "\n");
  }
  follower.Poll();
  EXPECT_EQ(out_, "out1\n");
  EXPECT_EQ(err_, "err0\nerr1\n");
}

TEST_F(LauncherLogs, AnOldGenerationIsReadToItsEndBeforeTheNew) {
  LogFollower follower = Follow({.workers = 1});
  Write(1, 0, "stdout", "a");
  follower.Poll();
  Write(1, 0, "stdout", "b\n");
  Write(2, 0, "stdout", "c\n");
  Write(10, 0, "stdout", "d\n");
  follower.Poll();
  EXPECT_EQ(out_, "ab\nc\nd\n");
}

TEST_F(LauncherLogs, ALongLineIsCutNotKept) {
  LogFollower follower = Follow({.workers = 1, .tee = {.all = 1, .by_local_rank = {}}});
  Write(1, 0, "stdout", std::string(kMaxLine, 'x'));
  follower.Poll();
  EXPECT_GE(out_.size(), kMaxLine);
  EXPECT_EQ(out_.rfind("[default0]:x", 0), 0U);
}

TEST_F(LauncherLogs, APrefixTemplateKnowsTheRank) {
  LogFollower follower = Follow({.workers = 2,
                                 .tee = {.all = 3, .by_local_rank = {}},
                                 .role = "r",
                                 .prefix_template = "<${role_name} ${rank}/${local_rank}> ",
                                 .rank_of = [](std::int32_t local) { return local + 4; }});
  Write(1, 1, "stdout", "one\n");
  follower.Poll();
  EXPECT_EQ(out_, "<r 5/1> one\n");
}

TEST_F(LauncherLogs, PickedLinesAreCopiedToAFile) {
  LogFollower follower = Follow(
      {.workers = 1, .tee = {.all = 1, .by_local_rank = {}}, .stdout_filters = {"loss", "step"}});
  Write(1, 0, "stdout", "hello\nloss 3\nbye\nstep 4\n");
  follower.Poll();
  std::ifstream in(dir_ / "attempt_1" / "filtered_stdout.log");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}),
            "[default0]:loss 3\n[default0]:step 4\n");
  EXPECT_NE(out_.find("hello"), std::string::npos);
}

}  // namespace
}  // namespace everstep::launcher
