// The ledger against what really happened: the state that a job ended with descends from one state
// for each step, and the ledger names the generation that made it.
#include <fmt/format.h>

#include "tests/sim/world/checkers.h"

namespace everstep::sim {

void Checkers::CheckLedger(Timestamp now, const controller::JobStateView& job) {
  const JobId& id = job.record.spec.job;
  const auto told = env_.training->told().find(id);
  env_.truth->Count("ledgers written");
  if (!job.ledger.roll_backs.empty()) env_.truth->Count("ledgers with lines taken back");
  if (job.ledger.retold > 0) env_.truth->Count("ledgers with lines told again");
  // A state that another group had left behind came back: its lines were taken back, and the
  // ledger says that they are not in.
  if (told != env_.training->told().end() && told->second.torn) return;
  for (const controller::LedgerFinding& f :
       controller::VerifyLedger(job.ledger, job.layouts, kNoStep)) {
    Violate(now, "told_once", fmt::format("job {}: {} at step {}: {}", id, f.kind, f.step, f.what));
  }
}

// Whatever was acknowledged is in, or was taken back by a later generation.
void Checkers::CheckAcknowledged(Timestamp now, const controller::JobStateView& job) {
  const auto told = env_.training->told().find(job.record.spec.job);
  if (told == env_.training->told().end()) return;
  const auto [generation, step] = told->second.acknowledged;
  if (generation <= job.record.earlier_runs || job.record.forgotten) return;
  if (job.ledger.generation > generation || job.ledger.next > step) return;
  Violate(now, "told_once",
          fmt::format("job {}: step {} of generation {} was acknowledged, the store has steps {} "
                      "to {} of generation {}",
                      job.record.spec.job, step, generation, job.ledger.first, job.ledger.next - 1,
                      job.ledger.generation));
}

void Checkers::CheckLedgerEnd(Timestamp now, const controller::JobStateView& job) {
  const JobId& id = job.record.spec.job;
  const auto it = env_.training->told().find(id);
  if (it == env_.training->told().end() || it->second.torn) return;
  const Training::Told& told = it->second;
  CheckLedger(now, job);
  std::map<Step, Generation> made, named;
  for (Lineage at = told.newest; at != kFromNothing;) {
    const Truth::State* state = env_.truth->Find(at);
    made[state->step] = state->generation;
    at = state->parent;
  }
  for (const controller::LedgerRun& run : job.ledger.runs) {
    for (Step s = run.first; s < run.end; ++s) named[s] = run.generation;
  }
  if (!told.whole) made.erase(made.lower_bound(job.ledger.next), made.end());
  if (made == named) {
    env_.truth->Count("ledgers that were true");
    return;
  }
  for (const auto& [step, generation] : made) {
    const auto said = named.find(step);
    if (said != named.end() && said->second == generation) continue;
    Violate(now, "told_once",
            fmt::format("job {}: step {} was made by generation {}, the ledger says {}", id, step,
                        generation, said == named.end() ? 0 : said->second));
    return;
  }
  Violate(now, "told_once",
          fmt::format("job {}: the ledger names {} steps, {} were made", id, named.size(),
                      made.size()));
}

}  // namespace everstep::sim
