// The ledger of a job whose script tells which (step, microbatch) went into the model: that each
// did, and once. Pure values and functions; told.cc feeds them, docs/internals/ledger.md says what
// the words mean and why.
//
//   begin STEP GENERATION MICROBATCHES FIRST-END@RANK.RANK FIRST-END@RANK ...
//   step  STEP GENERATION SAMPLES LOSS =
//   step  STEP GENERATION SAMPLES LOSS FIRST-END@GENERATION.PIPELINE ...
//
// `begin` is a generation's layout, a pipeline each with its ranks by stage, and its first step: it
// takes back whatever was told of that step and later ones. `=`: divided as the layout says.
// SAMPLES and LOSS are hexadecimal: a checksum of the samples' numbers, the bits of a double.
//
// A line is committed when it is durable here and no later `begin` takes it back.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "controller/core/types.h"

namespace everstep::controller {

inline constexpr std::size_t kMaxLedgerRuns = 256;  // older ones are counted alone
inline constexpr std::size_t kMaxLedgerRollBacks = 64;
inline constexpr std::size_t kMaxLedgerFindings = 64;
inline constexpr std::size_t kMaxMicrobatches = 1u << 16;  // of a step
inline constexpr std::size_t kMaxLineParts = 4096;
inline constexpr Step kMaxLedgerStep = 1'000'000'000'000;

// Microbatches first .. end-1 of a step, done by one pipeline of that generation's layout.
struct LedgerPart {
  std::uint32_t first = 0;
  std::uint32_t end = 0;
  Generation generation = 0;
  std::uint32_t pipeline = 0;
  friend bool operator==(const LedgerPart&, const LedgerPart&) = default;
};
// Steps first .. end-1, divided in the same way.
struct LedgerRun {
  Step first = 0;
  Step end = 0;
  Generation generation = 0;
  std::vector<LedgerPart> parts;  // empty: as the generation's layout says
  friend bool operator==(const LedgerRun&, const LedgerRun&) = default;
};
struct LedgerRollBack {
  Generation generation = 0;  // that began with `to`
  Step from = 0;              // lines of steps to .. from-1 do not count any more
  Step to = 0;
  Reason reason = Reason::kNone;  // of that generation
  std::string evidence;
  Timestamp time;
  friend bool operator==(const LedgerRollBack&, const LedgerRollBack&) = default;
};
struct LedgerFinding {
  std::string kind;  // gap, double, parts, layout, word
  Step step = kNoStep;
  Generation generation = 0;
  std::string what;  // a sentence
  friend bool operator==(const LedgerFinding&, const LedgerFinding&) = default;
};

// Record: table "ledger". Fields as in proto/record.proto.
struct LedgerRecord {
  JobId job;
  Generation generation = 0;  // newest that began; 0: nothing was told
  Step first = 0;
  Step next = 0;  // steps first .. next-1 are in
  std::vector<LedgerRun> runs;
  Step folded_end = 0;
  std::uint64_t folded_runs = 0;
  std::vector<LedgerRollBack> roll_backs;
  std::uint64_t roll_back_count = 0;
  std::vector<LedgerFinding> findings;
  std::uint64_t finding_count = 0;
  std::uint64_t lines = 0;
  std::uint64_t retold = 0;
  std::uint64_t stale = 0;
  std::uint64_t taken_back = 0;
  std::uint64_t missing = 0;
  std::uint32_t digest = 0;
  std::uint32_t samples = 0;
  std::uint64_t loss_bits = 0;
  Timestamp time;
  friend bool operator==(const LedgerRecord&, const LedgerRecord&) = default;
};

// Record: table "layout".
struct LayoutRecord {
  struct Pipeline {
    std::uint32_t first = 0;
    std::uint32_t end = 0;
    std::vector<Rank> ranks;  // by stage
    std::vector<NodeId> nodes;
    friend bool operator==(const Pipeline&, const Pipeline&) = default;
  };
  JobId job;
  Generation generation = 0;
  Step begin = 0;
  std::uint32_t microbatches = 0;
  std::vector<Pipeline> pipelines;
  Timestamp time;
  friend bool operator==(const LayoutRecord&, const LayoutRecord&) = default;
};
using Layouts = std::map<Generation, LayoutRecord>;

// Record: table "told". The newest word of a kind of which the newest counts.
struct ToldRecord {
  JobId job;
  std::string kind;  // ToldKindName
  Generation generation = 0;
  Rank rank = 0;
  std::string body;
  Timestamp time;
  std::vector<NodeId> nodes;  // of that generation, by rank
  friend bool operator==(const ToldRecord&, const ToldRecord&) = default;
};

// One parsed word.
struct LedgerWord {
  bool begin = false;
  Step step = 0;
  Generation generation = 0;
  std::uint32_t microbatches = 0;                 // of begin
  std::vector<LayoutRecord::Pipeline> pipelines;  // likewise, without nodes
  std::uint32_t samples = 0;
  std::uint64_t loss_bits = 0;
  bool as_layout = false;
  std::vector<LedgerPart> parts;
};
// Total. None: no word of a ledger within the limits.
std::optional<LedgerWord> ParseLedgerWord(std::string_view text);

// What is known where a word arrives.
struct LedgerContext {
  Timestamp now;
  Generation generation = 0;      // of the worker that tells: a word is of no newer one
  Reason reason = Reason::kNone;  // why that generation is
  std::string evidence;
  std::vector<NodeId> nodes;  // of that generation, by rank
};
// What a word did beside changing the record.
struct LedgerChange {
  std::optional<LedgerRollBack> roll_back;
  std::optional<LedgerFinding> finding;
  bool layout = false;                // the newest generation's is new
  std::vector<Generation> forgotten;  // layouts that nothing kept names any more
};
LedgerChange TakeLedgerWord(std::string_view text, const LedgerContext& context,
                            LedgerRecord* ledger, Layouts* layouts);

// Why the ledger does not show each (step, microbatch) to be in exactly once; empty: it does. From
// the records alone, whatever TakeLedgerWord thought of them. `taken`: a step that the job is known
// to have taken; kNoStep: none.
std::vector<LedgerFinding> VerifyLedger(const LedgerRecord& ledger, const Layouts& layouts,
                                        Step taken);

}  // namespace everstep::controller
