#include "controller/core/ledger.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <iterator>
#include <set>
#include <utility>

#include "proto/base/crc32c.h"

namespace everstep::controller {
namespace {

// Takes what stands before `separator` (all, where there is none) off the text.
std::string_view Cut(std::string_view* text, char separator) {
  const std::size_t at = text->find(separator);
  const std::string_view piece = text->substr(0, at);
  text->remove_prefix(at == std::string_view::npos ? text->size() : at + 1);
  return piece;
}

template <typename Number>
bool Read(std::string_view text, Number* out, int base = 10) {
  if (text.empty() || text.front() == '-') return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out, base);
  return error == std::errc() && end == text.data() + text.size();
}

// FIRST-END@REST
bool ReadRange(std::string_view text, std::uint32_t* first, std::uint32_t* end,
               std::string_view* rest) {
  const std::string_view range = Cut(&text, '@');
  std::string_view numbers = range;
  const std::string_view begins = Cut(&numbers, '-');
  *rest = text;
  return Read(begins, first) && Read(numbers, end) && *first <= *end && *end <= kMaxMicrobatches;
}

// What is wrong with ranges that are to be 0 .. count-1, each once; empty: nothing.
template <typename Range>
std::string Coverage(const std::vector<Range>& ranges, std::uint32_t count) {
  std::vector<std::uint8_t> times(count, 0);
  for (const Range& range : ranges) {
    for (std::uint32_t i = range.first; i < range.end; ++i) {
      if (i >= count) return fmt::format("microbatch {} of {}", i, count);
      if (++times[i] > 1) return fmt::format("microbatch {} twice", i);
    }
  }
  const auto never = std::find(times.begin(), times.end(), 0);
  return never == times.end() ? "" : fmt::format("microbatch {} never", never - times.begin());
}

class Taker {
 public:
  Taker(const LedgerContext& context, LedgerRecord* ledger, Layouts* layouts, LedgerChange* change)
      : context_(context), ledger_(*ledger), layouts_(*layouts), change_(*change) {}

  void Begin(LedgerWord word) {
    if (word.generation < ledger_.generation) {
      ++ledger_.stale;
      return;
    }
    LayoutRecord layout{.job = ledger_.job,
                        .generation = word.generation,
                        .begin = word.step,
                        .microbatches = word.microbatches,
                        .pipelines = std::move(word.pipelines),
                        .time = context_.now};
    if (const std::string wrong = Coverage(layout.pipelines, layout.microbatches); !wrong.empty()) {
      return Find("layout", word.step, word.generation,
                  fmt::format("generation {} gives {}", word.generation, wrong));
    }
    if (word.generation == ledger_.generation) return Again(layout);
    // The worker that tells is of the newest one; what it tells of an older one comes late, and
    // whose ranks those were is not known any more.
    if (word.generation == context_.generation) {
      for (LayoutRecord::Pipeline& pipeline : layout.pipelines) {
        for (const Rank rank : pipeline.ranks) {
          const auto place = static_cast<std::size_t>(rank);
          pipeline.nodes.push_back(place < context_.nodes.size() ? context_.nodes[place] : "");
        }
      }
    }
    if (ledger_.generation == 0) ledger_.first = ledger_.next = ledger_.folded_end = word.step;
    if (word.step > ledger_.next) {
      Gap(word.step, word.generation);
    } else if (word.step < ledger_.next) {
      TakeBack(word.step, word.generation);
    }
    ledger_.generation = word.generation;
    layouts_.insert_or_assign(word.generation, std::move(layout));
    change_.layout = true;
    Fold();
  }

