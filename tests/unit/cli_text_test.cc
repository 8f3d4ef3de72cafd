// Golden texts of the CLI's formatting: what a person and a script read.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "controller/cli/error.h"
#include "controller/cli/suggest.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"

namespace everstep::cli {
namespace {

TEST(CliTable, AlignsDashesAndLeavesNoTrailingSpace) {
  Table table({{"NODE"}, {"SLOTS", Align::kRight}, {"REASON"}});
  table.Add({"n0", "8", ""});
  table.Add({"node-with-a-name", "16", "lease_expired"});
  table.Add({"n2"});
  EXPECT_EQ(table.Format(),
            "NODE              SLOTS  REASON\n"
            "n0                    8  -\n"
            "node-with-a-name     16  lease_expired\n"
            "n2                    -  -\n");
  EXPECT_EQ(table.Format(/*headers=*/false),
            "n0                 8  -\n"
            "node-with-a-name  16  lease_expired\n"
            "n2                 -  -\n");
}

TEST(CliTable, CutsOnlyWhereATerminalEndsAndNeverInsideACharacter) {
  Table table({{"NAME"}, {"MESSAGE"}});
  table.Add({"j",
             "gr\xC3\xB6\xC3\x9F"
             "er than the terminal"});
  EXPECT_EQ(table.Format(true, 14),
            "NAME  MESSAGE\nj     gr\xC3\xB6\xC3\x9F"
            "e...\n");
  EXPECT_EQ(table.Format(true, 0),
            "NAME  MESSAGE\nj     gr\xC3\xB6\xC3\x9F"
            "er than the terminal\n");
}

TEST(CliTable, EscapeSequencesOfAJobsTextDoNotReachTheTerminal) {
  Table table({{"MESSAGE"}});
  table.Add({"\x1b[2Jgone\nnext"});
  EXPECT_EQ(table.Format(), "MESSAGE\n?[2Jgone?next\n");
}

TEST(CliTable, PairsShareOneColumn) {
  EXPECT_EQ(FormatPairs({{"Job", "gpt"}, {"Committed step", ""}}),
            "Job:             gpt\nCommitted step:  -\n");
}

TEST(CliUnits, SecondsReadInAtMostTwoUnits) {
  EXPECT_EQ(HumanSeconds(0), "0ms");
  EXPECT_EQ(HumanSeconds(0.84), "840ms");
  EXPECT_EQ(HumanSeconds(0.9996), "1.0s");
  EXPECT_EQ(HumanSeconds(12.34), "12.3s");
  EXPECT_EQ(HumanSeconds(59.96), "1m00s");
  EXPECT_EQ(HumanSeconds(192), "3m12s");
  EXPECT_EQ(HumanSeconds(3599.6), "1h00m");
  EXPECT_EQ(HumanSeconds(27600), "7h40m");
  EXPECT_EQ(HumanSeconds(183600), "2d3h");
  EXPECT_EQ(HumanSeconds(-1), "-");
  EXPECT_EQ(HumanSeconds(std::numeric_limits<double>::quiet_NaN()), "-");
}

TEST(CliUnits, CountsHaveThousands) {
  EXPECT_EQ(HumanCount(0), "0");
  EXPECT_EQ(HumanCount(999), "999");
  EXPECT_EQ(HumanCount(182442), "182,442");
  EXPECT_EQ(HumanCount(1000000), "1,000,000");
  EXPECT_EQ(HumanCount(-1), "-");
}

TEST(CliError, SaysWhatAndWhatToDoNext) {
  const CliError error{ExitCode::kConflict, "FAILED_PRECONDITION",
                       "cannot drain n07: job llm would drop below its minimum of 6 nodes",
                       "accept a pause: everstep node drain n07 --allow-pause"};
  EXPECT_EQ(FormatError(error),
            "error: cannot drain n07: job llm would drop below its minimum of 6 nodes\n"
            "  hint: accept a pause: everstep node drain n07 --allow-pause\n");
  EXPECT_EQ(FormatErrorJson({ExitCode::kNotFound, "NOT_FOUND", "no job \"x\"\x01", ""}),
            "{\"error\":{\"code\":\"NOT_FOUND\",\"message\":\"no job \\\"x\\\"\\u0001\"}}\n");
}

TEST(CliError, JsonNeverCarriesInvalidUtf8) {
  EXPECT_EQ(JsonQuote("a\xFF"
                      "b"),
            "\"a\xEF\xBF\xBD"
            "b\"");
  EXPECT_EQ(JsonQuote("\xC3"), "\"\xEF\xBF\xBD\"");
  EXPECT_EQ(JsonQuote("\xC3\xB6\t\\"), "\"\xC3\xB6\\t\\\\\"");
}

TEST(CliSuggest, FindsTheNearestNameAndNotAFarOne) {
  EXPECT_EQ(EditDistance("jbo", "job"), 1u);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3u);
  EXPECT_EQ(Nearest("clutser", {"job", "node", "cluster"}), "cluster");
  EXPECT_EQ(Nearest("evnets", {"events", "node"}), "events");
  EXPECT_EQ(Nearest("banana", {"events", "node"}), "");
  EXPECT_EQ(Nearest("x", {"y"}), "") << "one letter is near everything";
  EXPECT_EQ(Nearest("", {"a"}), "");
  EXPECT_EQ(Nearest("ok", {"ok-bfea0d-2", "ok-bfea0d", "no"}), "ok-bfea0d") << "it goes on so";
  EXPECT_EQ(Nearest("o", {"ok-bfea0d"}), "");
}

}  // namespace
}  // namespace everstep::cli
