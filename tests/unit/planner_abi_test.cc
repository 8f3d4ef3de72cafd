// libeverstep_plan.so: a book's answers are those of everstep_plan, to the byte, and it says which
// way they came.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/planner/abi/plan_abi.h"

namespace {

struct Told {
  bool ok = false;
  std::string text;
  std::uint32_t how = 99;
  friend bool operator==(const Told& a, const Told& b) { return a.ok == b.ok && a.text == b.text; }
};

Told Plan(const std::string& request) {
  std::string room(1 << 16, '\0');
  const std::int64_t need = everstep_plan(request.data(), request.size(), room.data(), room.size());
  return {need > 0, room.c_str()};
}

Told Ask(const everstep_plan_book* book, const std::string& request) {
  std::string room(1 << 16, '\0');
  Told out;
  const std::int64_t need = everstep_plan_book_ask(book, request.data(), request.size(),
                                                   room.data(), room.size(), &out.how);
  out.ok = need > 0;
  out.text = room.c_str();
  return out;
}

struct Request {
  std::vector<int> nodes;
  std::string before;  // an answer's text
  std::string newcomer;
  int faults = 1, most = 8, microbatches = 32, horizon_ms = 0, ms = 10;

  std::string Text() const {
    std::string text = fmt::format(
        "everstep-plan-request 1\nfaults = {}\nmost-nodes = {}\nmicrobatches = {}\n"
        "horizon-ms = {}\nnodes = {}\n",
        faults, most, microbatches, horizon_ms, fmt::join(nodes, ","));
    if (!newcomer.empty()) text += fmt::format("newcomer = {}\n", newcomer);
    for (std::size_t at = 0; (at = before.find("pipeline = ", at)) != std::string::npos;) {
      const std::size_t end = before.find('\n', at) + 1;
      text += before.substr(at, end - at);
      at = end;
    }
    text +=
        "profile =\neverstep-profile 1\ndevice-memory-mib = 900\nlayer,forward_ms,backward_ms,"
        "activation_mib,output_mib,parameters\n";
    for (int l = 0; l < 12; ++l) {
      text += fmt::format("{},{},{},1,1,10000000\n", l, ms + l % 3, 2 * ms);
    }
    return text;
  }
};

class PlanBook : public ::testing::Test {
 protected:
  void SetUp() override {
    now_.nodes = {0, 1, 2, 3, 4, 5, 6, 7};
    const Told first = Plan(now_.Text());
    ASSERT_TRUE(first.ok) << first.text;
    now_.before = first.text;
    Request opened = now_;
    opened.newcomer = "8";
    Open(opened);
  }
  void TearDown() override {
    if (book_ != nullptr) everstep_plan_book_close(book_);
  }
  void Open(const Request& request) {
    const std::string text = request.Text();
    book_ = everstep_plan_book_open(text.data(), text.size(), error_, sizeof error_);
    ASSERT_NE(book_, nullptr) << error_;
  }
  Request Without(std::vector<int> lost, std::vector<int> joined = {}) const {
    Request out = now_;
    for (const int node : lost) std::erase(out.nodes, node);
    out.nodes.insert(out.nodes.end(), joined.begin(), joined.end());
    return out;
  }
  void Expect(const Request& request, std::uint32_t how, const std::string& what) {
    const Told told = Ask(book_, request.Text()), plain = Plan(request.Text());
    EXPECT_EQ(told, plain) << what << "\n" << told.text << "\n" << plain.text;
    EXPECT_EQ(told.how, how) << what;
  }

