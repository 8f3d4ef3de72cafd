#include "tests/sim/world/options.h"

#include <algorithm>

#include <fmt/format.h>

#include "proto/base/random.h"

namespace everstep::sim {
namespace {

// kind, weight, longest duration in ms (0: an instant), what the target is
enum class Target { kNode, kRank, kNone };
struct Kind {
  const char* name;
  std::uint32_t weight;
  std::int64_t longest_ms;
  Target target;
};
constexpr Kind kKinds[] = {
    {"node_crash", 10, 8000, Target::kNode},   // power loss: silence; boots again after `lasts`
    {"agent_crash", 10, 4000, Target::kNode},  // the agent's process; its keeper lives
    {"agent_stop", 6, 6000, Target::kNode},    // SIGSTOP, SIGCONT
    {"keeper_crash", 6, 0, Target::kNode},     // ... and its workers and memory
    {"keeper_stop", 5, 6000, Target::kNode},   // SIGSTOP, SIGCONT
    {"worker_kill", 12, 0, Target::kRank},     // SIGKILL from outside
    {"worker_exit", 4, 0, Target::kRank},      // exit code 1
    {"worker_abort", 4, 0, Target::kRank},     // SIGABRT
    {"worker_stop", 4, 0, Target::kRank},      // SIGSTOP, seen by the keeper
    {"worker_unkillable", 3, 30000, Target::kRank},  // state D: SIGKILL waits
    {"partition", 10, 9000, Target::kNode},          // node and controller do not hear each other
    {"isolate", 6, 9000, Target::kNode},             // the node hears nobody
    {"deaf", 4, 9000, Target::kNode},                // the node does not hear the controller
    {"mute", 4, 9000, Target::kNode},                // ... the controller does not hear the node
    {"stream_break", 10, 0, Target::kNode},          // reset; reconnects at once
    {"controller_crash", 12, 3000, Target::kNone},
    {"controller_stop", 5, 5000, Target::kNone},  // SIGSTOP, SIGCONT
    {"disk_fail", 4, 0, Target::kNone},  // a sync of the controller's store fails: it aborts
    {"drain", 3, 6000, Target::kNode},   // and undrain
    {"notice", 3, 5000, Target::kNode},  // the node goes away after `lasts`
    {"corrupt", 4, 0, Target::kNode},    // one slot's bytes
    {"rollback", 3, 0, Target::kNone},   // an operator sends j1 back to its newest commit
    {"fork_fail", 3, 2000, Target::kNode},
    {"store_host_fail", 2, 2000, Target::kNode},  // the TCPStore does not come up
    {"slow_disk", 4, 4000, Target::kNone},        // the controller's syncs take up to 400 ms
    {"slow_network", 4, 4000, Target::kNone},
    {"packet_loss", 4, 4000, Target::kNone},  // half of the checkpoint plane's messages
    // Where a job has a checkpoint directory; drawn apart, so that all else stays what it was.
    {"files_fail", 0, 5000, Target::kNone},  // nothing can be written there
    {"files_damage", 0, 0, Target::kNone},   // j1's newest checkpoint cannot be read
    {"rollback_far", 0, 0, Target::kNone},   // an operator sends j1 back to what only files have
    {"all_keepers", 0, 0, Target::kNone},    // every copy in memory dies at once
    // Of fork servers; drawn apart, likewise.
    {"imports_hang", 0, 12000, Target::kNode},  // one that starts meanwhile is never ready
    {"imports_fail", 0, 4000, Target::kNode},   // ... cannot be had
    {"worker_refuse", 0, 0, Target::kRank},     // refuses its input, and ends; drawn apart, too
};
constexpr const char* kFileFaults[] = {"files_fail", "files_damage", "rollback_far", "all_keepers"};
constexpr const char* kImportFaults[] = {"imports_hang", "imports_fail"};

}  // namespace

const std::vector<std::string>& FaultKinds() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Kind& kind : kKinds) all.emplace_back(kind.name);
    return all;
  }();
  return names;
}

