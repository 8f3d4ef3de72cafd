#include "worker/agent/keeper_convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "proto/wire/convert.h"
#include "worker/agent/convert.h"
#include "worker/agent/worker_env.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

constexpr std::string_view kJobPrefix = "job/";

WorkerOnNode FromProcess(const v1::KeeperProcess& p) {
  WorkerOnNode w;
  w.rank = p.rank();
  w.local_rank = p.local_rank();
  w.pid = p.pid();
  w.running = p.running();
  if (!w.running) {
    w.exit = FromKeeper(p.exit());
    if (w.exit.error_file.empty()) w.exit.error_file = p.error_file();
  }
  return w;
}

Environment BaseEnvironment(const v1::Command& command) {
  return Environment(command.env().begin(), command.env().end());
}

// Adds the processes of one job to what memory says of it.
void AddProcesses(const v1::KeeperState& state, const Activate* activate, AdoptedJob* job) {
  JobOnNode& holds = job->holds;
  for (const v1::KeeperProcess& p : state.processes()) {
    if (p.job() != holds.job || !p.running()) continue;
    const bool current = holds.activated && p.generation() == holds.generation;
    if (!current) job->old_workers.emplace_back(p.generation(), FromProcess(p));
    // Without memory of it (never with our own keeper) the newest process names the generation.
    holds.generation = std::max(holds.generation, p.generation());
  }
  if (activate == nullptr || !holds.activated) return;
  for (const WorkerPlan& planned : activate->plan.workers) {
    WorkerOnNode worker;
    worker.rank = planned.rank;
    worker.local_rank = planned.local_rank;
    for (const v1::KeeperProcess& p : state.processes()) {
      if (p.job() == holds.job && p.generation() == holds.generation && p.rank() == planned.rank) {
        worker = FromProcess(p);
      }
    }
    holds.workers.push_back(std::move(worker));
  }
}

}  // namespace

std::string PreparedKey(const JobId& job) {
  return fmt::format("{}{}/prepared", kJobPrefix, job);
}
std::string ActivatedKey(const JobId& job) {
  return fmt::format("{}{}/activated", kJobPrefix, job);
}

v1::KeeperRemember Remember(const RememberIncarnation& e) {
  v1::KeeperRemember m;
  m.set_key(kIncarnationKey);
  m.set_value(std::to_string(e.incarnation));
  return m;
}

v1::KeeperRemember Remember(const RememberPrepared& e) {
  v1::Prepare prepare;
  prepare.set_job(e.job);
  prepare.set_generation(e.generation);
  prepare.set_data_key(e.data_key);
  wire::ToProto(e.command, prepare.mutable_command());
  v1::KeeperRemember m;
  m.set_key(PreparedKey(e.job));
  m.set_value(prepare.SerializeAsString());
  return m;
}

v1::KeeperRemember Remember(const RememberActivated& e) {
  v1::Activate activate = ToWire(e.activate);
  activate.clear_command();
  v1::KeeperRemember m;
  m.set_key(ActivatedKey(e.activate.job));
  m.set_value(activate.SerializeAsString());
  return m;
}

ExitInfo FromKeeper(const v1::KeeperExited& e) {
  ExitInfo out;
  out.code = e.code();
  out.oom_killed = e.oom_killed();
  out.by_everstep = e.by_request();
  out.occurred = Timestamp{e.exit_ns()};
  out.ran = Milliseconds(e.ran_ms());
  out.error_file = e.error_file();
  return out;
}

Adopted Adopt(const v1::KeeperState& state) {
  Adopted adopted;
  KeeperAttached& out = adopted.attached;
  out.fresh = false;
  const auto incarnation = state.memory().find(kIncarnationKey);
  if (incarnation != state.memory().end()) {
    const std::string& text = incarnation->second;
    std::from_chars(text.data(), text.data() + text.size(), out.remembered);
  }
  std::map<JobId, AdoptedJob> jobs;
  for (const auto& [key, value] : state.memory()) {
    v1::Prepare prepare;
    if (!key.starts_with(kJobPrefix) || !key.ends_with("/prepared")) continue;
    if (!prepare.ParseFromString(value) || key != PreparedKey(prepare.job())) continue;
    AdoptedJob& job = jobs[prepare.job()];
    job.holds.generation = prepare.generation();
    job.command = wire::FromProto(prepare.command());
    adopted.begun[prepare.job()] = {prepare.generation(), prepare.data_key()};
  }
  for (const auto& [key, value] : state.memory()) {
    v1::Activate activate;
    if (!key.starts_with(kJobPrefix) || !key.ends_with("/activated")) continue;
    if (!activate.ParseFromString(value) || key != ActivatedKey(activate.job())) continue;
    AdoptedJob& job = jobs[activate.job()];
    if (activate.generation() < job.holds.generation) continue;  // a newer one was prepared since
    job.holds.generation = activate.generation();
    job.holds.activated = true;
    job.group_rank = activate.plan().group_rank();
    adopted.activates[activate.job()] = ActivateFromWire(activate);
  }
  for (const v1::KeeperProcess& p : state.processes()) jobs[p.job()];
  for (const v1::KeeperArenaInfo& a : state.arenas()) jobs[a.job()];
  for (const v1::KeeperForkServerState& f : state.fork_servers()) {
    jobs[f.job()].fork_server_ready = f.ready();
  }
  for (auto& [id, job] : jobs) {
    job.holds.job = id;
    const auto activate = adopted.activates.find(id);
    AddProcesses(state, activate == adopted.activates.end() ? nullptr : &activate->second, &job);
    out.jobs.push_back(std::move(job));
  }
  return adopted;
}

