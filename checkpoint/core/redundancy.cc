#include "checkpoint/core/redundancy.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "proto/base/check.h"

namespace everstep::checkpoint {
namespace {

constexpr char kForms[] =
    "it is replicate(m), xor(k+1) or rs(k+r), for example replicate(2), xor(4+1), rs(4+2)";

std::optional<std::uint32_t> Whole(std::string_view text) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Of "name(inside)" without blanks. Empty: *out has it. Else what is wrong.
std::string Read(std::string_view name, std::string_view inside, Redundancy* out) {
  if (name == "replicate" || name == "copies") {
    const std::optional<std::uint32_t> m = Whole(inside);
    if (!m || *m < 1 || *m > kMostCopies) {
      return std::string(name) +
             "(m) takes the number of copies, the node's own among them, 1 to " +
             std::to_string(kMostCopies);
    }
    *out = {.shards = 1, .parity = *m - 1};
    return {};
  }
  if (name != "xor" && name != "rs") return kForms;
  const std::size_t plus = inside.find('+');
  const std::optional<std::uint32_t> k = Whole(inside.substr(0, plus));
  const std::optional<std::uint32_t> r =
      plus == std::string_view::npos ? std::nullopt : Whole(inside.substr(plus + 1));
  if (!k || !r) {
    return name == "xor" ? "xor takes the states under one parity and 1, as xor(4+1)"
                         : "rs takes the states under a group's parities and those, as rs(4+2)";
  }
  if (*k < 1 || *k > kMostShards) {
    return "k, the nodes whose states share a parity, is 1 to " + std::to_string(kMostShards);
  }
  if (name == "xor" && *r != 1) {
    return "xor has one parity; for " + std::to_string(*r) + " write rs(" + std::to_string(*k) +
           "+" + std::to_string(*r) + ")";
  }
  if (*r < 1 || *r > kMostParity) {
    return "r, the parities of a group, is 1 to " + std::to_string(kMostParity);
  }
  *out = {.shards = *k, .parity = *r};
  return {};
}

}  // namespace

std::string PrintRedundancy(const Redundancy& policy) {
  if (policy.copies()) return "replicate(" + std::to_string(policy.parity + 1) + ")";
  return (policy.parity == 1 ? "xor(" : "rs(") + std::to_string(policy.shards) + "+" +
         std::to_string(policy.parity) + ")";
}

std::string ParseRedundancy(std::string_view text, Redundancy* policy) {
  constexpr std::size_t kMostText = 64;
  std::string bare(text.substr(0, kMostText));
  std::erase_if(bare, [](char c) { return c == ' ' || c == '\t'; });
  const std::size_t open = std::min(bare.find('('), bare.size());
  const bool formed = text.size() <= kMostText && open < bare.size() && bare.back() == ')';
  const std::string_view view = bare;
  const std::string wrong =
      formed ? Read(view.substr(0, open), view.substr(open + 1, view.size() - open - 2), policy)
             : kForms;
  if (wrong.empty()) return {};
  return "redundancy '" + std::string(text.substr(0, kMostText)) + "': " + wrong;
}

Redundancy OnNodes(const Redundancy& policy, std::uint32_t nodes) {
  EVERSTEP_CHECK(nodes >= 1);
  const std::uint32_t parity = std::min(policy.parity, nodes - 1);
  if (parity == 0) return {.shards = 1, .parity = 0};
  return {.shards = std::min(policy.shards, nodes - parity), .parity = parity};
}

RedundancyPrice PriceOf(const Redundancy& policy, std::uint32_t least, std::uint32_t largest) {
  const double r = policy.parity;
  RedundancyPrice price{.memory = r, .sent = r, .restored = 1, .survives = policy.parity};
  if (policy.parity == 0) price.restored = 0;  // from nowhere
  if (policy.copies()) return price;
  EVERSTEP_CHECK(least > policy.parity && largest >= least);
  price.memory = r / static_cast<double>(least - policy.parity);
  price.encoded = r;
  price.restored = static_cast<double>(largest - policy.parity);
  price.decoded = price.restored;
  return price;
}

}  // namespace everstep::checkpoint
