// Peers that lie, break, crawl, are full or know no key, over real sockets: each ends in a counted
// outcome and a text, nothing wrong is ever published or believed.
#include <gtest/gtest.h>

#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/crc32c.h"
#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

const SipKey kKey = DeriveKey("key");

// A receiver that follows `script` on each connection, behind the handshake.
class FakePeer {
 public:
  struct Talk {
    Connection connection;
    RequestFrame request;
    std::uint64_t client_nonce = 0;
    std::uint64_t server_nonce = 0;
    void Respond(ResponseFrame response, const SipKey& key = kKey) {
      response.mac = ResponseMac(key, client_nonce, server_nonce, response);
      (void)connection.Send(&response, sizeof response);
    }
  };
  explicit FakePeer(std::function<void(Talk*)> script) : script_(std::move(script)) {
    auto listening = Listen("127.0.0.1", 0);
    EXPECT_TRUE(listening.ok());
    fd_ = listening.value().fd;
    port_ = listening.value().port;
    thread_ = std::thread([this] { Run(); });
  }
  ~FakePeer() {
    stop_ = true;
    thread_.join();
    close(fd_);
  }
  std::string address() const { return fmt::format("127.0.0.1:{}", port_); }

 private:
  void Run() {
    while (!stop_) {
      pollfd p{fd_, POLLIN, 0};
      if (poll(&p, 1, 20) <= 0) continue;
      const int client = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (client < 0) continue;
      Talk talk{.connection = Connection(client, "client", milliseconds(2000),
                                         steady_clock::now() + kPatience)};
      HelloFrame theirs;
      if (!talk.connection.Receive(&theirs, sizeof theirs).ok()) continue;
      const HelloFrame mine{.nonce = 99};
      (void)talk.connection.Send(&mine, sizeof mine);
      if (!talk.connection.Receive(&talk.request, sizeof talk.request).ok()) continue;
      talk.client_nonce = theirs.nonce;
      talk.server_nonce = mine.nonce;
      script_(&talk);
    }
  }
  std::function<void(Talk*)> script_;
  int fd_ = -1;
  std::uint16_t port_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// Takes a whole slot as an honest peer does, and leaves the ack to the script.
void TakeAll(FakePeer::Talk* talk) {
  talk->Respond({});
  const SlotFields& fields = talk->request.fields;
  auto table = ReceiveTable(&talk->connection, fields, talk->request.crc_root);
  ASSERT_TRUE(table.ok());
  const auto chunks = static_cast<std::uint32_t>(table.value().crcs.size());
  const WantFrame want{.chunks = chunks, .wanted = chunks};
  Bitmap all(BitmapBytes(chunks), 0xFF);
  (void)talk->connection.Send(&want, sizeof want);
  (void)talk->connection.Send(all.data(), all.size());
  std::vector<char> bytes(kChunkBytes);
  for (;;) {
    auto frame = ReceiveChunkFrame(&talk->connection, fields, table.value().crcs);
    if (!frame.ok() || frame.value().index == kEndOfChunks) return;
    if (!talk->connection.Receive(bytes.data(), frame.value().bytes).ok()) return;
  }
}

struct Victim {
  explicit Victim(const std::string& peer, milliseconds io_timeout = milliseconds(1000))
      : node(io_timeout) {
    node.Activate(node.PartOf(1, 0, peer));
    view = node.Capture(1, 0, 0, 7, kSize);
  }
  bool Counts(PeerOutcome outcome) {
    return Becomes([&] { return node.Pushes(outcome) > 0; });
  }
  bool Believes() { return node.Open(0, false).header()->slot[0].replicated_seq == view.seq; }
  Node node;
  SlotView view;
};

TEST(HostileReceiver, OneThatDoesNotKnowTheKeyCannotAnswer) {
  FakePeer peer([](FakePeer::Talk* talk) { talk->Respond({}, DeriveKey("another")); });
  Victim a(peer.address());
  EXPECT_TRUE(a.Counts(PeerOutcome::kWrongKey));
  EXPECT_TRUE(a.node.heard.Complains("does not know the key of job demo"));
  EXPECT_FALSE(a.Believes());
}

TEST(HostileReceiver, AnAnswerOfAnotherConversationIsNotBelieved) {
  ResponseFrame first;
  FakePeer peer([&first](FakePeer::Talk* talk) {
    if (first.mac == 0) {
      first.status = Status::kHave;
      // As it was right for nonces of long ago.
      first.mac = ResponseMac(kKey, 1, talk->server_nonce, first);
    }
    (void)talk->connection.Send(&first, sizeof first);
  });
  Victim a(peer.address());
  EXPECT_TRUE(a.Counts(PeerOutcome::kWrongKey));
  EXPECT_FALSE(a.Believes());
}

TEST(HostileReceiver, AnAckThatTheKeyDidNotSignIsNotBelieved) {
  FakePeer peer([](FakePeer::Talk* talk) {
    TakeAll(talk);
    AckFrame ack{.crc_root = talk->request.crc_root};
    ack.mac = AckMac(kKey, talk->client_nonce + 1, talk->server_nonce, ack);  // replayed
    (void)talk->connection.Send(&ack, sizeof ack);
  });
  Victim a(peer.address());
  EXPECT_TRUE(a.node.heard.Complains("an answer that its key did not sign"))
      << a.node.heard.Troubles();
  EXPECT_TRUE(a.Counts(PeerOutcome::kWrongKey));
  EXPECT_FALSE(a.Believes());
}

TEST(HostileReceiver, OneThatWantsWhatIsNotThereIsNonsense) {
  FakePeer peer([](FakePeer::Talk* talk) {
    talk->Respond({});
    auto table = ReceiveTable(&talk->connection, talk->request.fields, talk->request.crc_root);
    const WantFrame want{.chunks = 1'000'000, .wanted = 1'000'000};
    (void)talk->connection.Send(&want, sizeof want);
  });
  Victim a(peer.address());
  EXPECT_TRUE(a.Counts(PeerOutcome::kNonsense)) << a.node.heard.Troubles();
  EXPECT_TRUE(a.node.heard.Complains("wants 1000000 of 1000000 chunks of a slot of 6"));
}

TEST(HostileReceiver, AHalfClosedOneIsABrokenConnection) {
  FakePeer peer([](FakePeer::Talk* talk) {
    talk->Respond({});
    shutdown(talk->connection.fd(), SHUT_WR);
    std::vector<char> sink(kSize);
    (void)talk->connection.Receive(sink.data(), 8);
  });
  Victim a(peer.address());
  EXPECT_TRUE(a.Counts(PeerOutcome::kBroken)) << a.node.heard.Troubles();
  EXPECT_FALSE(a.Believes());
}

TEST(HostileReceiver, OneThatStopsReadingIsSlowAndCostsTheTrainerNothing) {
  std::atomic<bool> over{false};
  FakePeer peer([&over](FakePeer::Talk* talk) {
    talk->Respond({});
    auto table = ReceiveTable(&talk->connection, talk->request.fields, talk->request.crc_root);
    while (!over) std::this_thread::sleep_for(milliseconds(5));  // deaf
  });
  Victim a(peer.address(), milliseconds(150));
  EXPECT_TRUE(a.Counts(PeerOutcome::kSlow)) << a.node.heard.Troubles();
  a.node.Capture(1, 0, 1, 8, kSize);
  EXPECT_TRUE(a.node.heard.Copied(8, false));
  over = true;
}

TEST(HostileReceiver, AFullOneIsGivenUpUntilSomethingNewer) {
  Node b;
  b.host.SetFull(true);
  b.service->Begin(kJob, 1, "key");
  Victim a(b.address());
  EXPECT_TRUE(a.Counts(PeerOutcome::kFull));
  EXPECT_TRUE(a.node.heard.Complains("this node's memory is full")) << a.node.heard.Troubles();
  EXPECT_EQ(b.Arrivals(PeerOutcome::kFull), 1u);
  b.host.SetFull(false);
  a.node.Capture(1, 0, 1, 8, kSize);
  EXPECT_TRUE(b.heard.Copied(8, true));
}

TEST(HostileReceiver, ADeadOneIsABrokenConnection) {
  std::string address;
  {
    Node gone;
    address = gone.address();
  }
  Victim a(address);
  EXPECT_TRUE(a.Counts(PeerOutcome::kBroken));
  EXPECT_TRUE(a.node.heard.Complains("connecting")) << a.node.heard.Troubles();
}

// A sender that knows the key, unless told otherwise, and says what it likes.
class FakeSender {
 public:
  explicit FakeSender(Node* node, std::size_t size = kSize) : state_(StateOf(7, size)) {
    fields_.generation = 1;
    fields_.step = 7;
    fields_.world_size = 8;
    fields_.payload_bytes = size;
    fields_.table_offset = size;
    fields_.job_crc = Crc32c(kJob.data(), kJob.size());
    for (std::size_t at = 0; at < size; at += kChunkBytes) {
      crcs_.push_back(Crc32c(&state_[at], std::min<std::size_t>(kChunkBytes, size - at)));
    }
    auto dialled = Connection::Dial(node->address(), milliseconds(1000), milliseconds(3000),
                                    steady_clock::now() + kPatience);
    EXPECT_TRUE(dialled.ok());
    connection_ = std::move(dialled.value());
    const HelloFrame mine{.nonce = 5};
    (void)connection_.Send(&mine, sizeof mine);
    HelloFrame theirs;
    EXPECT_TRUE(connection_.Receive(&theirs, sizeof theirs).ok());
    their_nonce_ = theirs.nonce;
  }
  ResponseFrame Ask(Op op = Op::kPush, const SipKey& key = kKey) {
    RequestFrame request{.op = op, .generation = 1, .fields = fields_, .crc_root = Root()};
    PutText(request.job, kJob);
    request.mac = RequestMac(key, 5, their_nonce_, request);
    return Send(request);
  }
  ResponseFrame Send(const RequestFrame& request) {
    (void)connection_.Send(&request, sizeof request);
    ResponseFrame response{.status = Status::kInternal};
    (void)connection_.Receive(&response, sizeof response);
    return response;
  }
  std::uint32_t Root() const { return CrcRoot(fields_, crcs_.data()); }
  Bitmap Agree(std::uint32_t base = kNoBase, const Bitmap& same = {}) {
    (void)SendTable(&connection_, crcs_, base, same);
    WantFrame want;
    EXPECT_TRUE(connection_.Receive(&want, sizeof want).ok());
    EXPECT_EQ(want.magic, kWantMagic);
    Bitmap bits(BitmapBytes(crcs_.size()));
    EXPECT_TRUE(connection_.Receive(bits.data(), bits.size()).ok());
    return bits;
  }
  void Chunk(std::uint32_t i) {
    const std::size_t at = std::size_t{i} * kChunkBytes;
    const ChunkFrame frame{
        .index = i,
        .bytes = static_cast<std::uint32_t>(std::min<std::size_t>(kChunkBytes, state_.size() - at)),
        .crc = crcs_[i]};
    (void)connection_.Send(&frame, sizeof frame);
    (void)connection_.Send(&state_[at], frame.bytes);
  }
  AckFrame Ack() {
    AckFrame ack{.status = Status::kInternal};
    EXPECT_TRUE(connection_.Receive(&ack, sizeof ack).ok());
    return ack;
  }

