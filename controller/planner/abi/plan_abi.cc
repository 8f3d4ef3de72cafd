#include "controller/planner/abi/plan_abi.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/planner/picture.h"
#include "controller/planner/plan_book.h"
#include "controller/planner/replan.h"

namespace everstep::planner {
namespace {

constexpr std::string_view kRequest = "everstep-plan-request 1";
constexpr std::uint64_t kMaxHorizonMs = 365ULL * 24 * 3600 * 1000;

struct Was {  // a pipeline of the plan that ends
  std::vector<std::uint32_t> cuts;
  std::vector<NodeId> nodes;
};

struct Request {
  std::uint64_t faults = 0, most_nodes = 0, microbatches = 0, horizon_ms = 0;
  std::optional<NodeId> newcomer;  // of a book
  std::vector<NodeId> nodes;
  std::vector<Was> before;
  std::string_view profile;
};

std::string_view Trim(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

// Cuts `text` at the first `mark`; what is behind it stays in `text`.
std::string_view Next(std::string_view* text, char mark) {
  const std::size_t end = text->find(mark);
  const std::string_view out = text->substr(0, end);
  text->remove_prefix(end == std::string_view::npos ? text->size() : end + 1);
  return Trim(out);
}

Answer<std::uint64_t> Number(std::string_view name, std::string_view text, std::uint64_t most) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value > most) {
    return Refusal{fmt::format("{} = \"{}\"", name, text.substr(0, 40)),
                   fmt::format("a whole number, at most {}", most)};
  }
  return value;
}

Answer<std::vector<std::uint32_t>> Numbers(std::string_view name, std::string_view text,
                                           std::uint64_t most) {
  std::vector<std::uint32_t> out;
  out.reserve(static_cast<std::size_t>(std::count(text.begin(), text.end(), ',')) + 1);
  while (!text.empty()) {
    const Answer<std::uint64_t> value = Number(name, Next(&text, ','), most);
    if (!value.ok()) return value.refusal();
    out.push_back(static_cast<std::uint32_t>(value.value()));
  }
  return out;
}

Answer<Was> ReadPipeline(std::string_view text) {
  Next(&text, ';');  // its microbatches, which are distributed anew
  Answer<std::vector<std::uint32_t>> cuts = Numbers("pipeline", Next(&text, ';'), kMaxLayers);
  if (!cuts.ok()) return cuts.refusal();
  Answer<std::vector<std::uint32_t>> nodes = Numbers("pipeline", Next(&text, ';'), UINT32_MAX);
  if (!nodes.ok()) return nodes.refusal();
  if (nodes.value().empty() || cuts.value().size() != nodes.value().size() + 1) {
    return Refusal{fmt::format("a pipeline of {} cuts and {} nodes", cuts.value().size(),
                               nodes.value().size()),
                   "one cut more than nodes"};
  }
  return Was{std::move(cuts.value()), std::move(nodes.value())};
}

Answer<Request> ReadRequest(std::string_view text) {
  if (Next(&text, '\n') != kRequest) {
    return Refusal{"the request does not begin with its form",
                   fmt::format("\"{}\" as its first line", kRequest)};
  }
  Request out;
  while (!text.empty()) {
    std::string_view line = Next(&text, '\n');
    const std::string_view name = Next(&line, '=');
    const std::string_view value = Trim(line);
    if (name == "profile") {
      out.profile = text;
      break;
    }
    if (name == "nodes") {
      Answer<std::vector<std::uint32_t>> read = Numbers(name, value, UINT32_MAX);
      if (!read.ok()) return read.refusal();
      out.nodes = std::move(read.value());
      continue;
    }
    if (name == "pipeline") {
      Answer<Was> read = ReadPipeline(value);
      if (!read.ok()) return read.refusal();
      out.before.push_back(std::move(read.value()));
      continue;
    }
    if (name == "newcomer") {
      const Answer<std::uint64_t> read = Number(name, value, UINT32_MAX);
      if (!read.ok()) return read.refusal();
      out.newcomer = static_cast<NodeId>(read.value());
      continue;
    }
    std::uint64_t* const field = name == "faults"         ? &out.faults
                                 : name == "most-nodes"   ? &out.most_nodes
                                 : name == "microbatches" ? &out.microbatches
                                 : name == "horizon-ms"   ? &out.horizon_ms
                                                          : nullptr;
    if (field == nullptr) {
      return Refusal{fmt::format("a request has no \"{}\"", name.substr(0, 40)),
                     "plan_abi.h names what it has"};
    }
    const Answer<std::uint64_t> read = Number(name, value,
                                              field == &out.horizon_ms     ? kMaxHorizonMs
                                              : field == &out.microbatches ? kMaxMicrobatches
                                              : field == &out.faults       ? kMaxFaults
                                                                           : kMaxNodes);
    if (!read.ok()) return read.refusal();
    *field = read.value();
  }
  std::set<NodeId> once(out.nodes.begin(), out.nodes.end());
  if (out.nodes.empty() || once.size() != out.nodes.size()) {
    return Refusal{fmt::format("{} nodes, {} of them different", out.nodes.size(), once.size()),
                   "one or more, each once"};
  }
  if (out.nodes.size() > out.most_nodes) {
    return Refusal{fmt::format("{} nodes, most-nodes = {}", out.nodes.size(), out.most_nodes),
                   "most-nodes as large as the job has ever been"};
  }
  return out;
}

// The pipelines before, with this library's templates; one that has none is left out.
Seated SeatedBefore(const Library& library, const Request& request) {
  Seated out;
  std::set<NodeId> seen;
  for (const Was& was : request.before) {
    const auto found =
        std::find_if(library.templates.begin(), library.templates.end(), [&was](const Template& t) {
          return t.shape == Shape{} && t.partition.cuts == was.cuts && t.nodes == was.nodes.size();
        });
    const bool fresh = std::none_of(was.nodes.begin(), was.nodes.end(),
                                    [&seen](NodeId node) { return seen.count(node) > 0; });
    if (found == library.templates.end() || !fresh) continue;
    seen.insert(was.nodes.begin(), was.nodes.end());
    out.composition.pipelines.push_back(
        {.form = static_cast<std::uint32_t>(found - library.templates.begin())});
    out.nodes.push_back(was.nodes);
    out.composition.nodes += found->nodes;
  }
  out.composition.microbatches = request.microbatches;
  return out;
}

Answer<Library> LibraryFor(const Request& request) {
  Answer<Profile> profile = ParseProfile(request.profile);
  if (!profile.ok()) return profile.refusal();
  profile.value().microbatch = 1;
  profile.value().devices_per_node = 1;
  return MakeLibrary(profile.value(), {.nodes = static_cast<std::uint32_t>(request.most_nodes),
                                       .faults = static_cast<std::uint32_t>(request.faults)});
}

// What a request says of the plan before and of what became of its nodes.
struct Change {
  BookInput before;
  std::vector<NodeId> lost, joined;
};

Change ChangeOf(const Library& library, const Request& request) {
  Change out{.before = {.now = SeatedBefore(library, request),
                        .horizon_ns = static_cast<std::int64_t>(request.horizon_ms) * 1'000'000}};
  const std::set<NodeId> now(request.nodes.begin(), request.nodes.end());
  std::set<NodeId> were;
  for (const std::vector<NodeId>& nodes : out.before.now.nodes) {
    for (const NodeId node : nodes) {
      were.insert(node);
      if (now.count(node) == 0) out.lost.push_back(node);
    }
  }
  for (const NodeId node : request.nodes) {
    if (were.count(node) == 0) out.joined.push_back(node);
  }
  return out;
}

Answer<Seated> PlanFor(const Library& library, const Request& request) {
  const Change change = ChangeOf(library, request);
  if (change.before.now.nodes.empty()) {
    Answer<Composition> made =
        Compose(library, {.nodes = static_cast<std::uint32_t>(request.nodes.size()),
                          .microbatches = request.microbatches});
    if (!made.ok()) return made.refusal();
    return Seat(std::move(made.value()), library, request.nodes);
  }
  Answer<Replanned> made = Replan(
      library, change.before.now,
      {.lost = change.lost, .joined = change.joined, .horizon_ns = change.before.horizon_ns});
  if (!made.ok()) return made.refusal();
  return std::move(made.value().seated);
}

std::string Written(const Library& library, const Seated& seated) {
  const Composition& composition = seated.composition;
  std::string out = fmt::format("everstep-plan 1\nfingerprint = {:016x}\ntime-ns = {}\n",
                                library.fingerprint, composition.time_ns);
  for (std::size_t i = 0; i < composition.pipelines.size(); ++i) {
    const Pipeline& pipeline = composition.pipelines[i];
    fmt::format_to(std::back_inserter(out), "pipeline = {}; {}; {}\n", pipeline.microbatches,
                   fmt::join(library.templates[pipeline.form].partition.cuts, ","),
                   fmt::join(seated.nodes[i], ","));
  }
  const std::string picture = PlanPicture(library, seated);
  for (std::string_view rest = picture; !rest.empty();) {
    const std::size_t end = rest.find('\n');
    fmt::format_to(std::back_inserter(out), "# {}\n", rest.substr(0, end));
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
  }
  return out;
}

Answer<std::string> AnswerWith(const Library& library, const Request& request) {
  const Answer<Seated> seated = PlanFor(library, request);
  if (!seated.ok()) return seated.refusal();
  return Written(library, seated.value());
}

Answer<std::string> AnswerTo(std::string_view text) {
  const Answer<Request> request = ReadRequest(text);
  if (!request.ok()) return request.refusal();
  const Answer<Library> library = LibraryFor(request.value());
  if (!library.ok()) return library.refusal();
  return AnswerWith(library.value(), request.value());
}

// Into the caller's memory, as everstep_plan says.
std::int64_t Give(const Answer<std::string>& made, char* answer, std::uint64_t room) {
  std::string text;
  if (made.ok()) {
    text = made.value();
  } else {
    text = made.refusal().what;
    if (!made.refusal().change.empty()) text.append("; ").append(made.refusal().change);
  }
  if (room > 0) {
    const std::size_t size = std::min<std::size_t>(text.size(), room - 1);
    std::memcpy(answer, text.data(), size);
    answer[size] = '\0';
  }
  const auto need = static_cast<std::int64_t>(text.size() + 1);
  return made.ok() ? need : -need;
}

}  // namespace
}  // namespace everstep::planner

