// proto/base: names, addresses, small files and what the kernel says of a process.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "proto/base/endpoint.h"
#include "proto/base/file_lock.h"
#include "proto/base/names.h"
#include "proto/base/process_stat.h"
#include "proto/base/whole_file.h"

namespace everstep {
namespace {

namespace fs = std::filesystem;

TEST(IsLoopback, KnowsEveryWayToWriteThisMachine) {
  const struct {
    const char* address;
    bool loopback;
  } table[] = {
      {"127.0.0.1", true},
      {"127.0.0.1:7700", true},
      {"127.3.2.1:0", true},
      {"localhost", true},
      {"localhost:1", true},
      {"::1", true},
      {"[::1]", true},
      {"[::1]:7700", true},
      {"unix:/run/everstep.sock", true},
      {"unix:relative", true},
      {"", false},
      {":7700", false},
      {"0.0.0.0:1", false},
      {"10.0.0.1", false},
      {"[::]:1", false},
      {"[::1", false},
      {"2001:db8::1", false},
      {"[2001:db8::1]:1", false},
      {"128.0.0.1", false},
      {"127.0.0", false},
      {"127.example.com:1", false},
      {"127.0.0.1.evil", false},
      {"localhost.evil:1", false},
      {"mylocalhost", false},
  };
  for (const auto& row : table) EXPECT_EQ(IsLoopback(row.address), row.loopback) << row.address;
}

TEST(Names, JobsAndNodes) {
  const struct {
    const char* name;
    bool safe, job, node;
  } table[] = {
      {"n1", true, true, true},       {"run-7_a.b", true, true, false},
      {"Run", true, true, false},     {"a.b-c", true, true, true},
      {".hidden", true, false, true}, {"", false, false, false},
      {".", false, false, false},     {"..", false, false, false},
      {"a/b", false, false, false},   {"a b", false, false, false},
      {"x\n", false, false, false},   {"\xc3\xa9", false, false, false},
  };
  for (const auto& row : table) {
    EXPECT_EQ(IsSafeName(row.name), row.safe) << row.name;
    EXPECT_EQ(IsJobName(row.name), row.job) << row.name;
    EXPECT_EQ(IsNodeName(row.name), row.node) << row.name;
  }
  EXPECT_TRUE(IsJobName(std::string(128, 'a')));
  EXPECT_FALSE(IsJobName(std::string(129, 'a')));
  EXPECT_TRUE(IsNodeName(std::string(63, 'a')));
  EXPECT_FALSE(IsNodeName(std::string(64, 'a')));
}

class WholeFile : public testing::Test {
 protected:
  WholeFile() {
    char name[] = "/tmp/everstep_whole_XXXXXX";
    dir_ = mkdtemp(name);
  }
  ~WholeFile() override { fs::remove_all(dir_); }
  std::string Read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::size_t Files() {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(dir_), {}));
  }
  std::string dir_;
};

TEST_F(WholeFile, ReplacesWhatWasThere) {
  const std::string path = dir_ + "/f";
  EXPECT_EQ(WriteWhole(path, "one"), 0);
  EXPECT_EQ(Read(path), "one");
  EXPECT_EQ(WriteWhole(path, std::string("t\0o", 3), Durable::kYes), 0);
  EXPECT_EQ(Read(path), std::string("t\0o", 3));
  EXPECT_EQ(WriteWhole(path, ""), 0);
  EXPECT_EQ(Read(path), "");
  EXPECT_EQ(Files(), 1u) << "nothing lies beside it";
}

// A limit on a file's size refuses in the middle of the write, as a full disk does.
TEST_F(WholeFile, WhatDoesNotFitLeavesTheOldOneAndNothingBeside) {
  const std::string path = dir_ + "/f";
  ASSERT_EQ(WriteWhole(path, "old"), 0);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const int error = WriteWhole(path, std::string(2000, 'x'));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(error, EFBIG);
  EXPECT_EQ(Read(path), "old");
  EXPECT_EQ(Files(), 1u);
  EXPECT_EQ(CannotWrite(path, ENOSPC), "cannot write " + path + ": No space left on device");
}

TEST_F(WholeFile, ADirectoryInTheWayOrMissingIsNamed) {
  fs::create_directories(dir_ + "/d/inside");
  EXPECT_EQ(WriteWhole(dir_ + "/d", "x"), EISDIR);
  EXPECT_EQ(Files(), 1u);
  EXPECT_EQ(WriteWhole(dir_ + "/none/f", "x"), ENOENT);
}

TEST_F(WholeFile, ALockIsWaitedForAsLongAsItsHolderDies) {
  const std::string path = dir_ + "/lock";
  const auto opened = [&path] { return open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600); };
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t holder = fork();
  ASSERT_GE(holder, 0);
  if (holder == 0) {
    const bool locked = LockFile(opened(), {});
    if (write(ready[1], locked ? "y" : "n", 1) == 1) pause();
    _exit(1);
  }
  char answer = '?';
  ASSERT_EQ(read(ready[0], &answer, 1), 1);
  ASSERT_EQ(answer, 'y');
  const int fd = opened();
  EXPECT_FALSE(LockFile(fd, Milliseconds(30)));
  EXPECT_EQ(errno, EWOULDBLOCK);
  ASSERT_EQ(kill(holder, SIGKILL), 0);  // and nobody waits for its end
  EXPECT_TRUE(LockFile(fd, kLockPatience));
  ASSERT_EQ(waitpid(holder, nullptr, 0), holder);
  EXPECT_FALSE(LockFile(-1, kLockPatience));
  EXPECT_EQ(errno, EBADF);
  for (const int each : {fd, ready[0], ready[1]}) close(each);
}

TEST(ProcessStat, ANameMayHoldAnything) {
  const auto stat = ParseProcessStat(
      "4711 (a) R (b) c) T 12 4711 4710 0 -1 4194304 1 2 3 4 50 7 0 0 20 0 9 0 123456 1000 5 1 1");
  ASSERT_TRUE(stat);
  EXPECT_EQ(stat->name, "a) R (b) c");
  EXPECT_EQ(stat->state, 'T');
  EXPECT_FALSE(stat->dead());
  EXPECT_EQ(stat->parent, 12);
  EXPECT_EQ(stat->group, 4711);
  EXPECT_EQ(stat->session, 4710);
  EXPECT_EQ(stat->cpu_ticks, 57);
  EXPECT_EQ(stat->threads, 9);
  EXPECT_EQ(stat->start_time, 123456u);
}

TEST(ProcessStat, HalfALineIsNone) {
  for (const char* line : {"", "4711", "4711 (x", ")(", "4711 (x)", "4711 (x) R 1 2 3",
                           "4711 (x) R 1 2 3 0 -1 4194304 1 2 3 4 50 7 0 0 20 0 9 0 "}) {
    EXPECT_FALSE(ParseProcessStat(line)) << line;
  }
}

TEST(ProcessStat, OfThisProcessAndOfOneThatEnded) {
  const auto own = ReadProcessStat(getpid());
  ASSERT_TRUE(own);
  EXPECT_EQ(own->state, 'R');
  EXPECT_EQ(own->parent, getppid());
  EXPECT_EQ(own->session, getsid(0));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(0);
  siginfo_t ended{};
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOWAIT), 0);
  const auto zombie = ReadProcessStat(child);
  ASSERT_TRUE(zombie);
  EXPECT_TRUE(zombie->dead());
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_FALSE(ReadProcessStat(child));
  EXPECT_FALSE(ReadProcessStat(0));
}

}  // namespace
}  // namespace everstep