  std::vector<unsigned char> state_;
  SlotFields fields_;
  std::vector<std::uint32_t> crcs_;
  Connection connection_;
  std::uint64_t their_nonce_ = 0;
};

struct HostileSender : ::testing::Test {
  void SetUp() override { b.service->Begin(kJob, 1, "key"); }
  // Whatever it sent: nothing of it is a slot, and an honest push of the same slot goes through.
  void TearDown() override {
    EXPECT_FALSE(b.Open(0, true).open() && b.Open(0, true).Newest());
    Node a;
    a.Activate(a.PartOf(1, 0, b.address()));
    a.Capture(1, 0, 0, 7, kSize);
    EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
    EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  }
  Node b{milliseconds(300)};
};

TEST_F(HostileSender, AWrongKeyIsRefused) {
  FakeSender s(&b);
  EXPECT_EQ(s.Ask(Op::kPush, DeriveKey("guessed")).status, Status::kKey);
}

TEST_F(HostileSender, ARequestOfAnotherConversationIsRefused) {
  RequestFrame recorded;
  {
    FakeSender s(&b);
    recorded = {.generation = 1, .fields = s.fields_, .crc_root = s.Root()};
    PutText(recorded.job, kJob);
    recorded.mac = RequestMac(kKey, 5, s.their_nonce_, recorded);
  }
  FakeSender again(&b);  // the same nonce of its own; the receiver's is fresh
  EXPECT_EQ(again.Send(recorded).status, Status::kKey);
}

TEST_F(HostileSender, ASlotOfAnotherJobIsRefused) {
  FakeSender s(&b);
  s.fields_.job_crc ^= 1;
  const auto response = s.Ask();
  EXPECT_EQ(response.status, Status::kInvalid);
  EXPECT_EQ(GetText(response.message), "the slot is of another job than demo");
}

TEST_F(HostileSender, ATableThatDoesNotGiveTheRootIsCorrupt) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.crcs_[3] ^= 1;
  (void)SendTable(&s.connection_, s.crcs_);
  EXPECT_EQ(s.Ack().status, Status::kCorrupt);
  EXPECT_TRUE(Becomes([&] { return b.Arrivals(PeerOutcome::kCorrupt) == 1; }));
}

