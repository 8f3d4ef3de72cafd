#include "worker/agent/worker_env.h"

#include <cctype>

namespace everstep::agent {
namespace {

constexpr std::string_view kDefaultSignals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT";
constexpr std::string_view kMacro = "local_rank";

bool IdentifierChar(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_';
}

std::string Trim(std::string_view s) {
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
  return std::string(s);
}

}  // namespace

std::string VisibleDevice(const std::string* visible, std::int32_t local_rank) {
  if (local_rank < 0) return "";
  if (visible == nullptr) return std::to_string(local_rank);
  std::string_view rest = *visible;
  for (std::int32_t i = 0;; ++i) {
    const auto comma = rest.find(',');
    if (i == local_rank) return Trim(rest.substr(0, comma));
    if (comma == std::string_view::npos) return "";
    rest.remove_prefix(comma + 1);
  }
}

Environment JobEnvironment(const Environment& base, std::uint32_t local_world) {
  Environment env = base;
  env.emplace("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1");
  if (local_world > 1) env.emplace("OMP_NUM_THREADS", "1");
  return env;
}

Environment WorkerEnvironment(const Environment& base, const WorkerIdentity& id) {
  Environment env = JobEnvironment(base, id.local_world_size);
  env["LOCAL_RANK"] = std::to_string(id.local_rank);
  env["RANK"] = std::to_string(id.rank);
  env["GROUP_RANK"] = std::to_string(id.group_rank);
  env["ROLE_RANK"] = std::to_string(id.role_rank);
  env["ROLE_NAME"] = id.role.empty() ? "default" : id.role;
  env["LOCAL_WORLD_SIZE"] = std::to_string(id.local_world_size);
  env["WORLD_SIZE"] = std::to_string(id.world_size);
  env["GROUP_WORLD_SIZE"] = std::to_string(id.group_world_size);
  env["ROLE_WORLD_SIZE"] = std::to_string(id.world_size);  // one role per job
  env["MASTER_ADDR"] = id.master_addr;
  env["MASTER_PORT"] = std::to_string(id.master_port);
  env["TORCHELASTIC_RESTART_COUNT"] = std::to_string(id.restart_count);
  env["TORCHELASTIC_MAX_RESTARTS"] = std::to_string(id.max_restarts);
  env["TORCHELASTIC_RUN_ID"] = id.run_id;
  env["TORCHELASTIC_USE_AGENT_STORE"] = id.use_agent_store ? "True" : "False";
  env["TORCHELASTIC_SIGNALS_TO_HANDLE"] =
      id.signals_to_handle.empty() ? std::string(kDefaultSignals) : id.signals_to_handle;
  env["TORCHELASTIC_ERROR_FILE"] = id.error_file;
  if (id.virtual_local_rank) {
    const auto visible = base.find("CUDA_VISIBLE_DEVICES");
    env["LOCAL_RANK"] = "0";
    env["CUDA_VISIBLE_DEVICES"] =
        VisibleDevice(visible == base.end() ? nullptr : &visible->second, id.local_rank);
  }
  env["EVERSTEP_JOB"] = id.job;
  env["EVERSTEP_NODE"] = id.node;
  env["EVERSTEP_GENERATION"] = std::to_string(id.generation);
  env["EVERSTEP_KEEPER"] = id.keeper_socket;
  env["EVERSTEP_HOLDERS"] = std::to_string(id.holders);
  return env;
}

std::string ExpandLocalRank(std::string_view arg, std::int32_t local_rank) {
  const std::string value = std::to_string(local_rank);
  std::string out;
  while (!arg.empty()) {
    const auto dollar = arg.find('$');
    out.append(arg.substr(0, dollar));
    if (dollar == std::string_view::npos) break;
    arg.remove_prefix(dollar);
    if (arg.starts_with("$$")) {
      out += '$';
      arg.remove_prefix(2);
    } else if (arg.starts_with("${local_rank}")) {
      out += value;
      arg.remove_prefix(std::string_view("${local_rank}").size());
    } else if (arg.substr(1).starts_with(kMacro) &&
               (arg.size() == kMacro.size() + 1 || !IdentifierChar(arg[kMacro.size() + 1]))) {
      out += value;
      arg.remove_prefix(kMacro.size() + 1);
    } else {
      out += '$';
      arg.remove_prefix(1);
    }
  }
  return out;
}

std::vector<std::string> ExpandLocalRank(const std::vector<std::string>& args,
                                         std::int32_t local_rank) {
  std::vector<std::string> out;
  out.reserve(args.size());
  for (const std::string& arg : args) out.push_back(ExpandLocalRank(arg, local_rank));
  return out;
}

}  // namespace everstep::agent