struct everstep_plan_book {
  // Of the request that it was opened with.
  std::string profile;
  std::uint64_t faults = 0, most_nodes = 0;
  everstep::planner::Answer<everstep::planner::Library> library;
  std::unique_ptr<everstep::planner::PlanBook>
      plans;  // null: no library, or no plan to be lost from
};

namespace everstep::planner {
namespace {

Answer<std::unique_ptr<everstep_plan_book>> Open(std::string_view text) {
  const Answer<Request> read = ReadRequest(text);
  if (!read.ok()) return read.refusal();
  const Request& request = read.value();
  if (request.nodes.size() > kMaxBookNodes) {
    return Refusal{fmt::format("a book for {} nodes", request.nodes.size()),
                   fmt::format("at most {}", kMaxBookNodes)};
  }
  std::unique_ptr<everstep_plan_book> book(
      new everstep_plan_book{.profile = std::string(request.profile),
                             .faults = request.faults,
                             .most_nodes = request.most_nodes,
                             .library = LibraryFor(request),
                             .plans = nullptr});
  if (!book->library.ok()) return book;
  BookInput input = ChangeOf(book->library.value(), request).before;
  if (input.now.nodes.empty()) return book;
  input.newcomer = request.newcomer;
  book->plans = std::make_unique<PlanBook>(book->library.value(), std::move(input));
  return book;
}

// The entry for what the request asks; null: none.
const BookEntry* Entry(const everstep_plan_book& book, const Request& request) {
  if (book.plans == nullptr) return nullptr;
  Change change = ChangeOf(book.library.value(), request);
  if (change.lost.size() != 1 || change.joined.size() > 1) return nullptr;
  const bool replaced = !change.joined.empty();
  // Without a newcomer in the request it is the book's own.
  change.before.newcomer = replaced ? change.joined.front() : book.plans->newcomer();
  return book.plans->Find(BookFingerprint(book.library.value(), change.before), change.lost.front(),
                          replaced);
}

Answer<std::string> AskBook(const everstep_plan_book& book, std::string_view text,
                            std::uint32_t* how) {
  *how = EVERSTEP_PLAN_MADE_ANEW;
  const Answer<Request> read = ReadRequest(text);
  if (!read.ok()) return read.refusal();
  const Request& request = read.value();
  if (request.profile != book.profile || request.faults != book.faults ||
      request.most_nodes != book.most_nodes) {
    return AnswerTo(text);
  }
  *how = EVERSTEP_PLAN_WITH_TEMPLATES;
  if (!book.library.ok()) return book.library.refusal();
  const BookEntry* const entry = Entry(book, request);
  if (entry == nullptr) return AnswerWith(book.library.value(), request);
  *how = EVERSTEP_PLAN_FROM_BOOK;
  if (!entry->plan.ok()) return entry->plan.refusal();
  return Written(book.library.value(), entry->plan.value().seated);
}

}  // namespace
}  // namespace everstep::planner

