// The plan book: each entry is what Replan answers at the time of the loss, with speeds and
// without; and a book answers nothing for another plan.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <numeric>
#include <thread>

#include <fmt/format.h>

#include "controller/planner/plan_book.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

using models::Draw;

template <typename T>
void ExpectEqual(const Answer<T>& got, const Answer<T>& want, const std::string& where) {
  ASSERT_EQ(got.ok(), want.ok()) << where;
  if (want.ok()) {
    EXPECT_TRUE(got.value() == want.value()) << where;
  } else {
    EXPECT_EQ(got.refusal().what, want.refusal().what) << where;
    EXPECT_EQ(got.refusal().change, want.refusal().change) << where;
  }
}

struct Drawn {
  Library library;
  BookInput input;
  std::vector<NodeId> nodes;
};

// A library, and seats that some losses and joins have stirred. Nothing: the model has no library.
std::optional<Drawn> DrawBook(Random* random, bool paces) {
  const Profile p = Draw(random, {.layers = static_cast<std::uint32_t>(random->Between(6, 20)),
                                  .equal = random->Chance(300),
                                  .uneven_links = random->Chance(300),
                                  .tight_memory = random->Chance(700)});
  Answer<Library> made =
      MakeLibrary(p, {.nodes = static_cast<std::uint32_t>(random->Between(4, 20)),
                      .faults = static_cast<std::uint32_t>(random->Between(0, 2))});
  if (!made.ok()) return std::nullopt;
  Drawn out{.library = std::move(made.value()), .input = {}, .nodes = {}};
  const Library& library = out.library;
  const auto count =
      static_cast<std::uint32_t>(random->Between(library.fewest_nodes, library.input.nodes));
  const auto microbatches = static_cast<std::uint64_t>(random->Between(count, 5 * count));
  std::vector<NodeId> nodes(count);
  std::iota(nodes.begin(), nodes.end(), 10U);
  Answer<Composition> first = Compose(library, {.nodes = count, .microbatches = microbatches});
  if (!first.ok()) return std::nullopt;
  out.input.now = Seat(std::move(first.value()), library, nodes);
  if (random->Chance(500)) out.input.horizon_ns = random->Between(1, 1'000'000);
  if (random->Chance(300)) out.input.loss_gap_ns = random->Between(1, 1'000'000);
  NodeId next = 100;
  for (int change = 0; change < 3; ++change) {
    const NodeId lost = nodes[random->Below(nodes.size())];
    const bool replaced = random->Chance(600);
    ReplanInput input{.lost = {lost}, .joined = {}, .horizon_ns = out.input.horizon_ns};
    if (replaced) input.joined.push_back(next++);
    Answer<Replanned> after = Replan(library, out.input.now, input);
    if (!after.ok()) continue;
    out.input.now = std::move(after.value().seated);
    std::erase(nodes, lost);
    if (replaced) nodes.push_back(input.joined.front());
  }
  if (random->Chance(600)) out.input.newcomer = next;
  for (std::int64_t slow = paces ? random->Between(1, 3) : 0; slow > 0; --slow) {
    out.input.paces.push_back({.node = nodes[random->Below(nodes.size())],
                               .permille = static_cast<std::uint32_t>(random->Between(200, 1500))});
  }
  out.nodes = nodes;
  return out;
}

// Makes the whole book of `drawn` and compares it with plans made one by one.
void Compare(const Drawn& drawn, const std::string& where, int* plans, int* refusals) {
  PlanBook book(drawn.library, drawn.input);
  while (book.MakeNext()) {
  }
  ASSERT_EQ(book.made(), drawn.nodes.size() * (drawn.input.newcomer ? 2 : 1)) << where;
  for (const bool replaced : {false, true}) {
    for (const NodeId lost : drawn.nodes) {
      const BookEntry* entry =
          book.Find(BookFingerprint(drawn.library, drawn.input), lost, replaced);
      if (replaced && !drawn.input.newcomer) {
        EXPECT_EQ(entry, nullptr) << where;
        continue;
      }
      ASSERT_NE(entry, nullptr) << where;
      ReplanInput change{.lost = {lost},
                         .joined = {},
                         .horizon_ns = drawn.input.horizon_ns,
                         .loss_gap_ns = drawn.input.loss_gap_ns};
      if (replaced) change.joined.push_back(*drawn.input.newcomer);
      const Answer<Replanned> anew = Replan(drawn.library, drawn.input.now, change);
      ExpectEqual(entry->plan, anew, where);
      ++*(anew.ok() ? plans : refusals);
      const bool paced = !drawn.input.paces.empty() && anew.ok();
      ASSERT_EQ(entry->paced.has_value(), paced) << where;
      if (!paced) continue;
      std::vector<NodePace> left;
      for (const NodePace& pace : drawn.input.paces) {
        if (pace.node != lost) left.push_back(pace);
      }
      ExpectEqual(*entry->paced,
                  PlanForPaces(drawn.library, anew.value().seated, left, drawn.input.horizon_ns),
                  where);
    }
  }
}

