// everstep_plans_datadriven [--rewrite] FILE...: transcripts of the planner: a model, nodes that
// run it, a book of plans, losses. Commands: tests/datadriven/README.md.
#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/planner/picture.h"
#include "controller/planner/plan_book.h"
#include "tests/datadriven/replay_files.h"

namespace everstep::datadriven {
namespace {

namespace pl = everstep::planner;

class Plans {
 public:
  std::vector<std::string> Run(const Command& c) {
    out_.clear();
    if (c.name == "model") {
      Model(c);
    } else if (c.name == "run") {
      Start(c);
    } else if (library_ == nullptr || input_.now.nodes.empty()) {
      Say("error: first a model, and nodes that run it");
    } else if (c.name == "speed") {
      Speed(c);
    } else if (c.name == "book") {
      Book(c);
    } else if (c.name == "look") {
      Look(c);
    } else if (c.name == "lose") {
      Lose(c);
    } else {
      Say("error: no command \"{}\"", c.name);
    }
    return out_;
  }

 private:
  template <typename... Args>
  void Say(fmt::format_string<Args...> text, Args&&... args) {
    out_.push_back(fmt::format(text, std::forward<Args>(args)...));
  }
  void Refused(const pl::Refusal& refusal) {
    Say("refused: {}{}{}", refusal.what, refusal.change.empty() ? "" : "; ", refusal.change);
  }
  static std::int64_t Number(const Command& c, const std::string& key, std::int64_t otherwise) {
    const std::string text = c.Get(key);
    std::int64_t value = otherwise;
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;
  }
  static pl::NodeId Node(const std::string& word) {
    pl::NodeId node = 0;
    if (!word.empty()) std::from_chars(word.data() + 1, word.data() + word.size(), node);
    return node;
  }

  // Layers alike: forward 1/3 of ms, backward the rest.
  void Model(const Command& c) {
    pl::Profile p;
    p.device_memory_bytes = Number(c, "memory-mib", 0) << 20;
    for (std::int64_t l = Number(c, "layers", 8); l > 0; --l) {
      const std::int64_t ms = Number(c, "ms", 30);
      p.layers.push_back({.forward_ns = ms * 1'000'000 / 3,
                          .backward_ns = ms * 2'000'000 / 3,
                          .optimizer_ns = 1'000'000,
                          .parameters = Number(c, "parameters", 10'000'000),
                          .activation_bytes = 1 << 20,
                          .output_bytes = 1 << 16});
    }
    pl::Answer<pl::Library> made =
        pl::MakeLibrary(p, {.nodes = static_cast<std::uint32_t>(Number(c, "nodes", 8)),
                            .faults = static_cast<std::uint32_t>(Number(c, "faults", 1))});
    if (!made.ok()) return Refused(made.refusal());
    book_ = nullptr;
    library_ = std::make_unique<pl::Library>(std::move(made.value()));
    Say("templates of {} nodes; {} to {} nodes hold {} copies", fmt::join(library_->sizes, " "),
        library_->fewest_nodes, library_->input.nodes, library_->input.faults + 1);
  }

