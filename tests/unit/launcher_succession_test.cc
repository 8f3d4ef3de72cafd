// When a controller died with its machine, exactly one launcher starts the next.
#include "worker/launcher/succession.h"

#include <gtest/gtest.h>

namespace everstep::launcher {
namespace {

constexpr Probe kUp = Probe::kListens;
constexpr Probe kGone = Probe::kRefused;
constexpr Probe kDark = Probe::kSilent;

Timestamp At(std::int64_t ms) {
  return Timestamp{} + Milliseconds(ms);
}

std::vector<Peer> Members(std::initializer_list<const char*> nodes) {
  std::vector<Peer> peers;
  for (const char* node : nodes) peers.push_back({.node = node, .member = true});
  return peers;
}

TEST(Succession, AControllerThatAnswersHasNoSuccessor) {
  Succession s("b", "a", Members({"a", "b"}));
  for (int ms = 0; ms < 60'000; ms += 100) {
    EXPECT_EQ(s.Step(At(ms), {true, kUp, kUp, {kUp, kUp}}).verdict, Verdict::kNone);
  }
}

TEST(Succession, ADeadHostIsSucceededAfterHalfASecondOfProof) {
  Succession s("b", "a", Members({"a", "b", "c"}));
  const Sight dead{false, kGone, kGone, {kGone, kUp, kUp}};
  EXPECT_EQ(s.Step(At(0), dead).verdict, Verdict::kWait);
  EXPECT_EQ(s.Step(At(400), dead).verdict, Verdict::kWait);
  const Ruling ruling = s.Step(At(500), dead);
  EXPECT_EQ(ruling.verdict, Verdict::kTakeOver);
  EXPECT_EQ(ruling.why, "a is dead: its ports refuse connections");
}

TEST(Succession, OneOfTwoTakesOverWithProof) {
  Succession s("b", "a", Members({"a", "b"}));
  const Sight dead{false, kGone, kGone, {kGone, kUp}};
  s.Step(At(0), dead);
  EXPECT_EQ(s.Step(At(600), dead).verdict, Verdict::kTakeOver);
}

TEST(Succession, OnlyTheFirstOfTheLivingActs) {
  Succession b("b", "a", Members({"a", "b", "c"}));
  Succession c("c", "a", Members({"a", "b", "c"}));
  const Sight dead{false, kGone, kGone, {kGone, kUp, kUp}};
  b.Step(At(0), dead);
  c.Step(At(0), dead);
  EXPECT_EQ(b.Step(At(600), dead).verdict, Verdict::kTakeOver);
  EXPECT_EQ(c.Step(At(600), dead).verdict, Verdict::kWait);
  // b died with a: c is the first.
  const Sight both{false, kGone, kGone, {kGone, kGone, kUp}};
  EXPECT_EQ(c.Step(At(700), both).verdict, Verdict::kTakeOver);
}

TEST(Succession, AControllerThatItsLauncherRestartsIsWaitedFor) {
  Succession s("b", "a", Members({"a", "b"}));
  for (int ms = 0; ms < 10'000; ms += 100) {
    EXPECT_EQ(s.Step(At(ms), {false, kGone, kUp, {kUp, kUp}}).verdict, Verdict::kWait);
  }
}

TEST(Succession, TheAgentAloneKeepsTheHostAlive) {
  Succession s("b", "a", Members({"a", "b"}));
  s.Step(At(0), {false, kGone, kUp, {kGone, kUp}});
  EXPECT_EQ(s.Step(At(5'000), {false, kGone, kUp, {kGone, kUp}}).verdict, Verdict::kWait);
}

TEST(Succession, SilenceOfOneOfTwoIsNoMajority) {
  Succession s("b", "a", Members({"a", "b"}));
  const Sight dark{false, kDark, kDark, {kDark, kUp}};
  s.Step(At(0), dark);
  EXPECT_EQ(s.Step(At(60'000), dark).verdict, Verdict::kNoMajority);
}

TEST(Succession, SilenceIsSucceededByAMajority) {
  Succession s("b", "a", Members({"a", "b", "c"}));
  const Sight dark{false, kDark, kDark, {kDark, kUp, kUp}};
  s.Step(At(0), dark);
  EXPECT_EQ(s.Step(At(7'900), dark).verdict, Verdict::kWait);
  EXPECT_EQ(s.Step(At(8'000), dark).verdict, Verdict::kTakeOver);
}

// The host is dead for sure, but b, which comes first, is behind a cut: it may act there, so c may
// not.
TEST(Succession, AnUnseenPeerBeforeUsNeedsAMajority) {
  Succession c("c", "a", Members({"a", "b", "c"}));
  const Sight cut{false, kGone, kGone, {kGone, kDark, kUp}};
  c.Step(At(0), cut);
  EXPECT_EQ(c.Step(At(10'000), cut).verdict, Verdict::kNoMajority);
}

TEST(Succession, AReturnOfTheControllerStartsTheProofAnew) {
  Succession s("b", "a", Members({"a", "b"}));
  const Sight dead{false, kGone, kGone, {kGone, kUp}};
  s.Step(At(0), dead);
  s.Step(At(300), {true, kUp, kUp, {kUp, kUp}});
  EXPECT_EQ(s.Step(At(600), dead).verdict, Verdict::kWait);
}

// --- the host's side ---

TEST(HostGuard, AHostThatSeesItsPeersGoesOn) {
  HostGuard guard;
  for (int ms = 0; ms < 60'000; ms += 1'000) {
    EXPECT_EQ(guard.Step(At(ms), Members({"a", "b", "c"}), {kUp, kUp, kUp}).verdict,
              Verdict::kNone);
  }
}

TEST(HostGuard, AHostThatIsCutOffStepsDownBeforeTheOthersMayAct) {
  HostGuard guard;
  const auto peers = Members({"a", "b", "c"});
  guard.Step(At(0), peers, {kUp, kUp, kUp});
  EXPECT_EQ(guard.Step(At(1'000), peers, {kUp, kDark, kDark}).verdict, Verdict::kWait);
  // Its controller has made a generation of one node meanwhile: the others do not know.
  std::vector<Peer> alone = Members({"a", "b", "c"});
  alone[1].member = alone[2].member = false;
  EXPECT_EQ(guard.Step(At(2'500), alone, {kUp, kDark, kDark}).verdict, Verdict::kWait);
  EXPECT_EQ(guard.Step(At(4'000), alone, {kUp, kDark, kDark}).verdict, Verdict::kStepDown);
  static_assert(kCutHolds < kSilenceHolds);
}

TEST(HostGuard, DeathsAreNoCut) {
  HostGuard guard;
  const auto peers = Members({"a", "b", "c"});
  for (int ms = 0; ms < 60'000; ms += 1'000) {
    EXPECT_EQ(guard.Step(At(ms), peers, {kUp, kGone, kGone}).verdict, Verdict::kNone);
  }
}

TEST(HostGuard, HalfOfTheMembersCannotGoOnWithoutIt) {
  HostGuard guard;
  const auto peers = Members({"a", "b"});
  for (int ms = 0; ms < 60'000; ms += 1'000) {
    EXPECT_EQ(guard.Step(At(ms), peers, {kUp, kDark}).verdict, Verdict::kNone);
  }
}

TEST(HostGuard, ACutThatHealsIsForgotten) {
  HostGuard guard;
  const auto peers = Members({"a", "b", "c"});
  guard.Step(At(0), peers, {kUp, kDark, kDark});
  EXPECT_EQ(guard.Step(At(2'000), peers, {kUp, kUp, kDark}).verdict, Verdict::kNone);
  EXPECT_EQ(guard.Step(At(3'500), peers, {kUp, kDark, kDark}).verdict, Verdict::kWait);
}

}  // namespace
}  // namespace everstep::launcher