TEST(PlanBookProperty, EachEntryIsThePlanThatIsMadeAtTheLoss) {
  Random random(51);
  int books = 0, plans = 0, refusals = 0;
  for (int round = 0; round < 400; ++round) {
    const std::optional<Drawn> drawn = DrawBook(&random, false);
    if (!drawn) continue;
    ++books;
    Compare(*drawn, fmt::format("round {}", round), &plans, &refusals);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(books, 150);
  EXPECT_GT(plans, 1000);
  EXPECT_GT(refusals, 50) << "too few nodes are an answer, too";
}

TEST(PlanBookProperty, SpeedsOfThoseWhoAreLeftCount) {
  Random random(52);
  int books = 0, plans = 0, refusals = 0;
  for (int round = 0; round < 80; ++round) {
    const std::optional<Drawn> drawn = DrawBook(&random, true);
    if (!drawn) continue;
    ++books;
    Compare(*drawn, fmt::format("round {}", round), &plans, &refusals);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(books, 30);
  EXPECT_GT(plans, 200);
}

TEST(PlanBookProperty, AStaleBookAnswersNothing) {
  Random random(53);
  int looked = 0;
  for (int round = 0; round < 120; ++round) {
    const std::optional<Drawn> drawn = DrawBook(&random, round % 2 == 0);
    if (!drawn) continue;
    PlanBook book(drawn->library, drawn->input);
    while (book.MakeNext()) {
    }
    const NodeId lost = drawn->nodes[random.Below(drawn->nodes.size())];
    ASSERT_NE(book.Find(BookFingerprint(drawn->library, drawn->input), lost), nullptr);
    const auto stale = [&](const Library& library, const BookInput& input, const char* what) {
      EXPECT_EQ(book.Find(BookFingerprint(library, input), lost), nullptr) << what;
      ++looked;
    };
    const auto other_library = [&](const char* what, Profile profile, LibraryInput input) {
      const Answer<Library> other = MakeLibrary(profile, input);
      if (other.ok()) stale(other.value(), drawn->input, what);
    };
    Profile profile = drawn->library.profile;
    ++profile.layers[random.Below(profile.layers.size())].backward_ns;
    other_library("another profile", profile, drawn->library.input);
    LibraryInput fleet = drawn->library.input;
    ++fleet.nodes;
    other_library("another fleet", drawn->library.profile, fleet);
    const auto changed = [&](const char* what, const std::function<void(BookInput*)>& change) {
      BookInput input = drawn->input;
      change(&input);
      stale(drawn->library, input, what);
    };
    changed("microbatches", [](BookInput* i) { ++i->now.composition.microbatches; });
    changed("another node", [](BookInput* i) { i->now.nodes.back().back() = 999; });
    changed("horizon", [](BookInput* i) { ++i->horizon_ns; });
    changed("losses", [](BookInput* i) { ++i->loss_gap_ns; });
    changed("speeds", [](BookInput* i) { i->paces.push_back({.node = 10, .permille = 700}); });
    changed("newcomer", [](BookInput* i) { i->newcomer = 998; });
    if (drawn->input.now.nodes.size() > 1) {
      changed("seats", [](BookInput* i) {
        std::swap(i->now.nodes.front().front(), i->now.nodes.back().back());
      });
    }
  }
  EXPECT_GT(looked, 300);
}

TEST(PlanBook, AnswersWhatIsMadeAlready) {
  Random random(54);
  const Profile p = Draw(&random, {.layers = 12});
  const Library library = MakeLibrary(p, {.nodes = 8, .faults = 1}).value();
  const BookInput input{.now = Seat(Compose(library, {.nodes = 8, .microbatches = 32}).value(),
                                    library, {0, 1, 2, 3, 4, 5, 6, 7}),
                        .newcomer = 8};
  PlanBook book(library, input);
  EXPECT_EQ(book.size(), 16u);
  for (NodeId node = 0; node < 8; ++node) {
    EXPECT_EQ(book.Find(book.fingerprint(), node), nullptr);
    ASSERT_TRUE(book.MakeNext());
    EXPECT_NE(book.Find(book.fingerprint(), node), nullptr);
    EXPECT_EQ(book.Find(book.fingerprint(), node, true), nullptr);
  }
  while (book.MakeNext()) {
  }
  EXPECT_EQ(book.made(), 16u);
  EXPECT_NE(book.Find(book.fingerprint(), 7, true), nullptr);
  EXPECT_EQ(book.Find(book.fingerprint(), 8), nullptr) << "no such seat";
}

TEST(PlanBook, IsReadWhileItIsMade) {
  Random random(55);
  const Profile p = Draw(&random, {.layers = 20});
  const Library library = MakeLibrary(p, {.nodes = 24, .faults = 1}).value();
  std::vector<NodeId> nodes(24);
  std::iota(nodes.begin(), nodes.end(), 0U);
  const BookInput input{
      .now = Seat(Compose(library, {.nodes = 24, .microbatches = 96}).value(), library, nodes)};
  PlanBook book(library, input);
  std::atomic<bool> going{true};
  std::thread maker([&] {
    while (going && book.MakeNext()) {
    }
  });
  // Each is right as soon as it is there.
  for (const NodeId node : nodes) {
    const BookEntry* entry = nullptr;
    while ((entry = book.Find(book.fingerprint(), node)) == nullptr) std::this_thread::yield();
    EXPECT_EQ(entry->plan.value().seated.composition.nodes, 23u);
  }
  going = false;
  maker.join();
}

}  // namespace
}  // namespace everstep::planner
