#include "controller/planner/profile.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include <fmt/format.h>

namespace everstep::planner {
namespace {

constexpr std::string_view kMagic = "everstep-profile";
constexpr double kMiB = 1024.0 * 1024.0;
constexpr double kMaxLatencyUs = 1e7;
constexpr double kMaxGbS = 1e6;
constexpr double kMaxMemoryMiB = 1e9;

std::string_view Trim(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

// What a person is shown of a value that someone wrote.
std::string Shown(std::string_view text) {
  std::string out(text.substr(0, 40));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7E) c = '?';
  }
  return '"' + out + (text.size() > 40 ? "...\"" : "\"");
}

std::vector<std::string_view> Split(std::string_view line) {
  std::vector<std::string_view> cells;
  for (;;) {
    const std::size_t comma = line.find(',');
    cells.push_back(Trim(line.substr(0, comma)));
    if (comma == std::string_view::npos) return cells;
    line.remove_prefix(comma + 1);
  }
}

// A column or a setting: its name, what it may be, and where it goes.
struct Field {
  std::string_view name;
  double least = 0;
  double most = 0;
  bool whole = false;
  double scale = 1;  // of the value that is stored
};

constexpr Field kColumns[] = {
    {"layer", 0, kMaxLayers - 1, true, 1},
    {"forward_ms", 0, kMaxLayerMs, false, 1e6},
    {"backward_ms", 0, kMaxLayerMs, false, 1e6},
    {"optimizer_ms", 0, kMaxLayerMs, false, 1e6},
    {"activation_mib", 0, static_cast<double>(kMaxLayerBytes) / kMiB, false, kMiB},
    {"output_mib", 0, static_cast<double>(kMaxLayerBytes) / kMiB, false, kMiB},
    {"parameters", 0, static_cast<double>(kMaxLayerParameters), true, 1},
};
constexpr std::size_t kColumnCount = std::size(kColumns);
constexpr std::size_t kRequired[] = {0, 1, 2, 6};

constexpr Field kSettings[] = {
    {"microbatch", 1, 1 << 20, true, 1},
    {"devices-per-node", 1, kMaxDevices, true, 1},
    {"device-memory-mib", 0, kMaxMemoryMiB, false, kMiB},
    {"inside-latency-us", 0, kMaxLatencyUs, false, 1e3},
    {"inside-gb-s", 0, kMaxGbS, false, 1e9},
    {"between-latency-us", 0, kMaxLatencyUs, false, 1e3},
    {"between-gb-s", 0, kMaxGbS, false, 1e9},
    {"weight-bytes", 1, 16, true, 1},
    {"gradient-bytes", 0, 16, true, 1},
    {"optimizer-bytes", 0, 32, true, 1},
};

// The value in the field's unit, or what is wrong with it.
Answer<double> Number(const Field& field, std::string_view text) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value);
  if (text.empty()) return Refusal{fmt::format("{} is missing", field.name), ""};
  if (error != std::errc() || at != end || !std::isfinite(value)) {
    return Refusal{fmt::format("{} cannot be {}", field.name, Shown(text)), "a plain number"};
  }
  if (value < field.least || value > field.most) {
    return Refusal{fmt::format("{} is {}", field.name, Shown(text)),
                   fmt::format("a number from {} to {}", field.least, field.most)};
  }
  if (field.whole && value != std::floor(value)) {
    return Refusal{fmt::format("{} is {}", field.name, Shown(text)), "a whole number"};
  }
  return value;
}

Refusal AtLine(std::size_t line, const Refusal& refusal) {
  return {fmt::format("line {}: {}", line, refusal.what), refusal.change};
}

std::string Names(const Field* fields, std::size_t count) {
  std::string out;
  for (std::size_t i = 0; i < count; ++i) {
    out += i == 0 ? "" : ", ";
    out += fields[i].name;
  }
  return out;
}

std::int64_t Whole(double value) {
  return static_cast<std::int64_t>(std::llround(value));
}

