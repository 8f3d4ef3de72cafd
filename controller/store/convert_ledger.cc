// What workers tell, as records: the ledger, its layouts, the profile and the plan.
#include "controller/store/convert.h"

namespace everstep::controller {

void ToProto(const LedgerFinding& from, v1::LedgerRecord::Finding* to) {
  to->set_kind(from.kind);
  to->set_step(from.step);
  to->set_generation(from.generation);
  to->set_what(from.what);
}

void ToProto(const LedgerRecord& from, v1::LedgerRecord* to) {
  to->set_job(from.job);
  to->set_generation(from.generation);
  to->set_first(from.first);
  to->set_next(from.next);
  for (const LedgerRun& run : from.runs) {
    v1::LedgerRecord::Run* r = to->add_runs();
    r->set_first(run.first);
    r->set_end(run.end);
    r->set_generation(run.generation);
    for (const LedgerPart& part : run.parts) {
      v1::LedgerRecord::Part* p = r->add_parts();
      p->set_first(part.first);
      p->set_end(part.end);
      p->set_generation(part.generation);
      p->set_pipeline(part.pipeline);
    }
  }
  to->set_folded_end(from.folded_end);
  to->set_folded_runs(from.folded_runs);
  for (const LedgerRollBack& back : from.roll_backs) {
    v1::LedgerRecord::RollBack* b = to->add_roll_backs();
    b->set_generation(back.generation);
    b->set_from(back.from);
    b->set_to(back.to);
    b->set_reason(static_cast<std::uint32_t>(back.reason));
    b->set_evidence(back.evidence);
    b->set_time_ns(back.time.ns);
  }
  to->set_roll_back_count(from.roll_back_count);
  for (const LedgerFinding& finding : from.findings) ToProto(finding, to->add_findings());
  to->set_finding_count(from.finding_count);
  to->set_lines(from.lines);
  to->set_retold(from.retold);
  to->set_stale(from.stale);
  to->set_taken_back(from.taken_back);
  to->set_missing(from.missing);
  to->set_digest(from.digest);
  to->set_samples(from.samples);
  to->set_loss_bits(from.loss_bits);
  to->set_time_ns(from.time.ns);
}

bool FromProto(const v1::LedgerRecord& from, LedgerRecord* to) {
  to->job = from.job();
  to->generation = from.generation();
  to->first = from.first();
  to->next = from.next();
  for (const v1::LedgerRecord::Run& run : from.runs()) {
    LedgerRun& r = to->runs.emplace_back(LedgerRun{run.first(), run.end(), run.generation(), {}});
    for (const v1::LedgerRecord::Part& part : run.parts()) {
      r.parts.push_back({part.first(), part.end(), part.generation(), part.pipeline()});
    }
  }
  to->folded_end = from.folded_end();
  to->folded_runs = from.folded_runs();
  for (const v1::LedgerRecord::RollBack& back : from.roll_backs()) {
    LedgerRollBack& b = to->roll_backs.emplace_back();
    b.generation = back.generation();
    b.from = back.from();
    b.to = back.to();
    b.evidence = back.evidence();
    b.time = {back.time_ns()};
    if (back.reason() >= static_cast<std::uint32_t>(Reason::kCount)) return false;
    b.reason = static_cast<Reason>(back.reason());
  }
  to->roll_back_count = from.roll_back_count();
  for (const v1::LedgerRecord::Finding& f : from.findings()) {
    to->findings.push_back({f.kind(), f.step(), f.generation(), f.what()});
  }
  to->finding_count = from.finding_count();
  to->lines = from.lines();
  to->retold = from.retold();
  to->stale = from.stale();
  to->taken_back = from.taken_back();
  to->missing = from.missing();
  to->digest = from.digest();
  to->samples = from.samples();
  to->loss_bits = from.loss_bits();
  to->time = {from.time_ns()};
  return true;
}

void ToProto(const LayoutRecord& from, v1::LayoutRecord* to) {
  to->set_job(from.job);
  to->set_generation(from.generation);
  to->set_begin(from.begin);
  to->set_microbatches(from.microbatches);
  for (const LayoutRecord::Pipeline& pipeline : from.pipelines) {
    v1::LayoutRecord::Pipeline* p = to->add_pipelines();
    p->set_first(pipeline.first);
    p->set_end(pipeline.end);
    for (const Rank rank : pipeline.ranks) p->add_ranks(rank);
    for (const NodeId& node : pipeline.nodes) p->add_nodes(node);
  }
  to->set_time_ns(from.time.ns);
}

bool FromProto(const v1::LayoutRecord& from, LayoutRecord* to) {
  to->job = from.job();
  to->generation = from.generation();
  to->begin = from.begin();
  to->microbatches = from.microbatches();
  for (const v1::LayoutRecord::Pipeline& p : from.pipelines()) {
    to->pipelines.push_back({p.first(),
                             p.end(),
                             {p.ranks().begin(), p.ranks().end()},
                             {p.nodes().begin(), p.nodes().end()}});
  }
  to->time = {from.time_ns()};
  return true;
}

void ToProto(const ToldRecord& from, v1::ToldRecord* to) {
  to->set_job(from.job);
  to->set_kind(from.kind);
  to->set_generation(from.generation);
  to->set_rank(from.rank);
  to->set_body(from.body);
  to->set_time_ns(from.time.ns);
  for (const NodeId& node : from.nodes) to->add_nodes(node);
}

bool FromProto(const v1::ToldRecord& from, ToldRecord* to) {
  *to = {from.job(),
         from.kind(),
         from.generation(),
         from.rank(),
         from.body(),
         {from.time_ns()},
         {from.nodes().begin(), from.nodes().end()}};
  return true;
}

}  // namespace everstep::controller
