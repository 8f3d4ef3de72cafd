// What a keeper refuses, bounds and hands out: frames, owners, memory, arenas.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "checkpoint/store/arena_layout.h"
#include "tests/unit/keeper_harness.h"
#include "worker/keeper/attach_protocol.h"
#include "worker/keeper/framing.h"

namespace everstep::keeper {
namespace {

class KeeperProtocol : public KeeperTest {
 protected:
  OwnedFd Raw() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, socket().c_str(), sizeof(address.sun_path) - 1);
    OwnedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval limit{10, 0};
    ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    return fd;
  }

  // Everything up to the end of the stream, which must come.
  std::string ReadToEnd(int fd, std::vector<OwnedFd>* descriptors = nullptr) {
    std::string out;
    char buffer[4096];
    while (true) {
      const std::ptrdiff_t n = Receive(fd, buffer, sizeof(buffer), descriptors);
      EXPECT_GE(n, 0) << "the keeper does not close the connection";
      if (n <= 0) return out;
      out.append(buffer, static_cast<std::size_t>(n));
    }
  }

  v1::KeeperReply RefusalOf(const std::string& bytes) {
    OwnedFd fd = Raw();
    EXPECT_EQ(Send(fd.get(), bytes, {}), static_cast<std::ptrdiff_t>(bytes.size()));
    FrameReader reader(kMaxReplyBytes);
    reader.Append(ReadToEnd(fd.get()));
    std::string frame;
    v1::KeeperReply reply;
    EXPECT_EQ(reader.Pop(&frame), FrameReader::Result::kFrame);
    EXPECT_TRUE(reply.ParseFromString(frame));
    return reply;
  }

  // The keeper serves on, whatever it was told.
  void ExpectServes() { EXPECT_GT(Spawn(ShellSpawn(next_rank_++, "true")), 0); }

  std::size_t OpenDescriptors() const {
    std::size_t n = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator("/proc/" + std::to_string(keeper_pid_) + "/fd")) {
      ++n;
    }
    return n;
  }

  v1::KeeperRequest ArenaRequest(std::int32_t rank, std::uint64_t slot_bytes) {
    v1::KeeperRequest request;
    request.mutable_arena()->set_job("job");
    request.mutable_arena()->set_rank(rank);
    request.mutable_arena()->set_slot_bytes(slot_bytes);
    return request;
  }

  AttachReply Attach(std::int32_t rank, std::uint64_t generation, std::uint64_t slot_bytes,
                     std::vector<OwnedFd>* descriptors, std::uint32_t version = kAttachVersion) {
    AttachRequest request;
    std::strcpy(request.job, "job");
    request.version = version;
    request.rank = rank;
    request.generation = generation;
    request.slot_bytes = slot_bytes;
    OwnedFd fd = Raw();
    Send(fd.get(), std::string_view(reinterpret_cast<const char*>(&request), sizeof(request)), {});
    const std::string bytes = ReadToEnd(fd.get(), descriptors);
    AttachReply reply;
    EXPECT_EQ(bytes.size(), sizeof(reply));
    if (bytes.size() == sizeof(reply))
      std::memcpy(static_cast<void*>(&reply), bytes.data(), sizeof(reply));
    return reply;
  }

  std::int32_t next_rank_ = 100;
};

TEST_F(KeeperProtocol, AMalformedFrameIsRefusedWithATextAndNothingElseHappens) {
  const v1::KeeperReply garbage = RefusalOf(std::string("\x05\0\0\0\xff\xff\xff\xff\xff", 9));
  EXPECT_EQ(garbage.error(), EBADMSG);
  EXPECT_NE(garbage.message().find("no KeeperRequest"), std::string::npos) << garbage.message();
  EXPECT_NE(garbage.message().find(std::to_string(::getpid())), std::string::npos)
      << garbage.message();

  const v1::KeeperReply huge = RefusalOf(std::string("\xff\xff\xff\x7f", 4));
  EXPECT_EQ(huge.error(), EMSGSIZE);
  EXPECT_NE(huge.message().find("4194304"), std::string::npos) << huge.message();

  // A frame that never ends, and one that breaks off.
  OwnedFd slow = Raw();
  Send(slow.get(), std::string("\x40\0\0\0abc", 7), {});
  {
    OwnedFd torn = Raw();
    Send(torn.get(), std::string("\x40\0", 2), {});
  }
  ExpectServes();
}

