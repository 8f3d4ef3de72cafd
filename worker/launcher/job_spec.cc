#include "worker/launcher/job_spec.h"

#include <cstdlib>
#include <filesystem>

#include <fmt/format.h>
#include <google/protobuf/util/json_util.h>

#include "worker/launcher/flag_values.h"

namespace everstep::launcher {
namespace {

std::uint32_t ConfigMilliseconds(const LaunchFlags& flags, const char* key,
                                 std::uint32_t fallback) {
  const auto found = flags.rdzv_conf.find(key);
  double seconds = 0;
  if (found == flags.rdzv_conf.end() || !ReadSeconds(found->second, &seconds).empty()) {
    return fallback;
  }
  return static_cast<std::uint32_t>(seconds * 1000);
}

v1::Command::Kind KindOf(ScriptKind kind) {
  switch (kind) {
    case ScriptKind::kPython: return v1::Command::SCRIPT;
    case ScriptKind::kModule: return v1::Command::MODULE;
    case ScriptKind::kProgram: return v1::Command::PROGRAM;
    case ScriptKind::kRunPath: return v1::Command::RUN_PATH;
  }
  return v1::Command::KIND_UNSPECIFIED;
}

std::string StreamText(const StreamSpec& spec) {
  if (spec.by_local_rank.empty()) return std::to_string(spec.all);
  std::string text;
  for (const auto& [rank, bits] : spec.by_local_rank) {
    text += fmt::format("{}{}:{}", text.empty() ? "" : ",", rank, bits);
  }
  return text;
}

}  // namespace

std::string JobName(const LaunchFlags& flags, const std::string& random) {
  std::string name = flags.name;
  if (!name.empty()) return name;
  if (flags.rdzv_id != "none" && !flags.standalone && ReadJobName(flags.rdzv_id, &name).empty()) {
    return name;
  }
  std::string stem = std::filesystem::path(flags.script).filename().string();
  if (stem.size() > 3 && stem.compare(stem.size() - 3, 3, ".py") == 0) stem.resize(stem.size() - 3);
  for (char& c : stem) {
    const bool fits = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      c == '_' || c == '.' || c == '-';
    if (!fits) c = '-';
  }
  if (stem.empty() || stem[0] == '.') stem = "job";
  return fmt::format("{}-{}", stem.substr(0, 64), random);
}

std::string MakeJobSpec(const LaunchFlags& flags, const SubmitterFacts& facts, v1::JobSpec* spec) {
  std::size_t bytes = 0;
  for (const auto& [key, value] : facts.environment) bytes += key.size() + value.size() + 2;
  if (bytes > kMaxEnvironmentBytes) {
    return fmt::format(
        "everstep-run: the environment has {} bytes, a job carries at most {}; unset large "
        "variables",
        bytes, kMaxEnvironmentBytes);
  }
  *spec = {};
  spec->set_job(JobName(flags, facts.random));
  spec->set_min_nodes(flags.min_nodes);
  spec->set_max_nodes(flags.max_nodes);
  spec->set_nproc_per_node(facts.workers);
  spec->set_spares(flags.spares);
  spec->set_max_restarts(flags.max_restarts);
  spec->set_strict_restarts(flags.max_restarts_given && flags.max_restarts == 0);
  spec->set_join_timeout_ms(ConfigMilliseconds(flags, "join_timeout", kDefaultJoinTimeoutMs));
  spec->set_last_call_ms(ConfigMilliseconds(flags, "last_call_timeout", kDefaultLastCallMs));
  // A port the user chose is where scripts of other programs may look. With more nodes the
  // controller stands there: it is the one port that all of them know.
  const bool chosen = flags.rdzv_backend == "static" && !flags.standalone && flags.max_nodes == 1;
  spec->set_master_port(chosen ? flags.master_port.value_or(0) : 0);
  spec->set_submitted_ns(facts.now_ns);

  v1::Command* command = spec->mutable_command();
  command->set_kind(KindOf(flags.script_kind));
  command->set_python(facts.python);
  command->set_target(flags.script);
  for (const std::string& arg : flags.script_args) command->add_args(arg);
  for (const auto& [key, value] : facts.environment) (*command->mutable_env())[key] = value;
  if (facts.workers >
      1) {  // torchrun's choice; made here, so that fork servers import torch with it
    command->mutable_env()->insert({"OMP_NUM_THREADS", "1"});
  }
  command->set_cwd(facts.cwd);
  command->set_umask(facts.umask);
  command->set_preload(flags.preload && flags.script_kind != ScriptKind::kProgram);
  command->set_line_buffered(facts.terminal);
  if (!flags.log_dir.empty()) {
    command->set_log_dir((std::filesystem::path(facts.cwd) / flags.log_dir).lexically_normal());
  }
  spec->set_copies(flags.copies);
  spec->set_parity_states(flags.parity_states);
  spec->set_verify_after_steps(flags.verify_after);
  if (!flags.ckpt_dir.empty()) {
    spec->set_ckpt_dir((std::filesystem::path(facts.cwd) / flags.ckpt_dir).lexically_normal());
    spec->set_ckpt_every_steps(flags.ckpt_every_steps);
    spec->set_ckpt_every_ms(
        static_cast<std::uint32_t>(std::min(flags.ckpt_every_seconds * 1000, 4.0e9)));
    command->set_checkpoint_dir(spec->ckpt_dir());
    command->set_checkpoint_keep(flags.ckpt_keep);
  }
  command->set_redirects(StreamText(flags.redirects));
  command->set_tee(StreamText(flags.tee));
  command->set_numa_binding(flags.numa_binding);
  command->set_restart_grace_ms(std::min(kRestartGraceMs, flags.shutdown_timeout_seconds * 1000));
  command->set_stop_grace_ms(flags.shutdown_timeout_seconds * 1000);
  command->set_start_timeout_ms(kStartTimeoutMs);
  command->set_role(flags.role);
  command->set_max_restarts(flags.max_restarts);
  command->set_run_id(flags.standalone || flags.rdzv_id == "none" ? spec->job() : flags.rdzv_id);
  command->set_signals_to_handle(fmt::format("{}", fmt::join(flags.signals_to_handle, ",")));
  command->set_virtual_local_rank(flags.virtual_local_rank);
  command->set_event_log_handler(flags.event_log_handler);
  return {};
}

std::string JobSpecJson(v1::JobSpec spec) {
  spec.mutable_command()->clear_env();
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  if (!google::protobuf::util::MessageToJsonString(spec, &text, options).ok()) {
    return "{\"error\": \"an argument is not UTF-8\"}\n";
  }
  return text;
}

}  // namespace everstep::launcher