namespace pl = everstep::planner;

std::int64_t everstep_plan(const char* request, std::uint64_t bytes, char* answer,
                           std::uint64_t room) {
  return pl::Give(pl::AnswerTo({request, bytes}), answer, room);
}

everstep_plan_book* everstep_plan_book_open(const char* request, std::uint64_t bytes, char* error,
                                            std::uint64_t room) {
  auto made = pl::Open({request, bytes});
  if (made.ok()) return made.value().release();
  pl::Give(made.refusal(), error, room);
  return nullptr;
}

std::uint64_t everstep_plan_book_make(everstep_plan_book* book, std::uint64_t plans) {
  if (book->plans == nullptr) return 0;
  while (plans > 0 && book->plans->MakeNext()) --plans;
  return book->plans->size() - book->plans->made();
}

std::int64_t everstep_plan_book_ask(const everstep_plan_book* book, const char* request,
                                    std::uint64_t bytes, char* answer, std::uint64_t room,
                                    std::uint32_t* how) {
  std::uint32_t told = 0;
  const auto need = pl::Give(pl::AskBook(*book, {request, bytes}, &told), answer, room);
  if (how != nullptr) *how = told;
  return need;
}

void everstep_plan_book_close(everstep_plan_book* book) {
  delete book;
}

std::uint32_t everstep_plan_version() {
  return 2;
}
