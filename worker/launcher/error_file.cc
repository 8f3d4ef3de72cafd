#include "worker/launcher/error_file.h"

#include <nlohmann/json.hpp>

namespace everstep::launcher {
namespace {

std::string StringAt(const nlohmann::json& object, const char* key) {
  if (!object.is_object()) return {};
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

}  // namespace

std::string TextOfErrorFile(std::string_view json) {
  const nlohmann::json document =
      nlohmann::json::parse(json.begin(), json.end(), nullptr, /*allow_exceptions=*/false);
  if (!document.is_object()) return {};
  const auto message = document.find("message");
  if (message == document.end()) return {};
  if (message->is_string()) return message->get<std::string>();
  if (!message->is_object()) return {};
  const auto extra = message->find("extraInfo");
  const std::string traceback =
      extra == message->end() ? std::string() : StringAt(*extra, "py_callstack");
  return traceback.empty() ? StringAt(*message, "message") : traceback;
}

}  // namespace everstep::launcher