std::vector<WorkerSpawn> BuildSpawns(const Activate& activate, const v1::Command& command,
                                     const NodeIdentity& node, std::uint32_t store_port,
                                     std::string* error) {
  std::vector<WorkerSpawn> out;
  const Environment base = BaseEnvironment(command);
  const auto visible = base.find("CUDA_VISIBLE_DEVICES");
  const std::string root = JobLogRoot(node.node_dir, command.log_dir(), activate.job, node.node);
  for (const WorkerPlan& planned : activate.plan.workers) {
    if (command.virtual_local_rank() &&
        VisibleDevice(visible == base.end() ? nullptr : &visible->second, planned.local_rank)
            .empty()) {
      *error = fmt::format(
          "local rank {} on node {} has no device: CUDA_VISIBLE_DEVICES={}; name more devices or "
          "lower --nproc-per-node",
          planned.local_rank, node.node, visible->second);
      return {};
    }
    WorkerSpawn spawn;
    spawn.paths = WorkerLogPaths(root, activate.generation, planned.local_rank);
    WorkerIdentity id;
    id.rank = planned.rank;
    id.local_rank = planned.local_rank;
    id.role_rank = planned.rank;
    id.group_rank = activate.plan.group_rank;
    id.world_size = activate.world_size;
    id.group_world_size = activate.group_world_size;
    id.local_world_size = activate.nproc_per_node;
    id.role = command.role();
    id.master_addr = activate.master_addr;
    id.master_port = activate.master_port;
    id.restart_count = activate.restart_count;
    id.max_restarts = command.max_restarts();
    id.run_id = command.run_id();
    // MASTER_PORT is this node's to serve: by its store host, or, when that is not the one (a fixed
    // --master-port, an interpreter without torch), by rank 0 itself.
    id.use_agent_store = activate.plan.group_rank != 0 || activate.master_port == store_port;
    id.virtual_local_rank = command.virtual_local_rank();
    id.signals_to_handle = command.signals_to_handle();
    id.error_file = spawn.paths.error_json;
    id.job = activate.job;
    id.node = node.node;
    id.generation = activate.generation;
    id.keeper_socket = node.keeper_socket;
    id.holders = activate.plan.peers.size() + 1;

    v1::KeeperSpawn& m = spawn.request;
    m.set_job(activate.job);
    m.set_generation(activate.generation);
    m.set_rank(planned.rank);
    m.set_local_rank(planned.local_rank);
    m.set_command_kind(static_cast<std::uint32_t>(command.kind()));
    m.set_python(command.python());
    m.set_target(command.target());
    for (const std::string& arg : command.args()) {
      m.add_args(ExpandLocalRank(arg, planned.local_rank));
    }
    for (const auto& [key, value] : WorkerEnvironment(base, id)) (*m.mutable_env())[key] = value;
    m.set_cwd(command.cwd());
    m.set_umask(command.umask());
    m.set_preload(command.preload());
    m.set_line_buffered(command.line_buffered());
    m.set_stdout_path(spawn.paths.stdout_log);
    m.set_stderr_path(spawn.paths.stderr_log);
    m.set_watch_start(command.start_timeout_ms() > 0);
    m.set_start_timeout_ms(command.start_timeout_ms());
    m.set_numa_binding(command.numa_binding());
    out.push_back(std::move(spawn));
  }
  return out;
}

v1::KeeperForkServer BuildForkServer(const JobId& job, const v1::Command& command,
                                     std::uint32_t local_world) {
  v1::KeeperForkServer m;
  m.set_job(job);
  m.set_python(command.python());
  for (const auto& [key, value] : JobEnvironment(BaseEnvironment(command), local_world)) {
    (*m.mutable_env())[key] = value;
  }
  m.set_cwd(command.cwd());
  m.set_command_kind(static_cast<std::uint32_t>(command.kind()));
  m.set_target(command.target());
  for (const std::string& arg : command.args()) m.add_args(ExpandLocalRank(arg, 0));
  return m;
}

v1::KeeperStoreHost BuildStoreHost(const JobId& job, Generation generation,
                                   const std::string& bind_address, const v1::Command& command) {
  v1::KeeperStoreHost m;
  m.set_job(job);
  m.set_generation(generation);
  m.set_bind_address(bind_address);
  m.set_python(command.python());
  *m.mutable_env() = command.env();
  return m;
}

}  // namespace everstep::agent