  void Line(const LedgerWord& word) {
    if (word.generation < ledger_.generation) {
      // One that is in from that generation was told again; any other comes too late.
      const LedgerRun* run = Find(word.step);
      if (run != nullptr && run->generation == word.generation && run->parts == word.parts) {
        ++ledger_.retold;
      } else {
        ++ledger_.stale;
      }
      return;
    }
    if (word.generation > ledger_.generation) {
      return Find("word", word.step, word.generation,
                  fmt::format("step {} is of generation {}, which never began", word.step,
                              word.generation));
    }
    const LayoutRecord& layout = layouts_.at(word.generation);
    if (word.step < ledger_.next) {
      const LedgerRun* run = Find(word.step);
      if (word.step < ledger_.folded_end ||
          (run != nullptr && run->generation == word.generation && run->parts == word.parts)) {
        ++ledger_.retold;
        return;
      }
      return Find("double", word.step, word.generation,
                  run == nullptr || run->generation == word.generation
                      ? fmt::format("step {} went in twice in generation {}, in two divisions",
                                    word.step, word.generation)
                      : fmt::format("step {} went in twice, in generations {} and {}", word.step,
                                    run->generation, word.generation));
    }
    if (!word.as_layout) {
      if (const std::string wrong = Coverage(word.parts, layout.microbatches); !wrong.empty()) {
        // It is in all the same: what is wrong with it stays on record.
        Find("parts", word.step, word.generation, fmt::format("step {}: {}", word.step, wrong));
      }
    }
    if (word.step > ledger_.next) Gap(word.step, word.generation);
    ++ledger_.lines;
    ledger_.next = word.step + 1;
    ledger_.samples = word.samples;
    ledger_.loss_bits = word.loss_bits;
    if (!ledger_.runs.empty()) {
      LedgerRun& last = ledger_.runs.back();
      if (last.end == word.step && last.generation == word.generation && last.parts == word.parts) {
        last.end = word.step + 1;
        return;
      }
    }
    ledger_.runs.push_back({word.step, word.step + 1, word.generation, word.parts});
    Fold();
  }

  void Find(const std::string& kind, Step step, Generation generation, std::string what) {
    change_.finding = LedgerFinding{kind, step, generation, std::move(what)};
    ++ledger_.finding_count;
    if (ledger_.findings.size() < kMaxLedgerFindings) {
      ledger_.findings.push_back(*change_.finding);
    }
  }

 private:
  void Again(const LayoutRecord& layout) {
    const LayoutRecord& known = layouts_.at(layout.generation);
    bool same = known.begin == layout.begin && known.microbatches == layout.microbatches &&
                known.pipelines.size() == layout.pipelines.size();
    for (std::size_t i = 0; same && i < layout.pipelines.size(); ++i) {
      const LayoutRecord::Pipeline& a = known.pipelines[i];
      const LayoutRecord::Pipeline& b = layout.pipelines[i];
      same = a.first == b.first && a.end == b.end && a.ranks == b.ranks;
    }
    if (same) {
      ++ledger_.retold;
      return;
    }
    Find("layout", layout.begin, layout.generation,
         fmt::format("generation {} began twice, with steps {} and {}, in two layouts",
                     layout.generation, known.begin, layout.begin));
  }

  void Gap(Step step, Generation generation) {
    Find("gap", ledger_.next, generation,
         step == ledger_.next + 1
             ? fmt::format("step {} was never told", ledger_.next)
             : fmt::format("steps {} to {} were never told", ledger_.next, step - 1));
    ledger_.missing += static_cast<std::uint64_t>(step - ledger_.next);
    ledger_.next = step;
  }