  void Start(const Command& c) {
    if (library_ == nullptr) return Say("error: first a model");
    std::vector<pl::NodeId> nodes;
    nodes.reserve(c.words.size());
    for (const std::string& word : c.words) nodes.push_back(Node(word));
    const pl::Answer<pl::Composition> made = pl::Compose(
        *library_, {.nodes = static_cast<std::uint32_t>(nodes.size()),
                    .microbatches = static_cast<std::uint64_t>(Number(c, "microbatches", 32))});
    if (!made.ok()) return Refused(made.refusal());
    input_ = {.now = pl::Seat(made.value(), *library_, nodes),
              .horizon_ns = Number(c, "next-change-s", 0) * 1'000'000'000};
    Show(input_.now);
  }

  void Speed(const Command& c) {
    input_.paces.clear();
    for (const auto& [name, speed] : c.values) {
      std::uint32_t permille = pl::kUsualPace;
      std::from_chars(speed.data(), speed.data() + speed.size(), permille);
      input_.paces.push_back({Node(name), permille});
    }
    Say("{} nodes with a speed of their own", input_.paces.size());
  }

  void Book(const Command& c) {
    input_.newcomer.reset();
    if (!c.Get("newcomer").empty()) input_.newcomer = Node(c.Get("newcomer"));
    book_ = std::make_unique<pl::PlanBook>(*library_, input_);
    const auto most = static_cast<std::size_t>(Number(c, "most", 1'000'000));
    while (book_->made() < most && book_->MakeNext()) {
    }
    Say("{} of {} plans", book_->made(), book_->size());
  }

  // What the book has for each node that might be lost.
  void Look(const Command& c) {
    std::set<pl::NodeId> nodes;
    for (const auto& pipeline : input_.now.nodes) nodes.insert(pipeline.begin(), pipeline.end());
    for (const pl::NodeId node : nodes) {
      const pl::BookEntry* entry = Find(node, c.Has("replaced"));
      if (entry == nullptr) {
        Say("n{}: not in the book", node);
      } else {
        Say("n{}: {}", node, Summary(*entry));
      }
    }
  }

  // A loss: the plan out of the book, else made now.
  void Lose(const Command& c) {
    const pl::NodeId lost = Node(c.words.empty() ? "" : c.words.front());
    const bool replaced = c.Has("replaced");
    const pl::BookEntry* found = Find(lost, replaced);
    pl::Composer composer(*library_);
    const pl::BookEntry entry =
        found != nullptr ? *found : pl::PlanOfLoss(&composer, input_, lost, replaced);
    Say("{}: {}", found != nullptr ? "from the book" : "made now", Summary(entry));
    if (!entry.plan.ok()) return;
    input_.now = entry.plan.value().seated;
    if (entry.paced && entry.paced->ok()) {
      input_.now = entry.paced->value().options[entry.paced->value().best].seated;
    }
    std::erase_if(input_.paces, [lost](const pl::NodePace& pace) { return pace.node == lost; });
    Show(input_.now);
  }

  const pl::BookEntry* Find(pl::NodeId lost, bool replaced) const {
    if (book_ == nullptr) return nullptr;
    return book_->Find(pl::BookFingerprint(*library_, input_), lost, replaced);
  }

  static std::string Summary(const pl::BookEntry& entry) {
    if (!entry.plan.ok()) {
      return fmt::format("refused: {}; {}", entry.plan.refusal().what, entry.plan.refusal().change);
    }
    const pl::Replanned& plan = entry.plan.value();
    std::vector<std::size_t> sizes;
    for (const auto& nodes : plan.seated.nodes) sizes.push_back(nodes.size());
    std::string text = fmt::format("pipelines of {}, {}", fmt::join(sizes, " "),
                                   pl::TimeText(plan.seated.composition.time_ns));
    if (plan.moved_bytes > 0) text += fmt::format(", {} move", pl::SizeText(plan.moved_bytes));
    if (!plan.orphaned.empty()) text += fmt::format(", {} layers lost", plan.orphaned.size());
    if (!entry.paced) return text;
    if (!entry.paced->ok()) return text + "; refused: " + entry.paced->refusal().what;
    const pl::PacedPlan& paced = entry.paced->value().options[entry.paced->value().best];
    constexpr const char* kRemedies[] = {"nothing", "microbatches", "layers", "eviction"};
    return text + fmt::format("; at these speeds {}: {}",
                              kRemedies[static_cast<std::size_t>(paced.remedy)],
                              pl::TimeText(paced.time_ns));
  }

  void Show(const pl::Seated& seated) {
    for (std::size_t i = 0; i < seated.nodes.size(); ++i) {
      const pl::Pipeline& p = seated.composition.pipelines[i];
      const pl::Template& t = library_->templates[p.form];
      std::vector<std::string> places;
      for (std::uint32_t place = 0; place < t.nodes; ++place) {
        const pl::Range layers = pl::LayersAt(t, place);
        places.push_back(
            fmt::format("n{} {}-{}", seated.nodes[i][place], layers.first, layers.end - 1));
      }
      Say("  {:>3} microbatches: {}", p.microbatches, fmt::join(places, " | "));
    }
  }

  std::unique_ptr<pl::Library> library_;
  pl::BookInput input_;
  std::unique_ptr<pl::PlanBook> book_;  // of *library_
  std::vector<std::string> out_;
};

}  // namespace
}  // namespace everstep::datadriven

int main(int argc, char** argv) {
  namespace dd = everstep::datadriven;
  return dd::ReplayFiles(argc, argv, [] {
    return [plans = std::make_shared<dd::Plans>()](const dd::Command& c) { return plans->Run(c); };
  });
}
