// The ledger: words in, one line for each step; what it finds when they contradict each other.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <map>
#include <random>

#include "controller/core/ledger.h"
#include "proto/base/told.h"

namespace everstep::controller {
namespace {

struct Book {
  LedgerRecord ledger{.job = "j"};
  Layouts layouts;
  Generation now = 1;

  LedgerChange Take(const std::string& text) {
    const LedgerContext context{{1}, now, Reason::kNodeLost, "silent", {"n1", "n2", "n3"}};
    return TakeLedgerWord(text, context, &ledger, &layouts);
  }
  void Begin(Step step, Generation generation) {
    now = std::max(now, generation);
    Take(fmt::format("begin {} {} 8 0-5@0.1 5-8@2", step, generation));
  }
  void Line(Step step, Generation generation, const std::string& parts = "=") {
    Take(fmt::format("step {} {} ab 4002666666666666 {}", step, generation, parts));
  }
  std::vector<std::string> Faults(Step taken = kNoStep) const {
    std::vector<std::string> kinds;
    for (const LedgerFinding& f : VerifyLedger(ledger, layouts, taken)) {
      kinds.push_back(fmt::format("{}@{}", f.kind, f.step));
    }
    return kinds;
  }
};
using Kinds = std::vector<std::string>;

TEST(LedgerWord, IsReadWholeOrNotAtAll) {
  const auto begin = ParseLedgerWord("begin 17 3 8 0-5@0.1.3 5-8@2.4");
  ASSERT_TRUE(begin);
  EXPECT_EQ(begin->step, 17);
  EXPECT_EQ(begin->generation, 3u);
  EXPECT_EQ(begin->pipelines[1].ranks, (std::vector<Rank>{2, 4}));
  const auto line = ParseLedgerWord("step 17 3 9a 4002666666666666 0-5@3.0 5-8@2.1");
  ASSERT_TRUE(line);
  EXPECT_EQ(line->parts[1], (LedgerPart{5, 8, 2, 1}));
  EXPECT_EQ(line->loss_bits, 0x4002666666666666u);
  for (const char* wrong :
       {"", "begin", "begin 1", "begin -1 3 8 0-5@0", "begin 1 0 8 0-5@0", "begin 1 3 0 0-5@0",
        "begin 1 3 8", "begin 1 3 8 5-0@0", "begin 1 3 8 0-5@", "begin 1 3 8 0-99999999@0",
        "begin 1 3 8 0-5@-1", "step 1 3 zz 0 =", "step 1 3 0 0 ", "step 1 3 0 0 0-5@3",
        "step 1 3 0 0 = x", "step 9999999999999999999 3 0 0 =", "step 9000000000000000000 3 0 0 =",
        "step 1 3 0 0 0-5@3.0.1"}) {
    EXPECT_FALSE(ParseLedgerWord(wrong)) << wrong;
  }
}

TEST(Ledger, StepsOfOneDivisionAreOneRun) {
  Book book;
  book.Begin(0, 1);
  for (Step s = 0; s < 1000; ++s) book.Line(s, 1);
  EXPECT_EQ(book.ledger.runs.size(), 1u);
  EXPECT_EQ(book.ledger.next, 1000);
  EXPECT_EQ(book.layouts.at(1).pipelines[1].nodes, (std::vector<NodeId>{"n3"}));
  EXPECT_EQ(book.Faults(999), Kinds{});
  EXPECT_EQ(book.Faults(1000), Kinds{"gap@1000"});  // taken, and never told
}

// Rank 0 alone had taken step 3, and died; its line was durable.
TEST(Ledger, AGenerationThatBeginsEarlierTakesLinesBackByARecord) {
  Book book;
  book.Begin(0, 1);
  for (Step s = 0; s < 4; ++s) book.Line(s, 1);
  book.Begin(3, 2);
  EXPECT_EQ(book.ledger.next, 3);
  ASSERT_EQ(book.ledger.roll_backs.size(), 1u);
  EXPECT_EQ(book.ledger.roll_backs[0].from, 4);
  EXPECT_EQ(book.ledger.roll_backs[0].to, 3);
  EXPECT_EQ(book.ledger.roll_backs[0].reason, Reason::kNodeLost);
  book.Line(3, 2, "0-5@1.0 5-8@2.1");
  EXPECT_EQ(book.ledger.taken_back, 1u);
  EXPECT_EQ(book.Faults(), Kinds{});
}

TEST(Ledger, LinesToldAgainChangeNothingAndStaleOnesAreRefused) {
  Book book;
  book.Begin(0, 1);
  for (Step s = 0; s < 4; ++s) book.Line(s, 1);
  const auto runs = book.ledger.runs;
  book.Line(2, 1);
  book.Begin(0, 1);
  EXPECT_EQ(book.ledger.retold, 2u);
  book.Begin(4, 2);
  book.Line(3, 1);  // in already
  book.Line(4, 1);  // its generation is over
  book.Begin(2, 1);
  EXPECT_EQ(book.ledger.retold, 3u);
  EXPECT_EQ(book.ledger.stale, 2u);
  EXPECT_EQ(book.ledger.runs, runs);
  EXPECT_EQ(book.Faults(), Kinds{});
}

TEST(Ledger, EachContradictionHasItsName) {
  Book book;
  book.Begin(0, 1);
  book.Line(0, 1);
  book.Line(3, 1);
  EXPECT_EQ(book.Faults(), Kinds{"gap@1"});
  book.Line(0, 1, "0-8@1.0");
  book.Line(4, 1, "0-5@1.0 4-8@1.1");
  book.Line(5, 1, "0-5@1.0");
  book.Line(6, 7);
  book.Take("step 6 2 0 0 =");
  EXPECT_EQ(book.Faults(),
            (Kinds{"gap@1", "double@0", "parts@4", "parts@5", "word@-1", "word@-1"}));
  // What is done again and taken back is not wrong any more; a word that is none stays one.
  book.Begin(1, 2);
  EXPECT_EQ(book.Faults(), (Kinds{"double@0", "word@-1", "word@-1"}));
  Book other;
  other.Begin(0, 1);
  other.Take("begin 0 1 8 0-4@0.1 4-8@2");
  other.Take("begin 0 1 8 0-4@0.1 5-8@2");
  EXPECT_EQ(other.Faults(), (Kinds{"layout@0", "layout@0"}));
}

TEST(Ledger, BeginsWhereFilesOfAnEarlierJobEnd) {
  Book book;
  book.Begin(100, 1);
  book.Line(100, 1);
  EXPECT_EQ(book.ledger.first, 100);
  book.Begin(40, 2);  // all nodes lost: older files
  book.Line(40, 2);
  EXPECT_EQ(book.ledger.first, 40);
  EXPECT_EQ(book.ledger.next, 41);
  EXPECT_EQ(book.Faults(), Kinds{});
}

TEST(Ledger, IsBoundedHoweverLongTheJobRuns) {
  Book book;
  for (Generation g = 1; g <= 3000; ++g) {
    book.Begin(static_cast<Step>(2 * g), g);
    for (Step s = 0; s < 3; ++s) book.Line(static_cast<Step>(2 * g) + s, g);  // one is taken back
  }
  EXPECT_LE(book.ledger.runs.size(), kMaxLedgerRuns);
  EXPECT_LE(book.layouts.size(), kMaxLedgerRuns + 2);
  EXPECT_EQ(book.ledger.roll_backs.size(), kMaxLedgerRollBacks);
  EXPECT_EQ(book.ledger.roll_back_count, 2999u);
  EXPECT_EQ(book.ledger.taken_back, 2999u);
  EXPECT_EQ(book.Faults(), Kinds{});
  for (int i = 0; i < 1000; ++i) book.Take("gibberish");
  EXPECT_EQ(book.ledger.findings.size(), kMaxLedgerFindings);
  EXPECT_EQ(book.ledger.finding_count, 1000u);
}

TEST(Ledger, ARecordThatWasChangedIsRefuted) {
  Book book;
  book.Begin(0, 1);
  for (Step s = 0; s < 4; ++s) book.Line(s, 1);
  book.Begin(4, 2);
  for (Step s = 4; s < 8; ++s) book.Line(s, 2);
  ASSERT_EQ(book.Faults(), Kinds{});
  Book bad = book;
  bad.ledger.runs[0].end = 3;
  EXPECT_EQ(bad.Faults(), Kinds{"gap@3"});
  bad = book;
  bad.ledger.runs[0].end = 5;
  EXPECT_EQ(bad.Faults(), Kinds{"double@4"});
  bad = book;
  bad.ledger.lines = 9;
  EXPECT_EQ(bad.Faults(), Kinds{"word@-1"});
  bad = book;
  bad.layouts.erase(2);
  EXPECT_EQ(bad.Faults(), Kinds{"layout@4"});
  bad = book;
  bad.layouts.at(1).pipelines.pop_back();
  EXPECT_EQ(bad.Faults(), Kinds{"parts@0"});
  bad = book;
  bad.ledger.next = 9;
  EXPECT_EQ(bad.Faults(), (Kinds{"gap@8", "word@-1"}));
}

// Workers that tell in order, lose acknowledgements, die with lines and begin anew: what counts is
// what the last one to begin with a step or an earlier one told of it.
TEST(Ledger, AgreesWithAPlainListOfWhoTookWhichStep) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&random](std::uint32_t n) { return random() % n; };
    Book book;
    std::map<Step, Generation> truth;  // of the survivors' model
    std::vector<std::string> unheard;  // that every survivor has, oldest first
    Step next = 0;
    for (Generation g = 1; g <= 20; ++g) {
      if (g > 1 && below(3) == 0 && next > 0) {  // more were lost than there are copies
        next -= static_cast<Step>(below(static_cast<std::uint32_t>(std::min<Step>(next, 5)) + 1));
        truth.erase(truth.lower_bound(next), truth.end());
        std::erase_if(unheard, [next](const std::string& w) {
          return w.starts_with("step") && ParseLedgerWord(w)->step >= next;
        });
      }
      book.now = g;
      unheard.push_back(fmt::format("begin {} {} 8 0-5@0.1 5-8@2", next, g));
      std::size_t durable = 0;
      const auto tell = [&] {
        const std::size_t from = below(static_cast<std::uint32_t>(durable + 1));
        const std::size_t to =
            durable + below(static_cast<std::uint32_t>(unheard.size() - durable) + 1);
        for (std::size_t i = from; i < to; ++i) book.Take(unheard[i]);
        durable = to;
      };
      const std::uint32_t steps = below(6);
      for (std::uint32_t i = 0; i < steps; ++i) {
        unheard.push_back(fmt::format("step {} {} ab 0 =", next, g));
        truth[next++] = g;
        if (below(2) == 0) tell();
      }
      if (g == 20) durable = (book.Take("step 0 1 0 0 ="), 0);
      if (g == 20)
        for (const std::string& w : unheard) book.Take(w);
      // Some of what is durable is known to be.
      unheard.erase(unheard.begin(),
                    unheard.begin() + static_cast<std::ptrdiff_t>(
                                          below(static_cast<std::uint32_t>(durable) + 1)));
      if (below(3) == 0 && next > 0 && truth.count(next - 1) > 0 && truth[next - 1] == g &&
          g < 20) {
        // Rank 0 alone had taken the newest step.
        truth.erase(--next);
        std::erase_if(unheard, [next](const std::string& w) {
          return w.starts_with("step") && ParseLedgerWord(w)->step >= next;
        });
      }
    }
    EXPECT_EQ(book.Faults(), Kinds{}) << "seed " << seed;
    std::map<Step, Generation> told;
    for (const LedgerRun& run : book.ledger.runs) {
      for (Step s = run.first; s < run.end; ++s) told[s] = run.generation;
    }
    EXPECT_EQ(told, truth) << "seed " << seed;
  }
}

TEST(Told, WordsSurviveTheWireAndNothingElseIsTaken) {
  const std::vector<ToldWord> words = {{7, ToldKind::kLedger, "a"}, {8, ToldKind::kPlan, ""}};
  const std::string bytes = EncodeTold(words);
  EXPECT_EQ(DecodeTold(bytes), words);
  EXPECT_FALSE(DecodeTold(""));
  for (std::size_t n = 1; n < bytes.size(); ++n) {
    EXPECT_EQ(DecodeTold(bytes.substr(0, n)).has_value(), n == kToldHeader + 1) << n;
  }
  EXPECT_FALSE(DecodeTold(EncodeTold({{0, ToldKind::kLedger, "a"}})));
  EXPECT_FALSE(DecodeTold(EncodeTold({{7, ToldKind::kLedger, "a"}, {9, ToldKind::kLedger, "b"}})));
  EXPECT_FALSE(DecodeTold(EncodeTold({{7, static_cast<ToldKind>(9), "a"}})));
  EXPECT_FALSE(DecodeTold(EncodeTold({{7, ToldKind::kPlan, std::string(kMaxToldBody + 1, 'x')}})));
}

}  // namespace
}  // namespace everstep::controller
