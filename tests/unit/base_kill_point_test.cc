// A kill point dies where it is armed, at the hit it is armed for, and is nothing but a load where
// the page is missing or not to be trusted.
#include "proto/base/kill_point.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <string>

namespace everstep {
namespace {

class KillPointTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = testing::TempDir() + "kill_page_" + std::to_string(getpid());
    const int fd = open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(ftruncate(fd, sizeof(KillPage)), 0);
    void* map = mmap(nullptr, sizeof(KillPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    ASSERT_NE(map, MAP_FAILED);
    page_ = static_cast<KillPage*>(map);
    void* shared =
        mmap(nullptr, sizeof *rounds_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(shared, MAP_FAILED);
    rounds_ = static_cast<std::atomic<int>*>(shared);
    std::memcpy(page_->magic, kKillPageMagic, sizeof kKillPageMagic);
  }
  void TearDown() override {
    munmap(page_, sizeof(KillPage));
    munmap(rounds_, sizeof *rounds_);
    unlink(path_.c_str());
  }
  void Arm(const char* label, int hit) {
    std::strncpy(page_->label, label, sizeof page_->label - 1);
    page_->countdown.store(hit);
  }
  // Three hits of each of two points in a child; how it ended (waitpid's status) and its pid.
  int Run(pid_t* child = nullptr, const std::function<void()>& first = {}) {
    const pid_t pid = fork();
    if (pid == 0) {
      Name(path_.c_str());
      if (first) first();
      for (int i = 0; i < 3; ++i) {
        KillPoint("test.one");
        KillPoint("test.two");
        rounds_->store(i + 1);
      }
      _exit(0);
    }
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    if (child != nullptr) *child = pid;
    return status;
  }
  // Null: the environment names no page. A child has one thread.
  // NOLINTBEGIN(concurrency-mt-unsafe)
  static void Name(const char* page) {
    page == nullptr ? unsetenv("EVERSTEP_KILL_POINTS") : setenv("EVERSTEP_KILL_POINTS", page, 1);
  }
  // NOLINTEND(concurrency-mt-unsafe)
  static bool Killed(int status) { return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL; }
  static bool Lived(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

  std::string path_;
  KillPage* page_ = nullptr;
  std::atomic<int>* rounds_ = nullptr;  // that the child ended; shared with it
};

TEST_F(KillPointTest, KillsAtTheArmedHitAndOnlyOnce) {
  Arm("test.two", 2);
  pid_t pid = 0;
  EXPECT_TRUE(Killed(Run(&pid)));
  EXPECT_EQ(rounds_->load(), 1);
  EXPECT_EQ(page_->killed_pid.load(), pid);
  EXPECT_EQ(page_->countdown.load(), 0);
  EXPECT_TRUE(Lived(Run()));
}

TEST_F(KillPointTest, LivesWhereNothingOrAnotherPointIsArmed) {
  EXPECT_TRUE(Lived(Run()));
  Arm("test.three", 1);
  EXPECT_TRUE(Lived(Run()));
  EXPECT_EQ(page_->countdown.load(), 1);
}

TEST_F(KillPointTest, AsksForTheProcessAndTheProgram) {
  Arm("test.one", 1);
  page_->only_pid = getpid();
  EXPECT_TRUE(Lived(Run()));
  page_->only_pid = 0;
  EXPECT_TRUE(Lived(Run(nullptr, [this] { page_->spared_pid = getpid(); })));
  page_->spared_pid = 0;
  std::strncpy(page_->program, "another", sizeof page_->program - 1);
  EXPECT_TRUE(Lived(Run()));
  std::memset(page_->program, 0, sizeof page_->program);
  std::strncpy(page_->program, "base_kill", sizeof page_->program - 1);
  EXPECT_TRUE(Killed(Run()));
}

TEST_F(KillPointTest, AStrayVariableKillsNothing) {
  Arm("test.one", 1);
  EXPECT_TRUE(Lived(Run(nullptr, [] { Name(nullptr); })));
  EXPECT_TRUE(Lived(Run(nullptr, [] { Name("test.one"); })));
  EXPECT_TRUE(Lived(Run(nullptr, [] { Name("/etc/passwd"); })));
  ASSERT_EQ(chmod(path_.c_str(), 0620), 0);  // others may write it
  EXPECT_TRUE(Lived(Run()));
  ASSERT_EQ(chmod(path_.c_str(), 0600), 0);
  page_->magic[0] = 'E';
  EXPECT_TRUE(Lived(Run()));
  page_->magic[0] = 'e';
  const std::string link = path_ + ".link";
  ASSERT_EQ(symlink(path_.c_str(), link.c_str()), 0);
  EXPECT_TRUE(Lived(Run(nullptr, [&link] { Name(link.c_str()); })));
  unlink(link.c_str());
  EXPECT_TRUE(Killed(Run()));
}

}  // namespace
}  // namespace everstep