  void TakeBack(Step step, Generation generation) {
    LedgerRollBack back{.generation = generation, .from = ledger_.next, .to = step};
    back.time = context_.now;
    // Why a generation was that is over by now is not known here any more.
    back.reason = context_.reason;
    back.evidence =
        generation == context_.generation
            ? context_.evidence
            : fmt::format("told by generation {}: {}", context_.generation, context_.evidence);
    ledger_.taken_back += static_cast<std::uint64_t>(ledger_.next - std::max(step, ledger_.first));
    while (!ledger_.runs.empty() && ledger_.runs.back().end > step) {
      LedgerRun& last = ledger_.runs.back();
      last.end = std::max(step, last.first);
      if (last.first == last.end) ledger_.runs.pop_back();
    }
    ledger_.folded_end = std::min(ledger_.folded_end, step);
    ledger_.first = std::min(ledger_.first, step);
    ledger_.next = step;
    // What was wrong with lines that do not count any more.
    ledger_.finding_count -=
        std::erase_if(ledger_.findings, [step](const LedgerFinding& f) { return f.step >= step; });
    ++ledger_.roll_back_count;
    ledger_.roll_backs.push_back(back);
    if (ledger_.roll_backs.size() > kMaxLedgerRollBacks) {
      ledger_.roll_backs.erase(ledger_.roll_backs.begin());
    }
    change_.roll_back = std::move(back);
  }

  const LedgerRun* Find(Step step) const {
    const auto run = std::find_if(ledger_.runs.begin(), ledger_.runs.end(),
                                  [step](const LedgerRun& r) { return step < r.end; });
    return run == ledger_.runs.end() || step < run->first ? nullptr : &*run;
  }

  void Fold() {
    if (ledger_.runs.size() > kMaxLedgerRuns) {
      ledger_.folded_end = ledger_.runs.front().end;
      ++ledger_.folded_runs;
      ledger_.runs.erase(ledger_.runs.begin());
    }
    // A layout that no kept line names: of the newest generations lines are to come.
    std::set<Generation> named = {ledger_.generation};
    for (const LedgerRun& run : ledger_.runs) {
      named.insert(run.generation);
      for (const LedgerPart& part : run.parts) named.insert(part.generation);
    }
    const auto newest = std::prev(layouts_.end());
    if (newest != layouts_.begin()) named.insert(std::prev(newest)->first);
    for (auto it = layouts_.begin(); it != layouts_.end();) {
      if (named.contains(it->first)) {
        ++it;
        continue;
      }
      change_.forgotten.push_back(it->first);
      it = layouts_.erase(it);
    }
  }

  const LedgerContext& context_;
  LedgerRecord& ledger_;
  Layouts& layouts_;
  LedgerChange& change_;
};

}  // namespace

std::optional<LedgerWord> ParseLedgerWord(std::string_view text) {
  LedgerWord word;
  const std::string_view kind = Cut(&text, ' ');
  word.begin = kind == "begin";
  if (!word.begin && kind != "step") return std::nullopt;
  if (!Read(Cut(&text, ' '), &word.step) || !Read(Cut(&text, ' '), &word.generation) ||
      word.step > kMaxLedgerStep || word.generation == 0) {
    return std::nullopt;
  }
  if (word.begin) {
    if (!Read(Cut(&text, ' '), &word.microbatches) || word.microbatches == 0 ||
        word.microbatches > kMaxMicrobatches) {
      return std::nullopt;
    }
  } else if (!Read(Cut(&text, ' '), &word.samples, 16) ||
             !Read(Cut(&text, ' '), &word.loss_bits, 16)) {
    return std::nullopt;
  }
  if (!word.begin && text == "=") {
    word.as_layout = true;
    return word;
  }
  std::size_t pieces = 0;
  while (!text.empty()) {
    std::string_view rest;
    LedgerPart part;
    if (++pieces > kMaxLineParts || !ReadRange(Cut(&text, ' '), &part.first, &part.end, &rest)) {
      return std::nullopt;
    }
    if (!word.begin) {
      if (!Read(Cut(&rest, '.'), &part.generation) || !Read(rest, &part.pipeline)) {
        return std::nullopt;
      }
      word.parts.push_back(part);
      continue;
    }
    LayoutRecord::Pipeline& pipeline = word.pipelines.emplace_back();
    pipeline.first = part.first;
    pipeline.end = part.end;
    while (!rest.empty()) {
      if (!Read(Cut(&rest, '.'), &pipeline.ranks.emplace_back())) return std::nullopt;
    }
    if (pipeline.ranks.empty()) return std::nullopt;
  }
  if (pieces == 0) return std::nullopt;
  return word;
}