void Set(Profile* profile, std::size_t setting, double value) {
  const double scaled = value * kSettings[setting].scale;
  const auto count = static_cast<std::uint32_t>(value);
  switch (setting) {
    case 0: profile->microbatch = count; break;
    case 1: profile->devices_per_node = count; break;
    case 2: profile->device_memory_bytes = Whole(scaled); break;
    case 3: profile->inside.latency_ns = Whole(scaled); break;
    case 4: profile->inside.bytes_per_s = Whole(scaled); break;
    case 5: profile->between.latency_ns = Whole(scaled); break;
    case 6: profile->between.bytes_per_s = Whole(scaled); break;
    case 7: profile->weight_bytes = count; break;
    case 8: profile->gradient_bytes = count; break;
    default: profile->optimizer_bytes = count; break;
  }
}

// Reads one text; the first refusal ends it.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  Answer<Profile> Read() {
    if (text_.size() > kMaxProfileBytes) {
      return Refusal{fmt::format("a profile of {} bytes", text_.size()),
                     fmt::format("at most {} bytes are read", kMaxProfileBytes)};
    }
    for (std::size_t at = 0; at < text_.size();) {
      const std::size_t end = std::min(text_.find('\n', at), text_.size());
      const std::string_view line = Trim(text_.substr(at, end - at));
      at = end + 1;
      ++line_;
      if (line.empty() || line.front() == '#') continue;
      if (auto refusal = Line(line)) return AtLine(line_, *refusal);
    }
    if (columns_.empty()) {
      return Refusal{
          "the profile has no table of layers",
          fmt::format("a header with {} and a line for each layer", Names(kColumns, kColumnCount))};
    }
    return CheckProfile(std::move(profile_));
  }

 private:
  std::optional<Refusal> Line(std::string_view line) {
    const bool first = !begun_;
    begun_ = true;
    if (first && line.substr(0, kMagic.size()) == kMagic) {
      const std::string_view version = Trim(line.substr(kMagic.size()));
      if (version == "1") return std::nullopt;
      return Refusal{fmt::format("a profile of version {}", Shown(version)),
                     "this program reads version 1"};
    }
    if (!columns_.empty()) return Row(line);
    const std::size_t equals = line.find('=');
    return equals == std::string_view::npos
               ? Header(line)
               : Setting(Trim(line.substr(0, equals)), Trim(line.substr(equals + 1)));
  }

  std::optional<Refusal> Setting(std::string_view name, std::string_view value) {
    if (!set_.insert(std::string(name)).second) {
      return Refusal{fmt::format("{} twice", Shown(name)), ""};
    }
    if (name == "model") {
      if (value.empty() || value.size() > 200 ||
          std::any_of(value.begin(), value.end(), [](char c) { return c <= ' ' || c > '~'; })) {
        return Refusal{fmt::format("model cannot be {}", Shown(value)),
                       "1 to 200 printable characters without blanks"};
      }
      profile_.model = value;
      return std::nullopt;
    }
    const auto* field = std::find_if(std::begin(kSettings), std::end(kSettings),
                                     [&](const Field& f) { return f.name == name; });
    if (field == std::end(kSettings)) {
      return Refusal{fmt::format("no setting is called {}", Shown(name)),
                     "model, " + Names(kSettings, std::size(kSettings))};
    }
    const Answer<double> number = Number(*field, value);
    if (!number.ok()) return number.refusal();
    Set(&profile_, static_cast<std::size_t>(field - kSettings), number.value());
    return std::nullopt;
  }

  std::optional<Refusal> Header(std::string_view line) {
    std::array<bool, kColumnCount> seen{};
    for (const std::string_view name : Split(line)) {
      const auto* field = std::find_if(std::begin(kColumns), std::end(kColumns),
                                       [&](const Field& f) { return f.name == name; });
      const auto column = static_cast<std::size_t>(field - kColumns);
      if (field == std::end(kColumns) || seen[column]) {
        return Refusal{fmt::format("{} {}", Shown(name),
                                   field == std::end(kColumns) ? "is no column" : "twice"),
                       "columns: " + Names(kColumns, kColumnCount)};
      }
      seen[column] = true;
      columns_.push_back(column);
    }
    for (const std::size_t column : kRequired) {
      if (seen[column]) continue;
      return Refusal{fmt::format("the table has no column {}", kColumns[column].name),
                     "columns: " + Names(kColumns, kColumnCount)};
    }
    return std::nullopt;
  }

  std::optional<Refusal> Row(std::string_view line) {
    const std::vector<std::string_view> cells = Split(line);
    if (cells.size() != columns_.size()) {
      return Refusal{fmt::format("{} values for {} columns", cells.size(), columns_.size()), ""};
    }
    Layer layer;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const Field& field = kColumns[columns_[i]];
      const Answer<double> number = Number(field, cells[i]);
      if (!number.ok()) return number.refusal();
      const std::int64_t value = Whole(number.value() * field.scale);
      switch (columns_[i]) {
        case 0:
          if (value != static_cast<std::int64_t>(profile_.layers.size())) {
            return Refusal{
                fmt::format("layer {} where layer {} was expected", value, profile_.layers.size()),
                "layers in order from 0, each once"};
          }
          break;
        case 1: layer.forward_ns = value; break;
        case 2: layer.backward_ns = value; break;
        case 3: layer.optimizer_ns = value; break;
        case 4: layer.activation_bytes = value; break;
        case 5: layer.output_bytes = value; break;
        default: layer.parameters = value; break;
      }
    }
    if (layer.forward_ns + layer.backward_ns == 0) {
      return Refusal{fmt::format("layer {} takes no time", profile_.layers.size()),
                     "forward_ms + backward_ms of at least 0.000001; join it with a neighbour"};
    }
    profile_.layers.push_back(layer);
    return std::nullopt;
  }

  std::string_view text_;
  std::size_t line_ = 0;
  bool begun_ = false;
  std::set<std::string> set_;
  std::vector<std::size_t> columns_;
  Profile profile_;
};