TEST_F(HostileSender, AChunkWithOtherBytesIsCorruptAndNamed) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  s.Chunk(0);
  s.state_[2 * kChunkBytes + 9] ^= 1;
  s.Chunk(2);
  const AckFrame ack = s.Ack();
  EXPECT_EQ(ack.status, Status::kCorrupt);
  EXPECT_EQ(ack.chunk, 2u);
}

TEST_F(HostileSender, AChunkOfNoTableIsNonsense) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  s.crcs_[1] ^= 1;
  s.Chunk(1);
  EXPECT_EQ(s.Ack().status, Status::kInvalid);
  EXPECT_TRUE(Becomes([&] { return b.Arrivals(PeerOutcome::kNonsense) == 1; }));
}

TEST_F(HostileSender, AChunkThatComesTwiceIsNonsense) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  s.Chunk(1);
  s.Chunk(1);
  const AckFrame ack = s.Ack();
  EXPECT_EQ(ack.status, Status::kInvalid);
  EXPECT_NE(GetText(ack.message).find("comes a second time"), std::string::npos);
}

TEST_F(HostileSender, AnEndBeforeTheEndIsNotBelieved) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  s.Chunk(1);
  (void)SendEndOfChunks(&s.connection_);
  const AckFrame ack = s.Ack();
  EXPECT_EQ(ack.status, Status::kBusy);
  EXPECT_NE(GetText(ack.message).find("5 of 6 chunks of step 7"), std::string::npos);
}