  Request now_;
  everstep_plan_book* book_ = nullptr;
  char error_[200] = {};
};

TEST_F(PlanBook, AnswersEverySingleLossAndReplacement) {
  Expect(Without({3}), EVERSTEP_PLAN_WITH_TEMPLATES, "nothing is made yet");
  EXPECT_EQ(everstep_plan_book_make(book_, 5), 11u);
  EXPECT_EQ(everstep_plan_book_make(book_, 100), 0u);
  for (int node = 0; node < 8; ++node) {
    Expect(Without({node}), EVERSTEP_PLAN_FROM_BOOK, fmt::format("{} lost", node));
    Expect(Without({node}, {8}), EVERSTEP_PLAN_FROM_BOOK, fmt::format("{} replaced", node));
  }
  Request turned = Without({2});
  std::swap(turned.nodes.front(), turned.nodes.back());
  Expect(turned, EVERSTEP_PLAN_FROM_BOOK, "ranks in another order");
}

TEST_F(PlanBook, LeavesEverythingElseToThePlanner) {
  EXPECT_EQ(everstep_plan_book_make(book_, 100), 0u);
  Expect(Without({1, 5}), EVERSTEP_PLAN_WITH_TEMPLATES, "two losses");
  Expect(Without({1}, {9}), EVERSTEP_PLAN_WITH_TEMPLATES, "another newcomer");
  Expect(Without({1}, {8, 9}), EVERSTEP_PLAN_MADE_ANEW, "more nodes than ever");
  Expect(now_, EVERSTEP_PLAN_WITH_TEMPLATES, "nothing lost");
  Request other = Without({1});
  other.horizon_ms = 5000;
  Expect(other, EVERSTEP_PLAN_WITH_TEMPLATES, "another price");
  other = Without({1});
  other.microbatches = 40;
  Expect(other, EVERSTEP_PLAN_WITH_TEMPLATES, "another batch");
  other = Without({1});
  other.faults = 0;
  Expect(other, EVERSTEP_PLAN_MADE_ANEW, "other faults");
  other = Without({1});
  other.ms = 11;
  Expect(other, EVERSTEP_PLAN_MADE_ANEW, "another profile");
  other = Without({1});
  other.before = Plan(Without({2}).Text()).text;
  Expect(other, EVERSTEP_PLAN_WITH_TEMPLATES, "another plan before");
  other.nodes.clear();
  Expect(other, EVERSTEP_PLAN_MADE_ANEW, "not a request");
}

TEST_F(PlanBook, RefusesAsThePlannerDoes) {
  TearDown();
  now_.nodes = {0, 1, 2};
  now_.faults = 2;  // three copies: on eight nodes, not on three
  now_.before.clear();
  Open(now_);
  EXPECT_EQ(everstep_plan_book_make(book_, 100), 0u);
  EXPECT_FALSE(Ask(book_, Without({0}).Text()).ok);
  Expect(Without({0}), EVERSTEP_PLAN_WITH_TEMPLATES, "too few nodes");
  TearDown();
  now_.faults = 7;  // eight copies of two nodes
  Open(now_);
  EXPECT_EQ(everstep_plan_book_make(book_, 100), 0u);
  Expect(Without({0}), EVERSTEP_PLAN_WITH_TEMPLATES, "no library");
}

TEST_F(PlanBook, IsNotOpenedForWhatIsNoRequest) {
  for (const std::string text : {"", "everstep-plan 1\n", "everstep-plan-request 1\nnodes = x\n",
                                 "everstep-plan-request 1\nnewcomer = -1\n"}) {
    char error[100] = {};
    EXPECT_EQ(everstep_plan_book_open(text.data(), text.size(), error, sizeof error), nullptr);
    EXPECT_NE(std::string(error), "");
  }
  Request large = now_;
  large.nodes.clear();
  for (int i = 0; i < 1025; ++i) large.nodes.push_back(i);
  large.most = 1025;
  const std::string text = large.Text();
  char error[100] = {};
  EXPECT_EQ(everstep_plan_book_open(text.data(), text.size(), error, sizeof error), nullptr);
  EXPECT_EQ(std::string(error), "a book for 1025 nodes; at most 1024");
  EXPECT_EQ(everstep_plan_version(), 2u);
}

}  // namespace