WorldOptions DrawWorld(std::uint64_t seed, std::uint32_t bugs) {
  Random random(seed ^ 0xE57E95EEDULL);
  WorldOptions o;
  o.seed = seed;
  o.nodes = static_cast<std::uint32_t>(random.Between(2, 6));
  o.controller.bugs = bugs;
  if (random.Chance(400)) {  // impatient: nodes are given up before they answer
    o.controller.prepare_timeout = Milliseconds(random.Between(2000, 12000));
    o.controller.activate_timeout = Milliseconds(random.Between(2000, 20000));
    o.controller.stop_timeout = Milliseconds(random.Between(3000, 20000));
  }
  if (random.Chance(300)) o.controller.commit_patience = Milliseconds(random.Between(2000, 20000));
  Random warm(seed ^ 0x3A2AULL);  // of its own, as those below
  if (warm.Chance(400)) o.controller.warm_patience = Milliseconds(warm.Between(300, 8000));
  o.network.max_delay =
      Milliseconds(random.Chance(800) ? random.Between(1, 40) : random.Between(40, 250));
  o.network.late_per_mille = static_cast<std::uint32_t>(random.Between(0, 600));
  o.network.drop_per_mille =
      random.Chance(500) ? static_cast<std::uint32_t>(random.Between(0, 100)) : 0;
  o.network.duplicate_per_mille = static_cast<std::uint32_t>(random.Between(0, 100));
  o.network.slow_per_mille =
      random.Chance(300) ? static_cast<std::uint32_t>(random.Between(0, 50)) : 0;
  o.step_time = Milliseconds(random.Between(80, 600));
  o.total_steps = std::max<Step>(10, Milliseconds(random.Between(5000, 35000)) / o.step_time);
  o.replicated_layout = random.Chance(650);
  Random shares(seed ^ 0x5AA4E5ULL);
  if (!o.replicated_layout) o.shares = shares.Chance(500);
  o.mixed = o.shares && shares.Chance(300);
  o.peers_exit = random.Chance(400);
  o.same_machine = random.Chance(300);
  const std::int64_t jobs = random.Chance(250) ? 2 : 1;
  Random copies(seed ^ 0xC0B1E5ULL);  // of its own: the other draws stay what they were
  Random files(seed ^ 0xF11E5ULL);    // likewise
  Random sessions(seed ^ 0x5E5510ULL);
  Random tells(seed ^ 0x7E115ULL);
  for (std::int64_t i = 0; i < jobs; ++i) {
    controller::JobSpec spec;
    spec.job = fmt::format("j{}", i + 1);
    spec.max_nodes = static_cast<std::uint32_t>(random.Between(1, o.nodes));
    spec.min_nodes = static_cast<std::uint32_t>(random.Between(1, spec.max_nodes));
    spec.nproc_per_node = static_cast<std::uint32_t>(random.Between(1, 2));
    spec.max_restarts = 1000;
    spec.max_no_progress = 1000;
    spec.max_start_failures = 1000;
    spec.command.opaque = spec.job;
    if (copies.Chance(400)) {  // the default otherwise
      spec.copies = static_cast<std::uint32_t>(copies.Between(1, std::min(4u, spec.max_nodes)));
    }
    Random parity(seed ^ 0x9A217ULL ^ static_cast<std::uint64_t>(i));
    if (!o.replicated_layout && spec.max_nodes >= 3 && parity.Chance(500)) {
      spec.parity_states =
          static_cast<std::uint32_t>(parity.Between(2, std::min(4u, spec.max_nodes - 1)));
      spec.copies = static_cast<std::uint32_t>(
          parity.Between(2, std::min(3u, spec.max_nodes - spec.parity_states + 1)));
    }
    SimJob job;
    job.checkpoints = !random.Chance(120);
    job.sessions = sessions.Chance(500);
    job.tells = tells.Chance(500);
    if (random.Chance(200)) {
      job.tight = true;
      spec.max_restarts = static_cast<std::int32_t>(random.Between(0, 3));
      spec.strict_restarts = spec.max_restarts == 0 && random.Chance(500);
      spec.max_no_progress = static_cast<std::uint32_t>(random.Between(1, 5));
      spec.max_start_failures = static_cast<std::uint32_t>(random.Between(0, 3));
      if (random.Chance(400)) spec.join_timeout = Milliseconds(random.Between(2000, 15000));
    }
    if (random.Chance(100)) job.cancel_at = Milliseconds(random.Between(1000, 24000));
    job.again = random.Chance(200);
    // A run under an ended one's name goes on from the files that it left; that is not drawn here.
    if (files.Chance(400) && !job.again && job.checkpoints) {
      spec.ckpt_dir = "/ckpt/" + spec.job;
      spec.ckpt_every_steps = static_cast<std::uint64_t>(files.Between(0, 8));
      if (spec.ckpt_every_steps == 0) spec.ckpt_every = Milliseconds(files.Between(500, 4000));
      if (files.Chance(300)) spec.verify_after = static_cast<std::uint32_t>(files.Between(1, 6));
    }
    job.spec = std::move(spec);
    o.jobs.push_back(std::move(job));
  }
  return o;
}

