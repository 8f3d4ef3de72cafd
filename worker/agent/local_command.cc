#include "worker/agent/local_command.h"

#include <fstream>

#include <fmt/format.h>

namespace everstep::agent {
namespace {

void Overlaid(const v1::Command& local, v1::Command* command) {
  v1::Command merged = local;
  merged.set_run_id(command->run_id());
  merged.set_max_restarts(command->max_restarts());
  merged.set_restart_grace_ms(command->restart_grace_ms());
  merged.set_stop_grace_ms(command->stop_grace_ms());
  merged.set_start_timeout_ms(command->start_timeout_ms());
  *command = std::move(merged);
}

}  // namespace

bool LocalCommand::Load(const std::string& path, std::string* error) {
  if (path.empty()) return true;
  std::ifstream in(path, std::ios::binary);
  given_ = in && command_.ParseFromIstream(&in);
  if (!given_) {
    *error = fmt::format("--local-command {}: {}; it is written by everstep-run", path,
                         in.is_open() ? "is no command" : "cannot be read");
  }
  return given_;
}

void LocalCommand::Overlay(v1::ControllerMessage* message) const {
  if (!given_) return;
  switch (message->body_case()) {
    case v1::ControllerMessage::kWarm:
      Overlaid(command_, message->mutable_warm()->mutable_command());
      break;
    case v1::ControllerMessage::kPrepare:
      Overlaid(command_, message->mutable_prepare()->mutable_command());
      break;
    case v1::ControllerMessage::kActivate:
      Overlaid(command_, message->mutable_activate()->mutable_command());
      break;
    default: break;
  }
}

}  // namespace everstep::agent