// The shortest decimal that reads back as the same whole number of `scale`ths.
std::string Decimal(std::int64_t value, double scale) {
  return fmt::format("{}", static_cast<double>(value) / scale);
}

}  // namespace

Answer<Profile> ParseProfile(std::string_view text) {
  return Reader(text).Read();
}

std::string ProfileText(const Profile& p) {
  std::string out = fmt::format("{} 1\n", kMagic);
  if (!p.model.empty()) out += fmt::format("model = {}\n", p.model);
  out += fmt::format(
      "microbatch = {}\ndevices-per-node = {}\ndevice-memory-mib = {}\n"
      "inside-latency-us = {}\ninside-gb-s = {}\nbetween-latency-us = {}\nbetween-gb-s = {}\n"
      "weight-bytes = {}\ngradient-bytes = {}\noptimizer-bytes = {}\n"
      "layer,forward_ms,backward_ms,optimizer_ms,activation_mib,output_mib,parameters\n",
      p.microbatch, p.devices_per_node, Decimal(p.device_memory_bytes, kMiB),
      Decimal(p.inside.latency_ns, 1e3), Decimal(p.inside.bytes_per_s, 1e9),
      Decimal(p.between.latency_ns, 1e3), Decimal(p.between.bytes_per_s, 1e9), p.weight_bytes,
      p.gradient_bytes, p.optimizer_bytes);
  for (std::size_t i = 0; i < p.layers.size(); ++i) {
    const Layer& l = p.layers[i];
    out +=
        fmt::format("{},{},{},{},{},{},{}\n", i, Decimal(l.forward_ns, 1e6),
                    Decimal(l.backward_ns, 1e6), Decimal(l.optimizer_ns, 1e6),
                    Decimal(l.activation_bytes, kMiB), Decimal(l.output_bytes, kMiB), l.parameters);
  }
  return out;
}

