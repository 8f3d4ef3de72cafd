// What workers tell: bytes of anybody's, through the decoder and the ledger. Whatever comes, the
// ledger stays bounded and nothing in it is a surprise to who verifies it.
#include "controller/core/ledger.h"
#include "proto/base/check.h"
#include "proto/base/told.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace everstep;              // NOLINT
  using namespace everstep::controller;  // NOLINT
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (const auto words = DecodeTold(bytes)) EVERSTEP_CHECK(EncodeTold(*words) == bytes);
  LedgerRecord ledger{.job = "j"};
  Layouts layouts;
  const LedgerContext context{{1}, 5, Reason::kNone, "", {"n1", "n2"}};
  for (std::string_view rest = bytes; !rest.empty();) {
    const std::size_t end = rest.find('\n');
    TakeLedgerWord(rest.substr(0, end), context, &ledger, &layouts);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
  }
  EVERSTEP_CHECK(ledger.runs.size() <= kMaxLedgerRuns);
  EVERSTEP_CHECK(ledger.findings.size() <= kMaxLedgerFindings);
  EVERSTEP_CHECK(ledger.first <= ledger.next);
  // Every contradiction was seen when it came.
  EVERSTEP_CHECK(ledger.finding_count > 0 || VerifyLedger(ledger, layouts, kNoStep).empty());
  return 0;
}