std::string Describe(const WorldOptions& o) {
  std::string text = fmt::format(
      "{} nodes, links up to {} ms, step {} ms, {} steps, {} layout, a lost peer {}", o.nodes,
      ToMilliseconds(o.network.max_delay), ToMilliseconds(o.step_time), o.total_steps,
      o.replicated_layout ? "replicated"
      : o.mixed           ? "shares, now and then mixed,"
      : o.shares          ? "shares"
                          : "sharded",
      o.peers_exit ? "ends a worker" : "hangs a worker");
  for (const SimJob& sim_job : o.jobs) {
    const controller::JobSpec& job = sim_job.spec;
    text += fmt::format(
        "\njob {}: {} to {} nodes, {} workers each{}{}{}{}{}{}{}{}", job.job, job.min_nodes,
        job.max_nodes, job.nproc_per_node,
        job.parity_states > 0 ? fmt::format(", rs({}+{})", job.parity_states, job.copies - 1)
        : job.copies == 0     ? ""
                              : fmt::format(", {} copies", job.copies),
        sim_job.checkpoints ? "" : ", without checkpoints", sim_job.sessions ? ", of sessions" : "",
        sim_job.tells ? ", with a ledger" : "", job.ckpt_dir.empty() ? "" : ", with files",
        sim_job.tight ? ", small budgets" : "", sim_job.cancel_at.count() > 0 ? ", cancelled" : "",
        sim_job.again ? ", run twice" : "");
  }
  return text;
}

std::vector<Fault> DrawFaults(const WorldOptions& o) {
  Random random(o.seed ^ 0xFA0175ULL);
  std::uint32_t total = 0;
  for (const Kind& kind : kKinds) total += kind.weight;
  std::vector<Fault> faults;
  const std::int64_t count = random.Between(0, 14);
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t pick = random.Below(total);
    const Kind* kind = kKinds;
    while (pick >= kind->weight) pick -= (kind++)->weight;
    Fault fault;
    fault.at = Milliseconds(random.Between(500, ToMilliseconds(o.fault_phase)));
    fault.kind = kind->name;
    if (kind->longest_ms > 0) fault.lasts = Milliseconds(random.Between(50, kind->longest_ms));
    if (kind->target != Target::kNone)
      fault.target = fmt::format("n{}", random.Between(1, o.nodes));
    if (kind->target == Target::kRank) fault.target += fmt::format("/{}", random.Below(2));
    // Now and then faults come in a burst: a second failure while the first is being repaired.
    if (!faults.empty() && random.Chance(400)) {
      fault.at = faults.back().at + Milliseconds(random.Between(0, 800));
    }
    faults.push_back(std::move(fault));
  }
  const bool with_files = std::any_of(o.jobs.begin(), o.jobs.end(),
                                      [](const SimJob& job) { return !job.spec.ckpt_dir.empty(); });
  Random files(o.seed ^ 0xF11EFA0175ULL);
  for (std::int64_t i = with_files ? files.Between(0, 3) : 0; i > 0; --i) {
    Fault fault;
    fault.at = Milliseconds(files.Between(4000, ToMilliseconds(o.fault_phase)));
    fault.kind = kFileFaults[files.Below(std::size(kFileFaults))];
    if (fault.kind == "files_fail") fault.lasts = Milliseconds(files.Between(500, 5000));
    faults.push_back(std::move(fault));
  }
  Random imports(o.seed ^ 0x1A4097ULL);
  for (std::int64_t i = imports.Chance(400) ? imports.Between(1, 3) : 0; i > 0; --i) {
    Fault fault;
    fault.at = Milliseconds(imports.Between(500, ToMilliseconds(o.fault_phase)));
    fault.kind = kImportFaults[imports.Below(std::size(kImportFaults))];
    fault.lasts = Milliseconds(imports.Between(500, fault.kind == "imports_hang" ? 12000 : 4000));
    fault.target = fmt::format("n{}", imports.Between(1, o.nodes));
    faults.push_back(std::move(fault));
  }
  Random refusal(o.seed ^ 0x2EF05ULL);
  if (refusal.Chance(60)) {
    Fault fault;
    fault.at = Milliseconds(refusal.Between(500, ToMilliseconds(o.fault_phase)));
    fault.kind = "worker_refuse";
    fault.target = fmt::format("n{}/{}", refusal.Between(1, o.nodes), refusal.Below(2));
    faults.push_back(std::move(fault));
  }
  std::stable_sort(faults.begin(), faults.end(),
                   [](const Fault& a, const Fault& b) { return a.at < b.at; });
  return faults;
}

}  // namespace everstep::sim