LedgerChange TakeLedgerWord(std::string_view text, const LedgerContext& context,
                            LedgerRecord* ledger, Layouts* layouts) {
  LedgerChange change;
  Taker taker(context, ledger, layouts, &change);
  ledger->digest = Crc32cExtend(ledger->digest, text);
  ledger->time = context.now;
  std::optional<LedgerWord> word = ParseLedgerWord(text);
  if (!word || word->generation > context.generation) {
    taker.Find("word", kNoStep, context.generation,
               fmt::format("no word of a ledger of generation {} or older: '{}'",
                           context.generation, text.substr(0, 120)));
  } else if (word->begin) {
    taker.Begin(*std::move(word));
  } else {
    taker.Line(*word);
  }
  return change;
}

std::vector<LedgerFinding> VerifyLedger(const LedgerRecord& ledger, const Layouts& layouts,
                                        Step taken) {
  std::vector<LedgerFinding> out = ledger.findings;
  // What was found when it came is said once.
  const auto find = [&out](const char* kind, Step step, Generation generation, std::string what) {
    const bool known = std::any_of(out.begin(), out.end(), [&](const LedgerFinding& f) {
      return step != kNoStep && f.kind == kind && f.step == step;
    });
    if (!known) out.push_back({kind, step, generation, std::move(what)});
  };
  if (ledger.finding_count > out.size()) {
    find("word", kNoStep, ledger.generation,
         fmt::format("and {} more", ledger.finding_count - out.size()));
  }
  Step at = ledger.folded_end;
  Generation newest = 0;
  for (const LedgerRun& run : ledger.runs) {
    if (run.first > at) {
      find("gap", at, run.generation, fmt::format("steps {} to {} are not in", at, run.first - 1));
    }
    if (run.first < at) {
      find("double", run.first, run.generation, fmt::format("step {} is in twice", run.first));
    }
    at = std::max(at, run.end);
    if (run.generation < newest) {
      find("double", run.first, run.generation,
           fmt::format("step {} is of generation {}, the one before it of {}", run.first,
                       run.generation, newest));
    }
    newest = std::max(newest, run.generation);
    const auto layout = layouts.find(run.generation);
    if (layout == layouts.end()) {
      find("layout", run.first, run.generation,
           fmt::format("generation {} has no layout", run.generation));
      continue;
    }
    if (run.first < layout->second.begin) {
      find("layout", run.first, run.generation,
           fmt::format("step {} is of generation {}, which began with {}", run.first,
                       run.generation, layout->second.begin));
    }
    const std::string wrong = run.parts.empty()
                                  ? Coverage(layout->second.pipelines, layout->second.microbatches)
                                  : Coverage(run.parts, layout->second.microbatches);
    if (!wrong.empty()) find("parts", run.first, run.generation, wrong);
  }
  if (at != ledger.next) {
    find("gap", at, ledger.generation,
         fmt::format("steps {} to {} are not in", at, ledger.next - 1));
  }
  if (ledger.generation != 0 && taken >= ledger.next) {
    find("gap", ledger.next, ledger.generation,
         fmt::format("steps {} to {} were taken and never told", ledger.next, taken));
  }
  // Every line is in, or was taken back.
  const std::uint64_t span = static_cast<std::uint64_t>(ledger.next - ledger.first);
  if (ledger.lines + ledger.missing != span + ledger.taken_back) {
    find("word", kNoStep, ledger.generation,
         fmt::format("{} lines and {} missing ones are not {} steps and {} taken back",
                     ledger.lines, ledger.missing, span, ledger.taken_back));
  }
  return out;
}

}  // namespace everstep::controller