TEST_F(HostileSender, AStreamOfNoPushIsRefused) {
  FakeSender s(&b);
  EXPECT_EQ(s.Ask(Op::kJoin).status, Status::kUnknown);
}

TEST_F(HostileSender, OneThatHangsUpInAChunkLeavesTheOthers) {
  {
    FakeSender s(&b);
    ASSERT_EQ(s.Ask().status, Status::kOk);
    s.Agree();
    s.Chunk(0);
    s.Chunk(4);
    const ChunkFrame frame{.index = 1, .bytes = kChunkBytes, .crc = s.crcs_[1]};
    (void)s.connection_.Send(&frame, sizeof frame);
    (void)s.connection_.Send(s.state_.data(), 5000);
    shutdown(s.connection_.fd(), SHUT_WR);  // half closed
    EXPECT_EQ(s.Ack().status, Status::kBusy);
  }
  EXPECT_TRUE(Becomes([&] { return b.Arrivals(PeerOutcome::kBroken) == 1; }));
  FakeSender again(&b);
  ASSERT_EQ(again.Ask().status, Status::kOk);
  const Bitmap wanted = again.Agree();
  EXPECT_FALSE(BitOf(wanted, 0));
  EXPECT_TRUE(BitOf(wanted, 1));
  EXPECT_FALSE(BitOf(wanted, 4));
}

TEST_F(HostileSender, OneThatGoesSilentIsGivenUp) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  s.Chunk(0);
  EXPECT_TRUE(Becomes([&] { return b.Arrivals(PeerOutcome::kSlow) == 1; }));
}

TEST_F(HostileSender, OneThatCrawlsIsGivenUpThoughBytesMove) {
  FakeSender s(&b);
  ASSERT_EQ(s.Ask().status, Status::kOk);
  s.Agree();
  const ChunkFrame frame{.index = 0, .bytes = kChunkBytes, .crc = s.crcs_[0]};
  (void)s.connection_.Send(&frame, sizeof frame);
  std::size_t sent = 0;
  EXPECT_TRUE(Becomes([&] {
    if (!s.connection_.Readable()) (void)s.connection_.Send(&s.state_[sent++], 1);
    return b.Arrivals(PeerOutcome::kSlow) == 1;
  }));
}

TEST(LyingSender, WhatItCallsUnchangedIsCheckedAllTheSame) {
  Node b(milliseconds(300));
  b.service->Begin(kJob, 1, "key");
  {
    FakeSender first(&b);
    ASSERT_EQ(first.Ask().status, Status::kOk);
    first.Agree();
    for (std::uint32_t i = 0; i < 6; ++i) first.Chunk(i);
    (void)SendEndOfChunks(&first.connection_);
    ASSERT_EQ(first.Ack().status, Status::kOk);
  }
  FakeSender s(&b);
  s.fields_.step = 8;
  s.state_ = StateOf(8, kSize);
  for (std::size_t i = 0; i < s.crcs_.size(); ++i) {
    s.crcs_[i] = Crc32c(&s.state_[i * kChunkBytes],
                        std::min<std::size_t>(kChunkBytes, kSize - i * kChunkBytes));
  }
  const auto response = s.Ask();
  ASSERT_EQ(response.status, Status::kOk);
  const std::uint32_t base = response.held[0].step == 7 ? 0 : 1;
  ASSERT_EQ(response.held[base].step, 7);
  const Bitmap wanted = s.Agree(base, Bitmap(1, 0xFF));  // "all as in step 7"
  for (std::uint32_t i = 0; i < 6; ++i) {
    EXPECT_TRUE(BitOf(wanted, i)) << i;
    s.Chunk(i);
  }
  (void)SendEndOfChunks(&s.connection_);
  EXPECT_EQ(s.Ack().status, Status::kOk);
  EXPECT_TRUE(b.Holds(0, true, 8, kSize));
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
}

}  // namespace
}  // namespace everstep::checkpoint