Answer<Profile> CheckProfile(Profile p) {
  if (p.layers.empty()) return Refusal{"the profile has no layers", "at least one"};
  if (p.layers.size() > kMaxLayers) {
    return Refusal{fmt::format("{} layers", p.layers.size()),
                   fmt::format("at most {}; join small ones", kMaxLayers)};
  }
  if (p.microbatch == 0 || p.devices_per_node == 0 || p.devices_per_node > kMaxDevices) {
    return Refusal{
        fmt::format("microbatch {} on nodes of {} devices", p.microbatch, p.devices_per_node),
        fmt::format("at least 1 each, at most {} devices", kMaxDevices)};
  }
  for (const Link* link : {&p.inside, &p.between}) {
    if (link->latency_ns < 0 || link->bytes_per_s < 0) {
      return Refusal{
          fmt::format("a link of {} ns and {} bytes/s", link->latency_ns, link->bytes_per_s),
          "neither below 0"};
    }
  }
  if (p.device_memory_bytes < 0) {
    return Refusal{fmt::format("a device memory of {} bytes", p.device_memory_bytes),
                   "0 for no limit"};
  }
  const auto most_ns = static_cast<std::int64_t>(kMaxLayerMs * 1e6);
  std::int64_t total_ns = 0;
  for (std::size_t i = 0; i < p.layers.size(); ++i) {
    const Layer& l = p.layers[i];
    const std::int64_t least = std::min({l.forward_ns, l.backward_ns, l.optimizer_ns, l.parameters,
                                         l.activation_bytes, l.output_bytes});
    if (least < 0 || l.forward_ns + l.backward_ns == 0) {
      return Refusal{fmt::format("layer {} has a negative number or takes no time", i),
                     "measure it again"};
    }
    if (std::max({l.forward_ns, l.backward_ns, l.optimizer_ns}) > most_ns ||
        std::max(l.activation_bytes, l.output_bytes) > kMaxLayerBytes ||
        l.parameters > kMaxLayerParameters) {
      return Refusal{fmt::format("layer {} is beyond the planner's limits", i),
                     fmt::format("{} ms, {} bytes, {} parameters", kMaxLayerMs, kMaxLayerBytes,
                                 kMaxLayerParameters)};
    }
    total_ns += l.forward_ns + l.backward_ns;
  }
  if (total_ns > most_ns) {
    return Refusal{
        fmt::format("a microbatch takes {} ms in all layers together", total_ns / 1000000),
        fmt::format("at most {} ms; a smaller microbatch", kMaxLayerMs)};
  }
  return p;
}

Answer<Profile> CheckSameModel(const Profile& profile, Profile other) {
  if (!profile.model.empty() && !other.model.empty() && profile.model != other.model) {
    return Refusal{fmt::format("the profile is of model {}, not of {}", other.model, profile.model),
                   fmt::format("measure {} and register that", profile.model)};
  }
  if (profile.layers.size() != other.layers.size()) {
    return Refusal{fmt::format("the profile has {} layers, the model {}", other.layers.size(),
                               profile.layers.size()),
                   "measure the model as it is divided now"};
  }
  for (std::size_t i = 0; i < profile.layers.size(); ++i) {
    if (profile.layers[i].parameters == other.layers[i].parameters) continue;
    return Refusal{fmt::format("layer {} has {} parameters in the profile, {} in the model", i,
                               other.layers[i].parameters, profile.layers[i].parameters),
                   "measure the model as it is divided now"};
  }
  return other;
}

std::uint64_t Fingerprint(const Profile& profile) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char c : ProfileText(profile)) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ULL;
  }
  return hash;
}

std::int64_t TransferNs(const Link& link, std::int64_t bytes) {
  if (link.bytes_per_s <= 0 || bytes == 0) return link.latency_ns;
  const double ns =
      std::ceil(static_cast<double>(bytes) / static_cast<double>(link.bytes_per_s) * 1e9);
  // A link so slow that nothing ever arrives is no reason to overflow.
  return link.latency_ns + static_cast<std::int64_t>(std::min(ns, 1e12));
}

}  // namespace everstep::planner