TEST_F(KeeperProtocol, RandomBytesNeverStopIt) {
  std::uint64_t x = 42;
  for (int i = 0; i < 200; ++i) {
    OwnedFd fd = Raw();
    std::string bytes;
    for (int j = 0; j < 64; ++j)
      bytes += static_cast<char>((x = x * 6364136223846793005ULL + 1) >> 56);
    if (i % 2 == 0) bytes.replace(0, 4, std::string("\x3c\0\0\0", 4));
    Send(fd.get(), bytes, {});
  }
  ExpectServes();
  EXPECT_TRUE(Alive(keeper_pid_));
}

TEST_F(KeeperProtocol, OnlyTheOwnerCommands) {
  auto look = Connect(false);
  ASSERT_NE(look, nullptr);
  const v1::KeeperReply reply = look->Call(ShellSpawn(0, "true"), Seconds(5)).message;
  EXPECT_EQ(reply.error(), EPERM);
  EXPECT_NE(reply.message().find("agent only"), std::string::npos) << reply.message();
}

TEST_F(KeeperProtocol, ASecondAgentIsRefusedAndOneThatStoppedIsReplaced) {
  // Another process: the same one may replace its own connection.
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t other = ::fork();
  if (other == 0) {
    ::close(ends[0]);
    v1::KeeperState held;
    ConnectError error;
    auto client = Client::Connect({.socket_path = socket()}, &held, &error);
    const std::string text = client != nullptr ? "owner" : error.message;
    [[maybe_unused]] ssize_t n = ::write(ends[1], text.data(), text.size());
    ::close(ends[1]);
    ::_exit(error.kind == ConnectError::kRefused ? 0 : 1);
  }
  ::close(ends[1]);
  char buffer[512];
  const ssize_t n = ::read(ends[0], buffer, sizeof(buffer));
  const std::string text(buffer, n > 0 ? static_cast<std::size_t>(n) : 0);
  ::close(ends[0]);
  int status = 0;
  ::waitpid(other, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 0) << text;
  EXPECT_NE(text.find("has an agent already (pid " + std::to_string(::getpid())), std::string::npos)
      << text;
  ExpectServes();

  // An agent that owns the keeper and is stopped does not lock the node.
  client_.reset();
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t stopped = ::fork();
  if (stopped == 0) {
    ::close(ends[0]);
    v1::KeeperState held;
    ConnectError error;
    auto client = Client::Connect({.socket_path = socket()}, &held, &error);
    [[maybe_unused]] ssize_t m = ::write(ends[1], client != nullptr ? "y" : "n", 1);
    ::raise(SIGSTOP);
    ::_exit(0);
  }
  ::close(ends[1]);
  char answer = '?';
  EXPECT_EQ(::read(ends[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  ::close(ends[0]);
  ASSERT_TRUE(Eventually([&] {
    const auto stat = ReadProcessStat(stopped);
    return stat && stat->state == 'T';
  }));
  client_ = Connect();
  EXPECT_NE(client_, nullptr) << error_.message;
  ::kill(stopped, SIGKILL);
  ::waitpid(stopped, &status, 0);
  ExpectServes();
}

TEST_F(KeeperProtocol, AnotherVersionIsRefusedAndTold) {
  v1::KeeperRequest request;
  request.set_id(1);
  request.mutable_hello()->set_protocol_version(99);
  const v1::KeeperReply reply = RefusalOf(EncodeFrame(request));
  EXPECT_EQ(reply.error(), EPROTO);
  EXPECT_NE(reply.message().find("version 99"), std::string::npos) << reply.message();
}

TEST_F(KeeperProtocol, ASecondKeeperOnTheSameSocketIsRefused) {
  std::string error;
  EXPECT_FALSE(StartKeeper({.program = std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-keeper",
                            .socket_path = socket(),
                            .node = "n0",
                            .log_file = folder_ + "/second.log"},
                           &error));
  EXPECT_NE(error.find("another keeper serves"), std::string::npos) << error;
  EXPECT_FALSE(StartKeeper({.program = std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-keeper",
                            .socket_path = folder_ + "/" + std::string(120, 'x'),
                            .node = "n0",
                            .log_file = folder_ + "/long.log"},
                           &error));
  EXPECT_NE(error.find("107"), std::string::npos) << error;
  EXPECT_NE(error.find("--state-dir"), std::string::npos) << error;
  ExpectServes();
}

TEST_F(KeeperProtocol, RemembersUpToALimit) {
  v1::KeeperRequest request;
  request.mutable_remember()->set_key("a");
  request.mutable_remember()->set_value(std::string(3 << 20, 'x'));
  EXPECT_EQ(client_->Call(request, Seconds(10)).message.error(), 0);
  request.mutable_remember()->set_key("b");
  EXPECT_EQ(client_->Call(request, Seconds(10)).message.error(), 0);
  request.mutable_remember()->set_key("c");
  const v1::KeeperReply full = client_->Call(request, Seconds(10)).message;
  EXPECT_EQ(full.error(), ENOSPC);
  EXPECT_NE(full.message().find("8388608"), std::string::npos) << full.message();
  // What is replaced or forgotten makes room.
  request.mutable_remember()->set_key("a");
  request.mutable_remember()->set_value("short");
  EXPECT_EQ(client_->Call(request, Seconds(10)).message.error(), 0);
  request.mutable_remember()->set_key("b");
  request.mutable_remember()->set_value("");
  EXPECT_EQ(client_->Call(request, Seconds(10)).message.error(), 0);
  auto look = Connect(false);
  ASSERT_NE(look, nullptr);
  EXPECT_EQ(state_.memory_size(), 1);
  EXPECT_EQ(state_.memory().at("a"), "short");
  // Over the frame's limit: refused on this side, the connection stays.
  request.mutable_remember()->set_value(std::string(5 << 20, 'x'));
  EXPECT_EQ(client_->Call(request, Seconds(10)).message.error(), EMSGSIZE);
  ExpectServes();
}

TEST_F(KeeperProtocol, AnArenaIsOneMemoryForAgentAndTrainerAndOutlivesBoth) {
  Reply agent = client_->Call(ArenaRequest(3, 1 << 20), Seconds(10));
  ASSERT_EQ(agent.message.error(), 0) << agent.message.message();
  EXPECT_TRUE(agent.message.arena().created());
  ASSERT_EQ(agent.descriptors.size(), 2u);
  struct stat st {};
  ::fstat(agent.descriptors[0].get(), &st);
  EXPECT_EQ(static_cast<std::uint64_t>(st.st_size), agent.message.arena().total_bytes());
  EXPECT_GE(agent.message.arena().total_bytes(), 2u << 20);

  std::vector<OwnedFd> trainer;
  const AttachReply attached = Attach(3, 1, 0, &trainer);
  EXPECT_EQ(attached.error, 0) << attached.message;
  EXPECT_EQ(attached.total_bytes, agent.message.arena().total_bytes());
  ASSERT_EQ(trainer.size(), 2u);
  const char word[] = "captured";
  ASSERT_EQ(::pwrite(trainer[0].get(), word, sizeof(word), 2 * checkpoint::kArenaHeaderBytes),
            static_cast<ssize_t>(sizeof(word)));
  const std::uint64_t one = 1;
  ASSERT_EQ(::write(trainer[1].get(), &one, 8), 8);
  pollfd bell{agent.descriptors[1].get(), POLLIN, 0};
  EXPECT_EQ(::poll(&bell, 1, 5000), 1);
  trainer.clear();
  agent.descriptors.clear();
  client_.reset();

  client_ = Connect();
  ASSERT_EQ(state_.arenas_size(), 1);
  EXPECT_EQ(state_.arenas(0).rank(), 3);
  Reply again = client_->Call(ArenaRequest(3, 0), Seconds(10));
  ASSERT_EQ(again.descriptors.size(), 2u);
  EXPECT_FALSE(again.message.arena().created());
  char found[sizeof(word)] = {};
  EXPECT_EQ(
      ::pread(again.descriptors[0].get(), found, sizeof(found), 2 * checkpoint::kArenaHeaderBytes),
      static_cast<ssize_t>(sizeof(found)));
  EXPECT_STREQ(found, word);
}

TEST_F(KeeperProtocol, AnAttachIsFencedAndBounded) {
  std::vector<OwnedFd> none;
  AttachReply reply = Attach(0, 1, 0, &none);
  EXPECT_EQ(reply.error, ENOENT);
  reply = Attach(0, 1, 1 << 20, &none, 7);
  EXPECT_EQ(reply.error, EPROTO);
  Kill(4, 0);
  reply = Attach(0, 4, 1 << 20, &none);
  EXPECT_EQ(reply.error, ESTALE);
  EXPECT_NE(std::string(reply.message).find("generation 4"), std::string::npos) << reply.message;
  reply = Attach(0, 5, std::uint64_t{1} << 43, &none);
  EXPECT_EQ(reply.error, ENOMEM);
  EXPECT_NE(std::string(reply.message), "");
  EXPECT_TRUE(none.empty());
  reply = Attach(0, 5, 1 << 20, &none);
  EXPECT_EQ(reply.error, 0) << reply.message;
}

TEST_F(KeeperProtocol, LeaksNoDescriptor) {
  const auto use = [this](int round) {
    const auto generation = static_cast<std::uint64_t>(round) + 1;
    for (std::int32_t rank = 0; rank < 4; ++rank) {
      Spawn(ShellSpawn(rank, "exec sleep 1000", generation));
      client_->Call(ArenaRequest(rank, 1 << 16), Seconds(10));
      std::vector<OwnedFd> descriptors;
      Attach(rank, generation, 0, &descriptors);
    }
    auto request = ShellSpawn(9, "true", generation);
    request.mutable_spawn()->set_target("/no/such/program");
    client_->Call(request, Seconds(10));
    RefusalOf(std::string("\x05\0\0\0\xff\xff\xff\xff\xff", 9));
    // Whoever connects may send descriptors: they are closed.
    OwnedFd fd = Raw();
    const int given[] = {0, 1, 2};
    Send(fd.get(), "xx", given);
    Kill(generation, 0);
    for (std::int32_t rank = 0; rank < 4; ++rank) events_->WaitExit(rank, generation);
    v1::KeeperRequest forget;
    forget.mutable_forget()->set_job("job");
    client_->Call(forget, Seconds(10));
  };
  use(0);
  ASSERT_TRUE(Eventually([&] { return OpenDescriptors() < 20; }));
  const std::size_t before = OpenDescriptors();
  for (int round = 1; round < 20; ++round) use(round);
  EXPECT_TRUE(Eventually([&] { return OpenDescriptors() <= before; }))
      << OpenDescriptors() << " descriptors, there were " << before;
}

TEST_F(KeeperProtocol, EndsByItselfWhenNoAgentComes) {
  client_.reset();
  const pid_t first = keeper_pid_;
  StartOptions options{.program = std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-keeper",
                       .socket_path = folder_ + "/orphan.sock",
                       .node = "n1",
                       .log_file = folder_ + "/orphan.log",
                       .orphan_timeout = Milliseconds(300)};
  std::string error;
  ASSERT_TRUE(StartKeeper(options, &error)) << error;
  v1::KeeperState held;
  ConnectError problem;
  auto client = Client::Connect({.socket_path = options.socket_path}, &held, &problem);
  ASSERT_NE(client, nullptr) << problem.message;
  const pid_t orphan = held.keeper_pid();
  auto request = ShellSpawn(0, "exec sleep 1000");
  const pid_t worker = client->Call(request, Seconds(10)).message.spawned().pid();
  EXPECT_TRUE(Alive(worker));
  client.reset();
  EXPECT_TRUE(Eventually([&] { return !Alive(orphan) && !Alive(worker); }));
  EXPECT_TRUE(Alive(first));
}

}  // namespace
}  // namespace everstep::keeper
